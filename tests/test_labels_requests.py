"""Given labels and files of classes that do not fit, and what such a job loads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from world import Ended, World, write_raster, write_yaml

from segpipe.config.classes import color_of, load_classes, with_found
from segpipe.errors import RequestError, SceneError
from segpipe.pipeline.given_scene import find_labels, prepare_labelled
from segpipe.pipeline.measure import measure_scene
from segpipe.sources import discover
from tests.given import job_of


def test_what_does_not_fit_is_refused(world: World, tmp_path: Path) -> None:
    scene = world / "scene1.tif"
    (ref,) = discover([str(scene)])
    small = write_raster(tmp_path / "small.tif", np.zeros((1, 5, 5), np.uint8))
    with pytest.raises(SceneError, match=r"labels .*small.tif lie on another grid .*\(72, 96\).*\(5, 5\)"):
        prepare_labelled(job_of(tmp_path, scene, small), ref)
    moved = write_raster(
        tmp_path / "moved.tif", world.labels()[None], transform=rasterio.Affine(30, 0, 500_015, 0, -30, 4e6)
    )
    with pytest.raises(SceneError, match=r"corners are 0\.5 elements apart"):
        prepare_labelled(job_of(tmp_path, scene, moved), ref)
    (tmp_path / "many").mkdir()
    for name in ("scene1_a.tif", "scene1_b.tif"):
        write_raster(tmp_path / "many" / name, world.labels()[None])
    with pytest.raises(SceneError, match=r"several label maps fit: .*narrow `labels` with a glob"):
        prepare_labelled(job_of(tmp_path, scene, tmp_path / "many"), ref)
    with pytest.raises(SceneError, match="no label map fits"):
        find_labels(str(tmp_path / "many"), "another")
    negative = write_raster(tmp_path / "negative.tif", np.full((1, 72, 96), -3, np.int16))
    with pytest.raises(SceneError, match="holds -3; labels are 0 or more"):
        measure_scene(prepare_labelled(job_of(tmp_path, scene, negative), ref))


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"labels": "gone.tif"}, "labels: gone.tif does not exist"),
        ({"classes": "gone.csv"}, "classes: gone.csv cannot be read"),
        ({"classes": "names.txt"}, "give a CSV with columns value,name or a YAML file"),
        ({"outputs": {"scores": True}}, "`outputs.scores` needs a model"),
        ({"labels": "", "model": "card.yaml", "classes": "c.csv"}, "`classes` goes with `labels`"),
    ],
)
def test_requests_that_cannot_be(
    world: World, tmp_path: Path, fields: dict[str, Any], match: str, here: Callable[..., Ended]
) -> None:
    data = {"scenes": [str(world / "scene1.tif")], "labels": str(world / "truth"), **fields}
    data["outputs"] = {"dir": str(tmp_path / "out"), **data.get("outputs", {})}
    ended = here("plan", str(write_yaml(tmp_path / "job.yaml", data)))
    assert ended.code == 2
    assert match in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("c.csv", "id,name\n1,a\n", "has columns id, name; needed: value, name"),
        ("c.csv", "value,name\n1,a\n1,b\n", "a value stands once; found twice: 1"),
        ("c.csv", "value,name\nx,a\n", r"classes.0.value: found 'x'"),
        ("c.csv", "value,name\n-1,a\n", r"classes.0.value"),
        ("c.csv", "value,name,color\n1,a,red\n", r"classes.0.color: found 'red'"),
        ("c.yaml", "1: [a\n", "not valid YAML"),
        ("c.yaml", "classes: []\n", "classes"),
    ],
)
def test_files_of_classes_that_are_wrong(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=match):
        load_classes(str(tmp_path / name))


def test_files_of_classes(world: World, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("0: other\n7: wood\n")
    made = load_classes(str(tmp_path / "a.yaml"))
    assert [(c.value, c.name, c.background) for c in made] == [(0, "other", True), (7, "wood", False)]
    assert [c.name for c in load_classes(str(world.models / "nearest.yaml"))] == ["ground", "crop", "water"]
    (tmp_path / "b.csv").write_text("value,name,color,background\n0,sea,#0000ff,false\n3,rest,,true\n")
    assert [(c.color, c.background) for c in load_classes(str(tmp_path / "b.csv"))] == [
        ("#0000ff", False),
        (color_of(3), True),
    ]
    assert [c.name for c in with_found(made, [9, 7, 2])] == ["other", "wood", "2", "9"]
    assert len({color_of(value) for value in range(118)}) == 118


def test_torch_and_prefect_stay_out(world: World, tmp_path: Path) -> None:
    """A labels job's steps in a process of its own."""
    job = {
        "scenes": [str(world / "scene1.tif")],
        "labels": str(world / "truth"),
        "measure": {"intensity": True},
        "outputs": {"dir": str(tmp_path / "out")},
    }
    code = (
        "import json, sys\n"
        "from segpipe.config.job import Job\n"
        "from segpipe.export.scene_files import done_record, export_scene\n"
        "from segpipe.pipeline.given_scene import prepare_labelled\n"
        "from segpipe.pipeline.measure import measure_scene\n"
        "from segpipe.runs.check import check_request\n"
        "from segpipe.runs.finish import finish_run\n"
        "from segpipe.export.run_folder import RunFolder\n"
        f"job = Job.model_validate({job!r})\n"
        "request = check_request(job)\n"
        "scene = prepare_labelled(job, request.scenes[0])\n"
        "measured, done = measure_scene(scene)\n"
        "run = RunFolder(job.outputs.dir, job.name, 'run', '2024-05-06T07:08:09+00:00')\n"
        "files = export_scene(scene, measured, run)\n"
        "record = done_record(scene, measured, files, {'measure': done})\n"
        "finish_run(run, request, [record])\n"
        "print(json.dumps([name in sys.modules for name in ('torch', 'prefect')]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == [False, False]
    assert (tmp_path / "out/segment/run/intensity.csv").exists()
