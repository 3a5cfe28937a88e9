"""Where a card's weights are, what they hash to, and how they are read: as data, never as code."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from segpipe.config.card import Card
from segpipe.config.job import Identity
from segpipe.errors import RequestError
from segpipe.models.plugins import CompositeAdapter, WeightsFolder, load_adapter, provider_spec
from segpipe.process.extras import check_installed
from segpipe.sources.identity import file_identity

if TYPE_CHECKING:
    import torch

_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[^/]+)(?:/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# What a damaged file makes torch.load raise, seen by cutting and flipping bytes of real ones.
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, struct.error)


def resolve_weights(card: Card) -> Path:
    """The file (or, for transformers, the folder) that ``card.weights`` names; it exists.

    Raises:
        RequestError: nothing is there, or it is of a kind that the card's provider cannot read.
    """
    spec = provider_spec(card)
    if spec.composite:
        raise card.error(
            "weights", f"found {card.weights!r}; those of provider {card.provider} are its members'"
        )
    if not card.weights:
        raise card.error("weights", "none given; valid: a path relative to the card, pkg:// or hf://")
    scheme, sign, _ = card.weights.partition("://")
    if not sign:
        path = card.folder / card.weights
    elif scheme == "pkg":
        path = _from_package(card)
    elif scheme == "hf":
        path = _from_hub(card, spec.folder)
    else:
        raise card.error(
            "weights",
            f"found {card.weights!r}; valid: a path relative to the card, "
            "pkg://distribution/file, or hf://org/name@commit/file",
        )
    if spec.folder and not (spec.files and path.is_file()):
        _check_folder(card, path, spec.folder)
    else:
        _check_file(card, path, spec.files)
    return path


def _from_package(card: Card) -> Path:
    from segpipe.sources.uri import package_file

    try:
        return package_file(card.weights)
    except RequestError as error:
        raise card.error("weights", str(error)) from error


def _from_hub(card: Card, folder: WeightsFolder | None) -> Path:
    """A file or folder in the Hugging Face hub's local cache, fetched first where allowed."""
    found = _HUB.fullmatch(card.weights)
    if found is None or not _COMMIT.fullmatch(found["revision"]) or not (found["file"] or folder):
        # A branch or a tag can move: the same card would mean other weights tomorrow.
        raise card.error(
            "weights",
            f"found {card.weights!r}; valid: hf://org/name@REVISION{'[/file]' if folder else '/file'} with "
            "the full commit (40 hexadecimal digits) as the revision",
        )
    check_installed("huggingface_hub", f"{card.name}: weights: {card.weights}")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, revision, file = found["repo"], found["revision"], found["file"]
    try:
        if file is not None or folder is None:
            return Path(hf_hub_download(repo, file, revision=revision))
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(folder.files)))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise card.error(
            "weights", f"{card.weights} is not in the local cache and was not fetched: {reason}"
        ) from error


def _check_file(card: Card, path: Path, endings: tuple[str, ...]) -> None:
    valid = f"valid: a file ending in {', '.join(endings)}"
    if not path.is_file():
        found = "a folder, not a file," if path.is_dir() else "no file"
        raise card.error("weights", f"{found} at {path} ({card.weights}); {valid}")
    if path.suffix not in endings:
        raise card.error("weights", f"provider {card.provider} does not read {path.name}; {valid}")


def _check_folder(card: Card, path: Path, folder: WeightsFolder) -> None:
    if not all(list(path.glob(pattern)) for pattern in folder.needed):
        raise card.error(
            "weights",
            f"found no {' with '.join(folder.needed)} in {path} ({card.weights}); valid: a folder as "
            f"{folder.written_by} writes it, or hf://org/name@commit without a file",
        )


def weights_files(card: Card) -> list[Path]:
    """Every file the card's weights consist of, in a fixed order; of an ensemble, its members' in turn."""
    spec = provider_spec(card)
    if spec.composite:
        return [file for member in member_cards(card) for file in weights_files(member)]
    if not card.weights and not spec.needs_weights:
        return []
    path = resolve_weights(card)
    if spec.folder is None or path.is_file():
        return [path]
    return sorted(file for pattern in spec.folder.files for file in path.glob(pattern))


def weights_fingerprint(card: Card) -> str:
    """SHA-256 of the weights file; of a folder, of its files' names and hashes.

    Of an ensemble, of its members' fingerprints, those of their cards included.

    Raises:
        RequestError: as `resolve_weights`.
    """
    if provider_spec(card).composite:
        parts = "".join(
            f"{member.prediction_fingerprint()}\0{weights_fingerprint(member)}\n"
            for member in member_cards(card)
        )
        return hashlib.sha256(parts.encode()).hexdigest()
    files = weights_files(card)
    if not files:
        return ""
    if resolve_weights(card).is_file():
        return _digest(files[0])
    lines = "".join(f"{file.name}\0{_digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def member_cards(card: Card) -> list[Card]:
    """The cards whose models make up that of a card whose provider is composite."""
    return cast(CompositeAdapter, load_adapter(card)).members(card)


def _digest(path: Path) -> str:
    """SHA-256 of a file, remembered in this process until the file changes."""
    return str(file_identity([path], Identity.content)[0]["sha256"])


def load_state(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU; half precision storage comes back as float32.

    Reads safetensors, and PyTorch's ``.pt``/``.pth`` under ``weights_only=True``, where a
    checkpoint's ``state_dict`` or ``model`` entry is unwrapped.

    Raises:
        RequestError: damaged, of another kind, or it would have to run code to be read.
    """
    import torch

    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_checkpoint(path)
    half = (torch.float16, torch.bfloat16)
    return {name: t.float() if t.dtype in half else t for name, t in state.items()}


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: not a readable safetensors file ({error})") from error


def _is_torchscript(path: Path) -> bool:
    """Whether it is an archive with a program in it, rather than of tensors alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (*_DAMAGED, zipfile.BadZipFile):
        return False


def _read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            # On archives and pickle protocols that are refused right after, in our own words.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path}: cannot be read as plain tensors; it is damaged, or it would have to run code "
            "to be loaded, which segpipe never does; save its state_dict as safetensors instead"
        ) from error
    except _DAMAGED as error:
        hint = (
            "it is TorchScript, a program: `provider: torchscript` with `allow_torchscript: true`"
            if _is_torchscript(path)
            else "it is damaged, or no PyTorch checkpoint"
        )
        raise RequestError(f"{path}: cannot be read; {hint}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise RequestError(f"{path}: found {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(tensor, torch.Tensor):
            raise RequestError(
                f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor; "
                "save the network's state_dict alone"
            )
    return {str(name): tensor for name, tensor in content.items()}
