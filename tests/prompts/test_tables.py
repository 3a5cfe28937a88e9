"""Prompts from CSV: maps against pyproj and rasterio, volumes against nibabel."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from nibabel.affines import apply_affine
from pyproj import CRS, Transformer

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.prompts.inputs.prompt_files import read_prompts

UTM = CRS("EPSG:32617").to_wkt()
MAP = RasterGeometry((300, 400), (10.0, 0.0, 700000.0, 0.0, -10.0, 4000000.0), UTM)
PICTURE = RasterGeometry((300, 400), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
TURN = 0.3
OBLIQUE = np.array(
    [
        [-1.5 * np.cos(TURN), 0.9 * np.sin(TURN), 0.0, 90.0],
        [-1.5 * np.sin(TURN), -0.9 * np.cos(TURN), 0.0, 126.0],
        [0.0, 0.0, 2.5, -72.0],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
STRAIGHT = np.array([[-1.5, 0, 0, 90], [0, 0.9, 0, -126], [0, 0, 2.5, -72], [0, 0, 0, 1]])
SHAPE = (30, 120, 100)
"""(k, j, i)"""


def table(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def positions(x, y) -> np.ndarray:
    """By rasterio."""
    rows, columns = rasterio.transform.rowcol(Affine(*MAP.transform), x, y, op=lambda v: v)
    return np.column_stack((rows, columns)) - 0.5


@pytest.mark.parametrize("crs", ["EPSG:32617", "EPSG:2264", "EPSG:4326", "scene"])
@pytest.mark.parametrize("column", [True, False])
def test_x_and_y_are_in_the_named_crs(tmp_path, crs, column):
    """As a column or as an argument; x is the easting or longitude in every CRS, also in EPSG:4326."""
    utm = np.array([[700123.0, 3999001.0], [703999.9, 3997000.1], [704000.1, 3999001.0]])
    named = UTM if crs == "scene" else crs
    xy = np.column_stack(Transformer.from_crs(UTM, named, always_xy=True).transform(*utm.T))
    head = "x,y,label,object" + (",crs" if column else "")
    tail = f",{crs}" if column else ""
    rows = [f"{x!r},{y!r},{s},4{tail}" for (x, y), s in zip(xy.tolist(), (1, 0, 1), strict=True)]
    prompts, account = read_prompts(
        table(tmp_path / "p.csv", "\n".join([head, *rows])), MAP, crs="" if column else crs
    )
    np.testing.assert_allclose(prompts.points.position, positions(*utm[:2].T), atol=1e-4)
    assert prompts.points.positive.tolist() == [True, False]
    assert prompts.objects.tolist() == [4]
    assert (account.used, account.outside) == ((1, 2), (3,))


def test_lon_lat_boxes_and_points(tmp_path):
    """Semicolons, a byte order mark, empty cells; the box is the envelope of a curved one."""
    low = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform(700500, 3998000)
    high = Transformer.from_crs(UTM, "EPSG:4326", always_xy=True).transform(703000, 3999500)
    text = "\ufefflon;lat;lon_min;lon_max;lat_min;lat_max;phrase\n"
    text += (
        f"{low[0]!r};{low[1]!r};;;;;dock\n;;{low[0]!r};{high[0]!r};{low[1]!r};{high[1]!r};lake\n;;;;;;none\n"
    )
    prompts, account = read_prompts(table(tmp_path / "p.csv", text), MAP)
    assert prompts.phrases == ("dock", "lake")
    assert account.empty == (3,)
    np.testing.assert_allclose(prompts.points.position, positions([700500], [3998000]), atol=1e-4)
    edge = np.linspace(0, 1, 5001)
    lon, lat = low[0] + edge * (high[0] - low[0]), low[1] + edge * (high[1] - low[1])
    full = np.full(edge.shape, 1.0)
    rings = [(lon, low[1] * full), (lon, high[1] * full), (low[0] * full, lat), (high[0] * full, lat)]
    go = Transformer.from_crs("EPSG:4326", UTM, always_xy=True)
    around = np.concatenate([positions(*go.transform(*ring)) for ring in rings])
    np.testing.assert_allclose(prompts.boxes.start[0], around.min(axis=0), atol=2e-3)
    np.testing.assert_allclose(prompts.boxes.stop[0], around.max(axis=0), atol=2e-3)


@pytest.mark.parametrize(
    ("columns", "signs"),
    [
        ("x_ras,y_ras,z_ras", (1, 1, 1)),
        ("R,A,S", (1, 1, 1)),
        ("x_lps,y_lps,z_lps", (-1, -1, 1)),
        ("l,p,s", (-1, -1, 1)),
    ],
)
def test_millimetres_are_voxels_by_the_affine(tmp_path, columns, signs):
    """Voxels (i, j, k) through an oblique affine by nibabel; LPS is RAS with two signs turned."""
    voxels = np.array([[10.0, 20.0, 5.0], [99.4, 119.4, 29.4], [99.6, 20.0, 5.0]])
    mm = apply_affine(OBLIQUE, voxels) * signs
    rows = [",".join(map(repr, row)) for row in mm.tolist()]
    path = table(tmp_path / "p.csv", "\n".join([columns, *rows]))
    prompts, account = read_prompts(path, volume_geometry(SHAPE, OBLIQUE))
    np.testing.assert_allclose(prompts.points.position, voxels[:2, ::-1], atol=1e-9)
    assert (account.used, account.outside) == ((1, 2), (3,))


def test_boxes_of_volumes(tmp_path):
    """Voxels as they are; a box of one slice has no depth; a box of mm is the envelope of its corners."""
    text = "i,j,k,i_min,i_max,j_min,j_max,k_min,k_max,object\n"
    text += ",,7,10,30.5,20,40,,,1\n,,,10,30,20,40,5,9,2\n3,4,5,,,,,,,2\n"
    text += ",,,90,130,20,40,5,9,3\n,,30,10,30,20,40,,,4\n"
    prompts, account = read_prompts(table(tmp_path / "v.csv", text), volume_geometry(SHAPE, OBLIQUE))
    assert prompts.boxes.start.tolist() == [[7, 20, 10], [5, 20, 10], [5, 20, 90]]
    assert prompts.boxes.stop.tolist() == [[7, 40, 30.5], [9, 40, 30], [9, 40, 99.5]]
    assert prompts.points.position.tolist() == [[5, 4, 3]]
    assert (account.used, account.outside, account.cut) == ((1, 2, 3, 4), (5,), (4,))
    for affine in (OBLIQUE, STRAIGHT):
        low, high = np.array([20.0, -60.0, -50.0]), np.array([40.0, -40.0, -50.0])
        if affine is OBLIQUE:
            low, high = np.array([20.0, 40.0, -50.0]), np.array([30.0, 60.0, -50.0])
        text = "x_ras_min,x_ras_max,y_ras_min,y_ras_max,z_ras\n"
        text += f"{low[0]},{high[0]},{low[1]},{high[1]},{low[2]}\n"
        prompts, _ = read_prompts(table(tmp_path / "m.csv", text), volume_geometry(SHAPE, affine))
        corners = apply_affine(np.linalg.inv(affine), list(product(*zip(low, high, strict=True))))
        np.testing.assert_allclose(prompts.boxes.start[0], corners.min(axis=0)[::-1], atol=1e-9)
        np.testing.assert_allclose(prompts.boxes.stop[0], corners.max(axis=0)[::-1], atol=1e-9)
        assert prompts.boxes.start[0, 0] == prompts.boxes.stop[0, 0]  # one slice, to the bit


def test_a_picture_without_crs(tmp_path):
    path = table(tmp_path / "p.csv", "x,y\n10.5,20.5\n")
    prompts, _ = read_prompts(path, PICTURE)
    assert prompts.points.position.tolist() == [[20.0, 10.0]]
    with pytest.raises(SceneError, match=r"has a CRS .* and the scene has none"):
        read_prompts(path, PICTURE, crs="EPSG:4326")


@pytest.mark.parametrize(
    ("text", "geometry", "message"),
    [
        ("x,y\n1,2\n", MAP, r"crs: none is named for x and y; valid: a column crs .*EPSG:32617, or scene"),
        ("x,y,crs\n1,2,EPSG:99999999\n", MAP, r"crs: .*valid: such as EPSG:32617, or scene"),
        ("x,y,crs\n1,2,EPSG:4326\n1,2,EPSG:3857\n", MAP, r"crs: found EPSG:3857, EPSG:4326; valid: one"),
        ("lon,lat,crs\n1,2,EPSG:3857\n", MAP, r"crs: found EPSG:3857, OGC:CRS84; valid: one"),
        ("i,j,k\n1,2,3\n", MAP, r"columns: found i, j, k; valid for a raster: x,y or lon,lat"),
        ("x,y,lon,lat\n1,2,3,4\n", MAP, r"columns: found coordinates in several ways in x, y, lon, lat"),
        (
            "x,y,z\n1,2,3\n",
            volume_geometry(SHAPE, OBLIQUE),
            r"valid for a volume: i,j,k or x_ras,y_ras,z_ras",
        ),
        ("lon,lat\n1,two\n", MAP, r"lat: found 'two' in number 1; valid: a number"),
        ("lon,lat\n1,inf\n", MAP, r"lat: found 'inf' in number 1; valid: a number"),
        ("lon,lat\n1,\n", MAP, r"number 1 has no lat; valid: a number"),
        ("lon,lat\n1,2,3\n", MAP, r"number 1 has 3 cells; valid: 2"),
        ("lon,lat,lat\n1,2,3\n", MAP, r"valid: every name once"),
        ("lon,lat\n", MAP, r"has no rows"),
        ("", MAP, r"has no rows"),
        ("lon_min,lon_max,lat\n1,2,3\n", MAP, r"number 1 is a line; valid: a point, or a box"),
        ("lon_min,lon_max,lat_min,lat_max\n1,2,3,3\n", MAP, r"lat_min: found 3 in number 1; valid: below 3"),
        ("lon_min,lon_max,lat_min,lat_max\n1,2,3,\n", MAP, r"number 1 has lat, lat_min, lat_max"),
        ("i_min,i_max,j,k\n1,2,3,4\n", volume_geometry(SHAPE, OBLIQUE), r"number 1 is a line; valid"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, geometry, message):
    with pytest.raises(RequestError, match=message):
        read_prompts(table(tmp_path / "w.csv", text), geometry)


def test_arguments_that_do_not_go_with_the_file(tmp_path):
    path = table(tmp_path / "v.csv", "i,j,k\n1,2,3\n")
    with pytest.raises(RequestError, match="a volume has no CRS"):
        read_prompts(path, volume_geometry(SHAPE, OBLIQUE), crs="EPSG:4326")
    with pytest.raises(RequestError, match="is CSV and has no layers"):
        read_prompts(path, volume_geometry(SHAPE, OBLIQUE), layer="a")
    (tmp_path / "b.csv").write_bytes(b"lon,lat\n\xff\xfe,1\n")
    with pytest.raises(RequestError, match="is not UTF-8 text"):
        read_prompts(tmp_path / "b.csv", MAP)
