"""Define LookNet, a small promptable network that looks at every object at the same size.

An encoder makes a map of a window once. A prompt is then decoded from three *looks*, rectangles around it:
pixels and map are resampled to the same few cells whatever the object's size
(RoIAlign: He et al., Mask R-CNN, ICCV 2017), the prompt is drawn over them (as in DEXTR: Maninis et al.,
CVPR 2018), and a U-Net (Ronneberger et al., MICCAI 2015) draws the mask there and says what its IoU will be.
So three candidates are three extents: how much of the surroundings is seen with a box, how large the object
may be with a point; Segment Anything (Kirillov et al., ICCV 2023) has three masks for the same reason. Where
all objects have one size, masks can be learned on a CPU, and the few elements of a pond are many cells.

Positions are in elements of the window, x before y, whole numbers at centres. A look is given by its edges,
(n, 4) x0, y0, x1, y1, where an element reaches half an element from its centre; it may go beyond the window.

As a segmenter its embedding is the window and its map, and three looks are three candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import roi_align

from segpipe.config.card import Card
from segpipe.models.card_checks import construct, known, only_arguments
from segpipe.models.network import fill, forward_pass
from segpipe.models.weights import load_state, resolve_weights
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt, check_prompts
from segpipe.prompts.segmenters.torch_base import (
    TorchSegmenter,
    check_channels,
    embedding_tensors,
    square_window,
    wrong_window,
)

STRIDE = 4
"""Elements of the window for one of the encoder's map, along each axis."""
COARSEST = 16
"""A window's edges are multiples of it."""
LEVELS = (1, 2, 4, 6)
"""Channels of a look's levels, as multiples of the first."""
ENCODER_LEVELS = (1.5, 3, 6, 7.5)
"""The same of the encoder's."""
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


class LookNet(nn.Module):
    """The network: `encode` once a window, `decode` for every prompt.

    Args:
        in_channels: of a window.
        width: channels of the first level; other levels have multiples of it.
        context: channels of the encoder's map.
    """

    def __init__(self, in_channels: int = 3, width: int = 16, context: int = 32) -> None:
        super().__init__()
        if min(in_channels, width, context) < 1:
            raise ValueError(
                f"found in_channels {in_channels}, width {width}, context {context}; valid: 1 or more"
            )
        self.in_channels, self.context = in_channels, context
        wide = [int(width * n) for n in ENCODER_LEVELS]
        self.down = nn.ModuleList([_pair(a, b, 2) for a, b in pairwise([in_channels, *wide])])
        self.up = nn.ModuleList([_pair(wide[3] + wide[2], wide[2]), _pair(wide[2] + wide[1], context)])
        w = [width * n for n in LEVELS]
        self.look_down = nn.ModuleList(
            [
                _pair(in_channels + MAPS, w[0]),
                _pair(w[0] + context, w[1]),
                _pair(w[1], w[2]),
                _pair(w[2], w[3]),
            ]
        )
        self.look_up = nn.ModuleList([_pair(w[i + 1] + w[i], w[i]) for i in (2, 1, 0)])
        self.mask = nn.Conv2d(w[0], 1, 1)
        self.iou = nn.Sequential(nn.Linear(w[3] + 2 * w[0] + 3, 64), nn.ReLU(), nn.Linear(64, 1))

    def encode(self, windows: torch.Tensor) -> torch.Tensor:
        """Map (b, context, y / 4, x / 4) of windows (b, c, y, x)."""
        x, found = windows, []
        for level in self.down:
            x = level(x)
            found.append(x)
        for level, finer in zip(self.up, found[-2::-1], strict=False):
            x = level(torch.cat([_twice(x), finer], 1))
        return x

    def decode(
        self,
        windows: torch.Tensor,
        context: torch.Tensor,
        of: torch.Tensor,
        looks: torch.Tensor,
        maps: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, LOOK, LOOK) of the cells of looks, and the IoU (n,) that their mask will have.

        Args:
            windows: (b, c, y, x).
            context: of `encode`.
            of: (n,) which window each look is of.
            looks: (n, 4).
            maps: (n, MAPS, LOOK, LOOK) of `drawn`.
        """
        near, far = resampled(windows, of, looks), resampled(context, of, looks, STRIDE)
        first, second, *others = self.look_down
        found = [first(torch.cat([near, maps], 1))]
        found.append(second(torch.cat([functional.avg_pool2d(found[0], 2), far], 1)))
        for level in others:
            found.append(level(functional.avg_pool2d(found[-1], 2)))
        coarse = x = found[-1]
        for level, finer in zip(self.look_up, found[-2::-1], strict=True):
            x = level(torch.cat([_twice(x), finer], 1))
        logits = self.mask(x).float()
        return logits[:, 0], self.iou(_summary(coarse.float(), x.float(), logits.detach()))[:, 0].sigmoid()


def _pair(given: int, channels: int, stride: int = 1) -> nn.Sequential:
    """Two convolutions, as on every level of a U-Net."""
    return nn.Sequential(
        nn.Conv2d(given, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
    )  # fmt: skip


def _twice(x: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _summary(coarse: torch.Tensor, fine: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(n, …) what a mask's IoU is told from: features inside and outside, and how sure it is of itself."""
    inside = logits.sigmoid()
    hard = (logits > 0).float()
    sizes = [x.mean((2, 3)).clamp(min=1e-3) for x in (inside, 1 - inside)]
    means = [(fine * x).mean((2, 3)) / n for x, n in zip((inside, 1 - inside), sizes, strict=True)]
    sure = (inside * hard).sum((2, 3)) / torch.maximum(inside, hard).sum((2, 3)).clamp(min=1e-3)
    border = 4 * (inside * (1 - inside)).mean((2, 3))
    return torch.cat([coarse.mean((2, 3)), *means, sure, border, hard.mean((2, 3))], 1)


