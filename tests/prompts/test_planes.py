"""Windows of rasters and of slices are the means that numpy gives of what is valid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.config.card import Card
from segpipe.config.prompts import PlaneOf
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.pipeline.scene_io import SceneBlocks, ScenePixels
from segpipe.prompts.collect_prompts import prompt_line
from segpipe.prompts.masks import embeddings as module
from segpipe.prompts.masks.embeddings import Planes, read_box
from segpipe.prompts.prompt_scene import prepare_prompts
from segpipe.prompts.segment_scene import next_round, segment_windows
from segpipe.runs.check import check_request
from segpipe.sources import open_source
from segpipe.sources.base import Scaling
from segpipe.sources.memory import hold
from tests.prompts.prompt_world import make_card, make_job, planned

SHAPE = (5, 23, 31)


@pytest.fixture(scope="module")
def normaliser() -> Normaliser:
    steps = [{"op": "divide", "value": [2.0]}]
    card = Card.model_validate(
        {
            "name": "half", "kind": "volume", "provider": "transformers", "output": {"kind": "prompted"},
            "input": {"normalisation": steps}, "window": {"size": [1, 8, 8], "fixed": True},
        }
    )  # fmt: skip
    return Normaliser(card, (Scaling(),), Statistics())


@settings(max_examples=60)
@given(
    axis=st.sampled_from((0, 1, 2)),
    index=st.integers(0, 4),
    level=st.integers(0, 3),
    start=st.tuples(st.integers(-9, 30), st.integers(-9, 30)),
    cells=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    strip=st.sampled_from((1, 50, 1 << 22)),
    seed=st.integers(0, 99),
)
def test_a_box_is_the_means_of_what_is_valid(
    axis: int,
    index: int,
    level: int,
    start: tuple[int, int],
    cells: tuple[int, int],
    strip: int,
    seed: int,
    normaliser: Normaliser,
) -> None:
    rng = np.random.default_rng(seed)
    values, valid = rng.normal(size=(1, *SHAPE)), rng.random(SHAPE) < 0.7
    planes, step = Planes(SHAPE, axis), 1 << level
    box = Box.at(start, [n * step for n in cells])
    if box.intersect(Box.whole(planes.plane_shape)).size == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "STRIP", strip)
        with (
            hold(values, volume_geometry(SHAPE, np.eye(4)), valid=valid) as uri,
            open_source(uri) as source,
            SceneBlocks(ScenePixels.of(source)) as store,
        ):
            found, known = read_box(store, normaliser, planes, box, step, index)
    plane, there = values[0].take(index, axis) / 2, valid.take(index, axis)
    for row in range(cells[0]):
        for column in range(cells[1]):
            y, x = start[0] + row * step, start[1] + column * step
            part = tuple(slice(max(0, a), max(0, a + step)) for a in (y, x))
            some = there[part]
            assert known[row, column] == some.any()
            expected = plane[part][some].mean() if some.any() else 0.0
            assert found[0, row, column] == pytest.approx(expected, abs=1e-5)


def test_slices_are_across_the_axis_that_is_asked_for() -> None:
    # i to the left, j to the head, k to the front: spacing 1, 1, 3
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, 3.0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1]])
    geometry = volume_geometry((4, 5, 6), affine)
    axes = {plane: Planes.of(geometry, plane).axis for plane in PlaneOf}
    assert axes == {
        PlaneOf.auto: 0,  # the slices that are farthest apart
        PlaneOf.coronal: 0,
        PlaneOf.axial: 1,
        PlaneOf.sagittal: 2,
    }
    even = volume_geometry((4, 5, 6), np.diag([1.0, 1.0, 1.0, 1.0]))
    assert Planes.of(even, PlaneOf.auto).axis == 0  # axial where all are alike
    raster = RasterGeometry((5, 6), (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), None)
    assert Planes.of(raster, PlaneOf.auto).axis is None
    with pytest.raises(RequestError, match=r"prompts\.volume\.plane: found axial; a raster has no slices"):
        Planes.of(raster, PlaneOf.axial)


def test_a_plan_says_what_a_question_encodes(tmp_path: Path) -> None:
    card = make_card(tmp_path)
    job = make_job(tmp_path / "job", card, (300, 300), [(x, 20, x + 20, 40) for x in range(5, 270, 40)])
    request = check_request(job)
    line = prompt_line(prepare_prompts(job, request.scenes[0], request.settings))
    scene = planned(job)
    here = next_round(scene, 0)
    assert here is not None
    assert line.startswith(f"{here.total} windows of 64 to encode (0 are kept)")
    segment_windows(scene, 0, here.windows[:2])
    again = prompt_line(prepare_prompts(job, request.scenes[0], request.settings))
    assert again.startswith(f"{here.total - 2} windows of 64 to encode (2 are kept)")
