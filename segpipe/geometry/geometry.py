"""Where a scene is: affine, CRS, spacing and the size of an element, apart from the pixels.

Two value types share one small interface. A raster keeps GDAL's six numbers (they map pixel
*corners*, column and row, to the CRS); a volume keeps the 4×4 affine of its file (it maps voxel
*centres*, i, j, k, to RAS millimetres). Arrays are (c, y, x) and (c, z, y, x) everywhere, so a
volume's array axes are (k, j, i). Nothing is converted until a number is asked for: what went in
comes out, bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from affine import Affine
from pyproj import CRS, Transformer

from segpipe.errors import SceneError
from segpipe.geometry.box import Box


class Geometry(ABC):
    """The grid of a scene. Immutable; equal when every number is equal."""

    kind: ClassVar[str]
    """``raster`` or ``volume``."""
    shape: tuple[int, ...]
    """Elements along each axis in array order: (y, x) or (z, y, x)."""

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def box(self) -> Box:
        return Box.whole(self.shape)

    @property
    @abstractmethod
    def spacing(self) -> tuple[float, ...] | None:
        """Edge lengths of an element in array order: metres or CRS units, or mm. None: pixels."""

    @property
    @abstractmethod
    def size_unit(self) -> str:
        """``m2``, ``px`` (a raster without CRS) or ``mm3``: the unit of `element_sizes`."""

    @abstractmethod
    def element_sizes(self) -> np.ndarray:
        """Size of one element for every index of the first axis, float64, in `size_unit`."""

    @property
    @abstractmethod
    def centre_matrix(self) -> np.ndarray:
        """Homogeneous matrix from element indices, whole numbers at centres, to coordinates.

        Axes in the affine's order: (x, y) of a raster's columns and rows, (i, j, k) of a volume.
        """

    def to_world(self, positions: np.ndarray) -> np.ndarray:
        """Coordinates (x, y) or RAS (x, y, z) of positions on the grid.

        Args:
            positions: (n, axes) in elements, array order, whole numbers at centres.
        """
        matrix = self.centre_matrix
        return np.asarray(positions[:, ::-1] @ matrix[:-1, :-1].T + matrix[:-1, -1])

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """A JSON object from which `geometry_from_dict` makes an equal value."""


@dataclass(frozen=True)
class RasterGeometry(Geometry):
    """A map raster."""

    shape: tuple[int, ...]
    transform: tuple[float, float, float, float, float, float]
    """GDAL affine as (a, b, c, d, e, f): x = a·col + b·row + c, y = d·col + e·row + f."""
    crs: str | None
    """WKT 2, or None where the file has none (areas are then in pixels, and say so)."""

    kind: ClassVar[str] = "raster"

    @property
    def affine(self) -> Affine:
        return Affine(*self.transform)

    @cached_property
    def projection(self) -> CRS | None:
        return None if self.crs is None else CRS.from_wkt(self.crs)

    @property
    def rotated(self) -> bool:
        """Whether rows are not lines of constant y."""
        return self.transform[1] != 0 or self.transform[3] != 0

    @property
    def spacing(self) -> tuple[float, ...] | None:
        if self.projection is None:
            return None
        a, b, _, d, e, _ = self.transform
        return (float(np.hypot(b, e)), float(np.hypot(a, d)))

    @property
    def size_unit(self) -> str:
        return "px" if self.projection is None else "m2"

    def element_sizes(self) -> np.ndarray:
        """Area of a pixel for each row (y,), in m², or ones (pixels) without a CRS.

        Projected CRS: |det| of the affine times the axis unit squared. Geographic CRS and every
        normal Mercator (Web, World, spherical): the area on the ellipsoid between the row's
        parallels (Snyder, Map Projections: A Working Manual, eq. 3-12), so that the scale error
        of Mercator never enters.

        Raises:
            SceneError: a geographic or Mercator raster is rotated, so no row has one area; the
                CRS is neither geographic nor projected; or its poles are not the Earth's.
        """
        rows = self.shape[0]
        if self.projection is None:
            return np.ones(rows)
        crs = horizontal_crs(self.projection)
        a, b, _, d, e, f = self.transform
        mercator = is_mercator(crs)
        if crs.is_geographic or mercator:
            if self.rotated:
                raise SceneError(
                    "a rotated raster in a geographic or Mercator CRS has no single pixel area "
                    "per row; warp it to a north-up grid or a projected CRS first"
                )
            if crs.is_geographic and crs.is_derived:
                raise SceneError(
                    f"CRS {crs.name!r} has shifted poles, so areas are not defined by its rows; "
                    "warp the raster to a plain geographic or projected CRS first"
                )
            ellipsoid = crs.ellipsoid
            if ellipsoid is None:
                raise SceneError(f"CRS {crs.name!r} names no ellipsoid, so areas are not defined")
            edges = f + e * np.arange(rows + 1, dtype=np.float64)
            if mercator:
                latitudes, radians_per_unit = mercator_rows(crs, edges)
            else:
                radians_per_unit = crs.axis_info[0].unit_conversion_factor
                latitudes = edges * radians_per_unit
            return zone_areas(
                latitudes,
                abs(a) * radians_per_unit,
                ellipsoid.semi_major_metre,
                ellipsoid.inverse_flattening,
            )
        if not crs.is_projected:
            raise SceneError(
                f"CRS {crs.name!r} is neither geographic nor projected: areas are not defined; "
                "give the raster a projected or geographic CRS"
            )
        unit = crs.axis_info[0].unit_conversion_factor  # to metres
        return np.full(rows, abs(a * e - b * d) * unit * unit)

    @property
    def centre_matrix(self) -> np.ndarray:
        a, b, c, d, e, f = self.transform
        return np.array([[a, b, c + (a + b) / 2], [d, e, f + (d + e) / 2], [0, 0, 1]])

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "transform": list(self.transform),
            "crs": self.crs,
        }


@dataclass(frozen=True)
class VolumeGeometry(Geometry):
    """A medical volume in patient space."""

    shape: tuple[int, ...]
    """(z, y, x) = (k, j, i) of the file."""
    affine: tuple[tuple[float, ...], ...]
    """4×4: voxel centre (i, j, k, 1) to RAS millimetres, as the file has it."""

    kind: ClassVar[str] = "volume"

    @cached_property
    def matrix(self) -> np.ndarray:
        """The affine as a float64 array (4, 4) on (i, j, k)."""
        return np.array(self.affine, dtype=np.float64)

    @property
    def spacing(self) -> tuple[float, ...]:
        """Millimetres per voxel along (z, y, x): the lengths of the affine's columns."""
        lengths = np.linalg.norm(self.matrix[:3, :3], axis=0)
        return tuple(float(v) for v in lengths[::-1])

    @property
    def orientation(self) -> str:
        """Closest anatomical axes of (i, j, k), as in ``RAS``: toward right, anterior, superior."""
        import nibabel as nib  # here: it loads pydicom, which rasters never need

        codes = nib.orientations.aff2axcodes(self.matrix)
        return "".join(codes)

    @property
    def size_unit(self) -> str:
        return "mm3"

    def element_sizes(self) -> np.ndarray:
        """Volume of a voxel for each slice (z,), in mm³: |det| of the affine.

        As a triple product: LAPACK's determinant makes 7.999999999999998 of 2 mm voxels.
        """
        (a, b, c), (d, e, f), (g, h, i) = self.matrix[:3, :3].tolist()
        return np.full(self.shape[0], abs(a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)))

    @property
    def centre_matrix(self) -> np.ndarray:
        return self.matrix

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "shape": list(self.shape),
            "affine": [list(row) for row in self.affine],
        }


