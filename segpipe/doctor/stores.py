"""Check of an object store: list, write, create-if-absent, delete."""

from __future__ import annotations

import os
import re
import uuid
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
)
from obstore.store import ObjectStore, from_url

from segpipe.doctor.finding import Finding, State, check
from segpipe.store.location import store_reason

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
    NotFoundError: BY_STATUS[404],
    PermissionDeniedError: RIGHTS,
    UnauthenticatedError: BY_STATUS[401],
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
    except (BaseError, OSError, ValueError) as error:
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
    except AlreadyExistsError:
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
