"""An S3 server that fails by a seeded schedule: a proxy before one that does not."""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CONTROL = "/-/schedule"
"""Path of no bucket, by which the schedule is set."""
PIECES = 16
"""In which a slow answer comes."""
ERROR = '<?xml version="1.0"?><Error><Code>{}</Code><Message>{}</Message></Error>'
STATUS = {
    "error 500": (500, "InternalError", "We encountered an internal error."),
    "slow down": (503, "SlowDown", "Please reduce your request rate."),
    "forbidden": (403, "AccessDenied", "Access Denied"),
}
KINDS = (*STATUS, "reset", "reset after", "half a body", "short length", "slow answer")
"""Of faults: answers that say so; the connection cut before and after the request was carried out; a
body that ends before its length, one whose length says less than there is, and one that comes in pieces."""


class FaultyStore:
    """The proxy and the server behind it, in a process of their own: GDAL holds the lock while it waits.

    Args:
        log: File for what the process prints.
    """

    def __init__(self, log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdout=subprocess.PIPE, stderr=self._log, stdin=subprocess.DEVNULL
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().decode().strip()
        assert self.url, log.read_text()

    def _tell(self, schedule: dict[str, Any]) -> Counter[str]:
        """Replace the schedule; the faults and requests under the one before."""
        request = urllib.request.Request(self.url + CONTROL, json.dumps(schedule).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return Counter(json.load(answer))

    @contextmanager
    def failing(self, kinds: tuple[str, ...], rate: float, seed: int | str) -> Iterator[Counter[str]]:
        """Within: of the requests, this part fails, drawn by the seed; after it, the counter has them."""
        counted = Counter[str]()
        self._tell({"kinds": kinds, "rate": rate, "seed": seed})
        try:
            yield counted
        finally:
            counted.update(self._tell({}))

    def __enter__(self) -> FaultyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._log.close()


class Schedule:
    """Which request fails, and how."""

    def __init__(self, kinds: Sequence[str] = (), rate: float = 0.0, seed: int | str = 0) -> None:
        self.kinds, self.rate = kinds, rate
        self.count = Counter[str]()
        self._draw, self._lock = random.Random(seed), threading.Lock()

    def fault(self) -> str:
        """What happens to the next request; empty: nothing."""
        with self._lock:
            self.count["requests"] += 1
            kind = self._draw.choice(self.kinds) if self.kinds and self._draw.random() < self.rate else ""
            self.count[kind] += bool(kind)
            return kind


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    address = ""
    schedule = Schedule()
    protocol_version = "HTTP/1.1"

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # who asked has gone
            self.close_connection = True

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == CONTROL:
            told = json.dumps(self.schedule.count).encode()
            _Handler.schedule = Schedule(**json.loads(body))
            self._answer(200, [], told, len(told))
            return
        kind = self.schedule.fault()
        if kind in STATUS:
            status, code, message = STATUS[kind]
            text = ERROR.format(code, message).encode()
            self._answer(status, [("Content-Type", "application/xml")], text, len(text))
            return
        if kind == "reset":
            self._cut()
            return
        upstream = http.client.HTTPConnection(self.address, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        headers = [
            (key, value)
            for key, value in answer.getheaders()
            if key.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server")
        ]
        length = len(data) if self.command != "HEAD" else int(answer.getheader("Content-Length") or 0)
        if kind == "reset after":
            self._cut()
        elif kind == "half a body" and len(data) > 1:
            self._answer(answer.status, headers, data[: len(data) // 2], length)
            self._cut()
        elif kind == "short length" and len(data) > 1:
            self._answer(answer.status, headers, data[: len(data) // 2], length // 2)
        else:
            self._answer(answer.status, headers, data, length, slow=kind == "slow answer")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, length: int, slow: bool = False
    ) -> None:
        self.send_response(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        step = max(1, -(-len(data) // PIECES)) if slow else max(1, len(data))
        for start in range(0, len(data), step):
            self.wfile.write(data[start : start + step])
            time.sleep(0.002 if slow else 0)

    def _cut(self) -> None:
        """End the connection by a reset."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def serve() -> None:
    """Start both, print the proxy's address, and answer until the process is ended."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    _Handler.address = f"{host}:{port}"
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    proxy.daemon_threads = True
    print(f"http://127.0.0.1:{proxy.server_address[1]}", flush=True)
    proxy.serve_forever()


if __name__ == "__main__":
    serve()
