"""Where a card's weights are, what they hash to, and how they are read: as data, never as code."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
import threading
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from segpipe.config.card import WITHOUT_WEIGHTS, Card, Provider, card_error
from segpipe.errors import RequestError
from segpipe.process.extras import check_installed

if TYPE_CHECKING:
    import torch

ENDINGS: dict[Provider, tuple[str, ...]] = {
    Provider.smp: (".safetensors", ".pt", ".pth"),
    Provider.monai: (".safetensors", ".pt", ".pth"),
    Provider.onnx: (".onnx",),
    Provider.torchvision: (".safetensors", ".pt", ".pth"),
    Provider.literature: (".safetensors", ".pt", ".pth"),
    Provider.classical: (".safetensors",),
    Provider.bundle: (".zip",),
    Provider.transformers: (".safetensors",),
    Provider.exported: (".pt2",),
    Provider.torchscript: (".pt", ".pth", ".ts", ".torchscript"),
}
"""Kinds of file each provider reads; those of `FOLDER_FILES` read a folder."""

FOLDER_FILES: dict[Provider, tuple[str, ...]] = {
    Provider.transformers: (
        *("config.json", "*.safetensors", "*.safetensors.index.json"),
        *("preprocessor_config.json", "processor_config.json"),
        *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"),
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    ),
    Provider.nnunet: ("dataset.json", "plans.json", "fold_*/checkpoint_*.pth"),
    Provider.bundle: ("configs/*.json", "configs/*.yaml", "models/model.*"),
}
"""What is fetched, hashed and read of the folders that some providers' models are."""

_FOLDERS = {
    Provider.transformers: (("config.json", "*.safetensors"), "save_pretrained"),
    Provider.nnunet: (("dataset.json", "plans.json", "fold_*/checkpoint_*.pth"), "nnUNetv2_train"),
    Provider.bundle: (("configs/*", "models/model.*"), "monai.bundle"),
}

_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[^/]+)(?:/(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")

# What a damaged file makes torch.load raise, seen by cutting and flipping bytes of real ones.
_DAMAGED = (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, struct.error)

_digests: dict[tuple[str, int, int], str] = {}
_digests_lock = threading.Lock()


def resolve_weights(card: Card) -> Path:
    """The file (or, for transformers, the folder) that ``card.weights`` names; it exists.

    Raises:
        RequestError: nothing is there, or it is of a kind that the card's provider cannot read.
    """
    if card.provider is Provider.ensemble:
        raise card_error(card, "weights", f"found {card.weights!r}; an ensemble's are those of its members")
    if not card.weights:
        raise card_error(card, "weights", "none given; valid: a path relative to the card, pkg:// or hf://")
    scheme, sign, _ = card.weights.partition("://")
    if not sign:
        path = card.folder / card.weights
    elif scheme == "pkg":
        path = _from_package(card)
    elif scheme == "hf":
        path = _from_hub(card)
    else:
        raise card_error(
            card,
            "weights",
            f"found {card.weights!r}; valid: a path relative to the card, "
            "pkg://distribution/file, or hf://org/name@commit/file",
        )
    if card.provider in FOLDER_FILES and not (card.provider in ENDINGS and path.is_file()):
        _check_folder(card, path)
    else:
        _check_file(card, path)
    return path


def _from_package(card: Card) -> Path:
    from segpipe.sources.uri import package_file

    try:
        return package_file(card.weights)
    except RequestError as error:
        raise card_error(card, "weights", str(error)) from error


def _from_hub(card: Card) -> Path:
    """A file or folder in the Hugging Face hub's local cache, fetched first where allowed."""
    found = _HUB.fullmatch(card.weights)
    if found is None or not _COMMIT.fullmatch(found["revision"]):
        # A branch or a tag can move: the same card would mean other weights tomorrow.
        raise card_error(
            card,
            "weights",
            f"found {card.weights!r}; valid: hf://org/name@REVISION[/file] with the full commit "
            "(40 hexadecimal digits) as the revision",
        )
    check_installed("huggingface_hub", f"{card.name}: weights: {card.weights}")
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError

    repo, revision, file = found["repo"], found["revision"], found["file"]
    try:
        if file is not None:
            return Path(hf_hub_download(repo, file, revision=revision))
        patterns = list(FOLDER_FILES[card.provider])
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, EntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise card_error(
            card,
            "weights",
            f"{card.weights} is not in the local cache and was not fetched: {reason}",
        ) from error


def _check_file(card: Card, path: Path) -> None:
    endings = ENDINGS[card.provider]
    valid = f"valid: a file ending in {', '.join(endings)}"
    if not path.is_file():
        found = "a folder, not a file," if path.is_dir() else "no file"
        raise card_error(card, "weights", f"{found} at {path} ({card.weights}); {valid}")
    if path.suffix not in endings:
        raise card_error(
            card,
            "weights",
            f"provider {card.provider.value} does not read {path.name}; {valid}",
        )


def _check_folder(card: Card, path: Path) -> None:
    needed, written_by = _FOLDERS[card.provider]
    if not all(list(path.glob(pattern)) for pattern in needed):
        raise card_error(
            card,
            "weights",
            f"found no {' with '.join(needed)} in {path} ({card.weights}); valid: a folder as {written_by} "
            "writes it, or hf://org/name@commit without a file",
        )


def weights_files(card: Card) -> list[Path]:
    """Every file the card's weights consist of, in a fixed order; of an ensemble, its members' in turn."""
    if card.provider is Provider.ensemble:
        return [file for member in _members(card) for file in weights_files(member)]
    if not card.weights and card.provider in WITHOUT_WEIGHTS:
        return []
    path = resolve_weights(card)
    if path.is_file():
        return [path]
    return sorted(file for pattern in FOLDER_FILES[card.provider] for file in path.glob(pattern))


def weights_fingerprint(card: Card) -> str:
    """SHA-256 of the weights file; of a folder, of its files' names and hashes.

    Of an ensemble, of its members' fingerprints, those of their cards included.

    Raises:
        RequestError: as `resolve_weights`.
    """
    if card.provider is Provider.ensemble:
        parts = "".join(
            f"{member.prediction_fingerprint()}\0{weights_fingerprint(member)}\n" for member in _members(card)
        )
        return hashlib.sha256(parts.encode()).hexdigest()
    if not card.weights and card.provider in WITHOUT_WEIGHTS:
        return ""
    files = weights_files(card)
    if resolve_weights(card).is_file():
        return _digest(files[0])
    lines = "".join(f"{file.name}\0{_digest(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _members(card: Card) -> list[Card]:
    from segpipe.models.ensemble_members import (
        member_cards,  # which tells its mistakes with this module
    )

    return member_cards(card)


def _digest(path: Path) -> str:
    """SHA-256 of a file, remembered in this process until its size or time changes."""
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    with _digests_lock:
        if key not in _digests:
            with path.open("rb") as stream:
                _digests[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        return _digests[key]


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
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


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
