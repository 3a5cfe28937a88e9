"""From what a job lists under ``scenes`` to the scenes: in a fixed order, named, unopened."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from os import walk
from pathlib import Path

from segpipe.errors import RequestError
from segpipe.redact import address, seal, whole
from segpipe.sources.base import SceneRef, local_path, matches
from segpipe.sources.gdal import SUFFIX as VRT
from segpipe.sources.memory import MEMORY
from segpipe.sources.mosaic import MOSAIC, mosaic_files
from segpipe.sources.remote import is_remote
from segpipe.sources.stack import SEPARATOR, STACK, stack_files
from segpipe.sources.uri import (
    NIFTI_SUFFIXES,
    PACKAGE,
    PICTURE_SUFFIXES,
    RASTER_SUFFIXES,
    SERIES,
    Kind,
    holds_dicom,
    is_dicom_file,
    kind_of,
    package_file,
    parse_frame,
    parse_series,
    series_label,
)

FOLDER_SUFFIXES = (*(s for s in RASTER_SUFFIXES if s != VRT), *NIFTI_SUFFIXES)
"""Files that are taken from a folder; a VRT only where it is named, because it reads other files."""
LONGEST_NAME = 100
"""Characters of a scene's name: it becomes a folder, with files of longer names inside."""
WILDCARDS = frozenset("*?[")
CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
"""An error that names the entry would have several lines."""


@dataclass(frozen=True)
class _Found:
    """A scene before it has its final name."""

    uri: str
    stem: str
    parent: str
    """Name of the folder that holds it."""
    missing: bool = False


def discover(patterns: Sequence[str]) -> list[SceneRef]:
    """The scenes that a job's entries stand for, in their order, each once.

    An entry is:

    - a file, taken whatever its suffix; if it does not exist it stays in the list, and fails
      alone when it is opened;
    - a glob (``**``: any depth): the files of known suffixes, or of the suffix that the glob
      itself names; DICOM files stand for the series folder that holds them, as do folders;
    - a folder: the rasters (no PNG or JPEG: beside scenes these are previews) and NIfTI files
      directly in it, and at any depth the folders that hold DICOM files, one scene each;
    - a URL (s3, gs, az, http, https), passed on as it is;
    - ``mosaic:GLOB``: all matching rasters as one scene;
    - ``stack:FILE|FILE``: rasters of one grid, files or URLs, as the bands of one scene;
    - ``pkg://distribution/path``: a file of an installed distribution.

    A file, glob, folder or package file may end in ``#frame=N`` (from 0) for 4D volumes, a folder of several
    DICOM series in ``#series=UID``.

    Names are stems made safe for folders. Where two are alike, the name of the folder that holds
    each is put in front; where that does not help, -2, -3, … behind. They come from paths only,
    never from what a file says.

    Raises:
        RequestError: nothing is asked for; a glob or folder yields nothing; a package has no such
            file; a ``#frame`` is no number; or every entry is missing.
    """
    found: dict[str, _Found] = {}
    for pattern in patterns:
        if CONTROLS.search(pattern):
            raise RequestError(f"scenes: {pattern!r}: has control characters; rename the file or folder")
        for scene in _entry(seal(pattern)):
            found.setdefault(address(scene.uri), scene)
    scenes = list(found.values())
    if not scenes:
        raise RequestError("scenes: nothing is listed; give files, globs, folders or URLs")
    if all(s.missing for s in scenes):
        raise RequestError(f"scenes: no such file: {', '.join(s.uri for s in scenes[:5])}")
    names = _unique([(s.stem, s.parent) for s in scenes])
    return [SceneRef(name, s.uri) for name, s in zip(names, scenes, strict=True)]


def scene_stem(name: str) -> str:
    """A file's name without its suffix, ``.nii.gz`` and the like stripped whole."""
    lower = name.lower()
    for suffix in (*NIFTI_SUFFIXES, *RASTER_SUFFIXES, *PICTURE_SUFFIXES):
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return Path(name).stem


def safe_name(text: str) -> str:
    """A name for a folder: letters (of any script), digits, ``.``, ``_`` and ``-``."""
    kept = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFC", text))
    return kept[:LONGEST_NAME].strip("._-") or "scene"


def _entry(pattern: str) -> list[_Found]:
    """The scenes of one entry.

    Raises:
        RequestError: it yields none.
    """
    if pattern.startswith(MOSAIC):
        return [_mosaic(pattern)]
    if pattern.startswith(STACK):
        return [_stack(pattern)]
    if pattern.startswith(MEMORY):
        return [_Found(pattern, pattern.removeprefix(MEMORY), "")]
    if is_remote(pattern):
        return [_remote(pattern)]
    path, series = parse_series(pattern.removeprefix("file://"))
    if series is not None:
        return [_series(local_path(path).absolute(), series)]
    path, frame = parse_frame(path)
    if path.startswith(PACKAGE):
        package_file(path)
        return [_named(pattern, Path(path), frame)]
    if not path.strip():
        raise RequestError("scenes: an entry is empty")
    whole = local_path(path).absolute()
    if whole.is_dir():
        found = _in_folder(whole)
        if not found:
            raise RequestError(
                f"scenes: {pattern}: the folder holds no {', '.join(FOLDER_SUFFIXES)} and no DICOM "
                f"series; name other files by a glob such as {whole}/**/*.png"
            )
    elif whole.exists() or not WILDCARDS & set(path):
        found = [whole]
    else:
        found = _matching(path)
        if not found:
            raise RequestError(f"scenes: {pattern}: no raster, NIfTI file or DICOM series matches")
    return [_named(_with_frame(p, frame), p, frame) for p in found]


