"""A STAC item as a scene: what is opened, its name, and what tells that it is another one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from os.path import normpath
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from pystac import Asset, Item

from segpipe.lake.entry import LakeEntry
from segpipe.lake.naming import place_name
from segpipe.sources.remote import is_remote, public_uri, remote_identity
from segpipe.sources.stack import SEPARATOR, STACK


class NoSceneError(Exception):
    """An item has not the assets that make a scene."""


def absolute(href: str, place: str) -> str:
    """A link's path or URL, relative to the document that holds it, in any scheme we know."""
    href = href.removeprefix("file://")
    if is_remote(href):
        return href
    scheme, mark, path = place.partition("://")
    if mark:  # urljoin does not know s3 and the like
        return scheme + urljoin(f"http://{path}", href).removeprefix("http")
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
        files = [_file(href) for href in hrefs]
        identity = {"files": files}
        sizes, times = [f.get("size", 0) for f in files], [t for f in files for t in _time(f)]
    place = f"{item.collection_id}/{item.id}" if with_collection and item.collection_id else item.id
    return LakeEntry(
        name=place_name(place, ()),
        uri=hrefs[0] if len(hrefs) == 1 else STACK + SEPARATOR.join(hrefs),
        identity=identity,
        size=sum(int(s or 0) for s in sizes),
        modified=max(times) if times else None,
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
    return {"href": public_uri(href), **found}


def _file(href: str) -> dict[str, Any]:
    """Identity of a file; of one that is not there its address, and opening it will say so."""
    if is_remote(href):
        return remote_identity(href)[0]
    try:
        status = Path(href).stat()
    except OSError:
        return {"uri": href}
    return {"uri": href, "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _time(file: dict[str, Any]) -> list[datetime]:
    if "mtime_ns" in file:
        return [datetime.fromtimestamp(file["mtime_ns"] / 1e9, UTC)]
    return [datetime.fromisoformat(file["mtime"])] if "mtime" in file else []
