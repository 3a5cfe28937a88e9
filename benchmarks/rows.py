"""What a line of the families table is made of: a card on disk, and the library's own answer to a window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.optimize import linear_sum_assignment

BANDS = 5
"""Of the raster."""
ALL_BANDS = [f"b{i}" for i in range(BANDS)]
CLASSES = 7


@dataclass(frozen=True, eq=False)
class Segments:
    """Objects of a window, as a library has them."""

    ids: np.ndarray
    """(y, x): 0 none, k the k-th object."""
    classes: np.ndarray
    """(n,) class values; object k's at place k − 1."""


Labels = Callable[[torch.Tensor], np.ndarray]
"""From a normalised window (1, c, …) to the index of each element's class, (…)."""
Objects = Callable[[torch.Tensor], Segments]
"""From a normalised window (1, c, y, x) to its objects."""


@dataclass(frozen=True)
class Made:
    """A card, and what is called without segpipe."""

    card: Path
    labels: Labels | None = None
    """Of semantic cards."""
    objects: Objects | None = None
    """Of the others: the library's masks by the rule that `segpipe.objects.window` names."""
    unchanged: Objects | None = None
    """The library's map as it is, where that rule is another than the library's."""


@dataclass(frozen=True)
class Row:
    """A line: ``make`` writes card and weights into a folder."""

    name: str
    provider: str
    make: Callable[[Path], Made]
    ndim: int = 2


def class_fields(
    count: int = CLASSES, background: bool = False, stuff: int = CLASSES
) -> list[dict[str, Any]]:
    """Classes 0, 1, …, as a card has them; those from ``stuff`` on are no things."""
    return [
        {
            "value": i,
            "name": f"c{i}",
            "color": "#808080",
            "background": background and i == 0,
            "thing": i < stuff,
        }
        for i in range(count)
    ]


def write_card(
    folder: Path,
    provider: str,
    ndim: int = 2,
    name: str = "card",
    bands: Sequence[str] = ALL_BANDS,
    **fields: Any,
) -> Path:
    """A card in a folder. Windows are of 256² elements unless ``window`` says otherwise; it is merged."""
    window = {"size": [256], "halo": [32], "stride": 32, "forward_bytes": 1200, **fields.pop("window", {})}
    data: dict[str, Any] = {
        "name": name,
        "kind": "raster" if ndim == 2 else "volume",
        "provider": provider,
        "input": {
            "bands": bands if ndim == 2 else [],
            "normalisation": [{"op": "scene_zscore"}],
        },
        "window": window,
        "classes": class_fields(),
        **fields,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(_plain(data)))
    return path


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def best(scores: torch.Tensor) -> np.ndarray:
    """The first class of the highest score: (1, k, …) → (…)."""
    return np.asarray(scores[0].argmax(0).numpy())


def painted(masks: np.ndarray, classes: np.ndarray, scores: np.ndarray) -> Segments:
    """Binary masks (n, y, x), painted over one another from the lowest score up (Kirillov et al. 2019)."""
    ids = np.zeros(masks.shape[1:], np.int64)
    for k in np.argsort(-scores, kind="stable")[::-1]:
        ids[masks[k] > 0] = k + 1
    return Segments(ids, classes)


def unlike(ids: np.ndarray, labels: np.ndarray, wanted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Where an element has another class, or belongs to another object.

    Objects of both sides are matched one to one, so that most elements agree; no object matches no object.

    Args:
        ids: (n,) objects found, 0 none.
        labels: (n,) class values found.
        wanted: (n,) the library's objects.
        values: (n,) the library's class values.
    """
    shared = np.zeros((int(ids.max(initial=0)) + 1, int(wanted.max(initial=0)) + 1), np.int64)
    np.add.at(shared, (ids, wanted), 1)
    partner = np.full(len(shared), -1)
    partner[0] = 0
    rows, columns = linear_sum_assignment(shared[1:, 1:], maximize=True)
    partner[rows + 1] = columns + 1
    return (partner[ids] != wanted) | (labels != values)