def _in_folder(folder: Path) -> list[Path]:
    """Scenes in a folder, sorted: its files, and series folders at any depth."""
    files = [p for p in sorted(folder.iterdir()) if _is_scene_file(p, FOLDER_SUFFIXES)]
    inside = sorted(Path(root) for root, _, _ in walk(folder))
    hidden = {p for p in inside if any(n.startswith(".") for n in p.relative_to(folder).parts)}
    return files + [p for p in inside if p not in hidden and holds_dicom(p)]


def _matching(pattern: str) -> list[Path]:
    """Scenes that a glob matches, sorted; a series folder once, however often it is matched."""
    suffix = Path(pattern).suffix
    literal = (suffix.lower(),) if suffix and not WILDCARDS & set(suffix) else ()
    suffixes = literal or (*FOLDER_SUFFIXES, *PICTURE_SUFFIXES)
    found: list[Path] = []
    for path in matches(pattern):
        if path.is_dir():
            if holds_dicom(path):
                found.append(path)
        elif is_dicom_file(path):
            found.append(path.parent)
        elif _is_scene_file(path, suffixes):
            found.append(path)
    return list(dict.fromkeys(found))


def _is_scene_file(path: Path, suffixes: tuple[str, ...]) -> bool:
    name = path.name.lower()
    return not name.startswith(".") and name.endswith(suffixes) and path.is_file()


def _mosaic(uri: str) -> _Found:
    pattern = uri.removeprefix(MOSAIC)
    if "#frame=" in pattern or is_remote(pattern):
        raise RequestError(f"scenes: {uri}: a mosaic takes a glob of local rasters")
    if not mosaic_files(uri):
        raise RequestError(f"scenes: {uri}: no file matches")
    whole = Path(pattern).expanduser().absolute()
    # tiles/*.tif is called tiles; tiles/north_*.tif is called north.
    fixed = scene_stem(re.split(r"[*?\[]", whole.name)[0]).strip("._-")
    folders = [p.name for p in whole.parents if p.name and not WILDCARDS & set(p.name)]
    parent = folders[0] if folders else ""
    return _Found(f"{MOSAIC}{whole}", safe_name(fixed or parent), safe_name(parent))


def _stack(uri: str) -> _Found:
    files = stack_files(uri)
    stems = [scene_stem(f.partition("?")[0].rpartition("/")[2]) for f in files]
    *_, above, folder, _ = ["", "", *files[0].partition("?")[0].split("/")]
    # LC08_B4 and LC08_B5 are called LC08; B4 and B5 as their folder.
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*stems, strict=False))
    common = re.sub(r"[^._-]*$", "", "".join(letters[0] for letters in same))
    missing = any(not is_remote(f) and not local_path(f).exists() for f in files)
    stem, parent = (common.strip("._-"), folder) if common.strip("._-") else (folder, above)
    return _Found(
        seal(STACK + SEPARATOR.join(map(whole, files))), safe_name(stem), safe_name(parent), missing
    )


def _series(folder: Path, series: str) -> _Found:
    short = series_label(series)
    uri = f"{folder}{SERIES}{series}"
    return _Found(
        uri, safe_name(f"{folder.name}_{short}"), safe_name(folder.parent.name), not folder.is_dir()
    )


def _remote(uri: str) -> _Found:
    address, frame = parse_frame(uri.partition("?")[0])
    if WILDCARDS & set(address):
        raise RequestError(f"scenes: {uri}: globs work on local folders only; list the URLs")
    *folders, name = address.partition("://")[2].rstrip("/").split("/")
    stem = scene_stem(name) if frame is None else f"{scene_stem(name)}_frame{frame}"
    return _Found(uri, safe_name(stem), safe_name(folders[-1] if folders else ""))


def _named(uri: str, path: Path, frame: int | None) -> _Found:
    series = path.is_dir()
    stem = path.name if series else scene_stem(path.name)
    if frame is not None:
        stem = f"{stem}_frame{frame}"
    missing = not uri.startswith(PACKAGE) and not path.exists()
    return _Found(uri, safe_name(stem), safe_name(path.parent.name), missing)


def _with_frame(path: Path, frame: int | None) -> str:
    """The URI; a frame is kept for NIfTI only where a folder or glob mixes kinds."""
    if frame is None or (path.exists() and kind_of(path) is not Kind.nifti):
        return str(path)
    return f"{path}#frame={frame}"


def _unique(stems: Sequence[tuple[str, str]]) -> list[str]:
    """Names of (stem, parent) pairs, different even where a file system ignores case."""
    often = Counter(stem.casefold() for stem, _ in stems)
    wanted = [f"{parent}_{stem}" if often[stem.casefold()] > 1 else stem for stem, parent in stems]
    # A name that is unique as it stands is nobody else's to get by being numbered.
    taken = Counter(name.casefold() for name in wanted)
    used: set[str] = set()
    names = []
    for name in wanted:
        unique, number = name, 1
        while unique.casefold() in used or (number > 1 and unique.casefold() in taken):
            number += 1
            unique = f"{name}-{number}"
        used.add(unique.casefold())
        names.append(unique)
    return names
