"""Cards written to disk and read back, as a user's would be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from segpipe.config.card import Card, load_card

CLASSES = [
    {"value": 0, "name": "ground", "color": "#000000", "background": True},
    {"value": 1, "name": "house", "color": "#ff0000"},
    {"value": 2, "name": "water", "color": "#0000ff"},
    {"value": 3, "name": "forest", "color": "#00ff00"},
]

CardMaker = Callable[..., Card]


@pytest.fixture
def make_card(tmp_path: Path) -> CardMaker:
    """``make_card(provider, weights, bands=4, classes=3, **fields)``: a card on disk.

    ``input`` and ``window`` are merged into the defaults.
    """

    def make(
        provider: str,
        weights: str,
        *,
        kind: str = "raster",
        bands: int = 4,
        classes: int = 3,
        **fields: Any,
    ) -> Card:
        data: dict[str, Any] = {
            "name": "trial",
            "kind": kind,
            "provider": provider,
            "weights": weights,
            "input": {"bands": [f"b{i}" for i in range(bands)]},
            "window": {"size": [64], "stride": 32, "halo": [0]},
            "classes": CLASSES[:classes],
        }
        for key, value in fields.items():
            merge = isinstance(value, dict) and key in ("input", "window")
            data[key] = {**data[key], **value} if merge else value
        path = tmp_path / "trial.yaml"
        path.write_text(yaml.safe_dump(data))
        return load_card(path)

    return make


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(20240607)
    torch.set_num_threads(2)
