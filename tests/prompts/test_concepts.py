"""SAM 3 with tiny random networks: masks, boxes and scores are those of the library's own processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Sam3Model

from benchmarks.detector_files import sam3, sam3_video, save
from segpipe.errors import RequestError
from segpipe.prompts.grounding.base import Outcome
from segpipe.prompts.grounding.sam3 import enlarged, load_concepts

CPU = torch.device("cpu")
PHRASES = ["lake", "small docks", "field"]
WINDOW = np.random.default_rng(0).random((3, 64, 96)).astype(np.float32)


@pytest.fixture(scope="module", params=[sam3, sam3_video])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """Folder; the library's own network for images and its processor."""
    folder = tmp_path_factory.mktemp("models") / "sam3"
    make: Callable[..., Any] = request.param
    network, processor = save(folder, make, factor=5)
    image_network = network if make is sam3 else network.detector_model
    assert isinstance(image_network, Sam3Model)
    return folder, image_network, processor


def _library(network: Any, processor: Any, phrase: str) -> tuple[Any, torch.Tensor]:
    """Its output, and scores of all candidates."""
    batch = processor(images=WINDOW, text=phrase, do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        output = network(
            pixel_values=batch["pixel_values"],
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
        )
    return output, (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0]


def test_masks_boxes_and_scores(model: tuple[Path, Any, Any]) -> None:
    folder, network, processor = model
    outputs = [_library(network, processor, phrase) for phrase in PHRASES]
    ordered = torch.cat([score for _, score in outputs]).sort().values
    threshold = float(ordered[14:16].mean())  # between two of 36, so that no rounding crosses it
    assert float(ordered[15] - ordered[14]) > 1e-5
    found = load_concepts(folder, CPU, threshold).ground(WINDOW, PHRASES)
    d = found.detections
    sizes = []
    for i, (output, score) in enumerate(outputs):
        own = processor.post_process_instance_segmentation(
            output, threshold=threshold, target_sizes=[(64, 96)]
        )
        expected = {name: tensor.numpy() for name, tensor in own[0].items()}
        there = expected["masks"].any(axis=(1, 2))
        mine = d.phrase == i
        logits = enlarged(output.pred_masks[0, score > threshold], (64, 96))[there]
        assert logits.dtype == np.float16 and logits.shape == (mine.sum(), 64, 96)
        masks = logits > 0
        # Rounding may move an element whose probability is 0.5 to the last bits.
        assert (masks != expected["masks"][there].astype(bool)).mean() < 1e-4
        corners = np.column_stack((d.start, d.stop))[mine][:, [1, 0, 3, 2]] + 0.5
        np.testing.assert_allclose(corners, expected["boxes"][there], atol=1e-3)
        np.testing.assert_allclose(d.score[mine], expected["scores"][there], atol=1e-5)
        account = found.accounts[i]
        assert (account.found, account.small) == (there.sum(), (~there).sum())
        assert account.below == (score <= threshold).sum() and account.best == pytest.approx(score.max())
        sizes += masks.sum(axis=(1, 2)).tolist()
        for one, (y, x) in zip(logits, d.point[mine].astype(int), strict=True):
            assert one[y, x] == pytest.approx(one.max(), abs=1e-2) and one[y, x] > 0
    assert len(d) > 5 and len(set(sizes)) > 3 and max(sizes) > 0


def test_a_phrase_does_not_change_the_others(model: tuple[Path, Any, Any]) -> None:
    grounder = load_concepts(model[0], CPU, 0.0)
    alone, among = (grounder.ground(WINDOW, p).detections for p in (["field"], PHRASES))
    for name in ("start", "stop", "point", "score"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(among, name)[among.phrase == 2])


def test_nothing_over_the_threshold(model: tuple[Path, Any, Any]) -> None:
    found = load_concepts(model[0], CPU, 1.0).ground(WINDOW, PHRASES)
    assert not len(found.detections)
    assert [a.outcome for a in found.accounts] == [Outcome.below] * 3
    assert [a.below for a in found.accounts] == [12] * 3 and 0 < found.accounts[0].best < 1


def test_what_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sam3"
    save(folder, sam3)
    with pytest.raises(RequestError, match="valid: at most 32"):
        load_concepts(folder, CPU).ground(WINDOW, ["a very long phrase about lakes and docks"])
    with pytest.raises(RequestError, match=r"found shape \(5, 8, 8\)"):
        load_concepts(folder, CPU).ground(np.zeros((5, 8, 8), np.float32), ["lake"])
    path = folder / "processor_config.json"
    good = path.read_text()
    path.write_text(good.replace("56", "64"))
    with pytest.raises(RequestError, match="found a processor for 64 × 64; valid for its network: 56 × 56"):
        load_concepts(folder, CPU)
    path.write_text(good)
    config = folder / "config.json"
    data = json.loads(config.read_text())
    config.write_text(json.dumps({**data, "model_type": "sam3_tracker"}))
    with pytest.raises(RequestError, match="model_type is 'sam3_tracker'; valid for text: sam3, sam3_video"):
        load_concepts(folder, CPU)
    config.write_text(json.dumps({"model_type": "sam3_video", "detector_config": {"model_type": "detr"}}))
    with pytest.raises(RequestError, match="detector_config"):
        load_concepts(folder, CPU)
