"""What lies in the store is believed only while it is true: drops, changed inputs, keys."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from segpipe.config.card import read_card
from segpipe.config.job import Job
from segpipe.errors import RequestError, SceneError
from segpipe.export.scene_files import previews_name
from segpipe.geometry.box import Box
from segpipe.pipeline.model_scene import Scene, pending_blocks
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.runs.check import check_request
from segpipe.sources import SceneRef
from segpipe.store.stage import Stage
from tests.inference.lab import (
    CENTRED,
    CLASSES,
    Lab,
    Pyramid,
    labels_of,
    patches,
    predict,
    prepared,
    scores_of,
)

SHAPE = (80, 72)
TILING = {"window": 32, "halo": 8, "block": 16}
COUNT = 20
"""Blocks of a scene of that shape, cut so; the last 8 columns join the blocks before them."""
INPUT = {"bands": ["b0"], "normalisation": CENTRED}
OTHER_INPUT = {"bands": ["b0"], "normalisation": [{"op": "scale", "factor": 0.02, "offset": -2.0}]}


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def ref(lab: Lab) -> SceneRef:
    """Data with a hole of nodata."""
    return lab.raster(pixels(), nodata=0)


def job_of(lab: Lab, ref: SceneRef, card: str, out: str = "out", scores: bool = False, **tiling: Any) -> Job:
    """One thread: others may be using the cores."""
    return lab.job(ref, card, out, scores, tiling={**TILING, **tiling}, compute={"threads": 1})


def pixels() -> np.ndarray:
    values = patches(SHAPE)
    values[0, 40:60, :30] = 0
    return values


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """Labels and scores of the scene, predicted with nobody else around."""
    lab = Lab(tmp_path_factory.mktemp("alone"))
    ref = lab.raster(pixels(), nodata=0)
    scene = prepared(job_of(lab, ref, lab.card(2, input=INPUT), "out", scores=True), ref)
    predict(scene)
    labels = labels_of(scene)
    assert set(np.unique(labels)) == {c["value"] for c in CLASSES} | {255}
    np.testing.assert_array_equal(labels == 255, pixels()[0] == 0)
    return labels, scores_of(scene)


# -- one ingest, two jobs -------------------------------------------------------------------------


@pytest.mark.parametrize("ingested", [True, False], ids=["ingested", "writing-through"])
@pytest.mark.parametrize("again", [False, True], ids=["dropped", "dropped-and-made-again"])
def test_a_job_survives_that_another_drops_their_common_ingest(
    lab: Lab, ref: SceneRef, undisturbed: tuple[np.ndarray, np.ndarray], ingested: bool, again: bool
) -> None:
    other = prepared(job_of(lab, ref, lab.card(2, input=OTHER_INPUT), "shared"), ref)
    if ingested:
        predict(other)
    card = lab.card(2, input=INPUT)
    scene = prepared(job_of(lab, ref, card, "shared"), ref)
    assert scene.ingest == other.ingest
    assert scene.predict != other.predict
    blocks = pending_blocks(scene)
    assert len(blocks) == COUNT
    finished = []

    def progress(n: int) -> None:
        finished.append(n)
        if n == len(blocks) // 4:
            other.ingest.drop()
            assert not scene.ingest.exists
            if again:  # by a third job, whose blocks are others
                prepared(job_of(lab, ref, card, "shared", halo=4, block=32), ref)
                assert scene.ingest.exists
                assert not scene.ingest.current

    predict_blocks(scene, blocks, progress=progress)
    finish_labels(scene)
    assert finished == list(range(1, len(blocks) + 1))
    np.testing.assert_array_equal(labels_of(scene), undisturbed[0])


@pytest.mark.parametrize("state", ["dropped", "half-dropped", "made-again"])
def test_a_reader_at_work_turns_to_the_source(lab: Lab, ref: SceneRef, state: str) -> None:
    scene = prepared(job_of(lab, ref, lab.card(2, input=INPUT)), ref)
    predict(scene)
    first = next(scene.plan.blocks.indices())
    whole, part = Box.whole(SHAPE), scene.plan.blocks.box(first)
    with scene.open_blocks() as store:
        before = store.read(whole)
        if state == "half-dropped":  # the record goes first, then the shards: they read as fill
            folder = Path(scene.ingest.out) / ".store" / scene.ingest.key
            (folder / "stage.json").unlink()
            for shard in folder.glob("*/*/c/**/*"):
                if shard.is_file():
                    shard.unlink()
        else:
            Stage(scene.ingest.out, scene.ingest.key).drop()
        if state == "made-again":
            prepared(job_of(lab, ref, lab.card(2, input=OTHER_INPUT)), ref)
        after = store.read(whole)
        store.ingest(first, part, store.read(part))
    for found in (before, after):
        np.testing.assert_array_equal(found.values, pixels())
        np.testing.assert_array_equal(found.valid, pixels()[0] != 0)
    fresh = Stage(scene.ingest.out, scene.ingest.key)
    assert fresh.exists == (state == "made-again")
    assert fresh.done() == set()


@pytest.mark.parametrize("again", [False, True], ids=["dropped", "dropped-and-made-again"])
def test_a_batch_that_begins_after_the_drop_reads_the_source(
    lab: Lab, ref: SceneRef, undisturbed: tuple[np.ndarray, np.ndarray], again: bool
) -> None:
    """The same with the drop between two batches, and with handles that travelled to another worker."""
    job = job_of(lab, ref, lab.card(2, input=INPUT), "shared")
    scene = prepared(job, ref)
    blocks = pending_blocks(scene)
    predict_blocks(scene, blocks[:7])
    Stage(scene.ingest.out, scene.ingest.key).drop()
    if again:
        prepared(job_of(lab, ref, lab.card(2, input=OTHER_INPUT), "shared"), ref)
    predict_blocks(scene, blocks[7:14])
    fresh = replace(scene, ingest=Stage(scene.ingest.out, scene.ingest.key))
    predict_blocks(fresh, blocks[14:])
    finish_labels(scene)
    np.testing.assert_array_equal(labels_of(scene), undisturbed[0])


def test_predictions_dropped_by_another_run_are_an_error_that_says_so(
    lab: Lab, ref: SceneRef, undisturbed: tuple[np.ndarray, np.ndarray]
) -> None:
    job = job_of(lab, ref, lab.card(2, input=INPUT), "shared")
    scene = prepared(job, ref)
    blocks = pending_blocks(scene)

    def progress(n: int) -> None:
        if n == 4:
            Stage(scene.predict.out, scene.predict.key).drop()

    with pytest.raises(SceneError, match=r"predict-\w+ was dropped by another run; run the job again"):
        predict_blocks(scene, blocks, progress=progress)
    with pytest.raises(SceneError, match="was dropped by another run"):
        finish_labels(scene)
    resumed = prepared(job, ref)
    assert pending_blocks(resumed) == blocks
    predict(resumed)
    np.testing.assert_array_equal(labels_of(resumed), undisturbed[0])


@pytest.mark.parametrize("before", [16, 32])
def test_receipts_of_other_blocks_are_not_taken_for_ones_own(lab: Lab, ref: SceneRef, before: int) -> None:
    """A worker's handles are new: it finds the stage made again by a job with other blocks."""
    card = lab.card(2, input=INPUT)
    sizes = (before, 48 - before)
    jobs = [job_of(lab, ref, card, "shared", block=size) for size in sizes]
    scene = prepared(jobs[0], ref)
    travelled = pickle.dumps(scene)
    scene.predict.drop()
    other = prepared(jobs[1], ref)
    assert other.predict == scene.predict
    late = pickle.loads(travelled)
    with pytest.raises(SceneError, match="made again with other blocks; run the job again"):
        predict_blocks(late, list(late.plan.blocks.indices())[:3])
    assert Stage(other.predict.out, other.predict.key).receipts() == {}
    predict_blocks(other, pending_blocks(other))
    with pytest.raises(SceneError, match="made again with other blocks; run the job again"):
        finish_labels(pickle.loads(travelled))


