"""Targets: scenes, regions and prompts as files; what reader processes open, here opened in this process."""

from __future__ import annotations

import json
from pathlib import Path

from segpipe.config.job import Regions
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry
from tools.fuzz.target import Target

EDGE = 64
"""Elements along each axis that are read."""


def raster_geometry() -> RasterGeometry:
    """Of the scene that regions and prompts are laid over."""
    from pyproj import CRS

    return RasterGeometry((64, 64), (30.0, 0.0, 500_000.0, 0.0, -30.0, 4_000_000.0), CRS(32617).to_wkt())


def volume_geometry() -> VolumeGeometry:
    """Of a volume of 2 mm."""
    rows = ((-2.0, 0.0, 0.0, 20.0), (0.0, 2.0, 0.0, -30.0), (0.0, 0.0, 2.0, 7.0), (0.0, 0.0, 0.0, 1.0))
    return VolumeGeometry((12, 14, 16), rows)


def read_scene(uri: str) -> None:
    """Open a scene, tell all of it as JSON, and read a corner and the last elements."""
    from segpipe.sources import open_source
    from segpipe.sources.isolated import describe

    with open_source(uri) as source:
        json.dumps(describe(source))
        shape = source.geometry.shape
        channels = tuple(range(min(source.count, 3)))
        source.read(Box((0,) * len(shape), tuple(min(n, EDGE) for n in shape)), channels)
        source.read(Box(tuple(max(0, n - 2) for n in shape), shape), channels)


def read_dicom(folder: Path) -> None:
    """Open a folder of slices, and a series of it by its number."""
    from segpipe.sources.dicom.series import group_files

    groups, _ = group_files(folder, sorted(p.name for p in folder.iterdir()))
    json.dumps([list(key) for key in groups])
    read_scene(str(folder))


def read_vrt(folder: Path) -> None:
    """Check a VRT as it is checked before a reader is asked, then open it."""
    from segpipe.sources import gdal

    gdal.read_vrt(folder / "scene.vrt")
    read_scene(str(folder / "scene.vrt"))


def read_regions(path: Path, geometry: Geometry) -> None:
    """Lay regions over a scene."""
    from segpipe.regions import load_regions

    regions = load_regions(Regions(path=str(path)), geometry)
    tile = Box((0,) * geometry.ndim, geometry.shape)
    for cover in regions.cover(tile):
        assert 0 <= cover.region < len(regions.names)
    json.dumps(regions.identity())
    regions.close()


def read_map(folder: Path) -> None:
    """Read a vector file as regions, and as prompts; one refusal does not spare the other."""
    from segpipe.errors import SegpipeError

    path = next(p for p in sorted(folder.iterdir()) if p.suffix not in (".shx", ".dbf", ".prj", ".cpg"))
    first: SegpipeError | None = None
    try:
        read_regions(path, raster_geometry())
    except SegpipeError as error:
        first = error
    if path.suffix not in (".parquet",):
        read_points(path, raster_geometry())
    if first is not None:
        raise first


def read_points(path: Path, geometry: Geometry) -> None:
    """Read prompts over a scene, as outlines."""
    from segpipe.prompts.inputs.prompt_files import read_prompts

    prompts, account = read_prompts(path, geometry, polygons="outline")
    account.lines()
    type(prompts).load(prompts.dump())


def read_name_table(folder: Path) -> None:
    """Read the names of an atlas's regions."""
    from segpipe.regions.atlas import read_names

    read_names(str(folder / "names.csv"))


def _scene(name: str, form: str = "bytes", *more: str, mutants: int = 20) -> Target:
    """A target of one scene; the name of a target is that of its kind of file."""
    file = name.replace("-", ".")
    return Target(
        name, lambda folder: read_scene(str(folder / f"scene.{file}")), (f"scene.{file}", *more), form,
        walled=True, mutants=mutants,
    )  # fmt: skip


def _map(name: str, form: str, *files: str) -> Target:
    return Target(name, read_map, files, form, walled=True, mutants=12)


TARGETS = (
    _scene("tif", mutants=40),
    _scene("png"),
    _scene("jp2"),
    _scene("bil", "bytes text", "scene.hdr"),
    _scene("nc"),
    _scene("h5"),
    Target("vrt", read_vrt, ("scene.vrt", "tile.tif"), "text bytes", walled=True),
    _scene("nii", mutants=60),
    _scene("nii-gz", "gzip", mutants=40),
    Target(
        "nifti-pair", lambda folder: read_scene(str(folder / "scene.img")), ("scene.hdr", "scene.img"),
        walled=True, mutants=40,
    ),
    Target(
        "dicom", read_dicom, ("1.dcm", "2.dcm", "3.dcm"), walled=True, mutants=30
    ),
    _map("geojson", "json", "map.geojson"),
    _map("kml", "text", "map.kml"),
    _map("gpkg", "bytes", "map.gpkg"),
    _map("shapefile", "bytes bytes bytes text", "map.shp", "map.shx", "map.dbf", "map.prj"),
    _map("zip", "bytes", "map.zip"),
    _map("parquet", "bytes", "map.parquet"),
    Target(
        "atlas", lambda folder: read_regions(folder / "atlas.tif", raster_geometry()), ("atlas.tif",),
        walled=True,
    ),
    Target(
        "atlas-nii", lambda folder: read_regions(folder / "atlas.nii", volume_geometry()), ("atlas.nii",),
        walled=True,
    ),
    Target("region-names", read_name_table, ("names.csv",), "csv", mutants=60),
    Target(
        "prompts-csv", lambda folder: read_points(folder / "points.csv", raster_geometry()),
        ("points.csv",), "csv", mutants=60,
    ),
    Target(
        "prompts-volume", lambda folder: read_points(folder / "points.csv", volume_geometry()),
        ("points.csv",), "csv", mutants=60,
    ),
)  # fmt: skip
