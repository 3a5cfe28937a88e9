"""Items of a static catalogue (written by pystac) and of an API (rustac) become scenes by their assets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest

from segpipe.config.scan import Lake
from segpipe.errors import RequestError
from segpipe.lake import stac
from segpipe.lake.entry import LakeEntry
from segpipe.lake.listing import list_lake
from segpipe.redact import reveal
from segpipe.sources import open_source

WriteCog = Callable[..., np.ndarray]
Serve = Callable[[list[dict[str, Any]]], str]

WORLD = pystac.Extent(
    pystac.SpatialExtent([[-180.0, -90.0, 180.0, 90.0]]),
    pystac.TemporalExtent([[datetime(2026, 1, 1, tzinfo=UTC), None]]),
)


def _item(n: int, collection: str = "landsat", *, clouds: float | None = None, **assets: str) -> pystac.Item:
    """Item n: on day n + 1 of 2026, in a box from (10 n, n) of 5 x 1 degrees."""
    west, south, east, north = box = [10.0 * n, float(n), 10.0 * n + 5, n + 1.0]
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item = pystac.Item(
        f"scene{n}",
        {"type": "Polygon", "coordinates": [ring]},
        box,
        datetime(2026, 1, n + 1, 12, tzinfo=UTC),
        {} if clouds is None else {"eo:cloud_cover": clouds},
        collection=collection,
    )
    for key, href in (assets or {"data": f"s3://bucket/{n}.tif"}).items():
        roles = ["thumbnail"] if key == "preview" else ["data"]
        item.add_asset(key, pystac.Asset(href, media_type=pystac.MediaType.COG, roles=roles))
    return item


def _catalogue(folder: Path, *collections: tuple[str, list[pystac.Item]]) -> Path:
    """Written by pystac: a catalogue of collections, with relative links."""
    top = pystac.Catalog("lake", "A lake")
    for name, items in collections:
        collection = pystac.Collection(name, name, WORLD)
        top.add_child(collection)
        collection.add_items(items)
    top.normalize_and_save(str(folder), pystac.CatalogType.SELF_CONTAINED)
    return folder / "catalog.json"


def _all(location: Any, **fields: Any) -> list[LakeEntry]:
    return list(list_lake(Lake.model_validate({"location": str(location), "kind": "stac", "stac": fields})))


def test_a_catalogue_is_walked_and_its_files_open(tmp_path: Path, write_cog: WriteCog) -> None:
    """Relative hrefs, resolved against where the item lies: the catalogue was moved once written."""
    item = _item(0, data="./pixels.tif", preview="./preview.tif")
    catalogue = _catalogue(tmp_path / "made", ("landsat", [item]))
    values = write_cog(catalogue.parent / "landsat" / "scene0" / "pixels.tif")
    shutil.move(tmp_path / "made", tmp_path / "lake")
    (found,) = _all(tmp_path / "lake" / "catalog.json")
    path = tmp_path / "lake" / "landsat" / "scene0" / "pixels.tif"
    assert (found.name, found.uri, found.size) == ("landsat__scene0", str(path), path.stat().st_size)
    assert found.identity["files"][0]["mtime_ns"] == path.stat().st_mtime_ns
    with open_source(found.uri) as source:
        np.testing.assert_array_equal(source.read(source.geometry.box).values[0], values)


def test_several_assets_are_bands_in_the_order_asked_for(tmp_path: Path, write_cog: WriteCog) -> None:
    item = _item(0, red="./B4.tif", nir="./B5.tif")
    catalogue = _catalogue(tmp_path, ("landsat", [item]))
    folder = tmp_path / "landsat" / "scene0"
    red, nir = write_cog(folder / "B4.tif", 1), write_cog(folder / "B5.tif", 2)
    (found,) = _all(catalogue, assets=["nir", "red"], collections=["landsat"])
    assert (found.name, found.uri) == ("scene0", f"stack:{folder}/B5.tif|{folder}/B4.tif")
    assert found.size == sum(p.stat().st_size for p in folder.glob("*.tif"))
    with open_source(found.uri, band_names=["nir", "red"]) as source:
        values = source.read(source.geometry.box, [source.bands.index(b) for b in ("red", "nir")]).values
    np.testing.assert_array_equal(values, [red, nir])


def test_identity_is_updated_with_checksums_and_sizes(tmp_path: Path) -> None:
    item = _item(0)
    item.common_metadata.updated = datetime(2026, 2, 3, tzinfo=UTC)
    item.assets["data"].extra_fields |= {"file:size": 4711, "file:checksum": "1220abcd"}
    (found,) = _all(_catalogue(tmp_path, ("landsat", [item])))
    assert found.identity == {
        "updated": "2026-02-03T00:00:00+00:00",
        "assets": [{"href": "s3://bucket/0.tif", "size": 4711, "checksum": "1220abcd"}],
    }
    assert (found.size, found.modified) == (4711, datetime(2026, 2, 3, tzinfo=UTC))
    item.common_metadata.updated = datetime(2026, 2, 4, tzinfo=UTC)
    (later,) = _all(_catalogue(tmp_path, ("landsat", [item])))
    assert (later.name, later.uri) == (found.name, found.uri)
    assert later.digest != found.digest


def test_a_signed_address_is_the_same_scene_in_every_listing(tmp_path: Path) -> None:
    """Each listing has another signature; two items may have their file's number in the query only."""

    def listed(item: pystac.Item) -> LakeEntry:
        item.common_metadata.updated = datetime(2026, 2, 3, tzinfo=UTC)
        (found,) = _all(_catalogue(tmp_path, ("landsat", [item])))
        return found

    first, again = (listed(_item(0, data=f"https://host/0.tif?sig={n}")) for n in "ab")
    assert [first.uri, again.uri] == ["https://host/0.tif"] * 2
    assert [reveal(first.uri), reveal(again.uri)] == [f"https://host/0.tif?sig={n}" for n in "ab"]
    assert first.digest == again.digest
    assert listed(_item(1, data="https://host/0.tif?sig=a")).digest != first.digest


