"""Files behind a URL: which URLs we know, and what identifies such a file."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from segpipe.sources.common import reason

REMOTE_SCHEMES = ("s3://", "gs://", "az://", "https://", "http://")
"""What GDAL opens in place."""
PATIENCE: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
"""With a store that does not answer; obstore's own is minutes."""


def is_remote(uri: str) -> bool:
    """Whether the URI names a file that is not on a local disk."""
    return uri.startswith(REMOTE_SCHEMES)


def remote_identity(uri: str) -> tuple[dict[str, Any], str | None]:
    """Address, size, time and ETag of a remote file, from a HEAD request.

    Returns:
        The identity, and a note where the server tells nothing and the address must do.
    """
    # Imported here: only a lake needs it.
    from obstore import head
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    address, _, query = uri.partition("?")
    folder, _, name = address.rpartition("/")
    try:
        if query:  # a signed URL: its signature is part of no store's path
            raise ValueError("the URL has a query")
        if uri.startswith(("http://", "https://")):
            store = from_url(folder, client_options={"allow_http": True}, retry_config=PATIENCE)
        else:
            store = from_url(folder, retry_config=PATIENCE)
        meta = head(store, name)
    except (BaseError, OSError, ValueError) as error:  # obstore's own, and Python's for what is not there
        note = f"identified by its address alone, a change will not be seen ({reason(error)[:120]})"
        return {"uri": address}, note
    modified = meta["last_modified"].isoformat()
    return {"uri": address, "size": meta["size"], "mtime": modified, "etag": meta["e_tag"]}, None
