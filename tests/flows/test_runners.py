"""Law 1 over runners: the same bytes and tables from threads and from Dask, whatever the workers."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.task_runners import ThreadPoolTaskRunner
from prefect_dask.task_runners import DaskTaskRunner

from segpipe.cli.main import execute
from segpipe.config.card import read_card
from segpipe.config.job import Compute, Runner
from segpipe.errors import RequestError
from segpipe.export.run_folder import RunFolder
from segpipe.pipeline.model_scene import create_stages, prepare_scene
from segpipe.pipeline.predict import predict_blocks
from segpipe.runs.check import check_request
from segpipe_flows.runners import task_runner
from segpipe_flows.segment import segment
from tests.flows.conftest import JobMaker, load, record_of, results_of


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    """A Dask cluster of somebody else's: two processes of one thread."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as found:
        yield found


@pytest.fixture
def by_threads(on_server: SyncPrefectClient, flow_job: JobMaker) -> dict[str, bytes]:
    """The answer of one thread, block by block."""
    job = load(flow_job("threads"))
    assert segment(job, return_state=True).is_completed()
    return results_of(job)


def models_loaded() -> list[int]:
    """Runs in a Dask worker: identities of the models its process holds."""
    from segpipe.models import registry

    return [id(model) for model in registry._models.values()]


def test_two_workers_of_threads_give_the_same_bytes(by_threads: dict[str, bytes], flow_job: JobMaker) -> None:
    job = load(flow_job("two", compute={"workers": 2, "batch_minutes": 0.01}, tiling={"block": 128}))
    assert segment(job, return_state=True).is_completed()
    assert results_of(job) == by_threads


@pytest.mark.slow
def test_a_cluster_at_an_address_gives_the_same_bytes_and_loads_each_model_once(
    by_threads: dict[str, bytes], flow_job: JobMaker, cluster: LocalCluster
) -> None:
    compute = {"runner": "dask", "address": cluster.scheduler_address, "workers": 2, "batch_minutes": 0.01}
    job = load(flow_job("address", compute=compute))
    assert segment(job, return_state=True).is_completed()
    assert results_of(job) == by_threads
    assert {s.name: s.state for s in record_of(job).scenes} == {"scene_0": "done", "scene_1": "done"}
    with cluster.get_client() as client:
        before: dict[str, list[int]] = client.run(models_loaded)
        assert [len(models) for models in before.values()] == [1, 1]
        again = load(flow_job("address-again", compute=compute, tiling={"block": 128}))
        assert segment(again, return_state=True).is_completed()
        assert client.run(models_loaded) == before
    assert results_of(again) == by_threads


@pytest.mark.slow
def test_a_local_cluster_gives_the_same_bytes(by_threads: dict[str, bytes], flow_job: JobMaker) -> None:
    job = load(flow_job("local", compute={"runner": "dask", "workers": 2, "batch_minutes": 0.01}))
    assert segment(job, return_state=True).is_completed()
    assert results_of(job) == by_threads


def test_no_pixels_travel(flow_job: JobMaker) -> None:
    """What goes to a worker and comes back is a few kilobytes, whatever the scene's size."""
    job = load(flow_job("small"))
    request = check_request(job)
    scene = create_stages(prepare_scene(job, read_card(job.model), request.scenes[0], request.settings))
    blocks = list(scene.plan.blocks.indices())
    done = predict_blocks(scene, blocks)
    assert len(pickle.dumps((scene, blocks))) < 10_000
    assert len(pickle.dumps(done)) < 1_000
    assert len(pickle.dumps(RunFolder("out", "job", "run", "now"))) < 1_000


def test_dask_without_a_server_is_refused_in_one_line(
    flow_job: JobMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    path = flow_job("refused", compute={"runner": "dask"})
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        with pytest.raises(RequestError, match="needs a running Prefect server"):
            task_runner(load(path).compute)
        assert execute(["run", str(path)]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1
    assert told[0].startswith("error: compute.runner: dask needs a running Prefect server")
    assert not [file for file in Path(load(path).outputs.dir).rglob("*") if file.is_file()]


@pytest.mark.parametrize(
    ("compute", "kind", "has"),
    [
        (Compute(workers=3), ThreadPoolTaskRunner, lambda r: r._max_workers >= 2 * 3),
        (
            Compute(runner=Runner.dask, workers=3),
            DaskTaskRunner,
            lambda r: r.cluster_kwargs["n_workers"] == 3,
        ),
        (
            Compute(runner=Runner.dask, address="tcp://host:8786"),
            DaskTaskRunner,
            lambda r: r.address == "tcp://host:8786",
        ),
    ],
)
def test_the_runner_that_a_job_asks_for(
    compute: Compute, kind: type, has: Callable[[Any], bool], on_server: SyncPrefectClient
) -> None:
    runner = task_runner(compute)
    assert isinstance(runner, kind)
    assert has(runner)
