"""Objects of a raster as COCO annotations (Lin et al. 2014): run lengths, box, area, category.

A mask is the lengths of alternating runs of 0 and 1, beginning with 0, over the whole image column by
column: COCO's uncompressed RLE, which pycocotools and its kin read as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.boxes import Box
from segpipe.instances.merge import SceneObjects


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of elements of one id, in the image's column-major order; any order of rows, all int64."""

    ids: np.ndarray
    """(n,) above 0."""
    start: np.ndarray
    """(n,) position x·height + y of a run's first element."""
    length: np.ndarray
    """(n,) elements."""


def block_runs(ids: np.ndarray, box: Box, shape: tuple[int, int]) -> Runs:
    """The runs in one block.

    Args:
        ids: (y, x) of the scene over the box, 0 no object.
        box: the block.
        shape: (y, x) of the scene.
    """
    columns = np.pad(ids.T, ((0, 0), (0, 1)))  # no run goes on into the next column
    line = columns.ravel().astype(np.int64)
    begin = np.flatnonzero(np.diff(line, prepend=0))
    end = np.r_[begin[1:], len(line)]
    some = line[begin] > 0
    begin, end = begin[some], end[some]
    x, y = np.divmod(begin, columns.shape[1])
    return Runs(line[begin], (x + box.start[1]) * shape[0] + y + box.start[0], end - begin)


def coco_annotations(
    objects: SceneObjects, runs: Iterable[Runs], shape: tuple[int, int], image: int = 1
) -> Iterator[dict[str, Any]]:
    """One annotation per object, ready for JSON: the same for any blocks, in any order.

    A ``score`` is there where the object has one. ``area`` and ``bbox`` (x, y, width, height) are in pixels.

    Args:
        objects: of the scene.
        runs: of blocks that partition the scene (`block_runs`).
        shape: (y, x) of the scene.
        image: ``image_id``.
    """
    parts = list(runs)
    ids, start, length = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(p, name) for p in parts)])
        for name in ("ids", "start", "length")
    )
    order = np.lexsort((start, ids))
    ids, start, length = ids[order], start[order], length[order]
    bounds = np.searchsorted(ids, np.arange(1, len(objects) + 2)).tolist()
    for place, number in enumerate(objects.ids.tolist()):
        rows = slice(bounds[place], bounds[place + 1])
        (y0, x0), (y1, x1) = objects.start[place].tolist(), objects.stop[place].tolist()
        score = float(objects.scores[place])
        yield {
            "id": number,
            "image_id": image,
            "category_id": int(objects.classes[place]),
            "segmentation": {"size": list(shape), "counts": _counts(start[rows], length[rows], shape)},
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": int(objects.elements[place]),
            "iscrowd": 0,
        } | ({} if np.isnan(score) else {"score": score})


def _counts(start: np.ndarray, length: np.ndarray, shape: tuple[int, int]) -> list[int]:
    """Lengths of alternating runs of 0 and 1, from ascending runs of 1; those that meet become one."""
    stop = start + length
    new = np.r_[True, start[1:] != stop[:-1]][: len(start)]
    start, stop = start[new], stop[np.r_[new[1:], True][: len(stop)]]
    edges = np.column_stack([start, stop]).ravel()
    counts: list[int] = np.diff(np.r_[0, edges, shape[0] * shape[1]]).tolist()
    return counts if counts[-1] or len(counts) == 1 else counts[:-1]
