"""Scenes of a STAC catalogue or API: items that pass a filter, by their assets, and their identities."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from os.path import normpath
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from pystac import Asset, Item, STACError, STACTypeError
from pystac_client import Client
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO

from segpipe.config.job import Identity
from segpipe.config.parsing import parse_json
from segpipe.config.scan import Lake, StacFilter
from segpipe.errors import RequestError
from segpipe.lake.entry import LakeEntry, place_name, stamp
from segpipe.lake.files import STORES
from segpipe.redact import address, seal, whole
from segpipe.sources.base import reason
from segpipe.sources.identity import input_identity, members
from segpipe.sources.remote import is_remote
from segpipe.sources.stack import SEPARATOR, STACK
from segpipe.sources.uri import reveal

TIMEOUT = 60.0
"""Seconds after which a server that says nothing ends the scan."""
PAGE = 250
"""Items asked for at once."""

STAC_ERRORS = (
    STACError, STACTypeError, APIError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
    OverflowError,
)  # fmt: skip
"""What pystac and pystac-client raise at servers and files that are not as the standard says."""

logger = logging.getLogger(__name__)


@dataclass
class _Seen:
    """What has gone by, for what can be said at the end only."""

    collections: set[str] = field(default_factory=set)
    """Those of the filter that are there."""
    items: int = 0
    """That pass the filter."""
    without: list[str] = field(default_factory=list)
    """Why the first of the items without the assets is no scene."""
    left_out: int = 0


def list_stac(lake: Lake) -> Iterator[LakeEntry]:
    """The items of a catalogue, collection, item collection or API that pass the lake's filter.

    A static catalogue is walked link by link, an API is searched page by page; nothing is kept. Items without
    the assets that are asked for are no scenes, and are counted in the log.

    Raises:
        RequestError: the location is no STAC or does not answer; there is no such collection; of all items
            that pass none has the assets.
    """
    want, seen = lake.stac, _Seen()
    place = lake.location
    if not is_remote(place):
        place = str(Path(place.removeprefix("file://")).expanduser().absolute())
    for item in _items(place, want, seen):
        if item.collection_id in want.collections:
            seen.collections.add(item.collection_id)
        try:
            if not _passes(item, want):
                continue
            seen.items += 1
            scene = item_scene(item, want.assets, with_collection=len(want.collections) != 1)
        except NoSceneError as error:
            seen.left_out += 1
            seen.without = seen.without or [str(error)]
        except STAC_ERRORS as error:
            raise _damaged(item.id, place, error) from error
        else:
            yield scene
    missing = [c for c in want.collections if c not in seen.collections]
    if missing:
        raise RequestError(f"lake.stac.collections: {', '.join(missing)}: {place} has no such collection")
    if seen.left_out and seen.left_out == seen.items:
        raise RequestError(f"lake.stac.assets: none of {seen.items} items is a scene; {seen.without[0]}")
    if seen.left_out:
        logger.warning(
            "%s: %d of %d items are no scenes; %s", place, seen.left_out, seen.items, *seen.without
        )


def _items(place: str, want: StacFilter, seen: _Seen) -> Iterator[Item]:
    """Items of whatever the location is.

    Raises:
        RequestError: it is nothing of STAC.
    """
    io = StacApiIO(timeout=TIMEOUT)
    top = _read(io, place)
    links = top.get("links") or []
    if "conformsTo" in top and any(link.get("rel") == "search" for link in links):
        yield from _searched(place, top, want, seen)
    elif top.get("type") == "FeatureCollection":
        for feature in top.get("features") or []:
            yield _item(feature, place)
    elif top.get("type") == "Feature":
        yield _item(top, place)
    elif top.get("type") in ("Catalog", "Collection") or "stac_version" in top:
        if any(link.get("rel") == "items" for link in links):
            raise RequestError(
                f"lake.location: {place}: a collection of an API; give the API's own address, and the "
                "collection's id as lake.stac.collections"
            )
        yield from _walked(io, place, top, want, seen, {place})
    else:
        raise RequestError(
            f"lake.location: {place}: is no STAC; valid: a catalogue, collection, item or item collection as "
            "a JSON file or URL, or the address of a STAC API"
        )


def _walked(
    io: StacApiIO, place: str, top: dict[str, Any], want: StacFilter, seen: _Seen, visited: set[str]
) -> Iterator[Item]:
    """Items below a static catalogue, each read when it is its turn."""
    collection = top.get("id") if top.get("type") == "Collection" else None
    if collection in want.collections:
        seen.collections.add(str(collection))
    # The standard: an item's collection is the one whose link it is.
    skipped = bool(collection and want.collections and collection not in want.collections)
    for link in top.get("links") or []:
        rel, href = link.get("rel"), absolute(str(link.get("href")), place)
        if rel == "item" and not skipped:
            yield _item(_read(io, href), href)
        elif rel == "child" and href not in visited:
            visited.add(href)
            yield from _walked(io, href, _read(io, href), want, seen, visited)


def _searched(place: str, top: dict[str, Any], want: StacFilter, seen: _Seen) -> Iterator[Item]:
    """Items that an API finds, page by page.

    Clouds are no part of the search: servers would leave out the items that do not say.
    """
    methods = {link.get("method", "GET") for link in top["links"] if link.get("rel") == "search"}
    begin, end = _aware(want.begin), _aware(want.end)
    try:
        client = Client.open(reveal(place), timeout=TIMEOUT)
        _require_collections(client, place, want, seen)
        search = client.search(
            method="POST" if "POST" in methods else "GET",
            collections=want.collections or None,
            bbox=want.bbox or None,
            datetime=(begin, end) if begin or end else None,
            limit=PAGE,
        )
        for feature in search.items_as_dicts():
            own = (str(link.get("href")) for link in feature.get("links", []) if link.get("rel") == "self")
            yield _item(feature, next(own, place))
    except STAC_ERRORS as error:
        raise RequestError(f"lake.location: {place}: the search fails: {reason(error)[:200]}") from error


def _require_collections(client: Client, place: str, want: StacFilter, seen: _Seen) -> None:
    """Refuse ids of collections that an API does not have, before it searches."""
    if not want.collections:
        return
    known = {collection.id for collection in client.get_collections()}
    seen.collections |= known & set(want.collections)
    missing = [c for c in want.collections if c not in known]
    if missing:
        some = ", ".join(sorted(known)[:10]) or "none"
        raise RequestError(
            f"lake.stac.collections: {', '.join(missing)}: {place} has no such collection; it has {some}"
        )


def _passes(item: Item, want: StacFilter) -> bool:
    """Whether an item is wanted, whoever has filtered before."""
    if want.collections and item.collection_id not in want.collections:
        return False
    if want.bbox and not (item.bbox and _overlap(item.bbox, want.bbox)):
        return False
    cloud = item.properties.get("eo:cloud_cover")
    if cloud is not None and float(cloud) > want.cloud_cover:
        return False
    begin, end = _aware(want.begin), _aware(want.end)
    if begin is None and end is None:
        return True
    common = item.common_metadata
    first = _aware(common.start_datetime or item.datetime)
    last = _aware(common.end_datetime or item.datetime)
    if first is None or last is None:
        return False
    return (end is None or first <= end) and (begin is None or last >= begin)


def _overlap(box: list[float], other: list[float]) -> bool:
    """Whether two boxes in degrees meet; west > east goes across the antimeridian."""
    south, north = (box[1], box[4]) if len(box) == 6 else (box[1], box[3])
    if south > other[3] or north < other[1]:
        return False
    east = box[3] if len(box) == 6 else box[2]
    return any(w <= b and e >= a for w, e in _spans(box[0], east) for a, b in _spans(other[0], other[2]))


def _spans(west: float, east: float) -> list[tuple[float, float]]:
    return [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]


def _aware(time: datetime | None) -> datetime | None:
    """A time with a zone; without one it is UTC."""
    return time if time is None or time.tzinfo else time.replace(tzinfo=UTC)


def _item(data: dict[str, Any], place: str) -> Item:
    """An item, with its address, so that the hrefs of its assets can be resolved.

    Raises:
        RequestError: it is none.
    """
    try:
        return Item.from_dict(data, href=place, preserve_dict=False)
    except STAC_ERRORS as error:
        raise _damaged(data.get("id"), place, error) from error


def _damaged(item: object, place: str, error: Exception) -> RequestError:
    return RequestError(f"lake.location: {place}: item {item!r} is damaged: {reason(error)[:200]}")


def _read(io: StacApiIO, href: str) -> dict[str, Any]:
    """A JSON object from a file, URL or object store.

    Raises:
        RequestError: it cannot be read, or is none.
    """
    try:
        data = parse_json(_stored(href) if href.startswith(STORES) else io.read_text(reveal(href)))
    except STAC_ERRORS as error:
        raise RequestError(f"lake.location: {href}: cannot be read as STAC: {reason(error)[:200]}") from error
    if not isinstance(data, dict):
        raise RequestError(f"lake.location: {href}: is no STAC; expected a JSON object")
    for key in ("links", "features"):
        parts = data.get(key) or []
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise RequestError(f"lake.location: {href}: is no STAC; `{key}` must be a list of objects")
    return data


def _stored(href: str) -> bytes:
    from obstore import get
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    folder, _, name = href.rpartition("/")
    try:
        return bytes(get(from_url(folder), name).bytes())
    except BaseError as error:
        raise OSError(str(error).splitlines()[0]) from error


class NoSceneError(Exception):
    """An item has not the assets that make a scene."""


def absolute(href: str, place: str) -> str:
    """A link's path or URL, relative to the document that holds it, in any scheme we know."""
    href = href.removeprefix("file://")
    if is_remote(href):
        return seal(href)
    scheme, mark, path = whole(place).partition("://")
    if mark:  # urljoin does not know s3 and the like
        return seal(scheme + urljoin(f"http://{path}", href).removeprefix("http"))
    return normpath(Path(place).parent / href)


