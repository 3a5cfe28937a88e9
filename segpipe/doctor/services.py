"""Checks of what a run talks to: Prefect server, Dask scheduler, object store, sources of credentials."""

from __future__ import annotations

import base64
import json
import os
import re
import tomllib
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import ObjectStore, from_url

from segpipe.doctor.finding import Finding, State, check
from segpipe.process.extras import require
from segpipe.store.location import store_reason

SECONDS = 10.0
COMPARED = ("segpipe", "dask", "distributed", "torch", "zarr", "numpy")
"""Packages that must be the same on all workers."""

AZURE_SOURCES = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
)


@check("prefect")
def check_prefect(environment: Mapping[str, str] | None = None) -> Finding:
    """The Prefect server that the environment, or the active profile, names.

    By plain HTTP: loading Prefect would take seconds, and may be what is broken.

    Args:
        environment: default: this process's.
    """
    settings = prefect_settings(os.environ if environment is None else environment)
    try:
        client = version("prefect")
    except PackageNotFoundError:
        found = "not installed: jobs run in this process, without schedules, retries and clusters"
        return Finding("prefect", State.ok, f"{found} (pip install 'segpipe[prefect]')")
    api = settings.get("PREFECT_API_URL", "").rstrip("/")
    if not api:
        found = f"{client}; no PREFECT_API_URL, so a run starts a server of its own"
        return Finding("prefect", State.ok, found)
    where = f"{client}; {api}"
    try:
        healthy = _get(f"{api}/health", settings)
        server = _get(f"{api}/admin/version", settings)
    except urllib.error.HTTPError as error:
        return _refused(where, error.code, settings)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        advice = "start one with `prefect server start` or `segpipe serve`, or unset PREFECT_API_URL"
        return Finding("prefect", State.fail, f"{where}: no Prefect server answers ({reason})", advice)
    if healthy is not True or not isinstance(server, str):
        advice = "PREFECT_API_URL must be the address of the API, such as http://127.0.0.1:4200/api"
        return Finding("prefect", State.fail, f"{where}: something else than a Prefect API answers", advice)
    found = f"{where}, server {server}"
    if client.split(".")[:2] != server.split(".")[:2]:
        advice = f"give both the same version: pip install prefect=={server} here, or {client} on the server"
        return Finding("prefect", State.warn, found, advice)
    return Finding("prefect", State.ok, found)


def prefect_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Prefect's settings: of the active profile, and of the environment over them."""
    home = Path(environment.get("PREFECT_HOME", "~/.prefect")).expanduser()
    path = Path(environment.get("PREFECT_PROFILES_PATH", home / "profiles.toml"))
    found: dict[str, str] = {}
    if path.exists():
        profiles = tomllib.loads(path.read_text())
        active = environment.get("PREFECT_PROFILE", profiles.get("active", ""))
        found = {k: str(v) for k, v in profiles.get("profiles", {}).get(active, {}).items()}
    return found | {k: v for k, v in environment.items() if k.startswith("PREFECT_")}


