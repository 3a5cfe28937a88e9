"""Prompts from vector layers: positions and envelopes against geopandas, pyproj, rasterio and shapely."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import CRS, Transformer

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.prompts.inputs.prompt_files import read_prompts

DATA = Path(__file__).parents[3] / "shared" / "data"
UTM = "EPSG:32617"


def raster(crs: str | None = UTM, transform: Affine | None = None, shape=(300, 400)) -> RasterGeometry:
    """10 m pixels near Raleigh, turned by 20 degrees unless told."""
    turn = np.radians(20)
    c, s = 10 * np.cos(turn), 10 * np.sin(turn)
    affine = transform or Affine(c, -s, 710000, -s, -c, 3960000)
    return RasterGeometry(shape, tuple(affine)[:6], None if crs is None else CRS(crs).to_wkt())


def write_geojson(path: Path, features: list[tuple[dict, dict]], crs: str | None = None) -> Path:
    """Features of (geometry, properties), written as text."""
    document: dict = {
        "type": "FeatureCollection",
        "features": [{"type": "Feature", "geometry": g, "properties": p} for g, p in features],
    }
    if crs:
        document["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(document))
    return path


def rasterio_positions(geometry: RasterGeometry, x, y) -> np.ndarray:
    """(row, column) by rasterio's inverse affine, whole numbers at centres."""
    rows, columns = rasterio.transform.rowcol(Affine(*geometry.transform), x, y, op=lambda v: v)
    return np.column_stack((rows, columns)) - 0.5


def dense_envelope(polygon: shapely.Geometry, geometry: RasterGeometry, crs: str) -> np.ndarray:
    """Start and stop of a polygon's part in the scene: edges cut 20000 times, by pyproj, rasterio."""
    dense = shapely.segmentize(polygon, polygon.length / 20000)
    go = Transformer.from_crs(crs, CRS.from_wkt(geometry.crs), always_xy=True)

    def place(xy: np.ndarray) -> np.ndarray:
        return rasterio_positions(geometry, *go.transform(*xy.T))[:, ::-1]

    rows, columns = geometry.shape
    scene = shapely.box(-0.5, -0.5, columns - 0.5, rows - 0.5)
    x0, y0, x1, y1 = shapely.transform(dense, place).intersection(scene).bounds
    return np.array([[y0, x0], [y1, x1]])


def places(geometry: RasterGeometry, positions: np.ndarray, crs: str) -> np.ndarray:
    """Coordinates in another CRS of positions, by rasterio and pyproj."""
    xs, ys = rasterio.transform.xy(Affine(*geometry.transform), *positions.T)
    return np.column_stack(Transformer.from_crs(UTM, crs, always_xy=True).transform(xs, ys))


def test_geojson_points_are_longitude_and_latitude(tmp_path):
    """RFC 7946. The third point is beside the scene, the fifth of no coordinates."""
    geometry = raster()
    wanted = np.array([[12.0, 3.5], [250.25, 399.0], [-40.0, 20.0], [100.0, 101.0]])
    lonlat = places(geometry, wanted, "EPSG:4326").tolist()
    features = [({"type": "Point", "coordinates": c}, {"phrase": "lake", "label": 1}) for c in lonlat[:3]]
    features.append(({"type": "MultiPoint", "coordinates": [[*lonlat[3], 7.0], lonlat[2]]}, {}))
    features.append(({"type": "MultiPoint", "coordinates": []}, {}))
    path = write_geojson(tmp_path / "points.geojson", features)
    prompts, account = read_prompts(path, geometry)
    x, y = (
        geopandas.GeoSeries.from_xy(*np.array(lonlat).T, crs=4326).to_crs(UTM).get_coordinates().to_numpy().T
    )
    oracle = rasterio_positions(geometry, x, y)
    np.testing.assert_allclose(prompts.points.position, oracle[[0, 1, 3]], atol=1e-6)
    np.testing.assert_allclose(oracle, wanted, atol=1e-4)
    assert prompts.objects.tolist() == [1, 2, 4]
    assert prompts.phrases == ("lake", "lake", "")
    assert (account.given, account.used) == (5, (1, 2, 4))
    assert (account.outside, account.cut, account.empty) == ((3,), (4,), (5,))
    assert account.lines() == (
        "points.geojson: 3 of 5 prompts are used",
        "points.geojson: 1 outside the scene, left out (number 3)",
        "points.geojson: 1 empty, left out (number 5)",
        "points.geojson: 1 partly outside the scene, cut at its edge (number 4)",
    )


