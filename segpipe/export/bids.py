"""Label maps of volumes as BIDS derivatives: ``derivatives/segpipe-<job>/`` in the run's folder.

Names follow BIDS 1.11, Derivatives, "Discrete segmentations": the source's entities, then ``desc-<model>``
and the suffix ``dseg``. There is no ``space``, for labels lie on the grid of their source; a source that has
one keeps it. The NIfTI file is the scene's ``labels.nii.gz``, linked or copied, never written twice.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import obstore

from segpipe import __version__
from segpipe.export.staging import commit, json_text, staging
from segpipe.store.location import is_url, open_store, write_atomic

if TYPE_CHECKING:
    from segpipe.tables.record import ClassInfo, RunRecord

BIDS_VERSION = "1.11.1"
ENTITIES = {
    "anat": ("sub", "ses", "task", "acq", "ce", "rec", "run", "echo", "part", "space", "chunk", "res"),
    "func": ("sub", "ses", "task", "acq", "ce", "rec", "dir", "run", "echo", "part", "space", "chunk", "res"),
    "dwi": ("sub", "ses", "acq", "rec", "dir", "run", "part", "space", "chunk", "res"),
}
"""Entities of a segmentation's name by its folder, in the order of the standard."""
NAMED = "sub-<label>[_<entity>-<label>…]_<suffix>.nii.gz"
_NAME = re.compile(r"(sub-[A-Za-z0-9+]+(?:_[a-z]+-[A-Za-z0-9+]+)*)_([A-Za-z0-9]+)\.nii(?:\.gz)?")
_FOLDERS = re.compile(r"(sub-[A-Za-z0-9+]+/(?:ses-[A-Za-z0-9+]+/)?)([a-z]+)/[^/]+$")


@dataclass(frozen=True)
class BidsFile:
    """What the name of a BIDS file says."""

    entities: dict[str, str]
    """``sub``, ``ses``, … to their labels."""
    suffix: str
    """T1w, bold, …"""
    datatype: str
    """Folder of its segmentation: anat, func or dwi."""
    root: str
    """Folder of its data set."""
    path: str
    """Below the root."""
    frame: str
    """Of a 4D file, from 0; empty: the file as a whole."""


@dataclass(frozen=True)
class Derivatives:
    """What was written."""

    written: tuple[str, ...]
    """Paths of new texts, from the run's folder."""
    copies: dict[str, str]
    """Path to the path of the file that it is a copy of."""


def parse_bids(uri: str) -> BidsFile | None:
    """The parts of a BIDS name and of the folders above it; None: the file bears no such name."""
    location, _, frame = uri.removeprefix("file://").partition("#frame=")
    path = PurePosixPath(location)
    name = _NAME.fullmatch(path.name)
    if name is None:
        return None
    entities = dict(part.split("-", 1) for part in name[1].split("_"))
    folders = _FOLDERS.search(location)
    kind = folders[2] if folders else "anat"
    if kind not in ENTITIES or (kind == "func" and "task" not in entities):
        kind = "anat"  # the standard names no segmentations beside other images
    root = location[: folders.start()].rstrip("/") if folders else location[: -len(path.name)].rstrip("/")
    return BidsFile(entities, name[2], kind, root, location[len(root) :].lstrip("/"), frame)


def write_bids(location: str, folder: Path, record: RunRecord, nodata: int | None) -> Derivatives:
    """Write the derivatives of a run's volumes whose sources bear BIDS names.

    Args:
        location: folder or URL of the run, where the scenes' files lie.
        folder: where texts are written (the run's own, or one that is uploaded).
        record: of the run.
        nodata: label of voxels without data in any of the files, or None.
    """
    labels = {s.name: p for s in record.mapped if (p := s.files.get("labels", "")).endswith(".nii.gz")}
    parsed = {s.name: parse_bids(s.uri) for s in record.mapped if s.name in labels}
    files = {name: file for name, file in parsed.items() if file is not None}
    if not files:
        return Derivatives((), {})
    base = f"derivatives/segpipe-{record.job_name}"
    stems = _stems(files, _label(record.model.name if record.model else record.job_name))
    links = {root: f"source{n or ''}" for n, root in enumerate(sorted({f.root for f in files.values()}))}
    texts = {
        f"{base}/dataset_description.json": json_text(_description(record, links)),
        f"{base}/README.md": _readme(record),
    }
    copies = {}
    for name, file in files.items():
        where, stem = stems[name]
        source = f"bids:{links[file.root]}:{file.path}"
        desc = stem.rpartition("_desc-")[2]
        said = {
            "Description": f"Label map of {record.job_name}; classes are in desc-{desc}_dseg.tsv",
            "Sources": [source],
            "SpatialReference": source,
        }
        texts[f"{base}/{where}/{stem}_dseg.json"] = json_text(said)
        texts[f"{base}/desc-{desc}_dseg.tsv"] = _table(record.legend, nodata)
        copies[f"{base}/{where}/{stem}_dseg.nii.gz"] = labels[name]
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / path, text.encode())
    _copy(location, copies)
    return Derivatives(tuple(texts), copies)


