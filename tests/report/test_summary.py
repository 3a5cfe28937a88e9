"""The summary: means and their intervals against scikit-learn and scipy, and what they leave out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
)

from segpipe.errors import RequestError
from segpipe.metrics.tally import SizeScale, Tally
from segpipe.regions.base import FULL
from segpipe.sources.labels import IGNORED
from segpipe.tables.overlap_tables import SceneTallies, metric_table, region_table
from segpipe.tables.summary import summary_table
from tests.report.scenes import CLASSES, result


def test_summary_counts_missed_hallucinated_undefined_and_failed():
    """Water: right, missed, absent, absent. Forest: absent, made up, absent, half (IoU 1/2)."""
    scenes = [
        result("a", [[1, 0]], [[1, 0]]),
        result("b", [[7, 0]], [[1, 0]]),
        result("c", [[0, 0]], [[0, 0]]),
        result("d", [[7, 7]], [[7, 0]]),
        SceneTallies("e", regions=("scene",), reason="broken"),
    ]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES, min_reference=1)
    counted = ("value", "n_defined", "n_missed", "n_hallucinated", "n_undefined", "n_failed")
    found = {(m, c): tuple(v) for m, c, *v in summary[["metric", "class", *counted]].itertuples(index=False)}
    # a: water 1. b: water 0, forest 0. d: forest 1/2. c has no class to average.
    assert found["mIoU", ""] == ((1 + 0 + 0.5) / 3, 4, 1, 1, 4, 1)
    assert found["mean Dice", ""] == (pytest.approx((1 + 0 + 2 / 3) / 3), 4, 1, 1, 4, 1)
    # water: tp 1, fn 1. forest: tp 1, fp 1 (b) + 1 (d).
    assert found["pooled mIoU", ""] == (pytest.approx((1 / 2 + 1 / 3) / 2), 2, 0, 0, 0, 1)
    assert found["pixel accuracy", ""][0] == 6 / 8
    assert found["mIoU of classes with reference ≥ 1", ""] == ((1 + 0 + 0.5) / 3, 3, 1, 0, 0, 1)
    assert found["mean IoU", "water"] == (0.5, 2, 1, 0, 2, 1)
    assert found["mean IoU", "forest"] == (0.25, 2, 0, 1, 2, 1)
    assert set(summary["region"]) == {"scene"}
    assert summary["over"][0] == "classes (without background), then scenes"


def test_all_failed_says_so():
    scenes = [SceneTallies(n, regions=("scene",), reason="x") for n in "ab"]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES)
    assert summary["value"].isna().all()
    assert set(summary["n_failed"]) == {2}


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_summary_equals_scikit_learn(seed, count):
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(count):
        reference = rng.choice([0, 1, 7], (9, 8))
        labels = np.where(rng.random((9, 8)) < 0.7, reference, rng.choice([0, 1, 7], (9, 8)))
        maps.append((labels, reference))
    scenes = [result(str(i), *pair) for i, pair in enumerate(maps)]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES).set_index(["metric", "class"])
    oracle = {"labels": [1, 7], "average": None}
    each = [
        (
            jaccard_score(r.ravel(), p.ravel(), **oracle),
            f1_score(r.ravel(), p.ravel(), **oracle),
        )
        for p, r in maps
    ]
    assert summary["value"]["mIoU", ""] == pytest.approx(np.mean([iou.mean() for iou, _ in each]))
    assert summary["value"]["mean Dice", ""] == pytest.approx(np.mean([d.mean() for _, d in each]))
    p, r = (np.concatenate([m[k].ravel() for m in maps]) for k in (0, 1))
    assert summary["value"]["pooled mIoU", ""] == pytest.approx(jaccard_score(r, p, **oracle).mean())
    assert summary["value"]["pixel accuracy", ""] == pytest.approx(accuracy_score(r, p))
    assert summary["value"]["pooled Dice", "forest"] == pytest.approx(f1_score(r, p, **oracle)[1])
    numbers = {
        "balanced accuracy": balanced_accuracy_score,
        "Cohen's kappa": cohen_kappa_score,
        "frequency-weighted IoU": lambda r, p: jaccard_score(r, p, average="weighted"),
    }
    for name, score in numbers.items():
        assert summary["value"][f"pooled {name}", ""] == pytest.approx(score(r, p)), name
        alone = [score(r.ravel(), p.ravel()) for p, r in maps]
        assert summary["value"][f"mean {name}", ""] == pytest.approx(np.mean(alone)), name
    assert summary["value"]["mean Dice", "forest"] == pytest.approx(np.mean([d[1] for _, d in each]))


def test_rare_classes_are_left_out_by_the_reference_s_count():
    """40 × 40: water has 1,200 reference pixels, forest 10: only water is averaged."""
    reference = np.zeros((40, 40), dtype=int)
    reference[:30] = 1
    reference[39, :10] = 7
    summary = summary_table(
        metric_table([result("a", np.where(reference == 7, 0, reference), reference)], CLASSES),
        CLASSES,
    ).set_index(["metric", "class"])
    assert summary["value"]["mIoU", ""] == 0.5
    assert summary["value"]["mIoU of classes with reference ≥ 1000", ""] == 1.0
    assert summary["n_defined"]["mIoU of classes with reference ≥ 1000", ""] == 1


def test_regions_are_averaged_before_scenes():
    """Scene a has two regions (IoU 1 and 0), scene b one (IoU 1): (0.5 + 1) / 2; and the scenes beside."""

    def tally(*pairs):
        region, label, truth = zip(*pairs, strict=True)
        ones = [FULL] * len(pairs)
        return Tally.from_columns(
            region=region, label=label, reference=truth, cover=ones, size=ones, edge=[0] * len(ones)
        )

    scale = SizeScale("px", 1.0, 16, np.array([1 << 16]))
    scenes = [
        SceneTallies(
            "a",
            regions=("scene", "north", "south"),
            tally=tally((0, 1, 1), (0, 1, 0), (1, 1, 1), (2, 1, 0)),
            scale=scale,
        ),
        SceneTallies("b", regions=("scene", "north"), tally=tally((0, 1, 1), (1, 1, 1)), scale=scale),
    ]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES)
    first = summary.groupby("region").first()
    assert first.loc["regions", "value"] == 0.75
    assert first.loc["regions", "over"] == "classes (without background), then regions, then scenes"
    assert first.loc["scene", "value"] == 0.75  # the same by chance of the numbers: (1/2 + 1) / 2
    assert first.loc["scene", "over"] == "classes (without background), then scenes"
    table = region_table(scenes, CLASSES)
    assert list(table["area_px"]) == [0, 2, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]


def noisy(seed, count, shape=(12, 11)):
    """Scenes of which some are predicted well and some badly."""
    rng = np.random.default_rng(seed)
    maps = []
    for right in rng.uniform(0.3, 1, count):
        reference = rng.choice([0, 1, 7], shape)
        maps.append((np.where(rng.random(shape) < right, reference, rng.choice([0, 1, 7], shape)), reference))
    return maps, [result(f"s{i:02}", *pair) for i, pair in enumerate(maps)]


def interval(summary, metric, name=""):
    row = summary[(summary["metric"] == metric) & (summary["class"] == name)].iloc[0]
    return row["low"], row["high"]


def test_intervals_equal_scipy_on_the_maps():
    """Scenes drawn with replacement by scipy, scored by scikit-learn: the same ends but for chance."""
    maps, scenes = noisy(1, 25)
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES)
    matrices = np.stack([confusion_matrix(r.ravel(), p.ravel(), labels=[0, 1, 7]) for p, r in maps])
    flat = [(r.ravel(), p.ravel()) for p, r in maps]
    forest = [jaccard_score(r, p, labels=[7], average=None)[0] for r, p in flat]
    kappa = [cohen_kappa_score(r, p) for r, p in flat]

    def pooled_kappa(index, axis):
        sums = matrices[index].sum(axis=-3)  # (…, reference, predicted)
        n = sums.sum(axis=(-2, -1))
        observed = np.trace(sums, axis1=-2, axis2=-1) / n
        chance = (sums.sum(axis=-1) * sums.sum(axis=-2)).sum(axis=-1) / n**2
        return (observed - chance) / (1 - chance)

    def ends(data, statistic):
        options = {"method": "percentile", "n_resamples": 4999, "rng": 2, "batch": 500}
        return stats.bootstrap((data,), statistic, **options).confidence_interval

    for found, theirs in (
        (interval(summary, "mean IoU", "forest"), ends(forest, np.mean)),
        (interval(summary, "mean Cohen's kappa"), ends(kappa, np.mean)),
        (interval(summary, "pooled Cohen's kappa"), ends(np.arange(len(maps)), pooled_kappa)),
    ):
        np.testing.assert_allclose(found, theirs, rtol=0, atol=0.06 * (theirs[1] - theirs[0]))
    assert set(summary["interval"]) == {"25 scenes", "none: fewer than 2 scenes have it"}
    rare = summary["metric"].str.startswith("mIoU of classes with")  # a scene has only 132 pixels
    assert (summary["interval"].str.startswith("none") == rare).all()
    assert (summary["low"] <= summary["value"])[~rare].all()
    assert (summary["value"] <= summary["high"])[~rare].all()


def test_patients_are_resampled_instead_of_their_scenes():
    """Every scene there twice: the patients' intervals are the ones of the single scenes."""
    maps, scenes = noisy(2, 9)
    again = [result(f"s{i:02}-2", *pair) for i, pair in enumerate(maps)]
    one = summary_table(metric_table(scenes, CLASSES), CLASSES)
    patients = {s.scene: s.scene[:3] for s in scenes + again}
    metrics = metric_table(scenes + again, CLASSES)
    two = summary_table(metrics, CLASSES, groups=patients, grouped_by="patients")
    for column in ("value", "low", "high"):
        np.testing.assert_allclose(two[column], one[column], rtol=1e-12)
    assert two["interval"][0] == "9 patients"
    naive = summary_table(metrics, CLASSES)
    assert (naive["high"] - naive["low"])[0] < (two["high"] - two["low"])[0]
    with pytest.raises(RequestError, match="patients: scene s00-2 is in none"):
        summary_table(
            metrics, CLASSES, groups=dict.fromkeys([s.scene for s in scenes], "x"), grouped_by="patients"
        )


