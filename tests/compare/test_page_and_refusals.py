"""What a comparison shows in its page, lines and command, and the requests it refuses."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import Ended, World, polygon, write_polygons

from segpipe.errors import RequestError
from segpipe.report.comparison import headline
from segpipe.runs.compare import compare_runs
from tests.compare.tools import NAMES, read, run_job

EVIL = "<script>alert('x')</script>"


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
    torn = tmp_path / "scene1.tif"
    torn.write_text("no raster")
    failed = run_job(world.job(tmp_path / "failed", scenes=[str(torn)]))
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
