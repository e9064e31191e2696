"""Devices, processes and memory, and the progress that a program shows while it works."""
