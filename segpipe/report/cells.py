"""Tables of the page: a data frame becomes cells with a text to read and a value to sort by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from segpipe.report.definitions import Definition, of_column
from segpipe.tables import units
from segpipe.tables.record import ClassInfo

ROWS = 2000
"""Rows shown; browsers sort and search these at once. The rest is in the CSV."""


@dataclass(frozen=True)
class Column:
    """What a column is."""

    label: str
    kind: str
    """text, class, number, whole, ratio, real, percent, size or state."""
    meaning: str


COLUMNS = {
    "scene": Column("Scene", "text", "Name of the scene in this run."),
    "region": Column(
        "Region", "text",
        "Where the number is reported: a polygon of the region layer, a structure of the atlas, or "
        "the whole scene.",
    ),
    "class": Column("Class", "class", "Class of the model card, with its colour in the pictures."),
    "value": Column("Value", "whole", "The class's value in label files."),
    "count": Column(
        "Count", "number",
        "Elements (pixels or voxels). A pixel cut by a polygon's edge counts by the fraction of it inside.",
    ),
    "area_m2": Column("Area", "size", "On the ground. The CSV holds m²."),
    "volume_mm3": Column("Volume", "size", "Of the class in the region. The CSV holds mm³."),
    "area_px": Column(
        "Area", "size", "In pixels, because the scene has no CRS and so no size on the ground."
    ),
    "share": Column("Share", "percent", "Part of the region's seen size that is this class."),
    "state": Column(
        "State", "state",
        "measured: a number, 0 when the class is absent. no_data: no valid pixel in the region. "
        "not_requested: not asked for. failed: the scene failed, so the number is unknown.",
    ),
    "seen": Column(
        "Seen", "percent",
        "Part of the region that has valid pixels: below 100 % the region is cut by the scene's "
        "border or by missing data, and its size is a lower bound.",
    ),
    "touches_edge": Column(
        "Touches edge", "state",
        "Elements of the class lie on the scene's border in this region: the structure may go on "
        "beyond, and its size is a lower bound.",
    ),
    "attempts": Column("Attempts", "whole", "How often the scene's hardest batch was tried; 1: at once."),
    "tp": Column("TP", "number", "True positives: elements of the class in both."),
    "fp": Column("FP", "number", "False positives: predicted, but another class in the reference."),
    "fn": Column("FN", "number", "False negatives: in the reference, but predicted otherwise."),
    "tn": Column("TN", "number", "True negatives: compared elements of the class in neither."),
    "iou": Column("IoU", "ratio", ""),
    "dice": Column("Dice", "ratio", ""),
    "precision": Column("Precision", "ratio", ""),
    "recall": Column("Recall", "ratio", ""),
    "specificity": Column("Specificity", "ratio", ""),
    "size_ratio": Column(
        "Ratio of sizes", "ratio", "Predicted / reference; not defined (—) where the reference lacks it."
    ),
    "pixel_accuracy": Column("Pixel accuracy", "ratio", ""),
    "balanced_accuracy": Column("Balanced accuracy", "ratio", ""),
    "kappa": Column("Kappa", "ratio", ""),
    "frequency_weighted_iou": Column("Frequency-weighted IoU", "ratio", ""),
    "classes": Column("Classes", "text", "Values that entered: those that either map has there."),
    "n_classes": Column("Number", "whole", "How many values entered."),
    "n_reference_classes": Column("In reference", "whole", "How many of them the reference has."),
    "channel": Column("Channel", "text", "Of the image, or of the uncertainty map."),
    "n": Column("n", "number", "Elements with a valid pixel, by cover."),
    "mean": Column("Mean", "real", "Weighted by cover."),
    "sd": Column("SD", "real", "Standard deviation, divided by n."),
    "min": Column("Min", "real", "Smallest."),
    "max": Column("Max", "real", "Largest."),
    "p05": Column("5th percentile", "real", "Right within the bin."),
    "p50": Column("Median", "real", "Right within the bin."),
    "p95": Column("95th percentile", "real", "Right within the bin."),
    "bin": Column("Bin", "real", "Width of the histogram's bins, which the percentiles are right within."),
    "unit": Column("Unit", "text", "Of the numbers in the row."),
    "low": Column("Low", "ratio", "Lower end of the 95 % interval."),
    "high": Column("High", "ratio", "Upper end of the 95 % interval."),
    "interval": Column("Interval over", "text", "What was resampled for it, or why there is none."),
    "tolerance": Column("Tolerance", "real", "Of the surface Dice, in the unit of the row."),
    "width": Column("Width", "real", "Of the boundary metrics, in the unit of the row."),
    "confidence": Column("Confidence", "ratio", "Mean score of the best class over the elements of the bin."),
    "accuracy": Column("Accuracy", "ratio", "Share of the elements of the bin that are right."),
    "ece": Column("ECE", "ratio", ""),
    "threshold": Column("IoU from", "ratio", "Least IoU of a match; — is over all thresholds."),
    "f1": Column("F1", "ratio", "2·TP / (2·TP + FP + FN), of objects."),
    "mean_iou": Column("Mean IoU", "ratio", "Of the matched objects."),
    "ap": Column("AP", "ratio", "COCO's average precision, IoU 0.50 to 0.95; ranked by scores, if any."),
    "ap50": Column("AP50", "ratio", "The same at an IoU of 0.50."),
    "ap75": Column("AP75", "ratio", "The same at an IoU of 0.75."),
    "pq": Column("PQ", "ratio", "Panoptic quality: SQ · RQ."),
    "sq": Column("SQ", "ratio", "Mean IoU of the objects matched at more than 0.5."),
    "rq": Column("RQ", "ratio", "F1 of the objects matched at more than 0.5."),
    "score": Column("Score", "ratio", "How sure the model is, 0 to 1; — where it does not say."),
    "objects": Column("Objects", "whole", "Objects of the class that have most of themselves in the region."),
    **{
        f"centre_{a}": Column(f"Centre {a}", "real", "Centroid, in the coordinates of the scene.")
        for a in ("x", "y", "z")
    },
    **{
        f"{side}_{a}": Column(f"{word} {a}", "whole", f"Bounding box: {said} element along {a}.")
        for side, word, said in (("first", "First", "the first"), ("end", "End", "one past the last"))
        for a in ("z", "y", "x")
    },
    "outcome": Column(
        "Outcome", "text",
        "found, below threshold, not found, not in the vocabulary, not understood; from prompts: not asked "
        "for in words; scene failed: unknown.",
    ),
    "below": Column("Below threshold", "whole", "Candidates that are none because of their score."),
    "small": Column("Too small", "whole", "Candidates that are none because of their size."),
    "merged": Column("Merged", "whole", "Found, and now part of other objects."),
    "best": Column("Best score", "ratio", "Highest score of a candidate, found or not."),
    "mean_score": Column("Mean score", "ratio", "Of the objects that have a score."),
    "means": Column("Means", "text", "Class that the phrase was matched with, or the nearest one."),
    "similarity": Column("Similarity", "ratio", "Of the phrase and that class, at most 1."),
    "note": Column("In words", "text", "What became of the phrase."),
    "also": Column("Also", "text", "Other phrases that the object answers."),
    "source": Column("Source", "text", "Where its prompt is from: drawn, earlier labels, text or a grid."),
    "candidate": Column("Candidate", "whole", "Which of the candidate masks was taken."),
    "predicted_iou": Column("Predicted IoU", "ratio", "What the model expects of the mask; not measured."),
    "stability": Column("Stability", "ratio", "How little the mask depends on the threshold, 0 to 1."),
    "level": Column("Level", "whole", "Of its window, which is thinned 2^level times; 0: not at all."),
    "smallest": Column("Smallest", "whole", "Elements of the smallest object that counts."),
    "side": Column("Side", "text", "Whose object it is: predicted, or of the reference."),
    "id": Column("Id", "whole", "In the file of labels or of the reference."),
    "partner": Column("Partner", "whole", "Id of the other side's object, at an IoU of more than 0.5."),
    "reason": Column("Reason", "text", "Why a ratio is not defined."),
    "metric": Column(
        "Metric",
        "text",
        "A mean of ratios, or (pooled) ratios of summed counts, where large regions weigh more.",
    ),
    "over": Column("Over", "text", "What is averaged or summed, from the inside out."),
    "n_defined": Column("Defined", "whole", "Ratios in the mean."),
    "n_missed": Column(
        "Missed", "whole", "Of these: in the reference, and none of it predicted (counted as 0)."
    ),
    "n_hallucinated": Column(
        "Hallucinated", "whole", "Of these: predicted, and none in the reference (counted as 0)."
    ),
    "n_undefined": Column(
        "Undefined", "whole", "Left out of the mean: absent in both, or nothing to compare."
    ),
    "n_failed": Column("Failed", "whole", "Scenes that failed and are left out."),
}  # fmt: skip
_COMPARED = {
    "predicted": "Size of the class in the prediction, over the elements that were compared.",
    "reference": "Size of the class in the reference, over the elements that were compared.",
    "difference": "Predicted − reference.",
    "mask_area": "Of the object's own mask, also where the map shows another object.",
    "mask_volume": "Of the object's own mask, also where the map shows another object.",
}
"""Sizes that are named for what and the unit."""
_OF_TABLE = {
    ("summary", "value"): Column("Value", "ratio", "The metric."),
    ("asked", "phrase"): Column("Phrase", "class", "As asked; the name of a class of this run."),
    ("asked", "found"): Column("Found", "whole", "Candidates with a sufficient score and size."),
    ("asked", "objects"): Column("Objects", "whole", "Of the phrase, in the map of the scene."),
    **{
        ("instances", name): column
        for name, column in {
            "region": Column("Region", "text", "The one that most of the object lies in; empty: in none."),
            "count": Column("Count", "number", "Elements (pixels or voxels) of the object."),
            "touches_edge": Column(
                "Touches edge",
                "state",
                "The object lies on the scene's border: it may go on beyond, and its size is a lower bound.",
            ),
        }.items()
    },
    **{
        (table, name): Column(name.upper(), "number", said)
        for table in ("objects", "panoptic")
        for name, said in {
            "tp": "Pairs of a predicted object and one of the reference that match.",
            "fp": "Predicted objects without a match.",
            "fn": "Objects of the reference without a match.",
        }.items()
    },
    ("calibration", "low"): Column(
        "From", "ratio", "Lower end of the bin of confidence; empty: over all bins."
    ),
    ("calibration", "high"): Column("To", "ratio", "Upper end of the bin."),
}
"""Columns that mean something else in one table."""
_DISTANCES = {
    "hausdorff": "Hausdorff", "hd95": "HD95", "assd": "ASSD", "asd_to_reference": "ASD to reference",
    "asd_to_prediction": "ASD to prediction",
}  # fmt: skip
for _kind in ("element", "voxel"):
    COLUMNS |= {f"{k}_{_kind}": Column(f"{v} ({_kind})", "real", "") for k, v in _DISTANCES.items()}
    COLUMNS[f"surface_dice_{_kind}"] = Column(f"Surface Dice ({_kind})", "ratio", "")
for _name, _label in (("iou", "IoU"), ("f1", "F1"), ("precision", "precision"), ("recall", "recall")):
    COLUMNS[f"boundary_{_name}"] = Column(f"Boundary {_label}", "ratio", "")
_TONES = {"failed": "warn", "no_data": "warn", "yes": "yes", "no": "muted"}


@dataclass(frozen=True)
class Cell:
    """One cell as the template shows it."""

    text: str
    sort: str = ""
    """What the script sorts by, when it is not the text; empty for NaN (always last)."""
    color: str = ""
    tone: str = ""
    """``num``, ``warn``, ``muted`` or nothing."""


@dataclass(frozen=True)
class Head:
    """One column's header."""

    label: str
    unit: str
    numeric: bool
    meaning: str
    definition: str = ""
    """Id of what explains it at length; empty: nothing does."""


