"""Detectors with tiny random networks: boxes, scores and phrases are those of the library's own processor."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage.measure import label, regionprops

from benchmarks.detector_files import clipseg, dino, owl, save
from segpipe.errors import RequestError
from segpipe.models.plugins import BUILT_IN
from segpipe.prompts.grounding.base import Outcome
from segpipe.prompts.grounding.detectors import ClipSeg, load_detector

CPU = torch.device("cpu")
PHRASES = ["lake", "small docks", "field"]
WINDOW = np.random.default_rng(0).random((3, 64, 96)).astype(np.float32)


@pytest.fixture(scope="module", params=["GroundingDino", "MMGroundingDino"])
def dino_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("models") / request.param
    return folder, *save(folder, dino, request.param)


def _quantile(values: torch.Tensor, share: float) -> float:
    return float(torch.quantile(values.double().flatten(), share))


def test_boxes_and_phrases_of_grounding_dino(dino_folder: tuple[Path, Any, Any]) -> None:
    folder, network, processor = dino_folder
    batch = processor(images=WINDOW, text=[PHRASES], do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        output = network(**batch)
    words = torch.sigmoid(output.logits[0])
    box_threshold = _quantile(words.max(dim=-1).values, 0.5)
    text_threshold = _quantile(words.max(dim=-1).values, 0.3)
    expected = processor.post_process_grounded_object_detection(
        output,
        batch["input_ids"],
        threshold=box_threshold,
        text_threshold=text_threshold,
        target_sizes=[WINDOW.shape[1:]],
    )[0]
    found = load_detector(folder, CPU, box_threshold, text_threshold).ground(WINDOW, PHRASES)
    # lake . small dock s . field .  behind [CLS]
    spans = {0: [1], 1: [3, 4, 5], 2: [7]}
    best = torch.stack([words[:, at].max(dim=1).values for at in spans.values()], dim=1)
    over = words.max(dim=-1).values > box_threshold
    named = (best.max(dim=1).values > text_threshold)[over].numpy()
    d = found.detections
    assert 0 < len(d) == named.sum() <= len(named)
    got = np.column_stack((d.start[:, ::-1], d.stop[:, ::-1])) + 0.5
    np.testing.assert_allclose(got, expected["boxes"].numpy()[named], atol=1e-3)
    np.testing.assert_allclose(d.score, expected["scores"].numpy()[named], atol=1e-5)
    assert d.label == tuple(t for t, keep in zip(expected["text_labels"], named, strict=True) if keep)
    np.testing.assert_array_equal(d.phrase, best.argmax(dim=1)[over].numpy()[named])
    assert sum(a.found + a.below for a in found.accounts) == 40, "every candidate is accounted for"
    assert [a.found for a in found.accounts] == np.bincount(d.phrase, minlength=3).tolist()


def test_nothing_over_the_threshold_is_said_with_the_best(dino_folder: tuple[Path, Any, Any]) -> None:
    folder, *_ = dino_folder
    found = load_detector(folder, CPU, box_threshold=1.0).ground(WINDOW, PHRASES)
    assert not len(found.detections) and found.detections.start.shape == (0, 2)
    assert {a.outcome for a in found.accounts} <= {Outcome.below, Outcome.absent}
    assert sum(a.below for a in found.accounts) == 40
    assert max(a.best for a in found.accounts if a.below) <= 1


def test_phrases_that_grounding_dino_cannot_take(dino_folder: tuple[Path, Any, Any]) -> None:
    detector = load_detector(dino_folder[0], CPU)
    with pytest.raises(RequestError, match="found a full stop"):
        detector.ground(WINDOW, ["lake. dock"])
    with pytest.raises(RequestError, match="valid: at most 24 together"):
        detector.ground(WINDOW, ["lake"] * 20)
    with pytest.raises(RequestError, match=r"found shape \(5, 8, 8\); valid: \(3, y, x\)"):
        detector.ground(np.zeros((5, 8, 8), np.float32), ["lake"])


def test_boxes_and_phrases_of_owl(tmp_path: Path) -> None:
    network, processor = save(tmp_path / "owl", owl, factor=0.35)
    batch = processor(images=WINDOW, text=[PHRASES], do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        output = network(**batch)
    threshold = _quantile(torch.sigmoid(output.logits).max(dim=-1).values, 0.7)
    expected = processor.post_process_grounded_object_detection(
        output, threshold=threshold, target_sizes=[WINDOW.shape[1:]], text_labels=[PHRASES]
    )[0]
    found = load_detector(tmp_path / "owl", CPU, threshold).ground(WINDOW, PHRASES)
    d = found.detections
    assert len(d) > 5 and len(set(expected["text_labels"])) > 1
    got = np.column_stack((d.start[:, ::-1], d.stop[:, ::-1])) + 0.5
    np.testing.assert_allclose(got, expected["boxes"].numpy(), atol=1e-3)
    np.testing.assert_allclose(d.score, expected["scores"].numpy(), atol=1e-5)
    assert d.label == tuple(expected["text_labels"])
    assert [PHRASES[i] for i in d.phrase] == expected["text_labels"]
    assert sum(a.found + a.below for a in found.accounts) == 64, "a candidate for each 8-pixel patch"
    with pytest.raises(RequestError, match="valid: at most 16"):
        load_detector(tmp_path / "owl", CPU).ground(WINDOW, ["a very long phrase about lakes"])


def test_score_maps_and_objects_of_clipseg(tmp_path: Path) -> None:
    network, processor = save(tmp_path / "clipseg", clipseg, factor=1)
    batch = processor(text=PHRASES, images=[WINDOW] * 3, do_rescale=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = network(**batch).logits
    expected = torch.nn.functional.interpolate(
        torch.sigmoid(logits)[:, None], size=(64, 96), mode="bilinear", align_corners=False
    )[:, 0].numpy()
    detector = load_detector(tmp_path / "clipseg", CPU)
    assert isinstance(detector, ClipSeg)
    maps = detector.score_maps(WINDOW, PHRASES)
    np.testing.assert_allclose(maps, expected, atol=1e-5)
    assert maps.std() > 0.01 and maps.max() < 1
    threshold = float(np.quantile(maps, 0.6))
    found = load_detector(tmp_path / "clipseg", CPU, threshold).ground(WINDOW, PHRASES)
    d = found.detections
    for i, scores in enumerate(maps):
        objects = regionprops(label(scores >= threshold, connectivity=2), intensity_image=scores)
        mine = d.phrase == i
        assert found.accounts[i].found == len(objects) == mine.sum()
        expected_rows = sorted((*np.subtract(o.bbox, 0.5), o.intensity_mean) for o in objects)
        got = sorted(zip(*d.start[mine].T, *d.stop[mine].T, d.score[mine], strict=True))
        np.testing.assert_allclose(np.array(got), np.array(expected_rows), atol=1e-5)
        for y, x in d.point[mine].astype(int):
            assert scores[y, x] >= threshold
    nothing = load_detector(tmp_path / "clipseg", CPU, 1.0).ground(WINDOW, ["lake"])
    assert nothing.accounts[0].outcome is Outcome.absent
    assert nothing.accounts[0].best == pytest.approx(float(maps[0].max()))


def test_folders_that_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "dino"
    save(folder, dino, "GroundingDino")
    config, good = folder / "config.json", json.loads((folder / "config.json").read_text())

    def refused(match: str) -> None:
        with pytest.raises(RequestError, match=match):
            load_detector(folder, CPU)

    config.write_text(json.dumps({**good, "model_type": "detr"}))
    refused("model_type is 'detr'; valid for text: grounding-dino")
    config.write_text(json.dumps({**good, "backbone_config": None, "backbone": "resnet50"}))
    refused("backbone_config: found 'resnet50'")
    config.write_text(json.dumps({**good, "auto_map": {"AutoModel": "evil.Model"}}))
    load_detector(folder, CPU)
    config.write_text("{")
    refused("not readable as JSON")
    config.write_text(json.dumps(good))
    tensors = load_file(folder / "model.safetensors")
    name = min(n for n in tensors if n.endswith("weight"))
    save_file({n: t for n, t in tensors.items() if n != name}, folder / "model.safetensors", {"format": "pt"})
    refused(f"missing keys: {name}")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "processor_config.json").unlink()
    refused("no processor")
    for file in ("tokenizer.json", "vocab.txt"):
        (folder / file).unlink()
    refused("found no tokenizer.json; valid: it, or vocab.txt")


@pytest.mark.parametrize("make", [dino, owl])
def test_what_is_fetched_of_a_published_folder_is_enough(tmp_path: Path, make: Any) -> None:
    """As the hub has them: a preprocessor_config.json, and words without tokenizer.json."""
    folder, fetched = tmp_path / "hub", tmp_path / "cache"
    _, processor = save(folder, make, *(["GroundingDino"] if make is dino else []))
    expected = load_detector(folder, CPU, 0.0).ground(WINDOW, PHRASES).detections
    processor.image_processor.save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer.json"):
        (folder / name).unlink()
    assert (folder / "preprocessor_config.json").is_file()
    fetched.mkdir()
    for file in folder.iterdir():
        if any(fnmatch(file.name, pattern) for pattern in BUILT_IN.transformers.folder.files):
            shutil.copy(file, fetched)
    found = load_detector(fetched, CPU, 0.0).ground(WINDOW, PHRASES).detections
    assert len(found) == len(expected) > 0
    np.testing.assert_array_equal(found.start, expected.start)
