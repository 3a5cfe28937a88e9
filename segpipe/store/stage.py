"""The working store: the one place that knows how arrays and receipts lie on disk or in a bucket.

``<out>/.store/<stage>-<key>/<token>/`` is a Zarr v3 group with a stage's arrays and, beside it,
``receipts-<token>/<block>.json`` (`segpipe.store.receipts`). Receipts are compacted into one object when a
stage is complete.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import obstore
import zarr
from obstore.store import ObjectStore
from zarr.core.buffer import Buffer

from segpipe.errors import DamagedError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry
from segpipe.store.arrays import ArraySpec, conventions, create_array
from segpipe.store.location import Mark, delete_objects, join, open_store, sealed, told_when_full
from segpipe.store.receipts import FILES, Marks, Receipts, to_json
from segpipe.tiling.windows import Blocks, block_id

WHOLE = "whole"
"""The receipt of a stage that is committed as a whole."""


def stage_key(stage: str, parts: Mapping[str, Any]) -> str:
    """``<stage>-<hash>`` of everything that can change the stage's bits."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:20]}"


class _MarkingStore(zarr.storage.ObjectStore[ObjectStore]):
    """A Zarr store that remembers size and checksum of what it writes."""

    def __init__(self, store: ObjectStore, *, read_only: bool = False) -> None:
        super().__init__(store, read_only=read_only)
        self.marks: dict[str, Mark] = {}

    async def set(self, key: str, value: Buffer) -> None:
        self.marks[key] = Mark.of(value.to_bytes())
        await super().set(key, value)


@dataclass(frozen=True)
class Stage(Receipts):
    """One stage of one scene. Cheap to pickle; handles open on first use."""

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
        data = sealed("stage.json", to_json({**attributes, **record}))
        try:
            with told_when_full(self.out):
                obstore.put(self.objects, "stage.json", data, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            if self.read_json("stage.json") is None:  # damaged, or of an earlier version: all begins anew
                obstore.put(self.objects, "stage.json", data)
        for name in ("generation", "group", "_zarr_store", "_receipts", "_arrays", "_marks", "_verified"):
            self.__dict__.pop(name, None)  # from before the stage was there
        with told_when_full(self.out):
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
            SceneError: another run dropped the stage.
        """
        self.check()
        array = self.array(name)
        shards = (array.shards or array.chunks)[-len(box) :]
        extent = array.shape[-len(box) :]
        for part, shard, size in zip(box, shards, extent, strict=True):
            assert part.start % shard == 0, f"{name}: {part} does not begin at a shard of {shard}"
            assert part.stop % shard == 0 or part.stop == size, f"{name}: {part} ends inside a shard"
        return self.write_shards(name, (slice(None),) * (array.ndim - len(box)) + box, values)

    def write_shards(self, name: str, where: tuple[int | slice, ...], values: np.ndarray) -> Marks:
        """Write whole shards of an array, where an index has a number for an axis; see `write`.

        Raises:
            FullError: the disk is full.
        """
        array, token = self.array(name), self.generation.token
        keys = _shard_keys(name, array, where)
        with told_when_full(self.out):
            try:
                array[where] = values
            except (
                ValueError,
                RuntimeError,
            ):  # Zarr reads a shard at the edge first: what is there is damaged
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
        try:
            array = self.array(name)
            names = self._commits(array, where) if commits is None else list(commits)
            for key in _shard_keys(name, array, where):
                path = f"{self.generation.token}/{key}"
                if path not in self._verified:
                    self._verify(path, names)
            return np.asarray(array[where])
        finally:  # also of an error: arrays and shards may vanish while they are read
            self.check()

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


def _shard_keys(name: str, array: zarr.Array[Any], where: Sequence[int | slice]) -> list[str]:
    """Keys of the shards that a part of an array lies in."""
    steps = []
    for part, shard, size in zip(where, array.shards or array.chunks, array.shape, strict=True):
        start, stop, _ = part.indices(size) if isinstance(part, slice) else (part, part + 1, 1)
        steps.append(range(start // shard, -(-stop // shard)))
    return ["/".join((name, "c", *map(str, index))) for index in product(*steps)]
