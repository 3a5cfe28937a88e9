"""A secret of a URL or of the environment reaches the server that wants it, and nothing that a run leaves."""

from __future__ import annotations

import logging
import pickle
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import pytest
from world import Ended, World, command, only_run, write_raster

from segpipe.config.job import Job
from segpipe.errors import RequestError, SceneError
from segpipe.redact import address, clean_logs, seal
from segpipe.sources import discover
from segpipe.sources.uri import reveal
from segpipe.tables.record import load_record
from segpipe_flows.here import request_of

PASSWORD = "pa55Zebra-w0rd"
SIGNATURE = "5ecafe0ddba11f00d5ecafe0ddba11f00d5ecafe0ddba11f00d5ecafe0ddba11"
SESSION = "FwoGZXIvYXdzEZebraSession0123456789"
SAS = "kQ9vZebra+Sas/Signature0123456789="
TOKEN = "tok-Zebra-98f7a6b5c4d3"
VARIABLE = "Zebra-from-the-environment-4711"
AWS_KEY = "wJalrZebraSecretKey/K7MDENG+bPxRfiCY"
SECRETS = (PASSWORD, SIGNATURE, SESSION, SAS, TOKEN, VARIABLE, AWS_KEY)

SERVER = """
import base64, re, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, parse_qs

WANTED = dict(item.split("=", 1) for item in sys.argv[1:])

class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def log_message(self, *_): pass
    def allowed(self, area, query):
        basic = self.headers.get("Authorization", "").partition(" ")[2]
        shown = unquote(query) + " " + base64.b64decode(basic or "").decode()
        return WANTED.get(area, "") in shown
    def answer(self, body):
        address, _, query = self.path.partition("?")
        area = address.split("/")[1]
        path = Path(address.rpartition("/")[2])
        if not self.allowed(area, query):
            return self.send_error(401 if area == "basic" else 403)
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\\d+)-(\\d*)", self.headers.get("Range", ""))
        first, last = 0, len(data) - 1
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.send_header("ETag", '"abc"')
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""It answers only who shows the secret that each area wants."""


@pytest.fixture
def host(world: World, tmp_path: Path) -> Iterator[str]:
    """``127.0.0.1:port`` of the server."""
    folder = tmp_path / "served"
    folder.mkdir()
    for name in ("scene1.tif", "scene2.tif", "districts.geojson"):
        shutil.copy(world / name, folder / name)
    shutil.copy(world / "truth/scene1.tif", folder / "truth.tif")
    for name, band in zip(("red", "nir"), world.pixels(), strict=True):
        write_raster(folder / f"{name}.tif", band[np.newaxis], names=(name,), nodata=0)
    wanted = {
        "basic": f"me:{PASSWORD}", "s3": SIGNATURE, "azure": SAS, "token": TOKEN, "variable": VARIABLE
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, *(f"{k}={v}" for k, v in wanted.items())],
        cwd=folder, stdout=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stdout is not None
        yield f"127.0.0.1:{server.stdout.readline().strip()}"
        server.kill()


def scenes_of(host: str) -> list[str]:
    """Scenes behind every kind of secret; the last is not there."""
    amazon = (
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA0%2Fs3%2Faws4_request&X-Amz-Expires=900"
        f"&X-Amz-Security-Token={SESSION}&X-Amz-Signature={SIGNATURE}"
    )
    azure = f"sv=2022-11-02&st=2026-01-01&se=2027-01-01&sr=b&sp=r&sig={quote(SAS, safe='')}"
    return [
        f"http://me:{PASSWORD}@{host}/basic/scene1.tif",
        f"http://{host}/s3/scene1.tif?{amazon}",
        f"http://{host}/azure/scene1.tif?{azure}",
        f"stack:http://{host}/token/red.tif?token={TOKEN}|http://{host}/s3/nir.tif?{amazon}",
        f"http://{host}/variable/scene2.tif?${{SEGPIPE_TEST_SAS}}",
        f"http://{host}/token/gone.tif?token={TOKEN}",
    ]


def needles() -> set[bytes]:
    forms = {form(secret) for secret in SECRETS for form in (str, unquote, lambda s: quote(s, safe=""))}
    return {text.encode() for form in forms for text in (form, form.replace("/", "\\/"))}


