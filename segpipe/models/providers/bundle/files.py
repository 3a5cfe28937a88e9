"""MONAI bundles, a folder or a zip, read as data: their network's definition, and a model card of it.

A bundle's configuration is a program in JSON or YAML: ``_target_`` calls anything by name, ``$`` evaluates
Python, ``%`` reads other files. Here it is only looked up: plain values, and references (``@name``,
``@name::key::0``) to plain values.

The card says what metadata and inference configuration say. Preprocessing is looked up transform by
transform. What has no counterpart in a card is not carried over, and said in the card's limits.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

import yaml

from segpipe.config.card import Card
from segpipe.config.loading import validate
from segpipe.config.parsing import parse_json, parse_yaml
from segpipe.errors import RequestError
from segpipe.models.providers.card_parts import card_name, class_list, fixed_window

if TYPE_CHECKING:
    from collections.abc import Iterator

CONFIGS = ("configs/inference.json", "configs/inference.yaml")
WEIGHTS = ("models/model.safetensors", "models/model.pt", "models/model.pth")
METADATA = "configs/metadata.json"
NETWORK_KEYS = ("network_def", "network")
CONFIG_BYTES = 4 * 1024**2
"""A configuration is at most this long: a zip may hold a bomb."""
_DEPTH = 8
"""References that follow one another."""
_LIBRARY = "monai.networks.nets"


@dataclass(frozen=True)
class NetworkDefinition:
    """The network of a bundle, as data."""

    architecture: str
    """Name of a class, without its module."""
    arguments: dict[str, Any]


class Bundle:
    """The files of a bundle, by their path inside it; the same for a folder and a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = ""
        self._names: frozenset[str] = frozenset()
        if path.is_file():
            try:
                with zipfile.ZipFile(path) as archive:
                    names = archive.namelist()
            except (zipfile.BadZipFile, OSError) as error:
                raise RequestError(f"{path}: not a readable zip ({error})") from error
            # Zipped with or without the bundle's own folder around it.
            roots = {n.removesuffix(c) for n in names for c in CONFIGS if n.endswith(c) and n.count("/") < 3}
            self._root = min(roots, key=len, default="")
            self._names = frozenset(n.removeprefix(self._root) for n in names if n.startswith(self._root))

    def first(self, names: tuple[str, ...]) -> str:
        """The first of these files that is there.

        Raises:
            RequestError: none is.
        """
        for name in names:
            if name in self._names or (not self._names and (self.path / name).is_file()):
                return name
        raise RequestError(f"{self.path}: found none of {', '.join(names)}")

    def config(self, names: tuple[str, ...]) -> dict[str, Any]:
        """A configuration file as plain data.

        Raises:
            RequestError: it is not there, too long, or neither JSON nor YAML.
        """
        name = self.first(names)
        with self._open(name) as stream:
            content = stream.read(CONFIG_BYTES + 1)
        if len(content) > CONFIG_BYTES:
            raise RequestError(f"{self.path}: {name} has more than {CONFIG_BYTES} bytes")
        try:
            data = parse_json(content) if name.endswith(".json") else parse_yaml(content.decode())
        except (ValueError, yaml.YAMLError) as error:
            raise RequestError(f"{self.path}: {name} is not readable ({error})") from error
        if not isinstance(data, dict):
            raise RequestError(f"{self.path}: {name} holds a {type(data).__name__}; valid: a mapping")
        return data

    @contextmanager
    def weights(self) -> Iterator[Path]:
        """The file of weights; of a zip, a copy under a name of ours that is gone afterwards."""
        name = self.first(WEIGHTS)
        if not self._names:
            yield self.path / name
            return
        with TemporaryDirectory(prefix="segpipe-bundle-") as folder:
            copy = Path(folder) / Path(name).name
            with self._open(name) as source, copy.open("wb") as target:
                copyfileobj(source, target)
            yield copy

    @contextmanager
    def _open(self, name: str) -> Iterator[IO[bytes]]:
        if not self._names:
            with (self.path / name).open("rb") as stream:
                yield stream
            return
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(self._root + name) as member:
                yield member
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
            raise RequestError(f"{self.path}: {name} cannot be read from the zip ({error})") from error


