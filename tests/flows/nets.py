"""Processes of a cluster, each on a network of its own where this machine allows, and an object store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from segpipe_flows.server import free_port

ROOT = Path(__file__).parents[2]


@dataclass
class Net:
    """A bridge with namespaces on it, or, where these cannot be made, loopback alone."""

    host: str
    """Address of this process, valid for all."""
    spaces: dict[str, str] = field(default_factory=dict)
    """Address of each namespace, by name."""

    def inside(self, number: int) -> tuple[list[str], str]:
        """What to put before a command so that it runs on network ``number``, and its address there."""
        if not self.spaces:
            return [], self.host
        name, address = list(self.spaces.items())[number]
        return ["ip", "netns", "exec", name], address


@contextmanager
def networks(count: int) -> Iterator[Net]:
    """``count`` network namespaces joined by a bridge; needs root and iproute2, else it is loopback."""
    with ExitStack() as stack:
        made = ExitStack()
        try:
            net = _bridged(count, made)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no network namespaces here ({error}): plain processes on loopback")
            made.close()
            net = Net("127.0.0.1")
        stack.push(made)
        yield net


def _bridged(count: int, stack: ExitStack) -> Net:
    mark = os.getpid() % 100_000
    bridge, net = f"sgb{mark}", f"10.{200 + mark % 50}.{mark // 50 % 250}"
    _ip("link", "add", bridge, "type", "bridge")
    stack.callback(_ip, "link", "del", bridge)
    _ip("addr", "add", f"{net}.1/24", "dev", bridge)
    _ip("link", "set", bridge, "up")
    spaces = {}
    for number in range(count):
        name, outer, inner = f"sgn{mark}-{number}", f"sgo{mark}-{number}", f"sgi{mark}-{number}"
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "del", name)  # its end of the cable goes with it
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", name)
        _ip("link", "set", outer, "master", bridge, "up")
        spaces[name] = f"{net}.{number + 2}"
        _ip("-n", name, "addr", "add", f"{spaces[name]}/24", "dev", inner)
        _ip("-n", name, "link", "set", inner, "up")
        _ip("-n", name, "link", "set", "lo", "up")
    return Net(f"{net}.1", spaces)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this environment's tools; killed at the end if it is still there."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@contextmanager
def object_store(host: str, bucket: str, log: Path) -> Iterator[dict[str, str]]:
    """A real S3 server with a bucket; yields the environment that leads to it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", host, "-p", str(port)]
    with started(command, dict(os.environ), log):
        url = f"http://{host}:{port}"
        end = time.monotonic() + 60
        while not _made(f"{url}/{bucket}"):
            assert time.monotonic() < end, f"moto_server does not answer: {log.read_text()}"
            time.sleep(0.2)
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def _made(url: str) -> bool:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError):
        return False


@dataclass
class DaskCluster:
    """A scheduler and workers that are processes of their own."""

    address: str
    workers: list[subprocess.Popen[bytes]]


@contextmanager
def dask_cluster(net: Net, count: int, environment: dict[str, str], folder: Path) -> Iterator[DaskCluster]:
    """A scheduler on network 0 and workers of one thread on 1 … ``count``; what is killed stays so."""
    dask = str(Path(sys.executable).with_name("dask"))
    enter, host = net.inside(0)
    port = 8786 if net.spaces else free_port()
    address = f"tcp://{host}:{port}"
    with ExitStack() as stack:
        command = [*enter, dask, "scheduler", "--host", host, "--port", str(port), "--no-dashboard"]
        stack.enter_context(started(command, environment, folder / "scheduler.log"))
        workers = []
        for number in range(1, count + 1):
            enter, host = net.inside(number)
            command = [*enter, dask, "worker", address, "--host", host, "--nthreads", "1", "--no-nanny"]
            command += ["--no-dashboard", "--local-directory", str(folder / f"worker-{number}")]
            log = folder / f"worker-{number}.log"
            workers.append(stack.enter_context(started(command, environment, log)))
        yield DaskCluster(address, workers)
