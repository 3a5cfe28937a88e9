"""Results as STAC 1.1: an item for every raster scene, a static catalogue for the run.

All links between them are relative, so a run's folder can be moved or served as it is. What an item says of
its files (type, nodata, grid, checksum) is read from the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pystac
import rasterio
from pyproj import CRS
from pystac.extensions.classification import Classification, ClassificationExtension
from pystac.extensions.file import FileExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.extensions.raster import DataType, RasterBand, RasterExtension, Sampling

from segpipe import __version__
from segpipe.config.card import Card, Class
from segpipe.export.footprint import outline
from segpipe.export.run_folder import ITEM
from segpipe.export.staging import json_text
from segpipe.geometry.geometry import RasterGeometry
from segpipe.sources import open_source
from segpipe.sources.gdal import SUFFIX as VRT
from segpipe.sources.remote import is_remote
from segpipe.store.location import Mark

if TYPE_CHECKING:
    from segpipe.tables.record import RunRecord

CATALOG = "catalog.json"
PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"
EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
"""Begin of the interval of a scene that does not say when it was taken: before all digital imagery."""
ASSETS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "labels": ("Label map", pystac.MediaType.COG, ("data", "labels")),
    "scores": ("Probability of each class", pystac.MediaType.COG, ("data", "probability")),
    "uncertainty": ("Uncertainty of the model", pystac.MediaType.COG, ("data", "uncertainty")),
    "instances": ("Ids of objects", pystac.MediaType.COG, ("data", "instances")),
    "objects": ("Objects as polygons", pystac.MediaType.GEOPACKAGE, ("data", "instances")),
    "geoparquet": ("Objects as polygons", pystac.MediaType.VND_APACHE_PARQUET, ("data", "instances")),
    "coco": ("Objects in COCO's form", pystac.MediaType.JSON, ("data", "instances")),
    "regions": ("Regions with their numbers", pystac.MediaType.GEOPACKAGE, ("data", "statistics")),
    "ome-zarr": ("Label map, OME-Zarr", pystac.MediaType.VND_ZARR, ("data", "labels")),
    "preview": ("Labels over the image", pystac.MediaType.PNG, ("thumbnail",)),
}
"""Title, media type and roles of a scene's files, by what they are."""
TIME_FORMATS = ("%Y:%m:%d %H:%M:%S", "%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M:%S%z", "%Y-%m-%dT%H:%M:%S")


def scene_item(
    *,
    identifier: str,
    uri: str,
    identity: Mapping[str, Any],
    geometry: RasterGeometry,
    classes: Sequence[Class],
    nodata: int | None,
    card: Card | None,
    weights: str,
    labels_key: str,
    files: Mapping[str, str],
    marks: Mapping[str, Mark],
    folder: Path,
    created: str,
) -> str:
    """The text of a scene's ``item.json``, which is to lie beside its files.

    Args:
        identifier: of the item, unique among runs.
        uri: of the scene; without user, password and query it is the link ``derived_from``.
        identity: of the scene's content: when it was written bounds when it was taken.
        geometry: of the scene.
        classes: as shown in the label map.
        nodata: its value without data, or None.
        card: of the model; None: labels as given.
        weights: SHA-256 of the model's weights, or empty.
        labels_key: of the label map's stage.
        files: what each is (`ASSETS`), to its path relative to the run's folder.
        marks: sizes and checksums by path.
        folder: local, of the run.
        created: when the run began, ISO 8601.

    Raises:
        SceneError: the scene has no place on the Earth that can be told.
    """
    shape, bounds = outline(geometry)
    item = pystac.Item(
        identifier, shape, bounds, None, _properties(card, weights, labels_key), EARLIEST, EARLIEST
    )
    _set_times(item, uri, identity, created)
    _set_projection(item, geometry)
    for name, path in files.items():
        if name in ASSETS:
            _add_asset(item, name, path, folder, marks.get(path))
    if "labels" in item.assets:
        listed = ClassificationExtension.ext(item.assets["labels"], add_if_missing=True)
        listed.classes = list(_classifications(classes, nodata))
    for relation in ("root", "parent"):
        item.add_link(pystac.Link(relation, f"../../{CATALOG}", pystac.MediaType.JSON))
    item.add_link(pystac.Link("derived_from", str(uri)))
    return json_text(item.to_dict(include_self_link=False, transform_hrefs=False))


def run_catalog(record: RunRecord) -> str:
    """The text of a run's ``catalog.json``: a link for each scene that has an item."""
    title = f"{record.job_name}, run {record.run_id}"
    model = f" by the model {record.model.name}" if record.model else ""
    about = f"Label maps{model}, made by segpipe; an item is a scene."
    catalog = pystac.Catalog(
        f"{record.job_name}-{record.run_id}", about, title, catalog_type=pystac.CatalogType.SELF_CONTAINED
    )
    catalog.clear_links("root")
    catalog.add_link(pystac.Link("root", f"./{CATALOG}", pystac.MediaType.JSON, title))
    for scene in record.mapped:
        if ITEM in scene.files.get("item", ""):
            link = pystac.Link("item", f"./{scene.files['item']}", pystac.MediaType.GEOJSON, scene.name)
            catalog.add_link(link)
    return json_text(catalog.to_dict(include_self_link=False, transform_hrefs=False))