@pytest.mark.parametrize("crs", ["urn:ogc:def:crs:EPSG::32617", "urn:ogc:def:crs:EPSG::2264"])
def test_geojson_of_2008_names_its_crs(tmp_path, crs):
    """UTM metres, and North Carolina's feet."""
    geometry, wanted = raster(), np.array([[12.0, 3.5], [250.25, 399.0]])
    xy = places(geometry, wanted, crs)
    features = [({"type": "Point", "coordinates": c}, {}) for c in xy.tolist()]
    prompts, account = read_prompts(write_geojson(tmp_path / "p.geojson", features, crs), geometry)
    assert len(account.used) == 2
    np.testing.assert_allclose(prompts.points.position, wanted, atol=1e-4)


@pytest.mark.parametrize("crs", ["EPSG:3035", "EPSG:4326", "EPSG:2264", "ESRI:102001", UTM])
def test_boxes_of_polygons_are_envelopes_of_curves(tmp_path, crs):
    """A GeoPackage of five: most of the scene, one cut by its edge, one beyond, a hole, a box of the layer's.

    Where the CRS is another one, straight edges are curves in the scene: the envelope of the corners
    alone would be off by elements.
    """
    affine = Affine(2000, 0, 300000, 0, -2000, 4100000)
    geometry = raster(transform=affine)
    go = Transformer.from_crs(UTM, crs, always_xy=True)

    def ring(corners):
        columns, rows = zip(*corners, strict=True)
        xs, ys = rasterio.transform.xy(affine, rows, columns, offset="ul")
        return np.column_stack(go.transform(xs, ys))

    holed = shapely.Polygon(
        ring([(50, 50), (90, 50), (90, 120), (50, 120)]), [ring([(60, 60), (80, 60), (80, 80), (60, 80)])]
    )
    polygons = [
        shapely.Polygon(ring([(20, 15), (380, 10), (385, 280), (15, 290)])),
        shapely.Polygon(ring([(350, 100), (430, 120), (360, 200)])),
        shapely.Polygon(ring([(410, 100), (430, 120), (420, 200)])),
        holed,
        shapely.box(*shapely.Polygon(ring([(30, 110), (170, 110), (170, 190), (30, 190)])).bounds),
    ]
    path = tmp_path / "layer.gpkg"
    frame = geopandas.GeoDataFrame({"phrase": ["a", "b", "c", "", "e"]}, geometry=polygons, crs=crs)
    frame.to_file(path, layer="drawn", engine="pyogrio")
    prompts, account = read_prompts(path, geometry, layer="drawn", polygons="outline")
    assert (account.used, account.outside) == ((1, 2, 4, 5), (3,))
    assert 2 in account.cut
    assert prompts.objects.tolist() == [1, 2, 4, 5]
    assert prompts.phrases == ("a", "b", "", "e")
    off = 0.0
    for k, polygon in enumerate((polygons[0], polygons[1], *polygons[3:])):
        expected = dense_envelope(polygon, geometry, crs)
        np.testing.assert_allclose([prompts.boxes.start[k], prompts.boxes.stop[k]], expected, atol=2e-3)
        x, y = go.transform(*shapely.get_coordinates(polygon).T, direction="INVERSE")
        corners = np.clip(rasterio_positions(geometry, x, y), -0.5, np.array(geometry.shape) - 0.5)
        off = max(off, np.abs([corners.min(axis=0), corners.max(axis=0)] - expected).max())
        assert prompts.outlines.polygons[k].bounds == pytest.approx(expected[:, ::-1].ravel(), abs=2e-3)
    assert prompts.outlines.polygons[2].area == pytest.approx(40 * 70 - 20 * 20, rel=2e-3)
    print(f"{crs}: envelope of the corners alone is off by {off:.2f} elements")
    assert off > 0.3 or crs in (UTM, "EPSG:2264")


