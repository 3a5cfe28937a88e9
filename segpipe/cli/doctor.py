"""``segpipe doctor``: what is found as a table on a terminal, as lines elsewhere, or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from segpipe.cli.output import echo
from segpipe.redact import clean

if TYPE_CHECKING:
    from segpipe.doctor import Finding

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def doctor_command(
    out: Annotated[str, typer.Option(help="Folder or URL for results, as outputs.dir in a job.")] = "runs",
    dask: Annotated[
        str,
        typer.Option(envvar="SEGPIPE_DASK_ADDRESS", help="Address of a Dask scheduler, tcp://host:8786."),
    ] = "",
    store: Annotated[str, typer.Option(help="Object store to read and write, s3://bucket/prefix.")] = "",
    self_test: Annotated[bool, typer.Option(help="Run a tiny model through the engine.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list instead of a table.")] = False,
) -> None:
    """Check this machine, what is installed, and what a run talks to; say what to do about each failing line.

    Exit code 0: all is well, or only warnings; 1: something fails.
    """
    from segpipe.doctor import State, examine

    findings = []
    console = Console()
    for finding in examine(out, dask=dask, store=store, self_test=self_test):
        findings.append(finding)
        if not as_json and not console.is_terminal:
            echo(line_of(finding))
    if as_json:
        echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    elif console.is_terminal:
        console.print(table_of(findings))
    if any(finding.state is State.fail for finding in findings):
        raise typer.Exit(1)


def line_of(finding: Finding) -> str:
    """A finding for a log or a pipe."""
    advice = f" -> {finding.advice}" if finding.advice else ""
    return f"{finding.state.value:<4} {finding.name}: {finding.found}{advice}"


def table_of(findings: list[Finding]) -> Table:
    """Findings for a terminal."""
    table = Table("", "what", "found", "what to do")
    for state, *texts in ((f.state.value, f.name, f.found, f.advice) for f in findings):
        table.add_row(f"[{STYLES[state]}]{state}[/]", *(escape(clean(text)) for text in texts))
    return table