@dataclass(frozen=True)
class Table:
    """A table ready to be shown."""

    id: str
    title: str
    file: str
    """The CSV that holds all of it, from the run's folder."""
    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: int
    """Rows there are; those left out are in the CSV."""
    note: str = ""
    """How the rows are ordered, where not as in the CSV."""


def page_table(
    id: str,
    title: str,
    file: str,
    frame: pd.DataFrame,
    classes: Sequence[ClassInfo],
    limit: int = ROWS,
    note: str = "",
) -> Table:
    """The first ``limit`` rows of a frame. Columns of sizes that hold nothing at all are left out."""
    names = [str(c) for c in frame.columns if not (_size_of(str(c)) and frame[c].isna().all())]
    shown = frame.head(limit)
    heads, columns = [], []
    colors = {c.name: c for c in classes}
    for name in names:
        head, draw = _column(id, name, frame, colors)
        heads.append(head)
        columns.append([draw(v) for v in shown[name].tolist()])
    rows = tuple(zip(*columns, strict=True)) if columns else ()
    return Table(id, title, file, tuple(heads), rows, len(frame), note)


def _column(
    table: str, name: str, frame: pd.DataFrame, classes: Mapping[str, ClassInfo]
) -> tuple[Head, Callable[[Any], Cell]]:
    """The header, and what draws a value of it."""
    spec = _OF_TABLE.get((table, name)) or _spec(name, frame)
    found = of_column(name)
    definition, meaning = (found.id if found else ""), spec.meaning or _explained(found)
    if spec.kind == "size":
        unit = units.size_unit(_size_of(name), frame[name].dropna().tolist())
        head = Head(spec.label, unit.symbol, True, meaning, definition)
        return head, lambda v: _numeric(v, lambda x: units.size(x, unit))
    if spec.kind == "class":
        return Head(spec.label, "", False, meaning, definition), lambda v: _class(v, classes)
    if spec.kind in _NUMBERS:
        head = Head(spec.label, "%" if spec.kind == "percent" else "", True, meaning, definition)
        form = _NUMBERS[spec.kind]
        return head, lambda v: _numeric(v, form)
    return Head(spec.label, "", False, meaning, definition), _state if spec.kind == "state" else _plain


