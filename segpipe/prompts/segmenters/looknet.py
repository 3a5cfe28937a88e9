"""LookNet: a small promptable network that looks at every object at the same size.

An encoder makes a map of a window once. A prompt is then answered from three *looks*, rectangles around it
(`prompts.segmenters.rois`): pixels and map are resampled to the same few cells whatever the object's size
(RoIAlign: He et al., Mask R-CNN, ICCV 2017), the prompt is drawn over them (as in DEXTR: Maninis et al.,
CVPR 2018), and a U-Net (Ronneberger et al., MICCAI 2015) draws the mask there and says what its IoU will be.
So three candidates are three extents: how much of the surroundings is seen with a box, how large the object
may be with a point; Segment Anything (Kirillov et al., ICCV 2023) has three masks for the same reason. Where
all objects have one size, masks can be learned on a CPU, and the few elements of a pond are many cells.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from segpipe.prompts.segmenters.rois import MAPS, resampled

STRIDE = 4
"""Elements of the window for one of the encoder's map, along each axis."""
COARSEST = 16
"""A window's edges are multiples of it."""
LEVELS = (1, 2, 4, 6)
"""Channels of a look's levels, as multiples of the first."""
ENCODER_LEVELS = (1.5, 3, 6, 7.5)
"""The same of the encoder's."""


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
            maps: (n, MAPS, LOOK, LOOK) of `segpipe.prompts.segmenters.rois.drawn`.
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
        nn.Conv2d(given, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


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
