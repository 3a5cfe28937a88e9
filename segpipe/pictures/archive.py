"""The pictures of one scene as one value: panels, legend, composite, thumbnail, and their archive."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw
from PIL.ImageColor import getrgb

from segpipe.errors import RequestError
from segpipe.pictures.drawing import INK, MUTED, PAPER, font, png, webp

FORMAT = 2
"""Of the archive; part of its name, so that one of another format is made again and not read."""
THUMBNAIL = 192
"""Longest side of a thumbnail, in pixels."""
THUMBNAIL_BYTES = 20_000
"""Most bytes of a thumbnail: an index of many scenes holds one of each."""
_GAP, _LINE, _LEGEND_ENTRIES = 24, 22, 60
_COMPOSITE_PANEL = 640


@dataclass(frozen=True)
class LegendEntry:
    """A colour and what it means."""

    name: str
    color: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture."""

    key: str
    """``image``, ``labels``, ``reference``, ``difference``, ``uncertainty``, or a phrase's number."""
    title: str
    caption: str
    """What is shown and how, in a sentence."""
    alt: str
    """What a reader who cannot see the picture should know."""
    content: bytes
    width: int
    height: int
    kind: Literal["webp", "png"] = "png"
    """Of the content: photographs as WebP, flat maps as PNG."""


@dataclass(frozen=True)
class SlicePicture:
    """One slice of a stack."""

    jpeg: bytes
    caption: str
    """Which one it is, and where."""


@dataclass(frozen=True, kw_only=True)
class SliceStack:
    """Slices of a volume to leaf through, all of one size."""

    slices: tuple[SlicePicture, ...]
    """From the feet up."""
    first: int
    """Which one to show first."""
    width: int
    height: int
    caption: str


@dataclass(frozen=True, kw_only=True)
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
    """WebP: labels over image, at most `THUMBNAIL` pixels and `THUMBNAIL_BYTES`."""
    notes: tuple[str, ...] = ()
    """Orientation convention, thinning."""
    slices: SliceStack | None = None
    """Of a volume."""
    phrases: tuple[Panel, ...] = ()
    """Of a prompted run: a picture of each phrase with objects; the title is the phrase."""


def assemble(
    panels: Sequence[Panel],
    pictures: Mapping[str, np.ndarray],
    legend: Sequence[LegendEntry],
    difference_legend: Sequence[LegendEntry],
    notes: Sequence[str],
    *,
    thumbnail: np.ndarray | None = None,
    slices: SliceStack | None = None,
    phrases: Sequence[Panel] = (),
) -> Previews:
    """Panels with the composite and the thumbnail made of them.

    Args:
        panels: in the order shown.
        pictures: what is in them, RGBA by key.
        legend: classes.
        difference_legend: kinds of difference; empty without a reference.
        notes: what a reader must know.
        thumbnail: RGBA; left out: the labels' panel.
        slices: of a volume.
        phrases: of a prompted run.
    """
    small = pictures["labels"] if thumbnail is None else thumbnail
    return Previews(
        panels=tuple(panels), legend=tuple(legend), difference_legend=tuple(difference_legend),
        composite=_composite(panels, pictures, legend, difference_legend), thumbnail=_thumbnail(small),
        notes=tuple(notes), slices=slices, phrases=tuple(phrases),
    )  # fmt: skip


def _thumbnail(picture: np.ndarray) -> bytes:
    """WebP in the best quality that fits `THUMBNAIL_BYTES`."""
    small = Image.fromarray(picture)
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    for quality in (60, 40, 20):
        content = webp(np.asarray(small), quality)
        if len(content) <= THUMBNAIL_BYTES:
            break
    return content


def dump_previews(previews: Previews) -> bytes:
    """A zip archive of everything; the same previews give the same bytes."""
    index = asdict(previews)
    for panel in (*index["panels"], *index["phrases"]):
        del panel["content"]
    files = {f"{p.key}.{p.kind}": p.content for p in (*previews.panels, *previews.phrases)}
    files |= {"composite.png": previews.composite, "thumbnail.webp": previews.thumbnail}
    del index["composite"], index["thumbnail"]
    if previews.slices is not None:
        for number, item in enumerate(previews.slices.slices):
            files[f"slice-{number:03d}.jpeg"] = item.jpeg
            del index["slices"]["slices"][number]["jpeg"]
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
            legends = {
                name: tuple(LegendEntry(**entry) for entry in index[name])
                for name in ("legend", "difference_legend")
            }
            return Previews(
                panels=_load_panels(archive, index["panels"]), **legends,
                composite=archive.read("composite.png"), thumbnail=archive.read("thumbnail.webp"),
                notes=tuple(index["notes"]), slices=_load_slices(archive, index["slices"]),
                phrases=_load_panels(archive, index.get("phrases", ())),  # older archives have none
            )  # fmt: skip
    except (zipfile.BadZipFile, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"stored previews cannot be read ({error}); run the job again") from error


def _load_panels(archive: zipfile.ZipFile, entries: Sequence[dict[str, Any]]) -> tuple[Panel, ...]:
    return tuple(Panel(**e, content=archive.read(f"{e['key']}.{e['kind']}")) for e in entries)


def _load_slices(archive: zipfile.ZipFile, index: dict[str, Any] | None) -> SliceStack | None:
    if index is None:
        return None
    slices = tuple(
        SlicePicture(archive.read(f"slice-{number:03d}.jpeg"), entry["caption"])
        for number, entry in enumerate(index["slices"])
    )
    return SliceStack(**{**index, "slices": slices})


def _composite(
    panels: Sequence[Panel],
    pictures: Mapping[str, np.ndarray],
    legend: Sequence[LegendEntry],
    difference_legend: Sequence[LegendEntry],
) -> bytes:
    """Panels in a row, or below each other where they are wide (the planes of a volume)."""
    drawn = [Image.fromarray(pictures[p.key]) for p in panels]
    stacked = all(p.width > 1.5 * p.height for p in drawn)
    widest = _COMPOSITE_PANEL * (2 if stacked else 1)
    for index, picture in enumerate(drawn):
        if picture.width > widest:
            size = (widest, max(1, round(picture.height * widest / picture.width)))
            drawn[index] = picture.resize(size, Image.Resampling.LANCZOS)
    cell = (max(p.width for p in drawn), max(p.height for p in drawn) + 2 * _LINE)
    columns = 1 if stacked else len(drawn)
    rows = -(-len(drawn) // columns)
    width = max(columns * (cell[0] + _GAP) + _GAP, 480)
    groups = [("Classes", legend), ("Difference", difference_legend)]
    placed, end = _legend_places(groups, width, rows * (cell[1] + _GAP) + _GAP)
    canvas = Image.new("RGB", (width, end), PAPER)
    draw = ImageDraw.Draw(canvas)
    for index, (panel, picture) in enumerate(zip(panels, drawn, strict=True)):
        x = _GAP + (index % columns) * (cell[0] + _GAP)
        y = _GAP + (index // columns) * (cell[1] + _GAP)
        draw.text((x, y), panel.title, fill=INK, font=font(17))
        canvas.paste(picture, (x, y + _LINE + 6), picture)
    for x, y, name, color in placed:
        if color:
            draw.rounded_rectangle((x, y + 2, x + 14, y + 16), 3, fill=getrgb(color))
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
