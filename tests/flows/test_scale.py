"""Runners by configuration, what a cluster is asked before work, and blocks that somebody else computed."""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from dask_jobqueue.slurm import SLURMCluster
from dask_kubernetes.operator import KubeCluster  # type: ignore[import-untyped]
from distributed import Client, LocalCluster, Scheduler
from prefect import flow, task
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_dask.task_runners import DaskTaskRunner
from pydantic import ValidationError

from segpipe.config.card import read_card
from segpipe.config.job import Compute, Runner
from segpipe.errors import RequestError, StoppedError
from segpipe.inference.settings import Settings
from segpipe.pipeline.model_scene import Scene, create_stages, prepare_scene
from segpipe.pipeline.predict import predict_blocks
from segpipe.runs.check import check_request
from segpipe.store.stop import StopToken
from segpipe.tiling.windows import block_id
from segpipe_flows import runners
from segpipe_flows.runners import check_cluster, placed, task_runner
from segpipe_flows.server import free_port
from tests.flows.conftest import JobMaker, load
from tests.flows.nets import object_store, started

ON_CPU = Settings("cpu", "cpu-avx2-t1", "fp32", 1, 1, False)
ON_GPU = Settings("cuda", "A GPU", "bf16", 8, 1, False)


@pytest.fixture(scope="module")
def gpu_cluster() -> Iterator[LocalCluster]:
    """One process of two threads that offers one GPU."""
    with LocalCluster(  # type: ignore[no-untyped-call]
        n_workers=1, threads_per_worker=2, dashboard_address=":0", resources={"GPU": 1}
    ) as found:
        yield found


