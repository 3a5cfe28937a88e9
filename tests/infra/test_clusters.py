"""Settings of Dask clusters, held against the classes that take them and what these make of them."""

from __future__ import annotations

import inspect
import shlex
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from dask_jobqueue.slurm import SLURMCluster, SLURMJob
from dask_kubernetes.operator import KubeCluster, make_cluster_spec
from dask_kubernetes.operator.controller import controller
from distributed import LocalCluster, Worker
from distributed.cli.dask_worker import main as dask_worker

from segpipe.config.job import Compute, Runner
from segpipe_flows.runners import cluster_arguments

FOLDER = Path(__file__).parents[2] / "infra" / "dask"
KUBERNETES = "1.34"
OFFERED = Runner.dask_cuda, Runner.slurm


def arguments(name: str, runner: Runner) -> dict[str, Any]:
    """As a job takes them: the runner refuses what it sets itself."""
    return cluster_arguments(Compute(runner=runner, cluster=str(FOLDER / name)))


def parameters(*classes: Any) -> set[str]:
    return {name for each in classes for name in inspect.signature(each).parameters}


def validate(cluster: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the operator's controller makes of a DaskCluster, each held against Kubernetes' schema."""
    name, spec = cluster["metadata"]["name"], cluster["spec"]
    scheduler, worker = spec["scheduler"], spec["worker"]
    made = {
        "scheduler": controller.build_scheduler_deployment_spec(name, scheduler["spec"], {}, {}),
        "service": controller.build_scheduler_service_spec(name, scheduler["service"], {}, {}),
        "worker": controller.build_worker_deployment_spec(
            f"{name}-default", "segpipe", name, "0123456789", worker["spec"], {}, {}
        ),
    }
    for document in made.values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    selector = made["service"]["spec"]["selector"]
    assert selector.items() <= made["scheduler"]["spec"]["template"]["metadata"]["labels"].items()
    return made


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


def worker_options(command: list[str]) -> dict[str, Any]:
    """What Dask's own command line reads."""
    assert command[:2] == ["dask", "worker"]
    options: dict[str, Any] = dask_worker.make_context("worker", list(command[2:])).params
    return options


def test_a_kubernetes_cluster_is_what_the_operator_takes() -> None:
    found = arguments("kubernetes.yaml", Runner.kubernetes)
    assert found.keys() <= parameters(KubeCluster)
    taken = parameters(make_cluster_spec) - {"name"}
    spec = make_cluster_spec("segpipe-0123", n_workers=3, **{k: v for k, v in found.items() if k in taken})
    made = validate(spec)
    assert spec["spec"]["worker"]["replicas"] == 3 and spec["spec"]["idleTimeout"] == 600
    worker = container(made["worker"])
    assert worker["resources"] == found["resources"]
    assert worker_options(worker["args"])["nthreads"] == 1
    variables = {v["name"]: v for v in worker["env"]}
    assert variables["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"]["name"] == "segpipe-prefect"
    assert "value" not in variables["AWS_SECRET_ACCESS_KEY"]


def test_a_kubernetes_cluster_of_gpus_has_them_in_its_workers_alone() -> None:
    found = arguments("kubernetes-gpu.yaml", Runner.kubernetes)
    assert found.keys() <= parameters(KubeCluster)
    made = validate(found["custom_cluster_spec"])
    worker = container(made["worker"])
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert worker_options(worker["args"])["resources"] == "GPU=1"
    assert made["worker"]["spec"]["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert "nvidia.com/gpu" not in str(container(made["scheduler"])["resources"])


def test_a_slurm_job_asks_for_a_gpu_and_its_worker_offers_it() -> None:
    found = arguments("slurm.yaml", Runner.slurm)
    assert found.keys() <= parameters(SLURMCluster, SLURMJob, SLURMJob.__mro__[1])
    text = SLURMJob("tcp://head:8786", name="worker", **found).job_script()
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for line in ("-p gpu", "-n 1", "--cpus-per-task=8", "--mem=32G", "-t 04:00:00", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in header, line
    (command,) = [line for line in text.splitlines() if "distributed.cli.dask_worker" in line]
    words = shlex.split(command)
    options = worker_options(["dask", "worker", *words[words.index("-m") + 2 :]])
    assert options["scheduler"] == "tcp://head:8786"
    assert (options["resources"], options["nthreads"], options["death_timeout"]) == ("GPU=1", 1, "300")
    assert options["lifetime"] == "230m", "it goes before the batch system ends it"


def test_a_cluster_of_this_machines_gpus_is_what_dask_takes() -> None:
    found = arguments("cuda.yaml", Runner.dask_cuda)
    own = {"device_memory_limit", "CUDA_VISIBLE_DEVICES"}  # LocalCUDACluster's; the rest goes to LocalCluster
    assert found.keys() - own <= parameters(LocalCluster, Worker)
    assert found["resources"] == {"GPU": 1} and found["threads_per_worker"] == 1


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.name)
def test_settings_are_a_flat_mapping_without_secrets(path: Path) -> None:
    found = yaml.safe_load(path.read_text())
    assert isinstance(found, dict) and all(isinstance(key, str) for key in found)
    assert not [key for key in found if key in ("env_extra", "password", "security")]
