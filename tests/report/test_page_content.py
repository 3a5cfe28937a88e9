"""What the pages say: rows, units, scores, failures, definitions, bars."""

from __future__ import annotations

import math
import re

import pandas as pd
import pytest

from segpipe.config.card import Class
from segpipe.report.cells import definitions, page_table
from segpipe.report.charts import class_bars
from segpipe.report.overview import scene_scores, scene_table
from segpipe.report.run_page import FAILURES, INDEX
from segpipe.tables import units
from segpipe.tables.frames import SceneValue
from segpipe.tables.overlap_tables import SceneTallies, agreement_table, metric_table, region_table
from segpipe.tables.scene_tables import (
    SceneIntensity,
    SceneSurfaces,
    calibration_table,
    intensity_table,
    surface_table,
    uncertainty_table,
)
from segpipe.tables.summary import summary_table
from tests.report.pages import (
    CLASSES,
    Reader,
    confusion,
    full_page,
    many,
    metrics,
    only_page,
    pages,
    record,
    regions,
    scene,
    summary,
)


def test_rows_and_units() -> None:
    reader = Reader(full_page())
    head, *rows = reader.rows["regions-table"]
    assert len(rows) == 9
    assert head[:6] == ["Region", "Class", "Value", "Count", "Area (ha)", "Share (%)"]  # of one scene
    assert rows[1] == [
        "scene", "forest", "1", "2,500", "25.0", "20.0", "measured", "50.0", "no",
    ]  # fmt: skip
    cells = [a for tag, a in reader.tags if tag == "td" and a.get("data-v") == "250000.0"]
    assert len(cells) == 3  # sorted by the SI value
    water = reader.rows["metrics-table"][2]
    assert water[:7] == ["water", "2", "0", "0", "0", "—", "—"]
    assert water[7] == "absent in both"


def test_headline() -> None:
    text = re.sub(r"<[^>]+>", " ", full_page().split("</style>")[1])
    text = re.sub(r"\s+", " ", text)
    assert "1 scene segmented with Land cover U-Net, 2026-03-01 14:05 UTC, in 2 min 05 s." in text
    assert "0.600 mIoU ? over classes, then scenes · 1 defined, 1 undefined, 1 scene failed" in text
    assert "0.750 Mean Dice" in text
    assert "25.00 ha forest" in text
    assert "Only one season." in text and "sha256:5b1f" in text and "41d07c55ab90" in text
    assert "memory bytes 3.0 GiB" in text


def test_failures_come_first_with_reasons() -> None:
    failed = scene("west", state="failed", error="west.tif ends at byte 12", geometry=None, attempts=3)
    page = pages(record(scene(), failed))[INDEX]
    assert page.index("west.tif ends at byte 12") < page.index('<div class="cards')
    assert "1 of 2 scenes failed" in page and "3 attempts" in page
    assert Reader(page).rows["index-table"][1][1:3] == ["west", "failed"]


def test_many_failures_are_folded_away() -> None:
    failed = [scene(f"f{i}", state="failed", error=f"byte {i}", geometry=None) for i in range(FAILURES + 5)]
    page = pages(record(scene(), *failed))[INDEX]
    assert "<summary>5 more failed scenes</summary>" in page
    assert page.index(f"byte {FAILURES - 1}<") < page.index("5 more failed") < page.index(f"byte {FAILURES}<")


def test_the_worst_scene_comes_first() -> None:
    _, made = many()
    head, *rows = Reader(made[INDEX]).rows["index-table"]
    assert head == ["", "Scene", "State", "mIoU", "Mean Dice", "Weakest class", "forest (ha)", "Seen", "Time"]
    assert [r[1] for r in rows] == ["s4", "s5", "s3", "s2", "s1", "s0"]  # s4 failed
    assert rows[1][2:] == ["done", "0.400", "0.400", "forest 0.400", "25.00", "50.0 %", "1 min 01 s"]
    assert rows[0][2:] == ["failed", *["—"] * 5, "1 min 01 s"]
    metric_rows = Reader(made[INDEX]).rows["metrics-table"]
    assert [r[0] for r in metric_rows[1:]] == ["s5", "s3", "s2", "s1", "s0", "s4"]
    assert "The weakest scene is s5 with 0.400." in made[INDEX]


