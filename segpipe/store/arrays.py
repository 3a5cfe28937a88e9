"""How a stage's arrays are laid out, and what other tools read of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry
from segpipe.tiling.windows import Blocks

IMAGE_CODEC = BloscCodec(cname="lz4", shuffle="shuffle")
LABEL_CODEC = ZstdCodec(level=5)


@dataclass(frozen=True)
class ArraySpec:
    """An array of a stage."""

    name: str
    dtype: str
    fill: float | int | bool
    channels: int = 0
    """Leading channel axis; 0: none."""
    labels: bool = False
    """Labels compress with zstd, everything else with blosc-lz4 and shuffle."""


def create_array(group: zarr.Group, spec: ArraySpec, geometry: Geometry | None, blocks: Blocks) -> None:
    """Make one array of a stage, whose shards are its blocks.

    Raises:
        ContainsArrayError: of Zarr; it is there already.
    """
    lead = (spec.channels,) if spec.channels else ()
    names = ("channel",) if spec.channels else ()
    array = group.create_array(
        spec.name,
        shape=lead + blocks.shape,
        shards=lead + blocks.block,
        chunks=lead + blocks.chunk,
        dtype=spec.dtype,
        fill_value=spec.fill,
        compressors=LABEL_CODEC if spec.labels else IMAGE_CODEC,
        dimension_names=names + ("z", "y", "x")[-len(blocks.shape) :],
    )
    if isinstance(geometry, RasterGeometry):
        array.attrs["grid_mapping"] = "spatial_ref"


def conventions(geometry: Geometry, arrays: Iterable[ArraySpec]) -> Mapping[str, Any]:
    """Group attributes that other tools read: CF grid mapping for rasters, OME-Zarr for volumes."""
    if isinstance(geometry, RasterGeometry):
        a, b, c, d, e, f = geometry.transform
        mapping = {"GeoTransform": f"{c!r} {a!r} {b!r} {f!r} {d!r} {e!r}"}
        if geometry.crs is not None:
            mapping["crs_wkt"] = geometry.crs
        return {"segpipe:geometry": geometry.to_dict(), "spatial_ref": mapping}
    assert isinstance(geometry, VolumeGeometry)
    scale = list(geometry.spacing)
    axes = [{"name": n, "type": "space", "unit": "millimeter"} for n in ("z", "y", "x")]
    multiscales = []
    for spec in arrays:
        lead = [{"name": "c", "type": "channel"}] if spec.channels else []
        factors = [1.0] * len(lead) + scale
        transform = [{"type": "scale", "scale": factors}]
        datasets = [{"path": spec.name, "coordinateTransformations": transform}]
        multiscales.append({"name": spec.name, "axes": lead + axes, "datasets": datasets})
    return {
        "segpipe:geometry": geometry.to_dict(),
        "ome": {"version": "0.5", "multiscales": multiscales},
    }
