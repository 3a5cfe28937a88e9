"""Scenes that keep arriving: what is new in a lake, what of it is done, and who is at it."""
