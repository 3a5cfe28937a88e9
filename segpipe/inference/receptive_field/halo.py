"""`halo: auto`: how far a card's model looks, measured once and recorded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from segpipe.config.card import Card
from segpipe.models.weights import weights_fingerprint
from segpipe.store.stage import Stage, stage_key

if TYPE_CHECKING:
    from segpipe.inference.receptive_field.reach import Reach

REACH_VERSION = 1
"""Raised when the same model would be measured otherwise."""


def card_reach(card: Card, window: Sequence[int], out: str) -> Reach:
    """How far the model looks, in float32 on the CPU; found in the store after the first time.

    Args:
        card: of the model.
        window: elements per model axis.
        out: output location of the job, whose store keeps the finding.

    Raises:
        RequestError: the model cannot be probed; give the card's `window.halo` in elements.
    """
    from segpipe.inference.receptive_field.reach import Reach, measure_reach
    from segpipe.models.registry import load_model

    parts = {
        "card": card.prediction_fingerprint(),
        "weights": weights_fingerprint(card),
        "window": list(window),
        "version": REACH_VERSION,
    }
    record = Stage(out, stage_key("reach", parts))
    found = record.read_json("reach.json")
    if found is None:
        model = load_model(card, "cpu", os.cpu_count() or 1, "fp32")
        reach = measure_reach(
            model,
            card.channels,
            card.ndim,
            card.window.stride,
            tuple(window),
            activation=card.output.activation,
            fixed=card.window.fixed,
        )
        found = reach.to_json()
        record.write_json("reach.json", found)
    return Reach.from_json(found)