def test_one_scene_has_an_interval_over_its_blocks():
    """A scene of 20 blocks, scenes of their own elsewhere: the pooled numbers' intervals are the same."""
    maps, _ = noisy(3, 20, (8, 8))
    whole = [np.concatenate([m[k] for m in maps]) for k in (0, 1)]
    one = result("one", *whole)
    blocks = [result("one", *pair).tally for pair in maps]
    metrics = metric_table([one], CLASSES)
    assert set(summary_table(metrics, CLASSES)["interval"]) == {"none: fewer than 2 scenes have it"}
    found = summary_table(metrics, CLASSES, min_reference=1, blocks=blocks)
    assert set(found["interval"]) == {"20 blocks"}
    scenes = [result(f"s{i:02}", *pair) for i, pair in enumerate(maps)]
    theirs = summary_table(metric_table(scenes, CLASSES), CLASSES)
    for metric, name in (("pooled mIoU", ""), ("pooled Cohen's kappa", ""), ("pooled Dice", "water")):
        assert interval(found, metric, name) == interval(theirs, metric, name)
    # Of a single scene, the mean over scenes is the scene.
    assert interval(found, "mIoU") == interval(found, "pooled mIoU")
    assert interval(found, "mIoU of classes with reference ≥ 1") == interval(found, "mIoU")
    with pytest.raises(ValueError, match="do not add up"):
        summary_table(metrics, CLASSES, blocks=blocks[1:])
    with pytest.raises(ValueError, match="20 scenes; they are of one"):
        summary_table(metric_table(scenes, CLASSES), CLASSES, blocks=blocks)