def test_scores_of_scenes_are_means_over_the_classes_defined() -> None:
    rows = [
        ("a", "scene", "background", 0.99, 0.99), ("a", "scene", "forest", 0.5, 0.6),
        ("a", "scene", "water", 0.1, 0.2), ("a", "district", "water", 0.0, 0.0),
        ("b", "scene", "forest", 0.8, 0.9), ("b", "scene", "water", math.nan, math.nan),
        ("c", "scene", "forest", math.nan, math.nan), ("a", "scene", "77", 0.0, 0.0),
    ]  # fmt: skip
    frame = pd.DataFrame(rows, columns=["scene", "region", "class", "iou", "dice"])
    scores = scene_scores(frame, CLASSES)
    assert scores.loc["a"].tolist() == [pytest.approx(0.3), pytest.approx(0.4), "water", 0.1]
    assert scores.loc["b"].tolist() == [0.8, 0.9, "forest", 0.8]
    assert scores.loc["c"].isna().all()
    table = scene_table(record(scene("c"), scene("b"), scene("a")), regions(("a", "b")), frame, 2)
    assert [r.scene.name for r in table.rows] == ["a", "b"]
    doubt = pd.DataFrame(
        [(name, "scene", who, "entropy", value) for name, value in (("a", 0.2), ("b", 0.7), ("c", 0.4))
         for who in ("forest", "(all classes)")],
        columns=["scene", "region", "class", "channel", "mean"],
    )  # fmt: skip
    unsure = scene_table(record(scene("a"), scene("b"), scene("c")), regions(("a",)), None, 9, doubt)
    assert [r.scene.name for r in unsure.rows] == ["b", "c", "a"] and unsure.order == "highest entropy first"
    assert [r.cells[0].text for r in unsure.rows] == ["0.700", "0.400", "0.200"]
    empty = scene_table(record(scene("c"), scene("b")), regions(("b",)), None, 9)
    assert [r.scene.name for r in empty.rows] == ["c", "b"] and not empty.order


def test_definitions_are_one_click_away() -> None:
    """Every mark leads to a definition on the page, and a page explains only what it shows."""
    for page in (full_page(), *many(confusion=confusion(("s1",)))[1].values()):
        tags = Reader(page).tags
        ids = [a["id"] for tag, a in tags if tag == "details" and (a.get("id") or "").startswith("def-")]
        marks = {a["href"] for _, a in tags if "why-link" in (a.get("class") or "")}
        assert marks and marks <= {f"#{i}" for i in ids}
        assert len(ids) == len(set(ids)) < len(definitions())
    text = re.sub(r"<[^>]+>", " ", full_page())
    assert "TP / (TP + FP + FN)" in text and "never 0 or 1" in text
    assert "Hausdorff" not in text


def test_columns_that_nobody_described_are_shown_all_the_same() -> None:
    surface = pd.DataFrame({"scene": ["east"], "class": ["forest"], "crinkle_mm": [12.25], "odd": ["a<b"]})
    page = only_page(record(), surface=surface)
    assert Reader(page).rows["surface-table"] == [
        ["Class", "crinkle mm", "odd"], ["forest", "12.25", "a<b"],
    ]  # fmt: skip
    assert 'id="def-surface"' in page and "surface.csv" in page
    assert "intensity.csv" not in only_page(record(), intensity=surface.iloc[:0])  # asked for, and empty


def test_every_column_of_every_table_is_described() -> None:
    """Of the tables that the library writes, by their own functions."""
    cards = [Class(value=c.value, name=c.name, color=c.color, background=c.background) for c in CLASSES]
    metric = metric_table([SceneTallies("east", regions=("scene",), reason="broken")], cards)
    tables = {
        "regions": region_table([], cards), "metrics": metric, "summary": summary_table(metric, cards),
        "agreement": agreement_table(metric), "intensity": intensity_table([SceneIntensity("east")], cards),
        "surface": surface_table([SceneSurfaces("east", failed=True)], cards),
        "uncertainty": uncertainty_table([SceneIntensity("east")], cards),
        "calibration": calibration_table([SceneValue("east", failed=True)]),
    }  # fmt: skip
    for name, frame in tables.items():
        table = page_table(name, name, frame, CLASSES)
        assert [h.label for h in table.heads if not h.meaning] == [], name
        assert len({h.label for h in table.heads}) == len(table.heads), name


