"""What is secret in a text: passwords, signatures and tokens of URLs, keys of the environment.

A URL with a secret is a `SecretUri`: as text it is the URL without the secret, and only `reveal` gives what
a server wants. So whatever prints, logs or writes it tells nothing. What libraries quote of a URL is taken
out by `clean`, which errors, logs and the command line apply.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

_URL = re.compile(r"""[A-Za-z][\w+.-]*://[^\s|"'<>`\\]*""")
_USER = re.compile(r"""(?<=://)[^/?#\s|"']*@""")
_QUERY = re.compile(r"""(://[^?#|\s"']*)(\?[^#|\s"']*?)(?=[:,;.)]*(?:[#|\s"']|$))""")
_REFERENCE = re.compile(r"\$\{(\w+)\}")
_SECRET = re.compile(
    r"sig(nature)?$|passw|pwd|secret|token|credential|auth|api.?key|access.?key"
    r"|^(key|pass|jwt|sas|code|policy|hmac|googleaccessid|awsaccesskeyid|key-pair-id)$",
    re.IGNORECASE,
)
"""Names of parameters of a query whose values are secret."""
_RENEWED = re.compile(
    r"^x-(amz|goog|ms|oss|cos)-|^(expires|se|sp|sv|sr|st|ss|srt|sip|spr|ske|skt|sks|skv|skoid|sktid)$",
    re.IGNORECASE,
)
"""Names of the parameters beside a signature, which are others in the next one."""
_LOOKS = re.compile(r"[\w+/=%-]{20,}")
"""Values that may be a secret under any name."""
_VARIABLES = re.compile(r"SECRET|PASSW|TOKEN|SAS_KEY|ACCOUNT_KEY|API_KEY|AUTH_STRING", re.IGNORECASE)
SHORTEST = 8
"""Characters of what is looked for in texts: shorter ones are in ordinary words."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Escapes of terminals, and marks that turn the direction of what follows; not the tab and the line feed."""

_known: set[str] = set()
"""Secrets that this process has met."""


class SecretUri(str):
    """A URL, or a ``stack:`` of some, whose text has no secret; `reveal` has it. It is pickled with it."""

    _whole: str

    def __reduce__(self) -> tuple[Any, ...]:
        return seal, (self._whole,)


def seal(uri: str) -> str:
    """Return the URI, as a `SecretUri` where it has a secret; one that is sealed stays as it is."""
    if isinstance(uri, SecretUri) or not has_secret(uri):
        return uri
    for part in uri.split("|"):
        _remember(part)
    sealed = SecretUri(public_uri(uri))
    sealed._whole = uri
    return sealed


def whole(uri: str) -> str:
    """Return the text of a URI with its secret, as it was written: to be taken apart, and sealed again."""
    return uri._whole if isinstance(uri, SecretUri) else uri


def reveal(uri: str) -> str:
    """Return what a server is asked with: the secret, and variables of the environment for ``${NAME}``.

    Raises:
        KeyError: there is no such variable.
    """
    text = whole(uri)
    if "://" not in text or "${" not in text:
        return text
    found = _REFERENCE.sub(lambda match: os.environ[match[1]], text)
    _remember(found)
    return found


def has_secret(uri: str) -> bool:
    """Whether a URI has a password, or a query with a signature, a token or what looks like one."""
    return any(_is_secret(url) for url in _URL.findall(uri))


def public_uri(text: str) -> str:
    """URLs without what may be secret in them: user and password, and the query of a signed one.

    Args:
        text: a URI, of a stack too, or a message with some in it.
    """
    return _QUERY.sub(r"\1", _USER.sub("", text))


def address(uri: str) -> str:
    """Return what a URI identifies, whoever signs it: without user, and with the rest of its query."""

    def query(match: re.Match[str]) -> str:
        kept = [_kept(item) for item in match[2][1:].split("&") if not _renewed(item)]
        return match[1] + ("?" + "&".join(kept) if kept else "")

    return _QUERY.sub(query, _USER.sub("", whole(uri)))


