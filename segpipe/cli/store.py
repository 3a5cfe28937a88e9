"""Commands for the store of an output location: what lies there, what may go, whether it is whole."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from segpipe.cli.output import echo
from segpipe.errors import RequestError

if TYPE_CHECKING:
    from segpipe.runs.references import Survey
    from segpipe.store.lifecycle import StoredStage

store_app = typer.Typer(
    help="See what the store below an `outputs.dir` holds, remove what no run needs, check it.",
    no_args_is_help=True,
)
Out = Annotated[str, typer.Argument(metavar="OUT", help="The `outputs.dir` of runs: a folder or a URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PATIENCE = 2.0
"""Seconds before work tells how far it is, and between two lines of that."""
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@contextmanager
def _told(what: str) -> Iterator[Callable[[int, int], None]]:
    """How far work is, on stderr, once it takes longer than `PATIENCE`."""
    last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PATIENCE:
            last = time.monotonic()
            echo(f"{what}: {done:,} of {total:,} stages", file=sys.stderr)

    yield show


def _survey(out: str) -> Survey:
    from segpipe.runs.references import survey

    with _told("looking") as progress:
        return survey(out, progress)


def _seconds(text: str) -> float:
    """Of ``30d``, ``12h``, ``0s``."""
    try:
        return float(text[:-1]) * UNITS[text[-1:]]
    except (ValueError, KeyError) as error:
        raise RequestError(f"--older: found {text!r}; valid: 30d, 12h, 90m, 0s, 2w") from error


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError as error:
        raise RequestError(f"--size: found {text!r}; valid: 100GB, 512MiB, 2TB") from error


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _row(found: Survey, stage: StoredStage) -> dict[str, Any]:
    runs = sorted({r.run for r in found.references.get(stage.key, ())})
    age = round(time.time() - stage.used, 1)
    return {
        "key": stage.key, "kind": stage.kind, "scene": stage.scene, "runs": runs, "bytes": stage.size,
        "files": stage.files, "age_seconds": age, "pinned": found.pinned(stage.key, stage.scene),
    }  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    from segpipe.tables.units import byte_size

    runs = ", ".join(row["runs"]) or "no run"
    stays = f"; stays: {row['pinned']}" if row["pinned"] else ""
    size, age = byte_size(row["bytes"]), _age(row["age_seconds"])
    return f"  {row['key']}  {size:>10}  {age:>6}  {row['scene'] or 'no scene'} ({runs}{stays})"


@store_app.command("usage")
def usage_command(out: Out, as_json: AsJson = False) -> None:
    """List the stages with their bytes, their age since the last use, and who needs them."""
    from segpipe.tables.units import byte_size

    found = _survey(out)
    rows = sorted((_row(found, stage) for stage in found.stages), key=lambda row: -row["bytes"])
    left = [asdict(item) for item in found.leftovers]
    if as_json:
        echo(json.dumps({"stages": rows, "leftovers": left, "pins": found.pins}, indent=2))
        return
    for row in rows:
        echo(_line(row))
    total = byte_size(sum(row["bytes"] for row in rows))
    rest = byte_size(sum(item.size for item in found.leftovers))
    echo(f"{len(rows):,} stages, {total}; {len(left):,} leftovers that nothing refers to, {rest}")


@store_app.command("gc")
def gc_command(
    out: Out,
    older: Annotated[str, typer.Option(help="Remove stages not used for so long, such as 30d or 12h.")] = "",
    size: Annotated[
        str, typer.Option(help="Remove the stages not used for longest until so much is left: 100GB.")
    ] = "",
    run: Annotated[str, typer.Option(help="Let go of a run: remove what no other run refers to.")] = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do it; else it is only printed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what no run needs: stages by age, size or run, and leftovers of killed writers.

    What stays: stages of unfinished runs, those that a run keeps (`outputs.keep`), the measurements that a
    run's report is made from, and what is pinned. Leftovers go after --older, or a day.
    """
    from segpipe.store.lifecycle import DAY, remove_leftovers, remove_stage
    from segpipe.tables.units import byte_size

    limit = _seconds(older) if older else None
    found = _survey(out)
    going = found.going(limit, _bytes(size) if size else None, run)
    settled = time.time() - (DAY if limit is None else limit)
    left = [item for item in found.leftovers if item.written <= settled]
    if yes:
        with _told("removing") as progress:
            for number, stage in enumerate(going, start=1):
                remove_stage(out, stage.key)
                progress(number, len(going))
        remove_leftovers(out, left)
    rows = [{**_row(found, stage), "pinned": ""} for stage in going]
    if as_json:
        told = {"removed": yes, "stages": rows, "leftovers": [asdict(item) for item in left]}
        echo(json.dumps(told, indent=2))
        return
    for row in rows:
        echo(_line(row))
    for item in left:
        echo(f"  {item.path}  {byte_size(item.size)}")
    freed = byte_size(sum(row["bytes"] for row in rows) + sum(item.size for item in left))
    done = "removed" if yes else "would remove (--yes does it)"
    echo(f"{done}: {len(rows):,} stages and {len(left):,} leftovers, {freed}")


@store_app.command("pin")
def pin_command(
    out: Out, name: Annotated[str, typer.Argument(help="Name of a run or a scene; left out: list.")] = ""
) -> None:
    """Keep the stages of a run or scene until they are unpinned; without a name, list the pins."""
    from segpipe.store.lifecycle import pin, pins

    if not name:
        echo("\n".join(pins(out)) or "nothing is pinned")
        return
    found = _survey(out)
    known = {s.scene for s in found.stages} | {r.run for refs in found.references.values() for r in refs}
    if name not in known:
        valid = ", ".join(sorted(known - {""})) or "none"
        raise RequestError(f"pin: found {name!r}; no run or scene of this name has stages; valid: {valid}")
    pin(out, name)
    echo(f"pinned: {name}")


@store_app.command("unpin")
def unpin_command(
    out: Out, name: Annotated[str, typer.Argument(help="Name of a pinned run or scene.")]
) -> None:
    """Let go of a run or scene that was pinned."""
    from segpipe.store.lifecycle import unpin

    unpin(out, name)
    echo(f"no longer pinned: {name}")


@store_app.command("check")
def check_command(
    out: Out,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take back what is damaged: the next run computes it again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read all that is committed and hold it against its checksums. Exit code 1: something is damaged."""
    from segpipe.store.lifecycle import check_stage, stage_keys

    keys, lines = stage_keys(out), []
    with _told("checking") as progress:
        for number, key in enumerate(keys, start=1):
            lines += check_stage(out, key, repair=repair)
            progress(number, len(keys))
    left = _survey(out).leftovers
    if as_json:
        told = [asdict(item) for item in left]
        echo(json.dumps({"stages": len(keys), "damaged": lines, "leftovers": told}, indent=2))
    else:
        for line in lines:
            echo(f"damaged: {line}", file=sys.stderr)
        for item in left:
            echo(f"nothing refers to {item.path}")
        taken = ", taken back: run the jobs again" if repair and lines else ""
        echo(f"{len(keys):,} stages: {len(lines):,} damaged{taken}; {len(left):,} leftovers")
    if lines:
        raise typer.Exit(1)
