"""The report of runs, one HTML file, and the meanings of all figures."""