def test_a_class_in_one_scene_has_no_interval():
    """Of what only one scene has nothing varies; a scene without anything compared is not resampled."""
    scenes = [
        result("a", [[1, 0, 7]], [[1, 0, 0]]),
        result("b", [[1, 1, 0]], [[1, 0, 0]]),
        result("c", [[1, 1, 0]], [[IGNORED] * 3]),
    ]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES).set_index(["metric", "class"])
    assert summary["interval"]["mean IoU", "forest"] == "none: fewer than 2 scenes have it"
    assert np.isnan(summary["low"]["mean IoU", "forest"])
    assert summary["interval"]["mean IoU", "water"] == "2 scenes"
    assert (summary["low"]["mean IoU", "water"], summary["high"]["mean IoU", "water"]) == (0.5, 1)
    assert tuple(summary.loc[("mean Cohen's kappa", ""), ["n_defined", "n_undefined"]]) == (2, 1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_a_class_that_is_nowhere_is_undefined_everywhere_and_counted(seed):
    rng = np.random.default_rng(seed)
    scenes = [result(str(i), rng.choice([0, 1], (4, 5)), rng.choice([0, 1], (4, 5))) for i in range(3)]
    metrics = metric_table(scenes, CLASSES)
    forest = metrics[metrics["class"] == "forest"]
    assert forest[["iou", "dice", "precision", "recall", "size_ratio"]].isna().all(axis=None)
    assert set(forest["reason"]) == {"absent in both"}
    summary = summary_table(metrics, CLASSES).set_index(["metric", "class"])
    for metric, undefined in (("mean IoU", 3), ("mean Dice", 3), ("pooled IoU", 1), ("pooled Dice", 1)):
        row = summary.loc[(metric, "forest")]
        assert math.isnan(row["value"])
        assert (row["n_defined"], row["n_undefined"]) == (0, undefined)
