"""Several rasters as one scene, without copying a pixel: ``mosaic:GLOB``.

We write the GDAL VRT ourselves, as text in memory: where each file lies on the common grid. The
files are taken in the order of their paths. Where they overlap, the **last** one that holds data
wins, as with ``gdalbuildvrt``; its nodata and masked pixels let the earlier ones through. Pixels
in no file are invalid.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
from affine import Affine
from rasterio.dtypes import dtype_rev, typename_fwd

from segpipe.errors import SceneError
from segpipe.sources.base import matches, require_file
from segpipe.sources.gdal import Handles
from segpipe.sources.raster import IDENTITY, RasterSource, common_dtype

MOSAIC = "mosaic:"

OFF_GRID = 0.01
"""Pixels by which a file may lie beside the common grid: more would need resampling."""


@dataclass(frozen=True)
class Tile:
    """One file of a mosaic."""

    path: str
    shape: tuple[int, int]
    """(rows, columns)"""
    affine: Affine
    """Pixel corners (column, row) to the CRS."""
    files: tuple[str, ...]
    """The file and its sidecars."""
    masked: bool
    """Whether it has a mask or an alpha band besides nodata."""
    common: dict[str, Any]
    """What must be the same in all files, by what to call it."""
    indexes: tuple[int, ...]
    """Bands of the file, from 1, without alpha."""
    block: tuple[int, int]
    """(rows, columns) in which the file is stored."""


def mosaic_files(uri: str) -> list[str]:
    """The files of ``mosaic:GLOB``, absolute, sorted by path."""
    return [str(p) for p in matches(uri.removeprefix(MOSAIC)) if p.is_file()]


def open_mosaic(uri: str, *, band_names: Sequence[str] = ()) -> RasterSource:
    """Open the rasters of ``mosaic:GLOB`` as one scene.

    Raises:
        SceneError: nothing matches; a file is damaged or has no position; the files differ in
            CRS, pixel size, bands, dtype, nodata value, scale or offset; or one does not lie on
            the grid of the first.
        RequestError: ``band_names`` has not one name per channel.
    """
    paths = mosaic_files(uri)
    if not paths:
        raise SceneError(f"{uri}: no file matches")
    tiles = [_tile(path) for path in paths]
    for tile in tiles[1:]:
        _require_same(tiles[0], tile)
    text = vrt_text(tiles)
    files = [f for tile in tiles for f in tile.files]
    note = f"mosaic of {len(tiles)} files; where they overlap, the last by path wins"
    return RasterSource(uri, band_names=band_names, target=text, files=files, notes=[note])


def vrt_text(tiles: Sequence[Tile]) -> str:
    """The VRT that lays the tiles on one grid.

    Raises:
        SceneError: a tile does not lie on the grid of the first.
    """
    offsets = [_offset(tiles[0], tile) for tile in tiles]
    top, left = (min(o[axis] for o in offsets) for axis in (0, 1))
    offsets = [(row - top, column - left) for row, column in offsets]
    rows = max(o[0] + t.shape[0] for o, t in zip(offsets, tiles, strict=True))
    columns = max(o[1] + t.shape[1] for o, t in zip(offsets, tiles, strict=True))
    # The corner as a file has it, where one lies there: the product differs in the last bits.
    a, b, c, d, e, f = tuple(tiles[0].affine)[:6]
    corner = next(
        (t.affine for o, t in zip(offsets, tiles, strict=True) if o == (0, 0)),
        Affine(a, b, c + a * left + b * top, d, e, f + d * left + e * top),
    )
    root = ET.Element("VRTDataset", rasterXSize=str(columns), rasterYSize=str(rows))
    common = tiles[0].common
    if common["CRS"] is not None:
        ET.SubElement(root, "SRS").text = common["CRS"].to_wkt(version="WKT2_2019")
    ET.SubElement(root, "GeoTransform").text = ", ".join(repr(v) for v in corner.to_gdal())
    placed = list(zip(tiles, offsets, strict=True))
    for number in range(1, len(common["dtypes"]) + 1):
        _add_band(root, number, placed)
    if any(t.masked for t in tiles) or any(v is None for v in common["nodata values"]):
        # Without a nodata value only a mask can tell the gaps between the files from data.
        mask = ET.SubElement(ET.SubElement(root, "MaskBand"), "VRTRasterBand", dataType="Byte")
        for tile, offset in placed:
            # NODATA 0: a later file's masked pixels do not mask what an earlier one has there.
            source = _add_source(mask, "ComplexSource", tile, offset, "mask,1", "Byte")
            ET.SubElement(source, "NODATA").text = "0"
    return ET.tostring(root, encoding="unicode")


def _add_band(root: ET.Element, number: int, placed: Sequence[tuple[Tile, tuple[int, int]]]) -> None:
    """One band of the mosaic, drawn from each tile in turn."""
    common = placed[0][0].common
    kind = typename_fwd[dtype_rev[common["dtypes"][number - 1]]]  # numpy's name to GDAL's
    nodata = common["nodata values"][number - 1]
    band = ET.SubElement(root, "VRTRasterBand", dataType=kind, band=str(number))
    if common["band names"][number - 1]:
        ET.SubElement(band, "Description").text = common["band names"][number - 1]
    if nodata is not None:
        ET.SubElement(band, "NoDataValue").text = nodata
    ET.SubElement(band, "Offset").text = repr(common["offsets"][number - 1])
    ET.SubElement(band, "Scale").text = repr(common["scales"][number - 1])
    for tile, offset in placed:
        # A SimpleSource copies bit for bit; only what shows through needs the complex one.
        plain = nodata is None and not tile.masked
        name = "SimpleSource" if plain else "ComplexSource"
        source = _add_source(band, name, tile, offset, str(tile.indexes[number - 1]), kind)
        if nodata is not None:
            ET.SubElement(source, "NODATA").text = nodata
        if tile.masked:
            ET.SubElement(source, "UseMaskBand").text = "true"


def _add_source(
    band: ET.Element, name: str, tile: Tile, offset: tuple[int, int], index: str, kind: str
) -> ET.Element:
    rows, columns = tile.shape
    source = ET.SubElement(band, name)
    ET.SubElement(source, "SourceFilename", relativeToVRT="0").text = tile.path
    ET.SubElement(source, "SourceBand").text = index
    # Spares GDAL to open every file of a thousand just to know its size.
    ET.SubElement(
        source,
        "SourceProperties",
        RasterXSize=str(columns),
        RasterYSize=str(rows),
        DataType=kind,
        BlockXSize=str(tile.block[1]),
        BlockYSize=str(tile.block[0]),
    )
    size = {"xSize": str(columns), "ySize": str(rows)}
    ET.SubElement(source, "SrcRect", {"xOff": "0", "yOff": "0", **size})
    ET.SubElement(source, "DstRect", {"xOff": str(offset[1]), "yOff": str(offset[0]), **size})
    return source


def _tile(path: str) -> Tile:
    """Describe one file.

    Raises:
        SceneError: it is missing, damaged, complex or without a position.
    """
    require_file(Path(path))
    with closing(Handles(path)) as handles, handles.borrow() as dataset:
        return _described(path, dataset)


def _described(path: str, dataset: Any) -> Tile:
    transform = tuple(float(v) for v in tuple(dataset.transform)[:6])
    if transform == IDENTITY:
        raise SceneError(f"{path}: has no geotransform, so it has no place in a mosaic")
    alphas = {i for i in dataset.indexes if dataset.colorinterp[i - 1].name == "alpha"}
    indexes = tuple(i for i in dataset.indexes if i not in alphas)
    if not indexes:
        raise SceneError(f"{path}: holds no band to show in a mosaic")
    dtypes = tuple(dataset.dtypes[i - 1] for i in indexes)
    common_dtype(path, dtypes)
    flags = {f.name for i in indexes for f in dataset.mask_flag_enums[i - 1]}
    masked = bool(alphas) or not flags <= {"all_valid", "nodata"}
    common = {
        "CRS": dataset.crs or None,
        "pixel vectors": (transform[0], transform[1], transform[3], transform[4]),
        "dtypes": dtypes,
        "nodata values": tuple(_number(dataset.nodatavals[i - 1], dtypes[0]) for i in indexes),
        "band names": tuple(dataset.descriptions[i - 1] or "" for i in indexes),
        "scales": tuple(float(dataset.scales[i - 1]) for i in indexes),
        "offsets": tuple(float(dataset.offsets[i - 1]) for i in indexes),
    }
    if masked and any(dataset.nodatavals[i - 1] is not None for i in indexes):
        # GDAL would look at one of the two and ignore the other.
        raise SceneError(
            f"{path}: has both a nodata value and a mask or alpha band; in a mosaic only one of "
            "them can say what lies below, so remove the other"
        )
    wide = any(np.dtype(d).kind in "iu" and np.dtype(d).itemsize == 8 for d in dtypes)
    if wide and (masked or "nodata" in flags):
        # GDAL composes what shows through in float64, which would round these.
        raise SceneError(
            f"{path}: 64-bit integers with nodata or masks cannot join a mosaic exactly; "
            "store them as 32-bit integers"
        )
    files = tuple(dataset.files)
    shape = (int(dataset.height), int(dataset.width))
    rows, columns = dataset.block_shapes[indexes[0] - 1]
    block = (int(rows), int(columns))
    return Tile(path, shape, Affine(*transform), files, masked, common, indexes, block)


def _number(nodata: float | None, dtype: str) -> str | None:
    """A nodata value as GDAL writes it in a VRT, or None."""
    if nodata is None:
        return None
    integer = np.dtype(dtype).kind in "iu" and float(nodata).is_integer()
    return str(int(nodata)) if integer else repr(float(nodata))


def _require_same(first: Tile, other: Tile) -> None:
    for what, value in first.common.items():
        found = other.common[what]
        if what == "pixel vectors":
            same = bool(np.allclose(found, value, rtol=1e-9, atol=0))
        else:
            same = found == value
        if not same:
            a, b = (_short(v) for v in (value, found))
            where = f"{a} as in {first.path}"
            raise SceneError(f"{other.path}: cannot join the mosaic, its {what} differ: {b}, not {where}")


def _short(value: Any) -> str:
    text = value.to_string() if hasattr(value, "to_string") else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _offset(first: Tile, tile: Tile) -> tuple[int, int]:
    """(row, column) of the tile's corner on the grid of the first."""
    a, b, c, d, e, f = tuple(first.affine)[:6]
    apart = (tile.affine.c - c, tile.affine.f - f)
    column, row = np.linalg.solve([[a, b], [d, e]], apart).tolist()
    near = (round(row), round(column))
    error = max(abs(row - near[0]), abs(column - near[1]))
    if error > OFF_GRID:
        raise SceneError(
            f"{tile.path}: cannot join the mosaic, it lies {error:.3g} pixels beside the grid "
            f"of {first.path}; warp it onto that grid first"
        )
    return near
