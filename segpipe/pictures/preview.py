"""Previews: what a scene, its labels and its reference look like, from a few bounded reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.geometry.geometry import RasterGeometry, VolumeGeometry
from segpipe.pictures.anatomical_planes import volume_pictures
from segpipe.pictures.archive import LegendEntry, Panel, Previews, assemble
from segpipe.pictures.axial_slices import axial_slices
from segpipe.pictures.drawing import DIFFERENCE, heat, layers, limits, png, resize, scale_bar, stretch, webp
from segpipe.pictures.phrase_pictures import (
    highlighted,
    left_out,
    phrase_panels,
    phrase_slices,
    shown_phrases,
    small_objects,
    spotted,
)
from segpipe.pictures.sampling import Readers, sample_image, sample_labels, thinned

if TYPE_CHECKING:
    from segpipe.objects.scene_objects import SceneObjects

_NAMED = (("red", "b04", "b4"), ("green", "b03", "b3"), ("blue", "b02", "b2"))
"""Names of the bands shown as red, green and blue: colour words, then Sentinel-2's."""
_ASPECT_SLACK = 0.05
"""Pixels this close to square are shown as they are."""
TITLES = {
    "image": "Image",
    "labels": "Segmentation",
    "reference": "Reference",
    "difference": "Difference",
    "uncertainty": "Uncertainty",
}


@dataclass(frozen=True, kw_only=True)
class RasterPictures:
    """A raster's pictures before they are encoded."""

    pictures: dict[str, np.ndarray]
    """RGBA by ``image``, ``labels``, ``reference``, ``difference``, ``uncertainty``."""
    seen: tuple[np.ndarray, ...]
    """The labels in them, to know which classes the legend needs."""
    caption: str
    """Of the image."""
    notes: tuple[str, ...]
    phrases: tuple[tuple[Class, np.ndarray], ...] = ()
    """RGBA with one class's objects highlighted, for each class that has any."""


def raster_preview(
    read: Readers,
    geometry: RasterGeometry,
    bands: Sequence[str],
    classes: Sequence[Class],
    nodata: int | None,
    max_size: int = 900,
    count: int | None = None,
    asked: SceneObjects | None = None,
) -> Previews:
    """Panels of a raster: image, labels over it, reference over it, difference, uncertainty.

    Args:
        read: of the scene; objects are outlined where there are ids.
        geometry: of the scene; a north-up picture is made of a south-up raster.
        bands: the image's band names, empty when it has none.
        classes: values, names and colours.
        nodata: the label of pixels without data.
        max_size: longest side of a panel, in pixels.
        count: the image's channels; needed only when ``bands`` is empty and there are several.
        asked: of a prompted run, whose classes are phrases: its objects; a picture of each phrase is made.
    """
    drawn = raster_pictures(read, geometry, bands, classes, nodata, max_size, count, asked)
    panels, legend, differences = _panels(drawn.pictures, drawn.caption, drawn.seen, classes, nodata)
    phrases = phrase_panels([(c, picture, "") for c, picture in drawn.phrases])
    return assemble(panels, drawn.pictures, legend, differences, drawn.notes, phrases=phrases)


