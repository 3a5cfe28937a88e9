"""A prompt's prior is the ellipse in its box, and answers are added to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.draw import ellipse

from segpipe.errors import RequestError
from segpipe.prompts.prior import RADIUS, prior_logits
from segpipe.prompts.segmenters import Prompt, load_segmenter
from tests.prompts.tiny_sams import Published, card_for, normalised, points, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
NONE = np.empty((0, 2)), np.empty(0)


@pytest.mark.parametrize("box", [(10, 12, 40, 50), (3, 3, 8, 20), (0, 0, 63, 63)])
def test_of_a_box_it_is_the_ellipse_inside(box: tuple[int, int, int, int]) -> None:
    found = prior_logits(np.array(box, np.float32), *NONE, 1.0, (64, 64)) > 0
    x0, y0, x1, y1 = box
    rows, columns = ellipse((y0 + y1) / 2, (x0 + x1) / 2, (y1 - y0 + 1) / 2, (x1 - x0 + 1) / 2, (64, 64))
    expected = np.zeros((64, 64), bool)
    expected[rows, columns] = True
    np.testing.assert_array_equal(found, expected)


def test_of_points_it_is_a_disc_at_each_positive_one() -> None:
    xy, labels = np.array([(20, 30), (50, 10), (40, 40)], np.float32), np.array([1, 1, 0])
    found = prior_logits(None, xy, labels, 1.0, (64, 64)) > 0
    y, x = np.mgrid[:64, :64]
    expected = (np.hypot(x - 20, y - 30) < RADIUS) | (np.hypot(x - 50, y - 10) < RADIUS)
    np.testing.assert_array_equal(found, expected)
    assert not (prior_logits(None, xy[2:], labels[2:], 1.0, (64, 64)) > 0).any()


@pytest.mark.parametrize("family", ["sam", "sam2", "edgetam"])
def test_an_answer_is_the_librarys_for_the_prior_and_added_to_it(family: str, tmp_path: Path) -> None:
    network = tiny(family)
    network.save_pretrained(tmp_path / "net")
    card = card_for(tmp_path, family, arguments={"prior": True})
    published, segmenter = Published(family, network), load_segmenter(card, torch.device("cpu"), batch=3)
    box = Prompt(box_xyxy=np.array([10.0, 12.0, 40.0, 50.0], np.float32))
    prompts = [
        box,
        Prompt(**points((30, 20), labels=(1,))),
        Prompt(box_xyxy=np.array([2.0, 2.0, 9.0, 9.0], np.float32)),
    ]
    found = segmenter.decode(segmenter.encode(normalised(card, published.image)), prompts)
    edge = segmenter.window[0] / segmenter.mask_shape[0]
    for i, prompt in enumerate(prompts):
        prior = prior_logits(prompt.box_xyxy, prompt.points_xy, prompt.labels, edge, segmenter.mask_shape)
        given = torch.from_numpy(prior)[None, None]
        _, iou, low = published(prompt, masks=given)
        np.testing.assert_allclose(found.low[i], low.numpy() + prior, rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(found.iou[i], iou.numpy(), atol=1e-5)


def test_an_argument_that_is_no_answer_is_refused(tmp_path: Path) -> None:
    tiny("sam").save_pretrained(tmp_path / "net")
    with pytest.raises(RequestError, match=r"arguments\.prior: found 'ellipse'; valid: true or false"):
        load_segmenter(card_for(tmp_path, arguments={"prior": "ellipse"}), torch.device("cpu"))
