"""Files of labels: the reference of a scene, found by name and read as whole numbers.

A label file must lie on the scene's own grid. It is never resampled: a reference that was drawn
on another grid says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.config.job import Reference
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.alignment import same_grid
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry
from segpipe.sources import open_source
from segpipe.sources.base import Source
from segpipe.sources.discover import safe_name, scene_stem
from segpipe.sources.uri import NIFTI_SUFFIXES, RASTER_SUFFIXES

IGNORED = -1
"""Where the reference says nothing: nodata, outside its mask, or mapped to null."""
OBJECT = 1
"""Class value of every object: ids alone say no class."""
LABEL_SUFFIXES = (*NIFTI_SUFFIXES, *RASTER_SUFFIXES, ".png")
"""Files that a folder of references may hold; others in it are passed over."""
LABEL_WORDS = frozenset(
    {"annotation", "annotations", "dseg", "groundtruth", "gt", "label", "labels", "mask", "masks"}
    | {"ref", "reference", "seg", "segmentation", "truth"}
)
"""Last words of a label file's name that stand where the scene's name may have another."""


def find_reference(config: Reference, scene_name: str) -> str:
    """The reference of a scene: the file itself, or the one in a folder or glob named like it.

    The rules, first that fits one file: the same stem; a stem that begins with the scene's name,
    then a separator (``tile_7`` and ``tile_7_mask``); the scene's name without nnU-Net's channel
    (``case_001_0000`` and ``case_001``); the same but for the last word, which is a word for
    labels (``sub-01_T1w`` and ``sub-01_dseg``).

    Raises:
        RequestError: the path does not exist, or a folder or glob holds no label file.
        SceneError: no file or several fit the scene; names the candidates.
    """
    path = config.path
    if has_magic(path) and "://" not in path:
        found = sorted(glob(path, recursive=True))  # noqa: PTH207 (absolute patterns)
    elif Path(path).is_dir():
        found = sorted(str(p) for p in Path(path).iterdir())
    elif "://" in path or Path(path).exists():
        return path
    else:
        raise RequestError(f"reference.path: {path} does not exist; give a file, folder or glob")
    files = [f for f in found if f.lower().endswith(LABEL_SUFFIXES) and Path(f).name[0] != "."]
    if not files:
        raise RequestError(f"reference.path: {path} holds no label file ({', '.join(LABEL_SUFFIXES)})")
    stems = [(safe_name(scene_stem(Path(f).name)), f) for f in files]
    channel = re.sub(r"_\d{4}$", "", scene_name)
    head = _head(scene_name)
    rules = (
        [f for s, f in stems if s == scene_name],
        [f for s, f in stems if re.match(re.escape(scene_name) + r"[^A-Za-z0-9]", s)],
        [f for s, f in stems if channel != scene_name and s == channel],
        [f for s, f in stems if head and _head(s) == head and _last(s) in LABEL_WORDS],
    )
    for fitting in rules:
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise SceneError(
                f"scene {scene_name!r}: several references fit: {_some(fitting)}; "
                "narrow `reference.path` with a glob"
            )
    raise SceneError(f"scene {scene_name!r}: no reference fits its name; found {_some(files)}")


def _words(name: str) -> list[str]:
    return re.split(r"[_\-. ]", name)


def _head(name: str) -> str:
    """Everything before the last word; empty for a name of one word."""
    return name[: -len(_words(name)[-1]) - 1]


def _last(name: str) -> str:
    return _words(name)[-1].lower()


def _some(files: list[str], limit: int = 5) -> str:
    rest = f" and {len(files) - limit} more" if len(files) > limit else ""
    return ", ".join(Path(f).name for f in files[:limit]) + rest


class LabelFile:
    """A file of whole numbers, opened lazily."""

    def __init__(self, uri: str) -> None:
        """Open it.

        Raises:
            SceneError: it cannot be opened, or has several bands.
        """
        self.source: Source = open_source(uri)
        self.uri = uri
        if self.source.count != 1:
            count = self.source.count
            self.source.close()
            raise SceneError(f"{uri}: has {count} bands; a label file has one")

    @property
    def geometry(self) -> Geometry:
        """The grid of the labels."""
        return self.source.geometry

    def read(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Labels (int64, 0 where not valid) and where they are valid (bool), both of the box.

        Raises:
            SceneError: a value is no whole number.
        """
        pixels = self.source.read(box)
        values, valid = pixels.values[0], pixels.valid
        scaling = self.source.scaling[0]
        if scaling.scale != 1 or scaling.offset != 0:
            values = values.astype(np.float64) * scaling.scale + scaling.offset
        if values.dtype.kind == "f":
            valid = valid & np.isfinite(values)
            values = np.where(valid, values, 0)
            whole = np.rint(values)
            if not np.array_equal(whole, values):
                odd = values[whole != values].flat[0]
                raise SceneError(f"{self.uri}: holds {odd:g}; labels are whole numbers")
            values = whole
        return np.where(valid, values, 0).astype(np.int64), valid

    def close(self) -> None:
        """Release the file."""
        self.source.close()


