"""A scene is asked from end to end, without a flow: masks are the library's, embeddings are made once."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from segpipe.config.job import Job
from segpipe.errors import SceneError, StoppedError
from segpipe.geometry.box import Box
from segpipe.objects.table import FACTS, ObjectTable
from segpipe.prompts.build_objects import build_objects
from segpipe.prompts.inputs.prompt_files import read_prompts
from segpipe.prompts.masks.embeddings import prune, window_id
from segpipe.prompts.masks.patches import patch_cover
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.segment_scene import next_round, segment_volume, segment_windows, segmenter_of
from segpipe.prompts.segmenters.base import Embedding
from segpipe.prompts.volumes.propagate import SliceMask, propagate
from segpipe.prompts.volumes.propagate_prompts import Linker
from segpipe.store.stop import StopToken
from segpipe.tiling.pyramid import Window
from tests.prompts.prompt_world import EDGE, make_card, make_job, pixels, planned
from tests.prompts.tiny_sams import tiny

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_card(tmp_path_factory.mktemp("card"))


def answer(scene: PromptScene, backwards: bool = False, run: str = "run") -> int:
    """All rounds; how many windows were encoded."""
    number, passes = 0, 0.0
    while (here := next_round(scene, number)) is not None:
        windows = here.windows[::-1] if backwards else here.windows
        for part in [[w] for w in windows] if backwards else [windows]:
            passes += segment_windows(scene, number, part).timings["encoder passes"]
        number += 1
    return int(passes)


def results(scene: PromptScene) -> tuple[np.ndarray, np.ndarray, bytes]:
    build_objects(scene)
    whole = Box.whole(scene.geometry.shape).slices
    arrays = (np.asarray(scene.labels.array(name)[whole]) for name in ("labels", "instances"))
    labels, ids = arrays
    return labels, ids, scene.labels.read_part(FACTS)


BOXES = [(4, 6, 30, 40), (33.5, 8, 60, 30), (10, 41, 50, 63)]


def test_masks_of_one_window_are_the_librarys_own(card: Path, tmp_path: Path) -> None:
    scene = planned(make_job(tmp_path, card, (EDGE, EDGE), BOXES))
    assert answer(scene) == 1
    labels, ids, _ = results(scene)
    network = tiny("sam")
    image = torch.from_numpy(pixels((EDGE, EDGE)).astype(np.float32) / np.float32(255))
    with torch.inference_mode():
        embedding = network.get_image_embeddings(image[None]).half().float()
        # their corners are centres of elements, ours outer edges
        boxes = torch.tensor([[[x0, y0, x1 - 1, y1 - 1] for x0, y0, x1, y1 in BOXES]], dtype=torch.float32)
        out = network(image_embeddings=embedding, input_boxes=boxes, multimask_output=True)
    large = torch.nn.functional.interpolate(out.pred_masks[0], (EDGE, EDGE), mode="bilinear")
    best = out.iou_scores[0].sort(dim=1).values
    assert float((best[:, -1] - best[:, -2]).min()) > 1e-4
    logits = [large[i, int(out.iou_scores[0, i].argmax())].numpy() for i in range(len(BOXES))]
    masks = [of_one > 0 for of_one in logits]
    # Where a logit is 0 but for rounding (boxes go one by one here, and embeddings in float16).
    clear = np.all([np.abs(of_one) > 1e-3 * np.abs(of_one).max() for of_one in logits], axis=0)
    assert clear.mean() > 0.98
    expected = np.zeros((EDGE, EDGE), int)
    for i in sorted(range(len(BOXES)), key=lambda i: -masks[i].sum()):  # smaller ones in front
        expected[masks[i]] = i + 1
    seen = [i for i in range(1, len(BOXES) + 1) if (expected == i).any()]
    assert len(np.unique(ids[ids > 0])) == len(seen)
    for number in np.unique(ids[ids > 0]):
        [theirs] = np.unique(expected[(ids == number) & clear])
        np.testing.assert_array_equal((ids == number)[clear], (expected == theirs)[clear])
    np.testing.assert_array_equal((labels > 0)[clear], (expected > 0)[clear])
    assert scene.classes[1].name == "field"


def test_neither_batches_nor_their_order_change_a_bit(card: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    corners = rng.uniform(0, 150, (30, 2))
    boxes = [
        (x, y, x + w, y + h) for (x, y), (w, h) in zip(corners, rng.uniform(3, 45, (30, 2)), strict=True)
    ]
    one = planned(make_job(tmp_path / "one", card, (170, 210), boxes))
    # as it travels to a worker elsewhere
    other = pickle.loads(pickle.dumps(planned(make_job(tmp_path / "other", card, (170, 210), boxes))))
    passes = answer(one)
    assert passes == answer(other, backwards=True) > 3
    for mine, theirs in zip(results(one)[:2], results(other)[:2], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_block_shapes_change_no_id(card: Path, tmp_path: Path) -> None:
    found = []
    for block in ("auto", "64", "37x101"):
        job = make_job(
            tmp_path / block, card, (170, 210), [(5, 5, 60, 50), (40, 30, 120, 90), (150, 99, 199, 160)]
        )
        scene = planned(Job.model_validate({**job.model_dump(), "tiling": {"block": block}}))
        answer(scene)
        found.append(results(scene))
    for labels, ids, facts in found[1:]:
        np.testing.assert_array_equal(labels, found[0][0])
        np.testing.assert_array_equal(ids, found[0][1])
        assert facts == found[0][2]


def test_a_second_question_encodes_nothing_and_is_answered_as_if_it_were_the_first(
    card: Path, tmp_path: Path
) -> None:
    shape = (130, 130)
    first = planned(make_job(tmp_path / "twice", card, shape, [(5, 5, 30, 30), (70, 80, 100, 110)]))
    assert answer(first) > 0
    question = [(6, 4, 28, 33), (66, 78, 98, 112), (72, 84, 90, 100)]
    second = planned(make_job(tmp_path / "twice", card, shape, question))
    assert second.masks.key != first.masks.key
    assert second.embeddings.stage.key == first.embeddings.stage.key
    alone = planned(make_job(tmp_path / "alone", card, shape, question))
    answer(alone)
    kept = first.embeddings.stage.done()
    passes = answer(second)
    asked = {window_id(w) for w in map_windows(second)}
    assert passes == len(asked - kept)
    for mine, theirs in zip(results(second)[:2], results(alone)[:2], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def map_windows(scene: PromptScene) -> set[Any]:
    """All windows of all rounds."""
    found: set[Any] = set()
    number = 0
    from segpipe.prompts.segment_scene import _by_window

    while next_round(scene, number) is not None:
        found |= set(_by_window(scene, scene.prompt_set, number))
        number += 1
    return found


def test_a_stop_keeps_what_is_encoded_and_the_rest_goes_on(card: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path, card, (300, 300), [(x, 20, x + 20, 40) for x in range(5, 270, 40)])
    scene = planned(job)
    here = next_round(scene, 0)
    assert here is not None and len(here.windows) > 3
    segment_windows(scene, 0, here.windows[:2])
    StopToken(job.outputs.dir, "run").request()
    with pytest.raises(StoppedError, match="resume"):
        segment_windows(scene, 0, here.windows[2:], StopToken(job.outputs.dir, "run"))
    assert len(scene.embeddings.stage.done()) == 2
    left = next_round(scene, 0)
    assert left is not None and left.windows == here.windows[2:]
    passes = answer(scene, run="again")
    assert passes == len(scene.embeddings.stage.done()) - 2


def test_every_object_has_its_row(card: Path, tmp_path: Path) -> None:
    scene = planned(make_job(tmp_path, card, (EDGE, EDGE), BOXES, choice="large"))
    answer(scene)
    build_objects(scene)
    facts = pd.read_parquet(io.BytesIO(scene.labels.read_part(FACTS)))
    table = ObjectTable.load(scene.labels)
    assert facts["id"].tolist() == table.objects.ids.tolist()
    assert set(facts["source"]) == {"drawn"}
    assert facts["candidate"].between(1, 3).all()
    chosen = facts[[f"iou_{k}" for k in (1, 2, 3)]].to_numpy()[np.arange(len(facts)), facts["candidate"] - 1]
    np.testing.assert_allclose(chosen, facts["predicted_iou"])
    assert facts["chosen"].str.startswith("large by elements").all()
    assert any("3 of 3 prompts are used" in line for line in scene.account().prompts)
    assert len(segmenter_of(scene).window) == 2


def test_embeddings_beyond_the_budget_are_refused_before_any_work(card: Path, tmp_path: Path) -> None:
    job = make_job(
        tmp_path,
        card,
        (400, 400),
        [(x, y, x + 9, y + 9) for x in range(2, 380, 30) for y in range(2, 380, 30)],
        cache="0.01MiB",
    )
    scene = planned(job)
    with pytest.raises(SceneError, match=r"prompts\.cache: .* windows take"):
        next_round(scene, 0)


def test_the_embeddings_not_used_for_longest_go_first(card: Path, tmp_path: Path) -> None:
    scenes = []
    for name in ("a", "b", "c"):
        job = make_job(tmp_path / name, card, (EDGE, EDGE), BOXES)
        moved = Job.model_validate({**job.model_dump(), "outputs": {"dir": str(tmp_path / "runs")}})
        scene = planned(moved)
        answer(scene)
        scene.embeddings.touch()
        scenes.append(scene)
    a, b, c = (s.embeddings.stage for s in scenes)
    each = scenes[0].embeddings.window_bytes
    a_used = a.read_json("used.json")
    assert a_used["bytes"] == each
    assert prune(str(tmp_path / "runs"), c.key, 3 * each) == []
    assert prune(str(tmp_path / "runs"), a.key, each) == [b.key, c.key]
    assert a.exists and not b.exists and not c.exists


def test_a_box_on_one_slice_becomes_a_solid(tmp_path: Path) -> None:
    """Mechanics with random weights: the slices are those that direct linking gives."""
    folder = tmp_path / "card"
    folder.mkdir()
    card = make_card(folder)
    data = yaml.safe_load(card.read_text())
    steps = [{"op": "divide", "value": [255.0]}]
    data |= {
        "kind": "volume",
        "input": {"normalisation": steps},
        "window": {"size": [1, EDGE, EDGE], "fixed": True},
    }
    card.write_text(yaml.safe_dump(data))
    voxels = np.random.default_rng(5).integers(0, 255, (9, 50, 60)).astype(np.float32)
    nib.save(nib.Nifti1Image(voxels.T, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / "scan.nii.gz")
    (tmp_path / "box.csv").write_text("i_min,i_max,j_min,j_max,k,phrase\n10,30,8,28,4,organ\n")
    job = Job.model_validate(
        {
            "name": "ask",
            "scenes": [str(tmp_path / "scan.nii.gz")],
            "model": str(card),
            "prompts": {
                "path": str(tmp_path / "box.csv"),
                "volume": {"least_iou": 0, "least_overlap": 0, "change": 1000.0},
            },
            "compute": {"device": "cpu", "threads": 1},
            "outputs": {"dir": str(tmp_path / "runs")},
        }
    )
    scene = planned(job)
    assert scene.planes.axis == 0
    done = segment_volume(scene)
    _, ids, _ = results(scene)
    prompts, _ = read_prompts(tmp_path / "box.csv", scene.geometry)
    segmenter = segmenter_of(scene)

    def embed(index: int, window: Window) -> Embedding:
        padded = np.zeros((1, EDGE, EDGE), np.float32)
        padded[0, :50, :60] = voxels[index] / np.float32(255)
        return segmenter.encode(padded).half()

    linker = Linker(0, scene.pyramid, segmenter, embed, job.prompts.choice)
    expected = np.zeros(voxels.shape, bool)
    for item in propagate(prompts, 0, voxels.shape, scene.pyramid, linker, job.prompts.volume):
        if isinstance(item, SliceMask) and item.mask.patch is not None:
            expected |= patch_cover(item.mask.patch, Box.whole(voxels.shape))
    assert expected.any(axis=(1, 2)).sum() > 1
    np.testing.assert_array_equal(ids > 0, expected)
    assert done.timings["encoder passes"] == len(scene.embeddings.stage.done())
    assert segment_volume(scene).computed == 0
    other = planned(
        Job.model_validate({**job.model_dump(), "prompts": {**job.prompts.model_dump(), "choice": "large"}})
    )
    assert segment_volume(other).timings["encoder passes"] == 0
