"""Label maps, ids of objects and score maps as Cloud-Optimised GeoTIFF, written window by window.

Two passes: windows go into a plain tiled TIFF, which GDAL's COG driver then copies with overviews.
Overviews of labels take the most frequent value (MODE), so no value appears that is not in the
map. DEFLATE, because every GIS reads it; no predictor for labels, because differences of class
ids are noise (measured on a land-cover map: 13 % larger with it).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from pyproj import CRS
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.common import commit, fit_labels, label_dtype, staging
from segpipe.export.sidecars import gdal_pam, qgis_style
from segpipe.geometry.box import Box, grid_boxes
from segpipe.geometry.geometry import RasterGeometry
from segpipe.pictures.colors import rgb
from segpipe.sources.base import LabelReader, ScoreReader

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
    profile = _profile(geometry, 1, dtype, nodata)
    with staging(path) as folder, _gdal(path):
        draft, final = folder / "draft.tif", folder / "final.tif"
        with rasterio.open(draft, "w", **profile) as target:
            for box in grid_boxes(geometry.shape, (STEP, STEP)):
                target.write(fit_labels(labels(box), dtype, box, path), 1, window=_window(box))
            target.update_tags(**dict(tags or {}), CLASSES=json.dumps(names, ensure_ascii=False))
            target.set_band_description(1, "class")
            if dtype == np.uint8:
                palette = {c.value: (*rgb(c.color), 255) for c in classes}
                target.write_colormap(1, palette)
        _copy(draft, final, predictor="NO", resampling="MODE")
        sidecars = {
            path.with_name(path.name + ".aux.xml"): gdal_pam(classes, _crs_lost(final, geometry)),
            path.with_suffix(".qml"): qgis_style(classes),
        }
        for target_path, text in sidecars.items():
            part = folder / target_path.name
            part.write_text(text, encoding="utf-8", newline="\n")
            commit(part, target_path)
        commit(final, path)  # last: who sees the map finds its names


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
    profile = _profile(geometry, len(classes), np.dtype(np.float32), float("nan"))
    with staging(path) as folder, _gdal(path):
        draft, final = folder / "draft.tif", folder / "final.tif"
        with rasterio.open(draft, "w", **profile) as target:
            for box in grid_boxes(geometry.shape, (STEP, STEP)):
                target.write(np.asarray(scores(box), dtype=np.float32), window=_window(box))
            target.update_tags(**dict(tags or {}))
            for index, item in enumerate(classes):
                target.set_band_description(index + 1, item.name)
        _copy(draft, final, predictor="FLOATING_POINT", resampling="AVERAGE")
        _commit_with_crs(final, geometry, classes, path)


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
    with staging(path) as folder, _gdal(path):
        draft, final = folder / "draft.tif", folder / "final.tif"
        with rasterio.open(draft, "w", **_profile(geometry, 1, dtype, 0)) as target:
            for box in grid_boxes(geometry.shape, (STEP, STEP)):
                target.write(fit_labels(ids(box), dtype, box, path), 1, window=_window(box))
            target.update_tags(**dict(tags or {}))
            target.set_band_description(1, "object")
        _copy(draft, final, predictor="NO", resampling="MODE")
        _commit_with_crs(final, geometry, (), path)


class _gdal:  # noqa: N801 - reads as a with-statement
    """GDAL with a bounded cache; its errors become the scene's error, naming the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._env = rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_PAM_ENABLED="NO")
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._warnings.__enter__()
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # the scene's notes say it
        self._env.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._env.__exit__(kind, error, trace)
        self._warnings.__exit__(kind, error, trace)
        if isinstance(error, RasterioError):
            raise SceneError(f"{self._path}: cannot be written as a COG ({error})") from error


def _profile(
    geometry: RasterGeometry, count: int, dtype: np.dtype[Any], nodata: float | None
) -> dict[str, Any]:
    rows, columns = geometry.shape
    return {
        "driver": "GTiff",
        "height": rows,
        "width": columns,
        "count": count,
        "dtype": dtype.name,
        "nodata": nodata,
        "crs": None if geometry.crs is None else rasterio.CRS.from_wkt(geometry.crs),
        "transform": Affine(*geometry.transform),
        "tiled": True,
        "blockxsize": TILE,
        "blockysize": TILE,
        "compress": "ZSTD",  # fast; this file lives for a minute
        "zstd_level": 1,
        "interleave": "band",
        "bigtiff": "IF_SAFER",
    }


def _window(box: Box) -> Window:
    return Window(box.start[1], box.start[0], box.shape[1], box.shape[0])


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


def _commit_with_crs(final: Path, geometry: RasterGeometry, classes: Sequence[Class], path: Path) -> None:
    """Make a finished file visible, after the sidecar that has its CRS where GeoTIFF keys cannot hold it."""
    crs = _crs_lost(final, geometry)
    if crs is not None:
        part = final.with_name("draft.aux.xml")
        part.write_text(gdal_pam(classes, crs), encoding="utf-8", newline="\n")
        commit(part, path.with_name(path.name + ".aux.xml"))
    commit(final, path)


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
