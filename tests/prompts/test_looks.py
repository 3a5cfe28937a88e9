"""Looks against analytic places and scipy; a LookNet as a segmenter, and the starter model's own weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy import ndimage

from segpipe.config.card import Card, load_card
from segpipe.errors import RequestError
from segpipe.prompts.prompt_scene import check_model, describe_model
from segpipe.prompts.segmenters.base import Prompt
from segpipe.prompts.segmenters.looknet import (
    LOOK,
    LOOKS,
    PADS,
    REACHES,
    ROOM,
    LookNet,
    PromptTensors,
    drawn,
    laid,
    looks_at,
    resampled,
)
from segpipe.prompts.segmenters.registry import check_segmenter, load_segmenter
from segpipe.prompts.volumes.propagate_memory import has_memory

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
BOX = Prompt(box_xyxy=np.array([20, 24, 43, 51], np.float32))
POINT = Prompt(points_xy=np.array([[30, 40]], np.float32), labels=np.ones(1, np.int64))


def asked(box: list[float] | None, points: list[list[float]], labels: list[int]) -> PromptTensors:
    boxes = torch.full((1, 4), torch.nan) if box is None else torch.tensor([box])
    at = torch.tensor([points or [[0.0, 0.0]]], dtype=torch.float32)
    return PromptTensors(boxes, at, torch.tensor([labels or [-1]]))


@pytest.mark.parametrize("look", range(LOOKS))
def test_a_look_is_around_the_box_or_the_points(look: int) -> None:
    number = torch.tensor([look])
    boxed = looks_at(asked([10, 20, 29, 49], [], []), number)[0]
    x, y = 20 * PADS[look] + ROOM, 30 * PADS[look] + ROOM
    assert boxed.tolist() == pytest.approx([9.5 - x, 19.5 - y, 29.5 + x, 49.5 + y])
    reach = REACHES[look]
    two = looks_at(asked(None, [[10, 20], [14, 21], [90, 90]], [1, 1, 0]), number)[0]
    assert two.tolist() == pytest.approx([9.5 - reach, 19.5 - reach, 14.5 + reach, 21.5 + reach])
    # A point of the object beyond the box is seen too; one beside the object is not needed.
    wide = looks_at(asked([10, 20, 29, 49], [[39, 30], [200, 200]], [1, 0]), number)[0]
    x = 30 * PADS[look] + ROOM
    assert wide.tolist() == pytest.approx([9.5 - x, 19.5 - y, 39.5 + x, 49.5 + y])


def test_cells_are_means_of_elements() -> None:
    image = np.random.default_rng(0).random((2, 3, 256, 256)).astype(np.float32)
    # 128 elements along x and 192 along y: cells of two by three.
    look = torch.tensor([[39.5, 19.5, 167.5, 211.5]])
    found = resampled(torch.from_numpy(image), torch.tensor([1]), look)[0].numpy()
    wanted = image[1, :, 20:212, 40:168].reshape(3, LOOK, 3, LOOK, 2).mean((2, 4))
    # RoIAlign samples between elements, so values of noise differ a little; their means do not.
    assert np.abs(found - wanted).max() < 0.3 and found.mean() == pytest.approx(wanted.mean(), abs=2e-3)
    ramp = np.broadcast_to(np.arange(256, dtype=np.float32), (1, 1, 256, 256)).copy()
    cells = resampled(torch.from_numpy(ramp), torch.tensor([0]), look)[0, 0].numpy()
    np.testing.assert_allclose(cells[0], 40.5 + 2 * np.arange(LOOK), atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(
    x=st.floats(5, 60), y=st.floats(5, 60), width=st.floats(1, 60), height=st.floats(1, 60),
    look=st.integers(0, LOOKS - 1),
)  # fmt: skip
def test_a_box_is_drawn_where_it_is(x: float, y: float, width: float, height: float, look: int) -> None:
    request = asked([x, y, x + width, y + height], [[x, y]], [1])
    edges = looks_at(request, torch.tensor([look]))
    maps = drawn(request, edges)[0]
    low, high = edges[0, :2], edges[0, 2:]
    cell = (high - low) / LOOK
    # The box takes as much of the look as its area, and lies in its middle.
    share = (width + 1) * (height + 1) / float((high - low).prod())
    assert float(maps[0].mean()) == pytest.approx(share, rel=1e-3)
    centre = ndimage.center_of_mass(maps[0].numpy())
    assert centre == pytest.approx((LOOK / 2 - 0.5,) * 2, abs=1e-2)
    at = np.unravel_index(int(maps[1].argmax()), (LOOK, LOOK))
    place = low + cell * (torch.tensor([float(at[1]), float(at[0])]) + 0.5)
    assert ((place - torch.tensor([x, y])).abs() <= cell / 2 + 1e-3).all()
    assert (maps[2] == 0).all() and (maps[3] == 0).all()


@settings(max_examples=25, deadline=None)
@given(
    x=st.floats(-10, 40), y=st.floats(-10, 40), width=st.floats(4, 60), height=st.floats(4, 60),
)  # fmt: skip
def test_masks_are_laid_as_scipy_interpolates(x: float, y: float, width: float, height: float) -> None:
    x, y = np.floor(x) + 0.3, np.floor(y) + 0.7  # no element's centre is on the look's edge
    width, height = np.floor(width), np.floor(height)
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(1, LOOK, LOOK)))
    edges = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float64)
    found = laid(logits, edges, (48, 56), -9.0)[0].numpy()
    rows, columns = np.mgrid[:48, :56]
    v, u = (rows - y) / height, (columns - x) / width
    places = [v * LOOK - 0.5, u * LOOK - 0.5]
    inner = ndimage.map_coordinates(logits[0].numpy(), places, order=1, mode="nearest")
    wanted = np.where((u >= 0) & (u <= 1) & (v >= 0) & (v <= 1), inner, -9.0)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    """A small network with random weights that say something."""
    folder = tmp_path_factory.mktemp("looknet")
    torch.manual_seed(0)
    network = LookNet(width=4, context=8).train()
    with torch.no_grad():  # statistics of the norms, so that answers depend on their window
        for _ in range(5):
            images = torch.randn(2, 3, 96, 96)
            request = asked([20, 24, 43, 51], [], [])
            edges = looks_at(request, torch.tensor([0])).repeat(2, 1)
            maps = drawn(request, edges[:1]).repeat(2, 1, 1, 1)
            network.decode(images, network.encode(images), torch.arange(2), edges, maps)
    save_file(network.state_dict(), folder / "net.safetensors")
    return load_card(write_card(folder, {}))


def write_card(folder: Path, change: dict[str, Any]) -> Path:
    fields = yaml.safe_load((ROOT / "configs" / "models" / "starter-sam.yaml").read_text())
    fields |= {
        "weights": "net.safetensors",
        "arguments": {"width": 4, "context": 8},
        "window": {"size": [96], "fixed": True},
        **change,
    }
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="module")
def window() -> np.ndarray:
    return ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(3, 96, 96)), (0, 3, 3)).astype(
        np.float32
    )


def test_shapes_are_told_before_the_network_is_built(card: Card, window: np.ndarray) -> None:
    segmenter = load_segmenter(card, CPU)
    embedding = segmenter.encode(window)
    assert {name: a.shape for name, a in embedding.arrays.items()} == dict(check_segmenter(card))
    assert dict(segmenter.shapes) == {"window": (3, 96, 96), "context": (8, 24, 24)}
    check_model(card)
    assert describe_model(card).parameters == segmenter.parameters > 10_000


def test_a_mask_is_the_same_whatever_else_is_asked(card: Card, window: np.ndarray) -> None:
    for batch in (1, 4):
        segmenter = load_segmenter(card, CPU, batch=batch)
        embedding = segmenter.encode(window)
        alone = segmenter.decode(embedding, [BOX])
        more = Prompt(np.array([[5, 6], [7, 8], [60, 60]], np.float32), np.array([1, 1, 0]))
        among = segmenter.decode(embedding, [POINT, more, BOX, POINT, more])
        np.testing.assert_allclose(among.logits[2], alone.logits[0], atol=1e-5)
        np.testing.assert_allclose(among.iou[2], alone.iou[0], atol=1e-5)
        assert np.abs(among.logits[0] - among.logits[2]).max() > 0.1


def test_an_object_that_moves_takes_its_mask_along(card: Card) -> None:
    """Nothing but the window's border tells the network where it is."""
    image = np.zeros((3, 96, 96), np.float32)
    image[:, 34:44, 36:50] = np.random.default_rng(2).normal(1, 0.3, (3, 10, 14))
    segmenter = load_segmenter(card, CPU)

    def answer(shift: int) -> np.ndarray:
        box = np.array([36, 34, 49, 43], np.float32) + shift
        moved = np.roll(image, (shift, shift), (1, 2))
        return segmenter.decode(segmenter.encode(moved), [Prompt(box_xyxy=box)]).logits[0, 0]

    here, there = answer(0)[30:48, 32:54], answer(16)[46:64, 48:70]
    assert here.std() > 0.01
    np.testing.assert_allclose(there, here, atol=0.02 * np.abs(here).max())


