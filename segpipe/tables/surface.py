"""The surface table: distances and boundary agreement by scene and class, as a data frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from segpipe.tables.frames import MEASURED, ClassLike, Found

DISTANCES = {
    "hausdorff": "hausdorff",
    "hausdorff95": "hd95",
    "symmetric": "assd",
    "to_reference": "asd_to_reference",
    "to_prediction": "asd_to_prediction",
    "dice": "surface_dice",
}
"""Field of `segpipe.metrics.surface_distances.Distances` to the column's name."""
BOUNDARY = ("iou", "f1", "precision", "recall")
NOT_DEFINED = "not_defined"
"""State of a scene whose grid has no lengths to measure distances with."""


SceneSurfaces = Found[Mapping[str, Any]]
"""As `segpipe.pipeline.surfaces.measure_surfaces` gives it."""


def surface_table(results: Iterable[SceneSurfaces], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Surfaces by scene and class, background left out, in the order given.

    ``…_element`` are by DeepMind's surface elements, ``…_voxel`` by MONAI's edge voxels;
    ``hausdorff``, ``hd95``, ``assd`` and the directed ``asd`` are in ``unit``; ``surface_dice`` is at
    ``tolerance``, ``boundary_…`` at ``width``, both in ``unit`` too. Empty where not defined: ``reason``.
    """
    numbers = [f"{column}_{kind}" for kind in ("element", "voxel") for column in DISTANCES.values()]
    numbers += [f"boundary_{name}" for name in BOUNDARY]
    order = ["scene", "class", "value", *numbers, "tolerance", "width", "unit", "state", "reason"]
    texts = ("scene", "class", "unit", "state", "reason")
    types = {name: "str" if name in texts else "Int64" if name == "value" else "float64" for name in order}
    known = {c.value: c.name for c in classes if not c.background}
    rows = [row for result in results for row in _rows(result, known)]
    table = pd.DataFrame(rows, columns=order)
    table[list(texts)] = table[list(texts)].fillna("")
    return table.astype(types)


def _rows(result: SceneSurfaces, known: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    found = result.value or {}
    measured = {int(value): surface for value, surface in found.get("classes", {}).items()}
    for value in (*known, *sorted(measured.keys() - known.keys())):
        row: dict[str, Any] = {"scene": result.scene, "class": known.get(value, str(value)), "value": value}
        row |= {"unit": found.get("unit", ""), "width": found.get("width")}
        surface = measured.get(value)
        if surface is None:
            yield {
                **row,
                "state": NOT_DEFINED if found else result.state,
                "reason": found.get("reason") or result.reason,
            }
            continue
        for kind in ("element", "voxel"):
            row |= {f"{column}_{kind}": surface[kind][field] for field, column in DISTANCES.items()}
        row |= {f"boundary_{name}": surface["boundary"][name] for name in BOUNDARY}
        yield {**row, "tolerance": surface["tolerance"], "state": MEASURED, "reason": surface["reason"]}
