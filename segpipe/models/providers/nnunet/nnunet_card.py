"""A model card of a trained nnU-Net folder: what its plans say, in segpipe's words, and what differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segpipe.config.card import Card
from segpipe.config.loading import validate
from segpipe.errors import RequestError
from segpipe.models.providers.card_parts import card_name, class_list, fixed_window
from segpipe.models.providers.nnunet.plans import (
    LINEAR_SCHEMES,
    SCHEMES,
    NnunetChannel,
    NnunetPlan,
    read_plan,
)

LIMITS = (
    "Differs from nnU-Net's own prediction: images are resampled linearly, not by cubic splines; "
    "probabilities, not logits, are blended and resampled; a scene smaller than the window is padded at its "
    "end, not on both sides; the scene is not cropped to its nonzero part; windows overlap by half but do "
    "not begin where those of nnU-Net do, and their weights are centred half an element lower. Ask for "
    "`tiling.blend: gaussian`, as nnU-Net blends: under `trim` each element has one window's answer. No "
    "mirror images unless `arguments.mirror: true`."
)


def card_from_nnunet(
    folder: str | Path, configuration: str = "3d_fullres", fold: int | str | Sequence[int | str] | None = None
) -> Card:
    """The card of a trained model folder (dataset.json, plans.json, fold_*/checkpoint_final.pth).

    Args:
        configuration: the one that was trained into the folder: the end of its name.
        fold: one or several; default all that are there.

    Returns:
        a card whose ``weights`` is the folder's absolute path.

    Raises:
        RequestError: the folder is damaged, or the card cannot say what nnU-Net does: channels of
            different normalisation, normalisation within a mask, cascades, regions, slices of volumes.
    """
    folder = Path(folder).resolve()
    plan = read_plan(folder, configuration)
    volume = len(plan.patch) == 3
    arguments: dict[str, Any] = {"configuration": configuration}
    if fold is not None:
        arguments["folds"] = [fold] if isinstance(fold, int | str) else list(fold)
    data = {
        "name": card_name(f"{plan.dataset}-{configuration}"),
        "title": f"nnU-Net {configuration} of {plan.dataset}",
        "kind": "volume" if volume else "raster",
        "provider": "nnunet",
        "architecture": plan.network.rpartition(".")[2],
        "arguments": arguments,
        "weights": str(folder),
        "input": _input(folder, plan, volume),
        "window": fixed_window(plan.in_image_order(plan.patch), plan.strides),
        "classes": class_list([name for _, name in plan.labels]),
        "limits": LIMITS + _more_limits(plan),
        "source": "nnU-Net v2 (Isensee et al., Nature Methods 2021)",
    }
    return validate(Card, data, str(folder))


def _input(folder: Path, plan: NnunetPlan, volume: bool) -> dict[str, Any]:
    names = [c.name for c in plan.channels]
    unique = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]
    return {
        "bands": [] if volume and len(names) == 1 else unique,
        "modality": " + ".join(names),
        # This reader turns images to RAS+ and then reverses the axes; the others take them as stored.
        "orientation": "SAR" if plan.reader == "NibabelIOWithReorient" else None,
        "spacing": plan.in_image_order(plan.spacing) if volume else None,
        "normalisation": _normalisation(folder, plan.channels),
    }


def _normalisation(folder: Path, channels: Sequence[NnunetChannel]) -> list[dict[str, Any]]:
    """The channels' schemes as steps of a card, which are the same for all channels but for constants."""
    schemes = {c.scheme for c in channels}
    unknown = schemes.difference(SCHEMES)
    if unknown:
        raise RequestError(f"{folder}: normalisation {sorted(unknown)}; valid: {', '.join(SCHEMES)}")
    if any(c.masked for c in channels):
        raise RequestError(
            f"{folder}: the model was trained on images normalised inside their nonzero mask "
            "(use_mask_for_norm), with zeros kept outside; a card has no such step"
        )
    if schemes == {"ZScoreNormalization"}:
        return [{"op": "scene_zscore"}]
    if schemes == {"RescaleTo01Normalization"}:
        return [{"op": "scene_quantiles", "low": 0.0, "high": 1.0}]
    if not schemes.issubset(LINEAR_SCHEMES):
        raise RequestError(
            f"{folder}: channels are normalised differently ({', '.join(sorted(schemes))}); valid: one "
            f"scheme for all, or any of {', '.join(LINEAR_SCHEMES)}"
        )
    return _linear(folder, channels)


def _linear(folder: Path, channels: Sequence[NnunetChannel]) -> list[dict[str, Any]]:
    clips: set[tuple[float, float] | None] = set()
    offsets, divisors = [], []
    for channel in channels:
        if channel.scheme == "CTNormalization":
            found = channel.intensities
            clips.add((found["percentile_00_5"], found["percentile_99_5"]))
            offsets.append(found["mean"])
            divisors.append(max(found["std"], 1e-8))
        else:
            clips.add(None)
            offsets.append(0.0)
            divisors.append(255.0 if channel.scheme == "RGBTo01Normalization" else 1.0)
    if len(clips) > 1:
        raise RequestError(f"{folder}: channels are clipped differently; a card clips all alike")
    clip = clips.pop()
    steps: list[dict[str, Any]] = [] if clip is None else [{"op": "clip", "low": clip[0], "high": clip[1]}]
    if any(offsets):
        steps.append({"op": "subtract", "value": offsets})
    if any(d != 1 for d in divisors):
        steps.append({"op": "divide", "value": divisors})
    return steps


def _more_limits(plan: NnunetPlan) -> str:
    schemes = {c.scheme for c in plan.channels}
    if "RescaleTo01Normalization" in schemes:
        return " The scene's least and greatest value are taken on a small grid of samples, as all quantiles."
    return ""
