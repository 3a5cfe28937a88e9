"""Start, show and end the services of `tests.services.loopback` on this machine.

``python -m tests.services start`` starts a Prefect server, an object store, a Dask scheduler with
workers and Prefect workers; ``stop`` ends them by their process ids. All their files are in one folder.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from tests.services.loopback import Part, ServiceError, Services, end_parts, read_record

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Option(help="Folder of all their files.")]
FOLDER = Path(".services")
Database = Enum("Database", {"sqlite": "sqlite", "postgres": "postgres"})


@app.command()
def start(folder: Folder = FOLDER, database: Database = Database.sqlite) -> None:
    """Start the services, and write FOLDER/env for a shell and FOLDER/services.json for programs."""
    record = read_record(folder)
    if record is not None:
        if any(part.process() for part in record["parts"]):
            raise ServiceError(f"{folder}: services run already; stop them first: {_stop_line(folder)}")
        end_parts(folder, record["parts"], record["cluster"])
    services = Services(folder, database=database.value)
    services.start()
    for part in services.parts.values():
        typer.echo(_line(part))
    typer.echo(f"use them:  . {folder}/env")
    typer.echo(f"end them:  {_stop_line(folder)}")


@app.command()
def stop(folder: Folder = FOLDER) -> None:
    """End the services and what they started, by their process ids."""
    record = read_record(folder)
    if record is None:
        typer.echo(f"{folder}: no services were started here")
        return
    killed = end_parts(folder, record["parts"], record["cluster"])
    typer.echo(f"stopped{': killed ' + ', '.join(killed) if killed else ''}")


@app.command()
def status(folder: Folder = FOLDER) -> None:
    """Show the services; exit code 1 where one that was started is gone."""
    record = read_record(folder) or {"parts": []}
    for part in record["parts"]:
        typer.echo(_line(part))
    if not record["parts"] or not all(part.process() for part in record["parts"]):
        raise typer.Exit(1)


def _line(part: Part) -> str:
    state = f"pid {part.pid}" if part.process() else f"gone, see {part.log}"
    return f"{part.name:<16} {state:<12} {part.address}".rstrip()


def _stop_line(folder: Path) -> str:
    return f"python -m tests.services stop --folder {folder}"


if __name__ == "__main__":
    try:
        app()
    except (ServiceError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)
