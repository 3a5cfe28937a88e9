"""Label maps, ids of objects and score maps as Cloud-Optimised GeoTIFF, written window by window.

Two passes: windows go into a plain tiled TIFF, which GDAL's COG driver then copies with overviews.
Overviews of labels take the most frequent value (MODE), so no value appears that is not in the
map. DEFLATE, because every GIS reads it; no predictor for labels, because differences of class
ids are noise (measured on a land-cover map: 13 % larger with it).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from PIL.ImageColor import getrgb
from pyproj import CRS
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.staging import (
    commit,
    commit_text,
    fit_labels,
    gdal_pam,
    label_dtype,
    qgis_style,
    staging,
)
from segpipe.geometry.box import grid_boxes
from segpipe.geometry.geometry import RasterGeometry
from segpipe.sources.base import LabelReader, ScoreReader
from segpipe.sources.gdal import window_of

TILE = 512
STEP = 4 * TILE
"""Edge of a read, in pixels: whole tiles, so that each tile is compressed once."""
CACHE_BYTES = 64 * 2**20
"""GDAL's block cache; its default, 5 % of the machine, lets memory follow the size of the raster."""


def write_cog(
    labels: LabelReader,
    geometry: RasterGeometry,
    classes: Sequence[Class],
    nodata: int | None,
    path: Path,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write a label map as a COG with palette and class names, atomically and reproducibly.

    Beside it lie ``<path>.aux.xml`` (names for GDAL and ArcGIS) and a ``.qml`` style (QGIS); the
    names are also in the TIFF itself, in the tag ``CLASSES``.

    Args:
        labels: windowed reader; called with boxes of at most `STEP` squared, in C order.
        geometry: written as it is: full affine and CRS.
        classes: values, names and colours; the palette needs values up to 255.
        nodata: the value of pixels without data, or None.
        path: local file; its folder is made.
        tags: further dataset tags. The file's bytes depend on these and the pixels only.

    Raises:
        SceneError: a label does not fit the card's classes, or the file cannot be written.
    """
    dtype = label_dtype(classes, nodata)
    names = {str(c.value): c.name for c in sorted(classes, key=lambda c: c.value)}
    tags = {**(tags or {}), "CLASSES": json.dumps(names, ensure_ascii=False)}
    palette = {c.value: (*getrgb(c.color), 255) for c in classes} if dtype == np.uint8 else {}
    with _cog(path, geometry, ["class"], dtype, nodata, tags, classes, named=True) as target:
        for box in grid_boxes(geometry.shape, (STEP, STEP)):
            target.write(fit_labels(labels(box), dtype, box, path), 1, window=window_of(box))
        if palette:
            target.write_colormap(1, palette)


def write_cog_scores(
    scores: ScoreReader,
    geometry: RasterGeometry,
    classes: Sequence[Class],
    path: Path,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write probabilities as a float32 COG, one band per class named after it; NaN is nodata.

    Args:
        scores: windowed reader of (class, y, x).
        geometry: written as it is.
        classes: in the order of the score channels.
        path: local file.
        tags: further dataset tags.
    """
    dtype = np.dtype(np.float32)
    with _cog(path, geometry, [c.name for c in classes], dtype, float("nan"), tags, classes) as target:
        for box in grid_boxes(geometry.shape, (STEP, STEP)):
            target.write(np.asarray(scores(box), dtype=dtype), window=window_of(box))


def write_cog_ids(
    ids: LabelReader,
    geometry: RasterGeometry,
    dtype: np.dtype[Any],
    path: Path,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write the ids of objects as a COG; 0, no object, is nodata.

    So a cell of an overview has the most frequent of the objects in it, however small: none disappears
    into the ground.

    Args:
        ids: windowed reader, called as in `write_cog`.
        geometry: written as it is.
        dtype: uint32 or uint64.
        path: local file.
        tags: further dataset tags.

    Raises:
        SceneError: an id does not fit the dtype, or the file cannot be written.
    """
    with _cog(path, geometry, ["object"], dtype, 0, tags, ()) as target:
        for box in grid_boxes(geometry.shape, (STEP, STEP)):
            target.write(fit_labels(ids(box), dtype, box, path), 1, window=window_of(box))


@contextmanager
def _cog(
    path: Path,
    geometry: RasterGeometry,
    bands: Sequence[str],
    dtype: np.dtype[Any],
    nodata: float | None,
    tags: Mapping[str, str] | None,
    classes: Sequence[Class],
    *,
    named: bool = False,
) -> Iterator[rasterio.io.DatasetWriter]:
    """Open a plain tiled TIFF to write windows into, of scores if dtype is floating; a COG at the end.

    Beside it lies ``<path>.aux.xml`` where GeoTIFF keys cannot hold the CRS, or where the classes are
    ``named``: then a ``.qml`` style too.
    """
    rows, columns = geometry.shape
    crs = None if geometry.crs is None else rasterio.CRS.from_wkt(geometry.crs)
    with staging(path) as folder, _gdal(path):
        draft, final = folder / "draft.tif", folder / "final.tif"
        with rasterio.open(
            draft, "w", driver="GTiff", height=rows, width=columns, count=len(bands), dtype=dtype.name,
            nodata=nodata, crs=crs, transform=Affine(*geometry.transform), interleave="band",
            bigtiff="IF_SAFER", tiled=True, blockxsize=TILE, blockysize=TILE,
            compress="ZSTD", zstd_level=1,  # fast; this file lives for a minute
        ) as target:  # fmt: skip
            yield target
            target.update_tags(**(tags or {}))
            for number, name in enumerate(bands, start=1):
                target.set_band_description(number, name)
        predictor, resampling = ("FLOATING_POINT", "AVERAGE") if dtype.kind == "f" else ("NO", "MODE")
        _copy(draft, final, predictor, resampling)
        lost = _crs_lost(final, geometry)
        if named or lost is not None:
            commit_text(folder, path.with_name(path.name + ".aux.xml"), gdal_pam(classes, lost))
        if named:
            commit_text(folder, path.with_suffix(".qml"), qgis_style(classes))
        commit(final, path)  # last: who sees the map finds its names


@contextmanager
def _gdal(path: Path) -> Iterator[None]:
    """GDAL with a bounded cache; its errors become the scene's error, naming the file."""
    try:
        with warnings.catch_warnings(), rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_PAM_ENABLED="NO"):
            warnings.simplefilter("ignore", NotGeoreferencedWarning)  # the scene's notes say it
            yield
    except (RasterioError, CPLE_BaseError) as error:
        raise SceneError(f"{path}: cannot be written as a COG ({error})") from error


def _copy(draft: Path, final: Path, predictor: str, resampling: str) -> None:
    rasterio.shutil.copy(
        draft,
        final,
        driver="COG",
        BLOCKSIZE=TILE,
        COMPRESS="DEFLATE",
        LEVEL=6,
        PREDICTOR=predictor,
        OVERVIEWS="IGNORE_EXISTING",
        OVERVIEW_RESAMPLING=resampling,
        NUM_THREADS="ALL_CPUS",  # the same bytes: tiles are compressed apart and written in order
        BIGTIFF="IF_SAFER",
    )


def _crs_lost(final: Path, geometry: RasterGeometry) -> CRS | None:
    """The scene's CRS where GeoTIFF keys did not keep it exactly, else None.

    Raises:
        SceneError: the affine itself was not kept.
    """
    with rasterio.open(final, driver="GTiff") as file:
        if tuple(file.transform)[:6] != geometry.transform:
            raise SceneError(
                f"{final.name}: the affine {geometry.transform} cannot be kept in a GeoTIFF "
                f"(read back: {tuple(file.transform)[:6]})"
            )
        if geometry.projection is None:
            return None
        kept = None if file.crs is None else CRS.from_wkt(file.crs.to_wkt(version="WKT2_2019"))
    return None if kept == geometry.projection else geometry.projection
