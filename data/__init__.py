"""What there is to read: tokens, rows, runs, tasks, and a folder for each data set."""
