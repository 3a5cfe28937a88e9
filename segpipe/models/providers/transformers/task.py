"""The words that tell OneFormer its task, as numbers (Jain et al., OneFormer, CVPR 2023)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segpipe.config.card import Card, card_error
from segpipe.models.weights import resolve_weights

TASK_ARGUMENTS = ("task", "task_tokens")
TASKS = ("semantic", "instance", "panoptic")


def task_tokens(card: Card, config: Any) -> list[int]:
    """Numbers of "the task is …", padded with 0 to the network's length, as `OneFormerProcessor` gives them.

    The task is `arguments.task`, or else the card's kind of output. Its numbers are `arguments.task_tokens`,
    or those that config.json has under `task_tokens`, by task, or what the folder's CLIP tokenizer makes.

    Raises:
        RequestError: there are none, they are too many, or the task is unknown.
    """
    task = card.arguments.get("task", card.output.kind)
    if task not in TASKS:
        raise card_error(card, "arguments.task", f"found {task!r}; valid: {', '.join(TASKS)}")
    tokens = card.arguments.get("task_tokens")
    if tokens is None:
        tokens = (getattr(config, "task_tokens", None) or {}).get(task)
    if tokens is None:
        tokens = _tokenised(card, f"the task is {task}")
    length = int(config.task_seq_len)
    plain = isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens)
    if not plain or not 0 < len(tokens) <= length:
        raise card_error(
            card, "arguments.task_tokens", f"found {tokens!r}; valid: 1 to {length} whole numbers from 0 on"
        )
    return [*tokens, *[0] * (length - len(tokens))]


def _tokenised(card: Card, text: str) -> list[int]:
    from transformers import CLIPTokenizer

    folder = resolve_weights(card) if card.weights else Path()
    there = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not card.weights or not there:
        raise card_error(
            card,
            "arguments.task_tokens",
            f"none given, and {folder} holds no tokenizer (tokenizer.json, or vocab.json with merges.txt); "
            f"valid: the numbers of {text!r} under the CLIP tokenizer",
        )
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise card_error(card, "weights", f"{folder}: its tokenizer cannot be read: {error}") from error
    return [int(t) for t in tokenizer(text)["input_ids"]]
