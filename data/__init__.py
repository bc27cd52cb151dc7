"""What there is to read: tokens, rows, runs, tasks, and a folder for each data set."""
import os

# Read when torch loads its threads, so this comes first. Waiting in a spin they are ten times as
# slow beside another busy program; yielding after so many turns costs nothing on a quiet machine.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '6000')

try:
    import torch  # noqa: F401
except KeyboardInterrupt:   # it takes a second; program() of data/files.py is not there yet
    raise SystemExit(130) from None
