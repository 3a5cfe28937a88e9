"""Cells of CSV files that a spreadsheet would take for formulas: how they are written and read."""

from __future__ import annotations

import csv
import re

CSV_ERRORS = (OSError, ValueError, csv.Error)
"""What reading a CSV file raises; ValueError: it is not UTF-8, or its path holds a NUL."""
_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
"""What a text begins with that a spreadsheet would calculate, or that looks as if we had escaped it."""


def escape_cell(text: str) -> str:
    """The text with an apostrophe in front where a spreadsheet would take it for a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def plain_cell(text: str) -> str:
    """The inverse of `escape_cell`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
