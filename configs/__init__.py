"""What can be run: one file for each kind of job, with its variants."""
