"""Model cards by name: those of the working folder, and those that come with segpipe."""

from __future__ import annotations

import difflib
from pathlib import Path

import segpipe
from segpipe.errors import RequestError

CARDS = Path("configs/models")
"""Where the working folder keeps its cards."""


def builtin_folder() -> Path:
    """Return the folder of the configs that come with segpipe: in an installation, or in a checkout."""
    package = Path(segpipe.__file__).parent
    installed = package / "builtin"
    return installed if installed.is_dir() else package.parent / "configs"


def card_files(folder: str | Path | None = None) -> dict[str, Path]:
    """Return the files of cards by name, in order of name.

    Args:
        folder: where to look; None: the working folder's cards, and those of segpipe that they do not hide.
    """
    folders = [builtin_folder() / "models", CARDS] if folder is None else [Path(folder)]
    files = {path.stem: path for each in folders for path in each.glob("*.yaml")}
    return dict(sorted(files.items()))


def find_card(card: str | Path) -> Path:
    """Return the path of a card that is given by its path or by its name.

    A file that exists is taken first, so that a path never means another card. What looks like a path (with a
    folder or ``.yaml`` in it) is returned as it is: reading it tells what is wrong.

    Raises:
        RequestError: a name that no card has; lists those there are.
    """
    path, name = Path(card), str(card)
    if path.is_file() or path.suffix in (".yaml", ".yml") or path.name != name:
        return path
    files = card_files()
    if name not in files:
        close = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise RequestError(
            f"no model card {name!r}: {hint}valid: the path of a card, or a name: {', '.join(files)}"
        )
    return files[name]
