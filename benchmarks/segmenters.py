"""Every family of promptable networks against its own library: ``python -m benchmarks.segmenters [NAME …]``.

The architectures are the library's, small, with random weights (tests/prompts/tiny_sams.py), saved to a
folder and read back by a card. A row has parameters; milliseconds to encode a window and to decode a prompt;
the largest difference of logits (as a share of the largest logit) and of predicted IoU from the library's
own processor and model on the same window, and the least IoU of masks with theirs, all from embeddings in
float32; and the mean IoU of masks from embeddings kept in float16 with those. Ends with 1 where a row
differs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt, Segmenter
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.sources.base import Pixels, Scaling
from tests.prompts.tiny_sams import (
    Published,
    card_for,
    edge_of,
    iou,
    make_world,
    normalised,
    picture,
    points,
    published_medsam,
    sam2_video,
    tiny,
    weighted,
)

WIDTHS = (34, 12, 12, 12, 12, 12, 12, 12)
LOGITS, SCORES, MASKS = 1e-4, 1e-4, 0.999
"""Differences from the library that a row may have, and the least IoU."""
REPEATS = 9
"""Times of which the median is taken."""
LARGE = Prompt(box_xyxy=np.array([10.0, 12.5, 40.0, 50.0], np.float32))
PROMPTS = (
    Prompt(**points((30, 20), labels=(1,))),
    Prompt(**points((30, 20), (5.5, 41.25), (50, 50), labels=(1, 0, 1))),
    LARGE,
    Prompt(box_xyxy=LARGE.box_xyxy, **points((20, 30), (25, 45), labels=(1, 0))),
    Prompt(box_xyxy=np.array([0.0, 0.0, 30.0, 8.0], np.float32)),
)


@dataclass(frozen=True, eq=False)
class Row:
    """A network read from its folder, its window, and what the library says of each prompt."""

    segmenter: Segmenter
    window: np.ndarray
    """(c, y, x), normalised."""
    prompts: tuple[Prompt, ...]
    logits: np.ndarray
    """(n, k, y, x) of the library."""
    iou: np.ndarray | None
    """(n, k) of the library; None where its code gives none."""

    def decode(self, embedding: Embedding) -> Candidates:
        """All prompts, with as many masks as the library was asked for."""
        return self.segmenter.decode(embedding, self.prompts, multimask=self.logits.shape[1] > 1)


def _family(family: str, folder: Path) -> Row:
    """Against the library's processor and model."""
    world = make_world(family, folder)
    return _row(world.segmenter, world.window, world.published)


def _row(segmenter: Segmenter, window: np.ndarray, published: Published) -> Row:
    answers = [published(prompt) for prompt in PROMPTS]
    logits, scores = (np.stack([a[i].numpy() for a in answers]) for i in (0, 1))
    return Row(segmenter, window, PROMPTS, logits, scores)


def _sam2_1(folder: Path) -> Row:
    """As published: the folder of a video model with what 2.1 has, against the library's model for images."""
    video = weighted(
        partial(
            sam2_video,
            enable_occlusion_spatial_embedding=True,
            enable_temporal_pos_encoding_for_object_pointers=True,
        )
    )
    video.save_pretrained(folder / "net")
    card = card_for(folder, "sam2_video")
    published = Published("sam2", transformers.Sam2Model.from_pretrained(folder / "net").eval())
    segmenter = load_segmenter(card, torch.device("cpu"))
    return _row(segmenter, normalised(card, published.image), published)


def _medsam(folder: Path) -> Row:
    """SAM with a stretch, one mask a box and probabilities enlarged, against MedSAM's inference code."""
    network = tiny("sam")
    network.save_pretrained(folder / "net")
    card = card_for(
        folder,
        input={"bands": ["ct"], "normalisation": [{"op": "scene_quantiles", "low": 0, "high": 1}]},
        arguments={"enlarge": "probabilities"},
    )
    scan = picture(edge_of("sam"))[..., 0].astype(np.float32) * 7 - 900
    boxes = tuple(p for p in PROMPTS if not len(p.points_xy))
    found = [published_medsam(network, scan, p.box_xyxy) for p in boxes if p.box_xyxy is not None]
    logits = torch.stack(found).logit(eps=1e-6)[:, None]
    ends = ((float(scan.min()), float(scan.max())),)
    steps = Normaliser(card, (Scaling(),), Statistics((ends,)))
    window = steps.elementwise(Pixels(scan[None], np.ones(scan.shape, bool)))
    return Row(load_segmenter(card, torch.device("cpu")), window, boxes, logits.numpy(), None)


ROWS: dict[str, Callable[[Path], Row]] = {
    "SAM": partial(_family, "sam"),
    "SAM-HQ": partial(_family, "sam_hq"),
    "MedSAM": _medsam,
    "SAM 2": partial(_family, "sam2"),
    "SAM 2.1 (video folder)": _sam2_1,
    "EdgeTAM": partial(_family, "edgetam"),
    "SAM 3 (tracker)": partial(_family, "sam3_tracker"),
}


def median_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    call()
    times = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times)


def measure(row: Row) -> tuple[bool, tuple[str, ...]]:
    """Whether it is the library's, and the cells."""
    embedding = row.segmenter.encode(row.window)
    found, halved = row.decode(embedding), row.decode(embedding.half())
    logits = float(np.abs(found.logits - row.logits).max() / np.abs(row.logits).max())
    scores = 0.0 if row.iou is None else float(np.abs(found.iou - row.iou).max())
    masks = float(iou(found.logits > 0, row.logits > 0).min())
    kept = float(iou(found.logits > 0, halved.logits > 0).mean())
    encode = median_ms(lambda: row.segmenter.encode(row.window))
    decode = median_ms(lambda: row.decode(embedding)) / len(row.prompts)
    right = logits <= LOGITS and scores <= SCORES and masks >= MASKS
    return right, (
        f"{row.segmenter.parameters:,}",
        f"{encode:.1f}",
        f"{decode:.1f}",
        f"{logits:.1e}",
        "-" if row.iou is None else f"{scores:.1e}",
        f"{masks:.4f}",
        f"{kept:.4f}",
    )


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"only these of {', '.join(ROWS)}")
    names = parser.parse_args().names or list(ROWS)
    if unknown := set(names) - set(ROWS):
        parser.error(f"no row {', '.join(sorted(unknown))}; valid: {', '.join(ROWS)}")
    torch.set_num_threads(1)
    _print("family", "parameters", "encode ms", "decode ms", "logits", "scores", "least IoU", "float16 IoU")
    differ = 0
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            right, cells = measure(ROWS[name](Path(folder)))
        differ += not right
        _print(name, *cells)
    print(f"{len(names)} rows; {differ} differ")
    sys.exit(bool(differ))


def _print(*cells: str) -> None:
    print("".join(f"{c:<{w}}" if w == WIDTHS[0] else f"{c:>{w}}" for c, w in zip(cells, WIDTHS, strict=True)))


if __name__ == "__main__":
    main()
