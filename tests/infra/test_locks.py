"""What is installed is pinned by hash: the locks, and every command of ours that installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ["requirements.lock", "build.lock", "infra/docker/requirements.txt", "fuzz.lock"]
INSTALLERS = ["Makefile", "infra/docker/Dockerfile", ".ci/run"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def entries(name: str) -> dict[Requirement, list[str]]:
    """Hashes by requirement; a line that is neither fails."""
    text = (ROOT / name).read_text().replace(" \\\n", " ")
    found = {}
    for line in text.splitlines():
        requirement, *hashes = re.split(r"\s+--hash=", line)
        found[Requirement(requirement)] = hashes
    return found


@pytest.mark.parametrize("name", LOCKS)
def test_every_pin_has_hashes_and_no_index(name: str) -> None:
    found = entries(name)
    assert found
    for requirement, hashes in found.items():
        [pin] = requirement.specifier
        assert pin.operator == "==" and requirement.url is None, requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement
    assert "://" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", LOCKS[1:-1])
def test_the_smaller_locks_are_parts_of_the_large_one(name: str) -> None:
    large = {str(requirement): hashes for requirement, hashes in entries(LOCKS[0]).items()}
    for requirement, hashes in entries(name).items():
        whole = next(text for text in large if text.split("==")[0] == requirement.name)
        assert str(requirement).split(";")[0] == whole.split(";")[0]
        assert hashes == large[whole]


@pytest.mark.parametrize("extra", ["", "all", "demo", "dev", "docs", "supply", "build"])
def test_the_lock_satisfies_what_the_project_wants(extra: str) -> None:
    pinned = {
        canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
        for requirement in entries(LOCKS[0])
    }
    project = PYPROJECT["project"]
    groups = {
        "": project["dependencies"],
        **project["optional-dependencies"],
        **PYPROJECT["dependency-groups"],
    }
    wanted = [need for need in map(Requirement, groups[extra]) if need.name != "segpipe"]
    for need in wanted:
        assert need.specifier.contains(pinned[canonicalize_name(need.name)]), need


def test_the_build_group_is_what_a_build_requires() -> None:
    assert PYPROJECT["dependency-groups"]["build"] == PYPROJECT["build-system"]["requires"]


@pytest.mark.parametrize("name", INSTALLERS)
def test_every_install_checks_hashes_and_isolates_no_build(name: str) -> None:
    """An isolated build would fetch its backend without a hash."""
    text = (ROOT / name).read_text().replace("\\\n", " ")
    alias = re.search(r"^PIP := (.+pip install.*)$", text, re.M)
    lines = [line.replace("$(PIP)", alias[1]) if alias else line for line in text.splitlines()]
    installs = [part for line in lines for part in line.split("&&") if "pip install" in part]
    for install in installs:
        if install.startswith(("PIP :=", "#")):
            continue
        hashed = "--require-hashes" in install
        own = "--no-deps" in install and "--no-index" in install and re.search(r"\s(-e )?\.\s*$", install)
        by_operator = '--index-url "$TORCH_INDEX"' in install and "--no-deps" in install
        assert hashed or own or by_operator, install
        assert "--no-build-isolation" in install or "--only-binary :all:" in install, install
        assert "--extra-index-url" not in install, "any package could come from there"
