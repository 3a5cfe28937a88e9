"""Losses by name, built from the terms of a recipe."""