def _get(url: str, settings: Mapping[str, str]) -> Any:
    """The JSON at a URL, asked for with the credentials of the settings; None: it is no JSON."""
    request = urllib.request.Request(url)
    if auth := settings.get("PREFECT_API_AUTH_STRING"):
        request.add_header("Authorization", f"Basic {base64.b64encode(auth.encode()).decode()}")
    elif key := settings.get("PREFECT_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        try:
            return json.load(response)
        except ValueError:
            return None


def _refused(where: str, code: int, settings: Mapping[str, str]) -> Finding:
    """The server answered, but not with what was asked for."""
    if code in (401, 403):
        given = [name for name in ("PREFECT_API_AUTH_STRING", "PREFECT_API_KEY") if settings.get(name)]
        found = f"{where}: HTTP {code}, {f'{given[0]} not accepted' if given else 'no credentials given'}"
        advice = (
            "set PREFECT_API_AUTH_STRING to the server's PREFECT_SERVER_API_AUTH_STRING (user:password), or "
            "PREFECT_API_KEY for Prefect Cloud"
        )
        return Finding("prefect", State.fail, found, advice)
    advice = "PREFECT_API_URL must be the address of the API, such as http://127.0.0.1:4200/api"
    if code >= 500:
        advice = "look at the server's log; its database may be gone"
    return Finding("prefect", State.fail, f"{where}: HTTP {code}", advice)


def versions_here() -> dict[str, str]:
    """Versions of what must be the same everywhere; runs on workers too."""
    found = {}
    for name in COMPARED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


@check("dask")
def check_dask(address: str) -> Finding:
    """A Dask scheduler: its workers, their resources, and whether they have what is installed here."""
    Client = require("distributed", "--dask").Client  # noqa: N806 (a class); loads a second of modules

    try:
        client = Client(address, timeout=SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = "start one with `dask scheduler`, or correct the address (compute.address in jobs)"
        return Finding("dask", State.fail, f"{address}: no scheduler answers ({reason})", advice)
    with client:
        workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
        found = f"{address}: {len(workers)} workers"
        if not workers:
            advice = f"start some with `dask worker {address}`; a run would wait for ever"
            return Finding("dask", State.fail, found, advice)
        gpus = sum(worker["resources"].get("GPU", 0) for worker in workers.values())
        found += f", {sum(worker['nthreads'] for worker in workers.values())} threads, {gpus:g} GPU"
        theirs: dict[str, Any] = client.run(versions_here, on_error="return")
    here, differ = versions_here(), []
    for worker, there in theirs.items():
        if isinstance(there, BaseException):
            found += f"; {worker} cannot load segpipe ({type(there).__name__}: {there})"
            return Finding("dask", State.fail, found, "install the same segpipe on every worker")
        differ += [f"{worker} {n} {there[n]} (here {here[n]})" for n in COMPARED if there[n] != here[n]]
    if not differ:
        return Finding("dask", State.ok, f"{found}, same versions as here")
    advice = "install the same versions on all workers: the same image, or the same lock file"
    return Finding("dask", State.fail, f"{found}; {'; '.join(differ[:6])}", advice)


@check("credentials")
def check_credentials(environment: Mapping[str, str] | None = None) -> Finding:
    """Which sources of credentials for object stores are there: names, never values.

    Args:
        environment: default: this process's.
    """
    env = os.environ if environment is None else environment
    home = Path(env.get("HOME", "~")).expanduser()
    found, wrong = [], []
    for cloud, part in (("S3", _aws), ("GCS", _google), ("Azure", _azure)):
        source, problems = part(env, home)
        found.append(f"{cloud}: {source or 'none'}")
        wrong += problems
    line = "; ".join(found)
    if wrong:
        return Finding("credentials", State.fail, line, "; ".join(wrong))
    return Finding("credentials", State.ok, line)


def _aws(env: Mapping[str, str], home: Path) -> tuple[str, list[str]]:
    wrong = []
    endpoint = env.get("AWS_ENDPOINT_URL", "")
    if endpoint.startswith("http://") and env.get("AWS_ALLOW_HTTP", "").lower() not in ("true", "1"):
        wrong.append("AWS_ENDPOINT_URL is plain http: set AWS_ALLOW_HTTP=true, or use https")
    pair = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
    given = [name for name in pair if env.get(name)]
    if len(given) == 1:
        wrong.append(f"{given[0]} is set, {next(n for n in pair if n not in given)} is not: set both")
    if given:
        return " and ".join(given), wrong
    for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"):
        if env.get(name):
            return name, wrong
    path = Path(env.get("AWS_SHARED_CREDENTIALS_FILE", home / ".aws" / "credentials"))
    if path.exists():
        wrong.append(
            f"profiles in {path} are read by the AWS tools, not by segpipe's store: set "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_REGION (`aws configure export-credentials "
            "--format env` prints them)"
        )
        return str(path), wrong
    return "", wrong


def _google(env: Mapping[str, str], home: Path) -> tuple[str, list[str]]:
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH"):
        if value := env.get(name):
            gone = [] if Path(value).expanduser().exists() else [f"{name} names a file that is not there"]
            return name, gone
    if env.get("GOOGLE_SERVICE_ACCOUNT_KEY"):
        return "GOOGLE_SERVICE_ACCOUNT_KEY", []
    path = home / ".config" / "gcloud" / "application_default_credentials.json"
    return (str(path) if path.exists() else ""), []


def _azure(env: Mapping[str, str], home: Path) -> tuple[str, list[str]]:
    del home
    source = next((name for name in AZURE_SOURCES if env.get(name)), "")
    if source and not env.get("AZURE_STORAGE_ACCOUNT_NAME"):
        return source, [f"{source} is set, AZURE_STORAGE_ACCOUNT_NAME is not: set both"]
    return source, []


RIGHTS = "these credentials may not do this: allow list, get, put and delete under this prefix"
BY_CODE = {
    "NoSuchBucket": "the bucket is not there: make it, or correct the URL",
    "InvalidAccessKeyId": "the store does not know the access key: correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret does not belong to the key: correct AWS_SECRET_ACCESS_KEY",
    "AccessDenied": RIGHTS,
}
"""What to do, by the code of S3's answer."""
BY_STATUS = {
    404: "the bucket or container is not there: make it, or correct the URL",
    403: "the store refuses these credentials: correct them, or allow list, get, put and delete",
    401: "the store wants credentials: see the line `credentials`",
}
"""What to do, by the status of the answer."""
BY_TYPE: dict[type[Exception], str] = {
    exceptions.NotFoundError: BY_STATUS[404],
    exceptions.PermissionDeniedError: RIGHTS,
    exceptions.UnauthenticatedError: BY_STATUS[401],
}
"""What to do, by the type of the error, where the library gives it one."""
BY_KIND = {
    "Connect": "nobody answers at the endpoint: correct AWS_ENDPOINT_URL, or start the store",
    "Timeout": "the endpoint does not answer in time: look at network and proxy",
}
"""What to do, by the kind of a request that had no answer."""
CREDENTIALS = {"169.254.169.254", "169.254.170.2", "metadata", "metadata.google.internal"}
"""Hosts that a machine of a cloud asks for credentials: the last resort."""
_CODE = re.compile(r"<Code>(\w+)</Code>")
_ASKED = re.compile(r"\n +uri: Some\(\s+(\S+),\n")
_STATUS = re.compile(r"\n +inner: Status \{\s+status: (\d+),\n")
_KIND = re.compile(r"\n +HttpError \{\s+kind: (\w+),\n")
"""Fields of the error in the library, which hands all of it out as text."""


@check("store")
def check_store(url: str, name: str = "store") -> Finding:
    """List one key, then write and delete an object of our own.

    Args:
        url: of a bucket, with or without a prefix, as outputs.dir may be.
        name: of the line.
    """
    doing = "opened"
    try:
        store = _open(url)
        doing = "listed"
        first = next(iter(obstore.list(store, chunk_size=1)), None)
        doing = "written"
        key = f".segpipe-doctor-{uuid.uuid4().hex}"
        exclusive = _write_once(store, key)
    except (exceptions.BaseError, OSError, ValueError) as error:
        found = f"{url}: cannot be {doing} ({store_reason(error)})"
        return Finding(name, State.fail, found, _advice(error))
    found = f"{url}: {'has objects' if first else 'empty'}; listed, written, deleted"
    if exclusive:
        return Finding(name, State.ok, f"{found}, create-if-absent holds")
    advice = (
        "scans that overlap may do a scene twice on this store: it ignores If-None-Match; use one that has "
        "conditional writes, or never run two scans at once"
    )
    return Finding(name, State.warn, f"{found}; create-if-absent overwrites", advice)


def _open(url: str) -> ObjectStore:
    """The store, told to give up soon: its defaults retry for three minutes."""
    return from_url(
        url,
        retry_config={"max_retries": 1},
        client_options={"timeout": "10s", "connect_timeout": "5s", "allow_http": _plain_allowed()},
    )


def _plain_allowed() -> bool:
    return os.environ.get("AWS_ALLOW_HTTP", os.environ.get("ALLOW_HTTP", "")).lower() in ("true", "1")


def _write_once(store: ObjectStore, key: str) -> bool:
    """Whether an object that is there cannot be created again; leaves none behind."""
    obstore.put(store, key, b"", mode="create")
    try:
        obstore.put(store, key, b"", mode="create")
    except exceptions.AlreadyExistsError:
        return True
    finally:
        obstore.delete(store, key)
    return False


def _advice(error: Exception) -> str:
    """What to do, by type and fields of an error, never by a word that may be in an address too."""
    text = str(error)
    code, asked, status, kind = (
        found[1] if (found := field.search(text)) else "" for field in (_CODE, _ASKED, _STATUS, _KIND)
    )
    address = urlsplit(asked)
    if address.hostname in CREDENTIALS:
        return (
            "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or see `credentials`"
        )
    if address.scheme == "http" and not _plain_allowed():
        return "the endpoint is plain http: set AWS_ALLOW_HTTP=true, or use https"
    return (
        BY_CODE.get(code)
        or BY_TYPE.get(type(error))
        or BY_STATUS.get(int(status or 0))
        or BY_KIND.get(kind)
        or "look at the address, the credentials and the network"
    )
