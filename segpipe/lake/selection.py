"""Which scenes of a lake one scan does: new, settled, nobody else's, within the limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from segpipe.config.card import Card
from segpipe.config.job import Job, parse_memory
from segpipe.config.scan import LakeKind, Scan
from segpipe.errors import RequestError, SceneError
from segpipe.inference.settings import Settings
from segpipe.lake.entry import LakeEntry
from segpipe.lake.files import wanted
from segpipe.lake.lease import Holder
from segpipe.lake.ledger import Known, Ledger
from segpipe.lake.listing import list_lake
from segpipe.redact import seal, whole
from segpipe.report.markdown import plain_text
from segpipe.runs.check import ResolvedJob, check_job, check_network, fingerprint
from segpipe.sources.base import SceneRef
from segpipe.sources.remote import is_remote, remote_identity
from segpipe.store.location import check_writable, is_url
from segpipe.store.stop import Fence
from segpipe.tables.units import byte_size

SHOWN = 5
"""Scenes that are too large, by name."""
SHORT = 6
"""Digits of the digest behind a name that another scene of the scan has."""
WORDS = {
    "new": "new",
    "done": "done before",
    "quarantine": "in quarantine",
    "settling": "still settling",
    "earlier": "done by an earlier version, which kept no identity of their files, and done again",
    "taken": "in another scan",
    "large": "too large",
}
"""What a scan says of the scenes it saw, in this order."""


@dataclass(frozen=True)
class ScanRequest:
    """A scan that can run."""

    scan: Scan
    resolved: ResolvedJob
    """The job of its scenes, which are listed by where they are: the lake's location."""
    ledger: Ledger


def check_scan(scan: Scan) -> ScanRequest:
    """Refuse, now, whatever can be known to be wrong with a scan.

    Raises:
        RequestError: naming the field, what was found and what would be valid.
    """
    if scan.measure.groups:
        raise RequestError("measure.groups: a scan's scenes are not known before; valid: leave it out")
    _check_apart(scan)
    job = scan.job([scan.lake.location])
    resolved = check_job(job)
    check_network(resolved)
    check_writable(job.outputs.dir)
    ledger = Ledger(job.outputs.dir, f"{scan.name}-{_mark(scan, resolved.card)}")
    return ScanRequest(scan, resolved, ledger)


def _check_apart(scan: Scan) -> None:
    """Raises RequestError: the lake would take what scans write for new scenes."""
    if scan.lake.kind is not LakeKind.files:
        return
    what = wanted(scan.lake)
    base, out = (
        place.rstrip("/") if is_url(place) else str(Path(place or ".").expanduser().absolute())
        for place in (what.base, scan.outputs.dir)
    )
    for name in ("labels.tif", "labels.nii.gz"):
        made = f"{out}/{scan.name}/run/scenes/scene/{name}"
        if made.startswith(f"{base}/") and what.takes(made.removeprefix(f"{base}/")):
            raise RequestError(
                f"outputs.dir: {scan.outputs.dir} lies in the lake {scan.lake.location}, where results would "
                "be taken for scenes; valid: a place outside, or a lake.pattern that leaves it out"
            )


def _mark(scan: Scan, card: Card | None) -> str:
    """Fingerprint of what is done with a scene: wherever it is done, and whatever lake it comes from."""
    asked = scan.job(["any"]).model_dump()
    asked["compute"] |= {"device": "auto", "threads": "auto", "batch": "auto"}
    job = Job.model_validate({**asked, "description": ""})
    return fingerprint(job, card, Settings("", "", "", 0, 0, False), [])


@dataclass
class Looked:
    """What a scan saw so far."""

    counts: Counter[str] = field(default_factory=Counter)
    """By the keys of `WORDS`."""
    size: int = 0
    """Bytes of the new ones."""
    limit: str = ""
    """The limit that ended the scan, and more may wait; empty: everything was seen."""
    large: list[str] = field(default_factory=list)
    """Names and sizes of the first scenes that are too large."""

    def __str__(self) -> str:
        told = [f"{self.counts[key]:,} {words}" for key, words in WORDS.items() if self.counts[key]]
        if self.large:
            more = f" and {self.counts['large'] - SHOWN} more" if self.counts["large"] > SHOWN else ""
            told[-1] = f"{told[-1]} for limits.size ({', '.join(self.large)}{more})"
        return ", ".join(told or ["no scenes"]) + (f"; {self.limit}, more may wait" if self.limit else "")


def new_scenes(
    scan: Scan, known: Known, looked: Looked, spent: Callable[[], float] = lambda: 0.0
) -> Iterator[LakeEntry]:
    """The scenes that no receipt stands for, as the lake lists them; leases are the caller's.

    Those that were tried before come last, by their tries; the suspects, at which a process died, behind
    them.

    Args:
        looked: counts what is seen.
        spent: seconds of devices' work so far.
    """
    tried: list[LakeEntry] = []
    for found in _unknown(scan, known, looked, tried):
        if _ends(scan, found, looked, spent):
            return
        yield found
    for found in sorted(tried, key=lambda f: (f.suspect, f.tries)):
        if _ends(scan, found, looked, spent):
            return
        yield found