def volume_geometry(shape: tuple[int, ...], affine: np.ndarray) -> VolumeGeometry:
    """A `VolumeGeometry` of array shape (z, y, x) from a 4×4 array on (i, j, k)."""
    rows = tuple(tuple(float(v) for v in row) for row in np.asarray(affine, dtype=np.float64))
    return VolumeGeometry(tuple(int(n) for n in shape), rows)


def geometry_from_dict(data: dict[str, Any]) -> Geometry:
    """The inverse of `Geometry.to_dict`."""
    shape = tuple(data["shape"])
    if data["kind"] == "raster":
        return RasterGeometry(shape, tuple(data["transform"]), data["crs"])
    return VolumeGeometry(shape, tuple(tuple(row) for row in data["affine"]))


def horizontal_crs(crs: CRS) -> CRS:
    """The CRS itself without a vertical axis (compound) or a datum shift (bound) around it."""
    while True:
        if crs.is_bound and crs.source_crs is not None:
            crs = crs.source_crs
        elif crs.is_compound:
            crs = crs.sub_crs_list[0]
        else:
            return crs


def is_mercator(crs: CRS) -> bool:
    """Whether the CRS is a Mercator on the equator, any variant; not transverse, not oblique."""
    operation = horizontal_crs(crs).coordinate_operation
    if operation is None or not crs.is_projected:
        return False
    name = operation.method_name
    return name.startswith(("Mercator", "Popular Visualisation"))


