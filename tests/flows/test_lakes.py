"""A lake in an object store, scanned by deployments on a real server and worker."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pytest
import rasterio
from obstore.store import S3Store
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings

from segpipe.tables.record import RunRecord, load_record
from tests.services.loopback import Services

ROOT = Path(__file__).parents[2]
SCENE = ROOT.parent / "shared" / "data" / "nc_landsat" / "landsat_multiband.tif"
EDGE = 96
"""Of the pieces of the scene, in pixels."""
SECONDS = 600

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCENE.exists(), reason=f"the Landsat scene is not there ({SCENE})"),
]


@pytest.fixture(params=["sqlite", "postgres"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    """Server, object store and a worker, with every deployment of infra/prefect.yaml."""
    if (
        request.param == "postgres"
        and not shutil.which("pg_ctl")
        and not list(Path("/usr/lib/postgresql").glob("*"))
    ):
        pytest.skip("no PostgreSQL here: install the Debian package postgresql")
    with Services(
        tmp_path / "services",
        database=request.param,
        parts=("prefect", "store", "worker"),
        pools=("cpu", "gpu"),
    ) as started:
        prefect = Path(sys.executable).with_name("prefect")
        for command in (
            ["infra/pools.sh"],
            [prefect, "--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml"],
        ):
            environment = {**started.environment, "PATH": f"{prefect.parent}:{started.environment['PATH']}"}
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
        yield started


@pytest.fixture
def client(services: Services) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: services.api}), get_client(sync_client=True) as found:
        yield found


def bucket(services: Services, name: str) -> S3Store:
    variables = services.variables
    return S3Store(
        name,
        endpoint=variables["AWS_ENDPOINT_URL"],
        access_key_id=variables["AWS_ACCESS_KEY_ID"],
        secret_access_key=variables["AWS_SECRET_ACCESS_KEY"],
        region=variables.get("AWS_REGION", "us-east-1"),
        client_options={"allow_http": True},
    )


def pieces(folder: Path, first: int, count: int) -> list[Path]:
    """Pieces of the Landsat scene, each from another place and under a new name."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(11)
    corners = [(int(rng.integers(0, 347)), int(rng.integers(0, 393))) for _ in range(first + count)]
    found = []
    with rasterio.open(SCENE) as scene:
        for number in range(first, first + count):
            row, column = corners[number]
            window = rasterio.windows.Window(column, row, EDGE, EDGE)
            profile = {
                k: v for k, v in scene.profile.items() if k not in ("blockxsize", "blockysize", "tiled")
            }
            profile |= {"width": EDGE, "height": EDGE, "transform": scene.window_transform(window)}
            found.append(folder / f"piece_{number:03}.tif")
            with rasterio.open(found[-1], "w", **profile) as piece:
                piece.write(scene.read(window=window))
    return found


def upload(store: S3Store, files: Sequence[Path]) -> None:
    for path in files:
        obstore.put(store, f"arrivals/{path.name}", path)


def start(client: SyncPrefectClient, **changes: Any) -> FlowRun:
    """A run of the deployment `scan`, as a schedule or the form starts it."""
    deployment = client.read_deployment_by_name("scan/scan")
    asked = {
        "name": "nightly",
        "lake": {"location": "s3://lake/arrivals", "settle_seconds": 0},
        "model": str(ROOT / "configs/models/landcover-unet.yaml"),
        "bands": ["blue", "green", "red", "nir", "swir16"],
        "outputs": {"dir": "s3://runs"},
        "compute": {"device": "cpu", "threads": "1"},
        **changes,
    }
    return client.create_flow_run_from_deployment(deployment.id, parameters={"scan": asked})


def ended(client: SyncPrefectClient, run: FlowRun) -> Any:
    """A flow run's final state."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        state = client.read_flow_run(run.id).state
        if state is not None and state.is_final():
            print(f"{state.name}: {state.message}")
            return state
        time.sleep(0.5)
    raise AssertionError(f"no final state within {SECONDS} s")


def runs(services: Services) -> list[RunRecord]:
    """Ended runs, the oldest first."""
    store = bucket(services, "runs")
    paths = [
        m["path"] for page in obstore.list(store, "nightly") for m in page if m["path"].endswith("/run.json")
    ]
    return [load_record(bytes(obstore.get(store, path).bytes())) for path in sorted(paths)]


def shards(services: Services) -> dict[str, Any]:
    """Predicted shards with their ETag and time."""
    pages = obstore.list(bucket(services, "runs"), ".store")
    found = [m for page in pages for m in page if "/labels/c/" in m["path"] and "predict-" in m["path"]]
    return {m["path"]: m["last_modified"] for m in found}


def test_a_lake_over_several_scans(services: Services, client: SyncPrefectClient, tmp_path: Path) -> None:
    lake = bucket(services, "lake")
    upload(lake, pieces(tmp_path / "pieces", 0, 50))
    state = ended(client, start(client))
    assert state.is_completed()
    assert state.message.startswith("50 done, 50 new; report: s3://runs/nightly/")
    (first,) = runs(services)
    assert sorted(s.name for s in first.done) == [f"piece_{n:03}" for n in range(50)]
    before = shards(services)
    assert len(before) == 50

    upload(lake, pieces(tmp_path / "pieces", 50, 10))
    state = ended(client, start(client))
    assert state.is_completed()
    assert state.message.startswith("10 done, 10 new, 50 done before; report: ")
    assert sorted(s.name for s in runs(services)[1].done) == [f"piece_{n:03}" for n in range(50, 60)]
    after = shards(services)
    assert len(after) == 60
    assert {path: at for path, at in after.items() if path in before} == before  # none computed again

    damaged = pieces(tmp_path / "damaged", 60, 5)
    damaged[0].write_bytes(damaged[0].read_bytes()[:2000])
    damaged[1].write_bytes(b"II*\0" + bytes(400))
    upload(lake, damaged)
    state = ended(client, start(client))
    assert state.is_failed()
    assert state.message.startswith("2 failed, 2 of them in quarantine (piece_060: ")
    assert "; 3 done, 5 new, 60 done before" in state.message
    assert sorted(s.name for s in runs(services)[2].failed) == ["piece_060", "piece_061"]
    state = ended(client, start(client))
    assert state.is_completed()
    assert state.message == "nothing to do: 63 done before, 2 in quarantine"


def test_two_scans_started_at_once(services: Services, client: SyncPrefectClient, tmp_path: Path) -> None:
    """One by the worker, one by the command line: together they do each scene once."""
    upload(bucket(services, "lake"), pieces(tmp_path / "pieces", 0, 40))
    run = start(client)
    parameters = client.read_flow_run(run.id).parameters["scan"]
    file = tmp_path / "scan.yaml"
    file.write_text(json.dumps(parameters))
    other = subprocess.run(
        [sys.executable, "-m", "segpipe.cli", "scan", str(file)],
        cwd=ROOT, env=services.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert other.returncode == 0, other.stderr
    print(other.stdout.splitlines()[-1])
    assert ended(client, run).is_completed()
    done = [scene.name for record in runs(services) for scene in record.done]
    assert sorted(done) == [f"piece_{n:03}" for n in range(40)]
    assert len(shards(services)) == 40
    assert ended(client, start(client)).message == "nothing to do: 40 done before"
