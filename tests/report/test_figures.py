"""Figures: limits of agreement, quartiles, ticks and the confusion matrix, against others' numbers."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import sklearn.metrics

from segpipe.report.charts import MATRIX_CLASSES, OTHERS, confusion_matrix
from segpipe.report.figures import SizePairs, Strip, bland_altman, distribution, ticks
from segpipe.report.overview import size_pairs
from segpipe.tables.record import ClassInfo

CLASSES = (
    ClassInfo(0, "background", "#000000", background=True),
    ClassInfo(1, "forest", "#1b7837"),
    ClassInfo(2, "water", "#2b83ba"),
)

# Peak expiratory flow of 17 people, first readings: Wright meter and mini meter (Bland & Altman, Lancet
# 1986, table 1). The paper: mean difference -2.1 l/min, SD 38.8.
WRIGHT = (494, 395, 516, 434, 476, 557, 413, 442, 650, 433, 417, 656, 267, 478, 178, 423, 427)
MINI = (512, 430, 520, 428, 500, 600, 364, 380, 658, 445, 432, 626, 260, 477, 259, 350, 451)


def test_limits_of_agreement_are_the_published_ones() -> None:
    people = tuple(str(i) for i in range(17))
    lower, middle, upper = SizePairs(
        label="flow", unit="l/min", scenes=people, predicted=WRIGHT, reference=MINI
    ).limits
    assert middle == pytest.approx(-2.1, abs=0.05)
    assert (upper - lower) / (2 * 1.96) == pytest.approx(38.8, abs=0.05)
    pairs = SizePairs(label="flow", unit="l/min", scenes=people, predicted=WRIGHT, reference=MINI)
    svg = str(bland_altman(pairs, lambda v: f"{v:.0f}", {"14": "./scenes/14/report.html"}))
    assert svg.count("h0") == 17
    # outside mean ± 1.96 SD (-78.1 to 73.9) is only the one with 178 and 259
    assert re.findall(r"<title>([^<]+)</title>", svg) == ["14: -81 l/min"]
    assert '<a href="./scenes/14/report.html"' in svg


def test_scenes_without_the_class_are_in_no_bland_altman_plot() -> None:
    rows = [("a", 0.0, 0.0), ("b", 1.0, 2.0), ("c", 0.0, 3.0), ("d", math.nan, math.nan), ("e", 4.0, 4.0)]
    frame = pd.DataFrame(rows, columns=["scene", "predicted_m2", "reference_m2"]).assign(
        **{"class": "forest"}
    )
    (found,) = size_pairs(frame, "area_m2", ["forest", "water"])
    assert found.scenes == ("b", "c", "e")
    assert found.differences.tolist() == [-1.0, -3.0, 0.0] and found.means.tolist() == [1.5, 1.5, 4.0]
    assert size_pairs(frame.iloc[:3], "area_m2", ["forest"]) == []  # of two scenes it says nothing
    assert size_pairs(frame.drop(columns="reference_m2"), "area_m2", ["forest"]) == []


def test_a_distribution_draws_scipys_quartiles() -> None:
    values = tuple(np.random.default_rng(3).gamma(2.0, 2.0, 41).tolist())
    names = tuple(f"<{i}>" for i in range(41))
    svg = str(distribution([Strip("a&b", names, values)], (0.0, 10.0), "{:.2f}".format, {"<7>": "./x"}, "t"))
    left, right = (float(re.search(rf'<text x="([0-9.]+)"[^>]*>{t}</text>', svg)[1]) for t in ("0", "10"))
    box = re.search(r'class="quartiles" x="([0-9.]+)" y="[0-9.]+" width="([0-9.]+)"', svg)
    line = re.search(r'class="median" d="M([0-9.]+)', svg)
    drawn = [float(box[1]), float(line[1]), float(box[1]) + float(box[2])]
    shown = [(x - left) / (right - left) * 10 for x in drawn]
    expected = [scipy.stats.scoreatpercentile(values, p) for p in (25, 50, 75)]
    assert shown == pytest.approx(expected, abs=0.01)
    assert svg.count("h0") == 41 and svg.count("<circle") == 6  # the three lowest and highest
    assert "a&amp;b" in svg and "&lt;" in svg and "<7>" not in svg


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 0.37), (-31.2, 3.6), (0, 101e6), (17, 19), (-0.004, 0.011), (0, 9.99)]
)
def test_ticks_are_matplotlibs(low: float, high: float) -> None:
    ticker = pytest.importorskip("matplotlib.ticker")
    expected = ticker.MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=1).tick_values(low, high)
    inside = [t for t in expected if low - 1e-12 <= t <= high + 1e-12]
    found = ticks(low, high)
    assert [t for t, _ in found] == pytest.approx(inside)
    assert [float(text.replace(",", "")) for _, text in found] == pytest.approx(inside)


def test_the_confusion_matrix_is_scikit_learns() -> None:
    rng = np.random.default_rng(5)
    truth, label = rng.integers(0, 3, 5000), rng.choice(3, 5000, p=(0.6, 0.3, 0.1))
    names = [c.name for c in CLASSES]
    rows = [
        (s, "scene", names[t], names[p], 1.0) for s, t, p in zip(["a", "b"] * 2500, truth, label, strict=True)
    ]
    rows.append(("a", "district", names[0], names[1], 1e9))
    columns = ["scene", "region", "reference", "predicted", "count"]
    table = pd.DataFrame(rows, columns=columns).groupby(columns[:4], as_index=False).sum()
    matrix = confusion_matrix(table, CLASSES)
    expected = sklearn.metrics.confusion_matrix(truth, label)
    assert [[int(c.count.replace(",", "")) for c in r.cells] for r in matrix.rows] == expected.tolist()
    shares = sklearn.metrics.confusion_matrix(truth, label, normalize="true") * 100
    assert np.allclose([[float(c.text) for c in r.cells] for r in matrix.rows], shares, atol=0.0501)
    assert [[c.right for c in r.cells] for r in matrix.rows] == np.eye(3, dtype=bool).tolist()
    assert (matrix.scenes, [r.name for r in matrix.rows]) == (2, names)


def test_small_classes_share_a_row_of_the_confusion_matrix() -> None:
    names = [f"c{i:02d}" for i in range(MATRIX_CLASSES + 4)]
    rows = [("a", "scene", n, n, float(i + 1)) for i, n in enumerate(names)]
    rows += [("a", "scene", names[0], names[1], 100.0), ("a", "scene", names[-1], names[2], 0.5)]
    table = pd.DataFrame(rows, columns=["scene", "region", "reference", "predicted", "count"])
    matrix = confusion_matrix(table, [ClassInfo(i, n, "#101010") for i, n in enumerate(names)])
    assert len(matrix.rows) == MATRIX_CLASSES and matrix.folded == 5
    kept = [r.name for r in matrix.rows]
    assert kept == [names[0], names[1], *names[7:], OTHERS]  # in their order; c02 to c06 together
    assert matrix.rows[-1].cells[-1].count == "25"  # 3 + 4 + 5 + 6 + 7
    assert matrix.rows[-2].cells[-1].count == "<1"
    assert confusion_matrix(table.assign(region="district"), CLASSES) is None
