"""Plots of runs and evaluations, drawn without a display."""
