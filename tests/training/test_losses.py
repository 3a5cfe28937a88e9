"""Laws that every loss keeps, their sum, and what is refused."""

import subprocess
import sys

import pytest
import segmentation_models_pytorch.losses as smp
import torch
from torch.nn import functional as F  # noqa: N812

from segpipe.config.loading import validate
from segpipe.config.losses import IGNORE, LossName, LossTerm
from segpipe.errors import RequestError
from segpipe.training.losses import build_loss
from tests.training.loss_values import (
    SMOOTH,
    TERMS,
    batch,
    every_term,
    for_two,
    title,
    value,
    value_and_gradient,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@every_term
@pytest.mark.parametrize("strange", [0.0, -1e30, 40.0, float("inf"), float("nan")])
def test_what_is_ignored_changes_nothing(term, strange):
    logits, target, weight_map = batch()
    loss, gradient = value_and_gradient(term, logits, target, weight_map)
    ignored = target == IGNORE
    assert not gradient.movedim(1, -1)[ignored].any()
    others = torch.where(ignored[:, None], strange, logits)
    again = value_and_gradient(term, others, target, torch.where(ignored, strange, weight_map))
    assert torch.equal(again[0], loss)
    assert torch.equal(again[1], gradient)


@every_term
def test_ignored_is_left_out(term):
    """As if the elements were not there at all."""
    logits, target, weight_map = batch(n=1)
    keep = target != IGNORE
    left = (
        logits.movedim(1, -1)[keep].T[None, :, None],
        target[keep][None, None],
        weight_map[keep][None, None],
    )
    expected = value(term, *left)
    assert float(value(term, logits, target, weight_map)) == pytest.approx(float(expected), rel=1e-5)


@every_term
@pytest.mark.parametrize("channels", [1, 3])
def test_all_ignored_is_zero_with_a_gradient(term, channels):
    logits, target, weight_map = batch(channels=channels)
    logits[0, 0, 0] = float("nan")
    term = term if channels == 3 else for_two(term)
    loss, gradient = value_and_gradient(
        term, logits, torch.full_like(target, IGNORE), weight_map, classes=max(2, channels)
    )
    assert loss.shape == ()
    assert float(loss) == pytest.approx(0, abs=1e-12)
    assert not gradient.any()


def test_elements_whose_classes_have_no_weight_cost_nothing():
    logits, target, _ = batch()
    for name in ("cross_entropy", "focal"):
        term = LossTerm(name=name, class_weights=[0, 0, 1])
        loss, gradient = value_and_gradient(term, logits, target.clamp(IGNORE, 1))
        assert (float(loss), bool(gradient.any())) == (0, False)


@every_term
@pytest.mark.parametrize("channels", [1, 3])
def test_gradient(term, channels):
    logits, target, weight_map = batch(channels=channels, shape=(2, 3), dtype=torch.float64)
    loss = build_loss([term if channels == 3 else for_two(term)], max(2, channels))
    assert loss(logits, target, weight_map).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: loss(x, target, weight_map), logits.requires_grad_())


@every_term
def test_volumes_are_as_images(term):
    logits, target, weight_map = batch(shape=(3, 4, 5), n=2)
    flat = logits.flatten(2, 3), target.flatten(1, 2), weight_map.flatten(1, 2)
    expected = value(term, *flat)
    assert float(value(term, logits, target, weight_map)) == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.parametrize(
    "term", [t for t in TERMS if t.name not in (LossName.bce, LossName.lovasz)], ids=title
)
def test_one_channel_is_two_of_which_one_is_zero(term):
    """Softmax of (0, x) is sigmoid of x; bce of both channels and the Lovász hinge are no losses of it."""
    logits, target, weight_map = batch(channels=1)
    both = torch.cat([torch.zeros_like(logits), logits], dim=1)
    term = for_two(term)
    one = value(term, logits, target, weight_map, classes=2)
    assert float(one) == pytest.approx(float(value(term, both, target, weight_map, classes=2)), rel=2e-6)


@every_term
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(term, dtype):
    logits, target, weight_map = batch()
    logits = logits.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value(term, logits, target, weight_map)
    assert found.dtype == torch.float32
    assert torch.equal(found, value(term, logits.float(), target, weight_map))


