"""Arrays as the readers that pictures are drawn from, and pictures as arrays."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image
from pyproj import CRS

from segpipe.config.card import Class
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry
from segpipe.pictures.anatomical_planes import VolumePictures
from segpipe.pictures.preview import RasterPictures, raster_pictures
from segpipe.pictures.sampling import Readers
from segpipe.sources.base import Pixels

SHARED = Path(__file__).parents[3] / "shared" / "data"
UTM = CRS.from_epsg(32616).to_wkt()
FOREST, WATER = Class(value=1, name="forest", color="#1b7837"), Class(value=2, name="water", color="#2b83ba")
GROUND = Class(value=0, name="background", color="#000000", background=True)
ORGAN, BONE = (
    Class(value=5, name="organ", color="#ff0000"),
    Class(value=9, name="bone", color="#00ff00"),
)


def panel(drawn: RasterPictures | VolumePictures, key: str) -> np.ndarray:
    """RGBA as drawn, before it is encoded."""
    return drawn.pictures[key].astype(int)


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).astype(int)


def reader(image: np.ndarray, valid: np.ndarray | None = None):
    """An image reader over an array (c, …)."""
    seen = np.ones(image.shape[1:], bool) if valid is None else valid

    def read(box: Box, channels: tuple[int, ...] | None = None) -> Pixels:
        values = image[(slice(None), *box.slices)]
        return Pixels(values if channels is None else values[list(channels)], seen[box.slices])

    return read


def raster_input(labels: np.ndarray, reference: np.ndarray | None = None, **more) -> dict[str, object]:
    """Readers and geometry of a raster, by the names of `raster_preview`'s arguments.

    ``more`` may have further readers of `Readers`, by their names.
    """
    shape = labels.shape
    image = more.pop("image", np.linspace(0, 100, labels.size).reshape(1, *shape).astype(np.float32))
    transform = more.pop("transform", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0))
    return {
        "read": Readers(
            reader(image, more.pop("valid", None)),
            lambda box: labels[box.slices],
            None if reference is None else lambda box: reference[box.slices],
            more.pop("uncertainty", None),
            more.pop("ids", None),
        ),
        "geometry": RasterGeometry(shape, transform, more.pop("crs", UTM)),
        "bands": more.pop("bands", ()),
        "classes": more.pop("classes", (FOREST, WATER)),
        "nodata": 255,
        **more,
    }


def raster(labels: np.ndarray, reference: np.ndarray | None = None, **more) -> RasterPictures:
    return raster_pictures(**raster_input(labels, reference, **more), max_size=900, count=None)
