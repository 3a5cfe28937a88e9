"""Who runs the tasks: this process's threads, or a Dask cluster, by configuration alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prefect.settings import get_current_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from segpipe.config.job import Compute, Runner
from segpipe.config.loading import read_yaml
from segpipe.errors import RequestError
from segpipe.inference.settings import Settings
from segpipe.process.extras import require

if TYPE_CHECKING:
    from distributed import Client

SPARE_THREADS = 3
"""Beside a batch and a scene to finish for each worker: they plan the next scenes."""
ANSWER_SECONDS = 5.0
"""Until a scheduler, or a worker's look at the Prefect server, is given up."""
ALIKE = ("segpipe", "numpy", "zarr", "torch", "prefect")
"""Packages of which a worker must have this process's versions."""
SLOT = "GPU"
"""Dask's resource of which a batch takes one where the device is a GPU."""
OURS = {"n_workers": "compute.workers", "asynchronous": ""}
"""Keyword arguments of a cluster that are set here."""


class _Cluster(NamedTuple):
    """How a runner's cluster is made."""

    path: str
    """Dotted path of its class."""
    defaults: dict[str, Any]


CLUSTERS = {
    Runner.dask: _Cluster(
        "distributed.LocalCluster",
        {"threads_per_worker": 1, "dashboard_address": None, "resources": {SLOT: 1}},
    ),
    Runner.dask_cuda: _Cluster("dask_cuda.LocalCUDACluster", {"resources": {SLOT: 1}}),
    Runner.kubernetes: _Cluster("dask_kubernetes.operator.KubeCluster", {}),
    Runner.slurm: _Cluster("dask_jobqueue.SLURMCluster", {}),
}


def task_runner(compute: Compute) -> TaskRunner[Any]:
    """The task runner a job asks for; a cluster of its own starts with its first task.

    Raises:
        RequestError: a package that is missing, settings of a cluster that cannot be read, or Dask without a
            Prefect server: every worker would start one of its own.
    """
    if not compute.clustered:
        return ThreadPoolTaskRunner(max_workers=2 * compute.workers + SPARE_THREADS)
    if get_current_settings().api.url is None:
        raise RequestError(
            f"compute.runner: {compute.runner.value} needs a running Prefect server; start one with "
            "`prefect server start` and set PREFECT_API_URL=http://127.0.0.1:4200/api, or use runner: threads"
        )
    who = f"compute.runner: {compute.runner.value}"
    DaskTaskRunner = require("prefect_dask.task_runners", who).DaskTaskRunner  # noqa: N806 (a class)
    if compute.address:
        known: TaskRunner[Any] = DaskTaskRunner(address=compute.address)
        return known
    kind = CLUSTERS[compute.runner]
    require(kind.path.rpartition(".")[0], who)
    scaling = {"minimum": compute.least, "maximum": compute.workers} if compute.least else None
    made: TaskRunner[Any] = DaskTaskRunner(
        cluster_class=kind.path,
        cluster_kwargs={**cluster_arguments(compute), "n_workers": compute.least or compute.workers},
        adapt_kwargs=scaling,
    )
    return made


def cluster_arguments(compute: Compute) -> dict[str, Any]:
    """Keyword arguments of the cluster's class: ours, and over them those of `compute.cluster`.

    Raises:
        RequestError: no such file, no mapping, or an argument that other fields stand for.
    """
    found: dict[str, Any] = {}
    if compute.cluster:
        if not Path(compute.cluster).is_file():
            raise RequestError(
                f"compute.cluster: {compute.cluster} does not exist (seen from the working folder)"
            )
        found = read_yaml(compute.cluster)
    for name in sorted(OURS.keys() & found.keys()):
        instead = f"give {OURS[name]} instead" if OURS[name] else "leave it out"
        raise RequestError(f"compute.cluster: {compute.cluster}: `{name}` is set by segpipe: {instead}")
    return {**CLUSTERS[compute.runner].defaults, **found}


def placed(compute: Compute, settings: Settings) -> AbstractContextManager[Any]:
    """Put around the submission of what computes on the device: one such task at a time for each GPU."""
    if not _by_gpu(compute, settings):
        return nullcontext()
    from dask.base import annotate

    place: AbstractContextManager[Any] = annotate(resources={SLOT: 1})
    return place


