"""The page and the summary: what they say, that they load nothing, and that nothing escapes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urljoin

import numpy as np
import pandas as pd
import pytest

from segpipe.errors import RequestError
from segpipe.geometry import RasterGeometry
from segpipe.models.card import Class
from segpipe.report import units
from segpipe.report.agreement import agreement_table
from segpipe.report.cells import ROWS, page_table
from segpipe.report.definitions import DEFINITIONS
from segpipe.report.intensity import SceneIntensity, intensity_table
from segpipe.report.markdown import headline, run_markdown
from segpipe.report.overview import scene_scores, scene_table
from segpipe.report.page import FAILURES, INDEX, INDEX_ROWS, page_paths, render_pages
from segpipe.report.pictures import THUMBNAIL_BYTES
from segpipe.report.preview import raster_preview
from segpipe.report.record import (
    ClassInfo,
    GeometrySummary,
    ModelSummary,
    RunRecord,
    SceneRecord,
    dump_record,
    load_record,
)
from segpipe.report.shares import class_bars
from segpipe.report.surface import SceneSurfaces, surface_table
from segpipe.report.tables import SceneResult, metric_table, region_table, summary_table
from segpipe.report.uncertainty import SceneCalibration, calibration_table, uncertainty_table
from segpipe.sources.base import Pixels

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"
CLASSES = (
    ClassInfo(0, "background", "#000000", background=True),
    ClassInfo(1, "forest", "#1b7837"),
    ClassInfo(2, "water", "#2b83ba"),
)


class Reader(HTMLParser):
    """Tags with attributes, the text of elements with an id, rows of tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[list[str]]] = {}
        self._table = ""
        self._cell: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = dict(attrs).get("id") or ""
            self.rows.setdefault(self._table, [])
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.rows[self._table][-1].append("".join(self._cell).strip())
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def scene(name: str = "east", **more) -> SceneRecord:
    base = SceneRecord(
        name, f"lake/{name}.tif", "done",
        geometry=GeometrySummary("raster", (60, 80), "WGS 84 / UTM zone 16N", (10.0, 10.0), "m"),
        keys={"predict": "41d07c55ab90"}, plan={"windows": 12, "redundancy": 1.04, "memory_bytes": 3 * 2**30},
        timings={"predict": 61.0}, files={"labels.tif": f"scenes/{name}/labels.tif"},
    )  # fmt: skip
    return dataclasses.replace(base, **more)


def record(*scenes: SceneRecord, **more) -> RunRecord:
    model = ModelSummary(
        "landcover-unet",
        "Land cover U-Net",
        limits="Only one season.",
        fingerprint="sha256:5b1f",
        classes=CLASSES,
    )
    return dataclasses.replace(
        RunRecord(
            "landcover", "run-7", "2026-03-01T14:05:22+00:00", "2026-03-01T14:07:27+00:00",
            {"scenes": ["a"]}, model, versions={"torch": "2.15.0"}, scenes=scenes or (scene(),),
        ),
        **more,
    )  # fmt: skip


def regions(names: tuple[str, ...] = ("east",), repeat: int = 1) -> pd.DataFrame:
    rows = []
    for name in names:
        for index in range(repeat):
            for info, area in zip(CLASSES, (1e6, 250_000.0, 0.0), strict=True):
                rows.append(
                    {"scene": name, "region": f"district {index}" if index else "scene",
                     "class": info.name, "value": info.value,
                     "count": area / 100, "area_m2": area, "share": area / 1.25e6, "state": "measured",
                     "seen": 0.5, "touches_edge": area > 3e5, "attempts": 1}
                )  # fmt: skip
    return pd.DataFrame(rows)


def metrics() -> pd.DataFrame:
    rows = [
        ("forest", 1, 60.0, 20.0, 20.0, 0.6, 0.75, ""),
        ("water", 2, 0.0, 0.0, 0.0, float("nan"), float("nan"), "absent in both"),
    ]
    names = ["class", "value", "tp", "fp", "fn", "iou", "dice", "reason"]
    frame = pd.DataFrame(rows, columns=names)
    return frame.assign(scene="east", region="scene", state="measured")


def summary() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "metric": ["mIoU", "mean Dice", "pooled mIoU", "mean IoU"],
            "class": ["", "", "", "forest"],
            "over": "classes, then scenes",
            "region": "scene",
            "value": [0.6, 0.75, 0.61, 0.62],
            "n_defined": [1, 1, 1, 1],
            "n_missed": 0,
            "n_hallucinated": 0,
            "n_undefined": [1, 1, 1, 0],
            "n_failed": 1,
        }
    )


