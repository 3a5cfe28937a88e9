"""Answers of a window are those of the library's own processor and model, put where they belong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import shapely
import torch
from transformers.models.sam.image_processing_sam import _compute_stability_score

from segpipe.config.prompts import Choice
from segpipe.geometry.box import Box
from segpipe.prompts.masks.decode import ObjectMask, decode_window, view_of
from segpipe.prompts.masks.patches import patch_cover
from segpipe.prompts.prompt_set import PromptSet, make_boxes, make_outlines, make_points, make_prompts
from segpipe.prompts.segmenters.base import Prompt, mask_logits
from segpipe.tiling.pyramid import Pyramid, Window
from tests.prompts.tiny_sams import World, make_world, points

pytestmark = pytest.mark.usefixtures("one_thread")
W = 64
WHOLE = Window(0, (0, 0))


@pytest.fixture(scope="module", params=["sam", "sam2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world("sam2", tmp_path_factory.mktemp("net"))


def said(
    given: Iterable[tuple[int, Sequence[float], bool]] = (),
    boxes: Iterable[tuple[int, Sequence[float], Sequence[float]]] = (),
    outlines: Iterable[tuple[int, shapely.Geometry]] = (),
) -> PromptSet:
    return make_prompts(make_points(given, 2), make_boxes(boxes, 2), make_outlines(outlines), {})[0]


def ask(
    world: World, pyramid: Pyramid, window: Window, prompts: PromptSet, **more: object
) -> list[ObjectMask]:
    given = {"choice": Choice.score, **more}
    return decode_window(world.segmenter, world.embedding, window, pyramid, prompts, **given)  # type: ignore[arg-type]


def check(answer: ObjectMask, published: tuple[torch.Tensor, ...], seen: np.ndarray) -> np.ndarray:
    """Numbers of all candidates, where elements are seen (y, x) bool; the mask that should be taken."""
    masks, scores, _ = published
    masks = masks.clone()
    masks[:, torch.from_numpy(~seen)] = -1e9
    np.testing.assert_allclose(answer.stats.iou, scores, atol=1e-4)
    stability = _compute_stability_score(masks, 0.0, 1)
    np.testing.assert_allclose(answer.stats.stability, stability, atol=0.01)
    elements = (masks > 0).sum((-2, -1)).numpy()
    np.testing.assert_allclose(answer.stats.elements, elements, atol=4)
    usable = np.where(elements > 0, scores.numpy(), -np.inf)
    assert answer.candidate == int(usable.argmax())
    assert answer.iou == answer.stats.iou[answer.candidate]
    return np.asarray(masks[answer.candidate].numpy() > 0)


def differ(answer: ObjectMask, shape: tuple[int, ...], expected: np.ndarray) -> float:
    """Share of the mask's elements that are not as expected, over the whole plane (y, x)."""
    assert answer.patch is not None and answer.patch.logits.dtype == np.float16
    found = patch_cover(answer.patch, Box.whole(shape))
    assert expected.any()
    return float((found != expected).sum() / expected.sum())


SHAPE = (W, W)
ONE_WINDOW = Pyramid(SHAPE, W, 0.25)
OUTLINE = shapely.box(19.5, 7.5, 49.5, 29.5)
"""x, y: elements 20…49 of rows 8…29."""


def test_a_scene_of_one_window_is_answered_as_published(world: World) -> None:
    prompts = said(
        [
            (1, (20, 30), True),
            (3, (30, 20), True),
            (3, (45, 25), False),
            (5, (20, 30), True),
            (5, (50, 50), True),
        ],
        [(2, (12.0, 9.5), (50.5, 40.5)), (3, (12.0, 9.5), (50.5, 40.5)), (7, (29.6, 10.0), (30.2, 10.5))],
        [(4, OUTLINE)],
    )
    box = np.array([10.0, 12.5, 40.0, 50.0], np.float32)
    low = mask_logits(np.pad(np.ones((22, 30), bool), ((8, 34), (20, 14))), world.segmenter.mask_shape)
    expected = {
        1: (Prompt(**points((30, 20), labels=(1,))), None),
        2: (Prompt(box_xyxy=box), None),
        3: (Prompt(box_xyxy=box, **points((20, 30), (25, 45), labels=(1, 0))), None),
        4: (Prompt(), torch.from_numpy(low)[None, None]),
        5: (Prompt(**points((30, 20), (50, 50), labels=(1, 1))), None),
        7: (Prompt(box_xyxy=np.array([10.25, 29.9, 10.25, 29.9], np.float32)), None),  # less than an element
    }
    found = ask(world, ONE_WINDOW, WHOLE, prompts)
    assert [a.object for a in found] == list(expected)
    for answer in found:
        prompt, mask = expected[answer.object]
        published = world.published(prompt, mask)
        taken = check(answer, published, np.ones(SHAPE, bool))
        assert differ(answer, SHAPE, taken) < 0.002
        some = np.count_nonzero(answer.stats.elements)
        assert answer.reason == f"highest predicted IoU, of {'3' if some == 3 else '2 that are not empty'}"
        assert not answer.cut  # the window's border is the scene's
    sizes = ask(world, ONE_WINDOW, WHOLE, prompts, choice=Choice.large)
    assert all(a.stats.elements[a.candidate] == a.stats.elements.max() for a in sizes)


