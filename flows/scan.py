"""The scan flow: what is new in a lake is done, each scene once, in one run with one report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import chain
from typing import Any
from uuid import UUID

from prefect import State, flow, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.states import Cancelled, Completed, Failed
from prefect.task_runners import TaskRunner

from segpipe.config.scan import Scan
from segpipe.errors import LeaseLostError, StoppedError
from segpipe.export.run_folder import RunFolder, now
from segpipe.export.scene_files import failed_record
from segpipe.lake.entry import LakeEntry
from segpipe.lake.lease import Holder
from segpipe.lake.ledger import Receipts
from segpipe.lake.selection import (
    Looked,
    Names,
    ScanRequest,
    check_scan,
    dry_run_markdown,
    may_pass,
    new_scenes,
    take_scenes,
)
from segpipe.redact import scrubbed
from segpipe.sources import SceneRef
from segpipe.store.stop import StopToken
from segpipe.tables.record import SceneRecord
from segpipe_flows.dispatch import Dispatch
from segpipe_flows.here import request_of
from segpipe_flows.packs import Packs
from segpipe_flows.runners import check_cluster, task_runner
from segpipe_flows.segment import OF_REQUEST, attempt_name, stop_on_error
from segpipe_flows.watch import Watch
from segpipe_tasks.events import tell_scene
from segpipe_tasks.report import write_report
from segpipe_tasks.told import EXPECTED, refused

SHOWN = 50
"""New scenes listed by a dry run."""
FAILURES_TOLD = 5


@flow(name="scan", **OF_REQUEST)
def scan(scan: Scan) -> State[Any]:
    """Do what is new in a lake: every scene once, whenever and however often this runs.

    Lists the lake, leaves out what is done, in quarantine, still settling or at work in another scan, and
    segments, measures and reports the rest. A scene that cannot be done goes into quarantine with the
    reason. A scan that was stopped or killed is taken on by the next one, in the same run.

    Args:
        scan: Which lake, which model, how much at once. Required: lake and model.
    """
    try:
        scan = request_of(Scan, scan, "scan")
        request = check_scan(scan)
        if scan.dry_run:
            return _dry_run(request)
        runner = task_runner(scan.compute)
        check_cluster(scan.compute, request.resolved.settings)
        return _Scanning(request, UUID(runtime.flow_run.get_id())).go(runner)
    except LeaseLostError as error:
        return Cancelled(message=f"another scan goes on with this one's work: {error}")
    except (StoppedError, KeyboardInterrupt):
        return Cancelled(message="stopped; what is done stays, the next scan goes on from there")
    except EXPECTED as error:
        return refused(error)


def _dry_run(request: ScanRequest) -> State[Any]:
    """Say what would be done."""
    looked = Looked()
    shown: list[LakeEntry] = []
    with request.ledger.known() as known:
        for found in new_scenes(request.scan, known, looked):
            shown += [found] if len(shown) < SHOWN else []
    create_markdown_artifact(
        dry_run_markdown(request.scan, looked, shown),
        key=f"{request.scan.name.lower().replace('_', '-').replace('.', '-')}-dry-run",
        description=f"What a scan of {request.scan.lake.location} would do",
    )
    return Completed(message=f"dry run: {looked}; nothing was done")


@dataclass
class _Scanning:
    """One scan at work."""

    request: ScanRequest
    run_id: UUID
    """Of the flow run: a retry has it too, and so its leases and its run."""
    looked: Looked = field(default_factory=Looked)
    founds: dict[str, LakeEntry] = field(default_factory=dict)
    """Scenes at work, by name."""
    records: dict[str, SceneRecord] = field(default_factory=dict)
    suspects: list[SceneRef] = field(default_factory=list)
    """Scenes at which a process died: each is tried alone, when all others have ended."""
    seconds: float = 0.0
    """Of devices' work."""

    @scrubbed()
    def go(self, runner: TaskRunner[Any]) -> State[Any]:
        """From the listing to the report."""
        scan, ledger = self.request.scan, self.request.ledger
        with Holder(ledger.objects, str(self.run_id), scan.lease_seconds).alive() as holder:
            run = self._run(holder)
            self.records = {record.name: record for record in ledger.records(run.name)}
            token = StopToken(scan.outputs.dir, attempt_name(self.run_id, runtime.flow_run.get_run_count()))
            with self._forgiven(), runner, stop_on_error(token) as stop, ledger.known() as known:
                watch = Watch(self.run_id, None)
                dispatch = Dispatch(self.request.resolved, run, stop, runner, watch, self._begun)
                new = new_scenes(scan, known, self.looked, lambda: self.seconds)
                assert run.fence is not None
                taken = take_scenes(scan, ledger, holder, new, known, self.looked, run.fence)
                packs = Packs(dispatch, partial(self._receipts, run))
                for record in chain(packs.scenes(self._refs(taken, run)), self._alone(dispatch, run)):
                    watch.end(record)
                    if self._settle(record, run, holder):
                        tell_scene(run, record)
                watch.close()
                get_run_logger().info("%s: %s", scan.lake.location, self.looked)
                if not self.records:
                    return Completed(message=f"nothing to do: {self.looked}")
                records = sorted(self.records.values(), key=lambda r: r.name)
                parameters = {"run": run, "resolved": self.request.resolved, "scenes": records}
                runner.submit(write_report, parameters).result()
            run.check()
            ledger.end_run(run.name)
            return self._end(run)

    def _run(self, holder: Holder) -> RunFolder:
        """The run of this scan: one that was left, by another scan or by this one before; else a new one."""
        out, job, ledger = self.request.scan.outputs.dir, self.request.scan.name, self.request.ledger
        for name in ledger.open_runs():
            if holder.take(f"run-{name}"):
                get_run_logger().info("going on with run %s, which was left", name)
                fence = holder.fence(f"run-{name}", ledger.location)
                return RunFolder(out, job, name, ledger.started(name), fence)
        started = now()
        stamp = datetime.fromisoformat(started).strftime("%Y%m%d-%H%M%S")
        run = RunFolder(out, job, f"{stamp}-{str(self.run_id)[:8]}", started)
        holder.take(f"run-{run.name}")
        return replace(run, fence=holder.fence(f"run-{run.name}", ledger.location))

    def _refs(self, founds: Iterator[LakeEntry], run: RunFolder) -> Iterator[SceneRef]:
        """The scenes under names of their own, without suspects; the run is begun with the first one."""
        names = Names({record.name for record in self.records.values() if record.state == "done"})
        for found in founds:
            if not self.founds and not self.records:
                self.request.ledger.begin_run(run.name, run.started)
            ref = names.ref(found)
            self.founds[ref.name] = found
            if found.suspect:
                self.suspects.append(ref)
            else:
                yield ref

    def _alone(self, dispatch: Dispatch, run: RunFolder) -> Iterator[SceneRecord]:
        """The suspects, one after the other; one that had all its tries is not tried again."""
        for ref in self.suspects:
            tries = self.founds[ref.name].tries
            if tries < self.request.scan.attempts:
                yield from dispatch.scenes([ref])
            else:
                yield failed_record(ref, f"the process died at each of {tries} tries (out of memory?)")

    def _begun(self, ref: SceneRef) -> None:
        self.request.ledger.begin(self.founds[ref.name])

    @contextmanager
    def _forgiven(self) -> Iterator[None]:
        """Of a scan that ends before its scenes have, their tries do not count: only a dead process's do."""
        try:
            yield
        finally:
            for found in self.founds.values():
                with suppress(LeaseLostError):
                    self.request.ledger.forgive(found)

    def _receipts(self, run: RunFolder, refs: Sequence[SceneRef]) -> Receipts:
        """What finishes scenes of a pack where they are done."""
        return Receipts(self.request.ledger, run.name, {ref.name: self.founds[ref.name] for ref in refs})

    def _settle(self, record: SceneRecord, run: RunFolder, holder: Holder) -> bool:
        """What became of a scene, for the next scans.

        Returns:
            Whether it is ours still: one that another scan has taken over is the other's to tell.

        Raises:
            LeaseLostError: the run is another scan's.
        """
        scan, ledger = self.request.scan, self.request.ledger
        found = self.founds.pop(record.name)
        self.seconds += record.timings.get("predict", 0.0)
        try:
            if record.state == "failed":
                suspect = found.suspect and found.tries >= scan.attempts
                may = record.may_pass or (not suspect and may_pass(found))
                record = replace(record, may_pass=may)
                ledger.fail(found, record, run.name, scan.attempts)
            elif not ledger.is_done(found.digest):  # by its pack
                ledger.finish(found, record, run.name)
        except LeaseLostError:
            run.check()
            self.looked.counts["taken"] += 1
            return False
        finally:
            holder.give_back(found.digest)
        self.records[record.name] = record
        return True

    def _end(self, run: RunFolder) -> State[Any]:
        records = self.records.values()
        failed = [r for r in records if r.state == "failed"]
        told = f"{len(records) - len(failed):,} done, {self.looked}; report: {run.report}"
        if not failed:
            return Completed(message=told)
        named = [f"{r.name}: {r.error}" for r in failed[:FAILURES_TOLD]]
        if len(failed) > FAILURES_TOLD:
            named.append(f"and {len(failed) - FAILURES_TOLD} more")
        held = {scene.uri for scene in self.request.ledger.quarantined()} & {r.uri for r in failed}
        where = f"{len(held)} of them in quarantine" if held else "the next scan tries again"
        return Failed(message=f"{len(failed)} failed, {where} ({'; '.join(named)}); {told}")
