"""Tallies and what follows from them: pure functions on arrays."""