@pytest.fixture(scope="module")
def other_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A scheduler without workers."""
    with LocalCluster(n_workers=0, dashboard_address=":0") as found:  # type: ignore[no-untyped-call]
        yield found


@contextmanager
def other_worker(cluster: LocalCluster, folder: Path) -> Iterator[None]:
    """A worker that has no GPU, and believes that zarr is 1.2.3."""
    site = folder / "zarr-1.2.3.dist-info"
    site.mkdir()
    (site / "METADATA").write_text("Metadata-Version: 2.1\nName: zarr\nVersion: 1.2.3\n")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [str(Path(sys.executable).with_name("dask")), "worker", cluster.scheduler_address]
    command += ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
    with (
        started(command, {**os.environ, "PYTHONPATH": path}, folder / "worker.log"),
        cluster.get_client() as client,  # type: ignore[no-untyped-call]
    ):
        client.wait_for_workers(1, timeout=120)
        yield


def at(address: str, **fields: int) -> Compute:
    return Compute(runner=Runner.dask, address=address, workers=2, **fields)


# -- which runner --------------------------------------------------------------------------------


def test_slurm_by_configuration_alone(on_server: SyncPrefectClient, tmp_path: Path) -> None:
    """The script that goes to sbatch asks for what the file says."""
    settings = {"queue": "gpu", "cores": 4, "memory": "16GB", "processes": 1, "walltime": "02:00:00"}
    file = tmp_path / "slurm.yaml"
    file.write_text(yaml.safe_dump({**settings, "worker_extra_args": ["--resources GPU=1"]}))
    compute = Compute(runner=Runner.slurm, workers=9, least=2, cluster=str(file))
    check_cluster(compute, ON_GPU)
    runner = task_runner(compute)
    assert isinstance(runner, DaskTaskRunner)
    assert runner.cluster_class == "dask_jobqueue.SLURMCluster"
    assert runner.adapt_kwargs == {"minimum": 2, "maximum": 9}
    with SLURMCluster(**{**runner.cluster_kwargs, "n_workers": 0}) as cluster:
        script = cluster.job_script()
    for line in ("#SBATCH -p gpu", "#SBATCH --cpus-per-task=4", "#SBATCH --mem=15G", "#SBATCH -t 02:00:00"):
        assert line in script
    assert "--resources GPU=1" in script


def test_kubernetes_by_configuration_alone(on_server: SyncPrefectClient, tmp_path: Path) -> None:
    file = tmp_path / "kubernetes.yaml"
    file.write_text("namespace: maps\nimage: registry.example/segpipe:1\n")
    runner = task_runner(Compute(runner=Runner.kubernetes, workers=5, cluster=str(file)))
    assert isinstance(runner, DaskTaskRunner)
    assert runner.resolved_cluster_class is KubeCluster  # the package has it under this path
    given = {"namespace": "maps", "image": "registry.example/segpipe:1", "n_workers": 5}
    assert runner.cluster_kwargs == given
    assert runner.adapt_kwargs == {}


@pytest.mark.skipif(importlib.util.find_spec("dask_cuda") is not None, reason="dask-cuda is installed here")
def test_a_missing_package_is_named_with_its_extra(on_server: SyncPrefectClient) -> None:
    with pytest.raises(RequestError, match=r"runner: dask-cuda needs dask-cuda.*'segpipe\[cuda\]'"):
        task_runner(Compute(runner=Runner.dask_cuda))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("n_workers: 3\n", "`n_workers` is set by segpipe: give compute.workers instead"),
        ("- 1\n", "a mapping of keys was expected"),
        (None, "does not exist"),
    ],
)
def test_settings_of_a_cluster_that_cannot_be_used(
    on_server: SyncPrefectClient, tmp_path: Path, text: str | None, told: str
) -> None:
    file = tmp_path / "cluster.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError, match=told) as found:
        task_runner(Compute(runner=Runner.slurm, cluster=str(file)))
    assert "cluster.yaml" in str(found.value)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"address": "tcp://host:8786"}, "compute.address needs compute.runner: dask"),
        ({"cluster": "a.yaml"}, "compute.cluster is of no use with compute.runner: threads"),
        ({"runner": "dask", "address": "tcp://h:1", "cluster": "a.yaml"}, "of no use with compute.address"),
        ({"least": 1}, "found 1 with runner: threads; valid: 0"),
        ({"runner": "slurm", "least": 3, "workers": 2}, "found 3; valid: up to compute.workers, 2"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Compute.model_validate(fields)


# -- what a cluster is asked ---------------------------------------------------------------------


def test_nobody_at_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "ANSWER_SECONDS", 1.0)
    address = f"tcp://127.0.0.1:{free_port()}"
    with pytest.raises(RequestError, match=f"no Dask scheduler answers at {address}"):
        check_cluster(at(address), ON_CPU)


def test_a_cluster_is_asked_for_workers_gpus_and_versions(
    on_server: SyncPrefectClient, other_cluster: LocalCluster, tmp_path: Path
) -> None:
    address = other_cluster.scheduler_address
    with pytest.raises(RequestError, match=f"the Dask scheduler at {address} has no workers"):
        check_cluster(at(address), ON_CPU)
    check_cluster(at(address, least=1), ON_CPU)  # it scales
    with other_worker(other_cluster, tmp_path):
        with pytest.raises(RequestError, match=r"none of the 1 workers at \S+ offers the resource GPU"):
            check_cluster(at(address), ON_GPU)
        with pytest.raises(RequestError, match=r"worker tcp://\S+ has zarr 1\.2\.3 \(here 3\.\d+\.\d+\)"):
            check_cluster(at(address), ON_CPU)


def test_workers_that_do_not_reach_the_prefect_server(
    on_server: SyncPrefectClient, gpu_cluster: LocalCluster
) -> None:
    compute = at(gpu_cluster.scheduler_address)
    check_cluster(compute, ON_GPU)
    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}),
        pytest.raises(RequestError, match="does not reach the Prefect server at"),
    ):
        check_cluster(compute, ON_CPU)


def test_a_cluster_to_be_made_must_offer_gpus(tmp_path: Path) -> None:
    """Else Dask would wait for ever."""
    with pytest.raises(RequestError, match=r"compute\.cluster: not given: .* add e\.g\. `worker_command"):
        check_cluster(Compute(runner=Runner.kubernetes), ON_GPU)
    check_cluster(Compute(runner=Runner.kubernetes), ON_CPU)
    check_cluster(Compute(runner=Runner.dask), ON_GPU)  # a slot for each worker


@task
def nap(number: int) -> tuple[float, float]:
    begun = time.time()
    time.sleep(0.2)
    return begun, time.time()


def restrictions(dask_scheduler: Scheduler) -> list[dict[str, float]]:
    """Runs in the scheduler: the resources that its tasks ask for."""
    return [dict(state.resource_restrictions or {}) for state in dask_scheduler.tasks.values()]


@pytest.mark.slow
def test_one_task_at_a_time_for_each_gpu(on_server: SyncPrefectClient, gpu_cluster: LocalCluster) -> None:
    """The worker has two threads and one GPU: tasks that are placed take turns, others ask for nothing."""
    compute = at(gpu_cluster.scheduler_address)

    @flow(task_runner=task_runner(compute))
    def naps(settings: Settings) -> tuple[list[tuple[float, float]], list[dict[str, float]]]:
        with placed(compute, settings):
            futures = [nap.submit(number) for number in range(3)]
        spans = sorted(future.result() for future in futures)
        with Client(compute.address) as client:  # type: ignore[no-untyped-call]
            return spans, client.run_on_scheduler(restrictions)

    spans, asked = naps(ON_GPU)
    assert asked == 3 * [{"GPU": 1}]
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert naps(ON_CPU)[1] == 3 * [{}]


# -- blocks that are there already ---------------------------------------------------------------


@pytest.fixture
def scene(flow_job: JobMaker) -> Callable[[str], Scene]:
    """``scene(out)``: one scene of 16 blocks, nothing computed."""

    def make(out: str) -> Scene:
        job = load(flow_job("job"))
        job = job.model_copy(update={"outputs": job.outputs.model_copy(update={"dir": out})})
        request = check_request(job)
        return create_stages(prepare_scene(job, read_card(job.model), request.scenes[0], request.settings))

    return make


def test_a_batch_that_is_sent_again_keeps_what_has_a_receipt(
    scene: Callable[[str], Scene], tmp_path: Path
) -> None:
    """Dask sends a lost worker's batch again with the same run count: attempt 1."""
    s = scene(str(tmp_path / "runs"))
    blocks = list(s.plan.blocks.indices())
    begun = time.time()
    assert predict_blocks(s, blocks[:5]).computed == 5
    before = s.predict.receipts()
    done = predict_blocks(s, blocks[:9])
    assert (done.computed, done.reused) == (4, 5)
    after = s.predict.receipts()
    assert {name: after[name] for name in before} == before
    for receipt in after.values():
        assert receipt["worker"] == f"{socket.gethostname()}:{os.getpid()}"
        assert begun - 0.01 <= receipt["begun"] <= receipt["time"] <= time.time() + 0.01
    seconds = sum(after[block_id(i)]["seconds"] for i in blocks[5:9])
    assert seconds == pytest.approx(done.timings["forward"], rel=0.5)
    again = predict_blocks(s, blocks[:9])
    assert (again.computed, again.reused) == (0, 9)


