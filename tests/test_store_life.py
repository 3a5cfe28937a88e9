"""The life of a store: what stays, what goes, what killed processes leave, on real runs."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from finished import finish
from world import PROGRAM, World, environment

from segpipe.api import as_job
from segpipe.cli.main import execute
from segpipe.errors import RequestError
from segpipe.export.run_folder import RunFolder
from segpipe.runs.check import check_request
from segpipe.runs.find_run import open_run
from segpipe.runs.finish import write_run
from segpipe.runs.steps import begin_scene, compute_scene
from tests.inference.test_damage import DAMAGES


def asked(capsys: pytest.CaptureFixture[str], *arguments: str | Path, code: int = 0) -> Any:
    """The JSON that a command of the store prints."""
    capsys.readouterr()
    assert execute(["store", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def kinds(listed: list[dict[str, Any]]) -> Counter[str]:
    return Counter(row["kind"] for row in listed)


def two_scenes(world: World, out: Path, **outputs: Any) -> Path:
    return world.job(
        out, scenes=[str(world / f"scene{seed}.tif") for seed in (1, 2)],
        outputs={"formats": ["cog"], **outputs},
    )  # fmt: skip


def test_what_a_run_keeps_stays_and_the_rest_goes_by_age(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run, record = finish(two_scenes(world, out, keep=["image", "labels"]))
    found = asked(capsys, "usage", out)
    assert kinds(found["stages"]) == {"ingest": 2, "predict": 2, "measure": 2}
    assert {row["scene"] for row in found["stages"]} == {"scene1", "scene2"}
    files = [p for p in (out / ".store").rglob("*") if p.is_file()]
    assert sum(row["bytes"] for row in found["stages"]) == sum(p.stat().st_size for p in files)
    assert asked(capsys, "gc", out, "--older", "0s", "--size", "1B")["stages"] == []
    # a run that keeps less; its record is what counts
    other = two_scenes(world, out, keep=[])
    assert finish(other)[0].name == run.name  # and the same request is done already
    told = json.loads((Path(run.location) / "run.json").read_text())
    told["job"]["outputs"]["keep"] = []
    (Path(run.location) / "run.json").write_text(json.dumps(told))
    would = asked(capsys, "gc", out, "--older", "0s")
    assert not would["removed"]
    assert kinds(would["stages"]) == {"ingest": 2, "predict": 2}
    assert asked(capsys, "gc", out, "--older", "1h")["stages"] == []
    assert asked(capsys, "gc", out, "--size", "1B")["stages"] == []  # used within the hour
    assert asked(capsys, "gc", out, "--older", "0s", "--yes")["removed"]
    assert kinds(asked(capsys, "usage", out)["stages"]) == {"measure": 2}
    write_run(run, record)  # the report is made from what stayed


def test_the_size_is_met_by_what_was_not_used_for_longest(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run, _ = finish(two_scenes(world, out))
    shutil.rmtree(run.location)  # nobody refers to its stages now
    stages = asked(capsys, "usage", out)["stages"]
    ages = random.Random(3).sample(range(3, 30), len(stages))
    for row, hours in zip(stages, ages, strict=True):
        for path in (out / ".store" / row["key"]).rglob("*"):
            os.utime(path, (time.time() - hours * 3600,) * 2)
    stages = sorted(asked(capsys, "usage", out)["stages"], key=lambda row: -row["age_seconds"])
    left = sum(row["bytes"] for row in stages[2:])
    gone = asked(capsys, "gc", out, "--size", f"{left}B", "--yes")["stages"]
    assert [row["key"] for row in gone] == [row["key"] for row in stages[:2]]
    assert {row["key"] for row in asked(capsys, "usage", out)["stages"]} == {r["key"] for r in stages[2:]}


def test_an_unfinished_run_and_pins_hold_their_stages(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    resolved = check_request(as_job(two_scenes(world, out, keep=[])))
    run, _ = open_run(resolved.job, resolved.fingerprint)
    for ref in resolved.scenes:
        compute_scene(begin_scene(resolved, ref, run))
    found = asked(capsys, "usage", out)["stages"]
    assert {row["pinned"] for row in found} == {"unfinished"}
    assert asked(capsys, "gc", out, "--older", "0s")["stages"] == []
    # nothing is computed again: the run goes on
    assert execute(["store", "pin", str(out), "scene2"]) == 0
    _, record = finish(two_scenes(world, out, keep=[]))
    assert all("predict" in scene.reused for scene in record.done)
    assert not list((out / ".store" / "uses").rglob("*.json"))
    gone = asked(capsys, "gc", out, "--run", record.run_id, "--yes")["stages"]
    assert {row["scene"] for row in gone} == {"scene1"}
    assert execute(["store", "unpin", str(out), "scene2"]) == 0
    asked(capsys, "gc", out, "--run", record.run_id, "--yes")
    assert asked(capsys, "usage", out)["stages"] == []
    with pytest.raises(RequestError, match="are gone from the store; run the job again"):
        write_run(RunFolder(str(out), run.job, record.run_id, ""), record)


@pytest.mark.parametrize("command", ["usage", "gc", "pin", "check"])
def test_a_folder_without_a_store_is_refused_and_left_alone(tmp_path: Path, command: str) -> None:
    assert execute(["store", command, str(tmp_path)]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_check_names_what_is_damaged_and_takes_it_back(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    finish(two_scenes(world, whole, keep=["image", "labels"]))
    assert asked(capsys, "check", whole)["damaged"] == []
    patterns = ("predict-*/*/labels/c/*/*", "ingest-*/*/image/c/*/*/*", "measure-*/info.json", "*/stage.json",
                "predict-*/receipts-*.json", "measure-*/previews*")  # fmt: skip
    for number, (pattern, damage) in enumerate((p, d) for p in patterns for d in DAMAGES[:2]):
        out = tmp_path / str(number)
        shutil.copytree(whole, out)
        draw = random.Random(number)
        path = draw.choice(sorted(p for p in (out / ".store").glob(pattern) if p.is_file()))
        damage(path, path, draw)
        key = path.relative_to(out / ".store").parts[0]
        lines = asked(capsys, "check", out, code=1)["damaged"]
        assert len(lines) == 1 and key in lines[0], (pattern, lines)
        assert asked(capsys, "check", out, "--repair", code=1)["damaged"] == lines
        assert asked(capsys, "check", out)["damaged"] == []
        shutil.rmtree(out / "trial")
        _, record = finish(two_scenes(world, out, keep=["image", "labels"]))
        assert len(record.done) == 2
        assert asked(capsys, "check", out)["damaged"] == []


def shape_of(out: Path) -> Counter[str]:
    """Paths of all files below an output folder, without what each run draws anew."""
    names = (p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    return Counter(re.sub(r"[0-9a-f]{16}\b|\d{8}-\d{6}", "*", name) for name in names)


@pytest.fixture(scope="module")
def undisturbed(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An output folder, and the seconds that its run took after its first block."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    begun = 0.0
    process = started(large(world, out))
    while process.poll() is None:
        if not begun and list((out / ".store").glob("*/stage.json")):
            begun = time.monotonic()
        time.sleep(0.005)
    assert process.returncode == 0
    return out, time.monotonic() - begun


def large(world: World, out: Path) -> Path:
    return world.job(
        out, card="convolutions", scenes=[str(world / "large.tif")], tiling={"block": 112},
        regions={"path": str(world / "districts.geojson"), "name": "district"},
        outputs={"formats": ["cog", "ome-zarr"]},
    )  # fmt: skip


def started(job: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [PROGRAM, "run", "--local", str(job)],
        env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.slow) for n in range(1, 7)])
def test_what_killed_processes_leave_is_swept(
    world: World, undisturbed: tuple[Path, float], tmp_path: Path, seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole, seconds = undisturbed
    out, draw = tmp_path / "out", random.Random(seed)
    job = large(world, out)
    for _ in range(3):
        process = started(job)
        while not list((out / ".store").glob("*/stage.json")):
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(draw.uniform(0, seconds))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    # what is left of those that were killed at a write, whatever the instants of these were
    stage = next((out / ".store").glob("predict-*"))
    left = [stage / "0123456789abcdef/labels/c/0/0", stage / "stage.json#1", stage / "receipts-0/a.json",
            out / ".store/stop/local-0123456789abcdef"]  # fmt: skip
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    _, record = finish(job)
    assert record.done
    scene = next(out.glob("trial/*/scenes/large"))
    (scene / ".labels.tif.draft-abcd1234").mkdir()
    (scene / ".labels.tif.draft-abcd1234" / "draft.tif").write_bytes(b"half")
    named = {item["path"] for item in asked(capsys, "check", out)["leftovers"]}
    assert {p.relative_to(out).as_posix() for p in left} <= named
    asked(capsys, "gc", out, "--older", "0s", "--yes")
    assert not [p for p in left if p.exists()]
    shape, expected = shape_of(out), shape_of(whole)
    stages = {name for name in expected | shape if name.startswith(".store/ingest")}
    assert set(shape) - stages == set(expected) - stages
