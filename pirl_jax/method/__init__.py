"""The method of PIRL as functions of arrays; nothing here reads a config, a disk or a clock."""