def test_a_polygon_larger_than_the_scene_and_one_beyond_the_projection(tmp_path):
    """The world is the whole scene, though UTM has no place for most of it; Australia is outside."""
    geometry = raster()
    world = shapely.geometry.mapping(shapely.box(-180, -90, 180, 90))
    australia = shapely.geometry.mapping(shapely.box(113, -39, 153, -11))
    path = write_geojson(tmp_path / "w.geojson", [(world, {}), (australia, {})])
    prompts, account = read_prompts(path, geometry)
    assert (account.used, account.outside, account.cut) == ((1,), (2,), (1,))
    np.testing.assert_allclose(
        [prompts.boxes.start[0], prompts.boxes.stop[0]], [[-0.5, -0.5], [299.5, 399.5]]
    )


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4269"])
def test_over_the_antimeridian(tmp_path, crs):
    """A scene from 170 to 190 degrees east, 20 elements a degree; -178 is 182."""
    geometry = raster(crs, Affine(0.05, 0, 170, 0, -0.05, 10), (400, 400))
    square = shapely.geometry.mapping(shapely.box(-179, 1, -177, 2))
    far = shapely.geometry.mapping(shapely.box(-100, 1, -90, 2))
    point = {"type": "Point", "coordinates": [-178, 0]}
    both = shapely.geometry.mapping(
        shapely.MultiPolygon([shapely.box(178, 0, 180, 1), shapely.box(-180, 0, -179, 1)])
    )
    path = write_geojson(tmp_path / "p.geojson", [(square, {}), (point, {}), (far, {}), (both, {})])
    prompts, account = read_prompts(path, geometry)
    assert (account.used, account.outside) == ((1, 2, 4), (3,))
    np.testing.assert_allclose(prompts.points.position, [[199.5, 239.5]], atol=1e-3)
    np.testing.assert_allclose(prompts.boxes.start, [[159.5, 219.5], [179.5, 159.5]], atol=1e-3)
    np.testing.assert_allclose(prompts.boxes.stop, [[179.5, 259.5], [199.5, 219.5]], atol=1e-3)


def test_objects_labels_and_phrases(tmp_path):
    """Features of one number are one object; without a positive one in the scene it is none: said."""
    geometry = raster("EPSG:4326", Affine(0.01, 0, 0, 0, -0.01, 1), (100, 100))

    def point(column, row):
        return {"type": "Point", "coordinates": [(column + 0.5) / 100, 1 - (row + 0.5) / 100]}

    box = shapely.geometry.mapping(shapely.box(0.1, 0.2, 0.3, 0.4))
    features = [
        (box, {"object": 7, "label": None, "phrase": "lake"}),
        (point(20, 70), {"object": 7, "label": 0, "phrase": None}),
        (point(50, 50), {"object": 9, "label": 0, "phrase": None}),
        (point(60, 50), {"object": None, "label": 1, "phrase": "dock"}),
        (point(500, 50), {"object": 9, "label": 1, "phrase": None}),
    ]
    prompts, account = read_prompts(write_geojson(tmp_path / "p.geojson", features), geometry)
    assert prompts.objects.tolist() == [7, 10]
    assert prompts.phrases == ("lake", "dock")
    assert prompts.points.objects.tolist() == [7, 10]
    assert prompts.points.positive.tolist() == [False, True]
    assert (account.used, account.outside, account.negative) == ((1, 2, 4), (5,), (3,))


def test_a_table_of_instances_and_text_in_label(tmp_path):
    """A run's own polygons: id and class. Names in ``label`` are phrases, and that is said."""
    geometry = raster(transform=Affine(10, 0, 700000, 0, -10, 4000000))
    squares = [shapely.box(700100, 3999800, 700150, 3999900), shapely.box(700300, 3999800, 700350, 3999900)]
    frame = geopandas.GeoDataFrame({"id": [5, 3], "class": ["water", "field"]}, geometry=squares, crs=UTM)
    frame.to_file(tmp_path / "instances.gpkg", engine="pyogrio")
    prompts, account = read_prompts(tmp_path / "instances.gpkg", geometry)
    assert prompts.objects.tolist() == [3, 5]
    assert prompts.phrases == ("field", "water")
    assert account.remarks == ("column 'id' gives the objects' numbers",)
    frame = geopandas.GeoDataFrame({"label": ["pond", "pond"]}, geometry=squares, crs=UTM)
    frame.to_file(tmp_path / "named.gpkg", engine="pyogrio")
    prompts, account = read_prompts(tmp_path / "named.gpkg", geometry)
    assert prompts.phrases == ("pond", "pond")
    assert account.remarks == ("column 'label' holds no 1 or 0: it is taken as the phrase",)


