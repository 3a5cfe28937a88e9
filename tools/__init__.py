"""Tools that measure the repository: its structure, its outputs and its start-up time."""
