"""What was asked: its table, the page's summary, and a picture of each phrase."""

from __future__ import annotations

import io
import json
import math
import re
import zipfile

import numpy as np
import pandas as pd
import pytest
from PIL.ImageColor import getrgb
from scipy import ndimage
from skimage.draw import disk
from skimage.measure import regionprops_table
from skimage.segmentation import find_boundaries

from segpipe.config.card import Class
from segpipe.geometry.geometry import volume_geometry
from segpipe.objects.scene_objects import SceneObjects
from segpipe.pictures.archive import dump_previews, load_previews
from segpipe.pictures.preview import raster_pictures, raster_preview, volume_preview
from segpipe.pictures.sampling import Readers
from segpipe.report.markdown import headline, run_markdown
from segpipe.report.phrase_view import describe_outcome, phrase_captions, phrase_view, phrases_sentence
from segpipe.report.run_page import INDEX, render_pages
from segpipe.tables.record import AskedPhrase, ClassInfo, RunRecord, SceneRecord, dump_record, load_record
from segpipe.tables.run_tables import phrase_table
from tests.report.drawings import decoded, raster_input, reader
from tests.report.pages import EVIL, Reader

GROUND = Class(value=0, name="none of these", color="#000000", background=True)
LAKE, DOCK = Class(value=1, name="lake", color="#2b83ba"), Class(value=2, name="dock", color="#d95f0e")
VOLCANO, UNNAMED = (
    Class(value=3, name="volcano", color="#aa0000"),
    Class(value=4, name="unnamed", color="#777777"),
)
CLASSES = (GROUND, LAKE, DOCK, VOLCANO, UNNAMED)
LEGEND = tuple(ClassInfo(c.value, c.name, c.color, c.background) for c in CLASSES)
NEAREST = "not found: nearest is forest with 0.21; 'lava', which is no class, has 0.44"
ASKED = (
    AskedPhrase("lake", "found", 4, below=2, merged=1, best=0.9, means="water", similarity=0.71),
    AskedPhrase("dock", "below threshold", below=3, best=0.22),
    AskedPhrase("volcano", "not in the vocabulary", means="forest", similarity=0.21, note=NEAREST),
)
LINES = ("docks.csv: 2 of 3 prompts are used", "docks.csv: 1 outside the scene, left out (number 3)")


