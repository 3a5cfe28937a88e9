"""A model card of a MONAI bundle: what its metadata and inference configuration say, as far as a card can.

Preprocessing is looked up transform by transform. What has no counterpart in a card is not carried over, and
said in the card's limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from segpipe.config.card import Card
from segpipe.config.loading import validate
from segpipe.errors import RequestError
from segpipe.models.providers.bundle.files import (
    CONFIGS,
    METADATA,
    Bundle,
    NetworkDefinition,
    network_definition,
    plain,
)
from segpipe.models.providers.card_parts import card_name, class_list, fixed_window

WITHOUT_EFFECT = frozenset(
    (
        "LoadImaged",
        "EnsureChannelFirstd",
        "AddChanneld",
        "AsChannelFirstd",
        "EnsureTyped",
        "ToTensord",
        "CastToTyped",
    )
)
"""Transforms that read or reshape: a card needs no step for them."""
_STRIDE = 32
"""More than the total stride of most networks here."""


def card_from_bundle(path: str | Path) -> Card:
    """The card of a bundle, a folder or a zip: of its configs/inference.json (or .yaml) and metadata.json.

    Returns:
        a card whose ``weights`` is the bundle's absolute path; ``limits`` says what was not carried over.

    Raises:
        RequestError: the bundle is damaged, would have to run code, or its masks overlap (sigmoid of several
            channels).
    """
    path = Path(path).resolve()
    bundle = Bundle(path)
    config, metadata = bundle.config(CONFIGS), bundle.config((METADATA,))
    definition = network_definition(bundle)
    try:
        image, predicted = _formats(metadata)
        names = _classes(path, config, predicted)
        steps = _transforms(config, str(path))
        data = _card(path, definition, image, names, steps, _window(config, image, str(path)))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise RequestError(
            f"{path}: {METADATA} or {bundle.first(CONFIGS)} is not as MONAI's specification has it "
            f"({type(error).__name__}: {error})"
        ) from error
    data |= {
        "title": str(metadata.get("task", "")),
        "data": str(metadata.get("data_source", "")),
        "scores": _scores(metadata),
        "source": f"MONAI bundle {path.stem} {metadata.get('version', '')}".strip(),
    }
    return validate(Card, data, str(path))


def _formats(metadata: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    data = metadata["network_data_format"]
    inputs, outputs = data["inputs"], data["outputs"]
    return inputs.get("image") or next(iter(inputs.values())), outputs.get("pred") or next(
        iter(outputs.values())
    )


def _classes(path: Path, config: Mapping[str, Any], predicted: Mapping[str, Any]) -> tuple[list[str], str]:
    """Names of the classes, and the activation."""
    channels = int(predicted["num_channels"])
    stored = predicted.get("channel_def") or {}
    names = [str(stored.get(str(i), f"class {i}")) for i in range(channels)]
    sigmoid = any(t.get("sigmoid") is True for t in _listed(config, "postprocessing"))
    if channels == 1:
        return ["background", names[0]], "sigmoid"
    if sigmoid:
        raise RequestError(
            f"{path}: a sigmoid of {channels} channels: its masks overlap, and a label map holds one class "
            "per element"
        )
    return names, "softmax"


def _card(
    path: Path,
    definition: NetworkDefinition,
    image: Mapping[str, Any],
    classes: tuple[list[str], str],
    steps: tuple[dict[str, Any], list[str]],
    window: dict[str, Any],
) -> dict[str, Any]:
    (names, activation), (wanted, left) = classes, steps
    channels = int(image["num_channels"])
    volume = int(definition.arguments.get("spatial_dims", len(window["size"]))) == 3
    stored = image.get("channel_def") or {}
    bands = [str(stored.get(str(i), f"channel {i}")) for i in range(channels)]
    if len(set(bands)) < channels:
        bands = [f"{name} {i}" for i, name in enumerate(bands)]
    wanted.setdefault("orientation", "RAS" if volume else None)
    return {
        "name": card_name(path.stem),
        "kind": "volume" if volume else "raster",
        "provider": "bundle",
        "architecture": definition.architecture,
        "weights": str(path),
        "input": {
            "bands": [] if volume and channels == 1 else bands,
            "modality": image.get("modality"),
            **wanted,
        },
        "window": window,
        "output": {"activation": activation},
        "classes": class_list(names),
        "limits": " ".join(
            ["Scenes smaller than the window are padded at their end, not on both sides.", *left]
        ),
    }


def _listed(config: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The transforms under a key, as data; none where they are not given so."""
    found = config.get(key)
    found = found.get("transforms") if isinstance(found, Mapping) else found
    return [t for t in found if isinstance(t, Mapping)] if isinstance(found, list) else []


def _transforms(config: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
    """Keys of a card's ``input``, and what could not be said."""
    wanted: dict[str, Any] = {"normalisation": []}
    left: list[str] = []
    for transform in _listed(config, "preprocessing"):
        name = str(transform.get("_target_", "")).rpartition(".")[2]
        if name in WITHOUT_EFFECT or transform.get("_disabled_") is True:
            continue
        try:
            given = {
                k: plain(v, config, f"{place}: {name}.{k}")
                for k, v in transform.items()
                if not k.startswith("_")
            }
        except RequestError as error:
            left.append(f"Not carried over: {error}.")
            continue
        if not _taken_over(name, given, wanted):
            left.append(f"Not carried over: the bundle's {name}.")
    return wanted, left


def _taken_over(name: str, given: Mapping[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a transform has a counterpart in a card; it is then added."""
    steps: list[dict[str, Any]] = wanted["normalisation"]
    match name:
        case "Orientationd" if isinstance(given.get("axcodes"), str):
            wanted["orientation"] = given["axcodes"]
        case "Spacingd" if isinstance(given.get("pixdim"), list):
            wanted["spacing"] = given["pixdim"]
        case "ScaleIntensityRanged":
            low, high = float(given["a_min"]), float(given["a_max"])
            bottom, top = float(given.get("b_min", 0)), float(given.get("b_max", 1))
            if given.get("clip") is True:
                steps.append({"op": "clip", "low": low, "high": high})
            factor = (top - bottom) / (high - low)
            steps.append({"op": "scale", "factor": factor, "offset": bottom - low * factor})
        case "NormalizeIntensityd" if given.get("channel_wise") is True and not given.get("nonzero"):
            steps.append({"op": "scene_zscore"})
        case _:
            return False
    return True


def _window(config: Mapping[str, Any], image: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The inferer's window, or that of the metadata; of fixed size, so any common stride is one."""
    inferer = config.get("inferer")
    found = inferer.get("roi_size") if isinstance(inferer, Mapping) else None
    found = image["spatial_shape"] if found is None else plain(found, config, f"{place}: inferer.roi_size")
    if not isinstance(found, list) or not all(isinstance(n, int) and n > 0 for n in found):
        raise RequestError(
            f"{place}: found no size of windows (inferer.roi_size {found}); write the card by hand"
        )
    return fixed_window(found, (_STRIDE,))


def _scores(metadata: Mapping[str, Any]) -> str:
    metrics = metadata.get("eval_metrics")
    return ", ".join(f"{k} {v}" for k, v in metrics.items()) if isinstance(metrics, Mapping) else ""
