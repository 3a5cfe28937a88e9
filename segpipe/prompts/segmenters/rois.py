"""Looks: rectangles around what a prompt points at, and prompts and masks in their cells.

Places are in elements of the window, x before y, whole numbers at centres. A look is given by its edges,
(n, 4) x0, y0, x1, y1, where an element reaches half an element from its centre; it may go beyond the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional
from torchvision.ops import roi_align

LOOK = 64
"""Cells of a look along each axis."""
LOOKS = 3
"""At one object: their order is from the closest."""
PADS = (0.12, 0.3, 0.6)
"""What each look shows on every side of a box, as a share of its size …"""
ROOM = 2.0
"""… and in elements besides."""
REACHES = (10.0, 28.0, 80.0)
"""What each look shows around points, in elements."""
CLICK = 2.0
"""Deviation of the bump that stands for a point, in cells."""
CERTAIN = 4.0
"""Logits of a given mask count up to here."""
MAPS = 6
"""Channels that a prompt is drawn in: box, points of the object, points beside it, mask, width, height."""


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts of n objects; what an object has none of is left out by NaN, or by the label −1."""

    boxes: torch.Tensor
    """(n, 4) float32: centres of first and last element, x and y; NaN: none."""
    points: torch.Tensor
    """(n, p, 2) float32, p at least 1."""
    labels: torch.Tensor
    """(n, p) int64: 1 of the object, 0 beside it, −1 no point. One without a box has a 1."""


def looks_at(asked: Asked, number: torch.Tensor) -> torch.Tensor:
    """(n, 4) look ``number`` (n,) of each prompt: around its box and its points, or its points alone."""
    beside = (asked.labels != 1)[..., None]
    low = asked.points.masked_fill(beside, torch.inf).amin(1)
    high = asked.points.masked_fill(beside, -torch.inf).amax(1)
    boxed = ~asked.boxes.isnan().any(1, keepdim=True)
    first = torch.where(boxed, torch.minimum(low, asked.boxes[:, :2]), low) - 0.5
    last = torch.where(boxed, torch.maximum(high, asked.boxes[:, 2:]), high) + 0.5
    share, reach = (torch.tensor(x).to(first)[number][:, None] for x in (PADS, REACHES))
    grow = torch.where(boxed, (last - first) * share + ROOM, reach)
    return torch.cat([first - grow, last + grow], 1)


def resampled(maps: torch.Tensor, of: torch.Tensor, looks: torch.Tensor, stride: int = 1) -> torch.Tensor:
    """What lies under looks: (n, c, cells, cells), LOOK cells, or half as many of a coarser map.

    Args:
        maps: (b, c, y, x).
        of: (n,) which of the maps each look is of.
        looks: (n, 4).
        stride: elements of the window for one of the maps.
    """
    # torchvision counts from the window's edge, which is half an element before its first centre.
    places = torch.cat([of[:, None].to(looks), looks + 0.5], 1)
    cells, samples = (LOOK, 0) if stride == 1 else (LOOK // 2, 2)  # 0: as many as the cell has elements
    return torch.as_tensor(roi_align(maps.float(), places, cells, 1 / stride, samples, aligned=True))


def drawn(asked: Asked, looks: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
    """Maps (n, MAPS, LOOK, LOOK) that tell the network what was asked.

    Args:
        asked: prompts.
        looks: (n, 4) of `looks_at`.
        masks: (n, LOOK, LOOK) logits of a given mask in the cells of the look, 0 where nothing is said.
    """
    at = torch.arange(LOOK, device=looks.device)
    size = looks[:, 2:] - looks[:, :2]
    cell = size / LOOK
    boxes = torch.nan_to_num(asked.boxes, nan=-torch.inf)
    covers = []
    for axis in (0, 1):
        low = ((boxes[:, axis] - 0.5 - looks[:, axis]) / cell[:, axis])[:, None]
        high = ((boxes[:, axis + 2] + 0.5 - looks[:, axis]) / cell[:, axis])[:, None]
        covers.append((torch.minimum(at + 1, high) - torch.maximum(at, low)).clamp(0, 1))
    box = covers[1][:, :, None] * covers[0][:, None]
    place = (asked.points - looks[:, None, :2]) / cell[:, None] - 0.5
    away = (at - place[..., None]).square() / (2 * CLICK**2)  # (n, p, 2, cells)
    bumps = torch.exp(-(away[:, :, 1, :, None] + away[:, :, 0, None, :]))
    clicks = [(bumps * (asked.labels == label)[..., None, None]).sum(1).clamp(max=1) for label in (1, 0)]
    given = torch.zeros_like(box) if masks is None else masks.clamp(-CERTAIN, CERTAIN) / CERTAIN
    sizes = (size.log2() / 4 - 1.25)[..., None, None].expand(-1, -1, LOOK, LOOK)
    return torch.cat([torch.stack([box, *clicks, given], 1), sizes], 1)


def laid(logits: torch.Tensor, looks: torch.Tensor, window: tuple[int, int], outside: float) -> torch.Tensor:
    """(n, y, x): logits (n, LOOK, LOOK) of looks over their window, bilinear; ``outside`` beyond the look."""
    axes = []
    for axis, count in ((0, window[1]), (1, window[0])):
        at = torch.arange(count, device=looks.device, dtype=looks.dtype)
        low, high = looks[:, axis, None], looks[:, axis + 2, None]
        axes.append((at - low) / (high - low) * 2 - 1)
    x, y = axes
    grid = torch.stack([x[:, None].expand(-1, window[0], -1), y[:, :, None].expand(-1, -1, window[1])], -1)
    found = functional.grid_sample(logits[:, None], grid, "bilinear", "border", align_corners=False)[:, 0]
    within = (x.abs() <= 1)[:, None] & (y.abs() <= 1)[:, :, None]
    return torch.where(within, found, torch.full_like(found, outside))
