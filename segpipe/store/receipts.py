"""The receipts of a stage: what is committed, with sizes and checksums of the files that it stands for.

Data first, receipt last: the receipt is the commit, and a block without one is computed again. A receipt
names the files it stands for, and every small object has a checksum of its own (`sealed`). So whatever is
missing, short, swapped or changed is noticed when it is read, and its receipt is taken back: the next run
computes it again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import obstore
from obstore.store import ObjectStore

from segpipe.errors import DamagedError, SceneError
from segpipe.store.location import (
    STORE_FOLDER,
    delete_objects,
    hash_object,
    is_url,
    join,
    make_durable,
    open_store,
    read_object,
    sealed,
    sweep_drafts,
    told_when_full,
    unsealed,
)
from segpipe.tiling.windows import Blocks

FILES = "files"
"""Where a receipt names what it commits."""
_log = logging.getLogger(__name__)


Marks = dict[str, tuple[int, str] | None]
"""By path below the stage, size and SHA-256 of each file written; None: only fill, which has no file."""


@dataclass(frozen=True)
class Generation:
    """A stage between its making and its dropping."""

    token: str
    """Names the folder of its arrays and of its receipts."""
    blocks: Blocks
    """The unit of its shards."""
    whole: bool
    """Whether one receipt, `WHOLE`, stands for all blocks."""


@dataclass(frozen=True)
class Receipts:
    """The folder of a stage of one scene: its record, its receipts and its small objects."""

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

    def scrub(self, *, repair: bool = True) -> list[str]:
        """Hold all that is committed against the receipts.

        Args:
            repair: take back the receipts of what is damaged, so that it is computed again.

        Returns:
            The names of these receipts.
        """
        if not is_url(self.out):
            sweep_drafts(Path(self._location), "**/*#*")
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
        if damaged and repair:
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

        Raises:
            SceneError: another run dropped the stage meanwhile; one that was never made has no generation.
        """
        if "generation" in self.__dict__:
            self.check()
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
        self.write_bytes(name, to_json(value))

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
        """Write an object in one step.

        Raises:
            FullError: the disk is full.
        """
        with told_when_full(self.out):
            obstore.put(self.objects, name, sealed(name, data))


def to_json(value: Any) -> bytes:
    """The shortest JSON of a value, its keys in order."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