def _spec(name: str, frame: pd.DataFrame) -> Column:
    """What a column is; one that nobody described is shown by its own name and type."""
    if name in COLUMNS:
        return COLUMNS[name]
    what, _, unit = name.rpartition("_")
    if what in _COMPARED and f"_{unit}" in _UNITS:
        return Column(what.replace("_", " ").capitalize(), "size", _COMPARED[what])
    numeric = pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name])
    return Column(name.replace("_", " "), "real" if numeric else "text", "")


_UNITS = {"_m2": "area_m2", "_mm3": "volume_mm3", "_px": "area_px"}


def _size_of(name: str) -> str:
    """The column of `units.SIZES` whose unit this one has; empty: it is no size."""
    what, _, unit = name.rpartition("_")
    return _UNITS.get(f"_{unit}", "") if name in units.SIZES or what in _COMPARED else ""


def _explained(found: Definition | None) -> str:
    return " ".join(filter(None, (f"{found.formula}.", found.meaning, found.undefined))) if found else ""


_NUMBERS: dict[str, Callable[[float], str]] = {
    "whole": lambda v: units.number(v, 0),
    "number": lambda v: units.number(v, 0 if v == int(v) else 1),
    "ratio": lambda v: units.number(v, 3),
    "real": lambda v: units.number(v, units.decimals(v)),
    "percent": lambda v: units.percent(v).removesuffix(" %"),
}


def _numeric(value: Any, form: Callable[[float], str]) -> Cell:
    if _missing(value):
        return Cell("—", tone="num muted")
    try:
        as_float = float(value)
    except (TypeError, ValueError):
        return _plain(value)
    return Cell(form(as_float), repr(as_float), tone="num")


def _class(value: Any, classes: Mapping[str, ClassInfo]) -> Cell:
    name = "" if _missing(value) else str(value)
    known = classes.get(name)
    return Cell(name, color=known.color if known else "")


def _state(value: Any) -> Cell:
    text = "—" if _missing(value) else str(value)
    shown = {"True": "yes", "False": "no"}.get(text, text)
    return Cell(shown, tone=_TONES.get(shown, ""))


def _plain(value: Any) -> Cell:
    return Cell("" if _missing(value) else str(value))


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
