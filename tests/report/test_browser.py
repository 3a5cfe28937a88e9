"""The report in Chromium: nothing is loaded, no error, and everything that moves works."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from segpipe.config.card import Class
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.pictures.archive import THUMBNAIL_BYTES, Previews
from segpipe.pictures.preview import raster_preview, volume_preview
from segpipe.pictures.sampling import Readers
from segpipe.report.charts import DARK
from segpipe.report.run_page import INDEX, render_pages, scene_path
from segpipe.sources.base import Pixels
from segpipe.tables.record import ClassInfo, GeometrySummary, RunRecord, SceneRecord
from segpipe.tables.table_files import write_table

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

EVIL = "<script>alert(1)<script>"
CLASSES = (
    ClassInfo(0, "background", "#000000", background=True),
    ClassInfo(1, "forest", "#1b7837"),
    ClassInfo(2, "water", "#2b83ba"),
)
CARDS = [Class(value=c.value, name=c.name, color=c.color, background=c.background) for c in CLASSES]
MANY = 500
"""Scenes of the large run; those whose number ends with 77 failed."""


@dataclass
class Watched:
    """A page, and what it should not have done."""

    page: playwright.Page
    wrong: list[str] = field(default_factory=list)

    def texts(self, selector: str) -> list[str]:
        return [t.strip() for t in self.page.locator(selector).all_text_contents()]

    def wide(self) -> tuple[int, int]:
        """Width of the document and of the window."""
        return tuple(self.page.evaluate("[document.documentElement.scrollWidth, innerWidth]"))


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    own = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as tools:
        if own is None and not Path(tools.chromium.executable_path).exists():
            pytest.skip("no chromium on this machine, neither the system's nor playwright's")
        launched = tools.chromium.launch(executable_path=own, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: playwright.Browser) -> Iterator[object]:
    """Opens a page of a report; at the end it must have asked for no other thing and told no error."""
    opened: list[Watched] = []

    def go(path: Path, width: int = 1280, **more: object) -> Watched:
        context = browser.new_context(viewport={"width": width, "height": 800}, **more)
        context.set_default_timeout(10_000)
        watched = Watched(context.new_page())
        page, wrong = watched.page, watched.wrong
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        page.on("dialog", lambda d: wrong.append(f"alert: {d.message}"))
        # every request of any kind but pages of this report and what they hold themselves
        inside = path.parents[2 if path.parent.parent.name == "scenes" else 0].as_uri()
        page.on(
            "request",
            lambda r: None if r.url.startswith((inside, "data:")) else wrong.append(f"asked for {r.url}"),
        )
        page.goto(path.as_uri())
        opened.append(watched)
        return watched

    yield go
    for watched in opened:
        assert watched.wrong == []
        watched.page.context.close()


def read_pixels(image: np.ndarray):
    def read(box, channels=None):
        values = image[(slice(None), *box.slices)]
        kept = values if channels is None else values[list(channels)]
        return Pixels(kept, np.ones(box.shape, bool))

    return read


def raster() -> Previews:
    labels = np.random.default_rng(0).integers(0, 3, (60, 80), dtype=np.uint8)
    image = np.random.default_rng(1).random((3, 60, 80))
    place = RasterGeometry((60, 80), (10, 0, 0, 0, -10, 0), None)
    names = ("red", "green", "blue")
    reads = (read_pixels(image), lambda b: labels[b.slices], lambda b: np.flip(labels, 0)[b.slices])
    return raster_preview(Readers(*reads), place, names, CARDS, 255)


def volume() -> Previews:
    """24 slices; the structure is in slices 6 to 12 from below."""
    labels = np.zeros((24, 30, 20), np.uint8)
    labels[5:12, 5:20, 5:15] = 1
    image = np.random.default_rng(1).random((1, 24, 30, 20))
    place = volume_geometry(labels.shape, np.diag([1.0, 1.0, 2.0, 1.0]))
    read = Readers(read_pixels(image), lambda b: labels[b.slices])
    return volume_preview(read, place, CARDS, None)


def scene(name: str, kind: str, failed: bool = False) -> SceneRecord:
    if failed:
        return SceneRecord(name, f"lake/{name}.tif", "failed", error="ends at byte 12", attempts=3)
    place = GeometrySummary(kind, (60, 80), "WGS 84 / UTM zone 16N", (10.0, 10.0), "m")
    return SceneRecord(name, f"lake/{name}.tif", "done", geometry=place, timings={"predict": 61.0})


def tables(scenes: list[SceneRecord]) -> dict[str, pd.DataFrame]:
    """Two regions a scene; sizes and overlaps follow from confusions drawn at random."""
    rng = np.random.default_rng(8)
    regions, metrics, confusion = [], [], []
    for item in scenes:
        whole = rng.integers(1, 400, (3, 3)) + np.diag(rng.integers(100, 3000, 3))
        for name, counts in (("scene", whole), ("district", whole // 2)):
            for k, info in enumerate(CLASSES):
                fp, fn = int(counts[:, k].sum() - counts[k, k]), int(counts[k].sum() - counts[k, k])
                tp, size = int(counts[k, k]), float(counts[:, k].sum())
                head = (item.name, name, info.name, info.value)
                if item.state == "failed":
                    regions.append((*head, *[math.nan] * 3, "failed", math.nan))
                    metrics.append((*head, *[math.nan] * 7, "failed"))
                    continue
                regions.append((*head, size, size * 100, size / counts.sum(), "measured", 1.0))
                union = tp + fp + fn
                sizes = (size * 100, counts[k].sum() * 100.0)
                metrics.append((*head, tp, fp, fn, tp / union, 2 * tp / (union + tp), *sizes, "measured"))
                confusion += [
                    (item.name, name, info.name, other.name, float(counts[k, o]))
                    for o, other in enumerate(CLASSES)
                ]
    head = ["scene", "region", "class", "value"]
    overlap = ["tp", "fp", "fn", "iou", "dice", "predicted_m2", "reference_m2", "state"]
    return {
        "regions": pd.DataFrame(regions, columns=[*head, "count", "area_m2", "share", "state", "seen"]),
        "metrics": pd.DataFrame(metrics, columns=[*head, *overlap]),
        "confusion": pd.DataFrame(
            confusion, columns=["scene", "region", "reference", "predicted", "count"]
        ).query("count > 0"),
    }


def write(folder: Path, scenes: list[SceneRecord], previews: Previews) -> Path:
    record = RunRecord(
        "landcover", "run-7", "2026-03-01T14:05:22+00:00", "2026-03-01T14:07:27+00:00",
        {"scenes": ["lake/*.tif"]}, None, CLASSES, scenes=tuple(scenes),
    )  # fmt: skip
    made = tables(scenes)
    for name, table in made.items():
        write_table(table, folder / name)
    for path, text in render_pages(record, lambda name: previews, made):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("one"), [scene(EVIL, "raster")], raster())


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("deep"), [scene("head", "volume")], volume())


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scenes = [scene(f"tile_{i:03d}", "raster", failed=i % 100 == 77) for i in range(MANY)]
    return write(tmp_path_factory.mktemp("many"), scenes, raster())


def test_one_scene_is_one_page(one: Path, visit) -> None:
    at = visit(one / INDEX)
    assert not (one / "scenes").exists()
    assert at.texts("h3#scene-h") == [EVIL]
    assert at.page.locator(".panels img").count() == 4
    for picture in at.page.locator(".panels img").all():
        assert picture.evaluate("i => i.decode().then(() => i.naturalWidth)") == 80
    assert at.wide() == (1280, 1280)


def test_pictures_are_enlarged_and_flickered_by_keys(one: Path, visit) -> None:
    at = visit(one / INDEX)
    at.page.locator(".view").first.click()
    assert at.page.locator("dialog").evaluate("d => d.open")
    assert at.texts("dialog b") == [f"{EVIL} · Image"]
    at.page.keyboard.press("ArrowRight")
    assert at.texts("dialog b") == [f"{EVIL} · Segmentation"]
    at.page.keyboard.press("Escape")
    assert not at.page.locator("dialog").evaluate("d => d.open")


def test_regions_are_sorted_by_si_values_and_filtered(one: Path, visit) -> None:
    at = visit(one / INDEX)
    cells = "#regions-table tbody tr:not([hidden]) td:nth-child(5)"
    values = sorted(tables([scene(EVIL, "raster")])["regions"]["area_m2"])
    head = at.page.locator("#regions-table th").nth(4)
    for order, expected in (("ascending", values), ("descending", values[::-1])):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        found = at.page.locator(cells).evaluate_all("cells => cells.map(c => Number(c.dataset.v))")
        assert found == expected
    at.page.get_by_label("Search regions").fill("district for")
    assert at.texts("#regions-table-count") == ["1 of 6"]
    assert at.texts("#regions-table tbody tr:not([hidden]) td:nth-child(2)") == ["forest"]
    at.page.get_by_label("Search regions").fill("")
    assert at.texts("#regions-table-count") == ["6"]


def test_a_definition_is_one_click_away(one: Path, visit) -> None:
    at = visit(one / INDEX)
    definition = at.page.locator("#def-iou")
    assert definition.get_attribute("open") is None
    at.page.get_by_label("Definition: IoU").first.click()
    assert definition.get_attribute("open") is not None
    playwright.expect(definition).to_be_in_viewport()
    assert "TP / (TP + FP + FN)" in definition.inner_text()


def test_slices_turn_with_the_keyboard(deep: Path, visit) -> None:
    at = visit(deep / INDEX)
    slider, shown = at.page.locator(".slider input"), at.page.locator(".slider img:not([hidden])")
    assert at.page.locator(".slider img").count() == 24
    assert at.texts(".slider output") == ["Slice 9 of 24, S 16.0 mm"]  # the structure's median
    slider.focus()
    at.page.keyboard.press("ArrowRight")
    assert at.texts(".slider output") == ["Slice 10 of 24, S 18.0 mm"]
    assert slider.get_attribute("aria-valuetext") == "Slice 10 of 24, S 18.0 mm"
    assert shown.count() == 1 and shown.evaluate("i => i.naturalWidth") == 171
    at.page.keyboard.press("Home")
    assert shown.get_attribute("alt") == "Slice 1 of 24, S 0.0 mm"
    at.page.keyboard.press("End")
    assert shown.get_attribute("alt") == "Slice 24 of 24, S 46.0 mm"


def test_five_hundred_scenes_have_a_light_index(many: Path, visit) -> None:
    size = (many / INDEX).stat().st_size / 1e6
    assert size < MANY * THUMBNAIL_BYTES * 4 / 3 / 1e6 + 1, f"{size:.1f} MB"
    at = visit(many / INDEX)
    assert at.page.locator("#index-table tbody tr").count() == MANY
    assert at.page.locator("#index-table img").count() == MANY - 5
    states = at.texts("#index-table tbody tr td:nth-child(3)")
    assert states == ["failed"] * 5 + ["done"] * (MANY - 5)
    scores = [float(t) for t in at.texts("#index-table tbody tr td:nth-child(4)")[5:]]
    assert scores == sorted(scores)  # the worst first
    assert at.page.locator("svg.fig").count() == 4  # IoU, area, and an agreement for each of two classes
    assert at.page.locator("table.matrix tbody tr").count() == 3
    assert at.wide() == (1280, 1280)


def test_scenes_are_sorted_and_filtered_by_text_and_state(many: Path, visit) -> None:
    at = visit(many / INDEX)
    rows = "#index-table tbody tr:not([hidden])"
    at.page.get_by_label("State").select_option("failed")
    assert at.texts(f"{rows} td.name") == [f"tile_{i}77" for i in range(5)]
    assert at.texts("#index-table-count") == ["5 of 500"]
    at.page.get_by_label("Search scenes").fill("tile_3")
    assert at.texts(f"{rows} td.name") == ["tile_377"]
    at.page.get_by_label("State").select_option("")
    assert at.texts("#index-table-count") == ["100 of 500"]
    at.page.locator("#index-table").get_by_role("button", name="Scene", exact=True).click()
    assert at.texts(f"{rows} td.name") == [f"tile_3{i:02d}" for i in range(100)]


def test_from_the_index_to_a_scene_and_back(many: Path, visit) -> None:
    at = visit(many / INDEX)
    at.page.get_by_label("Search scenes").fill("tile_010")
    at.page.locator("#index-table tr:not([hidden]) td.name a").click()
    assert at.page.url == (many / scene_path("tile_010")).as_uri()
    assert at.texts("h1") == ["tile_010"]
    assert at.page.locator(".panels img").count() == 4
    at.page.get_by_text("Next: tile_011").click()
    assert at.page.url == (many / scene_path("tile_011")).as_uri()
    at.page.get_by_text("← All scenes").click()
    assert at.page.url == (many / INDEX).as_uri()
    # a dot in a figure is a scene too
    link = at.page.locator("svg.fig a").first
    name = (link.get_attribute("aria-label") or "").split(":")[0]
    link.press("Enter")
    at.page.wait_for_url(f"**/{name}/report.html")
    assert at.texts("h1") == [name]


@pytest.mark.parametrize("which", ["one", "deep", "many", "scene"])
def test_a_phone_needs_no_sideways_scrolling(which: str, request: pytest.FixtureRequest, visit) -> None:
    folder = request.getfixturevalue("many" if which == "scene" else which)
    path = folder / (scene_path("tile_000") if which == "scene" else INDEX)
    at = visit(path, 390, is_mobile=True, device_scale_factor=2)
    assert at.wide() == (390, 390)  # a phone would zoom out if anything were wider
    at.page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert at.wide() == (390, 390)


def test_on_paper(many: Path, deep: Path, visit) -> None:
    at = visit(many / scene_path("tile_000"))
    at.page.emulate_media(media="print")
    for hidden in ("nav.bar", "nav.around", "#regions-table-count ~ input", "select"):
        assert at.page.locator(f"{hidden}:visible").count() == 0
    assert at.page.locator("input:visible").count() == 0
    assert at.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    cut = "[...document.querySelectorAll('.box')].filter(b => b.scrollHeight > b.clientHeight + 1).length"
    assert at.page.evaluate(cut) == 0  # no row hidden below a scroll bar
    at.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert at.page.locator("details.def:not([open])").count() == 0
    at.page.set_viewport_size({"width": 1032, "height": 700})  # of A4 across, without its margins
    assert at.wide() == (1032, 1032)
    slices = visit(deep / INDEX)
    slices.page.emulate_media(media="print")
    assert slices.page.locator(".slider input:visible").count() == 0
    assert slices.page.locator(".slider img:visible").count() == 1


def contrast(*colors: str) -> float:
    """WCAG 2's ratio of two computed colours, ``rgb(1, 2, 3)`` or ``color(srgb 0.1 0.2 0.3)``."""
    levels = []
    for color in colors:
        numbers = [float(n) for n in re.findall(r"[0-9.]+", color)][:3]
        scale = 1 if color.startswith("color") else 255
        linear = [
            c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (n / scale for n in numbers)
        ]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_colour_schemes(one: Path, visit, scheme: str) -> None:
    """At least 4.5 to 1 on its ground, as WCAG 2 asks for; in the confusion matrix at every shade."""
    page = visit(one / INDEX, color_scheme=scheme).page
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (contrast(ground, "rgb(0, 0, 0)") < 2) == (scheme == "dark")
    for selector in ("body", ".lead", "main a:visible", ".matrix thead th", ".card .d"):
        ink = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
        assert contrast(ink, ground) >= 4.5, selector
    cell = page.locator(".matrix td").first
    for strength in range(101):
        style = "(e, [s, d]) => { e.style.setProperty('--s', s + '%'); e.classList.toggle('dark', d);"
        style += " const c = getComputedStyle(e); return [c.color, c.backgroundColor]; }"
        assert contrast(*cell.evaluate(style, [strength, strength >= DARK])) >= 4.5, strength
