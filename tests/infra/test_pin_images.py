"""Digests behind the tags of images, by the command and a program in Docker's place that has some."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.pin_images import IMAGE, files, pin, unpinned

ROOT = Path(__file__).parents[2]
FIRST, SECOND = f"sha256:{'1' * 64}", f"sha256:{'2' * 64}"


def command(folder: Path, docker: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command on a copy of infra/, with that script as Docker."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "docker").write_text(f"#!/bin/sh\n{docker}\n")
    (tools / "docker").chmod(0o755)
    if not (folder / "infra").exists():
        shutil.copytree(
            ROOT / "infra", folder / "infra", ignore=shutil.ignore_patterns("secrets", "__pycache__")
        )
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    words = [sys.executable, "-m", "infra.pin_images", "--folder", str(folder / "infra"), *arguments]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("FROM python:3.11-slim", "python:3.11-slim"),
        ("# syntax=docker/dockerfile:1", "docker/dockerfile:1"),
        ("    image: postgres:15-alpine", "postgres:15-alpine"),
        (
            "    image: &store ${STORE:-minio/minio:RELEASE.2025-09-07T16-13-09Z}",
            "minio/minio:RELEASE.2025-09-07T16-13-09Z",
        ),
        ("  - image: registry.example.org/a/b:1.2 # why", "registry.example.org/a/b:1.2"),
    ],
)
def test_an_image_is_found_pinned_and_pinned_anew(line: str, name: str) -> None:
    assert unpinned(line) == [name]
    pinned = pin(line, {name: FIRST})
    assert pinned == line.replace(name, f"{name}@{FIRST}")
    assert unpinned(pinned) == []
    assert pin(pinned, {name: SECOND}) == line.replace(name, f"{name}@{SECOND}")


@pytest.mark.parametrize(
    "line",
    ["image: segpipe-cpu:0.2.0", "image: ${SEGPIPE_IMAGE:-segpipe}-cpu:${TAG:-0.2.0}", "image: *store"],
)
def test_our_own_images_and_references_are_left(line: str) -> None:
    assert IMAGE.search(line) is None


def test_every_image_of_the_files_is_seen() -> None:
    """By a wider net: whatever stands behind ``image:`` or FROM and is neither ours nor a reference."""
    for path in files():
        for value in re.findall(r"^\s*(?:- )?(?:FROM|image:) (.+)$", path.read_text(), re.M):
            ours = "segpipe-" in value or "SEGPIPE_IMAGE" in value or value.startswith("*")
            assert ours or IMAGE.search(f"image: {value}"), (path, value)


def test_all_files_are_pinned_or_none(tmp_path: Path) -> None:
    before = command(tmp_path, "exit 1", "--check")
    assert before.returncode == 1 and "docker/Dockerfile: python:3.11-slim has no digest" in before.stdout
    texts = {path: path.read_text() for path in files(tmp_path / "infra")}
    answer = (
        f'case "$*" in *python*) echo {FIRST} ;; *minio*) echo away >&2; exit 1 ;; *) echo {SECOND} ;; esac'
    )
    failed = command(tmp_path, answer)
    assert failed.returncode == 1 and re.search(r"minio/minio:\S+: no digest: away", failed.stderr)
    assert {path: path.read_text() for path in files(tmp_path / "infra")} == texts
    done = command(tmp_path, f'case "$*" in *python*) echo {FIRST} ;; *) echo {SECOND} ;; esac')
    assert done.returncode == 0, done.stderr
    assert f"FROM python:3.11-slim@{FIRST}\n" in (tmp_path / "infra/docker/Dockerfile").read_text()
    assert f"postgres:15-alpine@{SECOND}\n" in (tmp_path / "infra/k8s/base/postgres.yaml").read_text()
    assert command(tmp_path, "exit 1", "--check").returncode == 0


def test_what_is_no_digest_is_not_written(tmp_path: Path) -> None:
    done = command(tmp_path, "echo sha256:short")
    assert done.returncode == 1 and "no digest: sha256:short" in done.stderr
