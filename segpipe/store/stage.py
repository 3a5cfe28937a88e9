"""The working store: the one place that knows how arrays and receipts lie on disk or in a bucket.

``<out>/.store/<stage>-<key>/<token>/`` is a Zarr v3 group with a stage's arrays and, beside it,
``receipts-<token>/<block>.json``. Data first, receipt last: the receipt is the commit, and a block without
one is computed again. Receipts are compacted into one object when a stage is complete.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import zarr
from obstore.store import ObjectStore
from zarr.codecs import BloscCodec, ZstdCodec

from segpipe.errors import SceneError, StoppedError
from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry
from segpipe.store.location import delete_objects, join, open_store, read_object
from segpipe.tiling.windows import Blocks

STORE_FOLDER = ".store"
IMAGE_CODEC = BloscCodec(cname="lz4", shuffle="shuffle")
LABEL_CODEC = ZstdCodec(level=5)


def stage_key(stage: str, parts: Mapping[str, Any]) -> str:
    """``<stage>-<hash>`` of everything that can change the stage's bits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


@dataclass(frozen=True)
class ArraySpec:
    """An array of a stage."""

    name: str
    dtype: str
    fill: float | int | bool
    channels: int = 0
    """Leading channel axis; 0: none."""
    labels: bool = False
    """Labels compress with zstd, everything else with blosc-lz4 and shuffle."""


@dataclass(frozen=True)
class Generation:
    """A stage between its making and its dropping."""

    token: str
    """Names the folder of its arrays and of its receipts."""
    blocks: Blocks
    """The unit of its shards."""