def item_scene(item: Item, keys: Sequence[str], *, with_collection: bool) -> LakeEntry:
    """The scene of an item.

    Its identity is the item's ``updated`` with addresses, checksums and sizes of the assets; without
    ``updated`` and checksums it is that of the files.

    Args:
        keys: of the assets, stacked as bands if several; empty: the one GeoTIFF with the role data.
        with_collection: puts the collection's id in front of the item's.

    Raises:
        NoSceneError: an asset is missing, or no single one is the data.
    """
    assets = _assets(item, keys)
    hrefs = [absolute(asset.href, item.get_self_href() or "") for asset in assets]
    updated = item.common_metadata.updated
    told = [_told(asset, href) for asset, href in zip(assets, hrefs, strict=True)]
    if updated is not None:
        modified = updated if updated.tzinfo else updated.replace(tzinfo=UTC)
        identity: dict[str, Any] = {"updated": modified.isoformat(), "assets": told}
        sizes, times = [a.get("size", 0) for a in told], [modified]
    elif all("checksum" in a for a in told):
        identity, sizes, times = {"assets": told}, [a.get("size", 0) for a in told], []
    else:
        files = [file for href in hrefs for file in _files(href)]
        identity = {"files": files}
        sizes, times = [f.get("size", 0) for f in files], [t for f in files for t in _time(f)]
    place = f"{item.collection_id}/{item.id}" if with_collection and item.collection_id else item.id
    return LakeEntry(
        name=place_name(place, ()),
        uri=hrefs[0] if len(hrefs) == 1 else seal(STACK + SEPARATOR.join(map(whole, hrefs))),
        identity=identity,
        size=sum(int(s or 0) for s in sizes),
        modified=max(times) if times else None,
        files=() if any(map(is_remote, hrefs)) or "files" not in identity else local_files(hrefs),
    )


