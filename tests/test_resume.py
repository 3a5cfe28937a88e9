"""Killed at any instant, run again: the same bytes, and nothing that was committed is computed twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from world import PROGRAM, Ended, World, command, environment, only_run, polygon, write_polygons

from segpipe.config.job import load_job
from segpipe.runs.check import check_request
from segpipe.store.stage import Stage

TABLES = (
    "regions.csv",
    "regions.parquet",
    "metrics.csv",
    "metrics.parquet",
    "summary.csv",
    "summary.parquet",
    "agreement.csv",
    "agreement.parquet",
    "confusion.csv",
    "confusion.parquet",
)
SCENE = "large"
BLOCKS = 30
FILES = ("labels.tif", "preview.png")


def write_job(world: World, out: Path, regions: Path | None = None) -> Path:
    """Thirty blocks, of about a tenth of a second each, then clean-up, tallies and files."""
    return world.job(
        out,
        card="convolutions",
        scenes=[str(world / "large.tif")],
        tiling={"block": 112},
        reference={"path": str(world / "large_truth.tif")},
        regions={"path": str(regions or world / "districts.geojson"), "name": "district"},
    )


def results(out: Path) -> dict[str, bytes]:
    """What must be the same bytes whatever happened on the way."""
    run = only_run(out)
    found = {name: (run / name).read_bytes() for name in TABLES}
    return {**found, **{name: (run / "scenes" / SCENE / name).read_bytes() for name in FILES}}


def stage(out: Path, kind: str) -> Path:
    [folder] = (out / ".store").glob(f"{kind}-*")
    return folder


def shards(out: Path, kind: str) -> dict[str, tuple[int, int]]:
    """Every written piece of a stage's arrays, with its inode and time of writing."""
    found = {}
    for path in (out / ".store").glob(f"{kind}-*/*/*/c/**/*"):
        if path.is_file() and "#" not in path.name:
            found[str(path.relative_to(out))] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def committed(out: Path, kind: str) -> set[str]:
    """Blocks with a receipt, loose or compacted."""
    names: set[str] = set()
    for folder in (out / ".store").glob(f"{kind}-*"):
        for receipts in folder.glob("receipts-*"):
            if receipts.is_dir():
                names |= {p.stem for p in receipts.iterdir() if p.suffix == ".json"}
            elif receipts.suffix == ".json":
                names |= set(json.loads(receipts.read_text().splitlines()[0]))
    return names


def shard_of(out: Path, kind: str, block: str) -> str:
    """Path of the shard of labels that a block is."""
    place = "/".join(str(int(part)) for part in block.split("."))
    [labels] = stage(out, kind).glob("*/labels")  # under the generation's token
    return str((labels / "c" / place).relative_to(out))


def run(job: Path, server: str) -> Ended:
    ended = command("run", str(job), api=server)
    assert ended.code == 0, ended
    assert "Traceback" not in ended.err
    return ended


