"""Real servers for the tests of lakes: an object store and a STAC API, each a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import rasterio

from segpipe_flows.server import free_port


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert process.poll() is None, f"{process.args} has ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError:
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.fixture(scope="session")
def object_store() -> Iterator[str]:
    """The address of moto's S3 server."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/moto-api", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def s3(object_store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """boto3's client of that server, with an empty bucket ``lake``; the environment says the same."""
    for key, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    for key in ("AWS_S3_ENDPOINT", "AWS_HTTPS", "AWS_VIRTUAL_HOSTING", "AWS_PROFILE"):
        monkeypatch.delenv(key, raising=False)
    client = boto3.client("s3", endpoint_url=object_store, region_name="us-east-1")
    client.create_bucket(Bucket="lake")
    yield client
    urllib.request.urlopen(urllib.request.Request(f"{object_store}/moto-api/reset", method="POST"))


@pytest.fixture
def stac_api(tmp_path: Path) -> Iterator[Callable[[list[dict[str, Any]]], str]]:
    """Starts a STAC API (rustac) with these items, and returns its address."""
    running = []

    def serve(items: list[dict[str, Any]]) -> str:
        file = tmp_path / "items.json"
        file.write_text(json.dumps({"type": "FeatureCollection", "features": items}))
        address = f"127.0.0.1:{free_port()}"
        command = [str(Path(sys.executable).parent / "rustac"), "serve", "--addr", address]
        process = subprocess.Popen(
            [*command, "--create-collections", str(file)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        running.append(process)
        wait_for(f"http://{address}/", process)
        return f"http://{address}/"

    yield serve
    for process in running:
        process.terminate()
        process.wait(30)


@pytest.fixture
def write_cog() -> Callable[..., np.ndarray]:
    """Writes a small Cloud Optimized GeoTIFF of random values, (y, x), and returns them."""

    def write(path: Path, seed: int = 0, **change: Any) -> np.ndarray:
        values = np.random.default_rng(seed).integers(0, 4000, (300, 400), dtype=np.uint16)
        path.parent.mkdir(parents=True, exist_ok=True)
        profile = {
            "driver": "COG", "dtype": "uint16", "count": 1, "height": 300, "width": 400, "crs": "EPSG:32616",
            "transform": rasterio.Affine(30, 0, 500_000, 0, -30, 4_000_000), "BLOCKSIZE": 128, **change,
        }  # fmt: skip
        with rasterio.open(path, "w", **profile) as dataset:
            dataset.write(values, 1)
        return values

    return write