def previews():
    labels = np.random.default_rng(0).integers(0, 3, (60, 80), dtype=np.uint8)
    image = np.random.default_rng(1).random((3, 60, 80))

    def read(box, channels=None):
        return Pixels(image[(slice(None), *box.slices)][list(channels)], np.ones(box.shape, bool))

    classes = [Class(value=c.value, name=c.name, color=c.color, background=c.background) for c in CLASSES]
    place = RasterGeometry((60, 80), (10, 0, 0, 0, -10, 0), None)
    return raster_preview(
        read,
        lambda b: labels[b.slices],
        lambda b: labels[b.slices],
        place,
        ("red", "green", "blue"),
        classes,
        255,
    )


def confusion(names: tuple[str, ...] = ("east",)) -> pd.DataFrame:
    """Whole scenes: forest 60 right and 20 called water; water 5 called forest; one region too."""
    pairs = [("forest", "forest", 60.0), ("forest", "water", 20.0), ("water", "forest", 5.0)]
    rows = [(name, "scene", *pair) for name in names for pair in pairs]
    rows.append((names[0], "district 1", "forest", "forest", 1e6))
    return pd.DataFrame(rows, columns=["scene", "region", "reference", "predicted", "count"])


def pages(run: RunRecord, pictures=None, **tables: pd.DataFrame) -> dict[str, str]:
    return dict(render_pages(run, (pictures or {}).get, {"regions": regions(), **tables}))


def only_page(run: RunRecord, pictures=None, **tables: pd.DataFrame) -> str:
    (page,) = pages(run, pictures, **tables).values()
    return page


def full_page() -> str:
    return only_page(
        record(), {"east": previews()}, regions=regions(repeat=3), metrics=metrics(), summary=summary(),
        confusion=confusion(),
    )  # fmt: skip


def many(number: int = 6, **tables: pd.DataFrame) -> tuple[RunRecord, dict[str, str]]:
    """A run of scenes whose IoU of forest falls with their number; the last but one failed."""
    names = [f"s{i}" for i in range(number)]
    failed = names[-2]
    scenes = [
        scene(n, state="failed", error="ends at byte 12", geometry=None, files={})
        if n == failed
        else scene(n)
        for n in names
    ]
    rows = []
    for i, name in enumerate(names):
        iou = math.nan if name == failed else 0.9 - 0.1 * i
        rows.append((name, "scene", "forest", 1, iou, iou, 100.0 + i, 100.0))
    frame = pd.DataFrame(
        rows, columns=["scene", "region", "class", "value", "iou", "dice", "predicted_m2", "reference_m2"]
    )
    frame = frame.assign(tp=frame["iou"], fp=0.0, fn=0.0, state="measured", reason="")
    shot = previews()
    run = record(*scenes)
    made = pages(
        run, dict.fromkeys(names, shot), regions=regions(tuple(n for n in names if n != failed)),
        metrics=frame, summary=summary(), **tables,
    )  # fmt: skip
    return run, made


@pytest.mark.parametrize("path", ["report.html", "scenes/s1/report.html", "single"])
def test_nothing_is_loaded_from_anywhere(path: str) -> None:
    page = full_page() if path == "single" else many(confusion=confusion(("s1",)))[1][path]
    tags = Reader(page).tags
    for tag, attributes in tags:
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:"), (tag, attributes)
        if "href" in attributes:
            assert re.match(r"(#|\./|\.\./)", attributes["href"] or ""), attributes
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest", page)
    assert "http://" not in page and "https://" not in page


def test_only_the_pages_own_script_may_run() -> None:
    page = full_page()
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page.replace("&#39;", "'").replace("&#43;", "+")
    assert "default-src 'none'" in page


