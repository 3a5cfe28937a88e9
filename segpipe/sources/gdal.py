"""The few things we need of rasterio: handles for many threads, errors on one line, URLs, checked VRTs."""

from __future__ import annotations

import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import rasterio
from rasterio._err import CPLE_BaseError
from rasterio._path import _parse_path
from rasterio.env import Env, ensure_env_with_credentials
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.process.gdal_drivers import RASTER_DRIVERS, RASTERIO_DRIVERS, skip_list
from segpipe.sources.base import reason
from segpipe.sources.hdf5 import is_hdf5, require_own_data
from segpipe.sources.remote import is_remote
from segpipe.sources.uri import reveal

# A raster without a position is a note of its source: the report shows it, a warning is lost.
# Filtered once and for all because warnings.catch_warnings is not safe among threads.
warnings.filterwarnings("ignore", category=NotGeoreferencedWarning)

# GDAL registers its drivers in the first environment of a process, and never again.
with Env(GDAL_SKIP=skip_list(RASTERIO_DRIVERS)):
    pass

GDAL_ERRORS = (RasterioError, CPLE_BaseError, CRSError, OSError)
"""What opening or reading a damaged file raises."""

REMOTE_OPTIONS = {
    # Do not list a bucket of a million files to find sidecars: ask for each by name.
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",
    "GDAL_HTTP_MAX_RETRY": "4",
    "GDAL_HTTP_RETRY_DELAY": "1",
    # A server that says nothing fails the scene instead of holding the run for ever.
    "GDAL_HTTP_CONNECTTIMEOUT": "30",
    "GDAL_HTTP_LOW_SPEED_LIMIT": "1",
    "GDAL_HTTP_LOW_SPEED_TIME": "60",
}
"""GDAL options for files behind a URL."""

LOCAL_OPTIONS = {"CPL_VSIL_CURL_ALLOWED_FILENAME": "none"}
"""GDAL options for local files: no metadata of a file makes GDAL read a URL."""

SIDECARS = (".msk", ".MSK", ".ovr", ".OVR", ".msk.ovr")
"""Suffixes of files that GDAL opens beside a raster, with any driver."""
HDF5_DRIVERS = ("HDF5", "HDF5Image", "netCDF", "KEA")
"""Drivers of files that may show what lies in others (`segpipe.sources.hdf5`)."""
TIFF_SIGNATURES = (b"II*\0", b"II+\0", b"MM\0*", b"MM\0+")
"""First bytes of TIFF and BigTIFF, which masks and overviews are."""

_TRUE = ("1", "true", "yes", "on")


def store_options() -> dict[str, str]:
    """GDAL options that say of an S3 store what the environment says in the words of AWS's own tools.

    So ``AWS_ENDPOINT_URL`` (or ``AWS_ENDPOINT_URL_S3``) and ``AWS_SKIP_SIGNATURE``, which the listing and the
    results' store read, are enough. What is set for GDAL itself (``AWS_S3_ENDPOINT``, …) stands.
    """
    found = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        scheme, _, host = endpoint.rstrip("/").rpartition("://")
        hosted = os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in _TRUE
        found["AWS_S3_ENDPOINT"] = host
        found["AWS_HTTPS"] = "NO" if scheme == "http" else "YES"
        # Other stores than Amazon's rarely have a name for each bucket.
        found["AWS_VIRTUAL_HOSTING"] = "TRUE" if hosted else "FALSE"
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in _TRUE:
        found["AWS_NO_SIGN_REQUEST"] = "YES"
    return {key: value for key, value in found.items() if key not in os.environ}


CACHE_BYTES = 64 * 2**20
"""GDAL's cache of decoded blocks, enough for tiles; its default, 5 % of the machine, lets memory
follow the size of the raster. The user's own GDAL_CACHEMAX stands."""

CACHE_LIMIT = 512 * 2**20
"""The most for a raster in strips, where reading a box decodes rows of the whole width."""

CACHED_ROWS = 2560
"""A row of blocks with their halos: with so many rows cached, no strip is decoded twice."""


