"""The working store: the one place that knows how arrays and receipts lie on disk or in a bucket.

``<out>/.store/<stage>-<key>/<token>/`` is a Zarr v3 group with a stage's arrays and, beside it,
``receipts-<token>/<block>.json``. Data first, receipt last: the receipt is the commit, and a block without
one is computed again. Receipts are compacted into one object when a stage is complete.

A receipt names the files it stands for, with size and checksum, and every small object has a checksum of its
own (`sealed`). So whatever is missing, short, swapped or changed is noticed when it is read, and its receipt
is taken back: the next run computes it again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import zarr
from obstore.store import ObjectStore
from zarr.core.buffer import Buffer

from segpipe.errors import DamagedError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry
from segpipe.store.arrays import ArraySpec, conventions, create_array
from segpipe.store.location import (
    STORE_FOLDER,
    Mark,
    delete_objects,
    hash_object,
    join,
    make_durable,
    open_store,
    read_object,
    sealed,
    unsealed,
)
from segpipe.tiling.windows import Blocks, block_id

WHOLE = "whole"
"""The receipt of a stage that is committed as a whole."""
FILES = "files"
"""Where a receipt names what it commits."""
_log = logging.getLogger(__name__)


Marks = dict[str, tuple[int, str] | None]
"""By path below the stage, size and SHA-256 of each file written; None: only fill, which has no file."""


def stage_key(stage: str, parts: Mapping[str, Any]) -> str:
    """``<stage>-<hash>`` of everything that can change the stage's bits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


@dataclass(frozen=True)
class Generation:
    """A stage between its making and its dropping."""

    token: str
    """Names the folder of its arrays and of its receipts."""
    blocks: Blocks
    """The unit of its shards."""
    whole: bool
    """Whether one receipt, `WHOLE`, stands for all blocks."""


