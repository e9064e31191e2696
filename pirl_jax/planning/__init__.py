"""What a run will need, before it is started: its programs compiled for chips that are not there, or an estimate."""
