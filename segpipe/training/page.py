"""The page of a model in training: curves, pictures, scores, and the recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml
from markupsafe import Markup

from segpipe.config.recipe import Recipe
from segpipe.pictures.drawing import DIFFERENCE
from segpipe.report.figures import ticks
from segpipe.report.templates import data_uri, render
from segpipe.training.loop import MetricsRow
from segpipe.training.pictures import Sample

WIDE, HIGH, LEFT, RIGHT, BOTTOM = 640, 220, 56, 28, 28


@dataclass(frozen=True)
class FoldView:
    """What a page shows of one fold."""

    name: str
    state: str
    scores: str
    rows: Sequence[MetricsRow]
    samples: Sequence[Sample]
    facts: Mapping[str, str]


def training_page(recipe: Recipe, folds: Sequence[FoldView]) -> str:
    """One self-contained page."""
    views = [
        {
            "name": fold.name,
            "state": fold.state,
            "scores": fold.scores,
            "curves": [
                (
                    "Loss on what is learned from",
                    curve([(m.step, m.loss) for m in fold.rows], "Loss by step"),
                ),
                (
                    f"{recipe.measure} on what is kept apart",
                    curve([(m.step, m.score) for m in fold.rows], f"{recipe.measure} by step"),
                ),
            ],
            "samples": [(s.name, [(c, data_uri("jpeg", p)) for c, p in s.pictures]) for s in fold.samples],
            "facts": fold.facts,
        }
        for fold in folds
    ]
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=100)
    legend = [(c.name, c.color) for c in recipe.card.classes if not c.background]
    kinds = list(DIFFERENCE.values())
    return render("training.html", recipe=recipe, folds=views, text=text, legend=legend, difference=kinds)


def curve(points: Sequence[tuple[float, float]], title: str) -> Markup:
    """A line over steps, as SVG; points without a number are left out."""
    known = [(x, y) for x, y in points if math.isfinite(y)]
    if not known:
        return Markup("")
    xs, ys = [x for x, _ in known], [y for _, y in known]
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    low, high = low - pad, high + pad
    last = max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDE - LEFT - RIGHT) * x / last
        return across, 8 + (HIGH - BOTTOM - 8) * (high - y) / (high - low)

    parts = []
    for value, label in ticks(low, high):
        _, y = place(0, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDE - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in ticks(0, last):
        x, _ = place(value, low)
        parts.append(f'<text x="{x:.1f}" y="{HIGH - 8}" text-anchor="middle">{label}</text>')
    line = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in known)
    parts.append(f'<path class="curve" d="M{line}"/>')
    x, y = place(*known[-1])
    parts.append(
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{known[-1][1]:.4g}</title></circle>'
    )
    head = f'<svg class="fig" viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" role="img"'
    return Markup(f'{head} aria-label="{title}">{"".join(parts)}</svg>')