@dataclass(frozen=True)
class Stage:
    """One stage of one scene. Cheap to pickle; handles open on first use."""

    out: str
    """Output location of the job."""
    key: str

    @cached_property
    def objects(self) -> ObjectStore:
        """The folder of this stage."""
        return open_store(join(self.out, STORE_FOLDER, self.key))

    def __getstate__(self) -> dict[str, Any]:
        return {"out": self.out, "key": self.key}

    @cached_property
    def generation(self) -> Generation:
        """The stage as it was made, read once by this handle.

        Raises:
            SceneError: it is not there (any more).
        """
        found = self.read_json("stage.json")
        if found is None:
            raise SceneError(
                f"the stored stage {self.key} is gone (dropped by another run); run the job again"
            )
        parts = (tuple(found["blocks"][name]) for name in ("shape", "block", "absorb"))
        return Generation(found["token"], Blocks(*parts))

    @cached_property
    def group(self) -> zarr.Group:
        """The Zarr group of this generation; each generation has its own folder."""
        location = join(self.out, STORE_FOLDER, self.key, self.generation.token)
        store = zarr.storage.ObjectStore(open_store(location))
        try:
            return zarr.open_group(store, mode="a")
        except zarr.errors.ContainsGroupError:  # another process made it between our look and our making
            return zarr.open_group(store, mode="r+")

    def array(self, name: str) -> zarr.Array[Any]:
        """One of the stage's arrays, opened once by this handle: opening takes longer than a small block."""
        if name not in self._arrays:
            found = self.group[name]
            assert isinstance(found, zarr.Array)
            self._arrays[name] = found
        return self._arrays[name]

    @cached_property
    def _arrays(self) -> dict[str, zarr.Array[Any]]:
        return {}

    @property
    def exists(self) -> bool:
        """Whether the stage was created and not dropped since."""
        return self.read_json("stage.json") is not None

    @property
    def current(self) -> bool:
        """Whether the generation of this handle is still the one in force: asked after a read.

        A stage that another run drops reads as fill, without an error.
        """
        found = self.read_json("stage.json")
        return found is not None and found["token"] == self.generation.token

    def check(self) -> None:
        """Raises SceneError: what was read may be fill, or what was written is lost."""
        if not self.current:
            raise SceneError(f"the stored stage {self.key} was dropped by another run; run the job again")

    def create(
        self,
        geometry: Geometry | None,
        blocks: Blocks,
        arrays: Sequence[ArraySpec],
        attributes: Mapping[str, Any],
    ) -> Blocks:
        """Make the stage's arrays where they are absent; two processes may do so at once.

        Args:
            geometry: of the arrays; None where they lie on a model's grid.
            blocks: the unit of writing.
            arrays: to make.
            attributes: for the stage's record.

        Returns:
            The blocks in force: those of the stage as it is, where somebody else made it.
        """
        layout = {"shape": blocks.shape, "block": blocks.block, "absorb": blocks.absorb}
        where = None if geometry is None else geometry.to_dict()
        record = {"token": secrets.token_hex(8), "blocks": layout, "geometry": where}
        with suppress(obstore.exceptions.AlreadyExistsError):
            obstore.put(self.objects, "stage.json", _json({**attributes, **record}), mode="create")
        for name in ("generation", "group", "_receipts", "_arrays"):
            self.__dict__.pop(name, None)  # from before the stage was there
        if geometry is not None and not self.group.attrs:
            self.group.attrs.update(_conventions(geometry, arrays))
        for spec in arrays:
            with suppress(zarr.errors.ContainsArrayError):
                _create_array(self.group, spec, geometry, self.generation.blocks)
        return self.generation.blocks

    def write(self, name: str, box: tuple[slice, ...], values: np.ndarray) -> None:
        """Write one block of an array; the box must be whole shards (asserted: one shard, one writer).

        Raises:
            KeyError: another run dropped the stage.
        """
        if not self.current:
            raise KeyError(f"{self.key} was dropped")
        array = self.array(name)
        shards = (array.shards or array.chunks)[-len(box) :]
        extent = array.shape[-len(box) :]
        for part, shard, size in zip(box, shards, extent, strict=True):
            assert part.start % shard == 0, f"{name}: {part} does not begin at a shard of {shard}"
            assert part.stop % shard == 0 or part.stop == size, f"{name}: {part} ends inside a shard"
        where: tuple[Any, ...] = (Ellipsis, *box)
        array[where] = values

    def commit(self, name: str, receipt: Mapping[str, Any]) -> None:
        """Write a receipt; call it after the data it stands for."""
        self.write_json(f"{self._receipts}/{name}.json", receipt)

    @cached_property
    def _receipts(self) -> str:
        """Receipts lie under the generation's token: a late one of a dropped stage is never believed."""
        return f"receipts-{self.generation.token if self.exists else '0'}"

    def receipts(self) -> dict[str, dict[str, Any]]:
        """All receipts by name, compacted and loose.

        Loose ones first: what another run compacts meanwhile is then found in the compacted object.
        """
        names = self._loose()
        with ThreadPoolExecutor(8) as pool:
            read = dict(zip(names, pool.map(self.read_json, names), strict=True))
        loose = {Path(name).stem: receipt for name, receipt in read.items() if receipt is not None}
        compact = self.read_json(f"{self._receipts}.json") or {}
        return dict(sorted({**compact, **loose}.items()))

    def receipt(self, name: str) -> dict[str, Any] | None:
        """One receipt, loose or compacted, or None where it is absent."""
        found: dict[str, Any] | None = self.read_json(f"{self._receipts}/{name}.json")
        if found is None:
            found = (self.read_json(f"{self._receipts}.json") or {}).get(name)
        return found

    def done(self) -> set[str]:
        """Names of committed receipts, without reading the loose ones."""
        loose = {Path(name).stem for name in self._loose()}
        return loose | set(self.read_json(f"{self._receipts}.json") or {})

    def compact(self) -> None:
        """Put all receipts into one object: ten thousand small ones are slow to list."""
        loose = self._loose()
        if loose:
            self.write_json(f"{self._receipts}.json", self.receipts())
            delete_objects(self.objects, loose)

    def drop(self) -> None:
        """Remove this generation; its record first, so that a half-removed stage is never believed."""
        if not self.exists or not self.current:
            return
        token = self.generation.token
        delete_objects(self.objects, ["stage.json"])
        for prefix in (token, f"receipts-{token}", f"parts-{token}"):
            listed = obstore.list(self.objects, prefix)
            delete_objects(self.objects, [meta["path"] for chunk in listed for meta in chunk])
        delete_objects(self.objects, [f"receipts-{token}.json"])

    def write_part(self, name: str, data: bytes) -> None:
        """Write what a block leaves beside its arrays; dropped with them."""
        self.write_bytes(f"parts-{self.generation.token}/{name}", data)

    def read_part(self, name: str) -> bytes:
        """What a block left.

        Raises:
            SceneError: another run dropped the stage.
        """
        data = self.read_bytes(f"parts-{self.generation.token}/{name}")
        if data is None:
            raise SceneError(f"the stored stage {self.key} was dropped by another run; run the job again")
        return data

    def find_part(self, name: str) -> bytes | None:
        """What a block left, or None where it left nothing of this name."""
        return self.read_bytes(f"parts-{self.generation.token}/{name}")

    def _loose(self) -> list[str]:
        return sorted(
            meta["path"]
            for chunk in obstore.list(self.objects, self._receipts)
            for meta in chunk
            if meta["path"].endswith(".json")
        )

    def read_json(self, name: str) -> Any:
        """A JSON object of the stage, or None where it is absent."""
        data = self.read_bytes(name)
        return None if data is None else json.loads(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON object in one step: it is there whole or not at all."""
        obstore.put(self.objects, name, _json(value))

    def read_bytes(self, name: str) -> bytes | None:
        """An object of the stage, or None where it is absent."""
        return read_object(self.objects, name)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write an object in one step."""
        obstore.put(self.objects, name, data)


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _create_array(group: zarr.Group, spec: ArraySpec, geometry: Geometry | None, blocks: Blocks) -> None:
    lead = (spec.channels,) if spec.channels else ()
    names = ("channel",) if spec.channels else ()
    array = group.create_array(
        spec.name,
        shape=lead + blocks.shape,
        shards=lead + blocks.block,
        chunks=lead + blocks.chunk,
        dtype=spec.dtype,
        fill_value=spec.fill,
        compressors=LABEL_CODEC if spec.labels else IMAGE_CODEC,
        dimension_names=names + ("z", "y", "x")[-len(blocks.shape) :],
    )
    if isinstance(geometry, RasterGeometry):
        array.attrs["grid_mapping"] = "spatial_ref"


def _conventions(geometry: Geometry, arrays: Iterable[ArraySpec]) -> Mapping[str, Any]:
    """Group attributes that other tools read: CF grid mapping for rasters, OME-Zarr for volumes."""
    if isinstance(geometry, RasterGeometry):
        a, b, c, d, e, f = geometry.transform
        mapping = {"GeoTransform": f"{c!r} {a!r} {b!r} {f!r} {d!r} {e!r}"}
        if geometry.crs is not None:
            mapping["crs_wkt"] = geometry.crs
        return {"segpipe:geometry": geometry.to_dict(), "spatial_ref": mapping}
    assert isinstance(geometry, VolumeGeometry)
    scale = list(geometry.spacing)
    axes = [{"name": n, "type": "space", "unit": "millimeter"} for n in ("z", "y", "x")]
    multiscales = []
    for spec in arrays:
        lead = [{"name": "c", "type": "channel"}] if spec.channels else []
        factors = [1.0] * len(lead) + scale
        transform = [{"type": "scale", "scale": factors}]
        datasets = [{"path": spec.name, "coordinateTransformations": transform}]
        multiscales.append({"name": spec.name, "axes": lead + axes, "datasets": datasets})
    return {
        "segpipe:geometry": geometry.to_dict(),
        "ome": {"version": "0.5", "multiscales": multiscales},
    }


@lru_cache(maxsize=16)
def _stops(out: str) -> ObjectStore:
    """The folder of requests to stop; it is looked at before every block, so the client is kept."""
    return open_store(join(out, STORE_FOLDER, "stop"))


@dataclass(frozen=True)
class StopToken:
    """The name under which the workers of one run are asked to stop. Small and picklable."""

    out: str
    """Output location of the job."""
    name: str
    """Of one attempt at one run: a retry has another."""

    def request(self) -> None:
        """Ask every worker to stop before its next block."""
        obstore.put(_stops(self.out), self.name, b"")

    def forget(self) -> None:
        """Take the request back: a flow run that was suspended goes on under the same name."""
        delete_objects(_stops(self.out), [self.name])

    @property
    def requested(self) -> bool:
        """Whether somebody asked the run to stop."""
        try:
            obstore.head(_stops(self.out), self.name)
        except FileNotFoundError:
            return False
        return True

    def check(self) -> None:
        """Raises StoppedError where somebody asked the run to stop; what is committed stays."""
        if self.requested:
            raise StoppedError("the run was asked to stop; run it again to resume")
