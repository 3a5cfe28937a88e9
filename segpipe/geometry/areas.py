"""Areas on the ellipsoid: geographic and Mercator rows between parallels."""

from __future__ import annotations

import numpy as np
from pyproj import CRS, Transformer

from segpipe.errors import SceneError


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
