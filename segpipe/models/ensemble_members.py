"""The cards that an ensemble averages: what they must have in common."""

from __future__ import annotations

from typing import Any

from segpipe.config.card import Card, Provider, card_error, load_card
from segpipe.models.construct import only_arguments

ARGUMENTS = ("cards", "card", "dropout", "seed")


def member_cards(card: Card) -> list[Card]:
    """The cards of an ensemble, in the order given: of ``cards``, or the one of ``card``.

    Raises:
        RequestError: none or both are given, a file is wrong, or a member is an ensemble itself.
    """
    only_arguments(card, ARGUMENTS)
    cards, one = card.arguments.get("cards"), card.arguments.get("card")
    paths = [one] if cards is None else cards
    if (cards is None) == (one is None) or not isinstance(paths, list) or not paths:
        raise card_error(
            card, "arguments", "valid: `cards`, a list of model cards, or `card` with `dropout`, one member"
        )
    members = []
    for path in paths:
        if not isinstance(path, str):
            raise card_error(card, "arguments.cards", f"found {path!r}; valid: paths relative to this card")
        member = load_card(card.folder / path)
        if member.provider is Provider.ensemble:
            raise card_error(card, "arguments.cards", f"{path} is an ensemble; list its members instead")
        members.append(member)
    return members


def check_members(card: Card) -> None:
    """Whether members and ensemble see the same input and name the same classes.

    Raises:
        RequestError: names the member and the field, what it has and what the ensemble has.
    """
    if card.output.activation != "none" or card.output.kind != "semantic":
        raise card_error(
            card,
            "output",
            "an ensemble's answer is a mean of probabilities: valid: activation none, semantic",
        )
    for member in member_cards(card):
        for field, found, wanted in _in_common(member, card):
            if found != wanted:
                raise card_error(card, field, f"found {wanted}; its member {member.name} has {found}")
        if member.roi is not None:
            raise card_error(card, "arguments.cards", f"{member.name} has a roi; give that to the ensemble")
        if card.window.stride % member.window.stride:
            raise card_error(
                card,
                "window.stride",
                f"found {card.window.stride}; {member.name} has {member.window.stride}: valid: a multiple",
            )
        rigid = (member.window.fixed, member.window_shape)
        if member.window.fixed and rigid != (card.window.fixed, card.window_shape):
            raise card_error(
                card,
                "window",
                f"{member.name} takes {list(member.window_shape or ())} only: give that, fixed",
            )


def _in_common(member: Card, card: Card) -> list[tuple[str, Any, Any]]:
    """Field, the member's value and the ensemble's, of all that must be equal."""
    fields = ("bands", "orientation", "spacing", "image_resampling", "normalisation")
    pairs = [(f"input.{f}", getattr(member.input, f), getattr(card.input, f)) for f in fields]
    return [
        ("kind", member.kind, card.kind),
        ("output.kind", member.output.kind, "semantic"),
        *pairs,
        ("window.padding", member.window.padding, card.window.padding),
        ("classes", list(member.values), list(card.values)),
    ]


def dropout_passes(card: Card) -> tuple[int, int]:
    """Passes with dropout active, and the seed of the first; (0, 0) where none are asked for.

    Raises:
        RequestError: no whole numbers, or several members.
    """
    passes, seed = card.arguments.get("dropout"), card.arguments.get("seed", 0)
    if passes is None and "card" not in card.arguments and "seed" not in card.arguments:
        return 0, 0
    if "card" not in card.arguments:
        raise card_error(card, "arguments.dropout", "goes with `card`, one member, and not with `cards`")
    for name, value, least in (("dropout", passes, 2), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise card_error(
                card, f"arguments.{name}", f"found {value!r}; valid: a whole number from {least}"
            )
    assert isinstance(passes, int)
    return passes, int(seed)
