"""Whether two grids are the same: shape, affine and CRS compared within a tolerance."""

from __future__ import annotations

import math

import numpy as np
from pyproj import CRS, Transformer

from segpipe.errors import SceneError
from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry, horizontal_crs

GRID_TOLERANCE = 1e-3
"""Greatest distance, in elements, between the corners of two grids that are the same."""


CRS_TOLERANCE = 0.5
"""The same for two CRSs that are written differently, over the same affine."""


def same_grid(scene: Geometry, other: Geometry) -> list[str]:
    """Notes on two grids that are the same.

    Raises:
        SceneError: they are not; names both shapes, affines or CRSs.
    """
    if scene.kind != other.kind:
        raise SceneError(f"the scene is a {scene.kind}, the other a {other.kind}")
    if scene.shape != other.shape:
        raise SceneError(f"the scene's shape is {scene.shape}, the other's {other.shape}")
    off = float(np.abs(element_map(other, scene) @ _corners(scene) - _corners(scene)).max())
    if not off <= GRID_TOLERANCE:
        raise SceneError(
            f"the scene's affine is {_affine_text(scene)}, the other's {_affine_text(other)}: "
            f"corners are {off:.3g} elements apart"
        )
    if isinstance(scene, RasterGeometry) and isinstance(other, RasterGeometry):
        return _same_crs(scene, other)
    return []


def element_map(start: Geometry, end: Geometry) -> np.ndarray:
    """Matrix from element indices of one grid to those of another, whole numbers at centres.

    Homogeneous, axes in the affine's order (x, y) or (i, j, k); the CRS is not looked at.
    """
    return np.asarray(np.linalg.solve(end.centre_matrix, start.centre_matrix))


def _corners(geometry: Geometry) -> np.ndarray:
    """Index of the corner elements, homogeneous, as columns."""
    ends = [(0, n - 1) for n in reversed(geometry.shape)]
    grid = np.meshgrid(*ends, indexing="ij")
    return np.stack([*(g.ravel() for g in grid), np.ones(2 ** len(ends))]).astype(np.float64)


def _affine_text(geometry: Geometry) -> str:
    if isinstance(geometry, RasterGeometry):
        return str(tuple(geometry.transform))
    assert isinstance(geometry, VolumeGeometry)
    return str([list(row) for row in geometry.affine[:3]])


def _same_crs(scene: RasterGeometry, other: RasterGeometry) -> list[str]:
    """Notes on two CRSs over the same affine that put the corners in the same places."""
    if scene.crs == other.crs:
        return []
    if scene.projection is None or other.projection is None:
        which = "the scene" if scene.projection is None else "the file"
        return [f"{which} has no CRS; its affine is the same, so the grids are taken as one"]
    first, second = horizontal_crs(scene.projection), horizontal_crs(other.projection)
    if first == second and first.name == second.name:
        return []
    off = _crs_distance(scene, first, second)
    if not off <= CRS_TOLERANCE:
        raise SceneError(f"the scene's CRS is {first.name!r}, the other's {second.name!r}")
    return [
        f"CRS {second.name!r} is written differently from the scene's {first.name!r}; "
        f"corners agree within {off:.2g} elements"
    ]


def _crs_distance(scene: RasterGeometry, first: CRS, second: CRS) -> float:
    """How far the corners move, in elements, when the second CRS is read as the first."""
    rows, columns = scene.shape
    corners = np.array([[0, 0, 1], [columns, 0, 1], [0, rows, 1], [columns, rows, 1]]).T
    there = np.array([*scene.transform, 0, 0, 1]).reshape(3, 3)
    x, y, _ = there @ corners
    moved = Transformer.from_crs(second, first, always_xy=True).transform(x, y)
    if not np.isfinite(moved).all():
        return math.inf
    back = np.linalg.solve(there, np.stack([*moved, np.ones(4)]))
    return float(np.hypot(*(back - corners)[:2]).max())
