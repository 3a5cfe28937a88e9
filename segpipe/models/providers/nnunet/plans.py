"""What a trained nnU-Net folder says of itself, read as data, and the model card that follows from it.

Read are plans.json and dataset.json. Orders of axes: nnU-Net permutes an image's axes before anything else
(``transpose_forward``). Here *image order* is the order before, *network order* the one after: network axis a
is image axis ``order[a]``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from segpipe.config.card import Card
from segpipe.config.loading import validate
from segpipe.config.parsing import parse_json
from segpipe.errors import RequestError
from segpipe.models.providers.card_parts import card_name, class_list, fixed_window

T = TypeVar("T")

LINEAR_SCHEMES = ("CTNormalization", "NoNormalization", "RGBTo01Normalization")
"""Normalisations by constants; the others look at the scene."""
SCHEMES = (*LINEAR_SCHEMES, "ZScoreNormalization", "RescaleTo01Normalization")
PICTURES = ("NaturalImage2DIO",)
"""Readers of datasets whose images have two axes."""


@dataclass(frozen=True)
class NnunetChannel:
    """One input channel and how nnU-Net normalises it."""

    name: str
    scheme: str
    masked: bool
    """Normalised inside the nonzero mask only (``use_mask_for_norm``)."""
    intensities: Mapping[str, float]
    """Of the training set's foreground: mean, std, percentile_00_5, percentile_99_5."""


@dataclass(frozen=True)
class NnunetPlan:
    """One configuration of a trained folder."""

    configuration: str
    dataset: str
    reader: str
    """Class that read the training images; says which way they were turned."""
    network: str
    """Dotted name of the network's class, as stored."""
    arguments: Mapping[str, Any]
    """Its arguments, as stored: classes by dotted name in those that ``classes_of`` lists."""
    imported: Sequence[str]
    """Arguments that name a class."""
    order: tuple[int, ...]
    """Image axis of each network axis."""
    patch: tuple[int, ...]
    """Elements of a window, network order."""
    spacing: tuple[float, ...]
    """Size of an element, network order; for pictures in pixels."""
    channels: tuple[NnunetChannel, ...]
    labels: tuple[tuple[int, str], ...]
    """Value and name of each output channel."""

    @property
    def strides(self) -> tuple[int, ...]:
        """Total stride of the network along each of its axes."""
        stages = self.arguments["strides"]
        return tuple(
            math.prod(s[a] if isinstance(s, list) else s for s in stages) for a in range(len(self.patch))
        )

    def in_image_order(self, values: Sequence[T]) -> list[T]:
        """Values given per network axis, per image axis."""
        return [values[self.order.index(axis)] for axis in range(len(self.order))]


MISFITS = (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError)
"""What files raise whose parts are of other kinds or lengths than nnU-Net writes."""


