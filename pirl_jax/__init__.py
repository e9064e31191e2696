"""Pre-training of image networks by pretext invariance (PIRL, arXiv 1912.01991) in JAX and Flax."""
