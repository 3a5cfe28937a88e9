"""Each file that holds an input's content: if it changes, its scene is done again; else nothing is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import nibabel as nib
import numpy as np
import pytest
import rasterio
import shapely

import segpipe
from segpipe.config.job import Identity, load_job
from segpipe.runs.check import check_request
from segpipe.runs.local import run_local
from segpipe.sources import open_source
from segpipe.sources.identity import file_identity, identified, members
from tests.given import job_of, run_all
from tests.world import World

GRID = {"crs": "EPSG:32616", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 4_000_000)}
SCENE = np.arange(40 * 30).astype(np.uint8).reshape(1, 40, 30)
LABELS = (SCENE > 100).astype(np.uint8)
Fields = dict[str, Any]
Series = Callable[..., Path]


def tif(path: Path, values: np.ndarray, **profile: Any) -> Path:
    count, height, width = values.shape
    profile = {"driver": "GTiff", "dtype": values.dtype, **GRID, **profile}
    with rasterio.open(path, "w", count=count, height=height, width=width, **profile) as dataset:
        dataset.write(values)
    return path


def vrt(path: Path, tiles: list[Path]) -> Path:
    """Tiles of 15 columns, side by side."""
    sources = "".join(
        f"<SimpleSource><SourceFilename relativeToVRT='1'>{tile.name}</SourceFilename>"
        "<SourceBand>1</SourceBand><SrcRect xOff='0' yOff='0' xSize='15' ySize='40'/>"
        f"<DstRect xOff='{15 * n}' yOff='0' xSize='15' ySize='40'/></SimpleSource>"
        for n, tile in enumerate(tiles)
    )
    path.write_text(
        "<VRTDataset rasterXSize='30' rasterYSize='40'><SRS>EPSG:32616</SRS>"
        "<GeoTransform>500000, 10, 0, 4000000, 0, -10</GeoTransform>"
        f"<VRTRasterBand dataType='Byte' band='1'>{sources}</VRTRasterBand></VRTDataset>"
    )
    return path


def with_sidecars(path: Path) -> Path:
    """A raster placed by a world file, with a mask, overviews and GDAL's own sidecar."""
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        tif(path, SCENE, crs=None, transform=None)
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(np.ones((40, 30), dtype=bool))
    tif(path.parent / f"{path.name}.ovr", SCENE[:, ::2, ::2], crs=None)
    path.with_suffix(".tfw").write_text("10\n0\n0\n-10\n500005\n3999995\n")
    Path(f"{path}.aux.xml").write_text(
        "<PAMDataset><Metadata><MDI key='BY'>one</MDI></Metadata></PAMDataset>"
    )
    return path


def raster(folder: Path, _: Series) -> Fields:
    scene, labels = with_sidecars(folder / "scene.tif"), tif(folder / "labels.tif", LABELS, crs=None)
    return {"scene": scene, "labels": labels}


def envi(folder: Path, _: Series) -> Fields:
    scene = tif(folder / "scene.img", SCENE, driver="ENVI")
    return {"scene": scene, "labels": tif(folder / "labels.bsq", LABELS, driver="ENVI")}


def tiled(folder: Path, _: Series) -> Fields:
    """All that is read from VRT files."""
    fields: Fields = {}
    for name, values in (("scene", SCENE), ("labels", LABELS), ("truth", LABELS)):
        tiles = [tif(folder / f"{name}_{n}.tif", values[:, :, 15 * n : 15 * n + 15]) for n in range(2)]
        fields[name] = vrt(folder / f"{name}.vrt", tiles)
    truth = fields.pop("truth")
    return {**fields, "reference": {"path": str(truth)}}


def mosaic(folder: Path, _: Series) -> Fields:
    right = rasterio.Affine(10, 0, 500_150, 0, -10, 4_000_000)
    tif(folder / "scene_0.tif", SCENE[:, :, :15], nodata=255)
    tif(folder / "scene_1.tif", SCENE[:, :, 15:], nodata=255, transform=right)
    labels = tif(folder / "labels.tif", LABELS)
    return {"scene": f"mosaic:{folder}/scene_*.tif", "labels": labels}


def stack(folder: Path, _: Series) -> Fields:
    parts = [tif(folder / f"{name}.tif", SCENE) for name in ("red", "nir")]
    return {"scene": f"stack:{parts[0]}|{parts[1]}", "labels": tif(folder / "labels.tif", LABELS)}