class _MarkingStore(zarr.storage.ObjectStore[ObjectStore]):
    """A Zarr store that remembers size and checksum of what it writes."""

    def __init__(self, store: ObjectStore, *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.marks: dict[str, Mark] = {}

    async def set(self, key: str, value: Buffer) -> None:
        self.marks[key] = Mark.of(value.to_bytes())
        await super().set(key, value)


@dataclass(frozen=True)
class Stage:
    """One stage of one scene. Cheap to pickle; handles open on first use."""

    out: str
    """Output location of the job."""
    key: str

    @cached_property
    def objects(self) -> ObjectStore:
        """The folder of this stage."""
        return open_store(self._location)

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
                f"the stored stage {self.key} is gone (dropped by another run), damaged or of an earlier "
                "version; run the job again"
            )
        parts = (tuple(found["blocks"][name]) for name in ("shape", "block", "absorb"))
        return Generation(found["token"], Blocks(*parts), found["whole"])

    @property
    def _location(self) -> str:
        return join(self.out, STORE_FOLDER, self.key)

    @cached_property
    def _zarr_store(self) -> _MarkingStore:
        return _MarkingStore(open_store(join(self._location, self.generation.token)))

    @cached_property
    def group(self) -> zarr.Group:
        """The Zarr group of this generation; each generation has its own folder."""
        try:
            return zarr.open_group(self._zarr_store, mode="a")
        except zarr.errors.ContainsGroupError:  # another process made it between our look and our making
            return zarr.open_group(self._zarr_store, mode="r+")

    def array(self, name: str) -> zarr.Array[Any]:
        """One of the stage's arrays, for its type and layout: `read` reads it.

        It is opened once by this handle: opening takes longer than a small block.
        """
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
        *,
        whole: bool = False,
    ) -> Blocks:
        """Make the stage's arrays where they are absent; two processes may do so at once.

        Args:
            geometry: of the arrays; None where they lie on a model's grid.
            blocks: the unit of writing.
            arrays: to make.
            attributes: for the stage's record.
            whole: one receipt, `WHOLE`, will stand for all blocks.

        Returns:
            The blocks in force: those of the stage as it is, where somebody else made it.
        """
        layout = {"shape": blocks.shape, "block": blocks.block, "absorb": blocks.absorb}
        where = None if geometry is None else geometry.to_dict()
        record = {"token": secrets.token_hex(8), "blocks": layout, "geometry": where, "whole": whole}
        data = sealed("stage.json", _json({**attributes, **record}))
        try:
            obstore.put(self.objects, "stage.json", data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            if self.read_json("stage.json") is None:  # damaged, or of an earlier version: all begins anew
                obstore.put(self.objects, "stage.json", data)
        for name in ("generation", "group", "_zarr_store", "_receipts", "_arrays", "_marks", "_verified"):
            self.__dict__.pop(name, None)  # from before the stage was there
        if geometry is not None and not self.group.attrs:
            self.group.attrs.update(conventions(geometry, arrays))
        for spec in arrays:
            with suppress(zarr.errors.ContainsArrayError):
                create_array(self.group, spec, geometry, self.generation.blocks)
        return self.generation.blocks

    def write(self, name: str, box: tuple[slice, ...], values: np.ndarray) -> Marks:
        """Write one block of an array; the box must be whole shards (asserted: one shard, one writer).

        Returns:
            What was written, for the receipt.

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
        return self.write_shards(name, (slice(None),) * (array.ndim - len(box)) + box, values)

    def write_shards(self, name: str, where: tuple[int | slice, ...], values: np.ndarray) -> Marks:
        """Write whole shards of an array, where an index has a number for an axis; see `write`."""
        array, token = self.array(name), self.generation.token
        keys = _shard_keys(name, array, where)
        try:
            array[where] = values
        except (ValueError, RuntimeError):  # Zarr reads a shard at the edge first: what lies there is damaged
            delete_objects(self.objects, [f"{token}/{key}" for key in keys])
            array[where] = values
        marks = {f"{token}/{key}": self._zarr_store.marks.pop(key, None) for key in keys}
        return {path: None if mark is None else (mark.size, mark.sha256) for path, mark in marks.items()}

    def read(
        self, name: str, where: tuple[int | slice, ...], commits: Iterable[str] | None = None
    ) -> np.ndarray:
        """Read a part of an array that is committed, after its files were compared with their receipts.

        Args:
            name: of the array.
            where: an index of it, all axes.
            commits: names of the receipts that stand for it; None: of the blocks it lies in, or `WHOLE`.

        Raises:
            DamagedError: files are not as they were committed; their receipts are taken back.
            SceneError: another run dropped the stage meanwhile: what was read may be fill.
        """
        array = self.array(name)
        names = self._commits(array, where) if commits is None else list(commits)
        for key in _shard_keys(name, array, where):
            path = f"{self.generation.token}/{key}"
            if path not in self._verified:
                self._verify(path, names)
        values = np.asarray(array[where])
        self.check()
        return values

    def _commits(self, array: zarr.Array[Any], where: Sequence[int | slice]) -> list[str]:
        if self.generation.whole:
            return [WHOLE]
        blocks = self.generation.blocks
        spans = [
            part.indices(n) for part, n in zip(where, array.shape, strict=True) if isinstance(part, slice)
        ]
        start, stop, _ = zip(*spans[-len(blocks.shape) :], strict=True)
        return [block_id(index) for index in blocks.meeting(Box(start, stop))]

    def _verify(self, path: str, commits: Sequence[str]) -> None:
        """Hold one file against the receipt that names it.

        Raises:
            DamagedError, SceneError: as `read`.
        """
        for name in commits:
            if path not in self._marks:
                self._marks.update((self.receipt(name) or {}).get(FILES, {}))
        if path in self._marks and self._is_as_marked(path, self._marks[path]):
            self._verified.add(path)
            return
        self.check()  # rather say that all of it was dropped
        self._take_back(commits)
        raise DamagedError(
            f"the stored file {join(self._location, path)} is missing or not what was committed; "
            "run the job again, which computes it again"
        )

    def _is_as_marked(self, path: str, mark: tuple[int, str] | None) -> bool:
        try:
            if obstore.head(self.objects, path)["size"] != (mark[0] if mark else None):
                return False
            return mark is not None and hash_object(self.objects, path).sha256 == mark[1]
        except FileNotFoundError:
            return mark is None

    @cached_property
    def _marks(self) -> Marks:
        return {}

    @cached_property
    def _verified(self) -> set[str]:
        """Files that this handle has looked at."""
        return set()

    def scrub(self) -> list[str]:
        """Hold all that is committed against the receipts; take back those of what is damaged.

        Returns:
            The names of receipts that were taken back: what they stood for is to be computed again.
        """
        names = self.done()  # before they are read: another run may commit meanwhile
        receipts = self.receipts()
        damaged = sorted(names - set(receipts))  # those that cannot be read themselves

        def is_good(receipt: Mapping[str, Any]) -> bool:
            marks: Marks = receipt[FILES]
            if good := all(self._is_as_marked(path, mark) for path, mark in marks.items()):
                self._marks.update(marks)
                self._verified.update(marks)
            return good

        with ThreadPoolExecutor(8) as pool:
            good = list(pool.map(is_good, receipts.values()))
        damaged += [name for name, is_kept in zip(receipts, good, strict=True) if not is_kept]
        if damaged:
            _log.warning("%s: damaged in the store, computed again: %s", self.key, ", ".join(damaged))
            self._take_back(damaged)
        return damaged

    def _take_back(self, names: Sequence[str]) -> None:
        """Delete receipts, wherever they are."""
        if compact := self.read_json(f"{self._receipts}.json"):
            kept = {name: receipt for name, receipt in compact.items() if name not in names}
            self.write_json(f"{self._receipts}.json", kept)
        delete_objects(self.objects, [f"{self._receipts}/{name}.json" for name in names])

    def commit(self, name: str, receipt: Mapping[str, Any], files: Marks) -> None:
        """Write a receipt; call it after the data it stands for.

        Args:
            name: of the receipt.
            receipt: what is to be known of the data.
            files: that were written for it.
        """
        make_durable(self._location, [path for path, mark in files.items() if mark is not None])
        self.write_json(f"{self._receipts}/{name}.json", {**receipt, FILES: files})
        self._marks.update(files)
        self._verified.update(files)

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

    def write_part(self, name: str, data: bytes) -> Marks:
        """Write what a block leaves beside its arrays, which is dropped with them; what its receipt names."""
        path = f"parts-{self.generation.token}/{name}"
        self.write_bytes(path, data)
        mark = Mark.of(sealed(path, data))
        return {path: (mark.size, mark.sha256)}

    def read_part(self, name: str) -> bytes:
        """What a block left.

        Raises:
            SceneError: another run dropped the stage.
            DamagedError: it is missing or damaged.
        """
        path = f"parts-{self.generation.token}/{name}"
        data = self.read_bytes(path)
        if data is None:
            self.check()
            raise DamagedError(f"{self._location}/{path}: missing; run the job again")
        return data

    def _loose(self) -> list[str]:
        return sorted(
            meta["path"]
            for chunk in obstore.list(self.objects, self._receipts)
            for meta in chunk
            if meta["path"].endswith(".json")
        )

    def read_json(self, name: str) -> Any:
        """A JSON object of the stage, or None where it is absent or damaged: it is made again then."""
        data = self.read_if_good(name)
        return None if data is None else json.loads(data)

    def read_if_good(self, name: str) -> bytes | None:
        """An object of the stage, or None where it is absent or damaged: it is made again then."""
        try:
            return self.read_bytes(name)
        except DamagedError as error:
            _log.warning("%s; it is made again", error)
            return None

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON object in one step: it is there whole or not at all."""
        self.write_bytes(name, _json(value))

    def read_bytes(self, name: str) -> bytes | None:
        """An object of the stage, or None where it is absent.

        Raises:
            DamagedError: it is not what was written.
        """
        data = read_object(self.objects, name)
        try:
            return None if data is None else unsealed(name, data)
        except DamagedError as error:
            raise DamagedError(f"{self._location}/{error}") from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write an object in one step."""
        obstore.put(self.objects, name, sealed(name, data))


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _shard_keys(name: str, array: zarr.Array[Any], where: Sequence[int | slice]) -> list[str]:
    """Keys of the shards that a part of an array lies in."""
    steps = []
    for part, shard, size in zip(where, array.shards or array.chunks, array.shape, strict=True):
        start, stop, _ = part.indices(size) if isinstance(part, slice) else (part, part + 1, 1)
        steps.append(range(start // shard, -(-stop // shard)))
    return ["/".join((name, "c", *map(str, index))) for index in product(*steps)]
