"""Fuzzing of what reads data of others: see `tools.fuzz.__main__` and CONTRIBUTING.md."""
