"""A detector over a scene: what its windows find is merged, kept, and asked of the promptable model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks.detector_files import owl, save
from segpipe.config import Job
from segpipe.errors import RequestError, SceneError, StoppedError
from segpipe.prompts.asking import settle
from segpipe.prompts.detecting import Detecting, detect_windows
from segpipe.prompts.detection import merge_detections, place
from segpipe.prompts.detectors import load_detector
from segpipe.prompts.pyramid import Window
from segpipe.prompts.scene import PromptScene, prepare_prompts
from segpipe.request import check_request
from segpipe.store import request_stop
from tests.prompts.asked_world import make_card, make_job, pixels

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (90, 150)
PHRASES = ("lake", "dock")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_card(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The card of a tiny OWLv2 whose scores are far from its threshold."""
    folder = tmp_path_factory.mktemp("detector")
    save(folder / "owl", owl)
    path = folder / "owl.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "owl",
                "kind": "raster",
                "provider": "transformers",
                "weights": "owl",
                "output": {"kind": "boxes"},
                "input": {
                    "bands": ["red", "green", "blue"],
                    "normalisation": [{"op": "divide", "value": [255.0]}],
                },
                "window": {"size": [64], "fixed": True},
            }
        )
    )
    return path


def prepared(folder: Path, card: Path, detector: Path, **prompts: Any) -> PromptScene:
    words = {"text": list(PHRASES), "grounder": str(detector), "threshold": 0.0, "scales": 2}
    job = make_job(folder, card, SHAPE, [], path="", crs="", **{**words, **prompts})
    request = check_request(job)
    return prepare_prompts(job, request.scenes[0], request.settings)


def windowed(window: Window, scene: Detecting) -> np.ndarray:
    """A window cut and averaged by hand: zeros beyond the scene."""
    step, box = 1 << window.level, scene.pyramid.box(window)
    whole = np.zeros((3, *(max(n, e) for n, e in zip(SHAPE, box.stop, strict=True))))
    whole[:, : SHAPE[0], : SHAPE[1]] = pixels(SHAPE) / 255.0
    weight = np.zeros(whole.shape[1:])
    weight[: SHAPE[0], : SHAPE[1]] = 1
    part, share = whole[(slice(None), *box.slices)], weight[box.slices]
    sums = part.reshape(3, 64, step, 64, step).sum((2, 4))
    return np.asarray(sums / np.maximum(share.reshape(64, step, 64, step).sum((1, 3)), 1), np.float32)


def test_boxes_are_those_of_the_windows_merged(card: Path, detector: Path, tmp_path: Path) -> None:
    scene = prepared(tmp_path, card, detector)
    looking = scene.grounder
    assert isinstance(looking, Detecting)
    looking.create()
    windows = looking.windows()
    assert {w.level for w in windows} == {0, 1}
    assert detect_windows(looking, windows[::-1], "run") == len(windows)
    asked = settle(scene)
    network = load_detector(detector.parent / "owl", torch.device("cpu"), 0.0)
    parts = [
        place(network.ground(windowed(w, looking), PHRASES).detections, w, looking.pyramid) for w in windows
    ]
    expected = merge_detections(parts, looking.pyramid, len(PHRASES))
    assert len(asked) == len(expected) > 10
    np.testing.assert_allclose(asked.prompts.boxes.start, expected.detections.start, atol=1e-3)
    np.testing.assert_allclose(asked.score, expected.detections.score, atol=1e-5)
    assert [*asked.prompts.phrases] == [PHRASES[k] for k in expected.detections.phrase]
    found = {row["phrase"]: row for row in asked.phrases}
    assert sum(row["found"] for row in found.values()) == len(expected) + sum(len(a) for a in expected.also)


def test_what_is_looked_at_is_not_looked_at_again(card: Path, detector: Path, tmp_path: Path) -> None:
    scene = prepared(tmp_path, card, detector)
    looking = scene.grounder
    assert isinstance(looking, Detecting)
    looking.create()
    windows = looking.windows()
    detect_windows(looking, windows[:3], "run")
    request_stop(scene.job.outputs.dir, "run")
    with pytest.raises(StoppedError):
        detect_windows(looking, windows[3:], "run")
    assert looking.pending() == windows[3:]
    other = prepared(tmp_path, card, detector, threshold=0.1)
    assert isinstance(other.grounder, Detecting)
    assert other.grounder.stage.key != looking.stage.key


def test_what_is_wrong_is_said_before_work(card: Path, detector: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, card, SHAPE, [], path="", crs="", text=["lake"], grounder=str(card))
    with pytest.raises(
        RequestError, match=r"prompts\.grounder: 'tiny' is a prompted model; valid: a semantic"
    ):
        check_request(job)
    alone = Job.model_validate({**job.model_dump(), "prompts": {}})
    with pytest.raises(RequestError, match=r"prompts: 'tiny' answers prompts: give it"):
        check_request(alone)
    boxes = Job.model_validate({**alone.model_dump(), "model": str(detector)})
    with pytest.raises(
        RequestError, match=r"model: 'owl' finds boxes of phrases: give it as `prompts\.grounder`"
    ):
        check_request(boxes)
    with pytest.raises(RequestError, match=r"model: 'owl' is a boxes model, which takes no prompts"):
        check_request(Job.model_validate({**job.model_dump(), "model": str(detector)}))
    for field, value in (
        ("tiling", {"window": 512}),
        ("compute", {"tta": "flips"}),
        ("outputs", {"scores": True}),
    ):
        wrong = Job.model_validate(
            {
                **job.model_dump(),
                "prompts": {"path": str(tmp_path / "boxes.csv"), "crs": "scene"},
                field: value,
            }
        )
        with pytest.raises(RequestError, match=rf"{field}\..*: a promptable model has no use for it"):
            check_request(wrong)
    nowhere = Job.model_validate({**job.model_dump(), "prompts": {"path": "nowhere.csv"}})
    with pytest.raises(RequestError, match=r"prompts\.path: nowhere\.csv does not exist"):
        check_request(nowhere)
    bands = Job.model_validate(
        {
            **job.model_dump(),
            "prompts": {
                "path": str(tmp_path / "boxes.csv"),
                "crs": "scene",
                "bands": ["nir", "red", "green"],
            },
        }
    )
    request = check_request(bands)
    with pytest.raises(SceneError, match=r"bands: the scene has no nir; it has red, green, blue"):
        prepare_prompts(bands, request.scenes[0], request.settings)