def clean(text: str) -> str:
    """A text for people: without secrets, and with control characters as ``\\x1b``."""
    if "://" in text:
        text = _URL.sub(lambda match: public_uri(match[0]) if _is_secret(match[0]) else match[0], text)
    for secret in tuple(_known):
        if secret in text:
            text = text.replace(secret, "***")
    return _CONTROL.sub(lambda match: repr(match[0])[1:-1], text)


def scrub(error: BaseException) -> BaseException:
    """Clean the texts of an error and of what caused it, in place."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        link.args = tuple(clean(value) if isinstance(value, str) else value for value in link.args)
        for name in ("filename", "strerror"):
            if isinstance(value := getattr(link, name, None), str):
                setattr(link, name, clean(value))
        link = link.__cause__ or link.__context__
    return error


@contextmanager
def scrubbed() -> Iterator[None]:
    """Let errors pass with clean texts (`scrub`); a decorator too."""
    try:
        yield
    except Exception as error:  # whatever it is, it goes on with a clean text
        scrub(error)
        raise


def plain_secrets(value: Any, path: str = "") -> list[str]:
    """Where in plain values, such as a form sends, URLs with a secret are: their paths, as ``scenes.0``."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        return [found for key, inner in items for found in plain_secrets(inner, f"{path}.{key}")]
    secret = isinstance(value, str) and not isinstance(value, SecretUri) and has_secret(value)
    return [path.removeprefix(".")] if secret else []


def clean_logs() -> None:
    """Clean every record that this process logs from now on, its traceback included."""
    for name, value in os.environ.items():
        if _VARIABLES.search(name) and len(value) >= SHORTEST and not name.endswith("_FILE"):
            _known.add(value)
    make = logging.getLogRecordFactory()
    if not hasattr(make, "cleans"):
        logging.setLogRecordFactory(_Cleaning(make))


class _Cleaning:
    """Makes log records whose texts are clean."""

    cleans = True

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *args: Any, **fields: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*args, **fields)
        try:
            text = record.getMessage()
        except (TypeError, ValueError, KeyError):  # a mistake of whoever logs: logging tells it
            return record
        if (told := clean(text)) != text:
            record.msg, record.args = told, ()
        if record.exc_info and record.exc_info[1] is not None:
            scrub(record.exc_info[1])
        return record


def _is_secret(url: str) -> bool:
    user = _USER.search(url)
    if user:
        name, mark, password = user[0][:-1].partition(":")
        if (mark and not _is_reference(password)) or _LOOKS.fullmatch(name):
            return True
    return any(_hides(item) for item in _items(url))


def _items(url: str) -> list[str]:
    return url.partition("#")[0].partition("?")[2].split("&")


def _hides(item: str) -> bool:
    name, mark, value = item.partition("=")
    if _is_reference(value if mark else name):
        return False
    return bool((mark and _SECRET.search(name)) or _LOOKS.fullmatch(value or name))


def _renewed(item: str) -> bool:
    name, _, value = item.partition("=")
    return bool(_SECRET.search(name) or _RENEWED.search(name)) or _is_reference(value or name)


def _kept(item: str) -> str:
    """A parameter as it identifies: by a hash, where it may be a secret."""
    if not _hides(item):
        return item
    return f"{item.partition('=')[0][:20]}~{hashlib.sha256(item.encode()).hexdigest()[:8]}"


def _is_reference(value: str) -> bool:
    return bool(_REFERENCE.fullmatch(value))


def _remember(uri: str) -> None:
    """Keep the secrets of a URL, so that they are known where they stand alone."""
    user = _USER.search(uri)
    values = [user[0][:-1].rpartition(":")[2]] if user else []
    values += [item.partition("=")[2] or item for item in _items(uri) if _hides(item)]
    _known.update(form for value in values for form in (value, unquote(value)) if len(form) >= SHORTEST)
