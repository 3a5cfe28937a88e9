"""Promptable models: prompts, grounders that turn text into boxes, segmenters that turn boxes into masks."""
