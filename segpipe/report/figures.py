"""Figures as SVG: distributions over scenes and Bland–Altman plots. Colours come from the page's CSS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from markupsafe import Markup

LIMIT_SD = 1.96
"""Standard deviations between the mean difference and a limit of agreement (Bland & Altman 1986)."""
LEAST_SCENES = 3
"""Scenes from which a distribution or limits of agreement say anything."""
_LINKED = 3
"""Extreme scenes of a row that are links; the others are dots."""
_ROW, _LEFT, _RIGHT, _WIDTH, _TOP = 32, 140, 64, 640, 8
_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Strip:
    """One row of a distribution: a number of each scene."""

    label: str
    scenes: tuple[str, ...]
    values: tuple[float, ...]
    """Finite, one for each of the scenes."""
    undefined: int = 0
    """Scenes without a number."""


@dataclass(frozen=True, kw_only=True)
class SizePairs:
    """Predicted and reference size of one class, scene by scene."""

    label: str
    unit: str
    scenes: tuple[str, ...]
    predicted: tuple[float, ...]
    reference: tuple[float, ...]

    @property
    def differences(self) -> np.ndarray:
        """Predicted − reference, float64 (scene,)."""
        return np.subtract(self.predicted, self.reference)

    @property
    def means(self) -> np.ndarray:
        """Of both sizes, float64 (scene,)."""
        return np.add(self.predicted, self.reference) / 2

    @property
    def limits(self) -> tuple[float, float, float]:
        """Lower limit of agreement, mean difference, upper limit.

        Mean ± 1.96 SD of the differences, SD divided by n − 1 (Bland & Altman, Lancet 1986).
        """
        middle = float(self.differences.mean())
        reach = LIMIT_SD * float(self.differences.std(ddof=1))
        return middle - reach, middle, middle + reach


def ticks(low: float, high: float, number: int = 5) -> list[tuple[float, str]]:
    """Round numbers within the range, with their text: a step of 1, 2, 2.5 or 5 times a power of ten.

    The step is the smallest that cuts the range into at most ``number`` parts.
    """
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / number))
    step = next(k * power for k in (1, 2, 2.5, 5, 10) if span / (k * power) <= number * (1 + 1e-9))
    places = max(0, -math.floor(math.log10(step) + 1e-9) + (step / power == 2.5))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(i * step, f"{i * step:,.{places}f}") for i in range(first, last + 1)]


def distribution(
    strips: Sequence[Strip],
    axis: tuple[float, float],
    form: Callable[[float], str],
    links: Mapping[str, str],
    title: str,
) -> Markup:
    """A row per class: a dot a scene, a box of the quartiles with the median.

    Args:
        strips: rows, each with one value at least.
        axis: values at the left and right ends, not the same.
        form: a value as text.
        links: scene to its page; scenes at the ends of a row are linked.
        title: what is shown, for those who cannot see it.
    """
    low, high = axis
    span = high - low
    height = _TOP + _ROW * len(strips) + 26

    def x(value: float) -> float:
        return _LEFT + (value - low) / span * (_WIDTH - _LEFT - _RIGHT)

    parts = []
    for tick, said in ticks(low, high):
        parts.append(_line(x(tick), _TOP, x(tick), height - 24, "grid"))
        parts.append(_text(x(tick), height - 8, said, "middle"))
    for row, strip in enumerate(strips):
        middle = _TOP + _ROW * row + _ROW / 2
        parts.append(_text(_LEFT - 12, middle + 4, strip.label, "end", "label", limit=20))
        heights = [middle + (((i + 1) * _GOLDEN) % 1 - 0.5) * 16 for i in range(len(strip.values))]
        places = [(x(v), y) for v, y in zip(strip.values, heights, strict=True)]
        parts.append(_dots(places))
        first, median, third = np.quantile(strip.values, (0.25, 0.5, 0.75)).tolist()
        box = f'<rect class="quartiles" x="{x(first):.1f}" y="{middle - 10:.1f}"'
        parts.append(f'{box} width="{x(third) - x(first):.1f}" height="20" rx="2"/>')
        parts.append(_line(x(median), middle - 10, x(median), middle + 10, "median"))
        order = np.argsort(strip.values, kind="stable").tolist()
        for i in sorted({*order[:_LINKED], *order[-_LINKED:]}):
            said = f"{strip.scenes[i]}: {form(strip.values[i])}"
            parts.append(_linked(places[i], said, links.get(strip.scenes[i], "")))
        parts.append(_text(_WIDTH - _RIGHT + 14, middle + 4, form(median), "start", "label"))
    return _svg(_WIDTH, height, title, parts)


def bland_altman(pairs: SizePairs, form: Callable[[float], str], links: Mapping[str, str]) -> Markup:
    """Difference over mean of both sizes: a dot a scene, the mean difference and the limits of agreement.

    Scenes outside the limits are linked.
    """
    wide, high, left, right, top, bottom = 440, 260, 80, 12, 14, 40
    lower, middle, upper = pairs.limits
    means, differences = pairs.means, pairs.differences
    ends = _padded(float(means.min()), float(means.max()))
    range_ = _padded(min(lower, float(differences.min()), 0.0), max(upper, float(differences.max()), 0.0))

    def x(value: float) -> float:
        return left + (value - ends[0]) / (ends[1] - ends[0]) * (wide - left - right)

    def y(value: float) -> float:
        return high - bottom - (value - range_[0]) / (range_[1] - range_[0]) * (high - top - bottom)

    parts = [_line(left, y(0), wide - right, y(0), "zero")]
    for tick, said in ticks(*ends, 4):
        parts.append(_text(x(tick), high - bottom + 16, said, "middle"))
    for tick, said in ticks(*range_):
        parts.append(_line(left, y(tick), wide - right, y(tick), "grid"))
        parts.append(_text(left - 6, y(tick) + 4, said, "end"))
    for value, kind in ((lower, "limit"), (middle, "mean"), (upper, "limit")):
        parts.append(_line(left, y(value), wide - right, y(value), kind))
    places = [(x(m), y(d)) for m, d in zip(means, differences, strict=True)]
    parts.append(_dots(places))
    for i in np.flatnonzero((differences < lower) | (differences > upper)).tolist():
        said = f"{pairs.scenes[i]}: {form(float(differences[i]))} {pairs.unit}"
        parts.append(_linked(places[i], said, links.get(pairs.scenes[i], "")))
    unit = f", {pairs.unit}" if pairs.unit else ""
    parts.append(
        _text((left + wide - right) / 2, high - 6, f"mean of predicted and reference{unit}", "middle")
    )
    parts.append(
        f'<text transform="translate(11 {(high - bottom + top) / 2:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(f"predicted − reference{unit}")}</text>'
    )
    return _svg(wide, high, f"Bland–Altman plot of {pairs.label}", parts)


def _padded(low: float, high: float) -> tuple[float, float]:
    """A little more than the range; never empty."""
    pad = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    return low - pad, high + pad


def _svg(wide: int, high: int, title: str, parts: Sequence[str]) -> Markup:
    head = f'<svg class="fig" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}" role="group"'
    return Markup(f'{head} aria-label="{escape(title)}">{"".join(parts)}</svg>')


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "", limit: int = 80) -> str:
    """Text; what is longer than ``limit`` is cut, and whole in the tooltip."""
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    whole = f"<title>{escape(text)}</title>" if short != text else ""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(short)}{whole}</text>'


def _dots(places: Sequence[tuple[float, float]]) -> str:
    """All dots as one path: a tenth of the bytes of circles."""
    return f'<path class="dots" d="{"".join(f"M{x:.1f} {y:.1f}h0" for x, y in places)}"/>'


def _linked(place: tuple[float, float], said: str, link: str) -> str:
    dot = f'<circle class="dot" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="4">'
    dot += f"<title>{escape(said)}</title></circle>"
    return f'<a href="{escape(link)}" aria-label="{escape(said)}">{dot}</a>' if link else dot
