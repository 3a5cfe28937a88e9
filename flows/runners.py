"""Who runs the tasks: this process's threads, or Dask, by configuration."""

from __future__ import annotations

from typing import Any

from prefect.settings import get_current_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from segpipe.config import Compute, Runner
from segpipe.errors import RequestError

SPARE_THREADS = 3
"""Beside a batch and a scene to finish for each worker: they plan the next scenes."""


def task_runner(compute: Compute) -> TaskRunner[Any]:
    """The task runner a job asks for.

    Raises:
        RequestError: Dask without a Prefect server: every worker would start one of its own.
    """
    if compute.runner is Runner.threads:
        return ThreadPoolTaskRunner(max_workers=2 * compute.workers + SPARE_THREADS)
    if get_current_settings().api.url is None:
        raise RequestError(
            "compute.runner: dask needs a running Prefect server; start one with `prefect server start` "
            "and set PREFECT_API_URL=http://127.0.0.1:4200/api, or use runner: threads"
        )
    from prefect_dask.task_runners import DaskTaskRunner

    if compute.address:
        return DaskTaskRunner(address=compute.address)
    return DaskTaskRunner(
        cluster_class="distributed.LocalCluster",
        cluster_kwargs={"n_workers": compute.workers, "threads_per_worker": 1, "dashboard_address": None},
    )
