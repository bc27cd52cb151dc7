"""One file per stage of training beyond text and conversations."""