def test_text_from_outside_is_escaped() -> None:
    bad = scene(EVIL, notes=(EVIL,), plan={EVIL: EVIL}, files={EVIL: "javascript:alert(1)"}, uri=EVIL)
    failed = scene("b" + EVIL, state="failed", error=EVIL, geometry=None)
    table = regions((EVIL,))
    table["region"] = EVIL
    card = ModelSummary(
        EVIL, EVIL, data=EVIL, limits=EVIL, licence=EVIL, classes=(ClassInfo(1, EVIL, "red;}"),)
    )
    run = record(bad, failed, job_name=EVIL, run_id=EVIL, job={EVIL: EVIL}, model=card, notes=(EVIL,))
    numbers = summary().assign(metric=EVIL)
    numbers.loc[0, "metric"] = "mIoU"
    shown = pages(
        run, {EVIL: previews()}, regions=table, metrics=metrics().assign(reason=EVIL, scene=EVIL),
        summary=numbers, confusion=confusion((EVIL,)).assign(reference=EVIL),
    )  # fmt: skip
    assert set(shown) == set(page_paths(run)) == {INDEX, f"scenes/{EVIL}/report.html"}
    for path, page in shown.items():
        reader = Reader(page)
        assert sum(tag == "script" for tag, _ in reader.tags) == 1
        assert page.count("<script>") == 1
        assert not [a for _, a in reader.tags if "onerror" in a]
        assert "red;}" not in page
        assert "./javascript%3Aalert%281%29" in page or path == INDEX
        assert "&lt;script&gt;alert" in page


def test_links_between_pages_lead_to_pages() -> None:
    """As a browser resolves them, and wherever a scene's name puts its page."""
    run, made = many()
    assert set(made) == set(page_paths(run)) == {INDEX, *(f"scenes/{s.name}/report.html" for s in run.done)}
    for path, page in made.items():
        links = [a["href"] or "" for tag, a in Reader(page).tags if tag == "a" and "href" in a]
        to_pages = [urljoin(f"file:///run/{path}", x) for x in links if x.endswith("report.html")]
        assert to_pages
        assert {unquote(x).removeprefix("file:///run/") for x in to_pages} <= set(made)
        files = {unquote(urljoin(f"file:///run/{path}", x)) for x in links if x.endswith("labels.tif")}
        assert files == (
            {f"file:///run/{path.replace('report.html', 'labels.tif')}"} if path != INDEX else set()
        )


def test_same_input_same_bytes() -> None:
    assert full_page() == full_page()


def test_rows_and_units() -> None:
    reader = Reader(full_page())
    head, *rows = reader.rows["regions-table"]
    assert len(rows) == 9
    assert head[:6] == ["Region", "Class", "Value", "Count", "Area (ha)", "Share (%)"]  # of one scene
    assert rows[1] == [
        "scene", "forest", "1", "2,500", "25.0", "20.0", "measured", "50.0", "no", "1",
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
    assert page.index("west.tif ends at byte 12") < page.index('<div class="cards">')
    assert "1 of 2 scenes failed" in page and "3 attempts" in page
    assert Reader(page).rows["index-table"][1][1:3] == ["west", "failed"]


def test_many_failures_are_folded_away() -> None:
    failed = [scene(f"f{i}", state="failed", error=f"byte {i}", geometry=None) for i in range(FAILURES + 5)]
    page = pages(record(scene(), *failed))[INDEX]
    assert "<summary>5 more failed scenes</summary>" in page
    assert page.index(f"byte {FAILURES - 1}<") < page.index("5 more failed") < page.index(f"byte {FAILURES}<")


def test_thousands_of_rows_are_cut_and_said_so() -> None:
    page = only_page(record(), regions=regions(repeat=1000))
    assert len(Reader(page).rows["regions-table"]) == 1 + ROWS
    assert "the first 2,000 of 3,000 rows" in page and "regions.csv" in page
    made = pages(record(scene(), scene("west")), regions=regions(repeat=1000))
    assert len(Reader(made[INDEX]).rows["regions-table"]) == 1 + INDEX_ROWS
    assert len(Reader(made["scenes/east/report.html"]).rows["regions-table"]) == 1 + ROWS
    assert "Scene" not in Reader(made["scenes/east/report.html"]).rows["regions-table"][0]


def test_a_million_rows_of_regions_make_no_page_heavy() -> None:
    table = regions(repeat=2).iloc[np.r_[0:3, np.tile((3, 4, 5), 333_334)]]
    assert len(table) > 1e6
    made = pages(record(scene(), scene("west")), regions=table)
    assert max(map(len, made.values())) < 2e6
    assert "of 1,000,005 rows" in made[INDEX]


def test_many_scenes_have_a_light_index_and_a_page_each() -> None:
    _, made = many(40)
    assert len(made) == 1 + 39
    index, own = made[INDEX], made["scenes/s0/report.html"]
    assert 'class="panels"' not in index and 'class="panels"' in own
    thumbnails = re.findall(r"data:image/webp;base64,([^\"]+)", index)
    assert len(thumbnails) == 39
    assert max(len(base64.b64decode(t)) for t in thumbnails) <= THUMBNAIL_BYTES
    assert len(index) < 39 * THUMBNAIL_BYTES * 4 / 3 + 300_000
    assert "Previous: s0" in made["scenes/s1/report.html"] and "Next: s2" in made["scenes/s1/report.html"]
    assert "Previous:" not in own


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


def test_accessible_names() -> None:
    tags = Reader(full_page()).tags
    assert all(a.get("alt") is not None for tag, a in tags if tag == "img")
    heads = [a for tag, a in tags if tag == "th" and "aria-sort" in a]
    assert len(heads) == 10 + 10 + 10
    assert all(a.get("aria-label") for tag, a in tags if tag == "input")
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {
        (a["href"] or "")[1:] for tag, a in tags if tag == "a" and (a.get("href") or "").startswith("#")
    }
    assert anchors <= set(ids)


def test_definitions_are_one_click_away() -> None:
    """Every mark leads to a definition on the page, and a page explains only what it shows."""
    for page in (full_page(), *many(confusion=confusion(("s1",)))[1].values()):
        tags = Reader(page).tags
        ids = [a["id"] for tag, a in tags if tag == "details" and (a.get("id") or "").startswith("def-")]
        marks = {a["href"] for _, a in tags if "why-link" in (a.get("class") or "")}
        assert marks and marks <= {f"#{i}" for i in ids}
        assert len(ids) == len(set(ids)) < len(DEFINITIONS)
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
    metric = metric_table([SceneResult("east", ("scene",), 1, reason="broken")], cards)
    tables = {
        "regions": region_table([], cards), "metrics": metric, "summary": summary_table(metric, cards),
        "agreement": agreement_table(metric), "intensity": intensity_table([SceneIntensity("east")], cards),
        "surface": surface_table([SceneSurfaces("east", failed=True)], cards),
        "uncertainty": uncertainty_table([SceneIntensity("east")], cards),
        "calibration": calibration_table([SceneCalibration("east", failed=True)]),
    }  # fmt: skip
    for name, frame in tables.items():
        table = page_table(name, name, f"{name}.csv", frame, CLASSES)
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
        {"scene": ["a", "b"], "iou": [0.5, float("nan")], "attempts": pd.array([1, pd.NA], "Int64")}
    )
    table = page_table("metrics", "Metrics", "metrics.csv", frame, CLASSES)
    assert [(c.text, c.sort) for c in table.rows[1]] == [("b", ""), ("—", ""), ("—", "")]
    assert table.rows[0][1].sort == "0.5"


