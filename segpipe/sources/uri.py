"""What a path or URI is: raster, NIfTI or DICOM, one frame of a file, a whole folder."""

from __future__ import annotations

import hashlib
import re
import struct
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from segpipe import redact
from segpipe.errors import RequestError, SceneError
from segpipe.redact import seal, whole

RASTER_SUFFIXES = (
    ".tif", ".tiff", ".vrt", ".jp2", ".img", ".ntf", ".nitf", ".kea", ".bil", ".bip", ".bsq",
)  # fmt: skip
"""Rasters that are taken from a folder."""
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Rasters only where named or matched by a glob: beside scenes they are previews."""
ONE_FILE_NIFTI = (".nii", ".nii.gz", ".nii.bz2", ".nii.zst")
NIFTI_SUFFIXES = (*ONE_FILE_NIFTI, ".img.gz")
DICOM_SUFFIXES = (".dcm", ".ima")

PACKAGE = "pkg://"
SERIES = "#series="
"""Before the SeriesInstanceUID of one series of a folder."""
PROBES = 16
"""Files of a folder that are looked into for DICOM."""


class Kind(StrEnum):
    """Which reader opens it."""

    raster = "raster"
    nifti = "nifti"
    dicom = "dicom"


def kind_of(path: Path) -> Kind:
    """The reader for a file or folder, by suffix, and by content where a suffix says too little."""
    name = path.name.lower()
    if path.is_dir():
        return Kind.dicom
    if name.endswith(NIFTI_SUFFIXES):
        return Kind.nifti
    if name.endswith((".img", ".hdr")):
        # ERDAS and ENVI rasters share these suffixes with NIfTI pairs and Analyze.
        return Kind.nifti if _is_analyze_header(path.with_suffix(".hdr")) else Kind.raster
    return Kind.dicom if is_dicom_file(path) else Kind.raster


def is_dicom_file(path: Path) -> bool:
    """Whether the file has DICOM's suffix or its mark after the preamble of 128 bytes."""
    if path.name.upper() == "DICOMDIR":
        return False
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return True
    return _bytes_of(path, 128, 4) == b"DICM"


def holds_dicom(folder: Path) -> bool:
    """Whether a folder directly holds DICOM files; looks into the first few without a suffix."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    if any(p.name.lower().endswith(DICOM_SUFFIXES) for p in files):
        return True
    known = (*RASTER_SUFFIXES, *PICTURE_SUFFIXES, *NIFTI_SUFFIXES)
    unknown = [p for p in files if not p.name.lower().endswith(known)]
    return any(is_dicom_file(p) for p in unknown[:PROBES])


def reveal(uri: str) -> str:
    """What a server is asked with: the URI with its secret, and with variables of the environment.

    Raises:
        SceneError: a variable that it names is not there.
    """
    try:
        return redact.reveal(uri)
    except KeyError as error:
        raise SceneError(
            f"{uri}: the environment of this process has no variable {error.args[0]}; set it where scenes "
            "are read, on workers too"
        ) from error


def parse_frame(uri: str) -> tuple[str, int | None]:
    """Split ``path#frame=N`` into path and frame (from 0).

    Raises:
        RequestError: N is no whole number.
    """
    path, mark, number = whole(uri).partition("#frame=")
    if not mark:
        return uri, None
    if not number.isdecimal() or len(number) > 9:
        raise RequestError(f"{uri}: expected #frame=N with N = 0, 1, 2, …; found {number!r}")
    return seal(path), int(number)


def parse_series(uri: str) -> tuple[str, str | None]:
    """Split ``folder#series=UID`` into folder and series.

    It may be ``UID@FRAME``, where a series has several frames of reference, and empty for files without UID.

    Raises:
        RequestError: these are no UIDs.
    """
    path, mark, series = uri.partition(SERIES)
    if not mark:
        return uri, None
    if not re.fullmatch(r"[0-9.]{0,64}(@[0-9.]{0,64})?", series):
        raise RequestError(f"{uri}: expected {SERIES}UID with digits and dots; found {series!r}")
    return path, series


def series_label(series: str) -> str:
    """A short name for one series of a folder: UIDs are long, and their beginnings alike."""
    return hashlib.sha256(series.encode()).hexdigest()[:8]


def _is_analyze_header(path: Path) -> bool:
    """Whether the file begins with the size of an Analyze, NIfTI-1 or NIfTI-2 header."""
    head = _bytes_of(path, 0, 4)
    if len(head) < 4:
        return False
    sizes = {*struct.unpack("<i", head), *struct.unpack(">i", head)}
    return bool(sizes & {348, 540})


def _bytes_of(path: Path, offset: int, count: int) -> bytes:
    """Some bytes of a file; none where it cannot be read (its reader will say why)."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(count)
    except OSError:
        return b""


def package_file(uri: str) -> Path:
    """The file that a ``pkg://distribution/path/in/dist`` URI names.

    It is looked up in the distribution's own list of files, never by searching folders: some
    distributions put bare folders such as ``data/`` into site-packages, and a path alone would
    then name whichever came first.

    Raises:
        RequestError: the URI is malformed, the distribution is not installed, it has no such
            file, or the file has gone.
    """
    distribution, _, inside = uri.removeprefix(PACKAGE).partition("/")
    if not uri.startswith(PACKAGE) or not distribution or not inside:
        raise RequestError(f"{uri}: expected {PACKAGE}DISTRIBUTION/PATH/IN/IT")
    try:
        listed = files(distribution)
    except PackageNotFoundError:
        hint = f"try: pip install {distribution}"
        raise RequestError(f"{uri}: the distribution {distribution!r} is not installed; {hint}") from None
    if listed is None:
        raise RequestError(f"{uri}: the distribution {distribution!r} keeps no list of its files")
    for entry in listed:
        if entry.as_posix() == inside:
            path = Path(str(entry.locate()))
            if not path.is_file():
                raise RequestError(f"{uri}: listed by {distribution!r}, but {path} has gone")
            return path
    name = inside.rpartition("/")[2]
    alike = sorted(entry.as_posix() for entry in listed if entry.name == name)
    hint = f"; it has {', '.join(alike[:3])}" if alike else ""
    raise RequestError(f"{uri}: the distribution {distribution!r} has no file {inside!r}{hint}")
