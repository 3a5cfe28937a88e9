"""A detector over a scene: what its windows find is merged, kept, and asked of the promptable model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks.detector_files import clip, owl, save
from segpipe.config.job import Job
from segpipe.errors import RequestError, StoppedError
from segpipe.prompts.build_objects import build_objects
from segpipe.prompts.collect_prompts import collect_prompts
from segpipe.prompts.grounding.clip import OTHER, label_masks
from segpipe.prompts.grounding.detect_scene import DetectorScene, detect_windows
from segpipe.prompts.grounding.detectors import load_detector
from segpipe.prompts.grounding.merge_boxes import merge_detections, to_scene
from segpipe.prompts.masks.automatic import merge_grid_masks
from segpipe.prompts.prompt_scene import PromptScene, prepare_prompts
from segpipe.prompts.segment_scene import (
    create_mask_stages,
    next_round,
    read_grid_masks,
    segment_windows,
)
from segpipe.runs.check import check_request
from segpipe.store.stop import StopToken
from segpipe.tiling.pyramid import Window
from tests.prompts.prompt_world import make_card, make_job, pixels

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


def windowed(window: Window, scene: DetectorScene) -> np.ndarray:
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
    assert isinstance(looking, DetectorScene)
    looking.create()
    windows = looking.windows()
    assert {w.level for w in windows} == {0, 1}
    assert detect_windows(looking, windows[::-1]) == len(windows)
    prompts = collect_prompts(scene)
    network = load_detector(detector.parent / "owl", torch.device("cpu"), 0.0)
    parts = [
        to_scene(network.ground(windowed(w, looking), PHRASES).detections, w, looking.pyramid)
        for w in windows
    ]
    expected = merge_detections(parts, looking.pyramid, len(PHRASES))
    assert len(prompts) == len(expected) > 10
    np.testing.assert_allclose(prompts.boxes.start, expected.detections.start, atol=1e-3)
    np.testing.assert_allclose(prompts.score, expected.detections.score, atol=1e-5)
    assert [*prompts.phrases] == [PHRASES[k] for k in expected.detections.phrase]
    found = {row["phrase"]: row for row in prompts.accounts}
    assert sum(row["found"] for row in found.values()) == len(expected) + sum(len(a) for a in expected.also)


def test_what_is_looked_at_is_not_looked_at_again(card: Path, detector: Path, tmp_path: Path) -> None:
    scene = prepared(tmp_path, card, detector)
    looking = scene.grounder
    assert isinstance(looking, DetectorScene)
    looking.create()
    windows = looking.windows()
    detect_windows(looking, windows[:3])
    StopToken(scene.job.outputs.dir, "run").request()
    with pytest.raises(StoppedError):
        detect_windows(looking, windows[3:], StopToken(scene.job.outputs.dir, "run"))
    assert looking.pending() == windows[3:]
    other = prepared(tmp_path, card, detector, threshold=0.1)
    assert isinstance(other.grounder, DetectorScene)
    assert other.grounder.stage.key != looking.stage.key


def test_what_is_wrong_is_said_before_work(card: Path, detector: Path, tmp_path: Path) -> None:
    boxes = [(4, 4, 20, 20)]
    job = make_job(tmp_path, card, SHAPE, boxes, path="", crs="", text=["lake"], grounder=str(card))
    with pytest.raises(
        RequestError, match=r"prompts\.grounder: 'tiny' is a prompted model; valid: a semantic"
    ):
        check_request(job)
    alone = Job.model_validate({**job.model_dump(), "prompts": {}})
    with pytest.raises(RequestError, match=r"prompts: 'tiny' answers prompts: give it"):
        check_request(alone)
    finder = Job.model_validate({**alone.model_dump(), "model": str(detector)})
    with pytest.raises(
        RequestError, match=r"model: 'owl' finds boxes of phrases: give it as `prompts\.grounder`"
    ):
        check_request(finder)
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
    with pytest.raises(RequestError, match=r"scene: bands: the scene has no nir; it has red, green, blue"):
        check_request(bands)


def test_masks_of_a_grid_are_named_by_clip(card: Path, tmp_path: Path) -> None:
    """What each mask is called is what the library's own CLIP says of its picture."""
    network, processor = save(tmp_path / "clip", clip)
    labeller = tmp_path / "clip.yaml"
    steps = [{"op": "divide", "value": [255.0]}]
    labeller.write_text(
        yaml.safe_dump(
            {
                "name": "clip",
                "kind": "raster",
                "provider": "transformers",
                "weights": "clip",
                "output": {"kind": "names"},
                "input": {"bands": ["red", "green", "blue"], "normalisation": steps},
                "window": {"size": [32], "fixed": True},
            }
        )
    )
    asked = {"text": list(PHRASES), "labeller": str(labeller), "everything": True, "threshold": 0.0}
    grid = {"points": 16, "iou": 0.0, "stability": 0.0, "overlap": 1.0}
    job = make_job(tmp_path / "job", card, (64, 64), [], path="", crs="", grid=grid, **asked)
    request = check_request(job)
    scene = prepare_prompts(job, request.scenes[0], request.settings)
    collect_prompts(scene)
    create_mask_stages(scene)
    here = next_round(scene, 0)
    assert here is not None
    segment_windows(scene, 0, here.windows)
    masks, _ = merge_grid_masks(read_grid_masks(scene), scene.options.grid.overlap)
    assert len(masks) > 1
    assert scene.labeller is not None
    names, sure, accounts = label_masks(scene.labeller, masks.patches)
    words = [f"{of} {p}." for p in (*PHRASES, OTHER) for of in ("a satellite photo of", "an aerial photo of")]
    image = np.pad(pixels((64, 64)) / np.float32(255), ((0, 0), (99, 99), (99, 99)), constant_values=0.5)
    for patch, name, probability in zip(masks.patches, names, sure, strict=True):
        y, x = np.nonzero(patch.logits > 0)
        low = [int(v.min()) + o for v, o in zip((y, x), patch.origin, strict=True)]
        high = [int(v.max()) + 1 + o for v, o in zip((y, x), patch.origin, strict=True)]
        longest = max(b - a for a, b in zip(low, high, strict=True))
        edge = longest + 2 * int(np.ceil(0.25 * longest))
        start = [(a + b - edge) // 2 for a, b in zip(low, high, strict=True)]
        rows, columns = (slice(s + 99, s + 99 + edge) for s in start)
        crop = image[:, rows, columns].copy()
        shown = {"images": [torch.from_numpy(crop)], "do_rescale": False, "return_tensors": "pt"}
        batch = processor(text=words, padding=True, **shown)
        with torch.inference_mode():
            out = network(**batch)
            text = out.text_embeds.reshape(len(PHRASES) + 1, 2, -1).mean(1)
            text = text / text.norm(dim=1, keepdim=True)
            logits = out.image_embeds @ text.T * network.logit_scale.exp()
        expected = logits[0].softmax(0).numpy()
        assert probability == pytest.approx(expected.max(), abs=1e-3)
        assert name == [*PHRASES, ""][int(expected.argmax())]
    assert sum(a.found for a in accounts) == sum(bool(n) for n in names)
    build_objects(scene)
    rows = {row["phrase"] for row in scene.account().asked}
    assert rows == set(PHRASES)
