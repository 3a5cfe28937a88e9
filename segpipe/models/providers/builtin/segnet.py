"""SegNet: an encoder and decoder joined by the positions of the maxima alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from segpipe.models.providers.builtin.common import check_size, positive, start_convolutions, vgg16_channels


class SegNet(nn.Module):
    """SegNet on VGG-16.

    Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
    Segmentation", IEEE TPAMI 39(12), 2017, arXiv:1511.00561.

    The encoder has VGG-16's thirteen convolutions, each with batch normalisation and ReLU; each of its five
    max-poolings remembers where the maxima were. The decoder mirrors it: maxima are put back where they came
    from (zeros elsewhere), then convolved. Its last convolution gives the logits. ``encoder`` is named and
    ordered like torchvision's ``vgg16_bn().features``, so that its state dict loads.

    Where we differ: the input is not normalised locally (LRN) first, that is the card's part; any number of
    channels; He initialisation with fan out (torchvision's VGG) instead of fan in.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        width: times the paper's channels; 1 is the paper's network.
    """

    def __init__(self, *, in_channels: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        positive(in_channels=in_channels, classes=classes)
        stages = vgg16_channels(width)
        layers: list[nn.Module] = []
        before = in_channels
        for stage in stages:
            for channels in stage:
                layers += _convolution(before, channels)
                before = channels
            layers.append(nn.MaxPool2d(2, 2, return_indices=True))
        self.encoder = nn.Sequential(*layers)
        self.decoder = nn.ModuleList()
        for number in reversed(range(len(stages))):
            # Each stage ends with the channels that the next one's indices have.
            after = [*stages[number][1:], stages[number - 1][-1] if number else classes]
            layers = []
            for channels in after:
                layers += _convolution(before, channels)
                before = channels
            self.decoder.append(nn.Sequential(*(layers if number else layers[:-2])))
        start_convolutions(self)

    @property
    def stride(self) -> int:
        """Edges of the input are multiples of this: five poolings by 2."""
        return 32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes, y, x) of images (n, in_channels, y, x).

        Raises:
            ValueError: an edge is no multiple of the stride.
        """
        check_size(x, self.stride)
        positions = []
        for layer in self.encoder:
            if isinstance(layer, nn.MaxPool2d):
                x, indices = layer(x)
                positions.append(indices)
            else:
                x = layer(x)
        for stage in self.decoder:
            x = stage(functional.max_unpool2d(x, positions.pop(), [2, 2]))
        return x


def _convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
