"""Parts of a card that are written from another tool's files."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from segpipe.config.classes import color_of

_OVERLAP = 4
"""The halo is this part of a window: windows then begin half a window apart, as is usual elsewhere."""


def card_name(text: str) -> str:
    """Text as the name of a card."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip("._-")[:64]


def fixed_window(size: Sequence[int], strides: Sequence[int]) -> dict[str, Any]:
    """Windows of one size, half a window apart.

    As they keep their size, they are always multiples of the network's own strides; the card's one stride for
    all axes only says where they may begin, and is as large as the halo allows.
    """
    halo = [n // _OVERLAP for n in size]
    stride = math.gcd(*strides, *size, *halo)
    return {"size": list(size), "halo": halo, "stride": stride, "fixed": True}


def class_list(names: Sequence[str]) -> list[dict[str, Any]]:
    """Classes 0, 1, …; the first is background."""
    return [
        {"value": i, "name": name, "color": color_of(i), "background": i == 0} for i, name in enumerate(names)
    ]
