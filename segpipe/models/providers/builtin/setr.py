"""SETR: a plain vision transformer as encoder, with the paper's two decoders of its last layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import timm
import torch
from torch import nn

from segpipe.models.providers.builtin.convolutional import check_size, positive, start_convolutions, upsample


class SETR(nn.Module, ABC):
    """A vision transformer whose tokens are laid out as a map and decoded: what both variants share.

    Zheng et al., "Rethinking Semantic Segmentation from a Sequence-to-Sequence Perspective with
    Transformers", CVPR 2021, arXiv:2012.15840.

    ``backbone`` is timm's transformer under timm's names, so that its state dict, less ``head``, loads. The
    map is that of the last layer after the final norm, without class and register tokens.

    Where we differ: batch normalisation is not synchronised across GPUs; no auxiliary heads (they serve
    training alone); logits are upsampled between centres of elements (no aligned corners).

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        vit_name: timm's name of the transformer, e.g. ``vit_base_patch16_384``; the default is T-Large.
        img_size: edge in px that the position embeddings are made for.
        dynamic_img_size: other sizes are taken too, with position embeddings interpolated (bicubic).
        channels: of the decoder.
    """

    scale: int
    """How much finer the decoder's answer is than its input."""
    backbone: Any
    """timm's VisionTransformer; timm has no types."""

    def __init__(
        self,
        *,
        in_channels: int,
        classes: int,
        vit_name: str = "vit_large_patch16_384",
        img_size: int = 768,
        dynamic_img_size: bool = False,
        channels: int = 256,
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, classes=classes, img_size=img_size, channels=channels)
        if vit_name not in timm.list_models(module=["vision_transformer", "deit"]):
            raise ValueError(
                f"vit_name: found {vit_name!r}; valid: a ViT or DeiT of timm, e.g. vit_base_patch16_384"
            )
        self.backbone = timm.create_model(
            vit_name,
            pretrained=False,
            in_chans=in_channels,
            num_classes=0,
            img_size=img_size,
            dynamic_img_size=dynamic_img_size,
        )
        if self.stride % self.scale or img_size % self.stride:
            raise ValueError(
                f"img_size: found {img_size} with patches of {self.stride}; "
                f"valid: whole patches, their size a multiple of {self.scale}"
            )
        self.decoder = self._decoder(self.backbone.embed_dim, channels, classes)
        start_convolutions(self.decoder)
        self._img_size = None if dynamic_img_size else img_size

    @staticmethod
    @abstractmethod
    def _decoder(embedding: int, channels: int, classes: int) -> nn.Sequential:
        """From (n, embedding, y, x) to (n, classes, scale·y, scale·x)."""

    @property
    def stride(self) -> int:
        """Edges of the input are multiples of this: the size of a patch."""
        return int(self.backbone.patch_embed.patch_size[0])

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens as a map (n, embedding, y / stride, x / stride)."""
        tokens = self.backbone.forward_features(x)[:, self.backbone.num_prefix_tokens :]
        rows, columns = (n // self.stride for n in x.shape[-2:])
        return torch.reshape(tokens.transpose(1, 2), (len(x), -1, rows, columns))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes, y, x) of images (n, in_channels, y, x).

        Raises:
            ValueError: the size is not `img_size`, or, where sizes are free, no multiple of the stride.
        """
        rows, columns = x.shape[-2:]
        if self._img_size not in (None, rows) or self._img_size not in (None, columns):
            raise ValueError(
                f"input of {rows} × {columns}; valid: {self._img_size} × {self._img_size}, "
                f"or multiples of {self.stride} with `dynamic_img_size: true`"
            )
        check_size(x, self.stride)
        return upsample(self.decoder(self.features(x)), self.stride // self.scale)


class SETRNaive(SETR):
    """SETR with the naive decoder: two 1 × 1 convolutions, then upsampling at once. See `SETR`."""

    scale = 1

    @staticmethod
    def _decoder(embedding: int, channels: int, classes: int) -> nn.Sequential:
        return nn.Sequential(*_convolution(embedding, channels, 1), nn.Conv2d(channels, classes, 1))


class SETRPUP(SETR):
    """SETR with progressive upsampling: four times a 3 × 3 convolution and upsampling by 2. See `SETR`.

    The last convolution, 1 × 1, stands before the last upsampling, as in the authors' code.
    """

    scale = 8

    @staticmethod
    def _decoder(embedding: int, channels: int, classes: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for before, after in pairwise([embedding, channels, channels, channels]):
            layers += [*_convolution(before, after, 3), nn.Upsample(scale_factor=2, mode="bilinear")]
        layers += [*_convolution(channels, channels, 3), nn.Conv2d(channels, classes, 1)]
        return nn.Sequential(*layers)


def _convolution(before: int, after: int, size: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, size, padding=size // 2), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