def test_one_mask_is_the_candidate_that_is_told_to_be_best(card: Card, window: np.ndarray) -> None:
    segmenter = load_segmenter(card, CPU)
    embedding = segmenter.encode(window)
    three, one = (segmenter.decode(embedding, [BOX, POINT], multimask=m) for m in (True, False))
    assert three.iou.shape == (2, LOOKS) and one.iou.shape == (2, 1)
    best = three.iou.argmax(1)
    np.testing.assert_allclose(one.iou[:, 0], three.iou.max(1), atol=1e-6)
    np.testing.assert_allclose(one.logits[:, 0], three.logits[[0, 1], best], atol=1e-5)


def test_a_given_mask_and_the_other_points_are_heard(card: Card, window: np.ndarray) -> None:
    segmenter = load_segmenter(card, CPU)
    embedding = segmenter.encode(window)
    mask = np.full((96, 96), -4, np.float32)
    mask[24:52, 20:44] = 4  # its extent is the box of BOX
    box = BOX.box_xyxy
    beside = {"points_xy": np.array([[30, 40]], np.float32), "labels": np.zeros(1, np.int64)}
    plain, given, alone, corrected = segmenter.decode(
        embedding,
        [BOX, Prompt(box_xyxy=box, mask=mask), Prompt(mask=mask), Prompt(box_xyxy=box, **beside)],
    ).logits
    np.testing.assert_allclose(alone, given, atol=1e-5)
    assert np.abs(given - plain).max() > 1e-3 and np.abs(corrected - plain).max() > 1e-3
    # Points beside the object alone say nothing of where it is: the whole window is looked at.
    nowhere = segmenter.decode(embedding, [Prompt(**beside)]).logits[0, 0]
    assert (nowhere[[0, -1]] > -10).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "LookNets"}, "architecture: found 'LookNets'; did you mean LookNet\\?"),
        ({"window": {"size": [100], "fixed": True}}, "valid: a square whose edge is a multiple of 16"),
        ({"window": {"size": [96]}}, "fixed false; valid: a square"),
        ({"arguments": {"depth": 2}}, "arguments.depth: unknown; valid: context, in_channels, width"),
        ({"arguments": {"width": 0}}, "found in_channels 3, width 0"),
        ({"arguments": {"width": 4, "in_channels": 4}}, "found 3; the network has in_channels 4"),
    ],
)
def test_cards_that_do_not_fit_are_refused(
    card: Card, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (tmp_path / "net.safetensors").write_bytes(Path(str(card.folder), "net.safetensors").read_bytes())
    with pytest.raises(RequestError, match=message):
        check_segmenter(load_card(write_card(tmp_path, change)))


def test_weights_of_another_width_are_refused(card: Card, tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_bytes(Path(str(card.folder), "net.safetensors").read_bytes())
    other = load_card(write_card(tmp_path, {"arguments": {"width": 8, "context": 8}}))
    with pytest.raises(RequestError, match=r"is \(.*\) in net.safetensors, and \(.*\) in LookNet"):
        load_segmenter(other, CPU)


@pytest.mark.parametrize("radius", [4, 12, 50])
def test_the_starter_model_finds_a_disc(radius: int) -> None:
    """A bright disc on a dark ground; the float16 embedding gives the same mask."""
    segmenter = load_segmenter(load_card(ROOT / "configs" / "models" / "starter-sam.yaml"), CPU)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:256, :256]
    disc = np.hypot(y - 130, x - 120) <= radius
    image = (0.3 + 0.4 * disc + rng.normal(0, 0.02, (3, 256, 256))).astype(np.float32)
    embedding = segmenter.encode((image - np.float32(0.5)) / np.float32(0.25))
    rows, columns = np.flatnonzero(disc.any(1)), np.flatnonzero(disc.any(0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
    masks = []
    for kept in (embedding, embedding.half()):
        found = segmenter.decode(kept, [Prompt(box_xyxy=box)])
        mask = found.logits[0, int(found.iou[0].argmax())] > 0
        assert (mask & disc).sum() / (mask | disc).sum() > 0.85
        masks.append(mask)
    assert (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() > 0.98


def test_a_net_that_is_given_stays_a_net() -> None:
    """Cells of a look at a large object are wider than a road: what lies between them is kept."""
    segmenter = load_segmenter(load_card(ROOT / "configs" / "models" / "starter-sam.yaml"), CPU)
    y, x = np.mgrid[:256, :256]
    inside = (abs(y - 128) < 100) & (abs(x - 128) < 100)
    net = inside & ((y % 12 < 2) | (x % 12 < 2))
    image = (0.3 + 0.4 * net + np.zeros((3, 1, 1))).astype(np.float32)
    embedding = segmenter.encode((image - np.float32(0.5)) / np.float32(0.25))
    box = np.array([29, 29, 227, 227], np.float32)
    prompt = Prompt(box_xyxy=box, mask=np.where(net, 10, -10).astype(np.float32))
    found = segmenter.decode(embedding, [prompt])
    mask = found.logits[0, int(found.iou[0].argmax())] > 0
    assert net.sum() / inside.sum() < 0.32  # the IoU of a mask that fills what lies between
    assert (mask & net).sum() / (mask | net).sum() > 0.55


def test_a_looknet_remembers_no_slices(card: Card) -> None:
    """Asked of every model before it propagates through a volume; it was refused as no model for prompts."""
    assert not has_memory(card)
