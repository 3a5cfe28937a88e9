"""What commands print, and how a process tells no secrets."""

from __future__ import annotations

import sys
from typing import TextIO

from segpipe.redact import clean


def echo(text: object, file: TextIO | None = None) -> None:
    """Print a line without secrets and escapes of terminals, whatever the names in it are."""
    print(clean(str(text)), file=file or sys.stdout)
