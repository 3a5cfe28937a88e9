"""What tells that an input is another one: stage keys, finished runs and lakes' ledgers all ask this module.

An input's identity is a JSON value with an entry for each file that holds its content (`members`). A store's
ETag or version identifies a remote file. A local file is identified by size, time of change and the hash of
sixteen ranges, or, on request, by size and the hash of all its bytes. Inode and ctime are in no entry:
another machine may see others of the same share, and a restored copy is the same content. Here they only say
that a file has not changed since this process hashed it.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

from segpipe.config.job import Identity
from segpipe.errors import SceneError
from segpipe.redact import address
from segpipe.sources.base import reason
from segpipe.sources.remote import is_remote, remote_hash, remote_identity

SAMPLES, SAMPLE_BYTES = 16, 4096
"""Ranges that are hashed of a file, from its first to its last byte; smaller files are hashed whole."""
RECENT_NS = 2 * 10**9
"""A file that changed so recently may change again within one tick of its clock: nothing is remembered."""
PAM = ".aux.xml"
BESIDE = (PAM, ".msk", ".MSK", ".ovr", ".OVR", ".msk.ovr", "-wal", "-journal")
"""Suffixes, behind a file's whole name, of files that GDAL reads with it."""
REMOTE_BESIDE = (PAM, ".msk", ".ovr")
FAMILIES = (
    (".shp", ".shx", ".dbf", ".prj", ".cpg", ".idm", ".ind", ".qix", ".sbn", ".sbx"),
    (".tab", ".dat", ".map", ".id", ".ind"),
    (".mif", ".mid"),
    (".img", ".hdr", ".mat", ".ige", ".rrd", ".rde", ".aux"),
    *((data, ".hdr", ".prj", ".clr", ".stx", ".sta") for data in (".bil", ".bip", ".bsq", ".dat", ".bin")),
    (".hdr", ".img", ".mat"),
    (".csv", ".csvt", ".prj"),
    (".asc", ".prj"),
    *((data, ".tab", ".imd", ".rpb", "_rpc.txt", "_metadata.txt") for data in (".tif", ".tiff", ".ntf")),
)
"""Files of one stem that are read together; the first is what a job names."""
WORLD_FILES = (
    ".tif", ".tiff", ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".jp2", ".webp", ".bil", ".bip", ".bsq",
)  # fmt: skip
"""Suffixes of rasters that a text file of six numbers may place."""


def members(path: Path) -> list[Path]:
    """Return every file that holds the content of a local input: itself, its sidecars, what it refers to.

    Of a folder these are its files; of a ``.gdb`` or ``.zarr`` those below it too.
    """
    if path.is_dir():
        deep = path.suffix.lower() in (".gdb", ".zarr")
        return sorted(p for p in (path.rglob("*") if deep else path.iterdir()) if p.is_file())
    suffix, stem = path.suffix.lower(), str(path)[: len(str(path)) - len(path.suffix)]
    tails = {tail for family in FAMILIES if family[0] == suffix for tail in family[1:]}
    if suffix in WORLD_FILES:
        tails |= {f"{suffix[:2]}{suffix[-1]}w", f"{suffix}w", ".wld"}
    names = {str(path), *(f"{path}{tail}" for tail in BESIDE)}
    names |= {stem + tail for name in tails for tail in (name, name.upper())}
    if ".hdr" in tails:
        names.add(f"{path}.hdr")
    found = {p for p in map(Path, names) if p.is_file()}
    if suffix == ".vrt":
        found |= {member for source in _vrt_sources(path) for member in members(Path(source))}
    return sorted(found)


def _vrt_sources(path: Path) -> list[str]:
    from segpipe.sources.gdal import read_vrt  # loads rasterio

    try:
        return read_vrt(path)[1]
    except SceneError:  # opening it says why
        return []


def file_identity(paths: Iterable[str | Path], how: Identity = Identity.sampled) -> list[dict[str, Any]]:
    """Return what tells that files change, an entry each, sorted by path.

    Args:
        paths: of local files; or URLs.
        how: whether some ranges of a local file are hashed, or all bytes of every file.

    Raises:
        SceneError: a file has gone.
    """
    content = how is Identity.content
    return [entry for path in sorted({str(p) for p in paths}) if (entry := _entry(path, content))]


