"""The protocols that judge a network: one file each."""