@dataclass(frozen=True, eq=False)
class PromptTensors:
    """Prompts of n objects; what an object has none of is left out by NaN, or by the label −1."""

    boxes: torch.Tensor
    """(n, 4) float32: centres of first and last element, x and y; NaN: none."""
    points: torch.Tensor
    """(n, p, 2) float32, p at least 1."""
    labels: torch.Tensor
    """(n, p) int64: 1 of the object, 0 beside it, −1 no point. One without a box has a 1."""


def looks_at(prompts: PromptTensors, number: torch.Tensor) -> torch.Tensor:
    """(n, 4) look ``number`` (n,) of each prompt: around its box and its points, or its points alone."""
    beside = (prompts.labels != 1)[..., None]
    low = prompts.points.masked_fill(beside, torch.inf).amin(1)
    high = prompts.points.masked_fill(beside, -torch.inf).amax(1)
    boxed = ~prompts.boxes.isnan().any(1, keepdim=True)
    first = torch.where(boxed, torch.minimum(low, prompts.boxes[:, :2]), low) - 0.5
    last = torch.where(boxed, torch.maximum(high, prompts.boxes[:, 2:]), high) + 0.5
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


def drawn(prompts: PromptTensors, looks: torch.Tensor, masks: torch.Tensor | None = None) -> torch.Tensor:
    """Maps (n, MAPS, LOOK, LOOK) that show prompts to the network.

    Args:
        prompts: prompts.
        looks: (n, 4) of `looks_at`.
        masks: (n, LOOK, LOOK) logits of a given mask in the cells of the look, 0 where nothing is said.
    """
    at = torch.arange(LOOK, device=looks.device)
    size = looks[:, 2:] - looks[:, :2]
    cell = size / LOOK
    boxes = torch.nan_to_num(prompts.boxes, nan=-torch.inf)
    covers = []
    for axis in (0, 1):
        low = ((boxes[:, axis] - 0.5 - looks[:, axis]) / cell[:, axis])[:, None]
        high = ((boxes[:, axis + 2] + 0.5 - looks[:, axis]) / cell[:, axis])[:, None]
        covers.append((torch.minimum(at + 1, high) - torch.maximum(at, low)).clamp(0, 1))
    box = covers[1][:, :, None] * covers[0][:, None]
    place = (prompts.points - looks[:, None, :2]) / cell[:, None] - 0.5
    away = (at - place[..., None]).square() / (2 * CLICK**2)  # (n, p, 2, cells)
    bumps = torch.exp(-(away[:, :, 1, :, None] + away[:, :, 0, None, :]))
    clicks = [(bumps * (prompts.labels == label)[..., None, None]).sum(1).clamp(max=1) for label in (1, 0)]
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


ARGUMENTS = ("in_channels", "width", "context")
OUTSIDE = -10.0
"""Logits beyond a look."""


def read_network(card: Card) -> tuple[int, LookNet]:
    """Return the edge of a card's square window, and its network without weights.

    Raises:
        RequestError: names the field, what was found and what would be valid.
    """
    known(card, {LookNet.__name__: LookNet})
    if card.output.kind != "prompted":
        raise card.error("output.kind", f"found {card.output.kind}; valid for prompts: prompted")
    only_arguments(card, ARGUMENTS)
    edge = square_window(card)
    if edge is None or edge % COARSEST:
        raise wrong_window(card, 256, f"valid: a square whose edge is a multiple of {COARSEST}, e.g.")
    network = construct(card, LookNet, dict(card.arguments))
    assert isinstance(network, LookNet)
    check_channels(card, network.in_channels, "the network has in_channels")
    return edge, network


