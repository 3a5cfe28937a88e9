"""Agreement of each region over all its classes, as a table."""

from __future__ import annotations

import numpy as np
import pandas as pd

from segpipe.metrics.agreement import (
    ONE_CLASS,
    balanced_accuracy,
    cohen_kappa,
    frequency_weighted_iou,
    pixel_accuracy,
)
from segpipe.metrics.overlap import ClassCounts, totals
from segpipe.regions.base import FULL
from segpipe.tables.frames import Piece, fixed_counts, frame

_COLUMNS = {
    **dict.fromkeys(("scene", "region"), "str"),
    **dict.fromkeys(
        ("count", "pixel_accuracy", "balanced_accuracy", "kappa", "frequency_weighted_iou"), "float64"
    ),
    "classes": "str",
    **dict.fromkeys(("n_classes", "n_reference_classes"), "Int64"),
    **dict.fromkeys(("reason", "state"), "str"),
    "attempts": "Int64",
}


def agreement_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Agreement over all classes by scene and region, of a metric table.

    Columns: ``count``, elements compared; ``pixel_accuracy``, ``balanced_accuracy`` (mean recall
    over the classes that the reference has), ``kappa`` (Cohen's) and ``frequency_weighted_iou``, all
    four over every value that prediction or reference has there, background and values that are no
    class of the model among them; ``classes``, these values' names; ``n_classes``, how many they
    are, and ``n_reference_classes``, how many of them the reference has; ``reason``, why a number is
    empty.
    """
    group = metrics.groupby(["scene", "region"], sort=False).ngroup().to_numpy(dtype=np.int64)
    order = np.argsort(group, kind="stable")
    rows, group = metrics.iloc[order], group[order]
    heads = rows.iloc[np.flatnonzero(np.diff(group, prepend=-1))]
    counts, groups = fixed_counts(rows), len(heads)
    cells = ClassCounts(group, rows["value"].to_numpy(dtype=np.int64), counts, groups)
    compared = totals(group, counts.actual, groups)
    kappa = cohen_kappa(cells)
    why = np.where(np.isnan(kappa), ONE_CLASS, "").astype(object)
    names, n_classes = _names(rows, group, ~counts.undefined, groups)
    columns = {name: heads[name].to_numpy() for name in ("scene", "region", "state", "attempts")}
    columns |= {
        "count": np.where(heads["tp"].notna(), compared / FULL, np.nan),
        "pixel_accuracy": pixel_accuracy(cells),
        "balanced_accuracy": balanced_accuracy(cells),
        "kappa": kappa,
        "frequency_weighted_iou": frequency_weighted_iou(cells),
        "classes": names,
        "n_classes": n_classes,
        "n_reference_classes": np.bincount(group[counts.actual > 0], minlength=groups),
        "reason": np.where(compared > 0, why, heads["reason"].to_numpy(dtype=object)),
    }
    return frame([Piece(groups, columns)], _COLUMNS)


def _names(
    rows: pd.DataFrame, group: np.ndarray, present: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each group the classes that are present, as one text, and how many they are."""
    words = rows["class"].to_numpy(dtype=object)[present].tolist()
    number = np.bincount(group[present], minlength=groups)
    stop = np.cumsum(number)
    spans = zip((stop - number).tolist(), stop.tolist(), strict=True)
    return np.array([", ".join(words[begin:end]) for begin, end in spans], dtype=object), number
