"""What images and words become for networks of the transformers library, read from folders as data.

Nothing in a folder is executed or chooses a class: its JSON files are read as numbers, its tensors as
safetensors, and images are resized and scaled by the library's own processors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as library

from segpipe.config.parsing import parse_json
from segpipe.errors import RequestError
from segpipe.models.providers.transformers.configs import REFUSED, data_alone, load_pretrained
from segpipe.prompts.segmenters.torch_base import library_config

TOKENIZERS = {"BertTokenizer": ["vocab.txt"], "CLIPTokenizer": ["vocab.json", "merges.txt"]}
"""By class of the library: the files that it reads where there is no tokenizer.json."""


def read_kind(folder: Path, kinds: Collection[str]) -> tuple[str, dict[str, Any]]:
    """A folder's `model_type`, and its configuration without the keys that ask for code.

    Raises:
        RequestError: its config.json is not readable, or of none of these kinds.
    """
    path = folder / "config.json"
    try:
        data = data_alone(parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path}: not readable as JSON ({error}); valid: a folder of save_pretrained"
        ) from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise RequestError(f"{path}: model_type is {kind!r}; valid for text: {', '.join(kinds)}")
    return kind, data


def load_network(folder: Path, name: str, data: dict[str, Any]) -> Any:
    """The network of this class of the library, from a folder and its configuration.

    Raises:
        RequestError: the configuration makes no sense, or the tensors do not fit it.
    """
    cls = getattr(library, name)
    config = library_config(cls.config_class, data, f"{folder / 'config.json'} makes no {name}")
    return load_pretrained(cls, folder, config)


def load_processor(folder: Path, processor: str, image: str, words: str) -> Any:
    """The processor of a folder, its two parts by these classes of the library.

    Args:
        words: one of `TOKENIZERS`.

    Raises:
        RequestError: files are missing or damaged.
    """
    vocabulary = TOKENIZERS[words]
    # The library makes an empty tokenizer where there are no files, for which every word is unknown.
    if not ((folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in vocabulary)):
        raise RequestError(f"{folder}: found no tokenizer.json; valid: it, or {' with '.join(vocabulary)}")
    try:
        parts = [
            getattr(library, name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            for name in (image, words)
        ]
    except (OSError, *REFUSED) as error:
        raise RequestError(
            f"{folder}: no processor ({' '.join(str(error).split())}); valid: preprocessor_config.json or "
            "processor_config.json, and the tokenizer's files, as the processor's save_pretrained writes them"
        ) from error
    return getattr(library, processor)(*parts)


def image_tensor(window: np.ndarray) -> torch.Tensor:
    """A window (3, y, x), 0…1, as processors take images.

    Raises:
        RequestError: it has another shape.
    """
    if window.ndim != 3 or len(window) != 3:
        raise RequestError(
            f"window: found shape {window.shape}; valid: (3, y, x), a composite of three bands"
        )
    return torch.from_numpy(np.ascontiguousarray(window, dtype=np.float32))


def check_length(processor: Any, phrases: Sequence[str], limit: int) -> None:
    """Whether a network takes phrases of so many word pieces.

    Raises:
        RequestError: names the phrase.
    """
    for phrase in phrases:
        if (found := len(processor.tokenizer(phrase)["input_ids"])) > limit:
            raise RequestError(f"phrase {phrase!r}: found {found} word pieces; valid: at most {limit}")