def found_in(path: Path) -> list[str]:
    """The secrets that a file tells, whatever it is written as."""
    parts = [path.read_bytes()]
    if path.suffix == ".parquet":
        parts.append(pd.read_parquet(path).to_csv().encode())
    if parts[0].startswith(b"SQLite format 3"):
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            parts.append("\n".join(database.iterdump()).encode())
    return sorted({needle.decode() for needle in needles() for part in parts if needle in part})


def leaks(folder: Path, told: list[Ended]) -> dict[str, list[str]]:
    """What tells a secret: files below a folder but those that the test wrote, and what commands printed."""
    ours = {"served", "secret.yaml"}
    files = [p for p in folder.rglob("*") if p.is_file() and not ours & set(p.relative_to(folder).parts)]
    files.sort(reverse=True)  # a database's log before the database, whose reader may remove it
    found = {str(path.relative_to(folder)): found_in(path) for path in files}
    for number, ended in enumerate(told):
        text = (ended.out + ended.err).encode()
        found[f"printed by command {number}"] = sorted({n.decode() for n in needles() if n in text})
    return {what: secrets for what, secrets in found.items() if secrets}


def make_job(world: World, host: str, tmp_path: Path, scenes: list[str]) -> str:
    """Scenes, regions and reference behind secrets."""
    job = world.job(
        tmp_path / "out",
        scenes=scenes,
        regions={"path": f"http://{host}/token/districts.geojson?token={TOKEN}", "name": "district"},
        reference={"path": f"http://me:{PASSWORD}@{host}/basic/truth.tif"},
    )
    return str(job.rename(tmp_path / "secret.yaml"))


def variables(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "tmp").mkdir(exist_ok=True)
    return {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_LOGGING_LEVEL": "DEBUG",
        "TMPDIR": str(tmp_path / "tmp"),
        "AWS_ACCESS_KEY_ID": "AKIA0",
        "AWS_SECRET_ACCESS_KEY": AWS_KEY,
        "AWS_REGION": "us-east-1",
        "SEGPIPE_TEST_SAS": f"sv=1&sig={VARIABLE}",
        "GDAL_HTTP_MAX_RETRY": "0",
    }


def test_a_job_in_this_process_leaves_no_secret(world: World, host: str, tmp_path: Path) -> None:
    scenes = scenes_of(host)
    job = make_job(world, host, tmp_path, [*scenes[:3], *scenes[4:]])
    extra = variables(tmp_path)
    planned = command("plan", job, **extra)
    ran = command("run", job, "--local", **extra)
    told = [planned, ran]
    assert not leaks(tmp_path, told), leaks(tmp_path, told)
    record = load_record((only_run(tmp_path / "out") / "run.json").read_bytes())
    assert [len(record.done), len(record.failed)] == [4, 1], ran.err
    assert (planned.code, ran.code) == (1, 1)
    assert record.failed[0].uri == f"http://{host}/token/gone.tif"
    assert f"http://{host}/token/gone.tif: " in record.failed[0].error


@pytest.mark.slow
def test_a_job_through_prefect_leaves_no_secret(world: World, host: str, tmp_path: Path) -> None:
    job = make_job(world, host, tmp_path, scenes_of(host))
    extra = variables(tmp_path)
    store = command("doctor", "--store", f"s3://me:{PASSWORD}@bucket/x?sig={quote(SAS)}", "--no-self-test",
                    AWS_ENDPOINT_URL=f"http://me:{PASSWORD}@{host}/s3", **extra)  # fmt: skip
    told = [command("plan", job, **extra), command("run", job, **extra), store]
    found = leaks(tmp_path, told)
    assert not found, found
    assert list(tmp_path.glob("prefect/*.db")), "Prefect kept its history elsewhere"
    record = load_record((only_run(tmp_path / "out") / "run.json").read_bytes())
    assert [len(record.done), len(record.failed)] == [5, 1], told[1].err


RENEWED = {
    "password": ("https://me:{}@h/a.tif", "https://h/a.tif"),
    "Amazon": (
        "https://b.s3.amazonaws.com/a.tif?X-Amz-Date=2026{0:.4}&X-Amz-Credential={0}&X-Amz-Signature={0}",
        "https://b.s3.amazonaws.com/a.tif",
    ),
    "Google": ("https://h/a.tif?GoogleAccessId={0}&Expires={0:.4}&Signature={0}", "https://h/a.tif"),
    "Azure": ("https://h/a.tif?sv=2022-11-02&se=2026-01-{0:.2}&sp=r&sig={0}", "https://h/a.tif"),
    "token": ("https://h/a.tif?token={}", "https://h/a.tif"),
    "API key beside a query": ("https://h/get?id=7&api_key={}", "https://h/get?id=7"),
    "stack": (
        "stack:https://h/a.tif?sig={0}|https://h/b.tif?sig={0}",
        "stack:https://h/a.tif|https://h/b.tif",
    ),
    "frame": ("https://h/a.nii.gz?sig={}#frame=2", "https://h/a.nii.gz#frame=2"),
    "variable": ("https://h/a.tif?${{SIGNATURE_{:.2}}}", "https://h/a.tif"),
}
"""URLs by the kind of their secret, and what they identify."""