def mercator_rows(crs: CRS, northings: np.ndarray) -> tuple[np.ndarray, float]:
    """Geodetic latitudes (radians) of lines of a Mercator, and radians of longitude per x unit."""
    base = crs.geodetic_crs
    if base is None or crs.coordinate_operation is None:
        raise SceneError(f"CRS {crs.name!r} names no geodetic CRS, so areas are not defined")
    to_radians = base.axis_info[0].unit_conversion_factor
    inverse = Transformer.from_crs(crs, base, always_xy=True)
    unit = crs.axis_info[0].unit_conversion_factor
    origin = [
        float(p.value) * p.unit_conversion_factor / unit
        for p in crs.coordinate_operation.params
        if p.name in ("False easting", "Easting at false origin")
    ]
    middle = origin[0] if origin else 0.0
    reach = 1e6 / unit  # 1000 km each way: far from the cut at ±180°, long enough to divide by
    lon, _ = inverse.transform([middle - reach, middle + reach], [0.0, 0.0])
    _, lat = inverse.transform(np.full(northings.shape, middle), northings)
    turn = 2 * np.pi / to_radians
    return np.asarray(lat) * to_radians, float((lon[1] - lon[0]) % turn * to_radians / (2 * reach))


def zone_areas(
    latitudes: np.ndarray, width: float, semi_major: float, inverse_flattening: float
) -> np.ndarray:
    """Areas on the ellipsoid between consecutive parallels.

    Args:
        latitudes: geodetic latitudes of the row edges in radians, (rows + 1,).
        width: difference in longitude of a pixel, in radians.
        semi_major: of the ellipsoid, in metres.
        inverse_flattening: of the ellipsoid; 0 for a sphere.

    Returns:
        Areas in m², (rows,). From the integral of the meridian and parallel radii of curvature,
        Snyder (1987), eq. 3-12: A = Δλ·b²/2·[sin φ/(1−e²sin²φ) + atanh(e·sin φ)/e].
    """
    sine = np.sin(np.clip(latitudes, -np.pi / 2, np.pi / 2))
    if inverse_flattening == 0:
        integral = 2 * sine
        minor = semi_major
    else:
        flattening = 1 / inverse_flattening
        e = np.sqrt(flattening * (2 - flattening))
        minor = semi_major * (1 - flattening)
        integral = sine / (1 - (e * sine) ** 2) + np.arctanh(e * sine) / e
    return np.asarray(width * minor**2 / 2 * np.abs(np.diff(integral)))
