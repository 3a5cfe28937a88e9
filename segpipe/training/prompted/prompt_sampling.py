"""How objects are asked for while a network learns: by which prompts, from which looks, what came before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from segpipe.prompts.segmenters.looknet import CERTAIN, LOOK, LOOKS, PromptTensors, drawn, looks_at, resampled
from segpipe.training.prompted.samples import Batch

OUTLINED = 0.25
"""Share of boxes that come with a coarse mask."""
COARSE = (2, 4, 8)
"""Cells of such a mask's own, along each axis."""
WAVER, WAVES = 0.25, 9
"""Noise on it: its deviation as a share of cover, and waves along a look."""


@dataclass(frozen=True, eq=False)
class Looks:
    """What the network is shown of n objects, and what it should find."""

    of: torch.Tensor
    """(n,) int64: the window of each."""
    asked: PromptTensors
    """Prompts; each has one point at most."""
    edges: torch.Tensor
    """(n, 4) the look at each."""
    given: torch.Tensor
    """(n, LOOK, LOOK) logits of a coarse mask, 0 where none is given."""
    cover: torch.Tensor
    """(n, LOOK, LOOK) share of each cell that is the object's."""
    total: torch.Tensor
    """(n,) cells that the whole object would take."""

    @property
    def maps(self) -> torch.Tensor:
        """As the network takes prompts."""
        return drawn(self.asked, self.edges, self.given)


def look(batch: Batch, rng: np.random.Generator) -> Looks:
    """One look, drawn at random, at each object: two of three are asked for by a box, one by a point."""
    count = len(batch.of)
    by_point = torch.arange(count) % 3 == 2
    boxes = torch.from_numpy(batch.boxes).masked_fill(by_point[:, None], torch.nan)
    points, labels = torch.from_numpy(batch.points)[:, None], torch.where(by_point, 1, -1)[:, None]
    asked = PromptTensors(boxes, points, labels)
    edges = looks_at(asked, torch.from_numpy(rng.integers(LOOKS, size=count)))
    masks = torch.from_numpy(batch.masks).float()
    cover = resampled(masks[:, None], torch.arange(count), edges)[:, 0]
    cells = ((edges[:, 2:] - edges[:, :2]) / LOOK).prod(1)
    outlined = torch.from_numpy(rng.random(count) < OUTLINED) & ~by_point
    given = torch.where(outlined[:, None, None], outlines(cover, rng), 0.0)
    return Looks(torch.from_numpy(batch.of), asked, edges, given, cover, masks.sum((1, 2)) / cells)


def outlines(cover: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Coarse masks (n, y, x), logits: means over blocks of cells, with smooth noise."""
    coarse = int(rng.choice(COARSE))
    small = functional.avg_pool2d(cover[:, None], coarse)
    large = functional.interpolate(small, scale_factor=float(coarse), mode="bilinear")
    noise = torch.from_numpy(rng.normal(0, WAVER, (len(cover), 1, WAVES, WAVES)).astype(np.float32))
    large = large + functional.interpolate(noise, cover.shape[1:], mode="bicubic")
    return 2 * CERTAIN * (large[:, 0] - 0.5)


def corrected(looks: Looks, logits: torch.Tensor, rng: np.random.Generator) -> Looks:
    """The same looks with a point in a cell where the answer was wrong and, half of the time, the answer.

    Args:
        looks: of before.
        logits: (n, LOOK, LOOK), the answer.
        rng: chooses cells.
    """
    truth = looks.cover > 0.5
    wrong = ((logits > 0) != truth).flatten(1).float() + 1e-6  # all right: anywhere
    draws = torch.from_numpy(rng.random((len(wrong), 1)).astype(np.float32))
    sums = wrong.cumsum(1)
    at = torch.searchsorted(sums, draws * sums[:, -1:]).clamp(max=LOOK**2 - 1)
    cells = torch.cat([at % LOOK, at // LOOK], 1) + 0.5
    low, high = looks.edges[:, :2], looks.edges[:, 2:]
    point = (low + (high - low) * cells / LOOK)[:, None]
    label = truth.flatten(1).gather(1, at).long()
    asked = looks.asked
    asked = replace(
        asked, points=torch.cat([asked.points, point], 1), labels=torch.cat([asked.labels, label], 1)
    )
    answered = torch.from_numpy(rng.random(len(wrong)) < 0.5)
    return replace(looks, asked=asked, given=torch.where(answered[:, None, None], logits, looks.given))
