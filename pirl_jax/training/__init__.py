"""One run of pre-training: its parts, its loop, and how it stops and resumes."""