FILTERS: list[tuple[dict[str, Any], list[int]]] = [
    ({}, [0, 1, 2, 3, 4]),
    ({"cloud_cover": 30}, [0, 1, 4]),  # item 4 does not say
    ({"begin": "2026-01-03T00:00:00Z"}, [2, 3, 4]),
    ({"begin": "2026-01-02T12:00:00", "end": "2026-01-03T12:00:00Z"}, [1, 2]),
    ({"bbox": [4, 0, 12, 5]}, [0, 1]),
    ({"bbox": [30, 1.5, 45, 3.5]}, [3]),
    ({"bbox": [30, 1.5, 45, 3.5], "cloud_cover": 10}, []),
    ({"collections": ["landsat"]}, [0, 1, 2]),
    ({"collections": ["landsat", "sentinel"], "cloud_cover": 0}, [0, 4]),
]


def _five() -> list[pystac.Item]:
    clouds = [0.0, 20.0, 40.0, 60.0, None]
    return [_item(n, "landsat" if n < 3 else "sentinel", clouds=c) for n, c in enumerate(clouds)]


@pytest.mark.parametrize(("fields", "expected"), FILTERS)
def test_filters_of_a_static_catalogue(tmp_path: Path, fields: dict[str, Any], expected: list[int]) -> None:
    items = _five()
    catalogue = _catalogue(tmp_path, ("landsat", items[:3]), ("sentinel", items[3:]))
    assert [f.uri for f in _all(catalogue, **fields)] == [f"s3://bucket/{n}.tif" for n in expected]
    together = tmp_path / "items.json"
    pystac.ItemCollection(items).save_object(str(together))
    assert [f.uri for f in _all(together, **fields)] == [f"s3://bucket/{n}.tif" for n in expected]


