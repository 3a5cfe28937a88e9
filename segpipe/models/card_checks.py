"""What a card can be refused for: by itself, and while its adapter looks up and constructs a network."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from segpipe.config.card import Card, Divide, SceneQuantiles, Subtract
from segpipe.tiling.windows import halo_limit


def check_window(card: Card) -> None:
    """Whether size, halo and stride of the window go together.

    Raises:
        RequestError: they don't; names the field, what was found and what would be valid.
    """
    window, stride = card.window, card.window.stride
    shape = card.window_shape
    field = "window.shape" if window.size == "whole" else "window.size"
    if shape is not None:
        for n in shape:
            if n < 1 or n % stride:
                raise card.error(field, f"found {n}; valid: a positive multiple of window.stride {stride}")
    if window.size == "whole":
        if card.halo is None or any(card.halo):
            raise card.error("window.halo", "a whole scene has no halo: leave it out")
        return
    if card.halo is None:
        return
    least = int(card.output.kind in ("instance", "panoptic"))  # `check_objects` refuses 0
    for n, halo in zip(shape or (), card.halo, strict=True):
        most = halo_limit(n, stride)
        if halo < 0 or halo > most:
            valid = f"{least} to {most}" if least <= most else "a larger window.size"
            raise card.error(
                "window.halo", f"found {halo} for a window of {n} (stride {stride}); valid: {valid}"
            )


def check_objects(card: Card) -> None:
    """What cards whose answer is objects can't have, and what they need.

    Raises:
        RequestError: names the field, what was found and what would be valid.
    """
    if sum(c.background for c in card.classes) != 1:
        raise card.error(
            "classes", "one must have background: true: what elements without an object are labelled as"
        )
    if card.roi is not None or card.output.crf is not None or any(card.cleanup.model_dump().values()):
        raise card.error("output.kind", "objects go without `roi`, `crf` and `cleanup`; leave these out")
    if card.window.size != "whole" and not all(card.halo or (0,)):
        raise card.error(
            "window.halo",
            f"found {card.window.halo}; objects of neighbouring windows are joined by what both see: valid: "
            "elements above 0, best more than half of what is searched for",
        )


def check_input(card: Card) -> None:
    """Whether grid, orientation and normalisation make sense together.

    Raises:
        RequestError: they don't; names the field, what was found and what would be valid.
    """
    wanted = card.input
    if wanted.spacing is not None:
        if len(wanted.spacing) != card.ndim or min(wanted.spacing) <= 0:
            raise card.error("input.spacing", f"found {wanted.spacing}; valid: {card.ndim} sizes above 0")
        if card.window.shape is not None:
            raise card.error("input.spacing", "window.shape sets the grid already: give one of the two")
    if wanted.orientation and not re.fullmatch(
        r"(?!.*[RL].*[RL])(?!.*[AP].*[AP])(?!.*[SI].*[SI]).{3}", wanted.orientation
    ):
        raise card.error(
            "input.orientation",
            f"found {wanted.orientation!r}; valid: one letter each of R/L, A/P and S/I, e.g. RAS",
        )
    for number, step in enumerate(wanted.normalisation):
        field = f"input.normalisation.{number}"
        if isinstance(step, Subtract | Divide):
            if len(step.value) not in (1, card.channels):
                raise card.error(
                    f"{field}.value",
                    f"found {len(step.value)} numbers; valid: 1, or {card.channels} (one a band)",
                )
            if isinstance(step, Divide) and 0 in step.value:
                raise card.error(f"{field}.value", "found 0; nothing is divided by zero")
        elif isinstance(step, SceneQuantiles):
            if step.low >= step.high:
                raise card.error(f"{field}.low", f"found {step.low}; valid: below high {step.high}")
            if step.grid is not None and len(step.grid) != card.ndim:
                raise card.error(f"{field}.grid", f"found {step.grid}; valid: {card.ndim} sizes")


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
    raise card.error(
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
            raise card.error(
                f"arguments.{name}",
                f"found {given!r}; it follows from the card and is {value!r}: leave it out",
            )
    try:
        return factory(**arguments)
    except (TypeError, ValueError, KeyError, AssertionError, NotImplementedError) as error:
        raise card.error(
            "arguments", f"{card.architecture} refuses {dict(card.arguments)}: {error}"
        ) from error


def check_stride(card: Card, stride: int) -> None:
    """Whether windows that fit the card's stride fit the network's.

    Raises:
        RequestError: the card's is no multiple of it.
    """
    if card.window.stride % stride:
        raise card.error(
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
            raise card.error(f"arguments.{name}", f"unknown; {valid}")
