"""Which of a source's channels a model takes."""

from __future__ import annotations

from segpipe.config.card import Card
from segpipe.errors import SceneError
from segpipe.sources import Source


def match_bands(card: Card, source: Source) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The source's channel for each of the model's.

    By name where the source has names (case does not matter), by position where it has none and
    the counts agree.

    Raises:
        SceneError: kind, names or counts do not fit; says what the scene has and what the card asks.
    """
    kind = source.geometry.kind
    if kind != card.kind:
        raise SceneError(f"the scene is a {kind}, the card {card.name!r} is for a {card.kind}")
    wanted = card.input.bands
    if not wanted:
        if source.count != 1:
            raise SceneError(f"the scene has {source.count} channels, the card {card.name!r} takes one")
        return (0,), source.bands or ("image",)
    have = {name.lower(): i for i, name in enumerate(source.bands)}
    if all(name.lower() in have for name in wanted):
        return tuple(have[name.lower()] for name in wanted), tuple(wanted)
    if source.bands and len(have) == source.count:
        missing = [name for name in wanted if name.lower() not in have]
        raise SceneError(
            f"bands: the scene has no {', '.join(missing)}; it has {', '.join(source.bands)}; the card "
            f"{card.name!r} asks for {', '.join(wanted)}; name the scene's bands with the job's `bands`"
        )
    if source.count != len(wanted):
        raise SceneError(
            f"bands: the scene has {source.count} unnamed bands, the card {card.name!r} asks for "
            f"{len(wanted)} ({', '.join(wanted)}); name the scene's bands with the job's `bands`"
        )
    return tuple(range(len(wanted))), tuple(wanted)
