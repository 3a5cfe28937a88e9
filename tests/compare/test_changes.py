"""Two runs held against each other: numbers by numpy from pixels, or by pandas from the runs' tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from world import (
    OBLIQUE,
    PIXEL,
    World,
    nearest_label,
    polygon,
    write_polygons,
    write_raster,
    write_volume,
    write_yaml,
)

from segpipe.report.comparison import headline
from segpipe.runs.compare import compare_runs
from tests.compare.tools import NAMES, SHIFT, layers, read, run_job

# ------------------------------------------------------------------ numbers


def test_changes_are_those_of_the_pixels(runs: tuple[Path, Path], world: World) -> None:
    """The oracle is numpy on the scenes' pixels: no code of ours but the model's rule, written anew."""
    found = compare_runs(str(runs[0]), str(runs[1]))
    assert found.location == f"{runs[1]}/compare-{runs[0].name}"
    assert found.warnings == ()
    table = read(found.location).set_index(["scene", "region", "class"])
    boxes = {"scene": np.s_[:, :], "north": np.s_[:40, :]}
    for seed in (1, 2):
        nir, truth = world.pixels(seed)[1].astype(float), world.reference(seed)
        old, new = nearest_label(nir), nearest_label(nir - SHIFT)
        for region, box in boxes.items():
            valid = nir[box] > 0
            for value, name in enumerate(NAMES):
                row = table.loc[f"scene{seed}", region, name]
                areas = [float(((m[box] == value) & valid).sum()) * PIXEL**2 for m in (old, new)]
                assert [row["area_m2_before"], row["area_m2_after"]] == areas
                assert row["area_m2_change"] == areas[1] - areas[0] != 0
                assert row["relative_change"] == pytest.approx(areas[1] / areas[0] - 1, rel=1e-12)
                true = (truth[box] == value) & valid
                mine = [(m[box] == value) & valid for m in (old, new)]
                iou = [(m & true).sum() / (m | true).sum() for m in mine]
                dice = [2 * (m & true).sum() / (m.sum() + true.sum()) for m in mine]
                assert row["iou_change"] == pytest.approx(iou[1] - iou[0], rel=1e-12)
                assert row["dice_change"] == pytest.approx(dice[1] - dice[0], rel=1e-12)
                assert row["state"] == "both"


def test_every_row_is_the_merge_of_the_runs_tables(runs: tuple[Path, Path]) -> None:
    found = compare_runs(str(runs[0]), str(runs[1]))
    table, key = read(found.location), ["scene", "region", "class"]
    for name, columns in (
        ("regions", ["count", "area_m2", "seen"]),
        ("metrics", ["tp", "fp", "fn", "iou", "dice"]),
    ):
        sides = [read(run, name)[[*key, *columns]] for run in runs]
        wanted = sides[0].merge(sides[1], on=key, how="outer", suffixes=("_before", "_after"))
        mine = wanted[key].merge(table, on=key, how="left")
        assert len(mine) == len(table) == len(wanted) == 2 * 3 * 3
        for column in columns:
            for side in ("before", "after"):
                np.testing.assert_array_equal(mine[f"{column}_{side}"], wanted[f"{column}_{side}"])
        for column in set(columns) & {"count", "area_m2", "iou", "dice"}:
            change = wanted[f"{column}_after"] - wanted[f"{column}_before"]
            np.testing.assert_array_equal(mine[f"{column}_change"], change)
    pd.testing.assert_frame_equal(
        table.fillna({"reason": ""}),
        pd.read_parquet(f"{found.location}/compare.parquet"),
        check_dtype=False,
    )


def test_totals_are_sums_over_whole_scenes_and_pooled_counts(runs: tuple[Path, Path]) -> None:
    found = compare_runs(str(runs[0]), str(runs[1]))
    totals = found.totals.set_index("class")
    assert list(totals.index) == NAMES
    assert set(totals["scenes"]) == {2}
    for side, run in zip(("before", "after"), runs, strict=True):
        regions, metrics = (read(run, name).query("region == 'scene'") for name in ("regions", "metrics"))
        areas = regions.groupby("class")["area_m2"].sum()
        counts = metrics.groupby("class")[["tp", "fp", "fn"]].sum()
        for name in NAMES:
            tp, fp, fn = counts.loc[name]
            assert totals.loc[name, side] == areas[name]
            assert totals.loc[name, f"iou_{side}"] == pytest.approx(tp / (tp + fp + fn), rel=1e-12)
            assert totals.loc[name, f"dice_{side}"] == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-12)
    np.testing.assert_array_equal(totals["change"], totals["after"] - totals["before"])
    np.testing.assert_allclose(totals["relative"], totals["after"] / totals["before"] - 1, rtol=1e-12)


def test_a_run_against_itself_is_all_zeros(runs: tuple[Path, Path], tmp_path: Path) -> None:
    found = compare_runs(str(runs[0]), f"{runs[0]}/", str(tmp_path / "same"))
    table = read(tmp_path / "same")
    changes = [c for c in table if c.endswith("_change")]
    assert len(changes) == 5  # count, area, relative, IoU, Dice
    assert (table[changes] == 0).all(axis=None)
    assert (found.differences, found.warnings, len(found.changed)) == ((), (), 0)
    assert found.notes[0] == "The two are the same run."
    assert {p.name for p in (tmp_path / "same").iterdir()} == {
        "compare.csv", "compare.parquet", "compare.html"
    }  # fmt: skip


def test_a_change_from_nothing_has_no_ratio_and_says_so(world: World, shifted: Path, tmp_path: Path) -> None:
    """Districts of one pixel: the class that it has is 1 pixel, the others are 0."""
    nir = world.pixels()[1].astype(float)
    old, new = nearest_label(nir), nearest_label(nir - SHIFT)
    row, column = np.argwhere((old == 1) & (new == 0) & (nir > 0))[0]
    far = (500, 501)
    layer = write_polygons(
        tmp_path / "pixels.geojson",
        polygon("changed", (row, row + 1), (column, column + 1)),
        polygon("corner", (2, 3), (2, 3)),  # no data there
        polygon("elsewhere", far, far),
    )
    fields = layers(world, regions={"path": str(layer), "name": "district"})
    before = run_job(world.job(tmp_path / "a", **fields))
    after = run_job(world.job(tmp_path / "b", **fields, model=str(shifted)))
    table = read(compare_runs(str(before), str(after)).location).set_index(["region", "class"])
    ground, crop, water = (table.loc["changed", name] for name in NAMES)
    area = PIXEL**2
    assert (ground["area_m2_before"], ground["area_m2_after"], ground["area_m2_change"]) == (0, area, area)
    assert np.isnan(ground["relative_change"])
    assert ground["reason"].startswith("relative change: 0 before")
    assert (crop["area_m2_change"], crop["relative_change"]) == (-area, -1)
    assert water["area_m2_change"] == 0
    assert np.isnan(water["relative_change"])
    assert np.isnan(water["iou_change"])  # one pixel of reference, and it is not water in any of the three
    assert "IoU before: absent in both; IoU after: absent in both" in water["reason"]
    for region in ("corner", "elsewhere"):
        rows = table.loc[region]
        assert set(rows["state"]) == {"no_data"}
        assert rows[["area_m2_before", "area_m2_after", "area_m2_change"]].isna().all(axis=None)
        words = "no valid element in the region"
        assert set(rows["reason"]) == {f"before: {words}; after: {words}"}


# ------------------------------------------------------------------ what is not there


def test_a_scene_of_one_run_stays_with_its_state_and_out_of_the_totals(
    runs: tuple[Path, Path], world: World, shifted: Path, tmp_path: Path
) -> None:
    one = run_job(world.job(tmp_path / "one", model=str(shifted), **layers(world)))
    for order, state, lack in (
        ((runs[0], one), "only_before", "after"),
        ((one, runs[0]), "only_after", "before"),
    ):
        found = compare_runs(*map(str, order))
        table = read(found.location)
        assert table.groupby("scene")["state"].agg(set).to_dict() == {"scene1": {"both"}, "scene2": {state}}
        gone = table[table["scene"] == "scene2"]
        assert set(gone[f"state_{lack}"]) == {"no_scene"}
        assert set(gone["reason"]) == {f"{lack}: the run has no such scene"}
        assert gone["area_m2_change"].isna().all()
        has = "before" if lack == "after" else "after"
        own = read(runs[0], "regions").query("scene == 'scene2'")
        np.testing.assert_array_equal(gone[f"area_m2_{has}"], own["area_m2"])
        assert set(found.totals["scenes"]) == {1}
        assert f"other scenes: 1 only {has}: scene2" in found.warnings


def test_a_failed_scene_is_told_row_by_row(runs: tuple[Path, Path], world: World, tmp_path: Path) -> None:
    torn = tmp_path / "scene2.tif"
    torn.write_text("no raster")
    some = run_job(
        world.job(tmp_path / "some", scenes=[str(world / "scene1.tif"), str(torn)], **layers(world))
    )
    assert [s["state"] for s in json.loads((some / "run.json").read_text())["scenes"]] == ["done", "failed"]
    for order, state in (((runs[0], some), "failed_after"), ((some, runs[0]), "failed_before")):
        found = compare_runs(*map(str, order))
        gone = read(found.location).query("scene == 'scene2'")
        assert set(gone["state"]) == {state}
        assert list(gone["region"].unique()) == ["scene", "north", "south east"]
        side = state.removeprefix("failed_")
        assert f"1 scenes failed {side}: scene2" in found.warnings
        assert set(gone["reason"]) == {f"{side}: the scene failed"}
        assert (found.totals["change"] == 0).all()
    both = compare_runs(str(some), str(some), str(tmp_path / "both"))
    assert set(both.rows.query("scene == 'scene2'")["state"]) == {"failed_both"}


def test_a_class_that_only_one_model_has(world: World, runs: tuple[Path, Path], tmp_path: Path) -> None:
    known = yaml.safe_load((world.models / "nearest.yaml").read_text())
    known["classes"][2]["name"] = "lake"
    known["weights"] = str(world.models / "nearest.pt")
    other = write_yaml(tmp_path / "lakes.yaml", known)
    after = run_job(world.job(tmp_path / "run", **layers(world, model=str(other))))
    found = compare_runs(str(runs[0]), str(after))
    states = found.rows.query("scene == 'scene1'").groupby("class")["state"].agg(set).to_dict()
    assert states == {"ground": {"both"}, "crop": {"both"}, "water": {"only_before"}, "lake": {"only_after"}}
    assert "other classes: only before: water; only after: lake" in found.warnings
    assert set(found.totals["class"]) == {"ground", "crop"}


def test_of_given_labels_a_value_that_is_not_found_is_zero(world: World, tmp_path: Path) -> None:
    """Without a list of classes these are the values found: 1 and 3 before, 1 after."""
    labels = np.ones((2, 72, 96), np.uint8)
    labels[0, :10, :20] = 3
    made = []
    for i in range(2):
        file = write_raster(tmp_path / f"labels{i}.tif", labels[i : i + 1])
        made.append(run_job(world.job(tmp_path / f"run{i}", model=None, labels=str(file))))
    found = compare_runs(str(made[0]), str(made[1]))
    table = found.rows.set_index("class")
    assert set(table["state"]) == {"both"}
    assert table.loc["3", "area_m2_change"] == -200 * PIXEL**2
    assert table.loc["3", "relative_change"] == -1
    assert table.loc["1", "area_m2_change"] == 200 * PIXEL**2
    assert set(table["reason"]) == {"IoU before: no reference; IoU after: no reference"}
    back = compare_runs(str(made[1]), str(made[0])).rows.set_index("class").loc["3"]
    assert (back["area_m2_before"], back["area_m2_change"]) == (0, 200 * PIXEL**2)


def test_volumes_are_compared_in_millilitres(world: World, tmp_path: Path) -> None:
    """Two label maps of a volume: 300 and 345 voxels on an oblique affine."""
    voxel = abs(np.linalg.det(OBLIQUE[:3, :3]))
    made = []
    for i, size in enumerate((300, 345)):
        labels = np.zeros(world.volume_shape, np.uint8)
        labels.reshape(-1)[4000 : 4000 + size] = 1
        file = write_volume(tmp_path / f"labels{i}.nii.gz", labels)
        fields = {"model": None, "labels": str(file), "scenes": [str(world / "volume.nii.gz")]}
        made.append(run_job(world.job(tmp_path / f"run{i}", **fields)))
    found = compare_runs(str(made[0]), str(made[1]))
    row = found.rows.set_index("class").loc["1"]
    assert row["volume_mm3_change"] == pytest.approx(45 * voxel, rel=1e-6)
    assert row["relative_change"] == pytest.approx(0.15, rel=1e-12)
    assert found.warnings == ()
    line = headline(found)[2].split()
    assert line == [
        "1",
        f"{0.3 * voxel:.2f}",
        "→",
        f"{0.345 * voxel:.2f}",
        "mL",
        f"+{0.045 * voxel:.2f}",
        "+15.0",
        "%",
    ]


# ------------------------------------------------------------------ like with like


def test_another_grid_under_the_same_name_is_warned_of(
    world: World, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    import rasterio

    for name, transform, words in (
        (
            "shifted",
            rasterio.Affine(PIXEL, 0, 500_300.0, 0, -PIXEL, 4_000_000.0),
            "in both, at another place",
        ),
        (
            "coarse",
            rasterio.Affine(60, 0, 500_000.0, 0, -60, 4_000_000.0),
            "30 × 30 m, WGS 84 / UTM zone 17N → ",
        ),
    ):
        scene = write_raster(
            tmp_path / name / "scene1.tif", world.pixels(),
            names=("red", "nir"), nodata=0, transform=transform,
        )  # fmt: skip
        after = run_job(world.job(tmp_path / f"run-{name}", scenes=[str(scene)]))
        warnings = compare_runs(str(runs[0]), str(after)).warnings
        [line] = [w for w in warnings if w.startswith("scene scene1: other geometry: 72 × 96, 30 × 30 m")]
        assert words in line
        assert any(
            w.startswith("1 scenes of the same name come from another file: scene1") and str(scene) in w
            for w in warnings
        )


def test_another_layer_or_reference_is_warned_of(world: World, tmp_path: Path) -> None:
    """Whether under another path, or changed in place."""
    layer, truth = tmp_path / "districts.geojson", tmp_path / "truth.tif"
    made = []
    for i, rows in enumerate((40, 41)):
        write_polygons(layer, polygon("north", (0, rows), (0, 96)), *([polygon("new", (0, 9), (0, 9))] * i))
        reference = world.reference()
        reference[50, :] = i
        write_raster(truth, reference[np.newaxis])
        fields = {
            "regions": {"path": str(layer), "name": "district"}, "reference": {"path": str(truth)}
        }  # fmt: skip
        made.append(run_job(world.job(tmp_path / f"run{i}", **fields)))
    warnings = compare_runs(str(made[0]), str(made[1])).warnings
    seen = [1 - 9 * 12 / (rows * 96) for rows in (40, 41)]
    assert seen[0] != seen[1]  # so the seen part is told too
    assert [w.split(":")[0] for w in warnings] == [
        "1 regions are in one run only",
        "1 regions have another size",
        "1 regions are seen to another part",
        f"{len(NAMES) + 2} rows have another amount of reference (tp + fn)",
    ], warnings
    plain = run_job(world.job(tmp_path / "plain"))
    told = compare_runs(str(made[0]), str(plain)).warnings
    assert f"other region layer: {layer}, district → none" in told
    assert f"other reference: {truth} → none" in told


def test_what_differs_is_told_key_by_key(runs: tuple[Path, Path]) -> None:
    found = compare_runs(str(runs[0]), str(runs[1]))
    told = {d.key: (d.before, d.after) for d in found.differences}
    records = [json.loads((run / "run.json").read_text()) for run in runs]
    assert told["model"] == ("nearest", "shifted")
    assert told["job.tiling.blend"] == ("trim", "gaussian")
    jobs = [{**r["job"], "outputs": None, "model": None} for r in records]
    assert {k for k in jobs[0] if jobs[0][k] != jobs[1][k]} == {"tiling"}
    expected = {"model", "model.weights", "job.model", "job.tiling.blend", "job.outputs.dir"}
    assert set(told) == expected  # the weights' bytes, classes and versions are the same
    assert found.notes == (
        "Label maps: another key in 2 of 2 scenes done in both runs.",
        "Measurements (labels, regions, reference): another key in 2 of 2 scenes done in both runs.",
    )
