"""Prompts and the objective with which promptable models are trained."""
