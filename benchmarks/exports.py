"""One trained model in every form it can take here: scores on a job's reference, time, size.

    python -m benchmarks.exports [--job configs/jobs/landcover.yaml] [--threads 1] [--repeats 9]

All forms see the same windows in one process and take turns when they are timed. Scores are of the whole
pipeline over the job's scenes against its reference. int8 is calibrated on windows of the job's scenes.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from segpipe.config.card import Card, load_card
from segpipe.config.job import Job, load_job
from segpipe.convert.command import judge, scene_windows
from segpipe.convert.onnx_file import METHODS, export_onnx, quantise
from segpipe.convert.parity import compare, milliseconds
from segpipe.errors import RequestError
from segpipe.models.base import SegmentationModel
from segpipe.models.network import ReadyModel, compiled
from segpipe.models.registry import build_network, load_model
from segpipe.models.weights import resolve_weights

WINDOWS = 16
"""Of the job's scenes: to calibrate and to compare on."""


@dataclass
class Form:
    """A form of the model."""

    name: str
    card_path: Path
    model: SegmentationModel


def forms(path: Path, windows: list[torch.Tensor], folder: Path, threads: int) -> list[Form]:
    """Every form that can be made here; one that cannot says why."""
    card = load_card(path)
    found = [
        Form("torch fp32", path, load_model(card, "cpu", threads, "fp32")),
        Form("torch bf16", path, load_model(card, "cpu", threads, "bf16")),
    ]
    try:
        found.append(Form("torch.compile fp32", path, _compiled(card, threads, windows[0])))
    except RequestError as error:
        print(f"left out: {error}")
    made = {"ONNX fp32": export_onnx(card, folder, windows=windows)}
    first = load_card(made["ONNX fp32"])
    for method in METHODS:
        made[f"ONNX int8 {method}"] = quantise(first, folder, method, windows)
    found += [Form(n, p, load_model(load_card(p), "cpu", threads, "fp32")) for n, p in made.items()]
    return found


def _compiled(card: Card, threads: int, window: torch.Tensor) -> SegmentationModel:
    """The network behind torch.compile, which compiles at the first window."""
    model = ReadyModel(
        card, compiled(card, build_network(card, torch.device("cpu"), threads)), "fp32", threads
    )
    model(window[None])
    return model


def measure(job: Job, threads: int, repeats: int) -> None:
    """Print the table."""
    path = Path(job.model)
    windows = scene_windows(job, path, WINDOWS)
    with TemporaryDirectory() as folder:
        found = forms(path, windows, Path(folder), threads)
        times = milliseconds([form.model for form in found], windows[0], repeats)
        shape = "x".join(str(n) for n in windows[0].shape)
        print(f"\n{path.stem}, windows of {shape}, {threads} threads, median of {repeats} passes")
        print(f"{'':20}{'mIoU':>8}{'accuracy':>10}{'other class':>13}{'ms':>9}{'ratio':>7}{'MB':>7}")
        for form, time in zip(found, times, strict=True):
            card = load_card(form.card_path)
            scores = judge(job, form.card_path, form.model)
            parity = compare(card, found[0].model, form.model, windows)
            size = resolve_weights(card).stat().st_size / 1e6
            print(
                f"{form.name:20}{scores.miou:8.4f}{scores.accuracy:10.4f}{parity.share:13.2e}{time:9.1f}"
                f"{time / times[0]:7.2f}{size:7.2f}"
            )
    print(f"other class: share of elements of {len(windows)} windows whose class is not that of torch fp32")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--job", default="configs/jobs/landcover.yaml", help="with a reference")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    job = load_job(arguments.job, [f"compute.threads={arguments.threads}"])
    measure(job, arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
