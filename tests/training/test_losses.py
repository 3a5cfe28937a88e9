"""Losses against torch, torchvision, smp, MONAI, scikit-learn and the papers' formulas."""

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import segmentation_models_pytorch.losses as smp
import torch
from monai.losses import FocalLoss
from scipy.special import expit, log_softmax, softmax
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
from sklearn.metrics import jaccard_score, log_loss
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import sigmoid_focal_loss

from segpipe.errors import RequestError
from segpipe.training.losses import IGNORE, LossName, LossTerm, build_loss
from segpipe.validate import validate

SMOOTH = 1e-3
TERMS = [
    LossTerm(name="cross_entropy"),
    LossTerm(name="cross_entropy", class_weights=[0.5, 2, 0]),
    LossTerm(name="focal"),
    LossTerm(name="focal", gamma=0.5, class_weights=[1, 3, 2]),
    LossTerm(name="border", class_weights=[0.2, 1, 1]),
    LossTerm(name="bce"),
    LossTerm(name="dice"),
    LossTerm(name="dice", batch=False, background=True),
    LossTerm(name="jaccard"),
    LossTerm(name="jaccard", batch=False),
    LossTerm(name="tversky"),
    LossTerm(name="tversky", batch=False, background=True, alpha=1.5),
    LossTerm(name="lovasz"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads cost more than they save on tensors of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def title(term):
    return "-".join(
        [term.name.value, *(f"{k}={getattr(term, k)}" for k in sorted(term.model_fields_set - {"name"}))]
    )


every_term = pytest.mark.parametrize("term", TERMS, ids=title)


def for_two(term):
    """The same term for background and foreground."""
    return term.model_copy(update={"class_weights": term.class_weights[:2]})


def batch(seed=0, channels=3, shape=(6, 7), n=2, dtype=torch.float32):
    """Logits (n, channel, …), target (n, …) with every class in every sample and some IGNORE, map (n, …)."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, channels, *shape, generator=rng, dtype=dtype)
    target = torch.randint(-1, max(2, channels), (n, *shape), generator=rng)
    target.flatten(1)[:, : max(2, channels)] = torch.arange(max(2, channels))
    return logits, target, 5 * torch.rand(n, *shape, generator=rng, dtype=dtype)


def rows(logits, target):
    """What takes part, as numpy: logits (element, channel) in float64 and classes (element,)."""
    keep = target != IGNORE
    return logits.movedim(1, -1)[keep].double().numpy(), target[keep].numpy()


def value(term, logits, target, *rest, classes=3):
    return build_loss([term], classes)(logits, target, *rest)


def value_and_gradient(term, logits, *rest, classes=3):
    logits = logits.clone().requires_grad_()
    loss = value(term, logits, *rest, classes=classes)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def same(found, expected, rel=2e-6):
    assert float(found) == pytest.approx(float(expected), rel=rel)


# --- losses of elements ----------------------------------------------------------------------------


def test_cross_entropy_is_sklearns_log_loss():
    logits, target, _ = batch()
    x, t = rows(logits, target)
    same(value(LossTerm(name="cross_entropy"), logits, target), log_loss(t, softmax(x, axis=1)))


def test_weighted_cross_entropy_is_torchs():
    logits, target, _ = batch()
    expected = F.cross_entropy(logits, target, torch.tensor([0.5, 2, 0]), ignore_index=IGNORE)
    same(value(LossTerm(name="cross_entropy", class_weights=[0.5, 2, 0]), logits, target), expected)


def test_cross_entropy_of_one_channel_is_sklearns_log_loss_of_the_foreground():
    logits, target, _ = batch(channels=1)
    x, t = rows(logits, target)
    expected = log_loss(t, expit(x[:, 0]))
    for name in ("cross_entropy", "bce"):
        same(value(LossTerm(name=name), logits, target, classes=2), expected)
    term = LossTerm(name="cross_entropy", class_weights=[1, 4])
    expected = log_loss(t, expit(x[:, 0]), sample_weight=np.where(t == 1, 4, 1))
    same(value(term, logits, target, classes=2), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.5])
def test_focal_is_smps_softmax_focal_and_monais_times_the_classes(gamma):
    logits, target, _ = batch()
    found = value(LossTerm(name="focal", gamma=gamma), logits, target)
    x, t = (torch.from_numpy(a) for a in rows(logits, target))
    same(found, softmax_focal_loss_with_logits(x, t, gamma=gamma))
    monai = FocalLoss(gamma=gamma, use_softmax=True, to_onehot_y=True)  # a mean over (element, class)
    same(found, 3 * monai(x, t[:, None]))


def test_focal_of_one_channel_is_torchvisions():
    logits, target, _ = batch(channels=1)
    x, t = (torch.from_numpy(a) for a in rows(logits, target))
    expected = sigmoid_focal_loss(x[:, 0], t.double(), alpha=-1, gamma=1.5, reduction="mean")
    same(value(LossTerm(name="focal", gamma=1.5), logits, target, classes=2), expected)


def test_focal_without_focus_is_torchs_weighted_cross_entropy():
    logits, target, _ = batch()
    expected = F.cross_entropy(logits, target, torch.tensor([1.0, 3, 2]), ignore_index=IGNORE)
    same(value(LossTerm(name="focal", gamma=0, class_weights=[1, 3, 2]), logits, target), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_focal_has_a_gradient_where_the_network_is_certain(gamma):
    """p = 1 in float32: (1 − p)^(γ − 1) alone would be infinite, and times 0 not a number."""
    logits = torch.tensor([[300.0, 0, 0], [0, 300, 0]]).T.reshape(1, 3, 1, 2)
    target = torch.tensor([[[0, 2]]])  # one certain and right, one certain and wrong
    loss, gradient = value_and_gradient(LossTerm(name="focal", gamma=gamma), logits, target)
    same(loss, 150)
    np.testing.assert_allclose(gradient[0, :, 0].T, [[0, 0, 0], [0, 0.5, -0.5]], atol=1e-6)


def test_bce_is_torchs_over_classes_against_the_rest():
    logits, target, _ = batch()
    x, t = rows(logits, target)
    expected = np.mean([log_loss(t == c, expit(x[:, c])) for c in range(3)])
    same(value(LossTerm(name="bce"), logits, target), expected)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_border_is_the_papers_energy_over_the_elements(channels):
    """Ronneberger et al. 2015, eq. 1 and 2: the sum of (w_c + map)·(−log p)."""
    logits, target, weight_map = batch(channels=channels)
    weights = [0.2, 1.0, 3.0][: max(2, channels)]
    x, t = rows(logits, target)
    x = np.insert(x, 0, 0, axis=1) if channels == 1 else x
    surprise = -log_softmax(x, axis=1)[np.arange(len(t)), t]
    expected = np.mean((np.array(weights)[t] + weight_map[target != IGNORE].numpy()) * surprise)
    term = LossTerm(name="border", class_weights=weights)
    same(value(term, logits, target, weight_map, classes=len(weights)), expected)


def test_border_without_gaps_is_cross_entropy():
    logits, target, weight_map = batch()
    expected = F.cross_entropy(logits, target, ignore_index=IGNORE)
    same(value(LossTerm(name="border"), logits, target, 0 * weight_map), expected)


# --- losses of regions -----------------------------------------------------------------------------

OVERLAP = {  # smp's smooth is in units of tp, MONAI's Dice and Jaccard have 2tp
    "dice": lambda **kw: smp.DiceLoss(smooth=SMOOTH / 2, **kw),
    "jaccard": lambda **kw: smp.JaccardLoss(smooth=SMOOTH / 2, **kw),
    "tversky": lambda **kw: smp.TverskyLoss(smooth=SMOOTH, alpha=0.2, beta=1.1, **kw),
}


def overlap_term(name, **kw):
    return LossTerm(
        name=name, smooth=SMOOTH, **({"alpha": 0.2, "beta": 1.1} if name == "tversky" else {}), **kw
    )


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", OVERLAP)
def test_overlap_is_smps(name, background):
    logits, target, _ = batch(n=3)
    oracle = OVERLAP[name](
        mode="multiclass", ignore_index=IGNORE, classes=[0, 1, 2] if background else [1, 2]
    )
    same(value(overlap_term(name, background=background), logits, target), oracle(logits, target))
    alone = [oracle(logits[i : i + 1], target[i : i + 1]) for i in range(3)]
    same(value(overlap_term(name, background=background, batch=False), logits, target), sum(alone) / 3)


@pytest.mark.parametrize("name", OVERLAP)
def test_overlap_of_one_channel_is_smps_of_the_foreground(name):
    logits, target, _ = batch(channels=1)
    oracle = OVERLAP[name](mode="binary", ignore_index=IGNORE)
    same(value(overlap_term(name), logits, target, classes=2), oracle(logits, target))


@pytest.mark.parametrize("name", ["dice", "jaccard", "tversky"])
def test_a_class_that_is_absent_and_not_predicted_costs_nothing(name):
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 1] = 300
    target = torch.ones(1, 4, 4, dtype=torch.long)
    assert float(value(LossTerm(name=name), logits, target)) == pytest.approx(0, abs=1e-6)


def test_a_sample_without_valid_elements_takes_no_part_in_the_mean():
    logits, target, _ = batch(n=2)
    target[1] = IGNORE
    for name in OVERLAP:
        term = overlap_term(name, batch=False)
        same(value(term, logits, target), value(term, logits[:1], target[:1]))


# --- Lovász ----------------------------------------------------------------------------------------


def extension(errors, inside):
    """Lovász extension by its definition: sets grow by the largest error, and count by what they add."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    sets = [set(order[:i]) for i in range(len(order) + 1)]
    truth = {i for i, t in enumerate(inside) if t}
    loss = [len(wrong) / len(truth | wrong) if truth | wrong else 0.0 for wrong in sets]  # 1 − Jaccard
    return sum(errors[i] * (after - before) for i, (before, after) in zip(order, pairwise(loss), strict=True))


def test_lovasz_is_the_extension_of_the_jaccard_loss():
    logits, target, _ = batch(shape=(3, 4))
    x, t = rows(logits, target)
    p = softmax(x, axis=1)
    same(
        value(LossTerm(name="lovasz"), logits, target),
        np.mean([extension(np.abs((t == c) - p[:, c]), t == c) for c in range(3)]),
    )
    logits, target, _ = batch(channels=1, shape=(3, 4))
    x, t = rows(logits, target)
    hinge = np.maximum(0, 1 - x[:, 0] * np.where(t == 1, 1, -1))
    same(value(LossTerm(name="lovasz"), logits, target, classes=2), extension(hinge, t == 1))


@pytest.mark.parametrize(("mode", "channels"), [("multiclass", 3), ("binary", 1)])
def test_lovasz_is_smps(mode, channels):
    """Class 2 is absent, so no part of the mean. smp's float32 is good enough with so few elements."""
    logits, target, _ = batch(channels=channels)
    target = target.clamp(max=1)
    found = value_and_gradient(LossTerm(name="lovasz"), logits, target, classes=max(2, channels))
    inputs = logits.clone().requires_grad_()
    oracle = smp.LovaszLoss(mode, ignore_index=IGNORE)(inputs, target)
    same(found[0], oracle.detach(), rel=1e-5)
    np.testing.assert_allclose(found[1], torch.autograd.grad(oracle, inputs)[0], rtol=1e-4, atol=1e-7)


def test_lovasz_of_certain_predictions_is_sklearns_jaccard():
    """At the corners of the unit cube the extension is the function (Berman et al. 2018, section 2)."""
    _, target, _ = batch(seed=1)
    predicted = batch(seed=2)[1].clamp_min(0)
    logits = 200 * F.one_hot(predicted, 3).movedim(-1, 1).float()
    keep = target != IGNORE
    expected = 1 - jaccard_score(target[keep], predicted[keep], average="macro")
    same(value(LossTerm(name="lovasz"), logits, target), expected)


def test_lovasz_gradient_of_a_large_batch():
    """With p elements the differences are about 1/p: float32 ratios of 1 would leave errors of 2 %."""
    rng = np.random.default_rng(0)
    truth = rng.random(400_000) < 0.3
    x = rng.normal(size=truth.size) + truth
    logits = torch.from_numpy(x).float().reshape(1, 1, 500, 800)
    target = torch.from_numpy(truth).long().reshape(1, 500, 800)
    _, found = value_and_gradient(LossTerm(name="lovasz"), logits, target, classes=2)
    x = logits.double().numpy().ravel()
    errors = 1 - x * np.where(truth, 1, -1)
    order = np.argsort(-errors)
    n, wrong, union = truth.sum(), np.cumsum(truth[order]), truth.sum() + np.cumsum(~truth[order])
    # The exact difference of (n − wrong)/union: one element more is of the class, or beyond it.
    steps = np.where(truth[order], 1 / union, (n - wrong) / (union * (union - 1.0)))
    expected = np.zeros(truth.size)
    expected[order] = np.where(errors[order] > 0, steps * np.where(truth[order], -1, 1), 0)
    assert np.linalg.norm(found.numpy().ravel() - expected) < 1e-4 * np.linalg.norm(expected)


# --- laws of every term ----------------------------------------------------------------------------


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
    same(value(term, logits, target, weight_map), value(term, *left), rel=1e-5)


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
    same(value(term, logits, target, weight_map), value(term, *flat))


@pytest.mark.parametrize(
    "term", [t for t in TERMS if t.name not in (LossName.bce, LossName.lovasz)], ids=title
)
def test_one_channel_is_two_of_which_one_is_zero(term):
    """Softmax of (0, x) is sigmoid of x; bce of both channels and the Lovász hinge are no losses of it."""
    logits, target, weight_map = batch(channels=1)
    both = torch.cat([torch.zeros_like(logits), logits], dim=1)
    term = for_two(term)
    one = value(term, logits, target, weight_map, classes=2)
    same(one, value(term, both, target, weight_map, classes=2))


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


# --- sums, and what is refused ---------------------------------------------------------------------


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
    dice = OVERLAP["dice"](mode="multiclass", ignore_index=IGNORE, classes=[1, 2])(logits, target)
    surprise = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none")
    border = ((1 + weight_map) * surprise).sum() / (target != IGNORE).sum()
    same(build_loss(terms, 3)(logits, target, weight_map), 0.5 * bce + dice + 2 * border)


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
        ({"name": "cross_entropy", "class_weights": [1, float("inf")]}, "finite numbers, 0 or more"),
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
    code = "import sys, segpipe.training.losses; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