def embedding_shapes(edge: int, network: LookNet) -> dict[str, tuple[int, int, int]]:
    """Return name and shape (c, y, x) of each array of an embedding of a window."""
    coarse = edge // STRIDE
    return {"window": (network.in_channels, edge, edge), "context": (network.context, coarse, coarse)}


class LookSegmenter(TorchSegmenter):
    """A `Segmenter` that is a LookNet."""

    def __init__(self, card: Card, device: torch.device, threads: int, precision: str, batch: int) -> None:
        """As `load_segmenter`."""
        edge, network = read_network(card)
        fill(card, network, load_state(resolve_weights(card)))
        channels, shapes = network.in_channels, embedding_shapes(edge, network)
        network.eval().requires_grad_(False)
        super().__init__(network, card, channels, edge, edge, shapes, device, threads, precision, batch)

    def _encoded(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        return batch, self._network.encode(batch)

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        """As `Segmenter.decode`. One mask: the look's of highest predicted IoU."""
        check_prompts(prompts, self.window, self.mask_shape)
        window, context = embedding_tensors(embedding, self.shapes, self.device)
        logits = np.empty((len(prompts), LOOKS if multimask else 1, *self.window), np.float32)
        iou = np.empty(logits.shape[:2], np.float32)
        with forward_pass(self.device, "fp32", self._threads):
            for start in range(0, len(prompts), self._batch):
                some = list(prompts[start : start + self._batch])
                # Short batches repeat their last prompt: a batch's shape is part of its bits.
                full = some + some[-1:] * (self._batch - len(some))
                masks, predicted = self._decoded(window, context, full)
                if not multimask:
                    best = predicted.argmax(1, keepdim=True)
                    predicted = predicted.gather(1, best)
                    masks = torch.take_along_dim(masks, best[..., None, None], 1)
                stop = start + len(some)
                logits[start:stop] = masks[: len(some)].cpu().numpy()
                iou[start:stop] = predicted[: len(some)].cpu().numpy()
        return Candidates(logits, iou, logits)

    def _decoded(
        self, window: torch.Tensor, context: torch.Tensor, prompts: Sequence[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, LOOKS, y, x) and predicted IoU (n, LOOKS).

        What a given mask has between the cells of a look, which of a large object are many elements wide, is
        added to the result: a net of roads stays a net.
        """
        tensors = self._as_tensors(prompts)
        given = [p.mask if p.mask is not None else np.zeros(self.window, np.float32) for p in prompts]
        masks = torch.from_numpy(np.stack(given))[:, None].to(self.device).clamp(-CERTAIN, CERTAIN)
        numbers, none = torch.arange(len(prompts)).to(self.device), torch.zeros(len(prompts)).to(self.device)
        logits, scores = [], []
        for look in range(LOOKS):
            edges = looks_at(tensors, torch.full_like(numbers, look))
            coarse = resampled(masks, numbers, edges)[:, 0]
            found, iou = self._network.decode(window, context, none, edges, drawn(tensors, edges, coarse))
            seen = laid(coarse, edges, self.window, torch.nan)
            between = torch.nan_to_num(masks[:, 0] - seen)
            logits.append(laid(found, edges, self.window, OUTSIDE) + between)
            scores.append(iou)
        return torch.stack(logits, 1), torch.stack(scores, 1)

    def _as_tensors(self, prompts: Sequence[Prompt]) -> PromptTensors:
        """Prompts as tensors; those without a box and a point of the object get the box of their mask."""
        most = max(1, *(len(p.points_xy) for p in prompts))
        boxes = np.full((len(prompts), 4), np.nan, np.float32)
        points = np.zeros((len(prompts), most, 2), np.float32)
        labels = np.full((len(prompts), most), -1, np.int64)
        for i, prompt in enumerate(prompts):
            count = len(prompt.points_xy)
            points[i, :count], labels[i, :count] = prompt.points_xy, prompt.labels
            if prompt.box_xyxy is not None:
                boxes[i] = prompt.box_xyxy
            elif not (prompt.labels == 1).any():
                boxes[i] = self._extent(prompt.mask)
        arrays = {"boxes": boxes, "points": points, "labels": labels}
        return PromptTensors(**{name: torch.from_numpy(a).to(self.device) for name, a in arrays.items()})

    def _extent(self, mask: np.ndarray | None) -> np.ndarray:
        """Box of a given mask; the window's where nothing is in it."""
        inside = np.zeros(self.window, bool) if mask is None else mask > 0
        if not inside.any():
            return np.array([0, 0, self.window[1] - 1, self.window[0] - 1], np.float32)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
