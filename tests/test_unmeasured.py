"""What cannot be measured of a scene does not withhold its map; once the cause is gone it is measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
from world import Ended, World, only_run, polygon, write_polygons, write_raster

Here = Callable[..., Ended]


@dataclass(frozen=True)
class Case:
    """A job with something that cannot be measured, and how that is mended."""

    fields: dict[str, Any]
    mend: Callable[[], Any]
    told: str
    """What the line of the scene says."""
    part: str
    failed: dict[str, set[str]]
    """Table to the regions whose rows are failed; all others are measured."""
    scene: Path | None = None


def other_grid(world: World, folder: Path) -> Case:
    truth = folder / "truth.tif"
    right = world.reference()[np.newaxis]
    write_raster(truth, right[:, :-1])
    told = "lies on another grid"
    mend = lambda: write_raster(truth, right)  # noqa: E731
    return Case({"reference": {"path": str(truth)}}, mend, told, "reference", {"metrics": {"scene"}})


def unreadable_reference(world: World, folder: Path) -> Case:
    truth = write_raster(folder / "truth.tif", world.reference()[np.newaxis], compress="deflate")
    whole = truth.read_bytes()
    truth.write_bytes(whole[: len(whole) // 2])
    fields = {"reference": {"path": str(truth)}, "measure": {"surface": True}}
    failed = {"metrics": {"scene"}, "surface": set()}
    return Case(fields, lambda: truth.write_bytes(whole), "truth.tif", "reference", failed)


def region_ids_below_zero(world: World, folder: Path) -> Case:
    atlas, ids = folder / "atlas.tif", np.ones((1, *world.raster_shape), np.int16)
    write_raster(atlas, -ids)
    fields = {"regions": {"path": str(atlas)}, "measure": {"intensity": True}}
    mend = lambda: write_raster(atlas, ids)  # noqa: E731
    return Case(fields, mend, "region ids are 0 or more", "regions", {"regions": {""}, "intensity": {""}})


def damaged_polygon(world: World, folder: Path) -> Case:
    path, whole = (
        folder / "districts.geojson",
        [polygon("north", (0, 40), (0, 96)), polygon("south", (40, 72), (0, 96))],
    )
    broken = json.loads(json.dumps(whole[1]))
    broken["geometry"]["coordinates"][0][1][0] = float("nan")
    write_polygons(path, whole[0], broken)
    fields = {"regions": {"path": str(path), "name": "district"}, "reference": {"path": str(world / "truth")}}
    failed = {"regions": {"south"}, "metrics": {"south"}}
    return Case(fields, lambda: write_polygons(path, *whole), "not finite in south", "regions", failed)


def no_pixel_area(world: World, folder: Path) -> Case:
    scene, pixels = folder / "scene1.tif", world.pixels()
    profile: dict[str, Any] = {"names": ("red", "nir"), "nodata": 0}
    turned = rasterio.Affine(1e-4, 1e-5, -81.0, 1e-5, -1e-4, 36.0)
    write_raster(scene, pixels, crs="EPSG:4326", transform=turned, **profile)
    fields = {"scenes": [str(scene)], "measure": {"intensity": True}}
    mend = lambda: write_raster(scene, pixels, **profile)  # noqa: E731
    failed = {"regions": {""}, "intensity": {""}}
    return Case(fields, mend, "no single pixel area", "size", failed, scene)


CASES = [unreadable_reference, damaged_polygon, no_pixel_area]


def tables(run: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(run / f"{name}.csv", keep_default_na=False, na_values=[])


@pytest.mark.parametrize("make", CASES)
def test_what_cannot_be_measured_does_not_withhold_the_map(
    world: World, here: Here, tmp_path: Path, make: Callable[[World, Path], Case]
) -> None:
    case = make(world, tmp_path)
    out = tmp_path / "out"
    job = world.job(out, **{**case.fields, "outputs": {"keep": []}})
    ended = here("run", "--local", str(job))
    assert ended.code == 1, ended
    (line,) = ended.errors
    assert line.startswith(f"failed: scene1: not measured: {case.part}: ")
    assert case.told in line
    run = only_run(out)
    (scene,) = json.loads((run / "run.json").read_text())["scenes"]
    assert any(case.told in note for note in scene["notes"])
    with rasterio.open(run / scene["files"]["labels"]) as dataset:
        assert (dataset.read(1) == world.labels()).all()
    listed = json.loads((run / "manifest.json").read_text())["files"]
    assert set(scene["files"].values()) <= set(listed)
    for name, regions in case.failed.items():
        table = tables(run, name)
        of = table["region"] if "region" in table else pd.Series("", index=table.index)
        failed = table["state"] == "failed"
        assert failed.any()
        assert set(of[failed]) == (regions or {""})
        numbers = [c for c in table.columns if c in ("count", "area_m2", "iou", "n", "assd_voxel", "seen")]
        assert numbers
        assert (table.loc[failed, numbers] == "").all(axis=None)
    first = [p for p in (out / ".segpipe").rglob("*") if "predict" in p.name]

    case.mend()
    again = here("run", "--local", str(job))
    assert (again.code, again.errors) == (0, []), again
    record = json.loads(
        (max((out / "trial").iterdir(), key=lambda p: p.stat().st_mtime) / "run.json").read_text()
    )
    (scene,) = record["scenes"]
    assert (scene["state"], scene["unmeasured"]) == ("done", {})
    assert case.scene is not None or "predict" in scene["reused"], (scene["reused"], first)


def test_a_tile_that_no_region_touches_is_done_without_data(world: World, here: Here, tmp_path: Path) -> None:
    far = write_polygons(tmp_path / "far.geojson", polygon("far", (900, 940), (0, 40)))
    job = world.job(tmp_path / "out", regions={"path": str(far), "name": "district"})
    ended = here("run", "--local", str(job))
    assert (ended.code, ended.errors) == (0, []), ended
    run = only_run(tmp_path / "out")
    table = tables(run, "regions")
    assert set(table.loc[table["region"] == "far", "state"]) == {"no_data"}
    assert set(table.loc[table["region"] == "scene", "state"]) == {"measured"}
    (scene,) = json.loads((run / "run.json").read_text())["scenes"]
    assert any("none of its 1 regions touches the scene" in note for note in scene["notes"])


def test_a_layer_without_a_sound_polygon_is_refused(world: World, here: Here, tmp_path: Path) -> None:
    broken = polygon("north", (0, 40), (0, 96))
    broken["geometry"]["coordinates"][0][1][0] = float("inf")
    layer = write_polygons(tmp_path / "districts.geojson", broken)
    job = world.job(tmp_path / "out", regions={"path": str(layer), "name": "district"})
    ended = here("run", "--local", str(job))
    (line,) = ended.errors
    assert "every polygon has vertices that are not finite" in line
    assert ended.code in (1, 2)