def _stems(files: dict[str, BidsFile], label: str) -> dict[str, tuple[str, str]]:
    """By scene its folder and its name up to ``_dseg``: what two would share gets what tells them apart.

    Two images of one session (T1w and T2w, two inversions, frames) differ by what a segmentation's name has
    no place for; it then goes into ``desc``.
    """
    found: dict[str, tuple[str, str]] = {}
    for scene, file in files.items():
        kept = [f"{key}-{file.entities[key]}" for key in ENTITIES[file.datatype] if key in file.entities]
        where = "/".join([part for part in kept if part.startswith(("sub-", "ses-"))] + [file.datatype])
        found[scene] = where, f"{'_'.join(kept)}_desc-{label}"
    shared = Counter(found.values())
    for scene, (where, stem) in found.items():
        if shared[where, stem] > 1:
            file = files[scene]
            lost = [k + v for k, v in file.entities.items() if k not in ENTITIES[file.datatype]]
            frame = [f"frame{file.frame}"] if file.frame else []
            found[scene] = where, stem + "".join(_capital(p) for p in (*lost, file.suffix, *frame))
    again: Counter[tuple[str, str]] = Counter()
    for scene, (where, stem) in found.items():  # of several data sets with the same subjects
        again[where, stem] += 1
        number = again[where, stem]
        found[scene] = (where, stem if number == 1 else f"{stem}Set{number}")
    return found


def _label(name: str) -> str:
    """A name as an entity's label: letters and digits."""
    words: list[str] = re.findall(r"[A-Za-z0-9]+", name) or ["labels"]
    return words[0] + "".join(_capital(word) for word in words[1:])


def _capital(word: str) -> str:
    return word[:1].upper() + word[1:]


def _copy(location: str, copies: dict[str, str]) -> None:
    """Link files within a folder, or copy them within an object store."""
    if is_url(location):
        store = open_store(location)
        for target, source in copies.items():
            obstore.copy(store, source, target)
        return
    for target, source in copies.items():
        there, here = Path(location) / source, Path(location) / target
        if here.exists() and here.samefile(there):
            continue
        with staging(here) as folder:
            link = folder / here.name
            try:
                link.hardlink_to(there)
            except OSError:  # a file system without links
                shutil.copy(there, link)
            commit(link, here)


def _description(record: RunRecord, links: dict[str, str]) -> dict[str, Any]:
    """``dataset_description.json``."""
    uris = {n: Path(root).as_uri() if root.startswith("/") else root or "." for root, n in links.items()}
    made: dict[str, Any] = {
        "Name": "segpipe",
        "Version": __version__,
        "Description": "Segmentation of volumes",
    }
    if record.model is not None:
        made["Description"] += f" by the model {record.model.name}, weights {record.model.fingerprint[:16]}"
    return {
        "Name": f"Segmentations of {record.job_name}, run {record.run_id}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [made],
        "SourceDatasets": [{"URL": uri} for uri in uris.values()],
        "DatasetLinks": uris,
    }


def _readme(record: RunRecord) -> str:
    model = f" by the model {record.model.name}" if record.model else ""
    return (
        f"# Segmentations of {record.job_name}\n\n"
        f"Label maps of volumes, made by segpipe {__version__}{model}.\n"
        "Values, names and colours of the classes are in the `dseg.tsv` files; where the labels come from\n"
        "is in `dataset_description.json` and beside each file.\n"
    )


def _table(classes: Sequence[ClassInfo], nodata: int | None) -> str:
    """``dseg.tsv``: index, name and colour of each class."""
    rows = [(c.value, " ".join(c.name.split()), c.color) for c in sorted(classes, key=lambda c: c.value)]
    rows += [] if nodata is None else [(nodata, "no data", "#000000")]
    lines = ["index\tname\tcolor", *("\t".join(map(str, row)) for row in rows)]
    return "\n".join(lines) + "\n"
