"""What every number of the report means: its formula, and what it is when it is not defined.

TP, FP and FN are elements (pixels or voxels) with a valid pixel and a reference, a share of those
on a polygon's edge.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """One number, explained."""

    id: str
    """Anchor on the page: ``def-<id>``."""
    name: str
    formula: str
    """In plain text; empty where there is none."""
    meaning: str
    undefined: str
    """When it is not defined, and what is said then."""
    columns: str = ""
    """Pattern of the tables' columns that hold it, matched whole."""
    metrics: str = ""
    """Pattern of the summary's ``metric`` that it explains, matched at any place."""


_BOTH_EMPTY = "Absent in prediction and reference: not defined (—), counted apart, never 0 or 1."
_DISTANCES = "Not defined (—) where prediction or reference lacks the class; the reason says which."

DEFINITIONS = (
    Definition(
        "iou", "IoU (intersection over union, Jaccard index)", "TP / (TP + FP + FN)",
        "Share of everything that either map calls the class on which both agree.",
        _BOTH_EMPTY, "iou", r"^(mean|pooled) IoU$",
    ),
    Definition(
        "dice", "Dice (Sørensen–Dice coefficient, F1)", "2·TP / (2·TP + FP + FN) = 2·IoU / (1 + IoU)",
        "Overlap relative to the mean size of both.", _BOTH_EMPTY, "dice", r"Dice",
    ),
    Definition(
        "precision", "Precision", "TP / (TP + FP)", "Share of what was predicted that is right.",
        "Not defined (—) where the class is not predicted.", "precision",
    ),
    Definition(
        "recall", "Recall (sensitivity)", "TP / (TP + FN)", "Share of the reference that was found.",
        "Not defined (—) where the reference lacks the class.", "recall",
    ),
    Definition(
        "specificity", "Specificity", "TN / (TN + FP)",
        "Share of what is not the class in the reference that was not called so.",
        "Not defined (—) where the reference is the class everywhere.", "specificity",
    ),
    Definition(
        "miou", "mIoU, and other means over classes and scenes", "mean over scenes (mean over classes (IoU))",
        "First over the classes that are not background, then over scenes. Missed (in the reference, "
        "not predicted) and hallucinated (predicted, not in the reference) classes count as 0.",
        "Classes absent in both are left out of the mean; failed scenes too. Both are counted beside it.",
        "", r"mIoU",
    ),
    Definition(
        "pooled", "Pooled", "ratio of sums: Σ TP / Σ (TP + FP + FN)",
        "Counts are summed first, so large scenes and regions weigh more than in a mean of ratios.",
        "As the ratio itself.", "", r"^pooled",
    ),
    Definition(
        "accuracy", "Pixel accuracy", "Σ TP over all values / elements compared",
        "Share of the compared elements on which both maps agree, background among them.",
        "Not defined (—) where nothing was compared.", "pixel_accuracy", r"pixel accuracy",
    ),
    Definition(
        "balanced", "Balanced accuracy", "mean of recall over the values that the reference has",
        "Every class weighs the same, however large (Brodersen et al. 2010).",
        "Not defined (—) where nothing was compared.", "balanced_accuracy", r"balanced accuracy",
    ),
    Definition(
        "kappa", "Cohen's kappa", "(p_o − p_e) / (1 − p_e)",
        "Agreement p_o beyond the agreement p_e that the margins of the confusion matrix alone give "
        "(Cohen 1960). 1: the same map; 0: as by chance.",
        "Not defined (—) where both maps are one and the same class everywhere.", "kappa", r"kappa",
    ),
    Definition(
        "fwiou", "Frequency-weighted IoU", "Σ (share of the class in the reference × IoU)",
        "IoU weighted by how much of each class there is (Long et al. 2015).",
        "Not defined (—) where nothing was compared.",
        "frequency_weighted_iou", r"frequency-weighted",
    ),
    Definition(
        "interval", "95 % interval", "2.5th to 97.5th percentile of 2,000 bootstrap resamples",
        "Scenes (or what `interval` names) are drawn again with replacement, all their elements "
        "together: how much the number would vary with other scenes of the same kind.",
        "Empty with fewer than 2 of what is resampled.", "interval",
    ),
    Definition(
        "share", "Share and seen", "size of the class / seen size of the region; seen / whole size",
        "A share is of the part of the region that has valid pixels. Seen says how large that part is: "
        "below 100 % sizes are lower bounds.",
        "Not defined (—) where a region has no valid pixel (no_data).", "share|seen",
    ),
    Definition(
        "size", "Area and volume", "Σ cover × size of the element",
        "Area from the affine on a projected grid; on the ellipsoid, row by row, on geographic and Web "
        "Mercator grids. Volume: |det(affine)| per voxel on the native grid. Polygons count edge "
        "elements by the fraction of them inside.",
        "Not defined (—) where a region has no valid pixel, or the scene failed. Absent is 0.",
        "area_.*|volume_.*",
    ),
    Definition(
        "difference", "Difference of sizes and Bland–Altman",
        "predicted − reference; limits of agreement: mean difference ± 1.96 SD",
        "Over the elements that were compared. The plot has a point a scene: the difference over the "
        "mean of both sizes (Bland & Altman 1986). About 95 % of the differences of such scenes lie "
        "within the limits if they are normally distributed.",
        "Scenes without the class in both are left out. No limits below 3 scenes.",
        "(predicted|reference|difference)_.*|size_ratio",
    ),
    Definition(
        "confusion", "Confusion matrix", "elements by class of the reference (rows) and of the prediction",
        "Percentages are of the row: how the reference's elements of a class were predicted.",
        "A row without elements in the reference has none (—).",
    ),
    Definition(
        "box", "Distribution over scenes",
        "dots: scenes; box: first to third quartile; line: median",
        "Each scene weighs the same. Undefined scenes have no dot and are counted beside the row.",
        "",
    ),
    Definition(
        "surface", "Surface distances (Hausdorff, HD95, average, surface Dice)",
        "d(a, B) = distance of a point to the nearest point of the other surface",
        "Hausdorff: the greatest d in either direction; HD95: the greater of the two 95th percentiles; "
        "average symmetric: mean d over both surfaces; surface Dice: share of both surfaces within "
        "the tolerance. “Element” weights surface elements by area (DeepMind), “voxel” counts "
        "edge voxels (MONAI).",
        _DISTANCES, "(hausdorff|hd95|assd|asd_|surface_).*",
    ),
    Definition(
        "boundary", "Boundary IoU and boundary F1",
        "IoU of the parts of both masks within a width of their own boundary; F1 of boundary elements "
        "within the width of the other's",
        "Sensitive to outlines however large the structure (Cheng et al. 2021; Csurka et al. 2013).",
        _DISTANCES, "boundary.*",
    ),
    Definition(
        "pq", "Panoptic quality (PQ, SQ, RQ) and average precision (AP)",
        "PQ = SQ · RQ; SQ = Σ IoU / TP; RQ = TP / (TP + FP/2 + FN/2); "
        "AP = mean of precision over recall 0, 0.01, …, 1",
        "TP: pairs of a predicted and a true object of one class with an IoU of more than 0.5; FP and FN: "
        "the other objects (Kirillov et al. 2019). AP ranks objects by their scores and is the mean over "
        "IoU 0.50, 0.55, …, 0.95 (COCO); AP50 and AP75 are at one of these. Rows of all classes, things "
        "and stuff are means over classes.",
        "Not defined (—) where neither map has an object of the class; SQ also where none is matched.",
        "pq|sq|rq|ap|ap50|ap75",
    ),
    Definition(
        "asked", "What became of a phrase",
        "found: candidates with a sufficient score and size; objects: those of the phrase in the map",
        "Below threshold: there are candidates, and none has a sufficient score and size. Not found: there "
        "are no candidates. Not in the vocabulary: no class of the model means it; the nearest one is "
        "named. Not understood: a negation, several classes at once, or the background. Scores are the "
        "search's own, 0 to 1; the mean score is over objects.",
        "No number (—) where the scene failed, or where objects come from prompts and not from words.",
        "outcome|below|small|merged|best|mean_score|means|similarity",
    ),
    Definition(
        "predicted_iou", "Predicted IoU, candidates and stability",
        "stability = elements with a logit above +1 / elements with a logit above −1",
        "A prompt has several candidate masks; one is taken. The predicted IoU is what the model itself "
        "expects of the mask's IoU with the object: nothing was compared. Stability says how little the "
        "mask depends on the threshold (Kirillov et al. 2023).",
        "Stability is not defined (—) for a mask without an element at the lower threshold.",
        "predicted_iou|stability|candidate",
    ),
    Definition(
        "mask_size", "Size of the mask", "Σ size of the elements of the object's own mask",
        "Where objects overlap the map shows one of them: its size there can be smaller than its mask's.",
        "", "mask_area_.*|mask_volume_.*",
    ),
    Definition(
        "intensity", "Intensity", "mean, sd (divided by n), percentiles of the image under a class",
        "In the image's own unit, over valid elements weighted by cover. Percentiles are right within "
        "the histogram's bin.",
        "Not defined (—) where the class is not in the region.",
    ),
    Definition(
        "uncertainty", "Uncertainty",
        "entropy: −Σ p·ln p / ln k; margin: best score − second best; confidence: best score",
        "Of the k class scores p of each element, as shares of 1. Disagreement is what of the entropy "
        "comes from answers that contradict each other, over overlapping windows and mirror images.",
        "Not defined (—) where the class is not in the region.",
    ),
    Definition(
        "calibration", "Calibration and ECE", "ECE = Σ over bins (n_bin / n) · |accuracy − confidence|",
        "Whether a confidence of 0.8 is right in 80 % of the elements; 15 bins of confidence (Naeini et "
        "al. 2015, Guo et al. 2017).",
        "Not defined (—) where nothing was compared.", "ece",
    ),
)  # fmt: skip


def of_column(name: str) -> Definition | None:
    """What explains a column of a table."""
    return next((d for d in DEFINITIONS if d.columns and re.fullmatch(d.columns, name)), None)


def of_metric(name: str) -> Definition | None:
    """What explains a metric of the summary."""
    return next((d for d in DEFINITIONS if d.metrics and re.search(d.metrics, name)), None)


def needed(columns: Collection[str], metrics: Collection[str], also: Collection[str]) -> Iterator[Definition]:
    """The definitions that a page with these columns, metrics and figures needs, in their order."""
    for item in DEFINITIONS:
        by_column = item.columns and any(re.fullmatch(item.columns, c) for c in columns)
        by_metric = item.metrics and any(re.search(item.metrics, m) for m in metrics)
        if by_column or by_metric or item.id in also:
            yield item