def cache_for_strips(row_bytes: int) -> int:
    """Bytes of cache for a raster in strips whose rows, of all bands, have this many bytes."""
    return min(max(row_bytes * CACHED_ROWS, CACHE_BYTES), CACHE_LIMIT)


def open_raster(path: str) -> Any:
    """Open a raster for reading, by a driver that decodes the file's own pixels.

    Args:
        path: of a local file, or a URL.

    Raises:
        RasterioError: no such driver opens it.
        SceneError: a mask or overviews beside it are no TIFF, its metadata name overviews elsewhere, or it is
            HDF5 whose data lie in another file.
    """
    for sidecar in (Path(path + suffix) for suffix in SIDECARS):
        if sidecar.is_file() and not _first_bytes(sidecar).startswith(TIFF_SIGNATURES):
            raise SceneError(f"{sidecar}: is no TIFF, as the mask and the overviews of a raster are")
    if Path(path).is_file() and is_hdf5(Path(path)):
        require_own_data(Path(path))
    dataset = _open_dataset(path)
    if is_remote(path) and dataset.driver in HDF5_DRIVERS:
        dataset.close()
        raise SceneError(
            f"{path}: a {dataset.driver} file is not read behind a URL: copy it, or make it a GeoTIFF"
        )
    if dataset.tags(ns="OVERVIEWS"):
        dataset.close()
        raise SceneError(f"{path}: its metadata have OVERVIEW_FILE, a file that is not opened; remove it")
    return dataset


@ensure_env_with_credentials  # type: ignore[untyped-decorator]  # rasterio has no types
def _open_dataset(path: str) -> Any:
    """Do what `rasterio.open` does, which takes one driver and no list of them."""
    return DatasetReader(_parse_path(path), driver=list(RASTER_DRIVERS))


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(1024)


def _what_it_holds(path: str) -> str:
    """Say what a local text file holds that names other data, or nothing."""
    start = _first_bytes(Path(path)) if Path(path).is_file() else b""
    tag = re.match(rb"\s*(?:<[?!][^>]*>\s*)*<(\w+)", start.removeprefix(b"\xef\xbb\xbf"))
    return f" (it holds <{tag[1].decode()}>: a scene has pixels of its own)" if tag else ""


def gdal_reason(error: BaseException) -> str:
    """What GDAL said: rasterio keeps it in the cause of "Read failed. See previous exception"."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return reason(cause)


def window_of(box: Box) -> Window:
    """GDAL's (column, row, width, height) of a box (y, x)."""
    (row, column), (height, width) = box.start, box.shape
    return Window(column, row, width, height)


