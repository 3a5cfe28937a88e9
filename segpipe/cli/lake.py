"""Commands for lakes: scan one, and see or release what is in quarantine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from segpipe.cli.output import echo
from segpipe.errors import RequestError, SegpipeError
from segpipe.process.extras import check_installed

ScanFile = Annotated[Path, typer.Argument(metavar="SCAN.yaml", help="A scan file; see configs/scans/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override a key of the scan; may be repeated."),
]


def scan_command(
    scan_file: ScanFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Do what is new in a lake: every scene once, however often and wherever this runs.

    Exit code 0: all new scenes done, or none is new; 1: some failed (see `segpipe quarantine`); 2: the
    request is wrong.
    """
    from segpipe.config.scan import load_scan
    from segpipe.lake.selection import Looked, check_scan, new_scenes

    scan = load_scan(scan_file, overrides or [])
    request = check_scan(scan)
    if dry_run or scan.dry_run:
        looked = Looked()
        with request.ledger.known() as known:
            for found in new_scenes(scan, known, looked):
                echo(f"{found.name}: {found.uri}")
        echo(f"dry run: {looked}; nothing was done")
        return
    check_installed("prefect", "segpipe scan")
    from segpipe_flows.here import check_server, run_here
    from segpipe_flows.runners import check_cluster, task_runner
    from segpipe_flows.scan import scan as scan_flow

    task_runner(scan.compute)
    check_server()
    check_cluster(scan.compute, request.resolved.settings)
    state = run_here(scan_flow, scan)
    if state.is_cancelled():
        echo(state.message, file=sys.stderr)
        raise typer.Exit(130)
    if not state.is_completed():
        raise SegpipeError(state.message or "the scan ended without a report")
    echo(state.message)


def quarantine_command(
    scan_file: ScanFile,
    overrides: Overrides = None,
    release: Annotated[
        list[str] | None,
        typer.Option(metavar="SCENE", help="Scene whose next scan tries it again; may be repeated."),
    ] = None,
    release_all: Annotated[bool, typer.Option("--release-all", help="Release every scene.")] = False,
) -> None:
    """List the scenes of a lake that are in quarantine, with the reason, or release them."""
    from segpipe.config.scan import load_scan
    from segpipe.lake.selection import check_scan

    ledger = check_scan(load_scan(scan_file, overrides or [])).ledger
    held, wanted = ledger.quarantined(), set(release or [])
    unknown = sorted(wanted - {q.name for q in held})
    if unknown:
        names = ", ".join(sorted(q.name for q in held)) or "none"
        raise RequestError(f"--release: {unknown[0]!r} is not in quarantine; there are: {names}")
    for scene in held:
        if release_all or scene.name in wanted:
            ledger.release(scene)
            echo(f"released: {scene.name}: {scene.uri}")
        elif not wanted:
            echo(f"{scene.name}: {scene.reason} (since {scene.since}, {scene.tries} tries; {scene.uri})")
    if not held:
        echo("no scene is in quarantine")
