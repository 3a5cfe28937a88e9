"""What people open of a run only shows: no formula in a table, no escape in a terminal or a log."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from world import World, command, only_run, polygon, write_polygons, write_raster

from segpipe.config.cells import escape_cell, plain_cell
from segpipe.config.classes import load_classes
from segpipe.errors import RequestError, SceneError
from segpipe.redact import clean, clean_logs
from segpipe.report.markdown import plain_text
from segpipe.tables.table_files import csv_bytes

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "＝1", "=cmd|' /C calc'!A0", "'=1", "''=1"]
HARMLESS = ["north", "it's", "'quoted'", "a=b", "", "5-3"]
ESCAPES = {
    "title": "\x1b]0;x\x07",
    "colour": "\x1b[31m",
    "single character": "\x9b31m",
    "backspace": "a\b",
    "carriage return": "done\rfailed",
    "right to left": "\u202egnp.exe",
    "isolate": "\u2066a\u2069",
    "null": "\x00",
}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_text_in_a_csv_and_reads_back(text: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"value": [-1, 2], "name": [text, "plain"], "area_m2": [-0.5, 1.0]})
    path = tmp_path / "classes.csv"
    path.write_bytes(csv_bytes(table))
    first = next(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))
    assert first["name"] == "'" + text
    assert (first["value"], first["area_m2"]) == ("-1", "-0.5")
    assert plain_cell(escape_cell(text)) == text


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_is_as_it_was(text: str) -> None:
    assert escape_cell(text) == text == plain_cell(text)


def test_a_control_character_makes_no_cell_and_no_escape() -> None:
    """A carriage return would be the end of a row to some, with a formula in the next."""
    text = csv_bytes(pd.DataFrame({"name": ["a\r=1", "\x1b[31m"]}))
    assert text == b"name\na\\r=1\n\\x1b[31m\n"


def test_headings_and_categories_are_cells_too() -> None:
    table = pd.DataFrame({"=a": pd.Categorical(["=b"]), "n": [None]})
    assert csv_bytes(table).decode() == "'=a,n\n'=b,\n"


def test_classes_of_a_table_of_ours_have_their_names(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_bytes(csv_bytes(pd.DataFrame({"value": [1, 2], "name": ["=forest", "-"]})))
    assert [c.name for c in load_classes(str(path))] == ["=forest", "-"]


@pytest.mark.parametrize("kind", ESCAPES)
def test_no_escape_reaches_people(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """By an error, a log with its traceback, or a page in Markdown."""
    text = ESCAPES[kind]
    clean_logs()
    with caplog.at_level("INFO"):
        logging.getLogger("somebody").info("scene %s", text)
        try:
            raise OSError(text)
        except OSError:
            logging.getLogger("somebody").exception("scene")
    for told in (clean(text), str(SceneError(text)), str(RequestError(text)), caplog.text, plain_text(text)):
        assert not CONTROL.search(told), told
    assert "\\" in clean(text)


def test_lines_and_tabs_stay() -> None:
    assert clean("one\ttwo\nthree") == "one\ttwo\nthree"


def test_a_link_in_a_name_is_no_link() -> None:
    assert (
        plain_text("[x](javascript:alert(1)) `b` <i> | a") == r"\[x\](javascript:alert(1)) \`b\` \<i\> \| a"
    )


def test_a_run_of_evil_names_prints_none(world: World, tmp_path: Path) -> None:
    """A scene, a damaged one, and regions; as a command, on standard output and error."""
    evil = "a\x1b]0;x\x07b\x1b[31m"
    write_raster(tmp_path / f"{evil}.tif", world.pixels(), names=("red", "nir"), nodata=0)
    (tmp_path / f"{evil}-torn.tif").write_text("no raster")
    regions = tmp_path / "regions.geojson"
    height, width = world.raster_shape
    write_polygons(
        regions,
        polygon(f"=1+{evil}\u202e", (0, 40), (0, width)),
        polygon("-2|[x](javascript:1)", (40, height), (0, width)),
    )
    job = world.job(
        tmp_path / "out",
        scenes=[str(tmp_path / "*.tif")],
        regions={"path": str(regions), "name": "district"},
    )
    ran = command("run", str(job), "--local", PREFECT_HOME=str(tmp_path / "prefect"))
    assert ran.code == 1
    assert not CONTROL.search(ran.out + ran.err), ran
    assert r"\x1b[31m-torn.tif" in ran.err
    folder = only_run(tmp_path / "out")
    rows = list(csv.DictReader((folder / "regions.csv").read_text("utf-8-sig").splitlines()))
    assert {row["region"][:2] for row in rows if row["region"]} == {"sc", "'=", "'-"}
    assert all(np.isfinite(float(row["area_m2"])) for row in rows if row["state"] == "measured")
    told = json.loads((folder / "results.json").read_text())["tables"]["regions"]
    assert {row["region"][:1] for row in told if row["region"]} == {"s", "=", "-"}
