"""Objects through the engine and the store: what an oracle sees window by window comes back whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from segpipe.inference.engine import Engine
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.objects.table import ObjectTable
from segpipe.objects.window import WindowObjects
from segpipe.pipeline.model_scene import Scene, pending_blocks
from segpipe.pipeline.predict import finish_labels
from tests.inference.lab import Lab, labels_of, prepared
from tests.instances.scene import by_first, discs, touching

CLASSES = [
    {"value": 0, "name": "ground", "color": "#000000", "background": True},
    {"value": 4, "name": "even", "color": "#00ff00"},
    {"value": 9, "name": "odd", "color": "#0000ff"},
]


@dataclass
class Oracle:
    """Reads the true ids from the image and answers with them, shuffled anew for every window."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def objects(self, batch: torch.Tensor) -> Sequence[WindowObjects]:
        found = []
        for window in batch.numpy()[:, 0].astype(np.int64):
            true = np.unique(window[window > 0])
            order = np.random.default_rng(int(window.sum())).permutation(len(true))
            ids = np.zeros(window.shape, np.int32)
            for local, k in enumerate(order, start=1):
                ids[window == true[k]] = local
            classes = np.where(true[order] % 2, 9, 4)
            found.append(WindowObjects(ids, classes, (true[order] % 100 / 100).astype(np.float32)))
        return found


def segmented(lab: Lab, truth: np.ndarray, out: str, **tiling: object) -> Scene:
    """A finished scene whose image is the truth."""
    ndim = truth.ndim
    card = lab.card(ndim, classes=CLASSES, output={"kind": "instance", "activation": "none"})
    if ndim == 2:
        ref = lab.raster(truth[None].astype(np.float32), nodata=-1)
    else:
        ref = lab.volume(truth.astype(np.float32), np.diag([1.0, 1, 1, 1]))
    scene = prepared(lab.job(ref, card, out, tiling=tiling), ref)
    normaliser = Normaliser(scene.card, scene.pixels.scaling, Statistics())
    with scene.open_blocks() as store:
        engine = Engine(scene.plan, scene.card, normaliser, Oracle(), store)
        engine.run(pending_blocks(scene))
    finish_labels(scene)
    return scene


@pytest.mark.parametrize("block", ["16", "24", "32", "48x80", "100", "7x90"])
def test_the_truth_comes_back_through_the_engine(tmp_path: Path, block: str) -> None:
    truth = discs((150, 130), 60, seed=1)
    scene = segmented(Lab(tmp_path), truth, "out", block=block)
    found = np.asarray(scene.labels.array("instances")[...])
    assert np.array_equal(found, by_first(truth))
    assert np.array_equal(labels_of(scene), np.select([truth == 0, truth % 2 == 1], [0, 9], 4))
    table = ObjectTable.load(scene.labels)
    first = {int(found[truth == k][0]): k for k in np.unique(truth[truth > 0])}
    for place, k in first.items():
        where = np.argwhere(truth == k)
        at = place - 1
        assert table.objects.elements[at] == len(where)
        assert table.objects.classes[at] == (9 if k % 2 else 4)
        assert np.allclose(table.centroids[at], where.mean(0))
        assert table.size[at] == len(where) << 30  # all elements are as large as the largest


def test_volumes_and_holes_in_the_data(tmp_path: Path) -> None:
    truth = touching((40, 50, 60), seed=2)
    scene = segmented(Lab(tmp_path), truth, "out", block="20")
    assert np.array_equal(np.asarray(scene.labels.array("instances")[...]), by_first(truth))
    flat = discs((90, 90), 30, seed=3, radius=(4, 12)).astype(np.int64)
    flat[30:50, 20:70] = -1  # nodata cuts objects, and is no part of any
    scene = segmented(Lab(tmp_path), flat, "holes", block="32")
    found = np.asarray(scene.labels.array("instances")[...])
    assert np.array_equal(found, by_first(np.maximum(flat, 0)))
    assert (labels_of(scene)[flat < 0] == 255).all()
