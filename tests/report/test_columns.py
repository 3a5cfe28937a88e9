"""The data dictionary: every column of every table is in it, and nothing that no table has."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from world import World

from segpipe.report.cells import definitions, of_metric
from segpipe.tables.frames import SIZE_COLUMNS, column_types, describe_column, dictionary, table_columns
from segpipe.tables.table_files import columns_json
from tests.finished import finish

KINDS = {"text", "class", "state", "number", "whole", "ratio", "real", "percent", "size"}


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two scenes with every table that a raster job can ask for."""
    out = tmp_path_factory.mktemp("columns") / "out"
    made, _ = finish(
        world.job(
            out,
            scenes=[str(world / f"scene{n}.tif") for n in (1, 2)],
            regions={"path": str(world / "districts.geojson"), "name": "district"},
            reference={"path": str(world / "truth")},
            measure={"intensity": True, "surface": True},
            outputs={"uncertainty": True},
        )
    )
    return Path(made.location)


def test_a_run_writes_the_columns_of_its_tables_in_order(run: Path) -> None:
    written = json.loads((run / "columns.json").read_text())
    tables = {path.stem: pd.read_csv(path, nrows=1).columns.tolist() for path in run.glob("*.csv")}
    assert {"regions", "metrics", "summary", "agreement", "confusion", "intensity", "surface"} < set(tables)
    assert {name: [c["name"] for c in t["columns"]] for name, t in written["tables"].items()} == tables
    for name, columns in tables.items():  # all that the dictionary has but sizes in other units
        expected = list(column_types(name, ["m2"]))
        assert columns == [c for c in expected if (name, c) != ("regions", "objects")]
    used = {c["definition"] for table in written["tables"].values() for c in table["columns"]} - {""}
    assert set(written["definitions"]) == used
    assert "columns.json" in json.loads((run / "manifest.json").read_text())["files"]


def test_the_types_in_the_dictionary_are_those_of_the_files(run: Path) -> None:
    for path in run.glob("*.parquet"):
        found = {str(k): str(v) for k, v in pd.read_parquet(path).dtypes.items()}
        wanted = {k: v for k, v in column_types(path.stem, ["m2"]).items() if k in found}
        assert found == wanted, path.name


def test_every_entry_is_used_and_complete() -> None:
    known = dictionary()
    listed = {c for table in known["tables"].values() for c in table["columns"]}
    own = {c for table in known["tables"].values() for c in table.get("differs", {})}
    assert set(known["columns"]) <= listed <= set(known["columns"]) | own
    for name, table in known["tables"].items():
        assert table["about"] and set(table.get("differs", {})) <= set(table["columns"])
        for column in table_columns(name):
            where = (name, column.name)
            assert column.kind in KINDS and column.label, where
            assert column.meaning or column.definition, where
            assert not column.definition or column.definition in definitions(), where
            assert column.kind != "size" or column.unit in SIZE_COLUMNS, where


def test_every_definition_explains_a_column_a_metric_a_table_or_a_figure() -> None:
    named = {c["definition"] for c in dictionary()["columns"].values() if "definition" in c}
    figures = {"box", "confusion"}
    for id, item in definitions().items():
        assert id in named | figures | set(dictionary()["tables"]) or item.metrics, id
    assert of_metric("pooled mIoU") is definitions()["miou"]


def test_a_table_of_ids_has_the_columns_of_the_dictionary() -> None:
    frame = pd.DataFrame({"scene": ["a"], "side": ["predicted"], "id": [1], "count": [4], "iou": [np.nan]})
    [table] = json.loads(columns_json({"instances": frame}))["tables"].values()
    assert [c["name"] for c in table["columns"]] == list(frame.columns)
    count = describe_column("count", "instances")
    assert count is not None and (count.dtype, count.meaning) == (
        "Int64", "Elements (pixels or voxels) of the object.",
    )  # fmt: skip


def test_the_predicted_iou_of_a_mask_is_explained_as_such() -> None:
    column = describe_column("predicted_iou", "instances")
    assert column is not None
    assert definitions()[column.definition].name == "Predicted IoU, candidates and stability"
