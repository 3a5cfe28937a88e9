"""Promptable networks behind one interface."""
