"""Scenes in the store: what is learned from, held against the files and other libraries' resampling."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
import torch
from scipy.stats import chisquare
from torch.nn.functional import interpolate
from world import write_raster

from segpipe.config.losses import IGNORE
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.training import scenes as module
from segpipe.training.scenes import POSITIONS, Drawn, TrainScene
from tests.training.conftest import (
    COUNTS,
    VALUES,
    RasterFolder,
    channels_of,
    prepared,
    recipe_of,
    write_scan,
    write_scene,
)

VOLUME = (12, 14, 10)


def whole(scene: TrainScene) -> tuple[np.ndarray, np.ndarray]:
    return scene.read(Box.whole(scene.shape))


def test_a_raster_is_normalised_and_its_labels_are_channels(
    four_rasters: RasterFolder, tmp_path: Path
) -> None:

    folder, channels = four_rasters
    scenes = prepared(recipe_of(folder, out=str(tmp_path)))
    assert [s.name for s in scenes] == sorted(channels)
    for scene in scenes:
        with rasterio.open(folder / "images" / f"{scene.name}.tif") as file:
            red, nir = file.read()
        image, target = whole(scene)
        wanted = (np.stack([nir, red]).astype(np.float32) - np.float32(150)) / np.float32(50)
        np.testing.assert_array_equal(image, wanted)
        np.testing.assert_array_equal(target, channels[scene.name])
        assert scene.counts == tuple(np.bincount(channels[scene.name].ravel(), minlength=3))
        assert scene.spacing is None
        assert scene.bytes == 44 * 50 * (2 * 4 + 2)
        box = Box((5, 7), (20, 41))
        part, labels = scene.read(box)
        np.testing.assert_array_equal(part, wanted[:, 5:20, 7:41])
        np.testing.assert_array_equal(labels, channels[scene.name][5:20, 7:41])


def test_statistics_are_of_the_whole_scenes_valid_pixels(tmp_path: Path) -> None:
    channels = write_scene(tmp_path, "a", (40, 30), 5)
    nir = COUNTS[channels].astype(np.uint16)
    nir[:10] = 0  # no data
    write_raster(tmp_path / "images/a.tif", np.stack([nir, nir]), names=("red", "nir"), nodata=0)
    steps = {"input": {"normalisation": [{"op": "scene_zscore"}]}}
    (scene,) = prepared(recipe_of(tmp_path, card=steps))
    image, target = whole(scene)
    valid = nir[10:].astype(np.float64)
    np.testing.assert_allclose(image[0, 10:], (valid - valid.mean()) / valid.std(), rtol=0, atol=1e-5)
    assert (image[:, :10] == 0).all()
    assert (target[:10] == IGNORE).all()
    np.testing.assert_array_equal(target[10:], channels[10:])
    assert scene.counts == tuple(np.bincount(channels[10:].ravel(), minlength=3))


def test_labels_without_a_meaning_are_ignored_and_others_mapped(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", (8, 9), 1)
    labels = np.full((8, 9), 7, np.uint8)
    labels[0], labels[1], labels[2], labels[3] = 250, 5, 9, 0
    write_raster(tmp_path / "labels/a.tif", labels[None], nodata=250)
    reference = {"values": {5: None, 9: 3}}
    (scene,) = prepared(recipe_of(tmp_path, data={"reference": reference}))
    target = whole(scene)[1]
    np.testing.assert_array_equal(target[:, 0], [IGNORE, IGNORE, 2, 0, 1, 1, 1, 1])
    assert scene.counts == (9, 36, 9)


def test_a_label_that_is_no_class_is_told(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", (8, 9), 1)
    labels = np.zeros((1, 8, 9), np.uint8)
    labels[0, 3, 4] = 5
    path = write_raster(tmp_path / "labels/a.tif", labels)
    said = rf"{path}: holds 5, which is no class of the card \(0, 7, 3\); map it in `data\.reference\.values`"
    with pytest.raises(SceneError, match=said):
        prepared(recipe_of(tmp_path))


def test_labels_on_another_grid_or_none_at_all_are_told(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", (8, 9), 1)
    write_raster(tmp_path / "labels/a.tif", np.zeros((1, 8, 8), np.uint8))
    with pytest.raises(SceneError, match="another grid"):
        prepared(recipe_of(tmp_path))
    (tmp_path / "labels/a.tif").rename(tmp_path / "labels/b.tif")
    with pytest.raises(SceneError, match="'a': no reference fits its name"):
        prepared(recipe_of(tmp_path))


def test_ids_of_objects_are_kept_and_counted_as_one_class(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", (8, 9), 1)
    ids = np.zeros((8, 9), np.int32)
    ids[1:3, 1:3], ids[5:8, 2:6] = 70_000, 2
    write_raster(tmp_path / "labels/a.tif", ids[None])
    two = recipe_of(tmp_path).card.model_dump(mode="json", include={"classes"})["classes"][:2]
    (scene,) = prepared(recipe_of(tmp_path, card={"classes": two}, data={"objects": True}))
    np.testing.assert_array_equal(whole(scene)[1], ids > 0)
    np.testing.assert_array_equal(scene.read_ids(Box.whole((8, 9))), ids)
    assert scene.counts == (8 * 9 - 16, 16)
    assert {tuple(p) for p in scene.positions[1]} == {tuple(p) for p in np.argwhere(ids > 0)}


def test_a_volume_is_turned_and_resampled_as_other_libraries_do(tmp_path: Path) -> None:
    write_scan(tmp_path, "a", VOLUME, 3)
    card = {"input": {"orientation": "SAR", "spacing": [3.0, 1.5, 0.5]}}  # the file: 2.0, 1.5, 1.0
    (scene,) = prepared(recipe_of(tmp_path, "volume", card=card))
    size = (8, 14, 20)
    assert scene.shape == size
    assert scene.spacing == pytest.approx((3.0, 1.5, 0.5))
    canonical = {  # nibabel's: x toward right, y toward anterior, z toward superior
        name: np.asarray(nib.as_closest_canonical(nib.load(tmp_path / name / "a.nii.gz")).dataobj).T
        for name in ("images", "labels")
    }
    voxels = torch.from_numpy((canonical["images"].astype(np.float32) - 150) / 50)[None, None]
    image, target = whole(scene)
    wanted = interpolate(voxels, size, mode="trilinear", align_corners=False)[0]
    np.testing.assert_allclose(image, wanted.numpy(), rtol=0, atol=1e-5)
    labels = torch.from_numpy(canonical["labels"].astype(np.float32))[None, None]
    nearest = interpolate(labels, size, mode="nearest-exact")[0, 0].numpy().astype(int)
    np.testing.assert_array_equal(VALUES[target], nearest)
    assert scene.counts == tuple(np.bincount(target.ravel(), minlength=3))


@pytest.mark.parametrize("spacing", [None, [1.3, 1.5, 1.7]])
def test_block_by_block_is_the_same_as_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spacing: list[float] | None
) -> None:
    write_scan(tmp_path, "a", VOLUME, 4)
    card = {"input": {"orientation": "RAS", "spacing": spacing, "normalisation": [{"op": "scene_zscore"}]}}
    (once,) = prepared(recipe_of(tmp_path, "volume", card=card))
    monkeypatch.setitem(module.EDGE, 3, 4)
    (blocks,) = prepared(recipe_of(tmp_path, "volume", card=card, out=str(tmp_path / "blocks")))
    assert blocks.stage.array("image").shards == (1, 4, 4, 4)
    for a, b in zip(whole(once), whole(blocks), strict=True):
        np.testing.assert_array_equal(a, b)
    assert once.counts == blocks.counts
    for few, more in zip(once.positions, blocks.positions, strict=True):
        assert {tuple(p) for p in few.tolist()} == {tuple(p) for p in more.tolist()}


def test_every_element_of_a_small_class_is_remembered(four_rasters: RasterFolder, tmp_path: Path) -> None:
    folder, channels = four_rasters
    for scene in prepared(recipe_of(folder, out=str(tmp_path))):
        for channel, found in enumerate(scene.positions):
            assert len(found) == scene.counts[channel] < POSITIONS
            wanted = np.argwhere(channels[scene.name] == channel)
            np.testing.assert_array_equal(found[np.lexsort(found.T[::-1])], wanted)


def test_many_elements_are_drawn_evenly_whatever_the_blocks() -> None:
    target = channels_of((240, 300), 9)
    drawn = Drawn(3)
    edges = [(0, 100), (100, 120), (120, 240)]  # blocks of different sizes
    for number, (top, bottom) in enumerate(edges):
        box = Box((top, 0), (bottom, 300))
        drawn.add(target[top:bottom], box, np.random.default_rng(number))
    assert drawn.counts == np.bincount(target.ravel()).tolist()
    for channel, found in enumerate(drawn.positions):
        assert len(found) == POSITIONS < drawn.counts[channel]
        assert len(np.unique(found, axis=0)) == POSITIONS
        assert (target[tuple(found.T)] == channel).all()
        there = np.add.reduceat(
            np.add.reduceat(target == channel, range(0, 240, 20), 0), range(0, 300, 30), 1
        )
        here = np.histogram2d(*found.T, bins=(range(0, 241, 20), range(0, 301, 30)))[0]
        expected = there / there.sum() * POSITIONS
        assert chisquare(here.ravel(), expected.ravel()).pvalue > 1e-3


def test_a_second_call_writes_nothing_and_a_changed_label_file_does(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", (20, 20), 1)
    recipe = recipe_of(tmp_path)

    def stored() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*") if p.is_file()}

    (first,) = prepared(recipe)
    before = stored()
    (second,) = prepared(recipe)
    assert before == stored()
    assert (second.stage.key, second.counts) == (first.stage.key, first.counts)
    write_raster(tmp_path / "labels/a.tif", np.full((1, 20, 20), 7, np.uint8))
    (third,) = prepared(recipe)
    assert third.stage.key != first.stage.key
    assert third.counts == (0, 400, 0)


def test_what_was_left_unfinished_is_made_whole(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", (20, 20), 1)
    recipe = recipe_of(tmp_path)
    (scene,) = prepared(recipe)
    wanted = whole(scene)
    (receipt,) = (tmp_path / "out").rglob("receipts-*/whole.json")
    receipt.unlink()
    (chunk, *_) = (p for p in (tmp_path / "out").rglob("target/c/*/*") if p.is_file())
    chunk.unlink()
    (again,) = prepared(recipe)
    for a, b in zip(wanted, whole(again), strict=True):
        np.testing.assert_array_equal(a, b)