def raster_pictures(
    read: Readers,
    geometry: RasterGeometry,
    bands: Sequence[str],
    classes: Sequence[Class],
    nodata: int | None,
    max_size: int,
    count: int | None,
    asked: SceneObjects | None = None,
) -> RasterPictures:
    """Thin, draw, and turn north up."""
    channels, shown = rgb_channels(bands, count)
    plane = thinned(geometry.shape, (0, 1), 0, max_size)
    values, valid = sample_image(read.image, plane, channels)
    bounds = limits(values, valid)
    base = stretch(values, valid, bounds)
    labels = sample_labels(read.labels, plane)
    reference = None if read.reference is None else sample_labels(read.reference, plane)
    ids = None if read.ids is None else sample_labels(read.ids, plane)
    pictures = layers(base, labels, reference, classes, nodata, ids)
    if read.uncertainty is not None:
        pictures["uncertainty"] = heat(sample_labels(read.uncertainty, plane), labels, nodata)
    size, per_pixel = _display(geometry, base.shape[:2], plane.factors[0])
    rows, columns = steps = _north_up(geometry)

    def turned(picture: np.ndarray, smooth: bool = False) -> np.ndarray:
        return resize(picture[::rows, ::columns], size, smooth=smooth)

    for key, picture in pictures.items():
        pictures[key] = scale_bar(turned(picture, key == "image"), per_pixel, "m")
    phrases, dotted = [], 0
    for item in shown_phrases(classes, asked):
        picture = turned(highlighted(base, labels, item, classes, nodata, ids))
        dots = small_objects(asked, item.value, plane, steps, size)
        dotted += len(dots)
        phrases.append((item, scale_bar(spotted(picture, dots, item.color), per_pixel, "m")))
    notes = [*_notes(geometry, plane.factors[0]), *left_out(classes, asked)]
    if dotted:
        notes.append(f"In pictures of phrases {dotted:,} objects too small to be seen are dots.")
    ranges = "; ".join(f"{low:.4g} to {high:.4g}" for low, high in bounds)
    caption = f"{shown}, stretched from the 2nd to the 98th percentile of the scene ({ranges})."
    seen = (labels,) if reference is None else (labels, reference)
    return RasterPictures(
        pictures=pictures, seen=seen, caption=caption, notes=tuple(notes), phrases=tuple(phrases)
    )


def _notes(geometry: RasterGeometry, factor: int) -> list[str]:
    """What a reader must know of a raster's pictures."""
    notes = []
    if factor > 1:
        notes.append(
            f"Pictures are thinned {factor} times: the image by the mean, labels by the pixel at "
            "the centre. Tables are measured on every pixel."
        )
    if geometry.rotated:
        notes.append("The raster is rotated: pictures follow its rows, north is not up.")
    return notes


def volume_preview(
    read: Readers,
    geometry: VolumeGeometry,
    classes: Sequence[Class],
    nodata: int | None,
    max_size: int = 1200,
    channel: int = 0,
    asked: SceneObjects | None = None,
) -> Previews:
    """Panels of a volume: three planes through the largest structure; and axial slices to leaf through.

    The planes go through the median voxel, along each axis, of the class with most voxels. They
    are upright by the affine (closest anatomical axes), in radiological convention, with square
    millimetres; the picture says so.

    Args:
        read: of the scene; labels are streamed in slabs, once to find the planes and once for the slices.
        geometry: of the scene.
        classes: values, names and colours.
        nodata: the label of voxels without data.
        max_size: width of a panel, in pixels.
        channel: of the image to show.
        asked: as for `raster_preview`; a phrase is shown in the axial slice with most of it.
    """
    drawn = volume_pictures(read, geometry, classes, nodata, max_size, channel)
    low, high = drawn.bounds
    caption = (
        f"Axial, coronal and sagittal planes {drawn.place}; grey from {low:.4g} to {high:.4g} "
        f"({drawn.range})."
    )
    stack = axial_slices(read, geometry, classes, nodata, drawn.bounds, drawn.centre, channel)
    panels, legend, differences = _panels(drawn.pictures, caption, drawn.seen, classes, nodata)
    shown = shown_phrases(classes, asked)
    phrases = phrase_slices(read, geometry, shown, drawn.extents, classes, nodata, drawn.bounds, channel)
    return assemble(
        panels, drawn.pictures, legend, differences, (*drawn.notes, *left_out(classes, asked)),
        thumbnail=drawn.axial, slices=stack, phrases=phrase_panels(phrases),
    )  # fmt: skip


