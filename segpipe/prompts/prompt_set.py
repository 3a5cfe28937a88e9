"""Everything that is asked of one scene, in one numbering: drawn, of an earlier run, or found for a phrase.

It is settled once for a scene and kept beside the answers, so that every worker asks the same.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import shapely

from segpipe.prompts.inputs.prompts import Boxes, Outlines, Points, Prompts, join_prompts
from segpipe.prompts.masks.merge_masks import Source


@dataclass(frozen=True, eq=False)
class Asked:
    """The objects that are asked for."""

    prompts: Prompts
    """Numbered 1…n without gaps."""
    kind: np.ndarray
    """(n,) int64, `segpipe.prompts.masks.merge_masks.Source`."""
    score: np.ndarray
    """(n,) float64: how sure the grounder is; NaN: nobody was asked."""
    also: tuple[tuple[str, ...], ...]
    """Further phrases that found the same box."""
    phrases: tuple[dict[str, Any], ...] = ()
    """What became of each phrase, as `segpipe.tables.record.AskedPhrase` takes it."""
    lines: tuple[str, ...] = field(default=())
    """What became of each file of prompts, in words."""

    def __len__(self) -> int:
        return len(self.prompts)

    def dump(self) -> bytes:
        """Exact, as one blob."""
        p = self.prompts
        text = {
            "names": p.phrases, "also": self.also, "phrases": self.phrases, "lines": self.lines,
        }  # fmt: skip
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            objects=p.objects, kind=self.kind, score=self.score,
            points=p.points.position, positive=p.points.positive, points_of=p.points.objects,
            box_start=p.boxes.start, box_stop=p.boxes.stop, boxes_of=p.boxes.objects,
            outlines_of=p.outlines.objects,
            outlines=np.frombuffer(_packed(p.outlines.polygons), np.uint8),
            text=np.frombuffer(json.dumps(text).encode(), np.uint8),
        )  # fmt: skip
        return buffer.getvalue()

    @classmethod
    def load(cls, data: bytes) -> Asked:
        """The inverse of `dump`."""
        with np.load(io.BytesIO(data)) as f:
            text = json.loads(f["text"].tobytes())
            prompts = Prompts(
                f["objects"],
                tuple(text["names"]),
                Points(f["points"], f["positive"], f["points_of"]),
                Boxes(f["box_start"], f["box_stop"], f["boxes_of"]),
                Outlines(_unpacked(f["outlines"].tobytes()), f["outlines_of"]),
            )
            also = tuple(tuple(names) for names in text["also"])
            return cls(prompts, f["kind"], f["score"], also, tuple(text["phrases"]), tuple(text["lines"]))


def _packed(polygons: np.ndarray) -> bytes:
    return bytes(shapely.to_wkb(shapely.GeometryCollection(polygons.tolist())))


def _unpacked(data: bytes) -> np.ndarray:
    return np.array([*shapely.from_wkb(data).geoms], dtype=object)


def take(prompts: Prompts, objects: np.ndarray) -> Prompts:
    """The prompts of some objects (ascending numbers) alone."""
    chosen = np.isin(prompts.objects, objects)
    points, boxes = (np.isin(part.objects, objects) for part in (prompts.points, prompts.boxes))
    outlines = np.isin(prompts.outlines.objects, objects)
    return Prompts(
        prompts.objects[chosen],
        tuple(name for name, c in zip(prompts.phrases, chosen.tolist(), strict=True) if c),
        Points(
            prompts.points.position[points], prompts.points.positive[points], prompts.points.objects[points]
        ),
        Boxes(prompts.boxes.start[boxes], prompts.boxes.stop[boxes], prompts.boxes.objects[boxes]),
        Outlines(prompts.outlines.polygons[outlines], prompts.outlines.objects[outlines]),
    )


def renumbered(prompts: Prompts, first: int) -> Prompts:
    """The same objects as first, first + 1, … in the order of their numbers."""

    def new(objects: np.ndarray) -> np.ndarray:
        return np.asarray(np.searchsorted(prompts.objects, objects) + first)

    return replace(
        prompts,
        objects=new(prompts.objects),
        points=replace(prompts.points, objects=new(prompts.points.objects)),
        boxes=replace(prompts.boxes, objects=new(prompts.boxes.objects)),
        outlines=replace(prompts.outlines, objects=new(prompts.outlines.objects)),
    )


def together(parts: Sequence[Asked]) -> Asked:
    """Several as one, numbered one after the other; at least one is given."""
    moved, first = [], 1
    for part in parts:
        moved.append(renumbered(part.prompts, first))
        first += len(part)
    return Asked(
        join_prompts(moved),
        np.concatenate([p.kind for p in parts]),
        np.concatenate([p.score for p in parts]),
        tuple(names for p in parts for names in p.also),
        tuple(row for p in parts for row in p.phrases),
        tuple(line for p in parts for line in p.lines),
    )


def asked_by(prompts: Prompts, kind: Source, lines: Sequence[str] = ()) -> Asked:
    """Prompts that no grounder found."""
    n = len(prompts)
    return Asked(
        renumbered(prompts, 1), np.full(n, int(kind)), np.full(n, np.nan), ((),) * n, (), tuple(lines)
    )
