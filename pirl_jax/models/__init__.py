"""The trunk, the heads, and the network that consists of both."""
