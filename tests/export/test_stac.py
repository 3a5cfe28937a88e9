"""STAC of real runs: core by pystac's schemas, extensions by pystac's classes, values by rasterio."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import yaml
from finished import finish
from given import job_of, run_all
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.file import FileExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import RasterExtension
from pystac.validation.stac_validator import JsonSchemaSTACValidator
from world import CLASSES, World, raster_pixels, write_raster

from segpipe.export.run_folder import RunFolder
from segpipe.export.stac import capture_time
from segpipe.sources.remote import public_uri
from segpipe.store.location import open_store


def test_the_validator_refuses_what_is_wrong(catalog: pystac.Catalog) -> None:
    item = item_of(catalog, "scene1").clone()
    item.properties["start_datetime"] = "yesterday"
    with pytest.raises(pystac.STACValidationError):
        validate_core(item)


def validate_core(item: pystac.STACObject) -> None:
    """Against the schemas that pystac has with it; those of the extensions are on the network."""
    kind, data = item.STAC_OBJECT_TYPE, item.to_dict(transform_hrefs=False)
    JsonSchemaSTACValidator().validate_core(data, kind, pystac.get_stac_version(), item.get_self_href())


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Two rasters, scores and uncertainty, polygons; the second says when it was taken."""
    folder = tmp_path_factory.mktemp("stac")
    write_raster(folder / "dated.tif", world.pixels(2), names=("red", "nir"), nodata=0)
    with rasterio.open(folder / "dated.tif", "r+") as file:
        file.update_tags(TIFFTAG_DATETIME="2021:07:09 10:11:12")
    job = world.job(
        folder / "out",
        scenes=[str(world / "scene1.tif"), str(folder / "dated.tif")],
        regions={"path": str(world / "districts.geojson"), "name": "district"},
        outputs={"formats": ["cog", "ome-zarr"], "scores": True, "uncertainty": True},
    )
    return finish(job)[0]


@pytest.fixture(scope="module")
def catalog(run: RunFolder) -> pystac.Catalog:
    return pystac.Catalog.from_file(f"{run.location}/catalog.json")


def item_of(catalog: pystac.Catalog, scene: str) -> pystac.Item:
    (item,) = (i for i in catalog.get_items() if i.id.endswith(f"-{scene}"))
    return item


def test_catalogue_and_items_are_valid_and_linked_relatively(run: RunFolder, catalog: pystac.Catalog) -> None:
    validate_core(catalog)
    items = list(catalog.get_items())
    assert len(items) == 2
    for item in items:
        validate_core(item)
        assert item.get_root() is catalog
        assert item.get_parent() is catalog
        for asset in item.assets.values():
            assert not Path(asset.href).is_absolute()
            assert Path(str(asset.get_absolute_href())).exists()
    for path in Path(run.location).rglob("*.json"):
        if path.name in ("catalog.json", "item.json"):
            links = json.loads(path.read_text())["links"]
            hrefs = [link["href"] for link in links if link["rel"] != "derived_from"]
            assert all(href.startswith(".") for href in hrefs), hrefs


def test_assets_say_what_rasterio_reads(run: RunFolder, catalog: pystac.Catalog) -> None:
    item = item_of(catalog, "scene1")
    assert set(item.assets) == {"labels", "scores", "uncertainty", "regions", "ome-zarr", "preview"}
    assert item.assets["labels"].roles == ["data", "labels"]
    assert item.assets["preview"].roles == ["thumbnail"]
    projection = ProjectionExtension.ext(item)
    for name in ("labels", "scores", "uncertainty"):
        asset = item.assets[name]
        path = Path(run.location) / "scenes/scene1" / asset.href
        with rasterio.open(path) as file:
            assert projection.code == f"EPSG:{file.crs.to_epsg()}"
            assert projection.shape == list(file.shape)
            assert projection.transform == list(file.transform)[:6]
            bands = RasterExtension.ext(asset).bands or []
            assert [b.data_type for b in bands] == list(file.dtypes)
            nodata = [float("nan") if b.nodata == "nan" else b.nodata for b in bands]
            assert np.array_equal(np.array(nodata, float), np.array(file.nodatavals, float), equal_nan=True)
            assert [b["name"] for b in asset.extra_fields["bands"]] == list(file.descriptions)
        facts = FileExtension.ext(asset)
        assert facts.size == path.stat().st_size
        assert facts.checksum == "1220" + hashlib.sha256(path.read_bytes()).hexdigest()


def test_classes_have_their_names_and_colours(catalog: pystac.Catalog) -> None:
    classes = ClassificationExtension.ext(item_of(catalog, "scene1").assets["labels"]).classes or []
    known = {(c["value"], c["name"], c["color"][1:].upper()) for c in CLASSES}
    assert {(c.value, c.name, c.color_hint) for c in classes if not c.nodata} == known
    assert [c.value for c in classes if c.nodata] == [255]


def test_bounds_are_those_of_the_raster(world: World, catalog: pystac.Catalog) -> None:
    item = item_of(catalog, "scene1")
    with rasterio.open(world / "scene1.tif") as file:
        bounds = rasterio.warp.transform_bounds(file.crs, "EPSG:4326", *file.bounds, densify_pts=501)
    assert item.bbox is not None
    assert np.allclose(item.bbox, bounds, atol=1e-7)


