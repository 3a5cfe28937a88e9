"""Arrays to pictures: stretch, colours of classes, the difference map, captions on the picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageColor import getrgb

from segpipe.config.card import Class

UNLISTED = (128, 128, 128)
"""Colour of a value that is no class's."""
DIFFERENCE = {
    "agree": ("agree", "#c3c7cd"),
    "missed": ("missed (only in the reference)", "#0077bb"),
    "hallucinated": ("hallucinated (only in the prediction)", "#ee7733"),
    "wrong": ("wrong class", "#882255"),
}
"""Paul Tol's colours: told apart with any common colour vision, and in grey by lightness."""
HEAT = (
    "#00224e", "#083370", "#35456c", "#4f576c", "#666970", "#7d7c78", "#948e77", "#aea371", "#c8b866",
    "#e5cf52", "#fee838",
)  # fmt: skip
"""Eleven stops of cividis (Nuñez et al. 2018): lightness grows evenly for every common colour vision."""
INK, PAPER, MUTED = "#1b1f24", "#ffffff", "#57606a"
_STRETCH = (2.0, 98.0)


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own typeface: the same on every machine."""
    return ImageFont.load_default(size)


def limits(values: np.ndarray, valid: np.ndarray) -> list[tuple[float, float]]:
    """The 2nd and 98th percentile of each channel over the scene's valid cells."""
    result = []
    for channel in values:
        seen = channel[valid]
        seen = seen[np.isfinite(seen)]
        low, high = np.percentile(seen, _STRETCH) if seen.size else (0.0, 1.0)
        result.append((float(low), float(high)))
    return result


def stretch(values: np.ndarray, valid: np.ndarray, bounds: Sequence[tuple[float, float]]) -> np.ndarray:
    """uint8 RGBA (rows, columns, 4) of one or three channels; transparent where nothing is valid."""
    planes = []
    for channel, (low, high) in zip(values, bounds, strict=True):
        scaled = (np.nan_to_num(channel) - low) / ((high - low) or 1.0)
        planes.append(np.clip(scaled * 255, 0, 255).round().astype(np.uint8))
    while len(planes) < 3:
        planes.append(planes[0])
    alpha = np.where(valid, 255, 0).astype(np.uint8)
    return np.stack([*planes[:3], alpha], axis=-1)


def class_colors(labels: np.ndarray, classes: Sequence[Class]) -> np.ndarray:
    """uint8 RGB (rows, columns, 3) of a label map."""
    ordered = sorted(classes, key=lambda c: c.value)
    values = np.array([c.value for c in ordered])
    colors = np.array([getrgb(c.color) for c in ordered] + [UNLISTED], dtype=np.uint8)
    place = np.searchsorted(values, labels).clip(0, len(values) - 1)
    return np.asarray(colors[np.where(values[place] == labels, place, len(values))])


