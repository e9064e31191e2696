"""Chooses the settings of a run that depend on its images and devices, and estimates what a step needs."""
