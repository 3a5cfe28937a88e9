"""The pictures of one scene as one value: panels, legend, composite, thumbnail, and their archive."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from PIL import Image, ImageDraw

from segpipe.errors import RequestError
from segpipe.report.colors import rgb
from segpipe.report.drawing import INK, MUTED, PAPER, font, png

THUMBNAIL = 192
"""Longest side of a thumbnail, in pixels."""
_GAP, _LINE, _LEGEND_ENTRIES = 24, 22, 60
_COMPOSITE_PANEL = 640


@dataclass(frozen=True)
class LegendEntry:
    """A colour and what it means."""

    name: str
    color: str


@dataclass(frozen=True)
class Panel:
    """One picture."""

    key: str
    """``image``, ``labels``, ``reference`` or ``difference``."""
    title: str
    caption: str
    """What is shown and how, in a sentence."""
    alt: str
    """What a reader who cannot see the picture should know."""
    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Previews:
    """All pictures of a scene."""

    panels: tuple[Panel, ...]
    legend: tuple[LegendEntry, ...]
    """Classes that appear in the pictures, in the order of the card."""
    difference_legend: tuple[LegendEntry, ...]
    """Empty without a reference."""
    composite: bytes
    """PNG: the panels side by side with titles and legend, for ``preview.png``."""
    thumbnail: bytes
    """PNG: labels over image, at most `THUMBNAIL` pixels."""
    notes: tuple[str, ...] = ()
    """Orientation convention, thinning."""


def assemble(
    panels: Sequence[Panel],
    legend: Sequence[LegendEntry],
    difference_legend: Sequence[LegendEntry],
    notes: Sequence[str],
) -> Previews:
    """Panels with the composite and the thumbnail made of them."""
    shown = next((p for p in panels if p.key == "labels"), panels[0])
    small = Image.open(io.BytesIO(shown.png))
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return Previews(
        tuple(panels),
        tuple(legend),
        tuple(difference_legend),
        _composite(panels, legend, difference_legend),
        png(small),
        tuple(notes),
    )


def dump_previews(previews: Previews) -> bytes:
    """A zip archive of everything; the same previews give the same bytes."""
    index = asdict(previews)
    for panel in index["panels"]:
        del panel["png"]
    files = {f"{p.key}.png": p.png for p in previews.panels}
    files |= {"composite.png": previews.composite, "thumbnail.png": previews.thumbnail}
    del index["composite"], index["thumbnail"]
    files["index.json"] = json.dumps(index, indent=1, ensure_ascii=False).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), content)
    return buffer.getvalue()


def load_previews(content: bytes) -> Previews:
    """The inverse of `dump_previews`, so that a report is made again without reading a scene.

    Raises:
        RequestError: not such an archive.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            index = json.loads(archive.read("index.json"))
            panels = tuple(
                Panel(**panel, png=archive.read(f"{panel['key']}.png")) for panel in index["panels"]
            )
            return Previews(
                panels,
                tuple(LegendEntry(**entry) for entry in index["legend"]),
                tuple(LegendEntry(**entry) for entry in index["difference_legend"]),
                archive.read("composite.png"),
                archive.read("thumbnail.png"),
                tuple(index["notes"]),
            )
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"stored previews cannot be read ({error}); run the job again") from error


def _composite(
    panels: Sequence[Panel],
    legend: Sequence[LegendEntry],
    difference_legend: Sequence[LegendEntry],
) -> bytes:
    """Panels in a row, or below each other where they are wide (the planes of a volume)."""
    pictures = [Image.open(io.BytesIO(p.png)).convert("RGBA") for p in panels]
    stacked = all(p.width > 1.5 * p.height for p in pictures)
    widest = _COMPOSITE_PANEL * (2 if stacked else 1)
    for index, picture in enumerate(pictures):
        if picture.width > widest:
            size = (widest, max(1, round(picture.height * widest / picture.width)))
            pictures[index] = picture.resize(size, Image.Resampling.LANCZOS)
    cell = (max(p.width for p in pictures), max(p.height for p in pictures) + 2 * _LINE)
    columns = 1 if stacked else len(pictures)
    rows = -(-len(pictures) // columns)
    width = max(columns * (cell[0] + _GAP) + _GAP, 480)
    groups = [("Classes", legend), ("Difference", difference_legend)]
    placed, end = _legend_places(groups, width, rows * (cell[1] + _GAP) + _GAP)
    canvas = Image.new("RGB", (width, end), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, (panel, picture) in enumerate(zip(panels, pictures, strict=True)):
        x = _GAP + (index % columns) * (cell[0] + _GAP)
        y = _GAP + (index // columns) * (cell[1] + _GAP)
        draw.text((x, y), panel.title, fill=INK, font=font(17))
        canvas.paste(picture, (x, y + _LINE + 6), picture)
    for x, y, name, color in placed:
        if color:
            draw.rounded_rectangle((x, y + 2, x + 14, y + 16), 3, fill=rgb(color))
        draw.text((x + (22 if color else 0), y), name, fill=INK if color else MUTED, font=font(14))
    return png(canvas)


def _legend_places(
    groups: Sequence[tuple[str, Sequence[LegendEntry]]], width: int, top: int
) -> tuple[list[tuple[int, int, str, str]], int]:
    """Where the legend's entries go, (x, y, text, colour or ""), and where the picture ends."""
    placed: list[tuple[int, int, str, str]] = []
    y = top
    for title, entries in groups:
        if not entries:
            continue
        items = [(title, "")] + [(e.name, e.color) for e in entries[:_LEGEND_ENTRIES]]
        if len(entries) > _LEGEND_ENTRIES:
            items.append((f"and {len(entries) - _LEGEND_ENTRIES} more", ""))
        x = _GAP
        for name, color in items:
            wide = int(font(14).getlength(name)) + (22 if color else 0) + 20
            if x > _GAP and x + wide > width - _GAP:
                x, y = _GAP, y + _LINE
            placed.append((x, y, name, color))
            x += wide
        y += _LINE + 6
    return placed, y + _GAP // 2