class Handles:
    """Open datasets of one raster, lent to one thread at a time.

    A GDAL dataset must not be used by two threads at once, and one behind a lock would make the
    readers wait for each other. So there are as many handles as there are readers at the same
    time: opened when first needed, reused, closed by `close`.
    """

    def __init__(self, uri: str, vrt: str | None = None, *, remote: bool = False) -> None:
        """Open nothing yet.

        Args:
            uri: path or URL; stands in every message.
            vrt: the text of a VRT that we wrote, which GDAL opens instead.
            remote: whether ``uri`` is a URL.
        """
        self._uri = uri
        self._vrt = vrt
        self._remote = remote
        self.cache_bytes = CACHE_BYTES
        self._idle: list[Any] = []
        self._lock = threading.Lock()
        self._closed = False

    @contextmanager
    def borrow(self) -> Iterator[Any]:
        """A dataset for the caller alone.

        Raises:
            SceneError: the file cannot be opened or, inside the block, read.
        """
        with self._options():
            with self._lock:
                dataset = self._idle.pop() if self._idle else None
            if dataset is None:
                dataset = self._open()
            try:
                yield dataset
            except GDAL_ERRORS as error:
                raise SceneError(f"{self._uri}: cannot be read: {gdal_reason(error)}") from error
            finally:
                self._give_back(dataset)

    def close(self) -> None:
        """Close what is idle now, and what is lent as soon as it comes back."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for dataset in idle:
            dataset.close()

    def _options(self) -> Env:
        options: dict[str, Any] = {**REMOTE_OPTIONS, **store_options()} if self._remote else {**LOCAL_OPTIONS}
        if "GDAL_CACHEMAX" not in os.environ:
            options["GDAL_CACHEMAX"] = self.cache_bytes
        return Env(**options)

    def _open(self) -> Any:
        try:
            if self._vrt is not None:
                return rasterio.open(self._vrt, driver="VRT")
            return open_raster(reveal(self._uri) if self._remote else self._uri)
        except GDAL_ERRORS as error:
            found = "" if self._remote else _what_it_holds(self._uri)
            raise SceneError(f"{self._uri}: cannot be opened: {gdal_reason(error)}{found}") from error

    def _give_back(self, dataset: Any) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(dataset)
                return
        dataset.close()


SUFFIX = ".vrt"

ELEMENTS = frozenset(
    (
        "VRTDataset", "SRS", "GeoTransform", "GCPList", "GCP", "Metadata", "MDI", "MaskBand",
        "VRTRasterBand", "Description", "NoDataValue", "HideNoDataValue", "ColorInterp", "ColorTable",
        "Entry", "CategoryNames", "Category", "UnitType", "Offset", "Scale", "OverviewList", "SimpleSource",
        "ComplexSource",
        "SourceFilename", "SourceBand", "SourceProperties", "SrcRect", "DstRect", "NODATA", "UseMaskBand",
        "ScaleOffset", "ScaleRatio", "ColorTableComponent", "LUT",
    )
)  # fmt: skip
"""Elements that only lay pixels of files on a grid; none of them names a driver, an option or a function."""


def read_vrt(path: Path) -> tuple[str, list[str]]:
    """Return a VRT's text with absolute paths, and the paths of its sources.

    GDAL gets this text and not the file, so it sees what was checked here, however it parses XML.

    Raises:
        SceneError: the file is no VRT; has an element or a kind of band beyond copies of files' pixels;
            or has a source that is no file of its own on a local disk.
    """
    try:
        root = ET.fromstring(path.read_bytes())
    except (ET.ParseError, ValueError, LookupError, OSError) as error:
        raise SceneError(f"{path}: cannot be opened: it is no VRT ({reason(error)})") from error
    sources = []
    for element in root.iter():
        _check_element(path, element)
        if element.tag == "SourceFilename":
            source = _source(path, element.text or "")
            element.text, element.attrib = source, {"relativeToVRT": "0"}
            sources.append(source)
    if root.tag != "VRTDataset":
        raise SceneError(f"{path}: cannot be opened: it holds <{root.tag}>, not <VRTDataset>")
    return ET.tostring(root, encoding="unicode"), list(dict.fromkeys(sources))


def _check_element(path: Path, element: ET.Element) -> None:
    """Reject what is more than a copy of pixels.

    Raises:
        SceneError: it is.
    """
    found = ""
    if element.tag not in ELEMENTS:
        found = f"<{element.tag}>"
    elif "subClass" in element.attrib:
        found = f'<{element.tag} subClass="{element.attrib["subClass"]}">'
    elif element.attrib.get("key", "").upper() == "OVERVIEW_FILE":
        found = "overviews in another file"
    if found:
        raise SceneError(
            f"{path}: the VRT has {found}; only copies of the pixels of files are read from a VRT: "
            f"write it as a GeoTIFF first, with gdal_translate"
        )


def _source(path: Path, name: str) -> str:
    """The absolute path of a source.

    Raises:
        SceneError: it is no file on a local disk, or none below the VRT's folder.
    """
    folder = path.absolute().parent
    place = Path(os.path.normpath(folder / name))
    # GDAL takes a name with "<" for the text of a dataset, and one that begins with /vsi for a file system.
    if not name or "<" in name or str(place).startswith("/vsi") or not place.is_file():
        raise SceneError(f"{path}: the VRT has the source {name!r}, which is no file on a local disk")
    if not place.is_relative_to(os.path.normpath(folder)):
        raise SceneError(
            f"{path}: the VRT has the source {name!r}; valid: files below the folder of the VRT; put the VRT "
            "there, or list the files with mosaic:"
        )
    return str(place.resolve())
