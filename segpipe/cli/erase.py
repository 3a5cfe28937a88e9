"""``segpipe erase``: remove what is kept of one subject or scene."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from segpipe.cli.output import echo


def erase_command(
    name: Annotated[
        str, typer.Argument(metavar="SUBJECT|SCENE", help="A subject of BIDS (sub-01), or a scene's name.")
    ],
    folder: Annotated[str, typer.Option("--in", help="Folder of the results, outputs.dir of the jobs.")],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before removing.")] = False,
) -> None:
    """Remove one subject or scene from store, runs, ledgers, embeddings and Prefect's own database.

    Runs of other scenes too are written again without it. Copies elsewhere (backups, exports, what people
    wrote) are not known here. Exit code 1: something could not be reached.
    """
    from segpipe.lake.erase import erase

    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    server = os.environ.get("PREFECT_API_URL")
    planned = erase(name, folder, home, server, dry_run=True)
    _print_table(planned.removed)
    if not planned.removed:
        echo(f"nothing of {name} is kept in {folder}")
    elif not (yes or typer.confirm(f"Remove all of this, for good ({len(planned.removed)} entries)?")):
        echo("nothing was removed")
        raise typer.Exit(1)
    done = erase(name, folder, home, server, dry_run=False)
    if planned.removed:
        echo(f"removed: {len(done.removed)} entries")
    for where, why in done.left:
        echo(f"not reached: {where}: {why}", file=sys.stderr)
    if done.left:
        raise typer.Exit(1)


def _print_table(rows: list[tuple[str, str]]) -> None:
    width = max((len(what) for what, _ in rows), default=0)
    for what, where in rows:
        echo(f"{what:<{width}}  {where}")