def read_plan(folder: Path, configuration: str) -> NnunetPlan:
    """One configuration of the folder's plans.

    Raises:
        RequestError: a file is damaged or lacks a key, the configuration does not exist, or is of a kind
            that segpipe does not run: cascades, regions that overlap, 2D slices of volumes.
    """
    plans, dataset = _read(folder / "plans.json"), _read(folder / "dataset.json")
    try:
        stored = _inherited(plans["configurations"], configuration, folder)
        if stored.get("previous_stage"):
            raise RequestError(
                f"{folder}: configuration {configuration!r} is the second of a cascade and needs the first "
                f"one's labels as input; valid: {stored['previous_stage']!r} or another configuration"
            )
        network = stored.get("architecture") or _old_architecture(stored)
        patch = tuple(int(n) for n in stored["patch_size"])
        return NnunetPlan(
            configuration=configuration,
            dataset=str(plans["dataset_name"]),
            reader=str(plans["image_reader_writer"]),
            network=str(network["network_class_name"]),
            arguments=dict(network["arch_kwargs"]),
            imported=tuple(network["_kw_requires_import"]),
            order=_order(folder, plans, len(patch)),
            patch=patch,
            spacing=tuple(float(s) for s in stored["spacing"]),
            channels=_channels(plans, dataset, stored),
            labels=_labels(folder, dataset["labels"]),
        )
    except MISFITS as error:
        raise RequestError(
            f"{folder}: plans.json and dataset.json are not as nnU-Net v2 writes them "
            f"({type(error).__name__}: {error})"
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(f"{path}: no readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise RequestError(f"{path}: found a {type(content).__name__}; valid: an object")
    return content


def _inherited(configurations: Mapping[str, Any], name: str, folder: Path) -> dict[str, Any]:
    """A configuration with what it ``inherits_from`` others."""
    chain: list[dict[str, Any]] = []
    seen: list[str] = []
    following: str | None = name
    while following is not None:
        if following not in configurations or following in seen:
            valid = ", ".join(sorted(configurations))
            raise RequestError(f"{folder}: found no configuration {following!r}; valid: {valid}")
        seen.append(following)
        chain.append(configurations[following])
        following = chain[-1].get("inherits_from")
    merged: dict[str, Any] = {}
    for part in reversed(chain):
        merged.update(part)
    return merged


def _old_architecture(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The network of plans before nnU-Net 2.4, in today's form (its `ConfigurationManager` does the same)."""
    kind, axes = stored["UNet_class_name"], len(stored["patch_size"])
    convolutions = "n_blocks_per_stage" if kind == "ResidualEncoderUNet" else "n_conv_per_stage"
    stages = len(stored["n_conv_per_stage_encoder"])
    first, most = stored["UNet_base_num_features"], stored["unet_max_num_features"]
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": [min(first * 2**i, most) for i in range(stages)],
            "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
            "kernel_sizes": stored["conv_kernel_sizes"],
            "strides": stored["pool_op_kernel_sizes"],
            convolutions: stored["n_conv_per_stage_encoder"],
            "n_conv_per_stage_decoder": stored["n_conv_per_stage_decoder"],
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{axes}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def _order(folder: Path, plans: Mapping[str, Any], axes: int) -> tuple[int, ...]:
    """Image axis of each network axis; pictures have a third axis of one element in front."""
    forward = tuple(int(a) for a in plans["transpose_forward"])
    if axes == len(forward):
        return forward
    if plans["image_reader_writer"] not in PICTURES or forward[0] != 0:
        raise RequestError(
            f"{folder}: a 2d configuration on slices of volumes is not run here, for a card's spacing is "
            "that of all axes; valid: 3d_fullres or 3d_lowres, or a dataset of pictures"
        )
    return tuple(a - 1 for a in forward[1:])


def _channels(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], stored: Mapping[str, Any]
) -> tuple[NnunetChannel, ...]:
    names = dataset["channel_names"] if "channel_names" in dataset else dataset["modality"]
    by_modality = plans.get("foreground_intensity_properties_by_modality", {})
    properties = plans.get("foreground_intensity_properties_per_channel", by_modality)
    return tuple(
        NnunetChannel(
            name=str(names[key]),
            scheme=str(stored["normalization_schemes"][i]),
            masked=bool(stored["use_mask_for_norm"][i]),
            intensities={k: float(v) for k, v in properties.get(str(i), {}).items()},
        )
        for i, key in enumerate(sorted(names, key=int))
    )


def _labels(folder: Path, stored: Mapping[str, Any]) -> tuple[tuple[int, str], ...]:
    """Values and names in the order of the output's channels; ``ignore`` has none."""
    if any(isinstance(v, list) and len(v) > 1 for v in stored.values()):
        raise RequestError(
            f"{folder}: dataset.json has regions (labels that are lists): their masks overlap, and a label "
            "map holds one class per element; valid: a model trained on labels"
        )
    labels = {name: v[0] if isinstance(v, list) else v for name, v in stored.items() if name != "ignore"}
    found = sorted((int(v), str(name)) for name, v in labels.items())
    if [v for v, _ in found] != list(range(len(found))):
        raise RequestError(f"{folder}: dataset.json: labels {[v for v, _ in found]}; valid: 0, 1, 2, …")
    return tuple(found)


LIMITS = (
    "Differs from nnU-Net's own prediction: images are resampled linearly, not by cubic splines; "
    "probabilities, not logits, are blended and resampled; a scene smaller than the window is padded at its "
    "end, not on both sides; the scene is not cropped to its nonzero part; windows overlap by half but do "
    "not begin where those of nnU-Net do, and their weights are centred half an element lower. Ask for "
    "`tiling.blend: gaussian`, as nnU-Net blends: under `trim` each element has one window's answer. No "
    "mirror images unless `arguments.mirror: true`."
)


def card_from_nnunet(folder: str | Path, configuration: str = "3d_fullres") -> Card:
    """The card of a trained model folder (dataset.json, plans.json, fold_*/checkpoint_final.pth).

    Args:
        configuration: the one that was trained into the folder: the end of its name.

    Returns:
        a card whose ``weights`` is the folder's absolute path.

    Raises:
        RequestError: the folder is damaged, or the card cannot say what nnU-Net does: channels of
            different normalisation, normalisation within a mask, cascades, regions, slices of volumes.
    """
    folder = Path(folder).resolve()
    plan = read_plan(folder, configuration)
    try:
        data = _card(folder, configuration, plan)
    except MISFITS as error:
        raise RequestError(
            f"{folder}: plans.json and dataset.json do not fit each other ({type(error).__name__}: {error})"
        ) from error
    return validate(Card, data, str(folder))


def _card(folder: Path, configuration: str, plan: NnunetPlan) -> dict[str, Any]:
    volume = len(plan.patch) == 3
    return {
        "name": card_name(f"{plan.dataset}-{configuration}"),
        "title": f"nnU-Net {configuration} of {plan.dataset}",
        "kind": "volume" if volume else "raster",
        "provider": "nnunet",
        "architecture": plan.network.rpartition(".")[2],
        "arguments": {"configuration": configuration},
        "weights": str(folder),
        "input": _input(folder, plan, volume),
        "window": fixed_window(plan.in_image_order(plan.patch), plan.strides),
        "classes": class_list([name for _, name in plan.labels]),
        "limits": LIMITS + _more_limits(plan),
        "source": "nnU-Net v2 (Isensee et al., Nature Methods 2021)",
    }


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