def network_definition(bundle: Bundle) -> NetworkDefinition:
    """Class and arguments of the network that ``configs/inference`` defines.

    Raises:
        RequestError: no definition, a class outside monai.networks.nets, or an argument that is no plain
            value.
    """
    config = bundle.config(CONFIGS)
    place = bundle.first(CONFIGS)
    for key in NETWORK_KEYS:
        found = config.get(key)
        if isinstance(found, Mapping) and "_target_" in found:
            arguments = {
                name: plain(value, config, f"{bundle.path}: {place}: {key}.{name}")
                for name, value in found.items()
                if name not in ("_target_", "_desc_")
            }
            return NetworkDefinition(
                _class_name(str(found["_target_"]), f"{bundle.path}: {place}: {key}"), arguments
            )
    raise RequestError(
        f"{bundle.path}: {place}: found no network; valid: {' or '.join(NETWORK_KEYS)} with a _target_ "
        f"of {_LIBRARY}"
    )


def _class_name(target: str, place: str) -> str:
    """``UNet`` of UNet, monai.networks.nets.UNet or monai.networks.nets.unet.UNet."""
    module, _, name = target.rpartition(".")
    if module and module != _LIBRARY and not module.startswith(f"{_LIBRARY}."):
        raise RequestError(f"{place}: _target_ {target!r}; valid: classes of {_LIBRARY}")
    return name


def plain(value: Any, config: Mapping[str, Any], place: str, depth: int = 0) -> Any:
    """A value without anything to evaluate; references are replaced by what they name.

    Raises:
        RequestError: an expression, a macro, an object to be made, or a reference to one.
    """
    if isinstance(value, str):
        if value.startswith("@"):
            if depth > _DEPTH:
                raise RequestError(f"{place}: references go round in a circle")
            return plain(_follow(value, config, place), config, place, depth + 1)
        if value.startswith(("$", "%")):
            raise RequestError(f"{place}: found {value!r}, a program; valid: plain values, never evaluated")
        return value
    if isinstance(value, list):
        return [plain(item, config, place, depth) for item in value]
    if isinstance(value, Mapping):
        special = [key for key in value if str(key).startswith("_")]
        if special:
            raise RequestError(f"{place}: found {special[0]!r}, an object to be made; valid: plain values")
        return {str(key): plain(item, config, place, depth) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float):
        return value
    raise RequestError(f"{place}: found a {type(value).__name__}; valid: plain values")


def _follow(reference: str, config: Mapping[str, Any], place: str) -> Any:
    """What ``@name``, ``@name::key`` or ``@name#0`` names."""
    found: Any = config
    for part in reference[1:].replace("#", "::").split("::"):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise RequestError(f"{place}: found {reference!r}, which names nothing plain") from error
    return found


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
        data = _card(path, config, metadata, definition)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as error:
        raise RequestError(
            f"{path}: {METADATA} or {bundle.first(CONFIGS)} is not as MONAI's specification has it "
            f"({type(error).__name__}: {error})"
        ) from error
    return validate(Card, data, str(path))


def _format(formats: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The array of this name, or the first."""
    found: Mapping[str, Any] = formats.get(name) or list(formats.values())[0]  # noqa: RUF015  IndexError is reported
    return found


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
    path: Path, config: Mapping[str, Any], metadata: Mapping[str, Any], definition: NetworkDefinition
) -> dict[str, Any]:
    formats = metadata["network_data_format"]
    image, predicted = _format(formats["inputs"], "image"), _format(formats["outputs"], "pred")
    names, activation = _classes(path, config, predicted)
    wanted, left = _transforms(config, str(path))
    window = _window(config, image, str(path))
    channels = int(image["num_channels"])
    volume = int(definition.arguments.get("spatial_dims", len(window["size"]))) == 3
    stored = image.get("channel_def") or {}
    bands = [str(stored.get(str(i), f"channel {i}")) for i in range(channels)]
    if len(set(bands)) < channels:
        bands = [f"{name} {i}" for i, name in enumerate(bands)]
    wanted.setdefault("orientation", "RAS" if volume else None)
    return {
        "name": card_name(path.stem),
        "title": str(metadata.get("task", "")),
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
        "data": str(metadata.get("data_source", "")),
        "scores": _scores(metadata),
        "source": f"MONAI bundle {path.stem} {metadata.get('version', '')}".strip(),
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
