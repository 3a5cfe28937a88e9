"""The wheel: what it puts where, and that it is enough without the repository beside it."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from world import World

ROOT = Path(__file__).parents[1]
SOURCES = ("segpipe", "flows", "tasks", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")

pytest.importorskip("setuptools")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "tree" / name)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*build, "-w", str(folder / "dist"), str(folder / "tree")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [made] = (folder / "dist").glob("segpipe-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH: what pip would put into site-packages."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_every_name_at_the_top_begins_with_segpipe(wheel: Path) -> None:
    top = {name.partition("/")[0] for name in names(wheel)}
    assert {"segpipe", "segpipe_flows", "segpipe_tasks"} < top
    assert all(name.startswith("segpipe") for name in top), top


def test_every_module_and_config_is_there_and_no_script_that_made_weights(wheel: Path) -> None:
    found = names(wheel)
    places = {"segpipe": "segpipe", "flows": "segpipe_flows", "tasks": "segpipe_tasks"}
    for folder, package in places.items():
        files = [
            p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".html", ".css", ".js", ".typed")
        ]
        missing = {f"{package}/{p.relative_to(ROOT / folder).as_posix()}" for p in files} - found
        assert not missing
    assert "segpipe/py.typed" in found
    scripts = ROOT / "configs" / "models" / "starter-sam" / "train"
    for path in (ROOT / "configs").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            inside = f"segpipe/builtin/{path.relative_to(ROOT / 'configs').as_posix()}"
            assert (inside in found) == (scripts not in path.parents), inside


def test_the_command_is_an_entry_point(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt")]
        points = configparser.ConfigParser()
        points.read_string(archive.read(name).decode())
    assert points["console_scripts"]["segpipe"] == "segpipe.cli.main:main"


def use(installed: Path, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    cwd.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_cards_are_listed_and_shown_by_name_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = use(installed, tmp_path / "empty", "-c", "import segpipe; print(segpipe.__file__)")
    assert where.stdout.strip() == str(installed / "segpipe" / "__init__.py")
    listed = use(installed, tmp_path / "empty", "-m", "segpipe.cli", "models")
    shipped = {path.stem for path in (ROOT / "configs" / "models").glob("*.yaml")}
    assert listed.returncode == 0 and all(name in listed.stdout for name in shipped), listed
    shown = use(installed, tmp_path / "empty", "-m", "segpipe.cli", "models", "show", "landcover-unet")
    assert shown.returncode == 0 and "landcover-unet/weights.safetensors" in shown.stdout, shown


def test_a_job_that_names_a_card_runs_in_an_empty_folder(
    installed: Path, tmp_path: Path, world: World
) -> None:
    job = world.job(
        tmp_path / "empty" / "out", model="landcover-unet", bands=["red", "nir"],
        scenes=[str(world / "scene1.tif")],
    )  # fmt: skip
    ended = use(installed, tmp_path / "empty", "-m", "segpipe.cli", "plan", str(job))
    assert ended.returncode == 2, ended  # the card is found and wants bands that the scene has not
    assert "error: scene1: bands" in ended.stderr and "blue" in ended.stderr, ended


def test_flows_are_found_by_their_entry_points(installed: Path, tmp_path: Path) -> None:
    code = (
        "from importlib import import_module\n"
        "from segpipe_flows.deployments import DEPLOYMENTS\n"
        "for each in DEPLOYMENTS:\n"
        "    module, _, name = each.entrypoint.rpartition('.')\n"
        "    print(getattr(import_module(module), name).name, import_module(module).__file__)\n"
    )
    ended = use(installed, tmp_path / "empty", "-c", code)
    assert ended.returncode == 0, ended.stderr
    lines = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert set(lines) == {"segment", "scan", "prompt", "train", "compare"}
    assert all(path.startswith(str(installed / "segpipe_flows")) for path in lines.values())