def test_a_block_that_somebody_computes_meanwhile_is_not_computed_again(
    scene: Callable[[str], Scene], tmp_path: Path
) -> None:
    """The last blocks of a batch are computed by another when the first of it is done."""
    s = scene(str(tmp_path / "runs"))
    blocks = list(s.plan.blocks.indices())
    between: dict[str, dict[str, object]] = {}

    def meanwhile(finished: int) -> None:
        if finished == 1:
            assert predict_blocks(s, blocks[-3:]).computed == 3
            between.update(s.predict.receipts())

    done = predict_blocks(s, blocks, progress=meanwhile)
    assert (done.computed, done.reused) == (13, 3)
    after = s.predict.receipts()
    assert len(after) == 16
    assert {name: after[name] for name in between} == between
    s.predict.compact()
    assert predict_blocks(s, blocks).computed == 0


def test_a_stop_in_a_bucket(
    scene: Callable[[str], Scene], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store is an object store: a stop is seen there, and what is committed stays."""
    with object_store("127.0.0.1", "runs", tmp_path / "moto.log") as keys:
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        out = f"s3://runs/{tmp_path.name}"  # clients of a location are kept
        s = scene(out)
        blocks = list(s.plan.blocks.indices())

        def stop(finished: int) -> None:
            if finished == 2:
                StopToken(out, "run").request()

        with pytest.raises(StoppedError):
            predict_blocks(s, blocks, StopToken(out, "run"), progress=stop)
        kept = s.predict.receipts()
        assert 2 <= len(kept) < len(blocks)
        done = predict_blocks(s, blocks)
        assert (done.computed, done.reused) == (16 - len(kept), len(kept))
