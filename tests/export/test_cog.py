"""Label maps as COG: values, geometry, names, bytes and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from pyproj import CRS
from rio_cogeo import cog_validate

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.cog import STEP, write_cog, write_cog_scores
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data" / "nc_landsat" / "strata.tif"
NAMES = ("developed", "agriculture", "herbaceous", "shrubland", "forest", "water", "sediment")
COLORS = ("#d7191c", "#f4d35e", "#b8de8f", "#8c6d31", "#1b7837", "#2b83ba", "#c2a5cf")
CLASSES = [Class(value=i + 1, name=n, color=c) for i, (n, c) in enumerate(zip(NAMES, COLORS, strict=True))]
NORTH = (28.5, 0.0, 630534.0, 0.0, -28.5, 228114.0)
UTM = CRS.from_epsg(32616).to_wkt()


def geometry(shape: tuple[int, int], transform=NORTH, crs: str | None = UTM) -> RasterGeometry:
    return RasterGeometry(shape, transform, crs)


def random_labels(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 8, shape, dtype=np.uint8)


def read_crs(path: Path) -> CRS | None:
    with rasterio.open(path) as file:
        return None if file.crs is None else CRS.from_wkt(file.crs.to_wkt(version="WKT2_2019"))


def test_real_land_cover_survives(tmp_path: Path) -> None:
    if not DATA.exists():
        pytest.skip(f"{DATA} is not here")
    with rasterio.open(DATA) as source:
        strata = np.where(source.read(1) < 0, 255, source.read(1)).astype(np.uint8)
        transform, crs = tuple(source.transform)[:6], source.crs
    path = tmp_path / "deep" / "labels.tif"
    place = geometry(strata.shape, transform, crs.to_wkt(version="WKT2_2019"))
    write_cog(lambda box: strata[box.slices], place, CLASSES, 255, path, {"RUN": "7"})
    assert cog_validate(path, quiet=True) == (True, [], [])
    with rasterio.open(path) as file:
        assert np.array_equal(file.read(1), strata)
        assert (tuple(file.transform)[:6], file.crs, file.nodata) == (transform, crs, 255)
        assert file.dtypes == ("uint8",)
        assert file.colormap(1)[6] == (0x2B, 0x83, 0xBA, 255)
        assert file.tags()["RUN"] == "7"
        assert '"6": "water"' in file.tags()["CLASSES"]
    assert sorted(p.name for p in path.parent.iterdir()) == ["labels.qml", "labels.tif", "labels.tif.aux.xml"]


def test_gdal_finds_the_class_names(tmp_path: Path) -> None:
    labels = random_labels((40, 50))
    write_cog(lambda box: labels[box.slices], geometry(labels.shape), CLASSES, 255, tmp_path / "l.tif")
    rasterio.shutil.copy(tmp_path / "l.tif", tmp_path / "l.vrt", driver="VRT")  # GDAL's own reading
    names = [e.text or "" for e in ET.parse(tmp_path / "l.vrt").iter("Category")]
    assert names == ["", *NAMES]


@pytest.mark.parametrize(
    "transform",
    [NORTH, (28.5, 0, 6e5, 0, 28.5, 2e5), (20.1, 7.3, 6e5, 6.9, -21.7, 2e5), (1 / 3, 0, 0.1, 0, -1 / 7, 0.2)],
    ids=["north-up", "south-up", "rotated", "thirds"],
)
def test_affine_is_exact(tmp_path: Path, transform: tuple[float, ...]) -> None:
    labels = random_labels((30, 20))
    write_cog(
        lambda box: labels[box.slices], geometry(labels.shape, transform), CLASSES, None, tmp_path / "l.tif"
    )
    with rasterio.open(tmp_path / "l.tif") as file:
        assert tuple(file.transform)[:6] == transform
        assert file.nodata is None
        assert np.array_equal(file.read(1), labels)


@pytest.mark.parametrize(
    ("name", "crs"),
    [
        ("utm", CRS.from_epsg(32616)),
        ("latitude first", CRS.from_epsg(4326)),
        ("swiss", CRS.from_epsg(2056)),
        ("none", None),
        (
            "rotated pole, which GeoTIFF has no keys for",
            CRS.from_user_input(
                "+proj=ob_tran +o_proj=longlat +o_lon_p=-162 +o_lat_p=39.25 +lon_0=180 "
                "+to_meter=0.0174532925199433"
            ),
        ),
    ],
)
def test_crs_is_exact(tmp_path: Path, name: str, crs: CRS | None) -> None:
    labels = random_labels((8, 9))
    place = geometry(labels.shape, (0.1, 0, 5, 0, -0.1, 50), None if crs is None else crs.to_wkt())
    write_cog(lambda box: labels[box.slices], place, CLASSES, 255, tmp_path / "l.tif")
    assert read_crs(tmp_path / "l.tif") == place.projection


def test_same_input_same_bytes(tmp_path: Path) -> None:
    labels = random_labels((700, 900))
    for name in ("a", "b"):
        write_cog(
            lambda box: labels[box.slices], geometry(labels.shape), CLASSES, 255, tmp_path / name / "l.tif"
        )
    for file in ("l.tif", "l.tif.aux.xml", "l.qml"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_overview_holds_the_most_frequent_class(tmp_path: Path) -> None:
    """Every 2×2 cell has three of one class and one of another: the overview is the three."""
    cells = random_labels((600, 640), seed=3)
    labels = cells.repeat(2, axis=0).repeat(2, axis=1)
    labels[1::2, 1::2] = cells % 7 + 1
    write_cog(lambda box: labels[box.slices], geometry(labels.shape), CLASSES, 255, tmp_path / "l.tif")
    with rasterio.open(tmp_path / "l.tif") as file:
        assert file.overviews(1) == [2, 4]
    with rasterio.open(tmp_path / "l.tif", overview_level=0) as file:
        assert np.array_equal(file.read(1), cells)


def test_reads_are_bounded_and_cover_once(tmp_path: Path) -> None:
    labels = random_labels((STEP + 5, STEP + 700))
    reads: list[Box] = []

    def read(box: Box) -> np.ndarray:
        reads.append(box)
        return labels[box.slices]

    write_cog(read, geometry(labels.shape), CLASSES, 255, tmp_path / "l.tif")
    assert sum(b.size for b in reads) == labels.size
    assert max(max(b.shape) for b in reads) <= STEP
    with rasterio.open(tmp_path / "l.tif") as file:
        assert np.array_equal(file.read(1), labels)


def test_wide_values_are_uint16_without_palette(tmp_path: Path) -> None:
    classes = [Class(value=1, name="a", color="#ff0000"), Class(value=65534, name="z", color="#00ff00")]
    labels = np.array([[1, 65534], [65535, 1]], dtype=np.uint16)
    write_cog(lambda box: labels[box.slices], geometry(labels.shape), classes, 65535, tmp_path / "l.tif")
    with rasterio.open(tmp_path / "l.tif") as file:
        assert file.dtypes == ("uint16",)
        assert np.array_equal(file.read(1), labels)
        with pytest.raises(ValueError):
            file.colormap(1)
    aux = (tmp_path / "l.tif.aux.xml").read_text()
    assert "<F>65534</F>" in aux and "CategoryNames" not in aux


def test_a_label_outside_the_classes_range_is_refused(tmp_path: Path) -> None:
    labels = np.full((4, 4), 300, dtype=np.uint16)
    with pytest.raises(SceneError, match="300…300, outside 0…255"):
        write_cog(lambda box: labels[box.slices], geometry(labels.shape), CLASSES, 255, tmp_path / "l.tif")
    assert list(tmp_path.iterdir()) == []


def test_a_crash_leaves_the_old_file(tmp_path: Path) -> None:
    labels = random_labels((10, 10))
    path = tmp_path / "l.tif"
    write_cog(lambda box: labels[box.slices], geometry(labels.shape), CLASSES, 255, path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(box: Box) -> np.ndarray:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_cog(broken, geometry(labels.shape), CLASSES, 255, path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_scores(tmp_path: Path) -> None:
    scores = np.random.default_rng(1).random((7, 90, 80)).astype(np.float32)
    scores[:, :5] = np.nan
    write_cog_scores(
        lambda box: scores[(slice(None), *box.slices)], geometry((90, 80)), CLASSES, tmp_path / "s.tif"
    )
    assert cog_validate(tmp_path / "s.tif", quiet=True)[0]
    with rasterio.open(tmp_path / "s.tif") as file:
        assert np.array_equal(file.read(), scores, equal_nan=True)
        assert file.descriptions == NAMES
        assert np.isnan(file.nodata)


PROGRAM = """
import resource, sys
import numpy as np
from pathlib import Path
from segpipe.export.cog import write_cog
from segpipe.geometry.geometry import RasterGeometry
from segpipe.config.card import Class
n, path = int(sys.argv[1]), Path(sys.argv[2])
def read(box):
    labels = np.zeros(box.shape, np.uint8)
    labels[100:300, 50:900] = 1
    return labels
classes = [Class(value=v, name=str(v), color="#112233") for v in (0, 1)]
write_cog(read, RasterGeometry((n, n), (1, 0, 0, 0, -1, 0), None), classes, 255, path)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_follow_the_size(tmp_path: Path) -> None:
    """A raster of 400 million pixels takes hardly more than one of 25 million."""
    peaks = []
    for size in (5_000, 20_000):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(size), str(tmp_path / f"{size}.tif")],
            capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 100, f"peak RSS in MiB: {peaks}"
    assert cog_validate(tmp_path / "20000.tif", quiet=True)[0]
