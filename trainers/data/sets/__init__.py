"""Data sets by name, each with its source, its hash and its task."""
