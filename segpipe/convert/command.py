"""``segpipe models export``: convert, hold against the first model, and say what it costs and gains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from segpipe.config.card import load_card
from segpipe.config.job import Compute, Job
from segpipe.convert.cards import add_scores
from segpipe.convert.judge import judge, scene_windows
from segpipe.convert.onnx_file import export_onnx
from segpipe.convert.parity import milliseconds, noise_windows
from segpipe.convert.quantise import METHODS, quantise
from segpipe.errors import RequestError
from segpipe.inference.settings import resolve_settings
from segpipe.models.registry import load_model

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