def rgb_channels(bands: Sequence[str], count: int | None = None) -> tuple[tuple[int, ...], str]:
    """The channels shown as red, green and blue (or one as grey), and how to call them."""
    names = [re.sub(r"[^a-z0-9]", "", name.lower()) for name in bands]
    for kind in range(3):
        wanted = [options[kind] for options in _NAMED]
        if all(name in names for name in wanted):
            channels = tuple(names.index(name) for name in wanted)
            return channels, "Bands " + ", ".join(bands[c] for c in channels)
    number = len(bands) or count or 1
    if number >= 3:
        words = ", ".join(bands[:3]) if bands else "1, 2, 3"
        return (0, 1, 2), f"False colours: bands {words}"
    return (0,), f"Band {bands[0]}" if bands else "Band 1"


def _north_up(geometry: RasterGeometry) -> tuple[int, int]:
    """Steps (±1) along rows and columns that put north up and east right, unless rotated."""
    a, _, _, _, e, _ = geometry.transform
    if geometry.rotated or geometry.projection is None:
        return 1, 1
    return (-1 if e > 0 else 1), (-1 if a < 0 else 1)


def _display(geometry: RasterGeometry, cells: tuple[int, int], factor: int) -> tuple[tuple[int, int], float]:
    """Rows and columns of the picture with square pixels on the ground, and metres per column.

    The length is NaN (no scale bar) without a CRS.
    """
    crs, spacing = geometry.projection, geometry.spacing
    if crs is None or spacing is None:
        return cells, float("nan")
    ratio = spacing[0] / spacing[1]
    if crs.is_geographic:
        _, _, _, d, e, f = geometry.transform
        middle = f + (d * geometry.shape[1] + e * geometry.shape[0]) / 2
        ratio /= max(0.01, float(np.cos(np.deg2rad(middle))))
    try:
        area = float(geometry.element_sizes()[geometry.shape[0] // 2])
    except SceneError:  # no single pixel area: the tables say so, a picture needs no bar
        area = float("nan")
    wide = (area / ratio) ** 0.5
    high = wide * ratio
    if abs(ratio - 1) <= _ASPECT_SLACK:
        return cells, wide * factor
    if ratio > 1:  # shrink the finer side, so that the picture never grows
        return (cells[0], max(1, round(cells[1] / ratio))), high * factor
    return (max(1, round(cells[0] * ratio)), cells[1]), wide * factor


def _panels(
    pictures: dict[str, np.ndarray],
    caption: str,
    seen: Sequence[np.ndarray],
    classes: Sequence[Class],
    nodata: int | None,
) -> tuple[list[Panel], list[LegendEntry], list[LegendEntry]]:
    """Pictures with words, and the legends of classes and of differences."""
    present = {int(v) for labels in seen for v in np.unique(labels)}
    entries = [
        LegendEntry(c.name, c.color)
        for c in classes
        if c.value in present and not c.background and c.value != nodata
    ]
    named = ", ".join(e.name for e in entries[:12]) or "no class"
    captions = {
        "image": caption,
        "labels": f"Predicted classes over the image: {named}.",
        "reference": "The reference over the image, in the same colours.",
        "difference": "Where prediction and reference agree or differ. Blank: not compared.",
        "uncertainty": "Entropy of the class scores: dark where the model is sure, bright where "
        "classes are equally likely.",
    }
    panels = [_panel(key, captions[key], picture) for key, picture in pictures.items()]
    compared = "difference" in pictures
    legend = [LegendEntry(name, color) for name, color in DIFFERENCE.values()] if compared else []
    return panels, entries, legend


def _panel(key: str, caption: str, picture: np.ndarray) -> Panel:
    title = TITLES[key]
    high, wide = picture.shape[:2]
    flat = key == "difference"
    return Panel(
        key=key, title=title, caption=caption, alt=f"{title}: {caption}", width=wide, height=high,
        content=png(picture) if flat else webp(picture), kind="png" if flat else "webp",
    )  # fmt: skip