def test_record_round_trip() -> None:
    run = record(scene(reused=("ingest",), notes=("a",)), scene("w", state="failed", geometry=None))
    assert load_record(dump_record(run)) == run
    assert json.loads(dump_record(run))["scenes"][1]["state"] == "failed"
    with pytest.raises(RequestError, match=r"run.json is not a run's record: scenes\.0"):
        load_record('{"job_name":"a","run_id":"b","started":"","finished":"","scenes":[{}]}')


def test_markdown() -> None:
    failed = scene("we|st", state="failed", error="ends\nat | byte <12>", geometry=None)
    text = run_markdown(record(scene(), failed), regions(), metrics(), summary(), "runs/x/report.html")
    assert "**1 of 2 scenes failed** · run run-7 · 2 min 05 s" in text
    assert r"- **we\|st**: ends at \| byte \<12\>" in text
    assert "| mIoU | 0.600 |  | 1 | classes, then scenes |" in text
    assert "| forest | 25.00 | 20.0 % | 0.600 | 0.750 |" in text
    assert "Report: `runs/x/report.html`" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert widths == {6}
    between = summary().assign(low=0.55, high=0.65)
    text = run_markdown(record(), regions(), metrics(), between, "report.html")
    assert "| mIoU | 0.600 | 0.550 to 0.650 | 1 | classes, then scenes |" in text


def test_the_terminals_lines() -> None:
    numbers = pd.concat(
        [summary().assign(low=0.55, high=0.65), summary().assign(metric="mean Cohen's kappa")]
    )
    lines = headline(record(), regions(), metrics(), numbers)
    assert lines == [
        "landcover: 1 of 1 scenes done",
        "  background             100.00 ha   80.0 %  IoU —  Dice —",
        "  forest                  25.00 ha   20.0 %  IoU 0.600  Dice 0.750",
        "  water                    0.00 ha    0.0 %  IoU —  Dice —",
        "  mIoU                    0.600  classes, then scenes (n=1), 95 % interval 0.550 to 0.650",
        "  mean Dice               0.750  classes, then scenes (n=1), 95 % interval 0.550 to 0.650",
    ]
