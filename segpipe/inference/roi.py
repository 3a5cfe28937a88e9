"""A first model that looks at the whole scene, small, and says where the second should look."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cc3d
import numpy as np
import torch

from segpipe.config.card import Card, RegionOfInterest, load_card
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry
from segpipe.geometry.grid_map import GridMap, sample_nearest
from segpipe.inference.normalise import Normaliser, Readable, sample_grid, scene_statistics
from segpipe.models.network import activate
from segpipe.models.registry import load_model
from segpipe.sources.base import Scaling

if TYPE_CHECKING:
    from segpipe.inference.settings import Settings


def find_crop(
    card: Card,
    settings: Settings,
    geometry: Geometry,
    scaling: tuple[Scaling, ...],
    reader: Readable,
) -> Box:
    """The native box that a card's region-of-interest model finds.

    The scene is sampled (nearest, voxel-centre) onto the first model's shape; of its foreground the
    largest component is kept; planes with enough of it span the box, and a margin is added.

    Raises:
        SceneError: the first model finds nothing.
    """
    assert card.roi is not None
    first = load_card(card.folder / card.roi.card)
    grid = sample_grid(first, geometry, first.window.shape)
    statistics = scene_statistics(first, geometry, scaling, reader)
    normaliser = Normaliser(first, scaling, statistics)
    torch.set_num_threads(1)  # sums of window_zscore must not depend on who called before
    sample = sample_nearest(lambda box: normaliser.elementwise(reader.read(box)), grid, np.float32)
    sample = normaliser.window(np.ascontiguousarray(sample))
    model = load_model(first, settings.device, settings.threads, settings.precision)
    with torch.inference_mode():
        out = model(torch.from_numpy(sample)[None].to(model.device))
        scores = activate(out, first.output.activation)[0].cpu().numpy()
    mask = scores[1:].sum(0) > card.roi.threshold
    components = cc3d.connected_components(mask)
    sizes = np.bincount(components[components != 0].ravel())
    if sizes.size == 0:
        raise SceneError(
            f"region of interest: the card {first.name!r} finds nothing in the scene; it is for "
            f"{first.input.modality or 'other images'}"
        )
    largest = components == int(sizes.argmax())
    return _native_box(largest, grid, card.roi)


def _native_box(mask: np.ndarray, grid: GridMap, roi: RegionOfInterest) -> Box:
    """The box of a mask on the model grid, with its margin, in native elements.

    Float32 and round-half-even, as the published pipelines do it: the box decides every voxel after.
    """
    start, stop = [0] * mask.ndim, [0] * mask.ndim
    for axis, native in enumerate(grid.axes):
        others = tuple(a for a in range(mask.ndim) if a != axis)
        planes = np.flatnonzero(mask.mean(axis=others) > roi.projection)
        if planes.size == 0:
            raise SceneError("region of interest: too little foreground for a box")
        low, high = int(planes[0]), int(planes[-1]) + 1
        length = grid.native_shape[native]
        scale = np.float32(length) / np.float32(mask.shape[axis])
        center = np.round(scale * np.float32((low + high) / 2))
        size = scale * np.float32(high - low)
        size = np.round((np.float32(1) + np.float32(2) * np.float32(roi.margin)) * size)
        begin = max(0, int(center - size / np.float32(2)))
        end = min(length, int(center + size / np.float32(2)))
        if end <= begin:  # half-even rounding of a very short axis
            begin, end = 0, length
        if grid.flips[axis]:
            begin, end = length - end, length - begin
        start[native], stop[native] = begin, end
    return Box(tuple(start), tuple(stop))
