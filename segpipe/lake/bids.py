"""Scenes of a BIDS tree, found by the names that the standard gives to folders and files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from segpipe.config.scan import Lake
from segpipe.lake.entry import LakeEntry
from segpipe.lake.files import local_file, local_folder, sorted_names

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
