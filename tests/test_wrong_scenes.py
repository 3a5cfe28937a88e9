"""Wrong scenes (exit code 1) fail alone: the others are done, and each is told in a line and in the tables.

Run with ``-s`` to read the messages.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import rasterio
from world import OBLIQUE, PIXEL, World, command, nearest_label, only_run, raster_pixels, write_raster


def write_scenes(world: World, folder: Path) -> tuple[list[str], Path]:
    """Three scenes that are right, one beside all districts, and seven that are not, with references."""
    names: dict[str, Any] = {"names": ("red", "nir"), "nodata": 0}
    tiles: dict[str, Any] = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "lzw"}
    elsewhere = rasterio.Affine(PIXEL, 0, 900_000, 0, -PIXEL, 4_000_000)
    scenes, truth = folder / "scenes", folder / "truth"
    pixels = world.pixels()
    write_raster(scenes / "first.tif", pixels, **names)
    (scenes / "empty.tif").touch()
    (scenes / "text.tif").write_text("not a picture\n")
    damaged = write_raster(scenes / "damaged.tif", raster_pixels(512, 512, 4), **tiles, **names)
    data = bytearray(damaged.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = b"\xff" * 4000
    damaged.write_bytes(data)
    write_raster(scenes / "names.tif", pixels, names=("red", "green"), nodata=0)
    write_raster(scenes / "bands.tif", np.concatenate([pixels, pixels[:1]]), nodata=0)
    write_raster(scenes / "shape.tif", pixels, **names)
    write_raster(scenes / "far.tif", pixels, transform=elsewhere, **names)
    write_raster(scenes / "last.tif", world.pixels(2), **names)
    right = world.reference()[np.newaxis]
    for name in ("first", "empty", "text", "names", "bands"):
        write_raster(truth / f"{name}.tif", right)
    write_raster(truth / "damaged.tif", np.ones((1, 512, 512), np.uint8))
    write_raster(truth / "shape.tif", right[:, :-1])
    write_raster(truth / "far.tif", right, transform=elsewhere)
    write_raster(truth / "last.tif", world.reference(2)[np.newaxis])
    order = ("first", "missing", "empty", "text", "damaged", "names", "bands", "shape", "far", "last")
    return [str(scenes / f"{name}.tif") for name in order], truth


WRONG_SCENES = {
    "missing": ["{scenes}/missing.tif: no such file"],
    "empty": ["{scenes}/empty.tif: the file is empty (0 bytes)"],
    "text": ["{scenes}/text.tif: cannot be opened: ", "not recognized as being in a supported file format"],
    "damaged": ["{scenes}/damaged.tif: cannot be read: "],
    "names": ["bands: the scene has no nir; it has red, green", "asks for nir, red", "the job's `bands`"],
    "bands": ["bands: the scene has 3 unnamed bands", "asks for 2 (nir, red)"],
    "shape": [
        "not measured: reference: reference {truth}/shape.tif lies on another grid",
        "the scene's shape is (72, 96), the other's (71, 96)",
    ],
}
FAR = ["districts.geojson: none of its 2 regions touches the scene", "x 900000 to 902880"]
"""What is noted of the scene beside all districts, which is done without data of them."""


def districts(labels: np.ndarray) -> dict[tuple[str, int], float]:
    """Area in m² by district and class, counted here: one column of ``south east`` counts half."""
    half = np.ones(labels.shape[1] - 48)
    half[0] = 0.5
    counted = {}
    for value in (0, 1, 2):
        counted["scene", value] = float((labels == value).sum()) * PIXEL**2
        counted["north", value] = float((labels[:40] == value).sum()) * PIXEL**2
        counted["south east", value] = float(((labels[40:, 48:] == value) * half).sum()) * PIXEL**2
    return counted


def test_a_wrong_scene_fails_alone_and_is_told_everywhere(
    world: World, server: str, tmp_path: Path, messages: list[tuple[str, int, str]]
) -> None:
    scenes, truth = write_scenes(world, tmp_path)
    out = tmp_path / "out"
    regions = {"path": str(world / "districts.geojson"), "name": "district"}
    job = world.job(out, scenes=scenes, reference={"path": str(truth)}, regions=regions)
    ended = command("run", str(job), api=server)
    assert ended.code == 1, ended
    assert "Traceback" not in ended.out + ended.err
    lines = dict(line.removeprefix("failed: ").split(": ", 1) for line in ended.errors)
    assert list(lines) == list(WRONG_SCENES)  # one line each, in the order of the job
    for name, words in WRONG_SCENES.items():
        messages.append((f"scene: {name}", 1, f"failed: {name}: {lines[name]}"))
        for word in words:
            assert word.format(scenes=tmp_path / "scenes", truth=truth) in lines[name]
    assert ended.out.splitlines()[0] == "trial: 3 of 10 scenes done"

    run = only_run(out)
    rows = pd.read_csv(run / "regions.csv", keep_default_na=False, na_values=[""])
    for name, seed in (("first", 1), ("last", 2)):
        mine = rows[rows["scene"] == name]
        assert set(mine["state"]) == {"measured"}
        found = {(r["region"], r["value"]): r["area_m2"] for r in mine.to_dict("records")}
        assert found == districts(world.labels(seed))
    metrics = pd.read_csv(run / "metrics.csv", keep_default_na=False, na_values=[""])
    for name in WRONG_SCENES:
        compared = metrics[metrics["scene"] == name]
        assert set(compared["state"]) == {"failed"}
        assert set(compared["reason"]) == {lines[name].removeprefix("not measured: reference: ")}
        assert compared["iou"].isna().all()
        mine = rows[rows["scene"] == name]
        if name == "shape":  # its areas need no reference
            assert set(mine["state"]) == {"measured"}
            continue
        assert list(mine["class"]) == ["ground", "crop", "water"]
        assert set(mine["state"]) == {"failed"}
        assert mine[["count", "area_m2", "share"]].isna().all(axis=None)
    beside = rows[rows["scene"] == "far"].set_index("region")["state"]
    assert {region: beside[region].unique().tolist() for region in beside.index.unique()} == {
        "scene": ["measured"], "north": ["no_data"], "south east": ["no_data"],
    }  # fmt: skip

    record = json.loads((run / "run.json").read_text())
    states = {s["name"]: (s["state"], s["error"]) for s in record["scenes"]}
    assert states == {
        **{n: ("failed", lines[n]) for n in WRONG_SCENES},
        **dict.fromkeys(("first", "far", "last"), ("done", "")),
    }
    (notes,) = (" ".join(s["notes"]) for s in record["scenes"] if s["name"] == "far")
    assert all(word in notes for word in FAR)
    page = (run / "report.html").read_text()
    for name in WRONG_SCENES:
        assert name in page


def test_a_truncated_volume_fails_alone(
    world: World, server: str, tmp_path: Path, messages: list[tuple[str, int, str]]
) -> None:
    whole = (world / "volume.nii.gz").read_bytes()
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    (scenes / "a_truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (scenes / "b_header.nii.gz").write_bytes(whole[:60])
    (scenes / "c_empty.nii.gz").touch()
    shutil.copy(world / "scene1.tif", scenes / "d_raster.tif")
    shutil.copy(world / "volume.nii.gz", scenes / "e_right.nii.gz")
    job = world.job(tmp_path / "out", card="nearest-volume", scenes=[f"{scenes}/*"])
    ended = command("run", str(job), api=server)
    assert ended.code == 1, ended
    assert "Traceback" not in ended.out + ended.err
    lines = dict(line.removeprefix("failed: ").split(": ", 1) for line in ended.errors)
    for name, line in lines.items():
        messages.append((f"volume: {name}", 1, f"failed: {name}: {line}"))
    assert list(lines) == ["a_truncated", "b_header", "c_empty", "d_raster"]
    assert lines["a_truncated"] == (
        f"block 00000.00000.00000: {scenes}/a_truncated.nii.gz: "
        "truncated: the file ends before its last voxel"
    )
    assert lines["b_header"].startswith(f"{scenes}/b_header.nii.gz: ")
    assert lines["c_empty"] == f"{scenes}/c_empty.nii.gz: the file is empty (0 bytes)"
    assert lines["d_raster"] == "the scene is a raster, the card 'nearest-volume' is for a volume"
    rows = pd.read_csv(only_run(tmp_path / "out") / "regions.csv")
    states = rows.groupby("scene", sort=False)["state"].unique().map(list).to_dict()
    assert states == {**{name: ["failed"] for name in lines}, "e_right": ["measured"]}
    counts = np.bincount(nearest_label(world.voxels()).ravel(), minlength=3)
    right = rows[rows["scene"] == "e_right"]
    assert list(right["count"]) == list(counts)
    voxel = abs(np.linalg.det(OBLIQUE[:3, :3]))
    np.testing.assert_allclose(right["volume_mm3"], counts * voxel, rtol=1e-6)
