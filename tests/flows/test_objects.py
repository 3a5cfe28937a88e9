"""Objects end to end: a network that knows the truth, through the real flow, to files, tables and page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from pycocotools.coco import COCO
from rasterio.features import shapes

from segpipe_flows.segment import segment
from tests.flows.conftest import load, run_folder
from tests.flows.object_world import (
    EVEN,
    GROUND,
    NODATA,
    ODD,
    PIXEL,
    PLACE,
    SHAPE,
    class_of,
    districts,
    truth,
    write_job,
    write_world,
)
from tests.instances.scene import by_first
from tests.test_resume import kill, start, wait_for
from tests.world import Ended, command

BLOCKS = ("32", "100x128", "auto")
"""80 blocks, 9 blocks whose ends fall into windows, and one."""
ANSWERS = ("instances.csv", "regions.csv", "panoptic.csv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def on_our_server(flow_server: str, flow_home: Path) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: flow_server, PREFECT_HOME: flow_home}):
        yield


@pytest.fixture(scope="module")
def runs(folder: Path, on_our_server: None) -> dict[str, Path]:
    """The run's folder by the size of its blocks."""
    found = {}
    for block in BLOCKS:
        job = load(write_job(folder, folder / f"out-{block}", tiling={"block": block}))
        state = segment(job, return_state=True)
        assert state.is_completed(), state.message
        found[block] = run_folder(job)
    return found


@pytest.fixture(scope="module")
def run(runs: dict[str, Path]) -> Path:
    return runs["32"]


def answers(run: Path) -> dict[str, bytes]:
    """Everything that must be the same bytes."""
    files = {name: (run / name).read_bytes() for name in ANSWERS}
    scene = run / "scenes" / "scene"
    return files | {
        name: (scene / name).read_bytes() for name in ("instances.tif", "instances.json", "labels.tif")
    }


def test_blocks_change_no_byte(runs: dict[str, Path]) -> None:
    first, *others = (answers(run) for run in runs.values())
    for other in others:
        assert other == first
    polygons = [geopandas.read_file(run / "scenes/scene/instances.gpkg") for run in runs.values()]
    for other in polygons[1:]:
        pd.testing.assert_frame_equal(pd.DataFrame(other), pd.DataFrame(polygons[0]))


