"""A run, its tables and its pages, for the tests of pages; and a reader of HTML."""

from __future__ import annotations

import dataclasses
import math
from html.parser import HTMLParser

import numpy as np
import pandas as pd

from segpipe.config.card import Class
from segpipe.geometry.geometry import RasterGeometry
from segpipe.pictures.preview import raster_preview
from segpipe.pictures.sampling import Readers
from segpipe.report.run_page import render_pages
from segpipe.sources.base import Pixels
from segpipe.tables.record import ClassInfo, GeometrySummary, ModelSummary, RunRecord, SceneRecord

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
                     "seen": 0.5, "touches_edge": area > 3e5}
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
        Readers(read, lambda b: labels[b.slices], lambda b: labels[b.slices]),
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
