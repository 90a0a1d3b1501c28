"""Floor 7: one thin file a command, and no logic that the Python API lacks."""