def test_labels_are_not_finished_while_a_block_is_missing(lab: Lab, ref: SceneRef) -> None:
    scene = prepared(job_of(lab, ref, lab.card(2, input=INPUT)), ref)
    predict_blocks(scene, pending_blocks(scene)[1:])
    with pytest.raises(SceneError, match="1 blocks have no prediction"):
        finish_labels(scene)
    assert len(scene.predict.receipts()) == COUNT - 1


# -- scores asked for later -----------------------------------------------------------------------


def test_scores_asked_for_later_are_computed_also_by_a_retry(
    lab: Lab, ref: SceneRef, undisturbed: tuple[np.ndarray, np.ndarray]
) -> None:
    card = lab.card(2, input=INPUT)
    predict(prepared(job_of(lab, ref, card), ref))
    scene = prepared(job_of(lab, ref, card, scores=True), ref)
    blocks = pending_blocks(scene)
    assert len(blocks) == scene.plan.blocks.count == COUNT
    with pytest.raises(SceneError, match=f"{COUNT} blocks have no prediction"):
        finish_labels(scene)
    first = predict_blocks(scene, blocks[:10])
    second = predict_blocks(scene, blocks, attempt=2)
    assert (first.computed, second.computed, second.reused) == (10, COUNT - 10, 10)
    assert pending_blocks(scene) == []
    finish_labels(scene)
    np.testing.assert_array_equal(labels_of(scene), undisturbed[0])
    np.testing.assert_array_equal(scores_of(scene), undisturbed[1])
    valid = labels_of(scene) != 255
    np.testing.assert_allclose(scores_of(scene).sum(0)[valid], 1, atol=1e-5)
    assert {r["scores"] for r in scene.predict.receipts().values()} == {True}


