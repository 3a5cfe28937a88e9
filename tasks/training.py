"""What the Prefect UI shows of a model in training."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from segpipe.report.templates import data_uri
from segpipe.training.loop import Moment
from segpipe.training.page import curve
from segpipe.training.recipe import Recipe


def training_markdown(recipe: Recipe, fold: str, moment: Moment, folder: Path) -> str:
    """Where the training is, its curves as pictures, and where the page lies."""
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
        lines.append(f"| Mean Dice on what is kept apart | {moment.score:.4f} | {max(scores):.4f} |")
    for title, column in (("Loss", "loss"), ("Mean Dice", "score")):
        figure = curve([(int(r["step"]), float(r[column] or "nan")) for r in rows], title)
        if figure:
            lines += ["", f"![{title} by step]({data_uri('svg+xml', _alone(str(figure)).encode())})"]
    return "\n".join([*lines, "", f"Page with samples: `{folder / 'training.html'}`"])


def _alone(figure: str) -> str:
    """An SVG that needs no style sheet: the UI shows it as a picture."""
    style = (
        "<style>text{font:12px sans-serif;fill:#57606a}path{fill:none}.grid{stroke:#d0d7de}"
        ".curve{stroke:#0969da;stroke-width:2}.dot{fill:#0969da}</style>"
    )
    head, _, rest = figure.partition(">")
    return head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ') + ">" + style + rest
