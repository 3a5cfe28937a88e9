"""Vector files, opened only by the drivers that `segpipe.process.gdal_drivers` allows."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyogrio
import shapely
from pyproj.exceptions import ProjError

from segpipe.errors import RequestError, SceneError
from segpipe.process.gdal_drivers import OWN_DRIVERS, SKIPPED_DRIVERS, VECTOR_DRIVERS, skip_list
from segpipe.sources.base import reason, require_file
from segpipe.sources.readers import Access, readers, roots_of, trusted
from segpipe.sources.remote import fetch, is_remote

VECTOR_ERRORS = (
    pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, shapely.errors.ShapelyError, ProjError,
    OSError, ValueError, KeyError, TypeError, AttributeError,  # the latter: metadata of GeoParquet
    UnboundLocalError,  # pyogrio 0.13, where GDAL has no text for a CRS
    zipfile.BadZipFile, zlib.error, EOFError, RuntimeError,  # the last: a zip with a password
)  # fmt: skip
"""What pyogrio, pyarrow, GEOS, PROJ and zipfile raise at files that are damaged, or none of theirs."""

MOST_VERTICES = 50_000_000
"""Of a layer: a gigabyte of coordinates."""


def _keep_allowed_drivers() -> None:
    """Remove every other driver from pyogrio's GDAL: it takes no list of drivers where it opens a file.

    `skip_other_drivers` cannot do that alone: pyogrio may have been imported before, and
    rasterio warns of each name in the environment that only pyogrio's GDAL has.

    Raises:
        ImportError: some stay.
    """
    others = set(pyogrio.list_drivers()) - {*VECTOR_DRIVERS, *OWN_DRIVERS}
    if others:
        # GDAL registers all drivers anew and then applies both lists; a name in both would be a warning.
        names = tuple(sorted(others - set(SKIPPED_DRIVERS)))
        pyogrio.set_gdal_config_options({"OGR_SKIP": skip_list(names, "OGR_SKIP")})
        pyogrio._ogr._register_drivers()
        others = set(pyogrio.list_drivers()) - {*VECTOR_DRIVERS, *OWN_DRIVERS}
    if others:
        raise ImportError(f"pyogrio {pyogrio.__version__} keeps the drivers {', '.join(sorted(others))}")


_keep_allowed_drivers()


def list_layers(path: str) -> list[str]:
    """Return the names of a file's layers that have a geometry.

    Raises:
        SceneError: no allowed driver opens the file, or its reader ended.
        RequestError: it names a URL that GDAL would read.
    """
    with _local(path) as (file, access):
        if trusted():
            return layers_here(file)
        answer, _ = readers.ask(path, access, {"do": "layers", "uri": file})
    return [str(name) for name in answer["layers"]]


def read_layer(path: str, layer: str | None) -> geopandas.GeoDataFrame:
    """Return a layer of a file that `list_layers` has checked; None: that of a GeoParquet file.

    Raises:
        SceneError: it cannot be read, or its reader ended.
        RequestError: it has more than `MOST_VERTICES`, or GeoParquet has spherical edges.
    """
    with _local(path) as (file, access):
        if trusted():
            return frame_here(file, layer)
        _, body = readers.ask(path, access, {"do": "layer", "uri": file, "layer": layer})
    return geopandas.read_feather(io.BytesIO(body))


@contextmanager
def _local(path: str) -> Iterator[tuple[str, Access]]:
    """The file on a local disk, copied there from a URL, and what a reader must touch to read it."""
    copy = fetch(path) if is_remote(path) else None
    file = Path(path) if copy is None else copy.path
    yield str(file), Access(roots_of([file]))


def layers_here(path: str) -> list[str]:
    """Do what `list_layers` does, in this process."""
    require_file(Path(path))
    try:
        _require_no_links(path)
        return [str(row[0]) for row in pyogrio.list_layers(path) if row[1] is not None]
    except VECTOR_ERRORS as error:
        raise SceneError(f"{path}: cannot be read: {reason(error)}") from error


def frame_here(path: str, layer: str | None) -> geopandas.GeoDataFrame:
    """Do what `read_layer` does, in this process."""
    require_file(Path(path))
    try:
        frame = _parquet(path) if layer is None else geopandas.read_file(path, layer=layer, engine="pyogrio")
    except VECTOR_ERRORS as error:
        raise SceneError(f"{path}: cannot be read: {reason(error)}") from error
    if not frame.columns.is_unique:
        twice = frame.columns[frame.columns.duplicated()][0]
        raise SceneError(f"{path}: cannot be read: it has the attribute {twice!r} twice")
    vertices = int(shapely.get_num_coordinates(np.asarray(frame.geometry.array)).sum())
    if vertices > MOST_VERTICES:
        raise RequestError(
            f"{path}: found {vertices} vertices; valid: up to {MOST_VERTICES}; simplify it or cut it in parts"
        )
    return frame


def frame_bytes(path: str, layer: str | None) -> bytes:
    """Return `frame_here` as Feather, which keeps types, geometry and CRS."""
    file = io.BytesIO()
    frame_here(path, layer).to_feather(file)
    return file.getvalue()


def _parquet(path: str) -> geopandas.GeoDataFrame:
    """GeoParquet; edges must be straight, as in every other format here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*spherical edges")
        try:
            return geopandas.read_parquet(path)
        except UserWarning as error:
            raise RequestError(f"{path} has spherical edges; write it with planar ones, densified") from error


def _require_no_links(path: str) -> None:
    """Reject GeoJSON whose CRS is a link: GDAL fetches it.

    Raises:
        RequestError: the file has such a CRS, or may have and is no valid JSON.
    """
    for text in _texts(path):
        if text.lstrip(b"\x1e\xef\xbb\xbf \t\r\n")[:1] not in (b"{", b"[", b"/"):
            continue
        plain = re.sub(rb"\\u00([0-9a-fA-F]{2})", lambda m: bytes([int(m[1], 16)]), text).lower()
        # Most files have no such words, and are not parsed twice.
        if b"crs" in plain and (b"link" in plain or b"url" in plain) and _has_link(text):
            raise RequestError(f"{path}: its CRS is a link, which is not followed; state the CRS by its name")


def _texts(path: str) -> Iterator[bytes]:
    """The bytes of a file, or of each member of a zip file."""
    if not Path(path).is_file():
        return
    if not zipfile.is_zipfile(path):
        yield Path(path).read_bytes()
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            yield archive.read(member)


def _has_link(text: bytes) -> bool:
    """Whether JSON, or JSON by lines, has a ``crs`` of type link or URL; True where it is no JSON."""
    try:
        try:
            return _links(json.loads(text))
        except ValueError:
            rows = (line.strip(b"\x1e \t\r") for line in text.split(b"\n"))
            return any(_links(json.loads(row)) for row in rows if row)
    except (ValueError, RecursionError):
        return True


def _links(value: Any) -> bool:
    if isinstance(value, list):
        return any(_links(v) for v in value)
    if not isinstance(value, dict):
        return False
    return any(
        (key.lower() == "crs" and isinstance(v, dict) and _type(v) in ("link", "url")) or _links(v)
        for key, v in value.items()
    )


def _type(crs: dict[str, Any]) -> str:
    return next((str(v).lower() for key, v in crs.items() if key.lower() == "type"), "")