def _by_gpu(compute: Compute, settings: Settings) -> bool:
    return compute.clustered and settings.device.startswith("cuda")


def check_cluster(compute: Compute, settings: Settings) -> None:
    """Ask a cluster, before any work, whether it can do what it will be sent. Threads have nothing to ask.

    Args:
        settings: what was resolved for the job; its device decides whether workers must offer `GPU`.

    Raises:
        RequestError: nobody answers at the address, no workers (unless it scales), other versions there than
            here, no Prefect server in their reach, or no GPUs.
    """
    if not compute.address:
        if _by_gpu(compute, settings):
            _check_slots(compute)
        return
    from distributed import Client

    try:
        client = Client(  # type: ignore[no-untyped-call]
            compute.address, timeout=ANSWER_SECONDS, set_as_default=False
        )
    except (OSError, ValueError) as error:
        raise RequestError(
            f"compute.address: no Dask scheduler answers at {compute.address} ({_line(error)}); start one by "
            "`dask scheduler` and workers by `dask worker ADDRESS`, or leave the address out"
        ) from error
    with client:
        _check_workers(client, compute, _by_gpu(compute, settings))


def _check_slots(compute: Compute) -> None:
    """A cluster to be made must offer GPUs: Dask waits for ever for a resource that nobody has."""
    if SLOT in str(cluster_arguments(compute)):
        return
    how = {
        Runner.kubernetes: f"worker_command: [dask, worker, --nthreads, '1', --resources, {SLOT}=1]",
        Runner.slurm: f"worker_extra_args: ['--resources {SLOT}=1']",
    }.get(compute.runner, f"resources: {{{SLOT}: 1}}")
    raise RequestError(
        f"compute.cluster: {compute.cluster or 'not given'}: the device is a GPU, and no worker would offer "
        f"the resource {SLOT}; add e.g. `{how}`, or set compute.device: cpu"
    )


def _check_workers(client: Client, compute: Compute, by_gpu: bool) -> None:
    """Raises RequestError: as `check_cluster`, for workers that are there."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    if not workers:
        if compute.least:  # whoever started the cluster scales it
            return
        raise RequestError(
            f"compute.address: the Dask scheduler at {compute.address} has no workers; start some by "
            f"`dask worker {compute.address}`, or set compute.least above 0 where it scales by itself"
        )
    if by_gpu and not any(worker["resources"].get(SLOT) for worker in workers.values()):
        raise RequestError(
            f"compute.address: the device is a GPU, and none of the {len(workers)} workers at "
            f"{compute.address} offers the resource {SLOT}; start them by "
            f"`dask worker ... --resources {SLOT}=1`, or set compute.device: cpu"
        )
    look = _look()
    here, url = look(ALIKE, "", 0), str(get_current_settings().api.url)
    for worker, found in client.run(look, ALIKE, url, ANSWER_SECONDS).items():
        other = [f"{name} {found[name]} (here {here[name]})" for name in ALIKE if found[name] != here[name]]
        if other:
            raise RequestError(
                f"compute.address: the worker {worker} has {', '.join(other)}; give the workers "
                "the versions of here"
            )
        if found["server"]:
            raise RequestError(
                f"PREFECT_API_URL: the worker {worker} does not reach the Prefect server at {url} "
                f"({found['server']}); give an address that is valid on the workers too"
            )


def _look() -> Any:
    """The function that runs in a worker. It travels as code: segpipe may be missing there."""

    def look(packages: tuple[str, ...], url: str, seconds: float) -> dict[str, str]:
        from contextlib import suppress
        from importlib.metadata import PackageNotFoundError, version
        from urllib.error import HTTPError
        from urllib.request import urlopen

        found = {"server": ""}
        for name in packages:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "missing"
        if url:
            try:
                with suppress(HTTPError):  # it answers: who may ask is another question
                    urlopen(f"{url}/health", timeout=seconds).close()
            except (OSError, ValueError) as error:
                found["server"] = str(error)
        return found

    return look


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
