"""Everything that is written to disk and read again: checkpoints, the log, and the formats of both."""
