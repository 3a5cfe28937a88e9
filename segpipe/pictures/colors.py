"""Colours as three numbers."""

from __future__ import annotations


def rgb(color: str) -> tuple[int, int, int]:
    """``#1f77b4`` as red, green and blue, 0 to 255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