def _unknown(scan: Scan, known: Known, looked: Looked, tried: list[LakeEntry]) -> Iterator[LakeEntry]:
    """Scenes of which the ledger knows nothing; those that were tried go on a list instead."""
    size = parse_memory(scan.limits.size)
    settled = datetime.now(UTC).timestamp() - scan.lake.settle_seconds
    for found in list_lake(scan.lake):
        state = known.state(found.digest)
        if state is None and found.modified is not None and found.modified.timestamp() > settled:
            state = "settling"
        if state is None and found.size > size:
            state = "large"
            looked.large += [f"{found.name}: {byte_size(found.size)}"] if len(looked.large) < SHOWN else []
        if state is not None:
            looked.counts[state] += 1
            continue
        if found.earlier and known.state(found.digest_of(found.earlier)) == "done":
            looked.counts["earlier"] += 1
        found = known.tried(found)
        if found.tries:
            tried.append(found)
        else:
            yield found


def _ends(scan: Scan, found: LakeEntry, looked: Looked, spent: Callable[[], float]) -> bool:
    """Whether a limit is reached before a scene; else it is counted."""
    most, size, minutes = scan.limits.scenes, parse_memory(scan.limits.size), scan.limits.device_minutes
    for reached, what in (
        (looked.counts["new"] >= most, f"limits.scenes of {most} reached"),
        (looked.size + found.size > size, f"limits.size of {scan.limits.size} reached"),
        (minutes and spent() >= 60 * minutes, f"limits.device_minutes of {minutes:g} reached"),
    ):
        if reached:
            looked.limit = what
            return True
    looked.counts["new"] += 1
    looked.size += found.size
    return False


def take_scenes(
    scan: Scan,
    ledger: Ledger,
    holder: Holder,
    founds: Iterator[LakeEntry],
    known: Known,
    looked: Looked,
    run: Fence,
) -> Iterator[LakeEntry]:
    """Of new scenes those that this scan has leased; each is done once though two scans overlap.

    Args:
        run: proves that the scan's run is still its own.
    """
    how = scan.job(["any"]).identity
    for found in founds:
        if not holder.take(found.digest):
            _not_ours(looked, found, "taken")
            continue
        if ledger.is_done(found.digest):  # by another scan, since the ledger was read
            holder.give_back(found.digest)
            _not_ours(looked, found, "done")
            continue
        fences = (holder.fence(found.digest, ledger.location), run)
        found = replace(found, fences=fences)
        with suppress(SceneError):  # it has gone: opening it will say so
            same = found.digest_of(found.identity_of(how))
            found = replace(found, same="" if same == found.digest else same)
        if found.same and (known.state(found.same) == "done" or ledger.is_done(found.same)):
            ledger.alias(found, found.same)
            holder.give_back(found.digest)
            _not_ours(looked, found, "done")
            continue
        yield found


def _not_ours(looked: Looked, found: LakeEntry, state: str) -> None:
    looked.counts["new"] -= 1
    looked.counts[state] += 1
    looked.size -= found.size


class Names:
    """Names of a run's scenes: a second scene of a name gets a part of its digest."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = {name.casefold() for name in taken}

    def ref(self, found: LakeEntry) -> SceneRef:
        """The scene under a name of its own."""
        name = found.name
        if name.casefold() in self._taken:
            name = f"{name}-{found.digest[:SHORT]}"
        self._taken.add(name.casefold())
        return SceneRef(name, found.uri)


def may_pass(found: LakeEntry) -> bool:
    """Whether a scene that failed may do better another time: it has gone, or its store does not answer.

    What cannot be read though it is there is damaged.
    """
    uris = whole(found.uri).removeprefix("stack:").split("|")
    parts = [seal(uri.partition("#")[0]) for uri in uris]
    return any(
        remote_identity(part)[1] is not None if is_remote(part) else not Path(part).exists() for part in parts
    )


def dry_run_markdown(scan: Scan, looked: Looked, shown: Sequence[LakeEntry]) -> str:
    """What a dry run says in the UI: the counts, and the first new scenes."""
    lines = [f"# {plain_text(scan.name)}: what a scan would do", "", f"{plain_text(str(looked))}.", ""]
    if shown:
        lines += [f"{byte_size(looked.size)} to read.", "", "| Scene | Size | Where |", "| --- | --- | --- |"]
        for found in shown:
            size = byte_size(found.size) if found.size else ""
            lines.append(f"| {plain_text(found.name)} | {size} | {plain_text(found.uri)} |")
    if looked.counts["new"] > len(shown):
        lines += ["", f"and {looked.counts['new'] - len(shown):,} more"]
    return "\n".join(lines)
