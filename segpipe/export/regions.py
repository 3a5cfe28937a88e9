"""A scene's regions as a GeoPackage: the polygons as they were given, with the numbers measured in them."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd

from segpipe.export.common import commit, staging
from segpipe.regions import Layer

FACTS = ("seen", "state")
"""Columns that are the same for every class of a region."""
PER_CLASS = ("area_m2", "area_px", "share", "iou", "dice")
MOST_CLASSES = 300
"""A GeoPackage's table has at most 2,000 columns."""


def write_regions(layer: Layer, regions: pd.DataFrame, metrics: pd.DataFrame | None, path: Path) -> None:
    """One feature a region, one column a class and number: ``forest area_m2``, ``forest iou``.

    Args:
        layer: polygons by the names of the region table, in their own CRS; others are left out.
        regions: the region table of this scene, of at most `MOST_CLASSES` classes.
        metrics: its metric table, where there is a reference.
        path: of the file; whole or not there at all.
    """
    measured = np.isin(layer.names, regions["region"].unique())
    names = np.array(layer.names)[measured]
    first = regions.drop_duplicates("region").set_index("region")
    columns: dict[str, Any] = {"region": names, **{f: first[f].reindex(names).to_numpy() for f in FACTS}}
    titles = _titles(regions)
    for value, title in titles.items():
        for table in (t for t in (regions, metrics) if t is not None):
            rows = table[table["value"] == value].set_index("region")
            for number in (n for n in PER_CLASS if n in table):
                columns[f"{title} {number}"] = rows[number].reindex(names).to_numpy(dtype=np.float64)
    frame = geopandas.GeoDataFrame(columns, geometry=layer.polygons[measured], crs=layer.crs)
    with staging(path) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layer without a CRS stays without one
        frame.to_file(folder / path.name, driver="GPKG", layer="regions", engine="pyogrio")
        commit(folder / path.name, path)


def _titles(regions: pd.DataFrame) -> dict[int, str]:
    """Class value to name; those that differ in case only get their value too: SQL knows no case."""
    found = regions.drop_duplicates("value")
    values, names = found["value"].tolist(), found["class"].tolist()
    times = Counter(name.lower() for name in names)
    return {
        v: f"{name} ({v})" if times[name.lower()] > 1 else name for v, name in zip(values, names, strict=True)
    }
