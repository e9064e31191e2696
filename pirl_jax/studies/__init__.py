"""Studies: many runs, evaluated in the same way, and their figures side by side."""
