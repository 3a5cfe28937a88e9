"""Check of an object store: list, write, create-if-absent, delete."""

from __future__ import annotations

import os
import uuid

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import ObjectStore, from_url

from segpipe.doctor.finding import Finding, State, check
from segpipe.store.location import store_reason

RIGHTS = "these credentials may not do this: allow list, get, put and delete under this prefix"
ADVICE = {
    "NoSuchBucket": "the bucket is not there: make it, or correct the URL",
    "404": "the bucket or container is not there: make it, or correct the URL",
    "InvalidAccessKeyId": "the store does not know the access key: correct AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "the secret does not belong to the key: correct AWS_SECRET_ACCESS_KEY",
    "AccessDenied": RIGHTS,
    "PermissionDenied": RIGHTS,
    "403": "the store refuses these credentials: correct them, or allow list, get, put and delete",
    "401": "the store wants credentials: see the line `credentials`",
    "169.254.169.254": "no credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "metadata": "no credentials were found: see the line `credentials`",
    "builder error": "the endpoint is plain http: set AWS_ALLOW_HTTP=true, or use https",
    "error sending request": "nobody answers at the endpoint: correct AWS_ENDPOINT_URL, or start the store",
    "timed out": "the endpoint does not answer in time: look at network and proxy",
}
"""What to do, by a word in the store's answer; the first that is there."""


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
        return Finding(name, State.fail, found, _advice(str(error)))
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
    http = os.environ.get("AWS_ALLOW_HTTP", os.environ.get("ALLOW_HTTP", "")).lower() in ("true", "1")
    return from_url(
        url,
        retry_config={"max_retries": 1},
        client_options={"timeout": "10s", "connect_timeout": "5s", "allow_http": http},
    )


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


def _advice(text: str) -> str:
    default = "look at the address, the credentials and the network"
    return next((advice for word, advice in ADVICE.items() if word in text), default)