@pytest.mark.parametrize("kind", RENEWED)
def test_a_renewed_secret_is_the_same_scene(kind: str, world: World, tmp_path: Path) -> None:
    """Its name, its address and what a job records are those of before."""
    text, identified = RENEWED[kind]
    one, two = (text.format(quote(secret, safe="")) for secret in ("17a5b6c7d8e9f0", "28b6c7d8e9f0a1"))
    first, second = (discover([uri])[0] for uri in (one, two))
    assert first.name == second.name
    assert address(first.uri) == address(second.uri) == identified
    assert len(discover([one, two])) == 1
    jobs = [Job(scenes=[uri], model=str(world.models / "nearest.yaml")) for uri in (one, two)]
    if kind != "variable":
        assert jobs[0].model_dump(mode="json") == jobs[1].model_dump(mode="json")
        assert reveal(pickle.loads(pickle.dumps(jobs[0])).scenes[0]) == one


def test_another_file_of_the_same_service_is_another_scene() -> None:
    long = "550e8400-e29b-41d4-a716-44665544000"
    urls = [f"https://h/get?id={number}&token=17a5b6c7d8e9" for number in (1, 2)]
    urls += [f"https://h/get?file={long}{number}" for number in (1, 2)]
    scenes = discover(urls)
    assert len({address(scene.uri) for scene in scenes}) == len(scenes) == 4
    assert not any(long in address(scene.uri) for scene in scenes)


def test_a_variable_is_read_where_the_scene_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGPIPE_TEST_TOKEN", "tok-Zebra-1")
    assert reveal("https://h/a.tif?token=${SEGPIPE_TEST_TOKEN}") == "https://h/a.tif?token=tok-Zebra-1"
    monkeypatch.delenv("SEGPIPE_TEST_TOKEN")
    with pytest.raises(SceneError, match="no variable SEGPIPE_TEST_TOKEN"):
        reveal("https://h/a.tif?token=${SEGPIPE_TEST_TOKEN}")


def test_errors_and_logs_of_libraries_tell_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """What they quote: the URL, in quotes and escaped, and the secret alone."""
    seal(f"https://me:{PASSWORD}@h/a.tif?sig={quote(SAS, safe='')}")
    said = f"'https://h/a.tif?sig={SAS}': 403 for me:{PASSWORD} (/vsicurl/https://h/x?X-Amz-Signature=17a5b6c7d8)"
    told = str(SceneError(said))
    assert told == "'https://h/a.tif': 403 for me:*** (/vsicurl/https://h/x)"
    clean_logs()
    with caplog.at_level("INFO"):
        logging.getLogger("somebody").info("asked %s with %s", "https://h/a.tif?token=17a5b6c7d8", PASSWORD)
        try:
            raise OSError(404, "Not Found", f"https://me:{PASSWORD}@h/a.tif")
        except OSError:
            logging.getLogger("somebody").exception("failed")
    assert "asked https://h/a.tif with ***" in caplog.text
    assert "'https://h/a.tif'" in caplog.text
    assert PASSWORD not in caplog.text


@pytest.mark.parametrize("flow", ["segment", "prompt"])
def test_a_form_is_told_to_refer_to_a_secret(flow: str, world: World) -> None:
    """Prefect has its parameters before we see them: the run says how to do without."""
    asked = {"scenes": [f"https://h/a.tif?sig={quote(SAS)}"], "model": str(world.models / "nearest.yaml")}
    with pytest.raises(RequestError, match=r"scenes\.0: a URL with a password or signature.*\$\{SIGNATURE\}"):
        request_of(Job, asked, flow)
    sealed = Job.model_validate(asked).model_dump()  # as the command line hands it on
    assert reveal(request_of(Job, sealed, flow).scenes[0]) == asked["scenes"][0]
