"""What the Prefect UI shows of a model in training."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from PIL import Image

from segpipe.config.recipe import Recipe
from segpipe.report.templates import data_uri
from segpipe.training.loop import MetricsRow
from segpipe.training.page import curve

SAMPLES = 3
"""Places shown in the UI; the page has all."""
CAPTIONS = ("image", "reference", "predicted")
SAMPLE_EDGE = 200
"""Pixels of a picture's longer side, at most: 5 to 15 KB each."""


def training_markdown(recipe: Recipe, fold: str, moment: MetricsRow, folder: Path) -> str:
    """Where the training is: curves and samples as pictures, and where the page lies."""
    with (folder / "history.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [
        f"# {recipe.card.title or recipe.name}: {fold}",
        f"Step {moment.step:,} of {moment.steps:,}, {moment.seconds / 60:.1f} minutes.",
        "",
        "| | now | best |",
        "| --- | --- | --- |",
        f"| Loss | {moment.loss:.4f} | {min(float(r['loss']) for r in rows):.4f} |",
    ]
    scores = [float(r["score"]) for r in rows if r["score"] and not math.isnan(float(r["score"]))]
    if scores:
        lines.append(f"| {recipe.measure} on what is kept apart | {moment.score:.4f} | {max(scores):.4f} |")
    for title, column in (("Loss", "loss"), (recipe.measure, "score")):
        figure = curve([(int(r["step"]), float(r[column] or "nan")) for r in rows], title)
        if figure:
            lines += ["", f"![{title} by step]({data_uri('svg+xml', _alone(str(figure)).encode())})"]
    lines += _samples(folder / "samples")
    return "\n".join([*lines, "", f"Page with samples: `{folder / 'training.html'}`"])


def _samples(folder: Path) -> list[str]:
    """The fold's newest pictures as a Markdown table, embedded; nothing where none are kept apart."""
    rows = []
    for number in range(SAMPLES):
        paths = {caption: folder / f"{number}-{caption}.jpg" for caption in CAPTIONS}
        if all(path.is_file() for path in paths.values()):
            cells = [f"![{caption} {number + 1}]({_small(path)})" for caption, path in paths.items()]
            rows.append(f"| {' | '.join(cells)} |")
    head = ["", f"| {' | '.join(c.capitalize() for c in CAPTIONS)} |", "|" + " --- |" * len(CAPTIONS)]
    return [*head, *rows] if rows else []


def _small(path: Path) -> str:
    """A picture of the page, made small, as a data URI."""
    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((SAMPLE_EDGE, SAMPLE_EDGE))
        picture.save(buffer, "JPEG", quality=80)
    return data_uri("jpeg", buffer.getvalue())


def _alone(figure: str) -> str:
    """An SVG that needs no style sheet: the UI shows it as a picture."""
    style = (
        "<style>text{font:12px sans-serif;fill:#57606a}path{fill:none}.grid{stroke:#d0d7de}"
        ".curve{stroke:#0969da;stroke-width:2}.dot{fill:#0969da}</style>"
    )
    head, _, rest = figure.partition(">")
    return head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ') + ">" + style + rest