def test_time_is_the_scenes_own_or_an_interval_that_says_why(run: RunFolder, catalog: pystac.Catalog) -> None:
    dated, other = item_of(catalog, "dated"), item_of(catalog, "scene1")
    assert dated.datetime == datetime(2021, 7, 9, 10, 11, 12, tzinfo=UTC)
    assert "TIFFTAG_DATETIME" in dated.properties["segpipe:datetime_from"]
    assert other.datetime is None
    assert "does not say" in other.properties["segpipe:datetime_from"]
    end = other.common_metadata.end_datetime
    source = Path(next(link.href for link in other.links if link.rel == "derived_from"))
    assert end == datetime.fromtimestamp(int(source.stat().st_mtime), UTC)
    assert other.common_metadata.created == datetime.fromisoformat(run.started)


def test_it_says_what_made_the_labels(world: World, run: RunFolder, catalog: pystac.Catalog) -> None:
    item = item_of(catalog, "scene1")
    assert item.properties["segpipe:model"] == "nearest"
    weights = hashlib.sha256((world.models / "nearest.pt").read_bytes()).hexdigest()
    assert item.properties["segpipe:weights_sha256"] == weights
    assert [link.href for link in item.links if link.rel == "derived_from"] == [str(world / "scene1.tif")]


def test_a_crs_without_a_code_is_told_in_full(world: World, tmp_path: Path) -> None:
    crs = "+proj=laea +lat_0=11 +lon_0=22 +x_0=7 +datum=WGS84 +units=m"
    scene = write_raster(
        tmp_path / "own.tif", raster_pixels(40, 50, 3), names=("red", "nir"), nodata=0, crs=crs
    )
    run, _ = finish(world.job(tmp_path / "out", scenes=[str(scene)]))
    item = pystac.Item.from_file(f"{run.location}/scenes/own/item.json")
    validate_core(item)
    projection = ProjectionExtension.ext(item)
    assert projection.code is None
    assert projection.wkt2 is not None
    assert rasterio.CRS.from_wkt(projection.wkt2) == rasterio.CRS.from_string(crs)


def test_labels_as_given_have_an_item_and_a_scene_without_crs_has_a_note(tmp_path: Path) -> None:
    labels = np.arange(30, dtype=np.uint8).reshape(1, 5, 6) % 3
    for name, crs in (("here", "EPSG:32617"), ("nowhere", None)):
        write_raster(tmp_path / "in" / f"{name}.tif", labels, crs=crs)
        write_raster(tmp_path / "labels" / f"{name}.tif", labels, crs=crs)
    folder, notes = run_all(job_of(tmp_path / "out", tmp_path / "in" / "*.tif", tmp_path / "labels"))
    catalog = pystac.Catalog.from_file(str(folder / "catalog.json"))
    assert [item.id.rsplit("-", 1)[-1] for item in catalog.get_items()] == ["here"]
    assert not (folder / "scenes/nowhere/item.json").exists()
    assert "no STAC item was written: it has no CRS" in notes
    item = next(catalog.get_items())
    validate_core(item)
    assert "segpipe:model" not in item.properties
    values = {c.value for c in ClassificationExtension.ext(item.assets["labels"]).classes or []}
    assert values == {0, 1, 2}


def test_a_link_tells_no_secret() -> None:
    signed = "https://me:word@host/a/b.tif?X-Amz-Signature=abc&x=1#frame=2"
    assert public_uri(signed) == "https://host/a/b.tif#frame=2"
    assert (
        public_uri("stack:https://h/a.tif?s=1|https://h/b.tif?s=2") == "stack:https://h/a.tif|https://h/b.tif"
    )
    assert public_uri("/data/what?.tif") == "/data/what?.tif"
    told = "https://h/a.tif?s=1:2&t=3: cannot be opened (404 for https://h/a.tif?s=1). Is it there? No"
    assert public_uri(told) == (
        "https://h/a.tif: cannot be opened (404 for https://h/a.tif). Is it there? No"
    )


@pytest.mark.parametrize(
    ("tags", "known"),
    [
        ({"TIFFTAG_DATETIME": "2020:01:02 03:04:05"}, "2020-01-02T03:04:05+00:00"),
        ({"TIFFTAG_DATETIME": "0000:00:00 00:00:00"}, None),
        ({}, None),
    ],
)
def test_times_in_tags(tmp_path: Path, tags: dict[str, str], known: str | None) -> None:
    path = write_raster(tmp_path / "a.tif", np.zeros((1, 4, 4), np.uint8))
    with rasterio.open(path, "r+") as file:
        file.update_tags(**tags)
    found = capture_time(str(path))
    assert (found and found[0].isoformat()) == known


def test_in_a_bucket_it_is_the_same(world: World, bucket: str, tmp_path: Path, run: RunFolder) -> None:
    path = world.job(tmp_path / "out", regions={"path": str(world / "districts.geojson"), "name": "district"})
    job = yaml.safe_load(path.read_text())
    job["outputs"]["dir"] = f"{bucket}/stac"
    path.write_text(yaml.safe_dump(job))
    made, record = finish(path)
    assert record.scenes[0].files["item"] == "scenes/scene1/item.json"
    store = open_store(made.location)

    def read(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(bytes(store.get(name).bytes()))
        return found

    item = pystac.Item.from_dict(read("scenes/scene1/item.json"))
    validate_core(item)
    validate_core(pystac.Catalog.from_dict(read("catalog.json")))
    labels = bytes(store.get("scenes/scene1/labels.tif").bytes())
    facts = FileExtension.ext(item.assets["labels"])
    assert facts.checksum == "1220" + hashlib.sha256(labels).hexdigest()
    local = json.loads((Path(run.location) / "scenes/scene1/item.json").read_text())
    assert item.bbox == local["bbox"]
