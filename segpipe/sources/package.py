"""Files inside installed distributions: ``pkg://distribution/path/in/dist``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from segpipe.errors import RequestError

SCHEME = "pkg://"


def package_file(uri: str) -> Path:
    """The file that a ``pkg://distribution/path/in/dist`` URI names.

    It is looked up in the distribution's own list of files, never by searching folders: some
    distributions put bare folders such as ``data/`` into site-packages, and a path alone would
    then name whichever came first.

    Raises:
        RequestError: the URI is malformed, the distribution is not installed, it has no such
            file, or the file has gone.
    """
    distribution, _, inside = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or not distribution or not inside:
        raise RequestError(f"{uri}: expected {SCHEME}DISTRIBUTION/PATH/IN/IT")
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
