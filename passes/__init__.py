"""The passes, one a file. Each is usable alone and by name."""
