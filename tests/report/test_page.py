"""The page and the summary: what they say, that they load nothing, and that nothing escapes."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from segpipe.errors import RequestError
from segpipe.geometry import RasterGeometry
from segpipe.models.card import Class
from segpipe.report import units
from segpipe.report.cells import ROWS, page_table
from segpipe.report.markdown import run_markdown
from segpipe.report.page import SECTIONS, render_page
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


def full_page() -> str:
    return render_page(record(), {"east": previews()}, regions(repeat=3), metrics(), summary())


def test_nothing_is_loaded_from_anywhere() -> None:
    page = full_page()
    tags = Reader(page).tags
    for tag, attributes in tags:
        if "src" in attributes:
            assert (attributes["src"] or "").startswith("data:"), (tag, attributes)
        if "href" in attributes:
            assert re.match(r"(#|\./|[a-z]+\.(csv|json)$)", attributes["href"] or ""), attributes
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
    page = render_page(run, {EVIL: previews()}, table, metrics().assign(reason=EVIL, scene=EVIL), numbers)
    reader = Reader(page)
    assert sum(tag == "script" for tag, _ in reader.tags) == 1
    assert page.count("<script>") == 1
    assert not [a for _, a in reader.tags if "onerror" in a]
    assert "red;}" not in page
    assert "./javascript%3Aalert%281%29" in page
    assert "&lt;script&gt;alert" in page


def test_same_input_same_bytes() -> None:
    assert full_page() == full_page()


def test_rows_and_units() -> None:
    reader = Reader(full_page())
    head, *rows = reader.rows["regions-table"]
    assert len(rows) == 9
    assert head[:7] == ["Scene", "Region", "Class", "Value", "Count", "Area (ha)", "Share (%)"]
    assert rows[1] == [
        "east", "scene", "forest", "1", "2,500", "25.0", "20.0", "measured", "50.0", "no", "1",
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
    assert "0.600 mIoU over classes, then scenes · 1 defined, 1 undefined, 1 scene failed" in text
    assert "0.750 Mean Dice" in text
    assert "25.00 ha forest" in text
    assert "Only one season." in text and "sha256:5b1f" in text and "41d07c55ab90" in text
    assert "memory bytes 3.0 GiB" in text


def test_failures_come_first_with_reasons() -> None:
    failed = scene("west", state="failed", error="west.tif ends at byte 12", geometry=None, attempts=3)
    page = render_page(record(scene(), failed), {}, regions())
    assert page.index("west.tif ends at byte 12") < page.index('<div class="cards">')
    assert "1 of 2 scenes failed" in page and "3 attempts" in page
    assert Reader(page).rows["index-table"][1][1:3] == ["west", "failed"]


def test_thousands_of_rows_are_cut_and_said_so() -> None:
    table = regions(repeat=1000)
    page = render_page(record(), {}, table)
    assert len(Reader(page).rows["regions-table"]) == 1 + ROWS
    assert "the first 2,000 of 3,000 rows" in page and "regions.csv" in page


def test_many_scenes_keep_the_page_light() -> None:
    names = tuple(f"scene {i}" for i in range(SECTIONS + 30))
    pictures = previews()
    page = render_page(
        record(*(scene(n) for n in names)),
        dict.fromkeys(names, pictures),
        regions(names),
        metrics(),
        summary(),
    )
    assert page.count('<article class="scene"') == SECTIONS
    assert f"the first {SECTIONS} finished scenes" in page and "The other 30" in page
    assert len(Reader(page).rows["index-table"]) == 1 + len(names)


def test_accessible_names() -> None:
    tags = Reader(full_page()).tags
    assert all(a.get("alt") is not None for tag, a in tags if tag == "img")
    heads = [a for tag, a in tags if tag == "th" and "aria-sort" in a]
    assert len(heads) == 11 + 11 + 10
    assert all(a.get("aria-label") for tag, a in tags if tag == "input")
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {
        (a["href"] or "")[1:] for tag, a in tags if tag == "a" and (a.get("href") or "").startswith("#")
    }
    assert anchors <= set(ids)


def test_every_column_is_defined() -> None:
    page = full_page()
    for table in ("regions", "metrics", "summary"):
        part = page.split(f'<section id="{table}"')[1].split("</section>")[0]
        heads = re.findall(r'<th scope="col" aria-sort', part)
        assert len(re.findall("<dt>", part)) == len(heads), table


def test_volumes_without_reference_or_previews() -> None:
    table = regions().rename(columns={"area_m2": "volume_mm3"})
    table["volume_mm3"] = [7e6, 1_953_000.0, 30.0]
    page = render_page(record(), {}, table)
    reader = Reader(page)
    assert "metrics-table" not in reader.rows and "metrics.csv" not in page
    assert [r[5] for r in reader.rows["regions-table"]] == ["Volume (mL)", "7,000.0", "1,953.0", "<0.1"]


def test_a_run_of_nothing() -> None:
    empty = regions().iloc[:0]
    page = render_page(record(scenes=(), model=None), {}, empty)
    assert "0 scenes segmented" in page


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
    assert "| mIoU | 0.600 | 1 | classes, then scenes |" in text
    assert "| forest | 25.00 | 20.0 % | 0.600 | 0.750 |" in text
    assert "Report: `runs/x/report.html`" in text
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert widths == {5, 6}


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path) -> None:
    """Sort, search and zoom work in Chromium under the page's own security policy."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    connect = pytest.importorskip("websockets.sync.client").connect
    (tmp_path / "report.html").write_text(full_page(), encoding="utf-8")
    browser = subprocess.Popen(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
         f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "report.html").as_uri()],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        port_file = tmp_path / "profile" / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not port_file.exists() or not port_file.read_text().strip():
            assert time.monotonic() < deadline, "chromium did not start"
            time.sleep(0.2)
        port = port_file.read_text().split()[0]
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        target = next(p for p in pages if p["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=None) as socket:

            def send(method: str, parameters: dict[str, object]):
                socket.send(json.dumps({"id": 1, "method": method, "params": parameters}))
                while (answer := json.loads(socket.recv(timeout=30))).get("id") != 1:
                    pass
                assert "exceptionDetails" not in answer["result"], answer
                return answer["result"]

            def run(script: str):
                answer = send("Runtime.evaluate", {"expression": script, "returnByValue": True})
                return answer["result"].get("value")

            while run("document.querySelectorAll('.view').length && document.readyState") != "complete":
                assert time.monotonic() < deadline, "the page was not shown"
                time.sleep(0.1)
            area = "[...document.querySelectorAll('#regions-table tbody tr')].map(r => r.cells[5].dataset.v)"
            button = "document.querySelectorAll('#regions-table th button')[5].click()"
            run(button)
            assert [float(v) for v in run(area)] == [0.0] * 3 + [250_000.0] * 3 + [1e6] * 3
            run(button)
            assert [float(v) for v in run(area)] == [1e6] * 3 + [250_000.0] * 3 + [0.0] * 3
            head = "document.querySelectorAll('#regions-table th')[5].getAttribute('aria-sort')"
            assert run(head) == "descending"
            run("document.querySelectorAll('#metrics-table th button')[5].click()")
            iou = "[...document.querySelectorAll('#metrics-table tbody tr')].map(r => r.cells[5].textContent)"
            assert run(iou) == ["0.600", "—"]
            run(
                "const i = document.querySelector('input[data-table=regions-table]');"
                "i.value = 'forest 1'; i.dispatchEvent(new Event('input'))"
            )
            assert run("document.querySelector('#regions-table-count').textContent") == "3 of 9"
            run("document.querySelector('.view').click()")
            assert run("document.querySelector('dialog').open") is True
            run("document.querySelector('[data-step=\"1\"]').click()")
            assert run("document.querySelector('dialog b').textContent") == "east · Segmentation"
            run("document.querySelector('dialog').close()")
            assert run("document.documentElement.scrollWidth") <= run("innerWidth")
            size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
            send("Emulation.setDeviceMetricsOverride", size)
            assert run("innerWidth") == 390  # a phone would zoom out if anything were wider
            assert run("document.documentElement.scrollWidth") == 390
    finally:
        browser.terminate()
        browser.wait(timeout=20)
