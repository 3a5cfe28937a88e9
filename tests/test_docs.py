"""The documents: what they name exists, their links resolve, and the code of the page on Python runs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FOLDERS = {"segpipe_flows": "flows", "segpipe_tasks": "tasks"}
"""Folders that are imported by another name."""
NO_MODULES = {"segpipe.providers", "segpipe.scene.done"}
"""A group of entry points, and an event."""
EXAMPLES = {"segpipe/sources/numpy_file.py"}
"""Files that a page makes."""

PATH = re.compile(r"(?<![\w/.-])(?:segpipe|flows|tasks|tests|benchmarks|configs|infra|docs)/[\w./-]*[\w/]")
DOTTED = re.compile(r"(?<![\w/.@-])segpipe(?:_flows|_tasks)?(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _is_there(path: str) -> bool:
    """Whether a path of the repository, or a name of a test module without its file's ending, is there."""
    return path in EXAMPLES or any((ROOT / (path + ending)).exists() for ending in ("", ".py"))


def _is_defined(dotted: str) -> bool:
    """Whether the longest part that is a module defines what follows it."""
    top, *names = dotted.split(".")
    place = ROOT / FOLDERS.get(top, top)
    while names and ((place / names[0]).is_dir() or (place / f"{names[0]}.py").is_file()):
        place /= names.pop(0)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    if not names:
        return file.is_file()
    text = file.read_text()
    defined = rf"^\s*(?:def|class) {names[0]}\b|^{names[0]}\b.*=|^\s+{names[0]}\b,?$|\"{names[0]}\""
    return re.search(defined, text, re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_path_and_module_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    missing = {path for path in PATH.findall(text) if not _is_there(path)}
    missing |= {name for name in DOTTED.findall(text) if name not in NO_MODULES and not _is_defined(name)}
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_resolves(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_navigation() -> None:
    def files(node: object) -> Iterator[str]:
        if isinstance(node, str):
            yield node
        else:
            for part in node.values() if isinstance(node, dict) else node:
                yield from files(part)

    listed = set(files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}


def test_the_code_of_the_page_on_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs/python.md"
    text = page.read_text()
    names: dict[str, object] = {"__name__": "page"}
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) >= 8
    for block in blocks:  # lines are those of the page, so that a failure says where
        before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * before + block.group(1), str(page), "exec"), names)
