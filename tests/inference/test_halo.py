"""`window.halo: auto` in a job: measured once, kept, and wide enough that tiles equal the whole."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from segpipe.config.card import read_card
from segpipe.inference.receptive_field.reach import card_reach
from tests.inference.lab import CENTRED, RADIUS, STRIDE, Lab, patches, predict, prepared, scores_of

INPUT = {"bands": ["b0"], "normalisation": CENTRED}


def test_a_card_without_a_halo_is_measured_once(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    ref = lab.raster(patches((90, 70), seed=5))
    card = lab.card(2, input=INPUT, window={"size": [32], "halo": "auto", "stride": STRIDE})
    scene = prepared(lab.job(ref, card, "auto", scores=True), ref)
    axis = scene.plan.lattice.axes[0]
    halo = (axis.window - (axis.cuts[2] - axis.cuts[1])) // 2
    assert 0 < halo <= RADIUS + STRIDE  # analytic: at most RADIUS, rounded up to the stride
    predict(scene)
    whole = prepared(lab.job(ref, card, "whole", scores=True, tiling={"window": "whole"}), ref)
    predict(whole)
    assert np.abs(scores_of(scene) - scores_of(whole)).max() < 1e-5

    store = tmp_path / "auto" / ".store"
    (kept,) = store.glob("reach-*/reach.json")
    before = kept.stat().st_mtime_ns
    found = card_reach(read_card(card), (32, 32), str(tmp_path / "auto"))
    assert kept.stat().st_mtime_ns == before and found.halo == (halo, halo)
