"""A Prefect server with pools and deployments as infra/ makes them, workers, and who is told of failures."""

from __future__ import annotations

import asyncio
import email
import email.policy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from segpipe_flows.server import free_port
from tests.flows.conftest import wait_until
from tests.signals import enable_ctrl_c

ROOT = Path(__file__).parents[2]
PATIENCE = 900.0
"""Seconds until a test gives up: a run's process has libraries to load on a busy machine."""


@dataclass
class Stack:
    """The server, as a person at a terminal and as a program sees it."""

    environment: dict[str, str]
    home: Path
    """Folder in which runs start."""
    client: SyncPrefectClient

    def command(self, *words: str, **more: str) -> str:
        """What a command of the repository's root says on standard output, which must succeed."""
        done = subprocess.run(
            words, cwd=ROOT, env={**self.environment, **more}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def ended(self, run: FlowRun) -> FlowRun:
        """The run, once it is in a final state."""

        def final() -> FlowRun | None:
            found = self.client.read_flow_run(run.id)
            return found if found.state is not None and found.state.is_final() else None

        found: FlowRun = wait_until(final, PATIENCE, f"the end of {run.name}")
        return found

    @contextmanager
    def worker(self, pool: str, *options: str) -> Iterator[None]:
        """`prefect worker start --pool …` as a process, ended with all that it started."""
        command = ["prefect", "worker", "start", "--pool", pool, *options]
        with (self.home / f"worker-{pool}.log").open("w") as log:
            # its SIGTERM is a SIGINT to what it starts
            process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, cwd="/", preexec_fn=enable_ctrl_c
            )
            try:
                yield
            finally:
                process.terminate()
                process.wait(60)


@contextmanager
def stack(folder: Path) -> Iterator[Stack]:
    """A server of its own, with what `infra/pools.sh` and `prefect deploy --all` leave there."""
    from tests.services.loopback import Services

    home = folder / "home"
    home.mkdir()
    with Services(folder / "services", parts=("prefect",), pools=()) as services:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**services.environment, "PATH": path, "SEGPIPE_HOME": str(home), "SEGPIPE_GPUS": "1"}
        settings = {PREFECT_API_URL: services.api, PREFECT_HOME: services.home}
        with temporary_settings(settings), get_client(sync_client=True) as client:
            made = Stack(environment, home, client)
            made.command("infra/pools.sh")
            made.command("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml")
            yield made


@dataclass
class Told:
    """A small HTTP server and a small mail server, and what they were sent."""

    url: str = ""
    mail_url: str = ""
    calls: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    """Headers and body of each call."""
    mails: list[EmailMessage] = field(default_factory=list)

    def call(self, ready: Callable[[dict[str, Any]], bool]) -> tuple[dict[str, str], dict[str, Any]]:
        """The first call whose body answers ``ready``, once it is there."""
        found: tuple[dict[str, str], dict[str, Any]] = wait_until(
            lambda: next((c for c in self.calls if ready(c[1])), None), PATIENCE, "the call of the webhook"
        )
        return found

    def mail(self, subject: str) -> str:
        """The text of the first mail with that subject, once it is there."""

        def there() -> EmailMessage | None:
            return next((m for m in self.mails if m["subject"] == subject), None)

        found: EmailMessage = wait_until(there, PATIENCE, f"a mail {subject!r}")
        body = found.get_body(("plain",))
        assert body is not None
        return str(body.get_content())


@contextmanager
def listeners() -> Iterator[Told]:
    """Both servers on loopback, for the length of the block."""
    told = Told()

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            told.calls.append((dict(self.headers), json.loads(body)))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing on the terminal."""

    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    told.url = f"http://127.0.0.1:{hook.server_address[1]}/hook"
    port = free_port()
    told.mail_url = f"mailto://127.0.0.1:{port}?from=segpipe@example.org&to=ops@example.org&mode=insecure"
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    post = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(lambda r, w: _receive(r, w, told.mails), "127.0.0.1", port), loop
    ).result(10)
    try:
        yield told
    finally:
        hook.shutdown()
        hook.server_close()
        loop.call_soon_threadsafe(post.close)
        loop.call_soon_threadsafe(loop.stop)


async def _receive(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, mails: list[EmailMessage]
) -> None:
    """As much of SMTP (RFC 5321) as a sender of one mail needs."""
    writer.write(b"220 test\r\n")
    while line := await reader.readline():
        word = line[:4].strip().upper()
        if word == b"DATA":
            writer.write(b"354 go on\r\n")
            lines: list[bytes] = []
            while (part := await reader.readline()) != b".\r\n":
                lines.append(part.removeprefix(b".") if part.startswith(b"..") else part)
            message = email.message_from_bytes(b"".join(lines), policy=email.policy.default)
            assert isinstance(message, EmailMessage)
            mails.append(message)
        writer.write(b"221 bye\r\n" if word == b"QUIT" else b"250 ok\r\n")
        await writer.drain()
        if word == b"QUIT":
            break
    writer.close()
