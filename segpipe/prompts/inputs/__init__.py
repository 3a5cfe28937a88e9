"""Files and labels to prompts on the grid of a scene."""
