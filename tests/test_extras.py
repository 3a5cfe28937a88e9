"""What a missing extra disables is one line that names it; what needs none goes on without."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from dask.system import CPU_COUNT
from finished import finish
from packaging.requirements import Requirement
from signals import enable_ctrl_c
from world import Ended, World, only_run, write_yaml

from segpipe.config.job import load_job
from segpipe.process.cpus import cgroup_quota, cpu_count
from segpipe.process.extras import DISTRIBUTIONS, EXTRAS

ROOT = Path(__file__).parents[1]


def program(*missing: str) -> list[str]:
    """The command line in a process that finds none of these modules, as where they are not installed."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
        "from segpipe.cli.main import main; main()"
    )
    return [sys.executable, "-c", code]


def without(missing: str, *arguments: str) -> Ended:
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    done = subprocess.run(
        [*program(missing), *arguments], env=environment, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def assert_names_extra(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended
    [line] = ended.errors
    assert all(word in line for word in words), line


def test_every_extra_that_is_named_brings_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, extra in EXTRAS.items():
        package = DISTRIBUTIONS.get(module, module.replace("_", "-")).lower()
        assert package in {Requirement(line).name for line in extras[extra]}, (module, extra)


def test_all_is_every_extra_but_those_of_other_environments() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    [line] = project["optional-dependencies"]["all"]
    others = {"all", "cuda", "demo", "dev", "docs"}
    assert Requirement(line).extras == set(project["optional-dependencies"]) - others


def test_flows_need_prefect(world: World, tmp_path: Path) -> None:
    scan = write_yaml(
        tmp_path / "scan.yaml",
        {
            "name": "lake",
            "lake": {"location": str(world.folder), "pattern": "scene*.tif", "settle_seconds": 0},
            "model": str(world.models / "nearest.yaml"),
            "outputs": {"dir": str(tmp_path / "out")},
        },
    )
    line = "needs Prefect, which is not installed: pip install 'segpipe[prefect]'"
    assert_names_extra(without("prefect", "scan", str(scan)), 2, "segpipe scan", line)
    assert_names_extra(without("prefect", "serve"), 2, "segpipe serve", line)
    assert_names_extra(without("prefect", "train", str(scan)), 2, "segpipe train", line)
    dask = str(world.job(tmp_path / "dask", compute={"runner": "dask"}))
    assert_names_extra(without("prefect", "run", dask), 2, "compute.runner: dask", line)


def test_other_extras_are_named_where_a_job_needs_them(world: World, tmp_path: Path) -> None:
    surface = world.job(
        tmp_path / "surface", measure={"surface": True}, reference={"path": str(world / "truth")}
    )
    ended = without("monai", "run", "--local", str(surface))
    assert_names_extra(ended, 1, "measure.surface needs monai", "'segpipe[models]'")
    hexagons = world.job(tmp_path / "hexagons", regions={"path": "h3:7"})
    assert_names_extra(without("h3", "run", "--local", str(hexagons)), 2, "needs h3", "'segpipe[h3]'")


def test_a_model_names_the_extra_that_it_lacks(world: World, tmp_path: Path) -> None:
    for missing, model in (("skimage", "cloud-otsu"), ("onnxruntime", "cloud-4band")):
        job = world.job(tmp_path / missing, model=model)
        ended = without(missing, "plan", str(job))
        assert_names_extra(
            ended, 2, f"{model}: provider:", f"needs the package {missing}", "'segpipe[models]'"
        )


@pytest.mark.parametrize("missing", ["prefect", ""], ids=["without Prefect", "--local"])
def test_a_run_in_this_process_gives_the_same_numbers(world: World, tmp_path: Path, missing: str) -> None:
    scenes = [str(world / "scene1.tif"), str(world / "scene2.tif")]
    job = world.job(tmp_path / "out", scenes=scenes)
    ended = without(missing, "run", str(job), *(() if missing else ("--local",)))
    assert ended.code == 0, ended
    assert ended.err.splitlines()[-2:] == ["1/2 scene1: done", "2/2 scene2: done"], ended.err
    expected, _ = finish(world.job(tmp_path / "expected", scenes=scenes))
    drop = re.compile(r"^[^,]*,", re.MULTILINE)  # the run's name
    tables = [(Path(p) / "regions.csv").read_text() for p in (only_run(tmp_path / "out"), expected.location)]
    assert drop.sub("", tables[0]) == drop.sub("", tables[1])
    again = without(missing, "run", str(job), *(() if missing else ("--local",)))
    assert again.code == 0 and again.out.startswith("nothing to do"), again


def test_exit_codes_of_a_run_in_this_process(world: World, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.tif"
    damaged.write_bytes((world / "scene1.tif").read_bytes()[:5000])
    job = world.job(tmp_path / "out", scenes=[str(world / "scene1.tif"), str(damaged)])
    ended = without("prefect", "run", str(job))
    assert ended.code == 1 and ended.errors[0].startswith("failed: damaged: "), ended
    assert "1/2 scene1: done" in ended.err and "2/2 damaged: failed" in ended.err
    wrong = without("prefect", "run", str(world.job(tmp_path / "wrong", model="nowhere.yaml")))
    assert wrong.code == 2 and len(wrong.errors) == 1, wrong


def test_ctrl_c_ends_a_run_in_this_process_and_the_same_command_goes_on(world: World, tmp_path: Path) -> None:
    job = world.job(
        tmp_path / "out", card="convolutions", scenes=[str(world / "large.tif")], tiling={"block": 128}
    )
    arguments = [*program(), "run", "--local", str(job)]
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=enable_ctrl_c
    )
    deadline = time.monotonic() + 120
    while not _receipts(tmp_path / "out"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopped; what is done stays" in err, err
    assert _receipts(tmp_path / "out")
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr


def _receipts(out: Path) -> set[Path]:
    """Blocks that are committed."""
    return set(out.rglob("receipts-*/*.json"))


def test_threads_are_those_that_keys_were_made_with() -> None:
    assert cpu_count() == CPU_COUNT
    assert load_job(ROOT / "configs" / "jobs" / "landcover.yaml").compute.threads == "auto"


def test_the_quota_of_a_container_counts(tmp_path: Path) -> None:
    group = tmp_path / "cgroup"
    group.write_text("0::/pod/one\n")
    assert cgroup_quota(tmp_path, group) is None
    two = tmp_path / "pod" / "one"
    two.mkdir(parents=True)
    (two / "cpu.max").write_text("max 100000\n")
    assert cgroup_quota(tmp_path, group) is None
    (two / "cpu.max").write_text("150000 100000\n")
    assert cgroup_quota(tmp_path, group) == 1.5
    one = tmp_path / "cpu,cpuacct"
    one.mkdir()
    (one / "cpu.cfs_quota_us").write_text("-1\n")
    (one / "cpu.cfs_period_us").write_text("100000\n")
    assert cgroup_quota(tmp_path, group) is None  # what version 1 says where nothing limits
    (one / "cpu.cfs_quota_us").write_text("250000\n")
    assert cgroup_quota(tmp_path, group) == 2.5
