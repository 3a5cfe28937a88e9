"""GridMasks without a prompt: on one window those of the library's own generator; on a scene, one of each."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_dilation, label
from skimage.measure import regionprops
from torchvision.ops import box_iou, nms
from transformers.models.sam.image_processing_sam import _build_point_grid

from segpipe.config.prompts import PointGrid
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.prompts.masks.automatic import (
    GridMasks,
    GridTally,
    grid_prompts,
    join_grid_masks,
    merge_grid_masks,
    segment_grid,
)
from segpipe.prompts.masks.nms import keep_best
from segpipe.prompts.masks.patches import patch_cover
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt
from segpipe.tiling.pyramid import Pyramid, Window
from tests.prompts.tiny_sams import (
    NETWORKS,
    World,
    edge_of,
    iou,
    make_world,
    tiny,
)

pytestmark = pytest.mark.usefixtures("one_thread")


SIDE = 7
"""Points of the window."""


@pytest.fixture(scope="module", params=list(NETWORKS))
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    family: str = request.param
    network = tiny(family)
    folder = tmp_path_factory.mktemp(family)
    first = make_world(family, folder, network)
    xy = (_build_point_grid(SIDE) * edge_of(family)).numpy().reshape(-1, 1, 2)
    found = first.segmenter.decode(first.embedding, [Prompt(p, np.ones(1, np.int64)) for p in xy])
    by = np.quantile(found.low, 0.85, axis=(0, 2, 3))
    lower(network, by, 1.0 if family == "sam_hq" else 20 / float(found.low.std()))
    return make_world(family, folder, network)


def lower(network: Any, by: np.ndarray, gain: float) -> None:
    """Lower the logits of three masks by so much, for random ones cover most of the window, and spread them.

    One channel of the features that make masks becomes the same everywhere.
    """
    decoder, high = network.mask_decoder, 50.0
    with torch.no_grad():
        decoder.upscale_conv2.weight[:, 0] = 0
        decoder.upscale_conv2.bias[0] = high
        for layer, offset in zip(decoder.output_hypernetworks_mlps[1:], by.tolist(), strict=True):
            layer.proj_out.weight *= gain
            layer.proj_out.bias *= gain
            layer.proj_out.weight[0] = 0
            layer.proj_out.bias[0] = -offset * gain / high


def between(values: np.ndarray) -> float:
    """A threshold in the widest gap between the middle half of values, so that no rounding crosses it."""
    ordered = np.sort(values[values > 0])
    ordered = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
    widest = int(np.diff(ordered).argmax())
    return float(ordered[widest : widest + 2].mean())


def published(world: World, side: int, **limits: float) -> dict[str, Any]:
    """What the library's pipeline makes of the picture."""
    processor = world.published.processor.image_processor
    pipeline = transformers.MaskGenerationPipeline(model=world.published.network, image_processor=processor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dict(
            pipeline(
                Image.fromarray(world.published.image),
                points_per_crop=side,
                output_bboxes_mask=True,
                **limits,
            )
        )


@pytest.mark.parametrize("same", [1.0, 0.9])
def test_a_scene_of_one_window_has_the_librarys_masks(world: World, same: float) -> None:
    """Same points, same masks after its thresholds and, with ``same`` below 1, its suppression."""
    edge = world.segmenter.window[0]
    pyramid, window = Pyramid((edge, edge), edge, 0.25), Window(0, (0, 0))

    def ours(**limits: float) -> tuple[GridMasks, GridTally]:
        wanted = PointGrid(points=SIDE, **limits)
        grid = grid_prompts(pyramid, wanted.points, 0)
        found = segment_grid(world.segmenter, world.embedding, window, pyramid, grid, wanted)
        return merge_grid_masks([found], wanted.overlap)

    everything, _ = ours(iou=0, stability=0, overlap=1)
    score = between(everything.iou)
    stability = between(everything.stability[everything.iou > score])
    masks, tally = ours(iou=float(score), stability=float(stability), overlap=same)
    expected = published(
        world, SIDE, pred_iou_thresh=score, stability_score_thresh=stability, crops_nms_thresh=same
    )
    assert len(masks) == len(expected["scores"]) == tally.kept > 0
    assert tally.points == SIDE**2 and tally.candidates == 3 * SIDE**2
    assert tally.low_iou and tally.unstable and not tally.cut and bool(tally.same) == (same < 1)
    order = np.argsort(-masks.iou, kind="stable")
    np.testing.assert_allclose(masks.iou[order], expected["scores"], atol=1e-4)
    corners = np.concatenate((masks.start[:, ::-1] + 0.5, masks.stop[:, ::-1] - 0.5), axis=1)[order]
    assert np.abs(corners - expected["bounding_boxes"].numpy()).max() <= 1
    shape = Box.whole((edge, edge))
    for i, mask in zip(order.tolist(), expected["masks"], strict=True):
        assert iou(patch_cover(masks.patches[i], shape), mask.numpy()) > 0.99
        assert masks.elements[i] == pytest.approx(int(mask.sum()), abs=3)
    print(f"{world.family}: {tally.lines()}")


def test_points_are_the_librarys_on_one_window_and_one_grid_over_all() -> None:
    for side in (5, 8, 32):
        wanted = PointGrid(points=side)
        grid = grid_prompts(Pyramid((64, 64), 64, 0.25), wanted.points, 0)
        np.testing.assert_allclose(grid.position[:, ::-1], _build_point_grid(side).numpy() * 64, atol=1e-5)
    shape, wanted = (203, 130), PointGrid(points=8, levels=8)
    pyramid = Pyramid(shape, 64, 0.25)
    assert range(min(wanted.levels, pyramid.levels)) == range(3)
    for level in range(min(wanted.levels, pyramid.levels)):
        grid = grid_prompts(pyramid, wanted.points, level)
        steps = [np.unique(np.diff(np.unique(axis))) for axis in grid.position.T]
        assert all(step.tolist() == [8 << level] for step in steps)  # one grid
        assert len(np.unique(grid.position, axis=0)) == len(grid.position)
        assert (grid.position <= np.array(shape) - 0.5).all()
        assert (np.array(shape) - 0.5 - grid.position.max(axis=0) < 8 << level).all()
        counts = pyramid.counts(level)
        windows = [Window(level, (y, x)) for y in range(counts[0]) for x in range(counts[1])]
        centres = np.array(
            [np.mean([pyramid.box(w).start, pyramid.box(w).stop], axis=0) - 0.5 for w in windows]
        )
        far = np.abs(grid.position[:, None] - centres)
        taken = [windows.index(grid.windows[w]) for w in grid.which]
        # Nearest along each axis, which is nearest.
        assert (far[np.arange(len(taken)), taken] == far.min(axis=1)).all()
        asked = np.concatenate([grid.numbers(w) for w in grid.windows])
        assert sorted(asked.tolist()) == list(range(len(grid.position)))
    small = grid_prompts(Pyramid((3, 200), 64, 0.25), wanted.points, 0)
    assert set(small.position[:, 0]) == {1.0} and len(small.position) == 25  # 4.5 is beyond: the middle row


@settings(max_examples=60)
@given(
    st.lists(st.tuples(*(st.integers(0, 12) for _ in range(4))), max_size=40),
    st.sampled_from([0.0, 0.3, 0.5, 0.7]),
)
def test_suppression_is_torchvisions(boxes: list[tuple[int, ...]], limit: float) -> None:
    """Best first; boxes of one element have no area in SAM's convention."""
    start = np.array([(y, x) for y, x, _, _ in boxes], float).reshape(-1, 2)
    stop = start + np.array([(h, w) for _, _, h, w in boxes], float).reshape(-1, 2)
    xyxy = torch.from_numpy(np.concatenate((start[:, ::-1], stop[:, ::-1]), axis=1))
    expected = nms(xyxy, -torch.arange(len(boxes), dtype=torch.float64), limit)
    np.testing.assert_array_equal(keep_best(start, stop, limit), expected)


class Flood:
    """A segmenter by rule: a point's mask is the bright component that it lies in, by scipy.

    Three candidates: the component; the same one element larger, of lower predicted IoU; and one whose
    logits fade, which is not stable. Where a point is in none, all are empty.
    """

    window = mask_shape = (64, 64)
    shapes: ClassVar = {"image": (1, 64, 64)}
    parameters = 0

    def encode(self, window: np.ndarray) -> Embedding:
        return Embedding({"image": window})

    def encode_batch(self, windows: np.ndarray) -> list[Embedding]:
        return [self.encode(window) for window in windows]

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        found, _ = label(embedding.arrays["image"][0] > 0.5)
        logits = np.full((len(prompts), 3, 64, 64), -6, np.float32)
        for masks, prompt in zip(logits, prompts, strict=True):
            [(x, y)] = np.minimum(np.floor(prompt.points_xy + 0.5), 63).astype(int)
            if found[y, x]:
                mine = found == found[y, x]
                masks[0, mine] = 6
                masks[1, binary_dilation(mine)] = 6
                masks[2] = np.where(mine, 0.5, -0.5)
        iou = np.tile(np.array([0.95, 0.9, 0.99], np.float32), (len(prompts), 1))
        return Candidates(logits, iou, logits)


def disks(shape: tuple[int, int], places: Sequence[tuple[float, float, float]]) -> np.ndarray:
    """Disks (y, x, radius), each of its own number."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    ids = np.zeros(shape, int)
    for number, (cy, cx, radius) in enumerate(places, 1):
        ids[np.hypot(y - cy, x - cx) <= radius] = number
    return ids


def pixels_of(bright: np.ndarray, pyramid: Pyramid, window: Window) -> np.ndarray:
    """The window (1, y, x): means over what is of the scene, zeros beyond it."""
    box, scale = pyramid.box(window), 1 << window.level
    part = np.full((64 * scale, 64 * scale), np.nan)
    here = bright[box.start[0] : box.stop[0], box.start[1] : box.stop[1]]
    part[: here.shape[0], : here.shape[1]] = here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # means of nothing
        mean = np.nanmean(part.reshape(64, scale, 64, scale), axis=(1, 3))
    return np.nan_to_num(mean)[None].astype(np.float32)


def everywhere(
    bright: np.ndarray, wanted: PointGrid, at_once: int = 64, smallest: int = 0
) -> list[tuple[GridMasks, GridTally]]:
    """The parts of all windows of all levels."""
    pyramid, segmenter = Pyramid(bright.shape, 64, 0.25), Flood()
    parts = []
    for level in range(min(wanted.levels, pyramid.levels)):
        grid = grid_prompts(pyramid, wanted.points, level)
        for window in grid.windows:
            embedding = segmenter.encode(pixels_of(bright, pyramid, window))
            parts.append(segment_grid(segmenter, embedding, window, pyramid, grid, wanted, smallest, at_once))
    return parts


PLACES = [(32, 64, 9), (64, 32, 9), (64, 96, 12), (9, 9, 9.5), (96, 128.5, 9), (30, 120, 8), (141, 190, 9)]
LARGE = [(96, 230, 30), (171, 93, 30)]
SCENE = (201, 262)


def test_every_object_of_a_scene_is_found_once_and_whole() -> None:
    """Disks on borders of windows, at the scene's edge, and two that nearly fill a window."""
    ids = disks(SCENE, PLACES + LARGE)
    wanted = PointGrid(points=8)
    parts = everywhere(ids > 0, wanted)
    masks, tally = merge_grid_masks(parts, wanted.overlap)
    print(tally.lines())
    whole = Box.whole(SCENE)
    held = []
    for i, patch in enumerate(masks.patches):
        cover = patch_cover(patch, whole)
        [number] = np.unique(ids[cover])
        assert np.array_equal(cover, ids == number) and masks.elements[i] == cover.sum()
        [found] = regionprops(cover.astype(int))
        np.testing.assert_array_equal([*(masks.start[i] + 0.5), *(masks.stop[i] + 0.5)], found.bbox)
        assert ids[tuple(np.floor(masks.point[i] + 0.5).astype(int))] == number
        assert masks.iou[i] == np.float32(0.95) and masks.stability[i] == 1
        held.append(int(number))
    assert sorted(held) == sorted(set(held)) and set(held) >= set(range(1, len(PLACES) + 1))
    assert tally.same_elsewhere and tally.same and tally.cut and tally.unstable
    left_out = (tally.low_iou, tally.empty, tally.unstable, tally.cut, tally.small, tally.same)
    assert tally.candidates == 3 * tally.points == sum(left_out) + tally.same_elsewhere + len(masks)
    assert tally.kept == len(masks)


def test_a_coarser_level_holds_what_the_finest_cuts() -> None:
    ids = disks((260, 262), [(128, 128, 60), (20, 30, 9), (230, 222, 9)])
    fine = PointGrid(points=8)
    with_coarse = fine.model_copy(update={"levels": 3})
    assert len(merge_grid_masks(everywhere(ids > 0, fine), fine.overlap)[0]) == 2
    masks, tally = merge_grid_masks(everywhere(ids > 0, with_coarse), with_coarse.overlap)
    assert len(masks) == 3 and masks.level[:2].tolist() == [0, 0] and masks.level[2] > 0
    large = patch_cover(masks.patches[2], Box.whole(ids.shape))
    assert iou(large, ids == 1) > 0.97 and masks.elements[2] == pytest.approx((ids == 1).sum(), rel=0.03)
    assert tally.same_elsewhere >= 2  # the small ones, seen again
    some = everywhere(ids > 0, with_coarse, smallest=400)  # a disk of radius 9 has 253 elements
    kept, counted = merge_grid_masks(some, with_coarse.overlap)
    assert len(kept) == 1 and counted.small >= 2


def test_neither_order_nor_turns_change_a_bit() -> None:
    """And what is left follows from torchvision's IoU: finer levels first, then predicted IoU."""
    wanted = PointGrid(points=8, iou=0, stability=0, levels=3, overlap=0.5)
    bright = disks(SCENE, PLACES + LARGE) > 0
    parts = everywhere(bright, wanted)
    masks, tally = merge_grid_masks(parts, wanted.overlap)
    for other in (parts[::-1], everywhere(bright, wanted, at_once=3), [(masks, tally)]):
        again, counted = merge_grid_masks(other, wanted.overlap)
        assert same(masks, again) and tally == counted
    joined = join_grid_masks([part for part, _ in parts])
    rank = np.lexsort((joined.candidate, joined.number, -joined.iou, joined.level))
    xyxy = torch.from_numpy(np.concatenate((joined.start[:, ::-1], joined.stop[:, ::-1]), axis=1))
    alike = box_iou(xyxy, xyxy).numpy() > wanted.overlap
    window = np.column_stack((joined.level, joined.window))
    kept: list[int] = []
    for i in rank.tolist():
        if not any(alike[i, k] and (window[i] != window[k]).any() for k in kept):
            kept.append(i)
    assert same(masks, joined.take(np.sort(kept))) and len(set(masks.level.tolist())) > 1


def same(a: GridMasks, b: GridMasks) -> bool:
    """Bit for bit."""
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in [f.name for f in fields(GridMasks)][:-1]
    )
    return arrays and all(
        p.origin == q.origin and p.scale == q.scale and np.array_equal(p.logits, q.logits)
        for p, q in zip(a.patches, b.patches, strict=True)
    )


def test_points_without_data_are_not_asked_and_masks_end_there() -> None:
    pyramid, window = Pyramid((64, 64), 64, 0.25), Window(0, (0, 0))
    wanted = PointGrid(points=4, overlap=0.7)
    grid = grid_prompts(pyramid, wanted.points, 0)  # at 8, 24, 40, 56
    valid = np.zeros((64, 64), bool)
    valid[:, :40] = True
    segmenter, bright = Flood(), disks((64, 64), [(24, 30, 20)]) > 0
    embedding = segmenter.encode(bright[None].astype(np.float32))
    masks, tally = segment_grid(segmenter, embedding, window, pyramid, grid, wanted, valid=valid)
    assert (tally.no_data, tally.points) == (8, 8)
    assert "8 points not asked: no data" in tally.lines()
    cover = patch_cover(masks.patches[0], Box.whole((64, 64)))
    assert np.array_equal(cover, bright & valid) and masks.stop[0, 1] == 39.5


def test_more_points_than_elements_are_rejected() -> None:
    with pytest.raises(RequestError, match="valid: up to 64"):
        grid_prompts(Pyramid((64, 64), 64, 0.25), 65, 0)
