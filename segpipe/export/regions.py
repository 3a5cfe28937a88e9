"""A scene's regions as a GeoPackage: the polygons as they were given, with the numbers measured in them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
from pyproj import CRS

from segpipe.export.common import commit, staging

FACTS = ("seen", "state")
"""Columns that are the same for every class of a region."""
PER_CLASS = ("area_m2", "area_px", "share", "iou", "dice")


def write_regions(
    names: list[str],
    polygons: np.ndarray,
    crs: CRS | None,
    regions: pd.DataFrame,
    metrics: pd.DataFrame | None,
    path: Path,
) -> None:
    """One feature a region, one column a class and number: ``forest area_m2``, ``forest iou``.

    Args:
        names: of the regions.
        polygons: object array, in the layer's own CRS.
        crs: of the polygons.
        regions: the region table of this scene.
        metrics: its metric table, where there is a reference.
        path: of the file; whole or not there at all.
    """
    found = regions.set_index("region")
    columns: dict[str, Any] = {"region": names}
    first = found[~found.index.duplicated()]
    columns |= {fact: first[fact].reindex(names).to_numpy() for fact in FACTS}
    tables = [found] if metrics is None else [found, metrics.set_index("region")]
    for name in dict.fromkeys(regions["class"]):
        for table in tables:
            rows = table[table["class"] == name]
            rows = rows[~rows.index.duplicated()]
            for number in (n for n in PER_CLASS if n in table):
                columns[f"{name} {number}"] = rows[number].reindex(names).to_numpy(dtype=np.float64)
    layer = geopandas.GeoDataFrame(columns, geometry=polygons, crs=crs)
    with staging(path) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a layer without a CRS stays without one
        layer.to_file(folder / path.name, driver="GPKG", layer="regions", engine="pyogrio")
        commit(folder / path.name, path)
