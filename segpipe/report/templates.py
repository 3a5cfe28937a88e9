"""The page's shell: templates with everything escaped, styles and the one script, by its hash."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

_HERE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """A self-contained page: it loads nothing, and no script runs but its own."""
    script = _text("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template(template)
    return page.render(css=_text("page.css"), js=script, script_hash=f"sha256-{digest}", **values)


@functools.cache
def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        auto_reload=False,  # a process that runs for hours keeps the templates that go with its code
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["color"] = color
    environment.filters["relative"] = relative
    environment.filters["data_uri"] = data_uri
    return environment


def color(text: str) -> str:
    """A colour that is safe inside a style attribute."""
    return text if re.fullmatch(r"#[0-9a-fA-F]{6}", text) else "#808080"


def relative(path: str, root: str = "./") -> str:
    """A link to a file of the run's folder: quoting the colon keeps any scheme out.

    Args:
        path: of the file, from the run's folder.
        root: the way from the page to the run's folder.
    """
    return root + quote(path.lstrip("/"), safe="/")


def data_uri(kind: str, content: bytes) -> str:
    """A picture inside the page; ``kind`` is that of ``image/…``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