# -- inputs that change between planning and computing --------------------------------------------


def assert_nothing_committed(scene: Scene) -> None:
    stage = Stage(scene.predict.out, scene.predict.key)
    assert stage.exists
    assert stage.receipts() == {}
    assert (np.asarray(stage.array("labels")[...]) == 255).all()


@pytest.mark.parametrize("store", ["zarr", "direct"])
def test_a_source_that_changes_after_planning_is_an_error(lab: Lab, ref: SceneRef, store: str) -> None:
    job = job_of(lab, ref, lab.card(2, input=INPUT), store=store)
    scene = prepared(job, ref)
    lab.raster(patches(SHAPE, 5), nodata=0, path=ref.uri)
    with pytest.raises(SceneError, match=r"scene-\d+\.tif: changed since it was planned; run the job again"):
        predict_blocks(scene, pending_blocks(scene))
    assert_nothing_committed(scene)
    again = prepared(job, ref)
    assert again.predict.key != scene.predict.key
    predict(again)
    assert (labels_of(again) != 255).all()


def test_weights_that_change_after_planning_are_an_error(lab: Lab, ref: SceneRef) -> None:
    job = job_of(lab, ref, lab.card(2, input=INPUT))
    scene = prepared(job, ref)
    module = Pyramid(2, 1, len(CLASSES)).eval()
    with torch.no_grad():
        module.last.bias += 1
    torch.jit.script(module).save(str(lab.folder / "pyramid2d1.pt"))
    with pytest.raises(SceneError, match="other bits than were planned"):
        predict_blocks(scene, pending_blocks(scene))
    assert_nothing_committed(scene)
    again = prepared(job, ref)
    assert again.predict.key != scene.predict.key
    assert again.ingest == scene.ingest
    predict(again)