def capture_time(uri: str) -> tuple[datetime, str] | None:
    """When a raster says it was taken, in UTC where it names no zone, and the tag that says so; or None."""
    if not is_remote(uri):
        uri = uri.removeprefix("file://")
    if (":" in uri.split("/")[0] and not is_remote(uri)) or uri.lower().endswith(VRT):
        return None  # a mosaic has many times, a package's file and others none that we look for
    with open_source(uri) as source:
        tags = source.tags
    for tag, text in tags.items():
        for form in TIME_FORMATS:
            try:
                time = datetime.strptime(text.strip(), form)
            except ValueError:
                continue
            return (time if time.tzinfo else time.replace(tzinfo=UTC)), tag
    return None


def _properties(card: Card | None, weights: str, labels_key: str) -> dict[str, Any]:
    """What made the labels. The mlm extension describes models, not what they answer: so plain properties."""
    found: dict[str, Any] = {"processing:software": {"segpipe": __version__}, "segpipe:labels": labels_key}
    if card is not None:
        found["segpipe:model"] = card.name
        found["segpipe:architecture"] = f"{card.provider} {card.architecture or ''}".strip()
        found["segpipe:weights_sha256"] = weights
    return found


def _set_times(item: pystac.Item, uri: str, identity: Mapping[str, Any], created: str) -> None:
    """When the scene was taken; where it does not say, between `EARLIEST` and when its file was written."""
    began = datetime.fromisoformat(created) if created else datetime.now(UTC)
    item.common_metadata.created = began.astimezone(UTC)
    known = capture_time(uri)
    if known is not None:
        item.datetime, item.properties["segpipe:datetime_from"] = known[0], f"the scene's tag {known[1]}"
        for name in ("start_datetime", "end_datetime"):
            del item.properties[name]
        return
    written = max(_written(identity), default=began)
    item.common_metadata.end_datetime = max(written, EARLIEST)
    item.properties["segpipe:datetime_from"] = (
        "the scene does not say when it was taken: the interval ends when its file was written"
    )


def _written(value: Any) -> Iterator[datetime]:
    """Times of change in an identity."""
    if isinstance(value, Mapping):
        if "mtime_ns" in value:
            yield datetime.fromtimestamp(value["mtime_ns"] // 10**9, UTC)
        elif isinstance(value.get("mtime"), str):
            yield datetime.fromisoformat(value["mtime"])
        for inner in value.values():
            yield from _written(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _written(inner)


def _set_projection(item: pystac.Item, geometry: RasterGeometry) -> None:
    item.stac_extensions.append(PROCESSING)
    crs = geometry.projection
    assert crs is not None
    code = _code(crs)
    projection = ProjectionExtension.ext(item, add_if_missing=True)
    projection.apply(
        code=code,
        wkt2=None if code else geometry.crs,
        shape=list(geometry.shape),
        transform=list(geometry.transform),
    )


def _code(crs: CRS) -> str | None:
    """The authority's code of exactly this CRS, as ``EPSG:32617``."""
    found = crs.to_authority(min_confidence=100)
    if found is None or not crs.equals(CRS.from_authority(*found), ignore_axis_order=True):
        return None
    return ":".join(found)


def _add_asset(item: pystac.Item, name: str, path: str, folder: Path, mark: Mark | None) -> None:
    title, kind, roles = ASSETS[name]
    beside = path.split("/", 2)[-1]  # scenes/<scene>/…
    if kind == pystac.MediaType.VND_ZARR:
        beside = str(Path(beside).parent)  # the folder, not its zarr.json
    asset = pystac.Asset(f"./{beside}", title, media_type=kind, roles=list(roles))
    item.add_asset(name, asset)
    if mark is not None and kind != pystac.MediaType.VND_ZARR:
        multihash = f"1220{mark.sha256}"  # SHA-256, 32 bytes
        FileExtension.ext(asset, add_if_missing=True).apply(checksum=multihash, size=mark.size)
    if kind == pystac.MediaType.COG:
        _describe_bands(asset, folder / path)


def _describe_bands(asset: pystac.Asset, path: Path) -> None:
    """STAC 1.1's ``bands``, and ``raster:bands`` for the readers that know only these."""
    with rasterio.open(path, driver="GTiff") as file:
        names = [text or str(number) for number, text in enumerate(file.descriptions, start=1)]
        kinds = list(zip(file.dtypes, file.nodatavals, strict=True))
    bands = [
        {"name": name, "data_type": dtype} | ({} if nodata is None else {"nodata": _number(nodata)})
        for name, (dtype, nodata) in zip(names, kinds, strict=True)
    ]
    asset.extra_fields["bands"] = bands
    RasterExtension.ext(asset, add_if_missing=True).bands = [
        RasterBand.create(nodata=b.get("nodata"), sampling=Sampling.AREA, data_type=DataType(b["data_type"]))
        for b in bands
    ]


def _number(nodata: float) -> Any:
    """A nodata value as JSON has it: whole where it is whole, ``nan`` as a word."""
    if nodata != nodata:
        return "nan"
    return int(nodata) if float(nodata).is_integer() else nodata


def _classifications(classes: Sequence[Class], nodata: int | None) -> Iterator[Classification]:
    for c in sorted(classes, key=lambda c: c.value):
        plain = re.sub(r"[^0-9A-Za-z_-]+", "-", c.name).strip("-") or f"class-{c.value}"
        yield Classification.create(
            value=c.value, name=plain, title=c.name, description=c.description or None,
            color_hint=c.color[1:].upper(),
        )  # fmt: skip
    if nodata is not None:
        yield Classification.create(value=nodata, name="no-data", title="no data", nodata=True)
