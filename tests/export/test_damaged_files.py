"""Damaged files of a run: made again, or named; no manifest certifies what nobody wrote."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from finished import finish
from world import World, polygon, write_polygons

from segpipe.api import as_job
from segpipe.errors import DamagedError
from segpipe.export.run_folder import check_manifest
from segpipe.runs.check import check_request
from segpipe.runs.find_run import load_run, open_run
from segpipe.runs.finish import write_run
from segpipe.runs.steps import begin_scene, complete_scene, compute_scene
from tests.flows import object_world
from tests.inference.test_damage import DAMAGES, delete, empty, swap, truncate

Make = Callable[[Path], Path]
"""A job's file, by its output folder."""
KINDS = {
    "raster": [
        "labels.tif", "labels.tif.aux.xml", "labels.qml", "scores.tif", "uncertainty.tif", "regions.gpkg",
        "preview.png", "item.json", "labels.ome.zarr/zarr.json", "labels.ome.zarr/0/c/0/0", "manifest.json",
    ],
    "volume": ["labels.nii.gz", "labels.ctbl", "preview.png", "manifest.json"],
    "objects": ["instances.tif", "instances.gpkg", "instances.parquet", "instances.json", "manifest.json"],
}  # fmt: skip


@pytest.fixture(scope="module")
def jobs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    folder = tmp_path_factory.mktemp("jobs")
    layer = write_polygons(folder / "regions.geojson", polygon("a", (5, 40), (5.5, 60)))
    object_world.write_world(folder)

    def raster(out: Path) -> Path:
        outputs = {"formats": ["cog", "ome-zarr"], "scores": True, "uncertainty": True}
        scenes = [str(world / f"scene{seed}.tif") for seed in (1, 2)]
        return world.job(out, scenes=scenes, regions={"path": str(layer)}, outputs=outputs)

    def volume(out: Path) -> Path:
        return world.job(
            out, card="nearest-volume", scenes=[str(world / "volume.nii.gz")],
            outputs={"formats": ["bids"]},
        )  # fmt: skip

    return {"raster": raster, "volume": volume, "objects": lambda out: object_world.write_job(folder, out)}


@pytest.fixture(scope="module")
def ended(jobs: dict[str, Make], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Output folders by job and how far its run came: to its end, or to before its report."""
    made = {}
    for name, make in jobs.items():
        made[name, "finished"] = tmp_path_factory.mktemp(name) / "finished"
        assert finish(make(made[name, "finished"]))[1].done
        made[name, "killed"] = tmp_path_factory.mktemp(name) / "killed"
        resolved = check_request(as_job(make(made[name, "killed"])))
        run, _ = open_run(resolved.job, resolved.fingerprint)
        for ref in resolved.scenes:
            scene = begin_scene(resolved, ref, run)
            complete_scene(scene, run, compute_scene(scene))
    return made


def files(run: Path) -> dict[str, bytes]:
    """What a run's scenes and tables are, without what says when it ran."""
    found = {p.relative_to(run).as_posix(): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    kept = {n: d for n, d in found.items() if n.startswith("scenes/") and "report.html" not in n}
    dated = {n for n in kept if n.endswith(("item.json", "manifest.json"))}
    return {n: d for n, d in kept.items() if n not in dated} | {n: found[n] for n in ("regions.csv",)}


def runs_of(out: Path) -> list[Path]:
    return [p for p in out.glob("*/*") if p.is_dir() and not p.parent.name.startswith(".")]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("state", ["killed", "finished"])
@pytest.mark.parametrize("name", KINDS)
def test_damage_is_mended_or_named(
    jobs: dict[str, Make], ended: dict[tuple[str, str], Path], tmp_path: Path, name: str, state: str,
    damage: Callable[[Path, Path, random.Random], None],
) -> None:  # fmt: skip
    draw = random.Random(f"{name} {state} {damage.__name__}")
    [before] = runs_of(ended[name, "finished"])
    expected = files(before)
    for kind in draw.sample(KINDS[name], 2):
        out = tmp_path / kind.replace("/", " ")
        shutil.copytree(ended[name, state], out)
        [run] = runs_of(out)
        found = sorted(run.glob(f"scenes/*/{kind}"))
        path, other = (found * 2)[:2] if damage is not swap else (found[0], found[-1])
        if path.read_bytes() == other.read_bytes():  # a lone scene's, or no damage: any other file
            other = next(p for p in sorted(run.glob("scenes/*/*")) if p != path and p.is_file())
        sizes = path.stat().st_size, other.stat().st_size
        damage(path, other, draw)
        same_sizes = path.exists() and sizes == (path.stat().st_size, other.stat().st_size)
        hurt = {p.relative_to(run).as_posix() for p in ((path, other) if damage is swap else (path,))}
        if state == "finished":
            told = {line.split(": ")[0] for line in check_manifest(str(run))}
            assert hurt <= told
            try:  # a new report does not hide it
                write_run(*load_run(str(run)))
                assert hurt <= {line.split(": ")[0] for line in check_manifest(str(run))}
            except DamagedError as error:
                assert "manifest.json: missing, damaged" in str(error)
                assert kind == "manifest.json" or damage is swap
        found_run, record = finish(jobs[name](out))
        assert record.done and not record.failed, record.failed
        assert Path(found_run.location).samefile(run)
        if state == "finished" and same_sizes:  # the same request does not read what is as large as before
            assert hurt <= {line.split(": ")[0] for line in check_manifest(str(run))}
        else:
            assert check_manifest(str(run)) == []
            assert files(run) == expected


def test_a_seal_of_other_labels_is_not_believed(
    jobs: dict[str, Make], ended: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(ended["raster", "killed"], out)
    [run] = runs_of(out)
    seal = run / "scenes" / "scene1" / "manifest.json"
    told = json.loads(seal.read_bytes())
    assert set(told["keys"]) == {"labels", "measure"}
    told["files"]["scenes/scene1/labels.tif"]["size"] += 1  # by hand: its own checksum is not right any more
    seal.write_text(json.dumps(told))
    inode = (run / "scenes/scene1/labels.tif").stat().st_ino
    other = (run / "scenes/scene2/labels.tif").stat().st_ino
    finish(jobs["raster"](out))
    assert (run / "scenes/scene1/labels.tif").stat().st_ino != inode
    assert (run / "scenes/scene2/labels.tif").stat().st_ino == other  # that is whole, and stays


@pytest.mark.parametrize("damage", [truncate, empty, delete])
@pytest.mark.parametrize("kind", ["run.json", "manifest.json", "regions.parquet", "report.html"])
def test_a_finished_run_without_a_whole_file_of_its_own_is_finished_again(
    jobs: dict[str, Make], ended: dict[tuple[str, str], Path], tmp_path: Path, kind: str,
    damage: Callable[[Path, Path, random.Random], None],
) -> None:  # fmt: skip
    out = tmp_path / "out"
    shutil.copytree(ended["volume", "finished"], out)
    [run] = runs_of(out)
    before = {p.name: p.read_bytes() for p in run.glob("*.parquet")}
    damage(run / kind, run / kind, random.Random(f"{kind} {damage.__name__}"))
    _, record = finish(jobs["volume"](out))
    assert record.done
    assert check_manifest(str(run)) == []
    assert {p.name: p.read_bytes() for p in run.glob("*.parquet")} == before
    assert load_run(str(run))[1] == record
