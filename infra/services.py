"""Start, show and end the services of `infra.loopback` on this machine.

``python -m infra.services start`` starts a Prefect server, an object store, a Dask scheduler with
workers and Prefect workers; ``stop`` ends them by their process ids. All their files are in one folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from infra.loopback import PARTS, Services, end_parts, read_record
from infra.processes import Part, ServiceError

__all__ = ["Services"]

app = typer.Typer(help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Option(help="Folder of all their files.")]
FOLDER = Path(".services")


@app.command("start")
def start_command(
    folder: Folder = FOLDER,
    database: Annotated[str, typer.Option(help="Of the Prefect server: sqlite or postgres.")] = "sqlite",
    only: Annotated[str, typer.Option(help="Some of them, with commas between.")] = ",".join(PARTS),
    dask_workers: Annotated[int, typer.Option(min=0, help="Dask workers, of one thread each.")] = 2,
) -> None:
    """Start the services, and write FOLDER/env for a shell and FOLDER/services.json for programs."""
    record = read_record(folder)
    if record is not None:
        if any(Part(**part).process() for part in record["parts"]):
            raise ServiceError(f"{folder}: services run already; stop them first: {_stop_line(folder)}")
        end_parts([Part(**part) for part in record["parts"]], _cluster(record))
    parts = [part.strip() for part in only.split(",")]
    services = Services(folder, database=database, parts=parts, dask_workers=dask_workers)
    services.start()
    _show(services.parts.values())
    typer.echo(f"use them:  . {folder}/env")
    typer.echo(f"end them:  {_stop_line(folder)}")


@app.command("stop")
def stop_command(folder: Folder = FOLDER) -> None:
    """End the services and what they started, by their process ids."""
    record = read_record(folder)
    if record is None:
        typer.echo(f"{folder}: no services were started here")
        return
    killed = end_parts([Part(**part) for part in record["parts"]], _cluster(record))
    for name in ("services.json", "env"):
        (folder / name).unlink(missing_ok=True)
    typer.echo(f"stopped{': killed ' + ', '.join(killed) if killed else ''}")


@app.command("status")
def status_command(folder: Folder = FOLDER) -> None:
    """Show the services; exit code 1 where one that was started is gone."""
    record = read_record(folder)
    if record is None:
        typer.echo(f"{folder}: no services were started here")
        raise typer.Exit(1)
    if not _show(Part(**part) for part in record["parts"]):
        raise typer.Exit(1)


def _show(parts: Iterable[Part]) -> bool:
    """Print a line for each part; whether all run."""
    running = True
    for part in parts:
        there = part.process() is not None
        running &= there
        state = f"pid {part.pid}" if there else f"gone, see {part.log}"
        typer.echo(f"{part.name:<16} {state:<12} {part.address}".rstrip())
    return running


def _cluster(record: Mapping[str, Any]) -> Path | None:
    return Path(record["cluster"]) if record["cluster"] else None


def _stop_line(folder: Path) -> str:
    return f"python -m infra.services stop --folder {folder}"


def main() -> None:
    """The command line; what cannot start is one line and exit code 1."""
    try:
        app()
    except (ServiceError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