@pytest.mark.parametrize(
    "change",
    [
        {"input": OTHER_INPUT},
        {"output": {"activation": "none"}},
        {"classes": [{**CLASSES[0], "value": 9}, *CLASSES[1:]]},
        {"window": {"size": [32, 32], "halo": [8], "stride": 2, "padding": "edge"}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_card_that_changes_after_planning_changes_nothing(
    lab: Lab, ref: SceneRef, change: dict[str, object]
) -> None:
    """A scene keeps the card that it was planned with, and is stored under that card's key."""
    card = lab.card(2, input=INPUT)
    undisturbed = prepared(job_of(lab, ref, card, "other"), ref)
    predict_blocks(undisturbed, pending_blocks(undisturbed))
    scene = prepared(job_of(lab, ref, card), ref)
    edit(card, **change)
    predict_blocks(scene, pending_blocks(scene))
    np.testing.assert_array_equal(labels_of(scene), labels_of(undisturbed))
    assert prepared(job_of(lab, ref, card), ref).predict.key != scene.predict.key


def test_a_clean_up_that_changes_after_planning_is_not_stored_under_the_old_key(
    lab: Lab, ref: SceneRef
) -> None:
    keep, fill = {"largest_component": True}, {"fill_holes": True}
    card = lab.card(2, input=INPUT, cleanup=keep)
    job = job_of(lab, ref, card)
    scene = prepared(job, ref)
    predict_blocks(scene, pending_blocks(scene))
    edit(card, cleanup=fill)
    finish_labels(scene)
    assert scene.labels.done() == {"whole"}
    other = prepared(job, ref)
    assert (other.predict, other.labels.exists) == (scene.predict, False)


def edit(card: str, **keys: object) -> None:
    """Change keys of a card's file in place."""
    path = Path(card)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **keys}))


def test_an_edited_card_is_read_again(lab: Lab) -> None:
    path = lab.card(2)
    before = read_card(path)
    assert read_card(path) is before
    edit(path, title="After")
    assert (before.title, read_card(path).title) == ("", "After")
    Path(path).unlink()
    with pytest.raises(RequestError, match=Path(path).name):
        read_card(path)


# -- keys and refusals ----------------------------------------------------------------------------


def test_pictures_are_kept_by_what_they_show(lab: Lab, ref: SceneRef) -> None:
    card = lab.card(2, input=INPUT)
    scene = prepared(job_of(lab, ref, card), ref)
    names = [previews_name(prepared(job_of(lab, ref, card), ref))]
    edit(card, title="Words that no picture shows")
    names.append(previews_name(prepared(job_of(lab, ref, card), ref)))
    edit(card, classes=[{**CLASSES[0], "color": "#123456"}, *CLASSES[1:]])
    names.append(previews_name(prepared(job_of(lab, ref, card), ref)))
    edit(card, classes=[{**CLASSES[0], "name": "lowest"}, *CLASSES[1:]])
    names.append(previews_name(prepared(job_of(lab, ref, card), ref)))
    edit(card, classes=CLASSES)
    names.append(previews_name(prepared(job_of(lab, ref, card), ref)))
    assert names[0] == names[1] == names[4]
    assert len(set(names)) == 3
    again = prepared(job_of(lab, ref, card), ref)
    assert again.predict == scene.predict


@pytest.mark.parametrize("window", ["16", "64x32", "whole"])
@pytest.mark.parametrize("kind", ["window_zscore", "fixed"])
def test_a_window_that_the_card_forbids_is_refused(lab: Lab, ref: SceneRef, kind: str, window: str) -> None:
    if kind == "fixed":
        card = lab.card(2, window={"size": [32], "halo": [8], "stride": 2, "fixed": True})
        why = "takes its own size only"
    else:
        steps = [{"op": "window_zscore"}]
        card = lab.card(
            2, input={"bands": ["b0"], "normalisation": steps}, window={"size": "whole", "stride": 2}
        )
        why = "normalises by the whole scene"
    with pytest.raises(RequestError, match=rf"^tiling.window: found {window}; .*{why}: valid: auto$"):
        check_request(job_of(lab, ref, card, window=window))
    request = check_request(job_of(lab, ref, card, window="auto"))
    assert [s.uri for s in request.scenes] == [ref.uri]
