"""Windows, objects and prompts against other libraries and known shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy import ndimage
from skimage.measure import euler_number, label, regionprops
from torchvision.ops import masks_to_boxes

from segpipe.errors import RequestError
from segpipe.training.prompted import synthetic
from segpipe.training.prompted.real import (
    UNKNOWN,
    RasterPart,
    moved,
    raster_window,
    read_scenes,
    stretched,
    volume_window,
)
from segpipe.training.prompted.recipe import PromptedRecipe, load_prompted_recipe
from segpipe.training.prompted.samples import Samples, box_of, jittered, point_in


@pytest.fixture
def part(recipe: PromptedRecipe) -> RasterPart:
    return read_scenes(recipe).rasters[0]


def test_drawn_objects_lie_inside_and_are_seen() -> None:
    texture = np.random.default_rng(1).random((4, 90, 80)).astype(np.float32)
    for seed in range(20):
        drawn = synthetic.draw_scene(np.random.default_rng(seed), [texture], 128)
        assert drawn.image.shape == (3, 128, 128) and drawn.image.dtype == np.float32
        assert np.isfinite(drawn.image).all() and 0 <= drawn.image.min() <= drawn.image.max() <= 1
        border = np.concatenate([drawn.ids[0], drawn.ids[-1], drawn.ids[:, 0], drawn.ids[:, -1]])
        assert drawn.groups and not border.any()
        assert all((drawn.ids == k).any() for group in drawn.groups for k in group)


@pytest.mark.parametrize("draw", synthetic.SHAPES, ids=lambda f: f.__name__)
def test_shapes_fill_the_size_they_were_given(draw: Any) -> None:
    for seed in range(30):
        mask = draw(np.random.default_rng(seed), 60)
        assert mask.shape == (60, 60) and mask.dtype == bool
        parts = label(mask, connectivity=2)
        assert parts.max() <= 1 or draw is synthetic.waves  # a radius below 0 draws nothing opposite


def test_a_ring_has_a_hole_and_an_ellipse_the_area_of_its_axes() -> None:
    for seed in range(20):
        assert euler_number(synthetic.ring(np.random.default_rng(seed), 80), connectivity=1) <= 0
        mask = synthetic.ellipse(np.random.default_rng(seed), 80)
        found = regionprops(mask.astype(int))[0]
        ellipse = np.pi / 4 * found.axis_major_length * found.axis_minor_length
        assert found.area == pytest.approx(ellipse, rel=0.05)  # a rectangle's: 3 / π of it


def test_values_are_stretched_between_quantiles() -> None:
    values = np.arange(1001, dtype=np.float32)[None]
    valid = np.ones(1001, bool)
    assert stretched(values, valid)[0, [0, 5, 500, 995, 1000]] == pytest.approx([0, 0, 0.5, 1, 1])
    valid[990:] = False
    assert (stretched(values, valid)[0, 990:] == 0.5).all()


def test_parts_of_a_raster_are_scikit_images(part: RasterPart, recipe: PromptedRecipe) -> None:
    y, x = np.mgrid[:76, :100]
    first = np.hypot(y - 20, x - 20) < 9
    assert part.image.shape == (4, 76, 100)
    number = part.parts[20, 20]
    assert ((part.parts == number) == first).all() and part.classes[number] == 1 and part.whole[number]
    assert label(part.parts > 0, connectivity=2).max() == len(part.classes) - 1
    assert part.boxes[number].tolist() == [
        list(regionprops(first.astype(int))[0].bbox[k : k + 2]) for k in (0, 2)
    ]
    judged = read_scenes(recipe, judged=True)
    assert judged.rasters[0].image.shape == (4, 40, 100)
    assert [v.name for v in judged.volumes] == ["case_2"]


def test_raster_windows_hold_whole_discs(part: RasterPart) -> None:
    held = 0
    for seed in range(40):
        window = raster_window(np.random.default_rng(seed), part, 64)
        assert window.image.shape == (3, 64, 64) and 0 <= window.image.min() <= window.image.max() <= 1
        for (number,) in window.groups:
            held += 1
            found = regionprops((window.ids == number).astype(int))[0]
            assert found.solidity > 0.85  # a disc cut by the window or by another would still be one, but
            assert found.axis_minor_length / found.axis_major_length > 0.85  # not as long as it is wide
    assert held > 20


def test_slices_lie_side_by_side_and_keep_their_groups(recipe: PromptedRecipe) -> None:
    volumes = read_scenes(recipe).volumes
    for seed in range(20):
        window = volume_window(np.random.default_rng(seed), volumes, 128)
        assert (window.image[0] == window.image[1]).all()
        whole = [g for g in window.groups if len(g) == 2]
        for group in whole:
            assert label(np.isin(window.ids, group)).max() == 1
        assert (window.image[0][window.ids > 0] != 0.5).mean() > 0.9


def test_boxes_are_torchvisions_and_jitter_is_bounded() -> None:
    rng = np.random.default_rng(2)
    masks = np.zeros((6, 50, 60), bool)
    for mask in masks:
        y, x = rng.integers(0, 30, 2)
        mask[y : y + rng.integers(1, 20), x : x + rng.integers(1, 20)] = True
    boxes = np.stack([box_of(m) for m in masks])
    assert (boxes == masks_to_boxes(torch.from_numpy(masks)).numpy()).all()
    large = np.tile(np.array([[10, 20, 200, 230]], np.float32), (4000, 1))
    moved = jittered(rng, large, 0.1, 256) - large
    assert np.abs(moved).max() <= 20
    assert (moved[:, 0] == -10).any()  # stopped by the window's border
    assert moved[:, 1].std() == pytest.approx(15.3, abs=1)  # normal of 21.1, cut at 20: 20·√(…) by simulation
    assert (jittered(rng, boxes, 0.0, 60) == boxes).all()


def test_points_lie_in_the_object() -> None:
    rng = np.random.default_rng(3)
    mask = np.zeros((20, 30), bool)
    mask[5:10, 5:15] = True
    for _ in range(50):
        x, y = point_in(rng, mask).astype(int)
        assert mask[y, x]


def test_a_batch_depends_on_its_number_alone(recipe: PromptedRecipe) -> None:
    scenes = read_scenes(recipe)
    samples = Samples(recipe, scenes)
    later = list(samples.batches(0, 4))[3]
    again = Samples(recipe, scenes).batch(3)
    for name in ("images", "of", "masks", "boxes", "points"):
        assert (getattr(later, name) == getattr(again, name)).all()
    assert later.images.shape == (6, 3, 64, 64) and samples.batch(0).images.shape == (3, 3, 128, 128)


def test_crops_smaller_than_a_slice_are_refused(recipe: PromptedRecipe) -> None:
    small = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"window": 64})})
    with pytest.raises(RequestError, match="found crops of 32 elements; slices take 64 or more"):
        Samples(small, read_scenes(recipe))


def test_labels_are_moved_as_the_recipe_says(fields: dict[str, Any], tmp_path: Path) -> None:
    fields["data"]["rasters"][0]["labels_shift"] = [2, -3]
    path = tmp_path / "moved.yaml"
    path.write_text(yaml.safe_dump(fields))
    found = read_scenes(load_prompted_recipe(path)).rasters[0]
    y, x = np.mgrid[:76, :100]
    first = np.hypot(y - 22, x - 17) < 9
    assert ((found.parts == found.parts[22, 17]) == first).all() and found.whole[found.parts[22, 17]]


@pytest.mark.parametrize("shift", [(0, 0), (2, -3), (-1, 4), (9, 0)])
def test_moved_labels_are_scipys(shift: tuple[int, int]) -> None:
    labels = np.random.default_rng(0).integers(0, 5, (8, 11))
    wanted = ndimage.shift(labels, shift, order=0, cval=UNKNOWN)
    assert (moved(labels, shift) == wanted).all()