def layers(
    base: np.ndarray,
    labels: np.ndarray,
    reference: np.ndarray | None,
    classes: Sequence[Class],
    nodata: int | None,
    ids: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """The pictures of one cut by key, all RGBA of the same size; predicted objects are outlined by ``ids``.

    A label that is no class's is drawn in grey: it should not be there, so it is seen. In a
    reference it means "not compared" and is left out.
    """
    ground = [c.value for c in classes if c.background]
    shown = ~np.isin(labels, ground if nodata is None else [*ground, nodata])
    pictures = {"image": base, "labels": overlay(base, labels, shown, classes, ids)}
    if reference is not None:
        known = np.isin(reference, [c.value for c in classes if not c.background])
        pictures["reference"] = overlay(base, reference, known, classes)
        pictures["difference"] = difference(labels, reference, classes, nodata)
    return pictures


def overlay(
    base: np.ndarray,
    labels: np.ndarray,
    shown: np.ndarray,
    classes: Sequence[Class],
    ids: np.ndarray | None = None,
) -> np.ndarray:
    """Classes laid over the picture: translucent, and outlined where there is a background.

    With ``ids`` of objects each of them is, also against its neighbour of the same class.
    """
    colors = class_colors(labels, classes).astype(np.float32)
    full = not any(c.background for c in classes)
    opacity = np.full(labels.shape, 0.65 if full else 0.4, dtype=np.float32)
    if not full:
        opacity[edges(labels if ids is None else ids)] = 1.0
    opacity[~shown] = 0
    # over transparent cells the class stands alone, on white: it is a prediction all the same
    below = np.where(base[..., 3:] > 0, base[..., :3], 255).astype(np.float32)
    mixed = below * (1 - opacity[..., None]) + colors * opacity[..., None]
    alpha = np.where(shown, 255, base[..., 3]).astype(np.uint8)
    return np.dstack([mixed.round().astype(np.uint8), alpha])


def edges(labels: np.ndarray) -> np.ndarray:
    """bool: elements with a 4-neighbour of another value, inside the picture."""
    result = np.zeros(labels.shape, dtype=bool)
    rows, columns = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    result[1:] |= rows
    result[:-1] |= rows
    result[:, 1:] |= columns
    result[:, :-1] |= columns
    return result


def difference(
    labels: np.ndarray, reference: np.ndarray, classes: Sequence[Class], nodata: int | None
) -> np.ndarray:
    """RGBA map of agreement. Transparent where either side has no class: it is not compared."""
    values = [c.value for c in classes if c.value != nodata]
    ground = [c.value for c in classes if c.background]
    compared = np.isin(labels, values) & np.isin(reference, values)
    here, there = ~np.isin(labels, ground), ~np.isin(reference, ground)
    kinds = {
        "agree": labels == reference,
        "missed": there & ~here,
        "hallucinated": here & ~there,
        "wrong": here & there & (labels != reference),
    }
    result = np.zeros((*labels.shape, 4), dtype=np.uint8)
    for kind, where in kinds.items():
        result[where & compared] = (*getrgb(DIFFERENCE[kind][1]), 255)
    empty = ~(here | there) & compared  # both background: lighter, so that structures stand out
    result[empty] = (232, 234, 237, 255)
    return result


def heat(shares: np.ndarray, labels: np.ndarray, nodata: int | None) -> np.ndarray:
    """RGBA map of shares 0…1, darker for less; transparent where there is no label."""
    at = np.clip(np.nan_to_num(shares.astype(np.float64)), 0, 1)
    stops = np.linspace(0, 1, len(HEAT))
    colors = np.array([getrgb(c) for c in HEAT], dtype=np.float64)
    planes = [np.interp(at, stops, colors[:, i]) for i in range(3)]
    alpha = np.full(labels.shape, 255.0) if nodata is None else np.where(labels == nodata, 0.0, 255.0)
    return np.stack([*planes, alpha], axis=-1).round().astype(np.uint8)


def resize(picture: np.ndarray, size: tuple[int, int], smooth: bool) -> np.ndarray:
    """To (rows, columns): smooth for images, nearest for labels and maps of colours."""
    if picture.shape[:2] == size:
        return picture
    if not smooth:
        rows, columns = (
            ((np.arange(n) + 0.5) * old / n).astype(np.intp)
            for n, old in zip(size, picture.shape[:2], strict=True)
        )
        return np.asarray(picture[np.ix_(rows, columns)])
    image = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(image)


def text_with_halo(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, anchor: str
) -> None:
    """White text with a dark edge: readable on any picture."""
    draw.text(
        place, text, fill="white", font=font(size), anchor=anchor,
        stroke_width=max(1, size // 7), stroke_fill="#10141a",
    )  # fmt: skip


def scale_bar(picture: np.ndarray, per_pixel: float, unit: str) -> np.ndarray:
    """The picture with a bar of a round length at the lower left.

    Args:
        picture: RGBA.
        per_pixel: length of a picture's pixel.
        unit: ``m`` (shown as km from 1,000) or ``mm``.
    """
    target = picture.shape[1] * per_pixel / 4
    if not np.isfinite(target) or target <= 0 or min(picture.shape[:2]) < 120:
        return picture
    power = 10.0 ** np.floor(np.log10(target))
    length = power * max(k for k in (1, 2, 5) if k * power <= target)
    name = f"{length / 1000:g} km" if unit == "m" and length >= 1000 else f"{length:g} {unit}"
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    x, y = 12, picture.shape[0] - 14
    end = x + length / per_pixel
    draw.rectangle((x - 1, y - 4, end + 1, y + 2), fill="#10141a")
    draw.rectangle((x, y - 3, end, y + 1), fill="white")
    text_with_halo(draw, (x, y - 7), name, 14, "ls")
    return np.asarray(image)


def webp(picture: np.ndarray, quality: int = 85) -> bytes:
    """Lossy WebP bytes, transparency kept exactly: a photograph in a fifth of a PNG's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def jpeg(picture: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of RGB (rows, columns, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def png(picture: np.ndarray | Image.Image) -> bytes:
    """PNG bytes without a time or any metadata: the same picture gives the same bytes."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=False, compress_level=5)
    return buffer.getvalue()
