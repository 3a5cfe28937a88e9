"""Two runs held against each other: numbers by numpy from pixels, or by pandas from the runs' tables."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from world import (
    OBLIQUE,
    PIXEL,
    Ended,
    World,
    card,
    nearest_label,
    polygon,
    write_polygons,
    write_raster,
    write_volume,
    write_yaml,
)

from segpipe.compare import compare_runs
from segpipe.config import load_job
from segpipe.deliver import attempts_of, done_record, export_scene, failed_record
from segpipe.errors import RequestError, SegpipeError
from segpipe.labelled import prepare_labelled
from segpipe.measure import measure_scene
from segpipe.report.comparison import headline
from segpipe.request import check_request
from segpipe.run import finish_run, open_run
from segpipe.scene import create_stages, prepare_scene
from segpipe.steps import finish_labels, predict_blocks

NAMES = ["ground", "crop", "water"]
SHIFT = 20.0
"""Counts by which the second model's thresholds are higher."""
EVIL = "<script>alert('x')</script>"


def run_job(path: Path) -> Path:
    """A run made by the library alone, scene by scene."""
    job = load_job(path)
    request = check_request(job)
    run, _ = open_run(job, request.mark)
    records = []
    for ref in request.scenes:
        try:
            if job.labels:
                scene = prepare_labelled(job, ref)
            else:
                scene = create_stages(prepare_scene(job, ref, request.settings))
                predict_blocks(scene, list(scene.plan.blocks.indices()), run.name)
                finish_labels(scene)
            measured, done = measure_scene(scene, run.name)
            files = export_scene(scene, measured, run)
            records.append(done_record(scene, measured, files, {"measure": done}, attempts_of(scene)))
        except SegpipeError as error:
            records.append(failed_record(ref, str(error)))
    finish_run(run, job, request.settings, records)
    return Path(run.location)


@pytest.fixture(scope="module")
def shifted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A card as `nearest`, whose thresholds lie `SHIFT` counts higher."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(world.models / "nearest.pt", folder / "shifted.pt")
    known = yaml.safe_load((world.models / "nearest.yaml").read_text())
    counts = [{"op": "subtract", "value": [100.0 + SHIFT]}, {"op": "divide", "value": [50.0]}]
    known["input"]["normalisation"] = counts
    fields = {key: known[key] for key in ("input", "window")}
    return write_yaml(folder / "shifted.yaml", card("shifted", "raster", **fields))


def layers(world: World, **more: Any) -> dict[str, Any]:
    """Job keys of two districts and the reference."""
    return {
        "regions": {"path": str(world / "districts.geojson"), "name": "district"},
        "reference": {"path": str(world / "truth")},
        **more,
    }