@pytest.mark.parametrize(
    ("shape", "index"), [((300, 290), (1, 2)), ((260, 180), (0, 1)), ((150, 420), (1, 0))]
)
def test_a_coarse_window_of_a_larger_scene(
    sam: World, shape: tuple[int, int], index: tuple[int, int]
) -> None:
    """Level 1, steps of 64: element (i, j) is 2 × 2 elements of the plane, from 64 · index + 2 · (i, j)."""
    pyramid, window = Pyramid(shape, W, 0.25), Window(1, index)
    origin = 64 * np.array(index)
    at = origin + 2 * np.array([20, 30]) + 0.5  # the centre of an element of the window
    prompts = said(
        [(1, tuple(at), True)], [(2, tuple(origin + 15.5), tuple(origin + np.array([79.5, 59.5])))]
    )
    edge = np.zeros((W, W), bool)  # the window's border inside the scene
    seen = np.zeros((W, W), bool)
    height, width = (min(W, -(-(n - o) // 2)) for n, o in zip(shape, origin.tolist(), strict=True))
    seen[:height, :width] = True
    edge[0], edge[-1] = origin[0] > 0, origin[0] + 2 * W < shape[0]
    edge[:, 0] |= origin[1] > 0
    edge[:, -1] |= origin[1] + 2 * W < shape[1]
    for answer, prompt in zip(
        ask(sam, pyramid, window, prompts),
        (
            Prompt(**points((30, 20), labels=(1,))),
            Prompt(box_xyxy=np.array([8.0, 8.0, 29.0, 39.0], np.float32)),
        ),
        strict=True,
    ):
        published = sam.published(prompt)
        taken = check(answer, published, seen)
        logits = torch.nn.functional.interpolate(
            published[0][None, answer.candidate : answer.candidate + 1, :height, :width],
            scale_factor=2,
            mode="bilinear",
        )
        plane = np.zeros(shape, bool)
        part = np.s_[origin[0] : origin[0] + 2 * height, origin[1] : origin[1] + 2 * width]
        plane[part] = (logits[0, 0].numpy() > 0)[: shape[0] - origin[0], : shape[1] - origin[1]]
        assert differ(answer, shape, plane) < 0.01
        assert answer.cut == bool((taken & edge).any())


@pytest.mark.parametrize(
    ("index", "sides"),
    [((0, 0), "bottom right"), ((1, 1), "top left right"), ((1, 2), "top left"), ((0, 2), "bottom left")],
)
def test_only_borders_inside_the_scene_cut(index: tuple[int, int], sides: str) -> None:
    """96 × 120: two windows down, the second up to the edge; three across, the last over the edge."""
    view = view_of(Window(0, index), Pyramid((96, 120), W, 0.25))
    masks = np.zeros((5, W, W), bool)
    names = {"top": (0, 30), "bottom": (63, 30), "left": (30, 0), "right": (30, 63), "nowhere": (1, 62)}
    for mask, at in zip(masks, names.values(), strict=True):
        mask[at] = True
    assert {name for name, cut in zip(names, view.cut(masks), strict=True) if cut} == set(sides.split())


def test_elements_without_data_are_of_no_mask(sam: World) -> None:
    valid = np.random.default_rng(1).random(SHAPE) > 0.3
    valid[:, 40:] = False
    prompts = said([(1, (20, 30), True)])
    [answer] = ask(sam, ONE_WINDOW, WHOLE, prompts, valid=valid)
    taken = check(answer, sam.published(Prompt(**points((30, 20), labels=(1,)))), valid)
    assert differ(answer, SHAPE, taken) < 0.002
    [nothing] = ask(sam, ONE_WINDOW, WHOLE, prompts, valid=np.zeros(SHAPE, bool))
    assert nothing.patch is None and np.isnan(nothing.stability) and not nothing.cut
    assert nothing.reason == "no element in any of 3"


def turned(prompts: PromptSet) -> PromptSet:
    """The same, the other way round in every list but that of objects."""
    p, b, o = prompts.points, prompts.boxes, prompts.outlines
    return replace(
        prompts,
        points=replace(p, position=p.position[::-1], positive=p.positive[::-1], objects=p.objects[::-1]),
        boxes=replace(b, start=b.start[::-1], stop=b.stop[::-1], objects=b.objects[::-1]),
        outlines=replace(o, polygons=o.polygons[::-1], objects=o.objects[::-1]),
    )


def test_neither_order_nor_company_changes_a_bit(sam: World) -> None:
    random = np.random.default_rng(5)
    places = random.uniform(0, 63, (12, 2))
    prompts = said(
        [(1 + i % 5, tuple(place), i % 4 != 3) for i, place in enumerate(places.tolist())],
        [(6, (3, 4), (30, 41)), (2, (10, 10), (60, 50))],
        [(7, OUTLINE), (7, shapely.box(2, 3, 9, 20)), (1, shapely.Point(30, 30).buffer(9))],
    )
    together = ask(sam, ONE_WINDOW, WHOLE, prompts)
    assert len(together) == 7
    others = [ask(sam, ONE_WINDOW, WHOLE, turned(prompts)), ask(sam, ONE_WINDOW, WHOLE, prompts, at_once=2)]
    p, b, o = prompts.points, prompts.boxes, prompts.outlines
    alone = []
    for n in range(1, 8):
        part = said(
            [
                (n, tuple(q), bool(s))
                for q, s, m in zip(p.position, p.positive, p.objects, strict=True)
                if m == n
            ],
            [(n, tuple(x), tuple(y)) for x, y, m in zip(b.start, b.stop, b.objects, strict=True) if m == n],
            [(n, g) for g, m in zip(o.polygons, o.objects, strict=True) if m == n],
        )
        alone += ask(sam, ONE_WINDOW, WHOLE, part)
    for answers in (*others, alone):
        for a, b_ in zip(together, answers, strict=True):
            assert (a.object, a.candidate, a.iou, a.reason) == (b_.object, b_.candidate, b_.iou, b_.reason)
            assert a.patch is not None and b_.patch is not None
            assert a.patch.origin == b_.patch.origin and np.array_equal(a.patch.logits, b_.patch.logits)
            assert np.array_equal(a.stats.iou, b_.stats.iou) and np.array_equal(
                a.stats.elements, b_.stats.elements
            )


def test_points_outside_the_window_are_left_out_and_said(sam: World) -> None:
    """Two windows away the network could not see them; a slice's plane goes with the patch."""
    pyramid, window = Pyramid((200, 200), W, 0.25), Window(0, (1, 1))
    near = [(1, (52, 62), True), (1, (60, 40), False)]
    [some] = ask(sam, pyramid, window, said(near), plane=(0, 7))
    [more] = ask(
        sam, pyramid, window, said([*near, (1, (190, 3), False), (1, (3, 190), False)]), plane=(0, 7)
    )
    assert some.patch is not None and more.patch is not None and more.patch.plane == (0, 7)
    assert np.array_equal(some.patch.logits, more.patch.logits)
    assert more.reason == some.reason + "; 2 points outside the window left out"


def test_an_object_of_another_window_is_an_error(sam: World) -> None:
    pyramid = Pyramid((200, 200), W, 0.25)
    with pytest.raises(ValueError, match="object 4"):
        ask(sam, pyramid, WHOLE, said([(4, (20, 90), True)]))
    with pytest.raises(ValueError, match="pyramid of 32"):
        ask(sam, Pyramid((200, 200), 32, 0.25), WHOLE, said([(4, (20, 20), True)]))
    assert ask(sam, pyramid, WHOLE, said()) == []
