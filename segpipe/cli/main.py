"""The command line. Fast to answer: torch and prefect are loaded only when a command needs them."""

from __future__ import annotations

import json
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from segpipe import __version__
from segpipe.cli.doctor import doctor_command
from segpipe.cli.erase import erase_command
from segpipe.cli.lake import quarantine_command, scan_command
from segpipe.cli.models import models_app
from segpipe.cli.output import echo
from segpipe.cli.run_local import run_in_process
from segpipe.cli.store import store_app
from segpipe.errors import RequestError, SegpipeError
from segpipe.process.extras import check_installed, missing_extra
from segpipe.redact import clean_logs, scrubbed

if TYPE_CHECKING:
    from segpipe.config.job import Job
    from segpipe.export.run_folder import RunFolder
    from segpipe.runs.check import ResolvedJob
    from segpipe.tables.record import RunRecord


class _Commands(TyperGroup):
    """Whose commands end by returning or by `typer.Exit`, never because a library ends the process."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command named.

        Raises:
            SegpipeError: something called `sys.exit`, be it with 0: the work is not done.
        """
        try:
            return super().invoke(ctx)
        except SystemExit as ended:
            told = ended.code if isinstance(ended.code, str) else f"exit code {ended.code or 0}"
            raise SegpipeError(f"ended by a library before the work was done: {told}") from ended


app = typer.Typer(
    cls=_Commands,
    help="Segment satellite rasters and 3D medical volumes, and report areas, volumes and overlap "
    "per region. Start with `segpipe plan JOB.yaml`, then `segpipe run JOB.yaml`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(models_app, name="models")
app.add_typer(store_app, name="store")
app.command("doctor")(doctor_command)
app.command("scan")(scan_command)
app.command("erase")(erase_command)
app.command("quarantine")(quarantine_command)

JobFile = Annotated[Path, typer.Argument(metavar="JOB.yaml", help="A job file; see configs/jobs/.")]
RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", help="A recipe for training; see configs/train/.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="a.b=value", help="Override a key of the job; may be repeated."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"segpipe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


Local = Annotated[
    bool,
    typer.Option("--local", help="In this process, without Prefect, whose server takes seconds to start."),
]


@app.command()
def run(job_file: JobFile, overrides: Overrides = None, local: Local = False) -> None:
    """Run a job as a Prefect flow; run it again to resume, or to find it done.

    Uses the server of PREFECT_API_URL where that is set, else a temporary one of its own. Where Prefect is
    not installed, the job runs in this process, as by --local.
    Exit code 0: all scenes done; 1: some failed; 2: the request is wrong.
    """
    from segpipe.config.job import load_job

    _run_job(load_job(job_file, overrides or []), local)


def _run_job(job: Job, local: bool) -> None:
    """Run a job in a flow, or in this process, and print its numbers."""
    from segpipe.runs.check import check_request
    from segpipe.runs.find_run import open_run

    request = check_request(job)  # a mistake is told now, before a server is started
    found, before = open_run(job, request.fingerprint)
    if before is not None and len(before.done) == len(request.scenes):
        echo("nothing to do: this job is done; the results of then:")
        _headline(found, before)
        return
    if not local and job.compute.clustered:
        check_installed("prefect", f"compute.runner: {job.compute.runner.value}")
    if not local and find_spec("prefect") is not None:
        _run_flow(job, request, before)
        return
    found, record = run_in_process(request)
    _headline(found, record)
    if record.failed:
        raise typer.Exit(1)


def _run_flow(job: Job, request: ResolvedJob, before: RunRecord | None) -> None:
    """Run a checked job as a flow, and print its numbers."""
    from segpipe.runs.find_run import open_run
    from segpipe_flows.here import check_server, run_here
    from segpipe_flows.prompt import prompt as ask
    from segpipe_flows.runners import check_cluster, task_runner
    from segpipe_flows.segment import segment

    task_runner(job.compute)
    check_server()
    check_cluster(job.compute, request.settings)
    if job.prompts.asked:
        state = run_here(ask, job.model_dump(), resolved=request)
    else:
        state = run_here(segment, job, resolved=request)
    if state.is_cancelled():  # by Ctrl-C, or in the UI
        echo(state.message, file=sys.stderr)
        raise typer.Exit(130)
    found, after = open_run(job, request.fingerprint)
    if after is None or after == before:
        if state.is_completed():  # another run of the same job is at the record
            echo(state.message)
            return
        raise SegpipeError(state.message or "the run ended without a report")
    _headline(found, after)
    if not state.is_completed():
        raise typer.Exit(1)


@app.command()
def prompt(
    what: Annotated[
        str, typer.Argument(metavar="JOB.yaml|RUN", help="A job with a promptable model, or a run of one.")
    ],
    text: Annotated[
        list[str] | None,
        typer.Option(help="A phrase, or several as 'lake . dock . field'; may be repeated."),
    ] = None,
    grounder: Annotated[
        str, typer.Option(help="Card of the model that finds phrases; left out: the job's.")
    ] = "",
    points: Annotated[
        str, typer.Option(help="File of points (GeoJSON, GeoPackage, CSV): label 1 in the object, 0 beside.")
    ] = "",
    boxes: Annotated[str, typer.Option(help="File of boxes or polygons around objects.")] = "",
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least score of what a phrase finds.")
    ] = None,
    overrides: Overrides = None,
    local: Local = False,
) -> None:
    """Ask a promptable model for objects, by words, points or boxes, over scenes of any size.

    What was encoded for an earlier question is read, not encoded again: ask a RUN as often as you like.
    """
    from segpipe.runs.check import asked_job

    if points and boxes:
        raise RequestError("--points, --boxes: give one file: it may hold both")
    asked = asked_job(what, text or [], grounder, points or boxes, threshold, overrides or [])
    _run_job(asked, local)


