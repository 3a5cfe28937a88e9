"""Pages as files: they load nothing, nothing escapes, links lead to pages, and none is heavy."""

from __future__ import annotations

import base64
import hashlib
import re
from urllib.parse import unquote, urljoin

import numpy as np
import pytest

from segpipe.pictures.archive import THUMBNAIL_BYTES
from segpipe.report.cells import ROWS
from segpipe.report.run_page import INDEX, INDEX_ROWS, page_paths
from segpipe.tables.record import ClassInfo, ModelSummary
from tests.report.pages import (
    EVIL,
    Reader,
    confusion,
    full_page,
    many,
    metrics,
    only_page,
    pages,
    previews,
    record,
    regions,
    scene,
    summary,
)


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


def test_accessible_names() -> None:
    tags = Reader(full_page()).tags
    assert all(a.get("alt") is not None for tag, a in tags if tag == "img")
    heads = [a for tag, a in tags if tag == "th" and "aria-sort" in a]
    assert len(heads) == 9 + 10 + 10
    assert all(a.get("aria-label") for tag, a in tags if tag == "input")
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = {
        (a["href"] or "")[1:] for tag, a in tags if tag == "a" and (a.get("href") or "").startswith("#")
    }
    assert anchors <= set(ids)
