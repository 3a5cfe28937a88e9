"""The image's file and what it installs, held against the linters, the lock and the package's own needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from segpipe import __version__

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "infra" / "docker"
SCRIPTS = sorted([*DOCKER.glob("*.sh"), ROOT / "infra" / "compose" / "secrets.sh"])
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def pins(path: Path) -> dict[str, str]:
    """Version by canonical name, of a list as ``uv pip compile`` writes it."""
    pairs = re.findall(r"^([\w.-]+)==([^ ;\\]+)", path.read_text(), re.M)
    return {canonicalize_name(name): version for name, version in pairs}


def assert_lints(tool: str, *arguments: str) -> None:
    found = shutil.which(tool, path=PATH)
    if found is None:
        pytest.skip(f"{tool} is not installed: Debian package {tool}, or {tool} of the dev extra")
    done = subprocess.run([found, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_sound(script: Path) -> None:
    assert_lints("shellcheck", "-x", str(script.relative_to(ROOT)))
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    assert script.name == "common.sh" or os.access(script, os.X_OK), "the image runs it by its name"


def test_the_dockerfile_is_sound() -> None:
    assert_lints("hadolint", "infra/docker/Dockerfile")


def test_the_image_has_the_locks_versions_and_all_that_segpipe_needs() -> None:
    image, lock = pins(DOCKER / "requirements.txt"), pins(ROOT / "requirements.lock")
    assert image.items() <= lock.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"]]
    for extra in extras.keys() - {"all", "cuda", "demo", "dev", "docs"}:
        wanted += extras[extra]
    for need in map(Requirement, wanted):
        text = str(need)
        if need.name == "segpipe":
            continue
        assert need.specifier.contains(image[canonicalize_name(need.name)]), text
    for tool in ("pytest", "moto", "playwright", "mypy", "hypothesis"):
        assert tool not in image


def test_an_image_of_cpu_wheels_leaves_out_cuda_and_keeps_every_hash() -> None:
    """By the image's own awk: an entry goes with all of its lines."""
    program = re.search(r"awk '(.+?)'", (DOCKER / "Dockerfile").read_text())
    assert program is not None
    whole = DOCKER / "requirements.txt"
    done = subprocess.run(["awk", program[1], whole], capture_output=True, text=True, check=True)
    entries = re.split(r"^(?=[a-z])", whole.read_text(), flags=re.M)
    gone = ("nvidia-", "cuda-", "triton=", "torch=", "torchvision=")
    assert done.stdout == "".join(entry for entry in entries if not entry.startswith(gone))
    assert any(entry.startswith(gone) for entry in entries)


def test_the_image_copies_what_exists_and_no_secrets() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]
    assert len(copied) > 6
    for word in copied:
        assert (ROOT / word).exists(), word
        assert f"!{word.split('/')[0]}" in allowed, word
    assert "infra/compose/secrets" in allowed
    users = re.findall(r"^USER (\d+)", text, re.M)
    assert users == ["1000"], "kubelet must see a number other than 0"


def test_every_file_asks_for_this_version() -> None:
    named = re.compile(r"segpipe-(?:cpu|cuda):([\w.]+)")
    found = {
        path.name: named.findall(path.read_text())
        for folder in ("docker", "k8s", "dask")
        for path in sorted((ROOT / "infra" / folder).rglob("*"))
        if path.is_file() and path.suffix not in (".pyc",)
    }
    versions = [version for each in found.values() for version in each]
    assert len(versions) >= 8
    assert set(versions) == {__version__}, found
