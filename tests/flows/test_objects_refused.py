"""Requests for objects that cannot be met: one line each, and nothing made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.flows.object_world import CARD, CLASSES, write_job, write_world
from tests.world import Ended


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("objects"))


@pytest.mark.parametrize(
    ("card", "job", "said"),
    [
        ({}, {"tiling": {"blend": "gaussian"}}, "tiling.blend: 'oracle' finds objects"),
        ({}, {"tiling": {"halo": "0"}}, "tiling.halo: found 0"),
        ({"window": {"size": [64], "halo": [0]}}, {}, "window.halo: found [0]"),
        ({"classes": [{**c, "background": False} for c in CLASSES]}, {}, "must have background: true"),
        (
            {},
            {"measure": {"objects": True}, "reference": {"path": "scene.tif"}},
            "measure.objects: ids alone do not say which of even, odd",
        ),
        (
            {"output": {"kind": "semantic"}, "arguments": {}},
            {},
            "reference.divisor: 'oracle' yields a class for every element",
        ),
    ],
    ids=["blend", "halo of the job", "halo of the card", "no background", "ids of classes", "semantic"],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    card: dict[str, Any],
    job: dict[str, Any],
    said: str,
    folder: Path,
    tmp_path: Path,
    here: Callable[..., Ended],
) -> None:
    (tmp_path / "oracle.onnx").write_bytes((folder / "oracle.onnx").read_bytes())
    path = tmp_path / "oracle.yaml"
    path.write_text(yaml.safe_dump({**CARD, **card}))
    if "reference" in job:
        job = {**job, "reference": {"path": str(folder / "scene.tif")}}
    ended = here("run", str(write_job(folder, tmp_path / "out", model=str(path), **job)))
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1 and said in ended.err, ended.err
    assert not (tmp_path / "out" / "objects").exists()