def folders(folder: Path, _: Series) -> Fields:
    """Labels and reference found by the scene's name, their classes in a list."""
    for name in ("labels", "truth"):
        (folder / name).mkdir()
        tif(folder / name / "scene.tif", LABELS)
    classes = folder / "classes.csv"
    classes.write_text("value,name,color\n0,none,#000000\n1,field,#00ff00\n")
    fields = {"reference": {"path": str(folder / "truth")}, "classes": str(classes)}
    return {"scene": tif(folder / "scene.tif", SCENE), "labels": f"{folder}/labels/*.tif", **fields}


def districts(path: Path, right: float = 500_150, **options: Any) -> None:
    west = shapely.box(500_000, 3_999_600, 500_150, 4_000_000)
    names, boxes = ["west", "east"], [west, shapely.box(right, 3_999_600, 500_300, 4_000_000)]
    geopandas.GeoDataFrame({"name": names}, geometry=boxes, crs="EPSG:32616").to_file(path, **options)


def with_regions(folder: Path, name: str, **options: Any) -> Fields:
    districts(folder / name, **options)
    return {
        "scene": tif(folder / "scene.tif", SCENE),
        "labels": tif(folder / "labels.tif", LABELS),
        "regions": {"path": str(folder / name), "name": "name"},
    }


def shapefile(folder: Path, _: Series) -> Fields:
    return with_regions(folder, "districts.shp", encoding="utf-8")


def geojson(folder: Path, _: Series) -> Fields:
    return with_regions(folder, "districts.geojson")


def atlas(folder: Path, _: Series) -> Fields:
    names = folder / "names.csv"
    names.write_text("value,name\n1,left\n")
    regions = {"path": str(tif(folder / "atlas.tif", LABELS)), "name": str(names)}
    scene, labels = tif(folder / "scene.tif", SCENE), tif(folder / "labels.tif", LABELS)
    return {"scene": scene, "labels": labels, "regions": regions}


def pair(folder: Path, _: Series) -> Fields:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    nib.save(nib.Nifti1Pair(np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine), folder / "scene.img")
    labels = (np.arange(60) > 20).astype(np.uint8).reshape(3, 4, 5)
    nib.save(nib.Nifti1Image(labels, affine), folder / "labels.nii")
    return {"scene": folder / "scene.img", "labels": folder / "labels.nii"}


def series(folder: Path, write_series: Series) -> Fields:
    scene = write_series(folder / "series", np.arange(60, dtype=np.int16).reshape(3, 4, 5))
    with open_source(str(scene)) as source:
        affine = np.array(source.geometry.affine)
    nib.save(nib.Nifti1Image(np.ones((5, 4, 3), dtype=np.uint8), affine), folder / "labels.nii")
    return {"scene": scene, "labels": folder / "labels.nii"}


