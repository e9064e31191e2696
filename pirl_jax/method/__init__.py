"""PIRL on arrays: no config, no disk, no clock."""
