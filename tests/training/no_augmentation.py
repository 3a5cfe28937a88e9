"""An augmentation that changes nothing."""

from segpipe.config.recipe import Augmentation

NONE = Augmentation(
    flip=0,
    rotate90=0,
    rotate=0,
    scale=0,
    elastic=0,
    brightness=0,
    contrast=0,
    gamma=0,
    noise=0,
    blur=0,
    low_resolution=0,
)