def flip_last(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def replaced(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return change


def moved(path: Path) -> None:
    """The polygons of another shapefile."""
    other = path.parent / "other"
    other.mkdir()
    districts(other / path.name, right=500_160)
    shutil.copyfile(other / path.name, path)


def described(path: Path) -> None:
    """Another letter of a NIfTI header's text."""
    data = bytearray(path.read_bytes())
    data[148] ^= 1
    path.write_bytes(data)


SPACE = replaced(b"samples", b" samples")
END = replaced(b"</VRTDataset>", b" </VRTDataset>")
ASKED: dict[Callable[[Path, Series], Fields], dict[str, Callable[[Path], None]]] = {
    raster: {
        "scene.tif": flip_last, "scene.tfw": replaced(b"3999995", b"3999995.0"), "scene.tif.msk": append,
        "scene.tif.ovr": append, "scene.tif.aux.xml": replaced(b"one", b"two"), "labels.tif": flip_last,
    },
    envi: {"scene.img": flip_last, "scene.hdr": SPACE, "labels.bsq": flip_last, "labels.hdr": SPACE},
    tiled: {
        "scene.vrt": END, "scene_1.tif": flip_last, "labels.vrt": END, "labels_0.tif": flip_last,
        "labels_1.tif": flip_last, "truth.vrt": END, "truth_1.tif": flip_last,
    },
    mosaic: {"scene_0.tif": flip_last, "scene_1.tif": flip_last},
    stack: {"red.tif": flip_last, "nir.tif": flip_last},
    folders: {
        "labels/scene.tif": flip_last, "truth/scene.tif": flip_last,
        "classes.csv": replaced(b"field", b"woods"),
    },
    shapefile: {
        "districts.dbf": replaced(b"east", b"EAST"), "districts.shp": moved, "districts.shx": append,
        "districts.prj": replaced(b"WGS_1984_UTM_Zone_16N", b"WGS_1984_UTM_Zone_16X"),
        "districts.cpg": replaced(b"UTF-8", b"utf-8"),
    },
    geojson: {"districts.geojson": replaced(b"east", b"EAST")},
    atlas: {"atlas.tif": flip_last, "names.csv": replaced(b"left", b"west")},
    pair: {"scene.img": flip_last, "scene.hdr": described, "labels.nii": flip_last},
    series: {"series/*": flip_last},
}  # fmt: skip
"""How each file of each kind of input changes."""
NO_NUMBER = ("districts.shx", "districts.cpg", "classes.csv")
"""What changes in these changes no number: another run, but the same measurement."""


@pytest.mark.parametrize("how", ["sampled", "content"])
@pytest.mark.parametrize("kind", ASKED, ids=lambda kind: kind.__name__)
def test_a_change_of_any_file_is_measured_again_and_nothing_else_is(
    kind: Callable[[Path, Series], Fields], how: str, tmp_path: Path, write_series: Series
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    fields = kind(folder, write_series)
    job = job_of(tmp_path / "out", fields.pop("scene"), fields.pop("labels"), identity=how, **fields)

    def measured() -> tuple[Path, str]:
        path, _ = run_all(job)
        return path, segpipe.open_run(path).record.done[0].keys["measure"]

    before = measured()
    assert measured() == before
    for name, change in ASKED[kind].items():
        path = next(folder.glob(name))
        times = path.stat()
        change(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a tool that hides what it did
        after = measured()
        assert after[0] != before[0], f"{name}: the finished run was taken for the answer"
        assert (after[1] != before[1]) == (name not in NO_NUMBER), f"{name}: the stage's key"
        before = after
    assert measured() == before


@pytest.mark.parametrize("kind", [raster, envi, tiled], ids=lambda kind: kind.__name__)
def test_what_gdal_lists_is_found_by_names_too(
    kind: Callable[[Path, Series], Fields], tmp_path: Path, write_series: Series
) -> None:
    for path in kind(tmp_path, write_series).values():
        if isinstance(path, Path):
            with rasterio.open(path) as dataset:
                assert {*dataset.files} <= {str(m) for m in members(path)}


def test_a_touch_is_a_change_by_time_and_none_by_content(tmp_path: Path) -> None:
    path = tif(tmp_path / "a.tif", SCENE)
    before = {how: file_identity([path], how) for how in Identity}
    os.utime(path, (1, 1))
    assert file_identity([path], Identity.sampled) != before[Identity.sampled]
    assert file_identity([path], Identity.content) == before[Identity.content]
    with open_source(str(path)) as source:
        assert identified(source.identity, Identity.content)["files"] == before[Identity.content]


@pytest.mark.parametrize("how", Identity)
def test_other_bytes_of_the_same_size_and_time_are_seen(how: Identity, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    size = 5 * 2**20
    path.write_bytes(bytes(size))
    os.utime(path, (1, 1))
    # In the samples; and, which only the whole hash can tell, between two of them.
    for place, seen in ((0, True), (size - 1, True), (10_000, how is Identity.content)):
        before = file_identity([path], how)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        os.utime(path, (1, 1))
        assert (file_identity([path], how) != before) == seen


@pytest.mark.parametrize("how", ["sampled", "content"])
def test_a_scene_that_changes_while_it_is_read_fails_and_leaves_nothing(
    how: str, world: World, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(world.folder, tmp_path / "mine"))
    scene, out = mine / "scene1.tif", tmp_path / "out"
    fields = {"scenes": [str(scene)], "reference": None, "regions": None, "identity": how}
    job = load_job(world.job(out, model=str(mine / "models" / "nearest.yaml"), **fields))
    original, times, changed = scene.read_bytes(), scene.stat(), []

    def change(step: object) -> None:
        if not changed:
            changed.append(step)
            flip_last(scene)

    _, record = run_local(check_request(job), change)
    assert changed
    assert [s.error for s in record.failed] == [f"{scene}: changed while it was read; run the job again"]
    # The file comes back as it was: what was made of the other one must not stand for it.
    scene.write_bytes(original)
    os.utime(scene, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not [*out.glob(".store/predict-*/stage.json"), *out.glob(".store/measure-*/stage.json")]
    _, record = run_local(check_request(job))
    assert [s.state for s in record.scenes] == ["done"]
