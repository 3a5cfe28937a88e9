"""What is in a lake: scenes as a stream, whatever kind of lake it is; BIDS trees and DICOM series here.

A BIDS tree is read from the names that the standard gives to folders and files. Of DICOM files only headers
are read, and of these nothing on a patient.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from segpipe.config.scan import Lake, LakeKind
from segpipe.lake.entry import LakeEntry, place_name, stamp
from segpipe.lake.files import UNFINISHED, list_files, local_file, local_folder, sorted_names
from segpipe.process.extras import check_installed
from segpipe.sources.isolated import dicom_groups
from segpipe.sources.uri import NIFTI_SUFFIXES, PICTURE_SUFFIXES, RASTER_SUFFIXES, SERIES, series_label


def list_lake(lake: Lake) -> Iterator[LakeEntry]:
    """Every scene of a lake, in the same order each time; an empty lake yields nothing.

    Memory does not follow the number of scenes: nothing is kept of those that were yielded.

    Raises:
        RequestError: while iterating: the location is not there or cannot be listed, or what is asked for is
            not in it; names the field.
    """
    if lake.kind is LakeKind.stac:
        check_installed("pystac_client", "a lake of STAC items")
        from segpipe.lake.stac import list_stac  # here: pystac is needed by few

        return list_stac(lake)
    if lake.kind is LakeKind.dicom:
        check_installed("pydicom", "a lake of DICOM files")
    kinds = {LakeKind.bids: list_bids, LakeKind.dicom: list_dicom, LakeKind.files: list_files}
    return kinds[lake.kind](lake)


IMAGES = (".nii.gz", ".nii")
"""Suffixes of an image file."""


def list_bids(lake: Lake) -> Iterator[LakeEntry]:
    """The images ``sub-*/[ses-*/]DATATYPE/sub-*_SUFFIX.nii[.gz]`` of a BIDS tree, by path.

    A scene is named as its file, for that says subject, session and run. Where the same image is there
    compressed and not, the compressed one is the scene. Derivatives are a tree of their own.

    Raises:
        RequestError: there is no such folder.
    """
    root, want = local_folder(lake.location, "bids"), lake.bids
    for subject in _folders(root, "sub-", want.subjects):
        for session in (None, *_folders(subject, "ses-", want.sessions)):
            if session is None and want.sessions:
                continue
            for datatype in _folders(session or subject, "", [want.datatype] if want.datatype else []):
                if not datatype.name.startswith("ses-"):
                    yield from _images(datatype, subject.name, session, want.suffix)


def _folders(parent: Path, prefix: str, labels: list[str]) -> list[Path]:
    """Folders ``prefix*`` directly in a folder, of these labels where some are given, sorted."""
    names = [n.rstrip("/") for n in sorted_names(parent) if n.endswith("/") and n.startswith(prefix)]
    return [parent / n for n in names if not labels or n.removeprefix(prefix) in labels]


def _images(folder: Path, subject: str, session: Path | None, suffix: str) -> Iterator[LakeEntry]:
    """Images of a suffix in a datatype's folder whose entities are those of the folders."""
    names = list(sorted_names(folder))
    for name in names:
        stem = next((name.removesuffix(s) for s in IMAGES if name.endswith(s)), "")
        if name == f"{stem}.nii" and f"{stem}.nii.gz" in names:
            continue
        *entities, last = stem.split("_")
        if last != suffix or not entities or not all("-" in e for e in entities):
            continue
        if entities[0] != subject or (session is not None and entities[1:2] != [session.name]):
            continue
        found = local_file(folder / name, stem)
        if found:
            yield found


OTHER_SUFFIXES = (*RASTER_SUFFIXES, *PICTURE_SUFFIXES, *NIFTI_SUFFIXES, *UNFINISHED)
"""Files that are not looked into."""


def list_dicom(lake: Lake) -> Iterator[LakeEntry]:
    """The series of a tree, grouped by folder, SeriesInstanceUID and FrameOfReferenceUID.

    A folder with one series is that folder as a scene; of several, each is the folder with ``#series=UID``.
    Files that cannot be read belong to every series of their folder: opening it says which and why.

    Raises:
        RequestError: there is no such folder, or one below it cannot be listed.
    """
    root = local_folder(lake.location, "dicom")
    yield from _below(root, "")


def _below(root: Path, below: str) -> Iterator[LakeEntry]:
    """Series of a folder (``""`` or ending in ``/``) and of those below it."""
    names = list(sorted_names(root / below))
    yield from _series(root, below, [n for n in names if not n.endswith("/")])
    for name in names:
        if name.endswith("/"):
            yield from _below(root, below + name)


def _series(root: Path, below: str, names: list[str]) -> Iterator[LakeEntry]:
    """Series of the files directly in a folder."""
    folder = root / below.rstrip("/")
    candidates = [name for name in names if not name.lower().endswith(OTHER_SUFFIXES)]
    groups, broken = dicom_groups(folder, candidates)
    place = below.rstrip("/") or root.name
    if len(groups) > 1:
        several = [uid for uid, _ in groups]
        for (uid, frame), files in sorted(groups.items()):
            series = f"{uid}@{frame}" if several.count(uid) > 1 else uid
            name = place_name(f"{place}/{series_label(series)}", ())
            yield from _found(folder, name, f"{folder}{SERIES}{series}", files + broken)
    elif groups or broken:
        files = [name for group in groups.values() for name in group]
        yield from _found(folder, place_name(place, ()), str(folder), files + broken)


def _found(folder: Path, name: str, uri: str, files: list[str]) -> Iterator[LakeEntry]:
    """A series as a scene; none where its files have gone meanwhile."""
    paths = [str(folder / file) for file in sorted(files)]
    try:
        told = stamp(paths)
    except FileNotFoundError:
        return
    total, before = hashlib.sha256(), hashlib.sha256()
    for file, (_, size, mtime, ctime) in zip(sorted(files), told, strict=True):
        line = f"{file}\0{size}\0{mtime}"
        before.update(f"{line}\n".encode("utf-8", "surrogateescape"))
        total.update(f"{line}\0{ctime}\n".encode("utf-8", "surrogateescape"))
    yield LakeEntry(
        name=name,
        uri=uri,
        identity={"count": len(files), "sha256": total.hexdigest()},
        size=sum(size for _, size, _, _ in told),
        modified=datetime.fromtimestamp(max(mtime for _, _, mtime, _ in told) / 1e9, UTC),
        files=tuple(paths),
        earlier={"count": len(files), "sha256": before.hexdigest()},
    )
