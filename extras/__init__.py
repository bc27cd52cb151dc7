"""One file per feature; each may be deleted."""