@pytest.fixture(scope="module")
def whole(world: World, server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(write_job(world, out), server)
    assert len(committed(out, "predict")) == BLOCKS
    return out


def start(job: Path, server: str) -> subprocess.Popen[bytes]:
    """A run in a process group of its own."""
    return subprocess.Popen(
        [PROGRAM, "run", str(job)],
        env=environment(server),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def wait_for(process: subprocess.Popen[bytes], pattern: str, folder: Path, count: int) -> None:
    """Until that many files match below a folder; the process must not end before."""
    end = time.monotonic() + 120
    while sum(1 for _ in folder.glob(pattern)) < count:
        assert process.poll() is None, "the run was over before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.002)


RECEIPTS = ".store/predict-*/receipts-*/*.json"
DRAWN = random.Random(20240607)
INSTANTS = [
    ("at the first block", ".store/predict-*/stage.json", 1, DRAWN.uniform(0, 0.05)),
    *(
        ("while predicting", RECEIPTS, DRAWN.randrange(1, BLOCKS // 2), DRAWN.uniform(0, 0.05))
        for _ in range(2)
    ),
    (
        "while cleaning up",
        ".store/clean-*/*/labels/c/*/*",
        DRAWN.randrange(1, BLOCKS),
        DRAWN.uniform(0, 0.02),
    ),
    ("while exporting", f"trial/*/scenes/{SCENE}", 1, DRAWN.uniform(0, 0.4)),
]
"""Five instants: after so many files of a pattern, a random while later."""


@pytest.mark.parametrize(
    ("when", "pattern", "count", "later"),
    [
        pytest.param(*instant, marks=[] if number == 1 else [pytest.mark.slow], id=f"{number}-{instant[0]}")
        for number, instant in enumerate(INSTANTS)
    ],
)
def test_a_killed_run_ends_with_the_same_bytes_and_computes_only_what_is_missing(
    when: str, pattern: str, count: int, later: float, world: World, server: str, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    job = write_job(world, out)
    process = start(job, server)
    wait_for(process, pattern, out, count)
    time.sleep(later)
    kill(process)
    before = committed(out, "predict")
    written = shards(out, "predict")
    if when == "while predicting":
        assert 0 < len(before) < BLOCKS
    # what is there under its final name is whole
    for folder in (out / "trial").glob("*/"):
        expected = only_run(whole)
        for name in (*TABLES, *(f"scenes/{SCENE}/{file}" for file in FILES)):
            if (folder / name).exists():
                assert (folder / name).read_bytes() == (expected / name).read_bytes(), name

    run(job, server)
    assert results(out) == results(whole)
    assert committed(out, "predict") == committed(whole, "predict")
    after = shards(out, "predict")
    kept = {shard_of(out, "predict", block) for block in before}
    assert {p: after[p] for p in kept} == {p: written[p] for p in kept}  # not one written again
    assert len(after) == BLOCKS
    missing = [p for p in after if p not in kept]
    assert all(after[p] != written.get(p) for p in missing)  # and the rest computed now
    record = json.loads((only_run(out) / "run.json").read_text())
    assert ("predict" in record["scenes"][0]["reused"]) == (len(before) == BLOCKS)


def test_a_third_run_computes_nothing_says_so_and_starts_no_server(world: World, whole: Path) -> None:
    job = write_job(world, whole)
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    begun = time.monotonic()
    ended = command("run", str(job), PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="false")  # and no server to use
    took = time.monotonic() - begun
    assert ended.code == 0, ended
    assert ended.err == ""
    lines = ended.out.splitlines()
    assert lines[0].startswith("nothing to do")
    assert lines[1] == "trial: 1 of 1 scenes done"
    assert lines[-1] == f"report: {only_run(whole)}/report.html"
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()} == before
    assert took < 60  # of which nearly all is importing torch on a busy machine


def test_other_regions_are_measured_again_and_nothing_is_predicted_again(
    world: World, server: str, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    layer = write_polygons(tmp_path / "other.geojson", polygon("strip", (100, 260), (64.25, 400)))
    job = write_job(world, out, layer)
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in stage(out, "predict").rglob("*")}
    cleaned = shards(out, "clean")
    [old] = (out / ".store").glob("measure-*")
    run(job, server)
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in stage(out, "predict").rglob("*")} == before
    assert shards(out, "clean") == cleaned
    [new] = set((out / ".store").glob("measure-*")) - {old}
    assert committed(out, "measure")
    runs = sorted((out / "trial").iterdir())
    assert len(runs) == 2
    [made] = [r for r in runs if r.name != only_run(whole).name]
    record = json.loads((made / "run.json").read_text())
    assert record["scenes"][0]["reused"] == ["predict", "clean-up"]
    assert record["scenes"][0]["keys"]["measure"] == new.name
    table = pd.read_csv(made / "regions.csv").groupby("region")["count"].sum()
    assert set(table.index) == {"scene", "strip"}
    assert table["strip"] == pytest.approx(160 * (400 - 64.25), rel=1e-6)
    same = f"scenes/{SCENE}/labels.tif"
    assert (made / same).read_bytes() == (only_run(whole) / same).read_bytes()


def test_a_result_that_was_taken_away_is_made_again_without_a_model(
    world: World, server: str, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    taken = only_run(out) / "scenes" / SCENE / "labels.tif"
    taken.unlink()
    before = shards(out, "predict")
    run(write_job(world, out), server)
    assert results(out) == results(whole)
    assert shards(out, "predict") == before


@pytest.fixture
def pair(world: World, server: str, tmp_path: Path) -> Iterator[tuple[Path, list[subprocess.Popen[bytes]]]]:
    job = write_job(world, tmp_path / "out")
    logs = [(tmp_path / f"log{i}").open("wb") for i in range(2)]
    processes = [
        subprocess.Popen([PROGRAM, "run", str(job)], env=environment(server), stdout=log, stderr=log)
        for log in logs
    ]
    yield tmp_path, processes
    for process, log in zip(processes, logs, strict=True):
        process.kill()
        log.close()


def test_two_runs_of_the_same_job_at_once_end_with_the_same_bytes(
    pair: tuple[Path, list[subprocess.Popen[bytes]]], whole: Path
) -> None:
    folder, processes = pair
    codes = [process.wait(240) for process in processes]
    logs = [(folder / f"log{i}").read_text() for i in range(2)]
    assert codes == [0, 0], logs
    assert "Traceback" not in "".join(logs)
    expected = results(whole)
    runs = sorted((folder / "out" / "trial").iterdir())
    assert len(runs) in (1, 2)  # in the same second: the same folder
    for made in runs:
        for name, data in expected.items():
            where = made / "scenes" / SCENE / name if name in FILES else made / name
            assert where.read_bytes() == data, name
    assert committed(folder / "out", "predict") == committed(whole, "predict")


def test_receipts_are_complete_while_another_run_compacts_them(tmp_path: Path) -> None:
    names = {f"{i:05d}" for i in range(40)}
    for number in range(20):
        stage = Stage(str(tmp_path), f"measure-{number}")
        for name in names:
            stage.commit(name, {"n": int(name)}, {})
        others = [threading.Thread(target=Stage(stage.out, stage.key).compact) for _ in range(2)]
        for other in others:
            other.start()
        seen = []
        while any(other.is_alive() for other in others):
            seen += [stage.done(), set(stage.receipts())]
        for other in others:
            other.join()
        assert all(s == names for s in [*seen, stage.done()])
        assert {k: v["n"] for k, v in stage.receipts().items()} == {n: int(n) for n in names}


# ------------------------------------------------------------------ what makes a run another one


def mark(world: World, folder: Path, **fields: Any) -> str:
    fields = {"reference": {"path": f"{folder}/truth/*.tif"}, "scenes": [f"{folder}/scene*.tif"], **fields}
    fields.setdefault("model", str(folder / "models" / "nearest.yaml"))
    return check_request(load_job(world.job(folder / "out", **fields))).fingerprint


@pytest.fixture
def mine(world: World, tmp_path: Path) -> Path:
    """A copy of the world that may be changed."""
    return Path(shutil.copytree(world.folder, tmp_path / "mine"))


@pytest.mark.parametrize(
    "change",
    ["nothing", "touch scene", "touch reference in a glob", "touch weights", "clean-up", "colour", "limits"],
)
def test_a_run_is_found_again_unless_something_changed_that_its_page_shows(
    change: str, world: World, mine: Path
) -> None:
    before = mark(world, mine)
    path = mine / "models" / "nearest.yaml"
    data = yaml.safe_load(path.read_text())
    if change == "touch scene":
        os.utime(mine / "scene2.tif", (1, 1))
    elif change == "touch reference in a glob":
        os.utime(mine / "truth" / "scene1.tif", (1, 1))
    elif change == "touch weights":  # the same bytes are the same weights
        os.utime(mine / "models" / "nearest.pt", (1, 1))
    elif change == "clean-up":
        data["cleanup"] = {"largest_component": True}
    elif change == "colour":
        data["classes"][1]["color"] = "#123456"
    elif change == "limits":
        data["limits"] = "None that we know."
    path.write_text(yaml.safe_dump(data))
    assert (mark(world, mine) == before) == (change in ("nothing", "touch weights"))


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"tiling": {"block": 64, "memory": "8GiB", "store": "direct"}}, True),
        ({"compute": {"workers": 3, "retries": 0, "batch_minutes": 1.0}}, True),
        ({"outputs": {"keep": ["image", "labels"]}}, True),
        ({"tiling": {"window": 64}}, False),
        ({"compute": {"threads": 2}}, False),
        ({"compute": {"tta": "flips"}}, False),
        ({"outputs": {"scores": True}}, False),
        ({"reference": None}, False),
        ({"description": "Other words."}, False),
    ],
)
def test_a_run_is_named_by_what_can_change_it(
    fields: dict[str, Any], same: bool, world: World, mine: Path
) -> None:
    assert (mark(world, mine, **fields) == mark(world, mine)) == same


def test_the_names_of_an_atlas_are_part_of_a_run(world: World, mine: Path) -> None:
    names = mine / "names.csv"
    names.write_text("value,name\n1,left\n")
    fields = {"regions": {"path": str(mine / "truth" / "scene1.tif"), "name": str(names)}}
    before = mark(world, mine, **fields)
    names.write_text("value,name\n1,right\n")
    assert mark(world, mine, **fields) != before
