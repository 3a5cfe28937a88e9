"""Map rasters of every format GDAL reads, by windows, in the stored dtype."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.config.job import Identity
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry
from segpipe.redact import address
from segpipe.sources.base import (
    TIMES,
    Pixels,
    Scaling,
    Source,
    check_size,
    finite,
    rename_bands,
    require_file,
    scaling_of,
)
from segpipe.sources.gdal import SUFFIX, Handles, cache_for_strips, read_vrt, window_of
from segpipe.sources.identity import file_identity, input_identity, members
from segpipe.sources.remote import is_remote, remote_identity

IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
"""What rasterio returns for a file without a geotransform."""

HUGE = 1e30
"""Nodata values beyond this are some type's maximum, often rounded when written as text."""


@dataclass(frozen=True)
class Band:
    """How one channel is stored."""

    index: int
    """Of the band in the file, from 1."""
    nodata: float | None
    """Declared value that stands for nothing."""
    masked: bool
    """Whether GDAL's mask of this band must be read too."""


class RasterSource(Source):
    """A raster (c, y, x).

    A pixel is valid where *every* band that is read holds data: not its nodata value, inside the
    file's masks (.msk, internal, NODATA_VALUES), alpha above 0, and, in floating point, finite.
    An alpha band is validity and no channel. Values are never scaled: `scaling` says how. A
    raster with a colour table yields the table's indices. Bands of several dtypes are read in
    the smallest dtype that holds them all exactly. South-up and rotated rasters are read as
    they are.
    """

    geometry: RasterGeometry

    def __init__(
        self,
        uri: str,
        *,
        band_names: Sequence[str] = (),
        target: str | None = None,
        files: Sequence[str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Open a raster.

        Args:
            uri: path or URL; stands in every message.
            band_names: names of the channels in file order, over those of the file.
            target: the text of a VRT that we wrote, which GDAL opens instead of ``uri``.
            files: the files that hold the content, where GDAL cannot tell.
            notes: what is known already.

        Raises:
            SceneError: the file is missing, empty, damaged or of a kind we cannot segment.
            RequestError: ``band_names`` has not one name per channel.
        """
        self.uri = uri
        remote = target is None and is_remote(uri)
        if target is None and not remote:
            require_file(Path(uri))
            if uri.lower().endswith(SUFFIX):
                target, files = _own_vrt(uri)
        self._handles = Handles(uri, target, remote=remote)
        with ExitStack() as unless_open:
            unless_open.callback(self.close)
            with self._handles.borrow() as dataset:
                self._describe(dataset)
                found = list(files if files is not None else dataset.files)
            self.notes = (*notes, *self.notes)
            self.identity = self._identify(found, remote)
            rename_bands(self, band_names)
            unless_open.pop_all()

    @property
    def cache_bytes(self) -> int:
        """Of GDAL's block cache: some tiles, or a row of blocks where the file has strips."""
        return self._handles.cache_bytes

    def set_cache_bytes(self, count: int) -> None:
        """Let GDAL's block cache hold so much: it is one for all files that are read together."""
        self._handles.cache_bytes = count

    def _read(self, box: Box, channels: tuple[int, ...]) -> Pixels:
        bands = [self._bands[c] for c in channels]
        window = window_of(box)
        with self._handles.borrow() as dataset:
            if self._mixed:  # rasterio reads bands of one dtype at a time
                each = [dataset.read(b.index, window=window) for b in bands]
                values = np.stack([c.astype(self.dtype) for c in each])
            else:
                values = dataset.read([b.index for b in bands], window=window)
            valid = finite(values)
            for band, channel in zip(bands, values, strict=True):
                if band.masked:
                    valid &= dataset.read_masks(band.index, window=window) > 0
                if band.nodata is not None:
                    valid &= differs(channel, band.nodata)
            if self._dataset_mask:
                valid &= dataset.read_masks(bands[0].index, window=window) > 0
            for alpha in self._alphas:
                valid &= dataset.read(alpha, window=window) > 0
        return Pixels(values, valid)

    def close(self) -> None:
        """Close all handles; those lent to readers close when they come back."""
        self._handles.close()

    def _describe(self, dataset: Any) -> None:
        """Fill in the attributes of a source from an open dataset."""
        if dataset.count == 0:
            raise SceneError(_no_bands(self.uri, dataset))
        check_size(self.uri, dataset.count, (dataset.height, dataset.width))
        # Each of these asks GDAL for all bands: once, not once for each band.
        kinds, dtypes, flags = dataset.colorinterp, dataset.dtypes, dataset.mask_flag_enums
        nodata, scales, offsets = dataset.nodatavals, dataset.scales, dataset.offsets
        names = dataset.descriptions
        alphas = [i for i in dataset.indexes if kinds[i - 1].name == "alpha"]
        channels = [i for i in dataset.indexes if i not in alphas]
        if not channels:  # a mask stored as alpha alone is its own channel
            alphas, channels = [], alphas
        self._alphas = tuple(alphas)
        self.dtype = common_dtype(self.uri, [dtypes[i - 1] for i in channels])
        self._mixed = len({dtypes[i - 1] for i in channels}) > 1
        marks = [{flag.name for flag in found} for found in flags]
        self._bands = tuple(_band(i, dtypes[i - 1], nodata[i - 1], marks[i - 1]) for i in channels)
        self._dataset_mask = any(
            "per_dataset" in marks[i - 1] and "alpha" not in marks[i - 1] for i in channels
        )
        self.count = len(channels)
        self.bands = _names([names[i - 1] for i in channels])
        self.scaling = tuple(scaling_of(scales[i - 1], offsets[i - 1]) for i in channels)
        _, width = dataset.block_shapes[channels[0] - 1]
        # A VRT's blocks are GDAL's guess, not how the pixels are stored.
        if dataset.driver == "VRT" or width == dataset.width:
            row = dataset.width * sum(np.dtype(d).itemsize for d in dtypes)
            self._handles.cache_bytes = cache_for_strips(row)
        self.geometry, where = _geometry(self.uri, dataset)
        told = {tag: dataset.tags(ns=domain).get(tag) for domain, tag in TIMES}
        self.tags = {tag: text for tag, text in told.items() if text}
        self.notes = (*where, *self._pixel_notes(dataset, channels))

    def _pixel_notes(self, dataset: Any, channels: Sequence[int]) -> list[str]:
        notes = []
        bare = all(b.nodata is None and not b.masked for b in self._bands)
        if bare and not self._dataset_mask and not self._alphas:
            notes.append("no nodata value or mask declared: every pixel counts as data")
        kinds = dataset.colorinterp
        if any(kinds[i - 1].name == "palette" for i in channels):
            notes.append("has a colour table: values are its indices, not intensities")
        if self._mixed:
            notes.append(f"bands of several dtypes, all read as {self.dtype}")
        if any(s != Scaling() for s in self.scaling):
            notes.append("declares scale and offset: real value = stored value * scale + offset")
        return notes

    def _identify(self, files: Sequence[str], remote: bool) -> dict[str, Any]:
        content: list[dict[str, Any]]
        if remote:
            note = remote_identity(self.uri)[1]
            content = input_identity(self.uri, Identity.sampled)
            self.notes = (*self.notes, note) if note else self.notes
        else:
            content = file_identity({*files, *(m for f in files for m in members(Path(f)))})
        return {
            # Without the signature, which is another text each time.
            "uri": address(self.uri) if remote else self.uri,
            "files": content,
            "geometry": self.geometry.to_dict(),
            # repr: NaN is not JSON
            "nodata": [repr(b.nodata) for b in self._bands],
            "scaling": [[s.scale, s.offset] for s in self.scaling],
        }


def _own_vrt(uri: str) -> tuple[str, list[str]]:
    """The text of a VRT file for GDAL, and all files that hold its content.

    GDAL opens the sources of a VRT with any driver, so each is opened first as a scene would be.

    Raises:
        SceneError: the VRT or one of its sources is no data.
    """
    text, sources = read_vrt(Path(uri))
    files = [uri]
    for source in sources:
        with closing(Handles(source)) as handles, handles.borrow() as dataset:
            files += dataset.files
    return text, files


def differs(values: np.ndarray, nodata: float) -> np.ndarray:
    """Where the values are not the nodata value: bool, of the same shape."""
    if np.isnan(nodata):
        return np.asarray(~np.isnan(values))
    if values.dtype.kind != "f":
        info = np.iinfo(values.dtype)
        if not float(nodata).is_integer() or not info.min <= nodata <= info.max:
            return np.ones(values.shape, dtype=bool)
        return np.asarray(values != values.dtype.type(int(nodata)))
    if abs(nodata) > HUGE:
        # -1.79769313486232e+308 in a text tag is meant to be -1.7976931348623157e+308.
        return np.asarray(np.abs(values / np.float64(nodata) - 1) > 1e-6)
    return np.asarray(values != values.dtype.type(nodata))


def common_dtype(uri: str, dtypes: Sequence[str]) -> np.dtype[Any]:
    """The smallest dtype that holds the values of all bands exactly.

    Raises:
        SceneError: complex values, or no such dtype.
    """
    if any(d.startswith("complex") for d in dtypes):
        raise SceneError(f"{uri}: complex values ({dtypes[0]}); convert them to amplitude or intensity first")
    common = np.result_type(*(np.dtype(d) for d in dtypes))
    wide = any(np.dtype(d).kind in "iu" and np.dtype(d).itemsize == 8 for d in dtypes)
    if common.kind == "f" and wide:
        raise SceneError(f"{uri}: no dtype holds bands of {', '.join(dtypes)} exactly")
    return common


def _band(index: int, dtype: str, nodata: float | None, flags: set[str]) -> Band:
    # rasterio gives nodata as a float, which rounds 64-bit integers (and gives None where the
    # rounded value is out of range): there GDAL must compare.
    wide = np.dtype(dtype).kind in "iu" and np.dtype(dtype).itemsize == 8
    by_gdal = "nodata" in flags and (wide or nodata is None)
    own_mask = not flags & {"all_valid", "per_dataset", "nodata", "alpha"}
    return Band(index, None if wide else nodata, own_mask or by_gdal)


def _names(descriptions: Sequence[str | None]) -> tuple[str, ...]:
    """Names of the channels; where only some have one, the others are called by their number."""
    if not any(descriptions):
        return ()
    return tuple(text or f"band_{i}" for i, text in enumerate(descriptions, start=1))


def _no_bands(uri: str, dataset: Any) -> str:
    parts = dataset.subdatasets
    if not parts:
        return f"{uri}: the file holds no raster band"
    return (
        f"{uri}: holds {len(parts)} rasters and none of its own; "
        f"make one a GeoTIFF first, such as: gdal_translate '{parts[0]}' scene.tif"
    )


def _geometry(uri: str, dataset: Any) -> tuple[RasterGeometry, list[str]]:
    """The grid, and notes on what is missing of it."""
    a, b, c, d, e, f = (float(v) for v in tuple(dataset.transform)[:6])
    transform = (a, b, c, d, e, f)
    if not np.isfinite(transform).all() or a * e - b * d == 0:
        raise SceneError(f"{uri}: its geotransform {transform} gives pixels no area")
    crs = dataset.crs.to_wkt(version="WKT2_2019") if dataset.crs else None
    notes = []
    unplaced = transform == IDENTITY
    if unplaced and (dataset.gcps[0] or dataset.rpcs):
        how = "ground control points" if dataset.gcps[0] else "RPCs"
        notes.append(f"placed by {how} only, not by a geotransform: warp it to put it on a map")
    if unplaced and crs is not None:
        # One degree or one metre per pixel would be made up, and so would every area.
        notes.append("has a CRS but no geotransform: treated as having neither, sizes in pixels")
        crs = None
    elif crs is None:
        notes.append("no CRS: sizes are in pixels")
    return RasterGeometry((int(dataset.height), int(dataset.width)), transform, crs), notes