def test_without_any_crs(tmp_path):
    """A picture: x and y are its pixels, corners at whole numbers."""
    geometry = raster(None, Affine.identity())
    frame = geopandas.GeoDataFrame(geometry=[shapely.box(10, 20, 30, 50)])
    frame.to_file(tmp_path / "p.gpkg", engine="pyogrio")
    prompts, _ = read_prompts(tmp_path / "p.gpkg", geometry)
    assert prompts.boxes.start.tolist() == [[19.5, 9.5]]
    assert prompts.boxes.stop.tolist() == [[49.5, 29.5]]
    with pytest.raises(SceneError, match=r"the scene has a CRS .* and p.gpkg has none"):
        read_prompts(tmp_path / "p.gpkg", raster())
    path = write_geojson(tmp_path / "p.geojson", [({"type": "Point", "coordinates": [1, 2]}, {})])
    with pytest.raises(SceneError, match=r"p.geojson has a CRS \(WGS 84\) and the scene has none"):
        read_prompts(path, geometry)


def test_what_is_wrong_is_said(tmp_path):
    geometry = raster()
    inside = places(geometry, np.array([[100.0, 100.0], [120.0, 130.0]]), "EPSG:4326").tolist()
    point = {"type": "Point", "coordinates": inside[0]}
    line = {"type": "LineString", "coordinates": inside}
    square = shapely.geometry.mapping(shapely.Point(inside[0]).buffer(0.001))
    wrong = [
        ([(line, {})], r"number 1 is a LineString; valid: points and polygons"),
        ([(point, {"label": 2}), (point, {"label": 1})], r"label: found '2' in number 1; valid: 1"),
        ([(point, {"object": 0})], r"object: found '0' in number 1; valid: whole numbers from 1"),
        ([(square, {"object": 1}), (square, {"object": 1})], r"object 1 has 2 boxes; valid: one box"),
        ([(square, {"label": 0})], r"found 0 for number 1, a box or polygon; valid: only points"),
        (
            [(point, {"object": 1, "phrase": "a"}), (point, {"object": 1, "phrase": "b"})],
            r"phrases 'a' and 'b'",
        ),
    ]
    for features, message in wrong:
        with pytest.raises(RequestError, match=message):
            read_prompts(write_geojson(tmp_path / "w.geojson", features), geometry)
    with pytest.raises(RequestError, match="does not exist"):
        read_prompts(tmp_path / "none.geojson", geometry)
    (tmp_path / "bad.geojson").write_text("{")
    with pytest.raises(RequestError, match=r"bad.geojson cannot be read"):
        read_prompts(tmp_path / "bad.geojson", geometry)
    with pytest.raises(RequestError, match="is a map layer, and the scene is a volume"):
        read_prompts(
            write_geojson(tmp_path / "v.geojson", [(point, {})]), volume_geometry((3, 3, 3), np.eye(4))
        )
    frame = geopandas.GeoDataFrame(geometry=[shapely.Point(0, 0)], crs=UTM)
    for name in ("one", "two"):
        frame.to_file(tmp_path / "two.gpkg", layer=name, engine="pyogrio")
    with pytest.raises(RequestError, match=r"prompts.layer: found none; layers of .*: one, two"):
        read_prompts(tmp_path / "two.gpkg", geometry)


@pytest.mark.skipif(
    not (DATA / "spacenet_buildings").is_dir(), reason="../shared/data/spacenet_buildings is absent"
)
def test_real_buildings():
    """Every building of SpaceNet's GeoJSON: geopandas and rasterio put its box where we do."""
    with rasterio.open(DATA / "spacenet_buildings" / "image.tif") as file:
        geometry = RasterGeometry(
            file.shape, tuple(file.transform)[:6], CRS.from_wkt(file.crs.to_wkt()).to_wkt()
        )
    path = DATA / "spacenet_buildings" / "buildings.geojson"
    prompts, account = read_prompts(path, geometry)
    frame = geopandas.read_file(path).to_crs(geometry.crs)
    frame = frame[[g is not None and g.area > 0 for g in frame.geometry]]
    bounds = frame.geometry.bounds.to_numpy()
    a = rasterio_positions(geometry, bounds[:, 0], bounds[:, 3])
    b = rasterio_positions(geometry, bounds[:, 2], bounds[:, 1])
    a, b = np.maximum(a, -0.5), np.minimum(b, np.array(geometry.shape) - 0.5)
    here = (b - a > 1e-6).all(axis=1)
    print(f"{account.given} buildings, {len(account.used)} used, {len(account.outside)} outside")
    assert len(account.used) == int(here.sum()) > 10
    assert account.given == len(account.used) + len(account.outside) + len(account.empty)
    np.testing.assert_allclose(prompts.boxes.start, a[here], atol=1e-3)
    np.testing.assert_allclose(prompts.boxes.stop, b[here], atol=1e-3)
