"""The trunk, the heads, and the network that joins them."""
