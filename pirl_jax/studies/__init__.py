"""Studies: many runs, judged alike, and their figures side by side."""
