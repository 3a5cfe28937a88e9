"""Looking up an architecture by name and constructing it; mistakes are told as the card's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from segpipe.config.card import Card, card_error


def known(card: Card, names: Collection[str]) -> str:
    """The card's architecture, which is one of ``names``.

    Raises:
        RequestError: it is not; names those that come close, or all.
    """
    if card.architecture is not None and card.architecture in names:
        return card.architecture
    folded = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(card.architecture).lower(), list(folded), n=3)
    hint = f"did you mean {' or '.join(folded[c] for c in close)}? " if close else ""
    raise card_error(
        card,
        "architecture",
        f"found {card.architecture!r}; {hint}valid for provider {card.provider}: {', '.join(sorted(names))}",
    )


def construct(card: Card, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """Call a network's class with the arguments that the card gives and those that follow from it.

    Raises:
        RequestError: the card gives one that follows from it another value, or the class
            refuses them.
    """
    for name, value in arguments.items():
        given = card.arguments.get(name, value)
        if given != value and value is not None:
            raise card_error(
                card,
                f"arguments.{name}",
                f"found {given!r}; it follows from the card and is {value!r}: leave it out",
            )
    try:
        return factory(**arguments)
    except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
        raise card_error(
            card, "arguments", f"{card.architecture} refuses {dict(card.arguments)}: {error}"
        ) from error


def check_stride(card: Card, stride: int) -> None:
    """Whether windows that fit the card's stride fit the network's.

    Raises:
        RequestError: the card's is no multiple of it.
    """
    if card.window.stride % stride:
        raise card_error(
            card,
            "window.stride",
            f"found {card.window.stride}; this network's total stride is {stride}: give a multiple",
        )


def only_arguments(card: Card, names: Collection[str]) -> None:
    """Refuse arguments that would be ignored.

    Raises:
        RequestError: the card has an argument outside ``names``.
    """
    for name in card.arguments:
        if name not in names:
            valid = f"valid: {', '.join(sorted(names))}" if names else "this provider takes none"
            raise card_error(card, f"arguments.{name}", f"unknown; {valid}")
