"""Devices and processes, and what a program shows while it works."""
