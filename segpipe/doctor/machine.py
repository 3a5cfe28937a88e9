"""Checks of this machine and of what is installed on it, and a run of seconds against a known answer."""

from __future__ import annotations

import gzip
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from segpipe.doctor.finding import Finding, State, check
from segpipe.process.sandbox import landlock_version
from segpipe.sources.readers import TRUSTED, trusted

GIB = 2**30
LEAST_MEMORY = 4 * GIB
"""`tiling.memory` by default."""
LEAST_DISK = 10 * GIB
PROBE_BYTES = 32 * 2**20
SLOW = 30e6
"""Bytes a second: below, writing shards takes longer than a small model's forward passes."""
NVIDIA = "0x10de"
"""Vendor on the PCI bus."""
NEEDED_FORMATS = ("GTiff", "COG", "VRT")
FURTHER_FORMATS = {
    "JP2OpenJPEG": "JPEG 2000, as Sentinel-2 has it",
    "HDF5Image": "HDF5",
    "netCDF": "netCDF",
    "PNG": "PNG",
    "JPEG": "JPEG",
}


@check("python")
def check_python() -> Finding:
    """The interpreter against the range that the package asks for."""
    wanted = SpecifierSet(metadata("segpipe")["Requires-Python"])
    found = f"{platform.python_version()} ({sys.executable})"
    if platform.python_version() in wanted:
        return Finding("python", State.ok, found)
    return Finding("python", State.fail, found, f"use Python {wanted}, in a fresh virtual environment")


@check("packages")
def check_packages() -> Finding:
    """Every package that segpipe needs, and those of its extras that are installed: there, and in range."""
    wanted = [Requirement(line) for line in requires("segpipe") or []]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""}) or _installed(r)]
    wrong = [(r, found) for r in wanted if (found := _installed(r)) not in r.specifier]
    if not wrong:
        return Finding("packages", State.ok, f"segpipe {version('segpipe')}, {len(wanted)} packages in range")
    found = ", ".join(f"{r.name} {have or 'missing'}" for r, have in wrong)
    asked = " ".join(f"'{r.name}{r.specifier}'" for r, _ in wrong)
    return Finding("packages", State.fail, found, f"pip install {asked}")


def _installed(requirement: Requirement) -> str:
    try:
        return version(requirement.name)
    except PackageNotFoundError:
        return ""


@check("machine")
def check_machine() -> Finding:
    """Cores and memory that this process may use."""
    import psutil  # type: ignore[import-untyped,unused-ignore]

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    limit = _memory_limit()
    if limit is not None and limit < total:
        free, total = min(free, limit), limit
    found = f"{cores} cores, {free / GIB:.1f} of {total / GIB:.1f} GiB memory free"
    if free >= LEAST_MEMORY:
        return Finding("machine", State.ok, found)
    advice = f"set tiling.memory below {free / GIB:.1f}GiB in jobs, or end what takes the memory"
    return Finding("machine", State.warn, found, advice)


def _memory_limit() -> int | None:
    """Bytes that the control group of a container allows, if it says so."""
    path = Path("/sys/fs/cgroup/memory.max")
    text = path.read_text().strip() if path.exists() else "max"
    return int(text) if text.isdigit() else None