def one_class(ids: np.ndarray) -> np.ndarray:
    """Ids of objects as classes: `OBJECT` where there is one, 0 where none is, negative as it was."""
    return np.asarray(np.minimum(ids, OBJECT))


@dataclass(frozen=True)
class IdRule:
    """What the values of a reference of objects say."""

    divisor: int = 0
    """Values are class × divisor + number; 0: they are ids, which say no class."""
    value: int = OBJECT
    """Class of all objects, where ids say none."""
    ground: int = 0
    """Class of what is no object."""


class ReferenceLabels:
    """The reference of one scene, on its grid, in the classes' values."""

    def __init__(
        self,
        file: LabelFile,
        values: Mapping[int, int | None],
        notes: list[str],
        rule: IdRule | None = None,
    ) -> None:
        self.uri = file.uri
        self.notes = tuple(notes)
        self._file = file
        self._rule = rule
        pairs = sorted((k, IGNORED if v is None else v) for k, v in values.items())
        self._from = np.array([k for k, _ in pairs], dtype=np.int64)
        self._to = np.array([v for _, v in pairs], dtype=np.int64)

    @property
    def identity(self) -> dict[str, Any]:
        """JSON object that changes when the reference does: a part of the measure key."""
        values = [[int(a), int(b)] for a, b in zip(self._from, self._to, strict=True)]
        rule = None if self._rule is None else [self._rule.divisor, self._rule.value, self._rule.ground]
        return {"source": self._file.source.identity, "values": values, "rule": rule}

    def read(self, box: Box, ids: bool = False) -> np.ndarray:
        """Class values of a box, int64; `IGNORED` where the reference says nothing.

        Args:
            box: of the scene.
            ids: where the values are ids of objects, answer these and not their class.

        Raises:
            SceneError: a value is no whole number, or negative and not mapped.
        """
        classes, found = self.read_both(box)
        return found if ids else classes

    def read_both(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Class values of a box, and ids of objects, 0 where there is none; one array where these are one."""
        raw, valid = self._file.read(box)
        rule = self._rule
        if rule is None:
            classes = self._mapped(raw, valid)
            return classes, classes
        if not rule.divisor:
            ids = self._mapped(raw, valid)
            return np.select([ids > 0, ids == 0], [rule.value, rule.ground], ids), ids
        classes = self._mapped(raw // rule.divisor, valid)
        return classes, np.select([classes == IGNORED, classes == rule.ground], [IGNORED, 0], raw)

    def _mapped(self, labels: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """Values as the job's `reference.values` says, `IGNORED` where nothing is valid."""
        result = labels
        known = np.zeros(labels.shape, dtype=bool)
        if len(self._from):
            place = np.minimum(np.searchsorted(self._from, labels), len(self._from) - 1)
            known = self._from[place] == labels
            result = np.where(known, self._to[place], labels)
        strange = valid & ~known & (labels < 0)
        if strange.any():
            raise SceneError(
                f"{self.uri}: holds {labels[strange].flat[0]}; labels are 0 or more: map it in "
                "`reference.values` (null: ignored)"
            )
        return np.where(valid, result, IGNORED)

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    def __enter__(self) -> ReferenceLabels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_reference(
    config: Reference, uri: str, geometry: Geometry, rule: IdRule | None = None
) -> ReferenceLabels:
    """Open a scene's reference (`find_reference`) and hold it against the scene's grid.

    Args:
        config: how its values become class values.
        uri: of the file.
        geometry: of the scene.
        rule: where its values are of objects, what they say.

    Raises:
        SceneError: it cannot be opened, has several bands, or lies on another grid.
    """
    file = LabelFile(uri)
    try:
        notes = same_grid(geometry, file.geometry)
    except SceneError as error:
        file.close()
        raise SceneError(f"reference {uri} lies on another grid than its scene: {error}") from error
    return ReferenceLabels(file, config.values, [f"reference: {note}" for note in notes], rule)
