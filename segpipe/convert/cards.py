"""The card of a converted model: the first one's input, window and classes, another file."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from segpipe.config.card import Card, load_card

if TYPE_CHECKING:
    import onnx


def publish(card: Card, graph: onnx.ModelProto, folder: Path, kind: str, **fields: Any) -> Path:
    """Write ``NAME-KIND.onnx`` and its card into a folder.

    Args:
        card: of the model that was converted.
        graph: the converted model.
        folder: made where it is not there.
        kind: ends the new name, e.g. ``int8``.
        fields: of the card that are to differ.

    Returns:
        The new card's path.

    Raises:
        RequestError: the name with its ending is too long for a card.
    """
    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{card.name}-{kind}"
    data = card.model_dump(mode="json", exclude_defaults=True)
    data.pop("architecture", None)
    data.pop("arguments", None)
    data |= {"name": name, "provider": "onnx", "weights": f"{name}.onnx", **fields}
    if card.roi is not None:
        data["roi"]["card"] = os.path.relpath(card.folder / card.roi.card, folder.resolve())
    with TemporaryDirectory(dir=folder) as draft:
        weights, path = Path(draft) / f"{name}.onnx", Path(draft) / f"{name}.yaml"
        onnx.save(graph, str(weights))
        _write(path, data)
        load_card(path)
        weights.replace(folder / weights.name)
        return path.replace(folder / path.name)


def add_scores(path: Path, text: str) -> None:
    """Put a sentence at the end of what a card says of how good its model is."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["scores"] = joined(data.get("scores", ""), text)
    _write(path, data)


def joined(before: str, after: str) -> str:
    """Two texts of a card as one; either may be empty."""
    return " ".join(part for part in (before.strip(), after.strip()) if part)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100), encoding="utf-8")