def _assets(item: Item, keys: Sequence[str]) -> list[Asset]:
    missing = [key for key in keys if key not in item.assets]
    if missing:
        has = ", ".join(item.assets) or "no assets"
        raise NoSceneError(f"item {item.id} has no {', '.join(missing)}; it has {has}")
    if keys:
        return [item.assets[key] for key in keys]
    data = {
        key: asset
        for key, asset in item.assets.items()
        if (asset.media_type or "").lower().startswith("image/tiff") and "data" in (asset.roles or [])
    }
    if len(data) != 1:
        has = ", ".join(data or item.assets) or "no assets"
        raise NoSceneError(
            f"item {item.id} has {len(data)} GeoTIFFs with the role data; valid: keys of its assets ({has})"
        )
    return list(data.values())


def _told(asset: Asset, href: str) -> dict[str, Any]:
    """What an item says of a file; without a signature, which is another one each time."""
    fields = {"checksum": "file:checksum", "size": "file:size"}
    found = {name: asset.extra_fields[key] for name, key in fields.items() if key in asset.extra_fields}
    return {"href": address(href), **found}


def local_files(hrefs: Sequence[str]) -> tuple[str, ...]:
    """The local files of some assets, with their sidecars."""
    return tuple(str(path) for href in hrefs for path in members(Path(href)))


def _files(href: str) -> list[dict[str, Any]]:
    """What tells that a file changes; of one that is not there its address, and opening it will say so."""
    if is_remote(href):
        return input_identity(href, Identity.sampled)
    try:
        told = stamp(local_files([href]))
    except OSError:
        told = []
    names = ("uri", "size", "mtime_ns", "ctime_ns")
    return [dict(zip(names, file, strict=True)) for file in told] or [{"uri": href}]


def _time(file: dict[str, Any]) -> list[datetime]:
    if "mtime_ns" in file:
        return [datetime.fromtimestamp(file["mtime_ns"] / 1e9, UTC)]
    return [datetime.fromisoformat(file["mtime"])] if "mtime" in file else []
