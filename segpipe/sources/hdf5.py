"""HDF5 files, netCDF 4 and KEA among them, hold their own pixels, or they are refused.

A dataset of HDF5 may lie in another file of the machine: byte for byte, by a link, or as a virtual dataset,
which shows fill values where that file cannot be opened. GDAL follows all three without a word.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segpipe.errors import SceneError
from segpipe.sources.base import reason

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MOST_GROUPS = 10_000


def is_hdf5(path: Path) -> bool:
    """Whether a local file is HDF5: its signature lies at 0, 512 or twice as far again and again."""
    with path.open("rb") as file:
        size, place = path.stat().st_size, 0
        while place < size:
            file.seek(place)
            if file.read(len(SIGNATURE)) == SIGNATURE:
                return True
            place = 2 * place or 512
    return False


def require_own_data(path: Path) -> None:
    """Refuse an HDF5 file that shows what lies in another.

    Raises:
        SceneError: it does, it is damaged, or it has more than `MOST_GROUPS` groups.
    """
    import h5py  # here: few scenes are of this kind

    try:
        with h5py.File(path, "r") as file:
            waiting, seen = [file["/"]], set()
            while waiting:
                group = waiting.pop()
                place = h5py.h5o.get_info(group.id).addr
                if place in seen:  # a group may hold its parent
                    continue
                seen.add(place)
                waiting += _groups(path, group)
                if len(seen) + len(waiting) > MOST_GROUPS:
                    raise SceneError(f"{path}: found more than {MOST_GROUPS} groups; valid: up to so many")
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise SceneError(f"{path}: cannot be opened: {reason(error)}") from error


def _groups(path: Path, group: Any) -> Iterator[Any]:
    """The groups in one, whose datasets hold their own data.

    Raises:
        SceneError: one does not.
    """
    import h5py

    for name in group:
        elsewhere = isinstance(group.get(name, getlink=True), h5py.ExternalLink)
        item = None if elsewhere else group.get(name)
        if isinstance(item, h5py.Dataset):
            elsewhere = item.is_virtual or item.external is not None
        if elsewhere:
            raise SceneError(
                f"{path}: its dataset {name!r} lies in another file; a scene has pixels of its own: "
                "copy it into one file, such as with h5repack"
            )
        if isinstance(item, h5py.Group):
            yield item
