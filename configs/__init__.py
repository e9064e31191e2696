"""The configs: one file for each kind of job, with its variants."""
