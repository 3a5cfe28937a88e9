"""Manifests of real runs, in a folder and in a bucket, held against sha256sum and what is done to files."""

from __future__ import annotations

import json
import logging
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished import finish
from world import World

from segpipe.cli.main import execute
from segpipe.errors import RequestError
from segpipe.export.run_folder import RunFolder, check_manifest, hash_file
from segpipe.store.location import open_store


@pytest.fixture
def run(world: World, tmp_path: Path) -> RunFolder:
    return finish(two_scenes(world, tmp_path))[0]


def two_scenes(world: World, tmp_path: Path) -> Path:
    scenes = [str(world / f"scene{seed}.tif") for seed in (1, 2)]
    return world.job(tmp_path / "out", scenes=scenes, outputs={"formats": ["cog", "ome-zarr"]})


def listed(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bytes(open_store(run.location).get("manifest.json").bytes()))
    return found


def test_it_lists_every_file_as_sha256sum_does(run: RunFolder) -> None:
    folder = Path(run.location)
    there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    found = listed(run)
    assert sorted(found["files"]) == [p for p in there if p not in ("run.json", "manifest.json")]
    said = subprocess.run(
        ["sha256sum", *found["files"]], cwd=folder, capture_output=True, text=True, check=True
    )
    sums = {name: digest for digest, name in (line.split(maxsplit=1) for line in said.stdout.splitlines())}
    assert {path: mark["sha256"] for path, mark in found["files"].items()} == sums
    assert {path: mark["size"] for path, mark in found["files"].items()} == {
        path: (folder / path).stat().st_size for path in sums
    }
    assert check_manifest(run.location) == []


def test_it_says_which_scene_and_stages_the_files_are_of(world: World, run: RunFolder) -> None:
    first = listed(run)["scenes"][0]
    assert first["name"] == "scene1"
    assert first["uri"] == str(world / "scene1.tif")
    stat = (world / "scene1.tif").stat()
    (file,) = first["identity"]["files"]
    assert file.pop("sampled")
    assert file == {"uri": str(world / "scene1.tif"), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    assert {"ingest", "predict", "labels", "measure"} <= set(first["keys"])


def test_what_is_missing_or_changed_is_named_and_a_new_report_does_not_hide_it(run: RunFolder) -> None:
    folder = Path(run.location)
    (folder / "scenes/scene1/preview.png").unlink()
    with (folder / "scenes/scene2/labels.tif").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with (folder / "regions.csv").open("a") as file:
        file.write("x")
    table, preview, labels = check_manifest(run.location)
    size = (folder / "regions.csv").stat().st_size
    assert table == f"regions.csv: found {size} bytes, was {size - 1}"
    assert labels.startswith("scenes/scene2/labels.tif: found SHA-256 ")
    assert preview == "scenes/scene1/preview.png: missing"
    assert execute(["report", run.location]) == 0  # tables are made again, and are right again
    assert check_manifest(run.location) == [preview, labels]


def test_other_peoples_files_are_no_part_of_it(run: RunFolder) -> None:
    folder = Path(run.location)
    (folder / "compare-other").mkdir()
    (folder / "compare-other" / "report.html").write_text("x")
    (folder / ".hidden").write_text("x")
    (folder / "notes.txt").write_text("mine")
    assert execute(["report", run.location]) == 0
    assert listed(run)["files"]["notes.txt"]["size"] == 4
    assert not any(path.startswith(("compare-", ".")) for path in listed(run)["files"])


def test_a_run_without_one_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"no manifest.json here; `segpipe report`"):
        check_manifest(str(tmp_path))


def test_in_a_bucket_nothing_large_is_downloaded(
    world: World, bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = two_scenes(world, tmp_path)
    job = yaml.safe_load(path.read_text())
    job["outputs"]["dir"] = f"{bucket}/manifest"
    path.write_text(yaml.safe_dump(job))
    with caplog.at_level(logging.INFO, logger="werkzeug"):  # the server's own log of requests
        run, _ = finish(path)
    requests = [m for r in caplog.records if (m := r.getMessage()) and run.name in m]
    assert any("PUT" in line and "scene1/labels.tif" in line for line in requests)
    got = [line.split("GET ")[1].split()[0] for line in requests if "GET " in line]
    read = {path.rpartition(f"{run.name}/")[2] for path in got if "?" not in path}  # the others list
    assert read == {"scenes/scene1/manifest.json", "scenes/scene2/manifest.json"}
    store = open_store(run.location)
    there = {meta["path"] for chunk in store.list() for meta in chunk}
    assert set(listed(run)["files"]) == there - {"run.json", "manifest.json"}
    assert check_manifest(run.location) == []
    store.put("scenes/scene1/labels.tif", b"other")
    store.delete("scenes/scene2/item.json")
    labels, item = check_manifest(run.location)
    assert labels.startswith("scenes/scene1/labels.tif: found 5 bytes, was ")
    assert item == "scenes/scene2/item.json: missing"


def test_large_files_are_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(128 * 2**20)
    tracemalloc.start()
    mark = hash_file(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    said = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert mark.sha256 == said.stdout.split()[0]
    assert most < 2**25  # other threads count too
