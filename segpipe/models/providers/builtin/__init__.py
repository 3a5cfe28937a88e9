"""Small architectures of the literature that no kept library has, each with its paper in its docstring.

Every class takes the keywords ``in_channels`` and ``classes`` and plain values beyond; maps (n, c, y, x) to
logits (n, classes, y, x); takes inputs whose edges are multiples of its ``stride``; and starts from random
weights: nothing is fetched. Without weights of one's own, the backbone's state dict can be filled with
torchvision's or timm's, whose names it has.
"""

from segpipe.models.providers.builtin.adapter import ARCHITECTURES, build, check, module
from segpipe.models.providers.builtin.deeplab import DeepLabV1, DeepLabV2
from segpipe.models.providers.builtin.segnet import SegNet
from segpipe.models.providers.builtin.setr import SETRPUP, SETRNaive

__all__ = [
    "ARCHITECTURES",
    "SETRPUP",
    "DeepLabV1",
    "DeepLabV2",
    "SETRNaive",
    "SegNet",
    "build",
    "check",
    "module",
]