def discs(shape: tuple[int, int], number: int, radius: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids of discs, some of which touch, and lake or dock by turns."""
    rng, ids = np.random.default_rng(seed), np.zeros(shape, np.int32)
    for number_, centre in enumerate(rng.uniform((0, 0), shape, (number, 2)), start=1):
        ids[disk(centre, radius, shape=shape)] = number_
    _, ids = np.unique(ids, return_inverse=True)
    ids = ids.reshape(shape)
    return ids, np.where(ids > 0, 1 + ids % 2, 0).astype(np.uint8)


def objects_of(ids: np.ndarray, labels: np.ndarray) -> SceneObjects:
    """The table of objects, boxes by scikit-image."""
    axes, number = ids.ndim, int(ids.max())
    table = regionprops_table(ids, properties=("label", "bbox", "area"))
    corners = np.stack([table[f"bbox-{i}"] for i in range(2 * axes)], axis=1).astype(np.int64)
    classes = ndimage.maximum(labels, ids, np.arange(1, number + 1)).astype(np.int64)
    zeros = np.zeros(number, np.int64)
    return SceneObjects(
        classes, np.full(number, 0.5), table["area"].astype(np.int64), zeros,
        corners[:, :axes], corners[:, axes:], zeros.astype(bool),
    )  # fmt: skip


def scene(name: str, asked: tuple[AskedPhrase, ...] = ASKED, **more: object) -> SceneRecord:
    return SceneRecord(name, f"{name}.tif", "done", asked=asked, **more)


def run(*scenes: SceneRecord, classes: tuple[ClassInfo, ...] = LEGEND[:4]) -> RunRecord:
    return RunRecord(
        "county", "run-1", "2026-03-01T14:05:22+00:00", "2026-03-01T14:07:27+00:00",
        classes=classes, scenes=scenes,
    )  # fmt: skip


def regions(record: RunRecord, objects: dict[tuple[str, str], tuple[int, float]]) -> pd.DataFrame:
    """Numbers and square metres by scene and class, 0 for others; and a district, which is no scene."""
    rows = []
    for item in record.scenes:
        for region in ("scene", "district"):
            for info in record.legend:
                number, area = objects.get((item.name, info.name), (0, 0.0))
                state = "measured" if item.state == "done" else "failed"
                values = (
                    (math.nan, None) if state == "failed" else (area, None if info.background else number)
                )
                rows.append((item.name, region, info.name, info.value, *values, state, 0.5, 1.0))
    names = ["scene", "region", "class", "value", "area_m2", "objects", "state", "share", "seen"]
    table = pd.DataFrame(rows, columns=names).astype({"objects": "Int64"})
    return table.assign(count=table["area_m2"] / 100)


def instances(*rows: tuple[str, int, str, float, float]) -> pd.DataFrame:
    """Scene, id, class, score and area of objects that were prompted for."""
    table = pd.DataFrame(rows, columns=["scene", "id", "class", "score", "area_m2"])
    return table.assign(
        count=table["area_m2"] / 100, candidate=1, predicted_iou=0.8, stability=0.97, source="text", also="",
        level=2, mask_area_m2=table["area_m2"] * 1.5, region="district", value=1,
    )  # fmt: skip


def only_page(record: RunRecord, table: pd.DataFrame, found: pd.DataFrame, previews=None) -> str:
    tables = {"regions": table, "instances": found, "asked": phrase_table(record, table, found)}
    (page,) = dict(render_pages(record, {"a": previews}.get, tables)).values()
    return page


def test_the_record_keeps_what_was_asked() -> None:
    record = run(scene("a", prompts=LINES))
    assert load_record(dump_record(record)) == record
    assert record.prompted and not run(scene("a", ())).prompted
    old = json.loads(dump_record(record))
    for field in ("asked", "prompts"):
        del old["scenes"][0][field]
    assert load_record(json.dumps(old)).scenes[0].asked == ()


def test_a_row_for_each_scene_and_phrase() -> None:
    failed = SceneRecord("b", "b.tif", "failed", error="ends at byte 12")
    record = run(scene("a", prompts=LINES), failed, classes=LEGEND)
    sizes = {("a", "lake"): (3, 5000.0), ("a", "unnamed"): (2, 300.0)}
    found = instances(("a", 1, "lake", 0.9, 4000.0), ("a", 2, "lake", 0.6, 600.0),
                      ("a", 3, "lake", math.nan, 400.0))  # fmt: skip
    table = phrase_table(record, regions(record, sizes), found)
    assert table[["scene", "phrase", "outcome"]].to_numpy().tolist() == [
        ["a", "lake", "found"],
        ["a", "dock", "below threshold"],
        ["a", "volcano", "not in the vocabulary"],
        ["a", "unnamed", "from prompts"],
        *(["b", phrase, "scene failed"] for phrase in ("lake", "dock", "volcano", "unnamed")),
    ]
    a = table[table["scene"] == "a"].set_index("phrase")
    assert a["objects"].tolist() == [3, 0, 0, 2] and a["area_m2"].tolist() == [5000, 0, 0, 300]
    assert a.loc["lake", ["found", "below", "small", "merged"]].tolist() == [4, 2, 0, 1]
    assert a.loc["lake", "mean_score"] == pytest.approx((0.9 + 0.6) / 2)  # a drawn object has none
    assert a["best"].fillna(-1).tolist() == [0.9, 0.22, -1, -1]
    b = table[table["scene"] == "b"]
    assert b[["found", "objects", "area_m2", "best", "mean_score"]].isna().all(axis=None)
    assert set(b["note"]) == {"ends at byte 12"}
    assert phrase_table(run(scene("a", ())), regions(record, sizes)).empty


def test_each_outcome_in_words() -> None:
    record = run(
        scene("a", (
            *ASKED,
            AskedPhrase("sea", "not found", means="water", similarity=0.5),
            AskedPhrase("no lake", "not understood"),
            AskedPhrase("reef", "not in the vocabulary", means="water", similarity=0.301),
            AskedPhrase("boat", "found", 2, merged=2, best=0.5),
            AskedPhrase("buoy", "below threshold", below=4, small=1, best=0.75),
            AskedPhrase("jetty", "not found"),
        )), classes=(),
    )  # fmt: skip
    table = phrase_table(record, regions(run(scene("a")), {("a", "lake"): (3, 1.0)}).assign(state="measured"))
    told = {str(row["phrase"]): describe_outcome(row) for row in table.to_dict("records")}
    assert told == {
        "lake": "4 found, 2 below the threshold, the best score is 0.90; 1 merged into other objects",
        "dock": "not found: 3 below the threshold, the best score is 0.22",
        "volcano": NEAREST,
        "sea": "not found, though it means water with 0.50",
        "no lake": "not understood",
        "reef": "not in the vocabulary; nearest is water with 0.30",
        "boat": "2 found; 2 merged into other objects",
        "buoy": "not found: 4 below the threshold, 1 too small, the best score is 0.75",
        "jetty": "not found",
    }
    lost = table.assign(objects=0).iloc[0].to_dict()
    assert describe_outcome(lost).endswith("; none of them is left in the map")
    assert phrases_sentence(table) == (
        "2 of 9 phrases found; not found: dock, volcano, sea, no lake, reef, buoy, jetty."
    )


def test_the_page_of_one_scene_says_all_of_it() -> None:
    record = run(scene("a", prompts=LINES))
    table = regions(record, {("a", "lake"): (3, 1.9e6)})
    found = instances(("a", 1, "lake", 0.9, 1e6), ("a", 2, "lake", 0.65, 9e5), ("a", 7, "lake", 0.1, 2e6))
    page = only_page(record, table, found)
    shown = Reader(page)
    head, *rows = shown.rows["phrases-table"]
    head = [re.sub(r"\s*\?$", "", h) for h in head]
    assert head == ["Phrase", "Outcome", "Found", "Objects", "Area, ha", "Mean score", "In words"]
    said = "4 found, 2 below the threshold, the best score is 0.90; 1 merged into other objects"
    assert rows == [
        ["lake", "found", "4", "3", "190.0", "0.550", said],
        ["dock", "below threshold", "0", "0", "0.0", "—",
         "not found: 3 below the threshold, the best score is 0.22"],
        ["volcano", "not in the vocabulary", "0", "0", "0.0", "—", NEAREST],
    ]  # fmt: skip
    assert "1 of 3 phrases found; not found: dock, volcano." in page
    assert page.index('id="phrases-h"') < page.index('id="scenes-h"')
    assert all(line in page for line in LINES)
    assert "asked-table" not in shown.rows and "asked.csv" in page and 'id="def-asked"' in page
    head, *rows = shown.rows["instances-table"]
    assert [re.sub(r" \(.*", "", h) for h in head[:10]] == [
        "Id", "Class", "Also", "Score", "Candidate", "Predicted IoU", "Stability", "Source", "Region", "Area",
    ]  # fmt: skip
    assert [row[0] for row in rows] == ["7", "1", "2"]  # the largest first
    assert head[10] == "Mask area (ha)" and rows[1][10] == "150.0"
    assert 'id="def-predicted_iou"' in page and 'id="def-mask_size"' in page


def test_phrases_are_typed_by_people() -> None:
    evil = ClassInfo(1, EVIL, "#2b83ba")
    asked = (AskedPhrase(EVIL, "found", 1, note=EVIL), AskedPhrase("b" + EVIL, "not found", means=EVIL))
    record = run(scene("a", asked, prompts=(EVIL,)), classes=(LEGEND[0], evil))
    labels = np.ones((40, 40), np.uint8)
    drawn = [GROUND, Class(value=1, name=EVIL, color="#2b83ba")]
    whole = objects_of(labels.astype(int), labels)
    previews = raster_preview(**raster_input(labels, classes=drawn), asked=whole)
    table = regions(record, {("a", EVIL): (1, 5.0)})
    page = only_page(record, table, instances(("a", 1, EVIL, 0.9, 5.0)), previews)
    assert "<script>alert" not in page and "<img src=x" not in page
    assert Reader(page).rows["phrases-table"][1][0] == EVIL
    assert not [a for _, a in Reader(page).tags if "onerror" in a]
    text = run_markdown(record, table)
    assert not re.search(r"(?<!\\)<(script|img)", text)


def test_many_scenes_are_summed_and_have_their_own() -> None:
    missed = (AskedPhrase("lake", "not found"), *ASKED[1:])
    failed = SceneRecord("c", "c.tif", "failed", error="ends at byte 12")
    record = run(scene("a"), scene("b", missed), failed, scene("d"))
    sizes = {("a", "lake"): (3, 1e6), ("d", "lake"): (1, 5e5)}
    table = regions(record, sizes)
    found = instances(("a", 1, "lake", 0.9, 1e6), ("d", 1, "lake", 0.3, 5e5), ("a", 2, "lake", 0.6, 1.0))
    tables = {"regions": table, "instances": found, "asked": phrase_table(record, table, found)}
    pages = dict(render_pages(record, lambda name: None, tables))
    index = Reader(pages[INDEX])
    lake, dock, volcano = index.rows["phrases-table"][1:]
    assert lake[1:6] == ["in 2 of 4", "8", "4", "150.0", "0.600"]
    assert lake[6] == "found in 2 scenes; not found in 1 scene; scene failed in 1 scene"
    assert dock[1] == "below threshold / scene failed" and volcano[2:4] == ["0", "0"]
    assert len(index.rows["asked-table"]) == 1 + 4 * 3
    head, *rows = index.rows["index-table"]
    column = next(i for i, h in enumerate(head) if h.startswith("Phrases found"))
    assert {row[1]: row[column] for row in rows} == {"a": "1 of 3", "b": "0 of 3", "c": "—", "d": "1 of 3"}
    own = Reader(pages["scenes/b/report.html"]).rows
    assert [row[1] for row in own["phrases-table"][1:]] == [a.outcome for a in missed]
    assert "asked-table" not in own
    for phrase, rows_ in tables["asked"].groupby("phrase"):
        row = next(r for r in index.rows["phrases-table"] if r[0] == phrase)
        assert row[2:4] == [f"{rows_[c].sum():,}" for c in ("found", "objects")]


def test_plain_text_has_the_negatives_too() -> None:
    record = run(scene("a"))
    table = regions(record, {("a", "lake"): (3, 1.9e6)})
    text = run_markdown(record, table)
    assert "1 of 3 phrases found; not found: dock, volcano." in text
    assert "| Phrase | Outcome | Objects | Size | In words |" in text
    assert f"| volcano | not in the vocabulary | 0 | 0.0 ha | {NEAREST} |" in text
    lines = headline(record, table)
    assert lines[1].split()[:3] == ["lake", "3", "objects"]
    assert lines[3] == f"  volcano                     0 objects  {NEAREST}"
    assert "Phrase" not in run_markdown(run(scene("a", ())), table)
    assert phrase_captions(phrase_table(record, table))["lake"] == "3 objects, 190.0 ha"
    assert phrase_view(phrase_table(run(scene("a", ())), table), None, (), ()) is None


def test_a_phrase_is_filled_and_outlined_and_all_else_dim() -> None:
    ids, labels = discs((80, 90), 12, 9)
    image = np.random.default_rng(1).uniform(0, 100, (3, 80, 90)).astype(np.float32)
    given = raster_input(labels, image=image, classes=CLASSES, ids=lambda b: ids[b.slices])
    drawn = raster_pictures(**given, max_size=900, count=3, asked=objects_of(ids, labels))
    assert [c.name for c, _ in drawn.phrases] == ["lake", "dock"]  # no picture of what was not found
    base = drawn.pictures["image"][..., :3].astype(float)
    for item, picture in drawn.phrases:
        mine = labels == item.value
        line = find_boundaries(np.where(mine, ids, 0), connectivity=1, mode="inner")
        assert (picture[line][:, :3] == getrgb(item.color)).all()
        inside = mine & ~line
        expected = 0.55 * base[inside] + 0.45 * np.array(getrgb(item.color))
        np.testing.assert_allclose(picture[inside][:, :3], expected, atol=0.51)
        ground, others = labels == 0, (labels > 0) & ~mine
        assert picture[ground][:, :3].mean() < 0.6 * base[ground].mean()
        assert (
            np.ptp(picture[ground][:, :3].astype(int), axis=1).mean()
            < 0.4 * np.ptp(base[ground], axis=1).mean()
        )
        assert 0 < picture[others][:, :3].mean() - picture[ground][:, :3].mean() < 60


@pytest.mark.parametrize(("down", "right"), [(-10.0, 10.0), (10.0, 10.0), (-10.0, -10.0)])
def test_objects_too_small_to_be_seen_are_dots(down: float, right: float) -> None:
    """Where north is down or east left in the file, the picture is turned, and its dots with it."""
    shape = (2000, 3000)
    ids, labels = np.zeros(shape, np.int32), np.zeros(shape, np.uint8)
    places = [(100, 200), (1503, 2801), (1000, 1500)]
    for number, (y, x) in enumerate(places, start=1):
        ids[y : y + 3, x : x + 3], labels[y : y + 3, x : x + 3] = number, 1
    place = (right, 0.0, 5e5, 0.0, down, 4e6)
    given = raster_input(labels, classes=CLASSES, transform=place, ids=lambda b: ids[b.slices])
    drawn = raster_pictures(**given, max_size=300, count=1, asked=objects_of(ids, labels))
    [(_, picture)] = drawn.phrases
    assert picture.shape[:2] == (200, 300)
    spots, number = ndimage.label((picture[..., :3] == getrgb(LAKE.color)).all(axis=-1))
    assert number == 3 and any(note.startswith("In pictures of phrases 3 objects") for note in drawn.notes)
    found = sorted(ndimage.center_of_mass(spots > 0, spots, [1, 2, 3]))
    middles = [((y + 1.5) / 10, (x + 1.5) / 10) for y, x in places]
    expected = sorted((y if down < 0 else 200 - y, x if right > 0 else 300 - x) for y, x in middles)
    np.testing.assert_allclose(np.add(found, 0.5), expected, atol=0.51)
    assert not (drawn.pictures["labels"][..., :3] == getrgb(LAKE.color)).all(axis=-1).any()  # thinned away


def test_a_phrase_of_a_volume_is_shown_where_most_of_it_is() -> None:
    """Slices are counted from the feet, also where the array begins at the head."""
    labels = np.zeros((24, 40, 40), np.uint8)
    labels[3:9, 5:10, 5:10] = 1
    labels[6, 5:30, 5:30] = 1
    labels[15:18, 20:30, 20:30] = 2
    image = np.random.default_rng(3).random((1, *labels.shape)).astype(np.float32)
    for sign, ranks in ((1, (7, 16)), (-1, (18, 9))):
        place = volume_geometry(labels.shape, np.diag([1.0, 1.0, sign * 2.0, 1.0]))
        ids, _ = ndimage.label(labels)
        read = Readers(reader(image), lambda b: labels[b.slices], ids=lambda b, ids=ids: ids[b.slices])
        previews = volume_preview(read, place, CLASSES, None, asked=objects_of(ids, labels))
        assert [p.title for p in previews.phrases] == ["lake", "dock"]
        for panel, rank, item in zip(previews.phrases, ranks, (LAKE, DOCK), strict=True):
            assert panel.caption.startswith(f"Slice {rank} of 24, ")
            assert (panel.width, panel.height) == (512, 512)
            colored = np.ptp(decoded(panel.content)[..., :3], axis=-1) > 30  # the volume is grey
            most = (labels == item.value).mean(axis=(1, 2)).max()
            assert colored.mean() == pytest.approx(most, rel=0.05)  # WebP halves colours
        assert load_previews(dump_previews(previews)) == previews


def test_pictures_of_phrases_are_on_the_page_with_numbers_of_the_tables() -> None:
    ids, labels = discs((80, 90), 12, 9)
    previews = raster_preview(**raster_input(labels, classes=CLASSES), asked=objects_of(ids, labels))
    record = run(scene("a"))
    number = np.bincount(objects_of(ids, labels).classes, minlength=3)
    area = np.bincount(labels.ravel(), minlength=3) * 100.0
    table = regions(record, {("a", c.name): (number[c.value], area[c.value]) for c in (LAKE, DOCK)})
    page = only_page(record, table, instances(("a", 1, "lake", 0.9, 1.0)), previews)
    captions = [re.sub(r"<[^>]+>", "", c) for c in re.findall(r"<figcaption>(.*?)</figcaption>", page)]
    for item in (LAKE, DOCK):
        caption = next(c for c in captions if c.startswith(f"{item.name}: {number[item.value]} objects, "))
        hectares = float(caption.split(", ")[1].removesuffix(" ha"))
        assert hectares == pytest.approx(area[item.value] / 1e4, rel=5e-4)
    assert len(previews.phrases) == 2 and load_previews(dump_previews(previews)) == previews
    assert len(previews.panels) == 2  # they are no part of the composite


def test_archives_from_before_there_were_phrases_are_read() -> None:
    previews = raster_preview(**raster_input(np.ones((50, 60), np.uint8)))
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(dump_previews(previews))) as new, zipfile.ZipFile(buffer, "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name == "index.json":
                index = json.loads(content)
                assert index.pop("phrases") == []
                content = json.dumps(index).encode()
            old.writestr(name, content)
    assert load_previews(buffer.getvalue()) == previews


def test_at_most_twelve_phrases_have_a_picture() -> None:
    labels = np.repeat(np.arange(15, dtype=np.uint8), 8)[:, None] * np.ones((1, 30), np.uint8)
    classes = [GROUND, *(Class(value=v, name=f"p{v}", color="#2b83ba") for v in range(1, 15))]
    previews = raster_preview(
        **raster_input(labels, classes=classes), asked=objects_of(labels.astype(int), labels)
    )
    assert [p.title for p in previews.phrases] == [f"p{v}" for v in range(1, 13)]
    assert "Pictures are of the first 12 of 14 phrases with objects." in previews.notes