@every_term
@pytest.mark.parametrize("channels", [1, 3])
def test_descent_finds_the_target(term, channels):
    """Plain gradient steps on free logits end at the true class of every element that has weight."""
    logits, target, weight_map = batch(channels=channels, shape=(4, 5))
    logits.requires_grad_()
    loss = build_loss([term if channels == 3 else for_two(term)], max(2, channels))
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(50):
        optimizer.zero_grad()
        loss(logits, target, weight_map).backward()
        optimizer.step()
    found = logits.argmax(1) if channels == 3 else (logits[:, 0] > 0).long()
    weightless = [c for c, w in enumerate(term.class_weights) if not w]
    counted = (target != IGNORE) & ~torch.isin(target, torch.tensor(weightless))
    assert torch.equal(found[counted], target[counted])


def test_sum_of_terms():
    logits, target, weight_map = batch()
    terms = [
        LossTerm(name="bce", weight=0.5),
        LossTerm(name="dice", smooth=SMOOTH),
        LossTerm(name="border", weight=2),
    ]
    bce = F.binary_cross_entropy_with_logits(
        logits.movedim(1, -1)[target != IGNORE], F.one_hot(target[target != IGNORE], 3).float()
    )
    dice = smp.DiceLoss("multiclass", smooth=SMOOTH / 2, ignore_index=IGNORE, classes=[1, 2])(logits, target)
    surprise = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    border = ((1 + weight_map) * surprise).sum() / (target != IGNORE).sum()
    expected = 0.5 * bce + dice + 2 * border
    assert float(build_loss(terms, 3)(logits, target, weight_map)) == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"name": "dice", "gamma": 1},
            "t.yaml: dice takes no gamma; it takes weight, smooth, batch, background",
        ),
        (
            {"name": "bce", "class_weights": [1, 2], "batch": False},
            "t.yaml: bce takes no batch, class_weights; it takes weight",
        ),
        ({"name": "jaccard", "alpha": 0.5}, "jaccard takes no alpha"),
        ({"name": "lovasz", "background": True}, "lovasz takes no background; it takes weight"),
        ({"name": "tversky", "alpha": 0, "beta": 0}, "at least one above 0"),
        ({"name": "cross_entropy", "class_weights": [0, 0]}, "at least one above 0"),
        ({"name": "cross_entropy", "class_weights": [1, float("inf")]}, "should be a finite number"),
        ({"name": "cross_entropy", "class_weights": [1, -1]}, "class_weights.1: found -1"),
        ({"name": "dice", "smooth": 0}, "smooth: found 0"),
        ({"name": "dice", "weight": 0}, "weight: found 0"),
        ({"name": "dise"}, "name: found 'dise'"),
        ({"name": "dice", "smoth": 1}, "did you mean `smooth`?"),
    ],
)
def test_refused_terms(term, message):
    with pytest.raises(RequestError) as error:
        validate(LossTerm, term, "t.yaml")
    assert message in str(error.value)


@every_term
def test_a_term_survives_a_round_trip(term):
    """Files of a run and forms hold every field, also those that the loss does not use."""
    assert LossTerm.model_validate(term.model_dump(mode="json")) == term


@pytest.mark.parametrize(
    ("terms", "classes", "message"),
    [
        ([], 2, "loss: found no terms"),
        ([LossTerm(name="dice")], 1, "loss: found 1 classes; at least 2"),
        (
            [LossTerm(name="focal", class_weights=[1, 2])],
            3,
            "loss: focal: found 2 class_weights; 3 classes need 3",
        ),
    ],
)
def test_refused_losses(terms, classes, message):
    with pytest.raises(RequestError, match=message):
        build_loss(terms, classes)


@pytest.mark.parametrize(
    ("name", "logits", "target", "weight_map", "message"),
    [
        ("dice", (1, 1, 4, 4), (1, 4, 4), None, "logits have 1 channels; 3 classes need 3"),
        (
            "dice",
            (1, 3, 4, 4),
            (1, 1, 4, 4),
            None,
            r"target of shape \(1, 1, 4, 4\); the logits need \(1, 4, 4\)",
        ),
        ("border", (1, 3, 4, 4), (1, 4, 4), (1, 4), r"weight_map of shape \(1, 4\)"),
        ("border", (1, 3, 4, 4), (1, 4, 4), None, "the border loss needs weight_map"),
    ],
)
def test_shapes_that_do_not_go_together(name, logits, target, weight_map, message):
    loss = build_loss([LossTerm(name=name)], 3)
    with pytest.raises(ValueError, match=message):
        loss(
            torch.zeros(logits),
            torch.zeros(target, dtype=torch.long),
            None if weight_map is None else torch.zeros(weight_map),
        )


def test_names_of_losses_load_no_torch():
    code = "import sys, segpipe.config.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