@pytest.fixture(scope="module")
def runs(world: World, shifted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both scenes by either model."""
    out = tmp_path_factory.mktemp("runs")
    scenes = [str(world / f"scene{seed}.tif") for seed in (1, 2)]
    before = run_job(world.job(out / "a", scenes=scenes, **layers(world)))
    more = {"model": str(shifted), "tiling": {"blend": "gaussian"}}
    return before, run_job(world.job(out / "b", scenes=scenes, **layers(world, **more)))


def read(folder: Path | str, name: str = "compare") -> pd.DataFrame:
    return pd.read_csv(Path(folder) / f"{name}.csv", keep_default_na=False, na_values=[""])


def tokens(page: str) -> tuple[list[tuple[str, dict[str, str | None]]], dict[str, list[list[str]]]]:
    """Tags of a page, and the texts of its tables' rows by the tables' ids."""
    tags: list[tuple[str, dict[str, str | None]]] = []
    tables: dict[str, list[list[str]]] = {}

    class Reader(HTMLParser):
        cell = False

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, dict(attrs)))
            if tag == "table":
                tables[str(dict(attrs)["id"])] = []
            elif tag == "tr":
                list(tables.values())[-1].append([])
            elif tag in ("td", "th"):
                list(tables.values())[-1][-1].append("")
                self.cell = True

        def handle_endtag(self, tag: str) -> None:
            self.cell = self.cell and tag not in ("td", "th")

        def handle_data(self, data: str) -> None:
            if self.cell:
                list(tables.values())[-1][-1][-1] += data

    Reader().feed(page)
    return tags, tables


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
    truth = tmp_path / "truth"
    truth.mkdir()
    shutil.copy(world / "truth" / "scene1.tif", truth)
    scenes = [str(world / f"scene{seed}.tif") for seed in (1, 2)]
    some = run_job(
        world.job(tmp_path / "some", scenes=scenes, **layers(world, reference={"path": str(truth)}))
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


# ------------------------------------------------------------------ page and lines


def test_the_page_has_the_biggest_change_first_and_loads_nothing(runs: tuple[Path, Path]) -> None:
    found = compare_runs(str(runs[0]), str(runs[1]))
    tags, tables = tokens(Path(found.page).read_text())
    heads, *rows = tables["changes-area_m2-table"]
    assert heads[3:7] == ["Area before (ha)", "Area after (ha)", "Change (ha)", "Relative (%)"]
    table = read(found.location)
    order = table["area_m2_change"].abs().sort_values(ascending=False, kind="stable").index
    wanted = table.loc[order]
    assert [row[:3] for row in rows] == wanted[["scene", "region", "class"]].to_numpy().tolist()
    shown = [float(row[5].replace(",", "")) for row in rows]
    np.testing.assert_allclose(shown, wanted["area_m2_change"] / 1e4, atol=0.05)
    assert all(row[5][0] in "+-" for row in rows)
    links = [a.get(k) for _, a in tags for k in ("src", "href") if a.get(k)]
    assert all(link.startswith(("#", "./compare.", "data:")) for link in links)
    policy = next(a["content"] for t, a in tags if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert tables["differences-table"][1][:3] == ["model", "nearest", "shifted"]


def test_nothing_in_a_page_is_read_as_html(world: World, shifted: Path, tmp_path: Path) -> None:
    layer = write_polygons(tmp_path / "evil.geojson", polygon(EVIL, (0, 40), (0, 96)))
    fields: dict[str, Any] = {"regions": {"path": str(layer), "name": "district"}, "description": EVIL}
    before = run_job(world.job(tmp_path / "a", **fields))
    after = run_job(world.job(tmp_path / "b", **fields, model=str(shifted)))
    page = Path(compare_runs(str(before), str(after)).page).read_text()
    tags, tables = tokens(page)
    assert [t for t, _ in tags].count("script") == 1
    assert EVIL not in page
    assert html.escape(EVIL, quote=True).replace("&#x27;", "&#39;") in page
    assert EVIL in {row[1] for row in tables["changes-area_m2-table"]}


def test_the_last_lines_are_the_classes_and_the_page(runs: tuple[Path, Path]) -> None:
    found = compare_runs(str(runs[0]), str(runs[1]))
    first, *classes, last = headline(found)
    assert first == f"{runs[0].name} → {runs[1].name}: 2 scenes, 18 rows compared, 18 changed"
    assert last == f"comparison: {runs[1]}/compare-{runs[0].name}/compare.html"
    areas = [
        read(run, "regions").query("region == 'scene'").groupby("class")["area_m2"].sum() for run in runs
    ]
    for line, name in zip(classes, NAMES, strict=True):
        old, new = (a[name] for a in areas)
        numbers = r"  {}\s+([\d.,]+) →\s+([\d.,]+) ha\s+([+-][\d.,]+)\s+([+-][\d.]+) %  IoU .* Dice .*"
        match = re.fullmatch(numbers.format(name), line)
        assert match, line
        told = [float(text.replace(",", "")) for text in match.groups()]
        wanted = [old / 1e4, new / 1e4, (new - old) / 1e4, 100 * (new / old - 1)]
        np.testing.assert_allclose(told, wanted, atol=0.0501)


# ------------------------------------------------------------------ wrong requests


def test_wrong_requests_are_one_line(runs: tuple[Path, Path], world: World, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    with pytest.raises(RequestError, match=rf"^{nothing}: no run here \(no run.json\)"):
        compare_runs(str(runs[0]), str(nothing))
    other = run_job(world.job(tmp_path / "other", scenes=[str(world / "scene2.tif")]))
    first = run_job(world.job(tmp_path / "first", scenes=[str(world / "scene1.tif")]))
    with pytest.raises(RequestError, match="no scene in common: before scene1; after scene2; give two runs"):
        compare_runs(str(first), str(other))
    inside = tmp_path / "a file" / "out"
    inside.parent.write_text("")
    with pytest.raises(RequestError, match=rf"^out: {inside}: cannot be made"):
        compare_runs(str(first), str(runs[0]), str(inside))
    (first / "regions.parquet").unlink()
    with pytest.raises(RequestError, match=rf"regions.parquet is not there; .*`segpipe report {first}`"):
        compare_runs(str(first), str(runs[0]))


def test_nothing_measured_in_both_is_refused(world: World, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    truth.mkdir()
    shutil.copy(world / "truth" / "scene2.tif", truth / "another.tif")
    failed = run_job(world.job(tmp_path / "failed", reference={"path": str(truth)}))
    done = run_job(world.job(tmp_path / "done"))
    with pytest.raises(RequestError, match=r"nothing measured in both: each scene in common \(scene1\)"):
        compare_runs(str(failed), str(done))
    assert not (done / f"compare-{failed.name}").exists()


def test_the_command_prints_changes_warnings_and_the_page(
    runs: tuple[Path, Path], world: World, here: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = here("compare", str(runs[0]), str(runs[1]), "--out", str(tmp_path / "out"))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.splitlines()[-1] == f"comparison: {tmp_path}/out/compare.html"
    one = run_job(world.job(tmp_path / "one"))
    (tmp_path / "url").mkdir()
    ended = here("compare", str(runs[0]), str(one), "--out", f"file://{tmp_path}/url")
    assert ended.code == 0
    warned = ended.err.splitlines()
    assert "warning: other scenes: 1 only before: scene2" in warned
    assert all(line.startswith("warning: ") for line in warned)
    assert {p.name for p in (tmp_path / "url").iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}
    wrong = here("compare", str(runs[0]), str(tmp_path))
    assert wrong.code == 2
    assert wrong.err == f"error: {tmp_path}: no run here (no run.json); give a folder <out>/<job>/<run>\n"
