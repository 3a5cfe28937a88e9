"""``segpipe models export``: convert, judge on a job's scenes, and say what it costs and gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import torch

from segpipe.config.card import load_card, read_card
from segpipe.config.job import Compute, Job, Outputs
from segpipe.convert.onnx_file import METHODS, add_scores, export_onnx, quantise
from segpipe.convert.parity import milliseconds, noise_windows
from segpipe.errors import RequestError
from segpipe.inference.engine import Engine
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.inference.settings import resolve_settings
from segpipe.metrics.overlap import ClassCounts, Counts, class_counts, mean, pixel_accuracy
from segpipe.models.base import SegmentationModel
from segpipe.models.registry import load_model
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import Scene, create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels
from segpipe.sources import discover
from segpipe.tiling.windows import Index

TARGETS = ("onnx", "int8")


def export_model(
    card_path: Path, target: str, folder: Path, job: Job | None, method: str = "static"
) -> Iterator[str]:
    """Convert a model and tell, line by line, what became of it.

    Args:
        card_path: the model's card.
        target: ``onnx`` or ``int8``.
        folder: of the new card.
        job: scenes to calibrate and compare with, and their reference; None: noise only.
        method: of int8: ``static`` or ``dynamic``.

    Raises:
        RequestError: as `export_onnx` and `quantise`, or no such target or method.
    """
    if target not in TARGETS:
        raise RequestError(f"--to: found {target!r}; valid: {', '.join(TARGETS)}")
    if method not in METHODS:
        raise RequestError(f"--method: found {method!r}; valid: {', '.join(METHODS)}")
    card = load_card(card_path)
    windows = scene_windows(job, card_path) if job is not None else []
    if target == "onnx":
        path = export_onnx(card, folder, windows=windows)
    else:
        path = quantise(card, folder, method, windows)
    made = load_card(path)
    yield f"{path}: {made.scores}"
    compute = job.compute if job is not None else Compute()
    threads = resolve_settings(Compute(device="cpu", threads=compute.threads), card).threads
    models = [load_model(c, "cpu", threads, "fp32") for c in (card, made)]
    before, after = milliseconds(models, (windows or noise_windows(card, 1))[0])
    yield (
        f"a window takes {before:.1f} ms before and {after:.1f} ms after, on {threads} threads: "
        f"ratio {after / before:.2f}"
    )
    if job is not None and job.reference is not None:
        text = f"On {job.name}: {judge(job, card_path)} before; {judge(job, path)} after."
        add_scores(path, text)
        yield text


T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """A model against a job's reference, over all its scenes together."""

    accuracy: float
    """Elements of the right class, of all with a reference."""
    miou: float
    """Mean IoU of the classes that prediction or reference has, without background."""
    iou: dict[str, float]
    """IoU by class name; NaN where neither has it."""

    def __str__(self) -> str:
        return f"mIoU {self.miou:.4f}, accuracy {self.accuracy:.4f}"


def judge(job: Job, card_path: str | Path, model: SegmentationModel | None = None) -> Scores:
    """Predict a job's scenes with another card and count, in a store that is thrown away.

    Args:
        job: scenes, bands, tiling and reference; its own model is not read.
        card_path: of the model; on the CPU, in float32.
        model: runs in place of the card's own, e.g. the same one compiled.

    Raises:
        RequestError: the job has no reference.
        SceneError: a scene does not suit the card.
    """
    if job.reference is None:
        raise RequestError(f"{job.name}: reference: none given; scores need one")
    card = read_card(str(card_path))
    total = {value: np.zeros(3, dtype=np.int64) for value in card.values}
    with _scenes(job, card_path) as scenes:
        for scene in scenes:
            _predict(scene, pending_blocks(scene), model)
            finish_labels(scene)
            rows = class_counts(measure_scene(scene)[0].tally)
            found = np.stack([rows.counts.tp, rows.counts.fp, rows.counts.fn], axis=1)
            for value, row in zip(rows.value.tolist(), found, strict=True):
                total[value] = total.get(value, np.int64(0)) + row
    values = np.array(sorted(total))
    counts = Counts(*np.stack([total[int(v)] for v in values], axis=1))
    cells = ClassCounts(np.zeros(len(values), dtype=np.int64), values, counts, 1)
    iou = dict(zip(values.tolist(), counts.iou.tolist(), strict=True))
    shown = [iou[c.value] for c in card.classes if not c.background]
    return Scores(float(pixel_accuracy(cells)[0]), mean(shown), {c.name: iou[c.value] for c in card.classes})


def scene_windows(job: Job, card_path: str | Path, count: int = 32) -> list[torch.Tensor]:
    """Windows as the model sees them, from all over a job's scenes.

    Args:
        job: as for `judge`; no reference is needed.
        card_path: of the model.
        count: at most as many, from the middle block of up to as many scenes.

    Returns:
        Normalised windows, (c, …) float32 each; fewer where the scenes have no more.
    """
    found: list[torch.Tensor] = []
    with _scenes(job, card_path, count) as scenes:
        for scene in scenes:
            blocks = pending_blocks(scene)
            recorder = _Recorder(scene.card.output_channels)
            _predict(scene, blocks[len(blocks) // 2 :][:1], recorder)
            found += recorder.windows
    return _spread(found, count)


class _Recorder:
    """Stands where a network would and keeps what it is shown."""

    device = torch.device("cpu")

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.windows: list[torch.Tensor] = []

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Zeros (n, k, …)."""
        self.windows += [window.clone() for window in batch]
        return torch.zeros(len(batch), self.channels, *batch.shape[2:])


@contextmanager
def _scenes(job: Job, card_path: str | Path, most: int | None = None) -> Iterator[Iterator[Scene]]:
    """The job's scenes, ready to be predicted by a card on the CPU; their store goes at the end."""
    card = read_card(str(card_path))
    with TemporaryDirectory() as folder:
        changes = {
            "model": str(card_path), "regions": None, "outputs": Outputs(dir=folder),
            "compute": Compute(device="cpu", threads=job.compute.threads),
        }  # fmt: skip
        here = job.model_copy(update=changes)
        settings = resolve_settings(here.compute, card)
        refs = discover(here.scenes)
        yield (
            create_stages(prepare_scene(here, card, r, settings)) for r in _spread(refs, most or len(refs))
        )


def _predict(scene: Scene, blocks: Sequence[Index], model: SegmentationModel | None) -> None:
    card, settings = scene.card, scene.settings
    model = model or load_model(card, settings.device, settings.threads, settings.precision)
    normaliser = Normaliser(card, scene.pixels.scaling, Statistics(scene.statistics))
    with scene.open_blocks() as store:
        Engine(scene.plan, card, normaliser, model, store).run(blocks)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most so many of the items, evenly."""
    kept = min(count, len(items))
    return [items[i * len(items) // kept] for i in range(kept)]