@app.command()
def train(recipe_file: RecipeFile, overrides: Overrides = None) -> None:
    """Train a model from labelled scenes as a Prefect flow; run it again to go on where it stopped.

    Leaves a card with weights, scores on scenes kept apart, and a page. Several GPUs:
    `torchrun --nproc-per-node=N -m segpipe.cli train RECIPE.yaml`.
    """
    from segpipe.config.recipe import load_recipe
    from segpipe.training.run import check_recipe

    check_installed("prefect", "segpipe train")
    recipe = load_recipe(recipe_file, overrides or [])
    scenes = check_recipe(recipe)
    if int(os.environ.get("RANK", "0")):
        from segpipe.training.run import SILENT
        from segpipe.training.run import train as take_part

        take_part(recipe, SILENT)  # the first process has the flow, the others its work
        return
    echo(f"{recipe.name}: {len(scenes)} scenes, {recipe.optimise.steps:,} steps a fold")
    from segpipe_flows.here import check_server, run_here
    from segpipe_flows.train import train_model

    check_server()
    state = run_here(train_model, str(recipe_file), overrides or [])
    echo(state.message, file=sys.stderr if not state.is_completed() else sys.stdout)
    if not state.is_completed():
        raise typer.Exit(130 if state.is_cancelled() else 1)


def _headline(run: RunFolder, record: RunRecord) -> None:
    """The last lines: the numbers people came for, and where the page is."""
    from segpipe.report.markdown import headline
    from segpipe.runs.find_run import read_tables

    for scene in record.failed:
        echo(f"failed: {scene.name}: {scene.error}", file=sys.stderr)
    for line in headline(record, *read_tables(run)):
        echo(line)
    echo(f"report: {run.report}")


