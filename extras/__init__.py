"""One file per feature; each may be deleted."""
import data  # noqa: F401  before torch is imported
