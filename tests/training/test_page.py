"""Curves: points where the numbers say, read back from the SVG."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from segpipe.training.page import curve

POINTS = [(10, 0.9), (20, 0.5), (40, 0.7)]


def drawn(figure: str) -> tuple[np.ndarray, dict[str, float], dict[str, float]]:
    """The curve's vertices in pixels, and the labels of both axes with their places."""
    root = ElementTree.fromstring(figure)
    (line,) = [e for e in root.iter() if e.get("class") == "curve"]
    vertices = [[float(v) for v in part.split()] for part in str(line.get("d"))[1:].split("L")]
    texts = [e for e in root.iter() if e.tag == "text"]
    up = {str(e.text): float(str(e.get("y"))) - 4 for e in texts if e.get("text-anchor") == "end"}
    across = {str(e.text): float(str(e.get("x"))) for e in texts if e.get("text-anchor") == "middle"}
    return np.array(vertices), up, across


def read(labels: dict[str, float], at: np.ndarray) -> np.ndarray:
    """Numbers at pixels, by the line through the axis's labels."""
    numbers = [float(text.replace(",", "").replace("−", "-")) for text in labels]
    slope, offset = np.polyfit(list(labels.values()), numbers, 1)
    return np.asarray(slope * at + offset)


def test_points_lie_where_the_axes_say() -> None:
    vertices, up, across = drawn(str(curve(POINTS, "Loss by step")))
    np.testing.assert_allclose(read(across, vertices[:, 0]), [10, 20, 40], atol=0.2)
    np.testing.assert_allclose(read(up, vertices[:, 1]), [0.9, 0.5, 0.7], atol=0.01)


def test_undefined_numbers_are_left_out() -> None:
    with_gap = curve([*POINTS[:2], (30, math.nan), POINTS[2]], "Loss by step")
    assert with_gap == curve(POINTS, "Loss by step")
    assert curve([(10, math.nan)], "Loss") == ""
    assert curve([], "Loss") == ""


@pytest.mark.parametrize("value", [0.0, 0.5, -2.0, 1e-9])
def test_one_point_or_a_flat_line_is_drawn(value: float) -> None:
    for points in ([(5, value)], [(5, value), (10, value)]):
        vertices, up, _ = drawn(str(curve(points, "Loss")))
        assert len(vertices) == len(points)
        assert np.isfinite(vertices).all()
        assert (vertices[:, 1] == vertices[0, 1]).all()
        assert len(up) >= 2


def test_the_last_value_is_told() -> None:
    root = ElementTree.fromstring(str(curve(POINTS, "Loss by step")))
    assert root.get("aria-label") == "Loss by step"
    assert [e.text for e in root.iter() if e.tag == "title"] == ["0.7"]
