"""What a worker must be given for a job, from the job's plan: a patch for kustomize.

``python infra/k8s/resources.py JOB.yaml > infra/k8s/overlays/cpu/memory.yaml``, and name it under ``patches``
in that folder's kustomization. Exit code 2: the request is wrong.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import Any

import yaml

from segpipe.config.job import Job, Runner, load_job
from segpipe.errors import RequestError, SegpipeError
from segpipe.pipeline.model_scene import dry_plan
from segpipe.runs.check import check_request

HEADROOM = 1024**3
"""Above the plan, before the container is ended: Prefect's worker and the flow, beside who computes."""


@dataclass(frozen=True)
class Wanted:
    """What the process that computes must have."""

    memory: int
    """Bytes at the peak."""
    cores: int
    gpus: int
    scene: str
    """The one that takes the most."""


def wanted(job: Job) -> Wanted:
    """The most that any scene of the job takes; of several threads, each but their libraries.

    Raises:
        RequestError: nothing to plan: a job without a model of its own to run.
        SceneError: a scene that cannot be planned.
    """
    if not job.model or job.prompts.asked:
        raise RequestError("model: this job has none to plan by its scenes; set resources by hand")
    request = check_request(job)
    at_once = job.compute.workers if job.compute.runner is Runner.threads else 1
    most = Wanted(0, 0, 0, "")
    assert request.card is not None
    for ref in request.scenes:
        each = dry_plan(job, request.card, ref, request.settings).memory
        memory = each.libraries + at_once * (each.total - each.libraries)
        if memory > most.memory:
            gpus = int(request.settings.device.startswith("cuda"))
            most = Wanted(memory, request.settings.threads, gpus, ref.name)
    return most


def container_resources(found: Wanted) -> dict[str, dict[str, Any]]:
    """Kubernetes' words for it: requests are the plan's number; the limit has room for Prefect beside it."""
    requests: dict[str, Any] = {"cpu": str(found.cores), "memory": str(found.memory)}
    limits: dict[str, Any] = {"memory": str(found.memory + HEADROOM)}
    if found.gpus:
        requests["nvidia.com/gpu"] = limits["nvidia.com/gpu"] = found.gpus
    return {"requests": requests, "limits": limits}


def patch(found: Wanted, deployment: str, container: str) -> dict[str, Any]:
    """A strategic merge patch of a Deployment."""
    holder = {"name": container, "resources": container_resources(found)}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": deployment},
        "spec": {"template": {"spec": {"containers": [holder]}}},
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", metavar="JOB.yaml")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="a.b=value")
    parser.add_argument("--deployment", default="worker-cpu")
    parser.add_argument("--container", default="worker")
    parser.add_argument("--plain", action="store_true", help="the resources alone, as infra/dask/ wants them")
    asked = parser.parse_args(arguments)
    try:
        job = load_job(asked.job, asked.overrides)
        found = wanted(job)
    except SegpipeError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, RequestError) else 1
    resources = container_resources(found)
    body = {"resources": resources} if asked.plain else patch(found, asked.deployment, asked.container)
    sys.stdout.write(f"# {job.name}: what {found.scene} takes, the largest of its scenes\n")
    if job.compute.threads == "auto":
        sys.stdout.write("# cpu: compute.threads is auto: the cores of the machine that planned\n")
    sys.stdout.write(yaml.safe_dump(body, sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
