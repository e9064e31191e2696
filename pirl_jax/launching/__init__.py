"""Starts jobs: from the command line (`command`) and from Python (`from_python`)."""
