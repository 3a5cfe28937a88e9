"""MONAI bundles, a folder or a zip: their network definition and metadata, read as data.

A bundle's configuration is a program in JSON or YAML: ``_target_`` calls anything by name, ``$`` evaluates
Python, ``%`` reads other files. Here it is only looked up: plain values, and references (``@name``,
``@name::key::0``) to plain values.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryDirectory
from typing import IO, TYPE_CHECKING, Any

import yaml

from segpipe.errors import RequestError

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
            data = json.loads(content) if name.endswith(".json") else yaml.safe_load(content)
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