def input_identity(location: str, how: Identity) -> list[dict[str, Any]]:
    """Return the identity of a file or folder with all its `members`, or of a URL with its sidecars."""
    if not is_remote(location):
        return file_identity(members(Path(location)), how)
    beside = () if "?" in location or ".nii" in location.lower() else REMOTE_BESIDE
    there = (uri for tail in beside if remote_identity(uri := location + tail)[1] is None)
    return file_identity([location, *there], how)


def identified(identity: Any, how: Identity) -> Any:
    """Return an identity with the hash of all bytes in each file's entry, where that is asked for."""
    if how is Identity.sampled:
        return identity
    if isinstance(identity, dict):
        if _is_entry(identity):
            return _entry(identity["uri"], True)
        return {key: identified(value, how) for key, value in identity.items()}
    return [identified(value, how) for value in identity] if isinstance(identity, list) else identity


def check_unchanged(identity: Any) -> None:
    """Take an identity's entries again and compare them.

    Args:
        identity: taken before the files were read.

    Raises:
        SceneError: a file is another one now; names it.
    """
    for entry in _entries(identity):
        now = _entry(entry["uri"], "sha256" in entry)
        silent = is_remote(entry["uri"]) and now is not None and "size" not in now  # its store tells nothing
        if now != entry and not silent:
            raise SceneError(f"{entry['uri']}: changed while it was read; run the job again")


def _entries(identity: Any) -> Iterator[dict[str, Any]]:
    if isinstance(identity, dict) and _is_entry(identity):
        yield identity
    elif isinstance(identity, dict | list):
        for value in identity.values() if isinstance(identity, dict) else identity:
            yield from _entries(value)


def _is_entry(value: dict[str, Any]) -> bool:
    return "uri" in value and ("size" in value or "said" in value)


def _entry(path: str, content: bool) -> dict[str, Any] | None:
    """Return a file's entry; None for a sidecar that says nothing but statistics.

    Raises:
        SceneError: the file has gone.
    """
    if is_remote(path):
        told = remote_identity(path)[0]
        if content and "size" in told:
            return {"uri": address(path), "size": told["size"], "sha256": remote_hash(path, repr(told))}
        return told
    try:
        if path.endswith(PAM):
            said = _said(Path(path).read_bytes())
            return {"uri": path, "said": said} if said else None
        found = Path(path).stat()
        stamp = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
        recent = time.time_ns() - found.st_ctime_ns < RECENT_NS
        hashed = (_hash if recent else _hash_once)(path, stamp, content)
    except OSError as error:
        raise SceneError(f"{path}: {reason(error)}") from error
    if content:
        return {"uri": path, "size": found.st_size, "sha256": hashed}
    return {"uri": path, "size": found.st_size, "mtime_ns": found.st_mtime_ns, "sampled": hashed}


def _hash(path: str, stamp: tuple[int, ...], content: bool) -> str:
    """Return the SHA-256 of a file, or of its samples."""
    size = stamp[0]
    with Path(path).open("rb") as file:
        if content:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        if size <= SAMPLES * SAMPLE_BYTES:
            digest.update(file.read(size))
        else:
            step = (size - SAMPLE_BYTES) / (SAMPLES - 1)
            for n in range(SAMPLES):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, round(n * step)))
    return digest.hexdigest()[:32]


_hash_once = lru_cache(maxsize=100_000)(_hash)


def _said(text: bytes) -> str:
    """Return a hash of what GDAL's sidecar says beside the statistics that viewers add; empty: nothing."""
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError, LookupError):
        return hashlib.sha256(text).hexdigest()
    for _ in range(4):  # as deep as statistics lie: what is left empty goes too
        for parent in list(root.iter()):
            for child in list(parent):
                empty = child.tag in ("Metadata", "PAMRasterBand") and not len(child)
                if empty or child.tag == "Histograms" or child.get("key", "").startswith("STATISTICS_"):
                    parent.remove(child)
    said = ET.canonicalize(ET.tostring(root, encoding="unicode"), strip_text=True)
    return hashlib.sha256(said.encode()).hexdigest() if len(root) else ""
