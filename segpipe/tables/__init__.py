"""Data frames of a run and their files."""