def test_an_api_is_searched_page_by_page(stac_api: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [i.to_dict() for i in _five()]
    for item in items:
        item["properties"]["updated"] = "2026-02-03T00:00:00Z"
    address = stac_api(items)
    monkeypatch.setattr(stac, "PAGE", 2)
    for fields, expected in FILTERS:
        found = _all(address, **fields)
        assert sorted(f.uri for f in found) == [f"s3://bucket/{n}.tif" for n in expected], fields
    assert {f.name for f in _all(address, collections=["sentinel"])} == {"scene3", "scene4"}
    assert {f.name for f in _all(address, bbox=[0, 0, 1, 1])} == {"landsat__scene0"}
    with pytest.raises(
        RequestError, match=r"collections: modis: .* no such collection; it has landsat, sentinel"
    ):
        _all(address, collections=["landsat", "modis"])
    with pytest.raises(RequestError, match=r"lake.stac.assets: none of 5 items .* has no B9; it has data"):
        _all(address, assets=["B9"])
    with pytest.raises(RequestError, match=r"a collection of an API; give the API's own address"):
        _all(f"{address}collections/landsat")


def test_a_static_catalogue_behind_http(tmp_path: Path, write_cog: WriteCog) -> None:
    _catalogue(tmp_path, ("landsat", [_item(0, data="./a.tif")]))
    write_cog(tmp_path / "landsat" / "scene0" / "a.tif")
    with subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None
            port = server.stdout.readline().split(" port ")[1].split()[0]
            (found,) = _all(f"http://127.0.0.1:{port}/catalog.json")
        finally:
            server.kill()
    assert found.uri == f"http://127.0.0.1:{port}/landsat/scene0/a.tif"
    assert found.size == (tmp_path / "landsat" / "scene0" / "a.tif").stat().st_size
    assert found.identity["files"][0]["mtime"] is not None
    assert found.modified is not None


def test_a_catalogue_in_a_bucket(s3: Any, tmp_path: Path, write_cog: WriteCog) -> None:
    _catalogue(tmp_path / "cat", ("landsat", [_item(0, data="../../pixels/a b.tif")]))
    values = write_cog(tmp_path / "cat" / "pixels" / "a b.tif")
    for path in (tmp_path / "cat").rglob("*.*"):
        s3.upload_file(str(path), "lake", str(path.relative_to(tmp_path)))
    (found,) = _all("s3://lake/cat/catalog.json")
    assert found.uri == "s3://lake/cat/pixels/a b.tif"
    assert (
        found.identity["files"][0]["etag"] == s3.head_object(Bucket="lake", Key="cat/pixels/a b.tif")["ETag"]
    )
    with open_source(found.uri) as source:
        np.testing.assert_array_equal(source.read(source.geometry.box).values[0], values)


def test_items_without_the_assets_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    odd = _item(1, red="s3://b/r.tif", nir="s3://b/n.tif")
    catalogue = _catalogue(tmp_path, ("landsat", [_item(0), odd]))
    assert [f.name for f in _all(catalogue)] == ["landsat__scene0"]
    assert "1 of 2 items are no scenes; item scene1 has 2 GeoTIFFs with the role data" in caplog.text
    with pytest.raises(RequestError, match=r"lake.stac.collections: modis: .* no such collection"):
        _all(catalogue, collections=["modis"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as STAC"),
        ("[]", "is no STAC; expected a JSON object"),
        (json.dumps({"type": "Topology"}), "is no STAC; valid: a catalogue"),
        (json.dumps({"type": "Feature", "id": "x"}), "item 'x' is damaged"),
        (
            json.dumps({"type": "Catalog", "links": [{"rel": "item", "href": "gone.json"}]}),
            "gone.json: cannot be read",
        ),
    ],
)
def test_a_file_that_is_no_stac(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RequestError, match=f"lake.location: {tmp_path}.*{message}"):
        _all(tmp_path / "x.json")


def test_a_box_across_the_antimeridian() -> None:
    assert stac._overlap([179.0, 0, -179.0, 1], [-180, 0, -179.5, 2])
    assert stac._overlap([-179.9, 0, -179.8, 1], [179.0, 0, -179.0, 1])
    assert not stac._overlap([179.0, 0, -179.0, 1], [0, 0, 10, 2])
    assert stac._overlap([0, 0, 100.0, 1, 1, 200.0], [0.5, 0.5, 2, 2])  # with heights