@app.command()
def plan(job_file: JobFile, overrides: Overrides = None) -> None:
    """Say what a job would do and cost, without doing it: windows, blocks, memory, disk."""
    from segpipe.config.job import load_job
    from segpipe.runs.check import check_request
    from segpipe.runs.plan import forecast, plan_scenes

    job = load_job(job_file, overrides or [])
    request = check_request(job)
    how = f"on {request.settings.device_class}" if job.model else "with labels measured as given"
    echo(f"{job.name}: {len(request.scenes)} scenes {how}")
    failed, plans = [], []
    for scene in plan_scenes(request):
        plans.append(scene)
        if scene.failed:
            failed.append(f"{scene.scene}: {scene.text}")
        else:
            echo(f"  {scene.scene}: {scene.text}")
    if job.model:
        echo("passes are an upper bound: windows without a valid element are skipped when read")
    disk, fits = forecast(request, plans)
    if disk:
        echo(disk)
    if not fits:
        echo("warning: the disk may be too small: that is before compression", file=sys.stderr)
    for line in failed:
        echo(f"failed: {line}", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def report(run_folder: Annotated[str, typer.Argument(metavar="RUN", help="<out>/<job>/<run>")]) -> None:
    """Make the tables and the page of a run again, from its receipts and pictures alone."""
    from segpipe.runs.find_run import load_run
    from segpipe.runs.finish import write_run

    found, record = load_run(run_folder)
    write_run(found, record)
    _headline(found, record)


@app.command()
def compare(
    before: Annotated[str, typer.Argument(metavar="RUN", help="<out>/<job>/<run>")],
    after: Annotated[str, typer.Argument(metavar="RUN", help="The run to hold against it.")],
    out: Annotated[
        str, typer.Option(help="Folder of the files; left out: compare-<first run> in the second's folder.")
    ] = "",
) -> None:
    """Tell what changed from one run to another, per scene, region and class."""
    from segpipe.report.comparison import headline
    from segpipe.runs.compare import compare_runs

    found = compare_runs(before, after, out)
    for warning in found.warnings:
        echo(f"warning: {warning}", file=sys.stderr)
    for line in headline(found):
        echo(line)


@app.command()
def check(run_folder: Annotated[str, typer.Argument(metavar="RUN", help="<out>/<job>/<run>")]) -> None:
    """Hold every file of a run against the manifest: size and SHA-256. Exit code 1: some differ."""
    from segpipe.export.run_folder import check_manifest

    wrong = check_manifest(run_folder)
    for line in wrong:
        echo(line, file=sys.stderr)
    if wrong:
        raise typer.Exit(1)
    echo("every file is as it was written")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a job file, for editors."""
    from segpipe.config.job import Job

    echo(json.dumps(Job.model_json_schema(), indent=2))


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address of the Prefect server to use or start.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 4200,
    limit: Annotated[int, typer.Option(min=1, help="Runs at once; the others wait.")] = 1,
) -> None:
    """Start a local Prefect server (unless one answers) and serve every flow, ready for the UI's forms."""
    check_installed("prefect", "segpipe serve")
    from segpipe_flows.serve import serve_locally

    serve_locally(host, port, limit)


def execute(arguments: list[str] | None = None) -> int:
    """Run a command line; errors that a user can act on are one line and an exit code.

    Args:
        arguments: default: the process's own.
    """
    logging.captureWarnings(True)
    clean_logs()
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    with scrubbed():
        return _execute(arguments)


def _execute(arguments: list[str] | None) -> int:
    try:
        app(arguments)
    except RequestError as error:
        echo(f"error: {error}", file=sys.stderr)
        return 2
    except SegpipeError as error:
        echo(f"error: {error}", file=sys.stderr)
        return 1
    except SystemExit as ended:  # how typer ends: work done is 0, a wrong command line 2, an interrupt 130
        return ended.code if isinstance(ended.code, int) else 1
    except ModuleNotFoundError as error:
        if (line := missing_extra(error, "this command")) is None:
            raise
        echo(f"error: {line}", file=sys.stderr)
        return 2
    except ValueError as error:
        if (line := _setting(error)) is None:
            raise
        echo(f"error: {line}", file=sys.stderr)
        return 2
    return 0


def _setting(error: ValueError) -> str | None:
    """What is wrong with a setting of Prefect, which it reads when it is loaded; None: another error."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError) or not error.title.endswith("Settings"):
        return None
    first = error.errors(include_url=False)[0]
    field = ".".join(map(str, first["loc"]))
    return f"Prefect's {error.title}: {field}: {first['msg']}; see `prefect config view`"


def main() -> None:
    """Entry point."""
    sys.exit(execute())


if __name__ == "__main__":
    main()
