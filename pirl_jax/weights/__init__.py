"""Weights out and in: exports the network of a run for other programs, and reads the weights that others publish."""