def test_the_truth_comes_back(run: Path) -> None:
    ids = truth()
    expected = by_first(np.where(ids == NODATA, 0, ids))
    with rasterio.open(run / "scenes/scene/instances.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected)
        assert (file.dtypes, file.nodata, file.crs.to_epsg()) == (("uint32",), 0, 32633)
    with rasterio.open(run / "scenes/scene/labels.tif") as file:
        np.testing.assert_array_equal(file.read(1), np.where(ids == NODATA, 255, class_of(ids)))
    table = pd.read_csv(run / "instances.csv", keep_default_na=False, na_values=[""])
    assert table["id"].tolist() == list(range(1, expected.max() + 1))
    for row in table.itertuples():
        true = int(ids[expected == row.id][0])
        where = np.argwhere(ids == true)
        assert (row.count, row.value, row.partner) == (
            len(where),
            class_of(np.array(true)),
            row.value * 1000 + true,
        )
        assert (row.area_m2, row.iou) == (len(where) * PIXEL**2, 1)
        assert row.score == pytest.approx(0.6 + true % 10 / 50, abs=1e-6)
        centre = PLACE @ (where[:, 1].mean() + 0.5, where[:, 0].mean() + 0.5)
        assert (row.centre_x, row.centre_y) == pytest.approx(centre, rel=1e-12)
        assert row.touches_edge == bool((where == 0).any() or (where == [SHAPE[0] - 1, SHAPE[1] - 1]).any())
    # the shapes that are hard to join: a ring around a block, a snake over twenty, and one over a corner
    assert (expected[122:166, 26:70] == expected[124, 28]).sum() == 44 * 44 - 34 * 34
    snake = np.unique(np.argwhere(expected == expected[202, 100]) // 32, axis=0)
    assert len(snake) >= 20
    assert expected[120, 120] != expected[127, 127] == expected[128, 128] == expected[127, 128] != 0


def test_quality_against_class_and_number_is_one(run: Path) -> None:
    table = pd.read_csv(run / "panoptic.csv").set_index("class")
    ids = truth()
    for name, value in (("even", EVEN), ("odd", ODD)):
        row = table.loc[name]
        number = len(np.unique(ids[class_of(ids) == value]))
        assert row[["tp", "fp", "fn"]].tolist() == [number, 0, 0]
        assert row[["pq", "sq", "rq", "ap", "ap50"]].tolist() == [1] * 5
    assert table.loc["all", ["pq", "sq", "rq"]].tolist() == [1, 1, 1]


def test_counts_per_district_are_those_of_geopandas(run: Path) -> None:
    ids = truth()
    there = (ids > 0) & (ids < NODATA)
    rows = [
        {"properties": {"id": int(v)}, "geometry": g}
        for g, v in shapes(ids.astype(np.int32), mask=there, connectivity=4, transform=PLACE)
    ]
    objects = geopandas.GeoDataFrame.from_features(rows, crs="EPSG:32633").dissolve("id", as_index=False)
    parts = geopandas.overlay(objects, districts(), how="intersection")
    parts["area"] = parts.area
    homes = parts.sort_values("area").drop_duplicates("id", keep="last")
    homes["value"] = class_of(homes["id"].to_numpy())
    want = homes.groupby(["district", "value"]).size().to_dict()
    whole = {v: len(np.unique(ids[class_of(ids) == v])) for v in (EVEN, ODD)}
    assert 0 < len(homes) < sum(whole.values())  # some lie in no district
    regions = pd.read_csv(run / "regions.csv")
    found = {(r.region, r.value): r.objects for r in regions.itertuples() if not pd.isna(r.objects)}
    assert found == {("scene", v): n for v, n in whole.items()} | {
        (name, v): want.get((name, v), 0) for name in districts()["district"] for v in (EVEN, ODD)
    }
    assert regions.loc[regions["value"] == GROUND, "objects"].isna().all()
    # the same per object, in the table and in the GeoPackage
    table = pd.read_csv(run / "instances.csv", keep_default_na=False)
    number = dict(zip(homes["id"], homes["district"], strict=True))
    own = {
        int(partner) % 1000: region for partner, region in zip(table["partner"], table["region"], strict=True)
    }
    assert own == {int(i): number.get(i, "") for i in objects["id"]}
    layer = geopandas.read_file(run / "scenes/scene/instances.gpkg").set_index("partner")
    assert {i % 1000: r or "" for i, r in layer["region"].items()} == own
    order = [class_of(np.array(i)) * 1000 + i for i in objects["id"]]
    assert shapely.equals(layer.loc[order].geometry.to_numpy(), objects.geometry.to_numpy()).all()


def test_files_are_listed_and_linked(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    [scene] = record["scenes"]
    names = {"instances": "instances.tif", "objects": "instances.gpkg", "coco": "instances.json"}
    for key, name in names.items():
        assert scene["files"][key] == f"scenes/scene/{name}"
    page = (run / "report.html").read_text()
    assert all(
        f'href="scenes/scene/{name}"' in page or f'href="./scenes/scene/{name}"' in page
        for name in names.values()
    )
    assert "Panoptic quality" in page and 'id="def-pq"' in page
    coco = COCO(str(run / "scenes/scene/instances.json"))
    with rasterio.open(run / "scenes/scene/instances.tif") as file:
        ids = file.read(1)
    assert sorted(coco.anns) == np.unique(ids[ids > 0]).tolist()
    for number in (1, len(coco.anns)):
        np.testing.assert_array_equal(coco.annToMask(coco.anns[number]), ids == number)


def test_a_file_that_was_taken_away_is_made_again(
    runs: dict[str, Path], folder: Path, on_our_server: None
) -> None:
    run = runs["auto"]
    taken, kept = run / "scenes/scene/instances.json", run / "scenes/scene/instances.tif"
    data, other = taken.read_bytes(), kept.read_bytes()
    taken.unlink()
    state = segment(load(folder / "out-auto.yaml"), return_state=True)
    assert state.is_completed() and taken.read_bytes() == data
    assert kept.read_bytes() == other  # with it all files of the scene, to the same bytes


@pytest.mark.slow
def test_dask_changes_no_byte(run: Path, folder: Path, on_our_server: None) -> None:
    compute = {"device": "cpu", "threads": 1, "runner": "dask", "workers": 2, "batch_minutes": 0.01}
    job = load(write_job(folder, folder / "dask", tiling={"block": "64"}, compute=compute))
    assert segment(job, return_state=True).is_completed()
    assert answers(run_folder(job)) == answers(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (".store/predict-*/receipts-*/*.json", 20),
        (".store/objects-*/*/instances/c/*/*", 30),
        ("objects/*/scenes/scene", 1),
    ],
    ids=["predicting", "joining", "exporting"],
)
def test_a_killed_run_ends_with_the_same_bytes(
    pattern: str, count: int, run: Path, folder: Path, flow_server: str, tmp_path: Path
) -> None:
    job = write_job(folder, tmp_path / "out", tiling={"block": "32"})
    process = start(job, flow_server)
    wait_for(process, pattern, tmp_path / "out", count)
    kill(process)
    ended: Ended = command("run", str(job), api=flow_server)
    assert ended.code == 0, ended
    assert answers(run_folder(load(job))) == answers(run)
