"""Embeddings of windows and prompts to the masks of a scene."""