def nvidia_smi() -> list[str] | None:
    """One line for each GPU: name, driver, memory. None: no driver answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = "--query-gpu=name,driver_version,memory.total,memory.free"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip().splitlines() or None if done.returncode == 0 else None


def nvidia_cards() -> int:
    """NVIDIA display devices on the PCI bus, whether or not they have a driver."""
    count = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text().strip(), (device / "class").read_text().strip()
        except OSError:
            continue
        count += vendor == NVIDIA and kind.startswith("0x03")
    return count


@check("gpu")
def check_gpu() -> Finding:
    """A GPU and its driver."""
    lines = nvidia_smi()
    if lines:
        return Finding("gpu", State.ok, "; ".join(lines))
    if cards := nvidia_cards():
        advice = (
            "install the driver (Debian: `nvidia-driver`; in a container: the NVIDIA container toolkit "
            "and `--gpus all`), then look at `nvidia-smi`"
        )
        return Finding("gpu", State.warn, f"{cards} NVIDIA GPU on the bus, but no driver answers", advice)
    return Finding("gpu", State.ok, "none: models run on the CPU")


@check("torch")
def check_torch() -> Finding:
    """The build of torch, and whether each GPU computes."""
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    found = f"{torch.__version__} ({build} build)"
    gpus = nvidia_smi() or []
    if gpus and torch.version.cuda is None:
        return Finding("torch", State.warn, f"{found}, so the GPU is idle", "install the CUDA build of torch")
    if gpus and not torch.cuda.is_available():
        advice = (
            "the driver is older than torch's CUDA: update the driver, or install torch for an older CUDA"
        )
        return Finding("torch", State.fail, f"{found} sees no GPU, nvidia-smi does", advice)
    for index in range(torch.cuda.device_count()):
        try:
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            right = bool((ones @ ones == 64).all())
        except RuntimeError as error:  # no kernels for this GPU, out of memory, or a broken device
            reason = str(error).splitlines()[0]
            advice = "install a build of torch for this GPU, or free it; meanwhile compute.device: cpu"
            return Finding("torch", State.fail, f"{found}, cuda:{index}: {reason}", advice)
        if not right:
            advice = "the GPU computes wrongly: test it; meanwhile compute.device: cpu"
            return Finding("torch", State.fail, f"{found}, cuda:{index}: 64 ones do not add up", advice)
    count = torch.cuda.device_count()
    return Finding("torch", State.ok, f"{found}, {count} GPUs" if count else found)


@check("onnxruntime")
def check_onnxruntime() -> Finding:
    """Where ONNX models run."""
    if find_spec("onnxruntime") is None:
        return Finding(
            "onnxruntime", State.ok, "not installed: no ONNX models (pip install 'segpipe[models]')"
        )
    import onnxruntime

    providers = onnxruntime.get_available_providers()
    found = f"{onnxruntime.__version__}: {', '.join(p.removesuffix('ExecutionProvider') for p in providers)}"
    if nvidia_smi() and "CUDAExecutionProvider" not in providers:
        advice = "for ONNX models on the GPU: pip uninstall onnxruntime, pip install onnxruntime-gpu"
        return Finding("onnxruntime", State.warn, found, advice)
    return Finding("onnxruntime", State.ok, found)


@check("gdal")
def check_gdal() -> Finding:
    """Formats of GDAL, and whether the coordinate systems are found."""
    import rasterio
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    with rasterio.Env() as env:
        drivers: dict[str, Any] = env.drivers()
    found = f"GDAL {rasterio.__gdal_version__}, {len(drivers)} formats"
    missing = [name for name in NEEDED_FORMATS if name not in drivers]
    if missing:
        advice = "install rasterio's own wheel: pip install --force-reinstall rasterio"
        return Finding("gdal", State.fail, f"{found} without {', '.join(missing)}", advice)
    try:
        CRS.from_epsg(32616)
    except CRSError as error:
        advice = "unset PROJ_LIB, PROJ_DATA and GDAL_DATA: they lead to another installation's files"
        return Finding("gdal", State.fail, f"{found}; EPSG:32616 is not found ({error})", advice)
    lacks = [what for name, what in FURTHER_FORMATS.items() if name not in drivers]
    if lacks:
        advice = "scenes of these formats cannot be read; others can"
        return Finding("gdal", State.warn, f"{found} without {', '.join(lacks)}", advice)
    return Finding("gdal", State.ok, f"{found}: {', '.join([*NEEDED_FORMATS, *FURTHER_FORMATS])}")


@check("readers")
def check_readers() -> Finding:
    """What stands between this machine and the files of strangers."""
    if trusted():
        advice = f"unset {TRUSTED}, unless all files have one author whom you trust"
        return Finding("readers", State.warn, "files are opened in the process that computes", advice)
    version = landlock_version()
    if not version:
        found = "memory and time of readers are bounded, what they read and whom they ask is not"
        return Finding("readers", State.warn, found, "run on Linux 5.13 or later, with Landlock")
    return Finding("readers", State.ok, f"processes without access to anything else (Landlock {version})")


@check("gzip")
def check_gzip() -> Finding:
    """Whether compressed volumes can be read from the middle."""
    import indexed_gzip

    data = os.urandom(2**18)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.gz")
        path.write_bytes(gzip.compress(data, 1))
        with indexed_gzip.IndexedGzipFile(str(path), spacing=2**16) as file:
            file.seek(200_000)
            right = file.read(1000) == data[200_000:201_000]
    found = f"indexed_gzip {version('indexed_gzip')}"
    if right:
        return Finding("gzip", State.ok, found)
    advice = "pip install --force-reinstall indexed-gzip"
    return Finding("gzip", State.fail, f"{found} reads other bytes than were written", advice)


@check("output")
def check_folder(folder: str) -> Finding:
    """Free space and write speed of a folder; it is made if absent, and left as it was found."""
    path = Path(folder).expanduser().absolute()
    made = [p for p in (path, *path.parents) if not p.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        speed = _write_speed(path)
    except OSError as error:
        advice = "give a folder that can be written: `segpipe doctor --out FOLDER`, outputs.dir in jobs"
        return Finding("output", State.fail, f"{path}: {error.strerror or error}", advice)
    finally:
        for empty in made:
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    found = f"{path}: {free / GIB:.0f} GiB free, writes {speed / 1e6:.0f} MB/s"
    if free < LEAST_DISK:
        advice = "free some space, or write elsewhere: a scene's store may take as much as the scene"
        return Finding("output", State.warn, found, advice)
    if speed < SLOW:
        advice = "write to a faster disk (outputs.dir), or expect runs to wait for it"
        return Finding("output", State.warn, found, advice)
    return Finding("output", State.ok, found)


def _write_speed(folder: Path) -> float:
    """Bytes a second, written and flushed; what cannot be compressed, as some disks do."""
    data = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".segpipe-doctor-") as file:
        begun = time.perf_counter()
        for _ in range(PROBE_BYTES // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return PROBE_BYTES / (time.perf_counter() - begun)


EDGE = 160
"""Of the raster, in pixels: nine blocks of 64, the last ones smaller."""
PIXEL = 10.0
"""Metres."""
LIMIT = 100.0
"""Pixels above are class 1."""


def drawn_raster(path: Path) -> np.ndarray:
    """Write one band of concentric waves, with a position; returns the pixels (y, x), float32."""
    import rasterio

    y, x = np.mgrid[:EDGE, :EDGE].astype(np.float32)
    pixels = np.rint(LIMIT + 50 * np.sin(np.hypot(y - 40, x - 90) / 9)).astype(np.float32) + 0.25
    transform = rasterio.Affine(PIXEL, 0.0, 500_000.0, 0.0, -PIXEL, 4_000_000.0)
    profile = {"driver": "GTiff", "width": EDGE, "height": EDGE, "count": 1, "dtype": "float32"}
    with rasterio.open(path, "w", crs="EPSG:32616", transform=transform, **profile) as dataset:
        dataset.write(pixels[None])
    return np.asarray(pixels)


def threshold_card(folder: Path, limit: float = LIMIT) -> Path:
    """The card of a 1×1 convolution with scores 0 and x − limit: class 1 where a pixel is above."""
    import torch

    network = torch.nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
        network.bias.copy_(torch.tensor([0.0, -limit]))  # type: ignore[union-attr]
    with warnings.catch_warnings(action="ignore"):  # TorchScript is to go; it needs no further package yet
        torch.jit.trace(network.eval(), torch.zeros(1, 1, 64, 64)).save(str(folder / "threshold.pt"))
    card = {
        "name": "threshold",
        "kind": "raster",
        "provider": "torchscript",
        "allow_torchscript": True,
        "weights": "threshold.pt",
        "input": {"bands": ["value"]},
        "window": {"size": [64], "halo": [0], "stride": 1},
        "classes": [
            {"value": 0, "name": "below", "color": "#000000"},
            {"value": 1, "name": "above", "color": "#ffffff"},
        ],
    }
    path = folder / "threshold.yaml"
    path.write_text(yaml.safe_dump(card))
    return path


@check("self-test")
def check_engine() -> Finding:
    """Run a small scene from the plan to its report, without Prefect; compare with the threshold itself."""
    from segpipe.api import run

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="segpipe-doctor-") as name:
        folder = Path(name)
        expected = drawn_raster(folder / "scene.tif") > LIMIT
        ended = run(
            {
                "name": "doctor",
                "scenes": [str(folder / "scene.tif")],
                "model": str(threshold_card(folder)),
                "bands": ["value"],
                "tiling": {"block": 64},
                "compute": {"batch": 2, "precision": "fp32"},
                "outputs": {"dir": str(folder / "runs")},
            }
        )
        for error in ended.failed.values():
            return Finding("self-test", State.fail, error, "reinstall segpipe, and report it with this line")
        labels, regions = ended.labels().values, ended.regions
    area = float(regions.loc[regions["class"] == "above", "area_m2"].sum())
    seconds, device = time.perf_counter() - begun, ended.record.versions["device"]
    wrong = int((labels != expected).sum())
    where = f"{ended.record.done[0].plan['blocks']} blocks on {device} in {seconds:.1f} s"
    if wrong == 0 and area == expected.sum() * PIXEL**2:
        return Finding("self-test", State.ok, f"{where}: every pixel right, area {area:,.0f} m2")
    found = (
        f"{where}: {wrong} of {expected.size} pixels wrong, area {area} instead of "
        f"{expected.sum() * PIXEL**2:g} m2"
    )
    advice = (
        "results of this machine cannot be trusted; try compute.device: cpu, and report it with this line"
    )
    return Finding("self-test", State.fail, found, advice)