def test_intervals_are_shown_with_the_means() -> None:
    numbers = summary().assign(low=0.55, high=[0.65, 0.8, 0.7, math.nan], interval="12 scenes")
    page = only_page(record(), metrics=metrics(), summary=numbers)
    assert '<div class="i">95 % interval 0.550 to 0.650 over 12 scenes</div>' in page
    assert "mIoU is 0.600 (95 % interval 0.550 to 0.650 over 12 scenes)." in page
    head, first, *_, last = Reader(page).rows["summary-table"]
    shown = [dict(zip(head, row, strict=True)) for row in (first, last)]
    assert [(r["Low"], r["High"], r["Interval over"]) for r in shown] == [
        ("0.550", "0.650", "12 scenes"), ("0.550", "—", "12 scenes"),
    ]  # fmt: skip


def test_every_column_is_defined() -> None:
    page = full_page()
    for table in ("regions", "metrics", "summary"):
        part = page.split(f'<section id="{table}"')[1].split("</section>")[0]
        heads = re.findall(r'<th scope="col" aria-sort', part)
        assert len(re.findall("<dt>", part)) == len(heads), table


def test_volumes_without_reference_or_previews() -> None:
    table = regions().rename(columns={"area_m2": "volume_mm3"})
    table["volume_mm3"] = [7e6, 1_953_000.0, 30.0]
    page = only_page(record(), regions=table)
    reader = Reader(page)
    assert "metrics-table" not in reader.rows and "metrics.csv" not in page
    assert [r[4] for r in reader.rows["regions-table"]] == ["Volume (mL)", "7,000.0", "1,953.0", "<0.1"]


def test_a_run_of_nothing() -> None:
    empty = regions().iloc[:0]
    page = only_page(record(scenes=(), model=None), regions=empty)
    assert "0 scenes measured, labels as given" in page


def test_pooled_bars() -> None:
    (bars,) = class_bars(regions(repeat=2), metrics(), CLASSES)
    forest = next(b for b in bars.bars if b.name == "forest")
    assert (bars.unit, forest.size, forest.share, forest.iou, forest.dice) == (
        "ha", "25.00", "20.0 %", "0.600", "0.750",
    )  # fmt: skip
    assert (forest.length, bars.scenes) == (100.0, 1)


def test_a_label_of_no_class_is_in_the_bars() -> None:
    table = regions()
    table.loc[2, ["class", "area_m2"]] = ["77", 10_000.0]
    (bars,) = class_bars(table, None, CLASSES)
    assert [(b.name, b.size) for b in bars.bars][-1] == ("77", "1.00")


@pytest.mark.parametrize(
    ("column", "values", "shown"),
    [
        ("area_m2", [3.2e9, 1e6], ["3,200.0 km²", "1.0 km²"]),
        ("area_m2", [12_346.0, 3.0], ["1.235 ha", "<0.001 ha"]),
        ("area_m2", [99.0, 0.0], ["99.00 m²", "0.00 m²"]),
        ("volume_mm3", [1500.0, 0.0], ["1.500 mL", "0.000 mL"]),
        ("volume_mm3", [42.0], ["42.00 mm³"]),
        ("area_px", [1e6], ["1,000,000 px"]),
    ],
)
def test_units(column: str, values: list[float], shown: list[str]) -> None:
    unit = units.size_unit(column, values)
    assert [f"{units.size(v, unit)} {unit.symbol}" for v in values] == shown


def test_missing_values_sort_last() -> None:
    frame = pd.DataFrame(
        {"scene": ["a", "b"], "iou": [0.5, float("nan")], "tp": pd.array([1, pd.NA], "Int64")}
    )
    table = page_table("metrics", "Metrics", frame, CLASSES)
    assert [(c.text, c.sort) for c in table.rows[1]] == [("b", ""), ("—", ""), ("—", "")]
    assert table.rows[0][1].sort == "0.5"
