"""Run a detector over a scene: boxes of each window are stored, then merged over the scene.

A stage ``detect-<key>`` holds what was found in each window, by the window's name, beside its receipt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from segpipe import ENGINE_VERSION
from segpipe.config.card import Card, read_card
from segpipe.config.job import Job
from segpipe.errors import SceneError
from segpipe.geometry.geometry import RasterGeometry
from segpipe.inference.normalise import Normaliser, Statistics, scene_statistics
from segpipe.inference.queues import Prefetch
from segpipe.inference.settings import Settings
from segpipe.models.weights import resolve_weights, weights_fingerprint
from segpipe.pipeline.plan_scene import device_parts, model_parts
from segpipe.pipeline.scene_io import SceneBlocks, ScenePixels
from segpipe.prompts.grounding.base import Detections, Grounder, Grounding, PhraseAccount
from segpipe.prompts.grounding.merge_boxes import add_accounts, detection_windows, merge_detections, to_scene
from segpipe.prompts.masks.embeddings import Planes, read_box, window_id
from segpipe.prompts.phrases import parse_phrases
from segpipe.prompts.prompt_set import dump_arrays, load_arrays
from segpipe.sources import SceneRef, open_source
from segpipe.sources.base import match_bands
from segpipe.store.stage import Stage, stage_key
from segpipe.store.stop import StopToken
from segpipe.tiling.pyramid import Pyramid, Window
from segpipe.tiling.windows import Blocks

AHEAD = 2
"""Windows read before the one that is looked at."""


@dataclass(frozen=True, kw_only=True)
class DetectorScene:
    """A scene as a detector sees it. Small and picklable."""

    job: Job
    card: Card
    ref: SceneRef
    pixels: ScenePixels
    statistics: tuple[tuple[tuple[float, float], ...], ...]
    settings: Settings
    pyramid: Pyramid
    stage: Stage

    @property
    def phrases(self) -> tuple[str, ...]:
        """What is looked for."""
        return parse_phrases(self.job.prompts.text).phrases

    @property
    def normaliser(self) -> Normaliser:
        """The card's steps, bound to this scene."""
        return Normaliser(self.card, self.pixels.scaling, Statistics(self.statistics))

    def open_image(self) -> SceneBlocks:
        """Open the scene's pixels, as a context."""
        return SceneBlocks(self.pixels)

    def windows(self) -> list[Window]:
        """All windows, the finest first."""
        return [*detection_windows(self.pyramid, range(self.job.prompts.scales))]

    def pending(self) -> list[Window]:
        """Those that are not looked at yet."""
        done = self.stage.done()
        return [w for w in self.windows() if window_id(w) not in done]

    def create(self) -> None:
        """Make the stage where it is absent; it holds no arrays."""
        self.stage.create(None, Blocks((1,), (1,), (0,)), [], {"scene": self.ref.name})


def prepare_detector(job: Job, card_path: str, ref: SceneRef, settings: Settings) -> DetectorScene:
    """Prepare a scene for a model that looks at pictures and takes words; make no stage.

    Raises:
        SceneError: the scene does not suit it.
    """
    options, card = job.prompts, read_card(card_path)
    with open_source(ref.uri, band_names=job.bands) as source:
        pixels = ScenePixels.of(source, job.bands, *match_bands(card, source), job.identity)
    geometry = pixels.geometry
    if not isinstance(geometry, RasterGeometry):
        raise SceneError(
            f"prompts: {card.name!r} looks at pictures; the scene is a volume: valid: a semantic model"
        )
    with SceneBlocks(pixels) as image:
        statistics = scene_statistics(card, geometry, pixels.scaling, image).pairs
    assert card.window_shape is not None
    parts = {
        "source": pixels.identity, "channels": pixels.channels, "engine": ENGINE_VERSION, **model_parts(card),
        **device_parts(settings), "phrases": parse_phrases(options.text).phrases, "scales": options.scales,
        "thresholds": [options.threshold, options.text_threshold],
    }  # fmt: skip
    return DetectorScene(
        job=job, card=card, ref=ref, pixels=pixels, statistics=statistics, settings=settings,
        pyramid=Pyramid((geometry.shape[0], geometry.shape[1]), card.window_shape[-1], 0.0),
        stage=Stage(job.outputs.dir, stage_key("detect", parts)),
    )  # fmt: skip


@lru_cache(maxsize=2)
def _detector(
    folder: str, fingerprint: str, device: str, threshold: float, text_threshold: float
) -> Grounder:
    """One detector a process; ``fingerprint`` tells that its folder changed."""
    import torch

    from segpipe.prompts.grounding.detectors import load_detector

    return load_detector(Path(folder), torch.device(device), threshold, text_threshold)


def detect_windows(scene: DetectorScene, windows: Sequence[Window], stop: StopToken | None = None) -> int:
    """Run the detector on some windows and commit what it finds; return how many there were.

    Raises:
        StoppedError: a stop was requested; what is done stays.
    """
    options, card = scene.job.prompts, scene.card
    detector = _detector(
        str(resolve_weights(card)), weights_fingerprint(card), scene.settings.device,
        options.threshold, options.text_threshold,
    )  # fmt: skip
    normaliser, planes = scene.normaliser, Planes(scene.pixels.geometry.shape, None)
    with scene.open_image() as store:

        def read(window: Window) -> np.ndarray:
            return read_box(store, normaliser, planes, scene.pyramid.box(window), 1 << window.level, 0)[0]

        pictures = ((w, read(w)) for w in windows)
        with Prefetch(pictures, AHEAD) as ahead:
            for window, picture in ahead:
                if stop is not None:
                    stop.check()
                found = detector.ground(picture, scene.phrases)
                files = scene.stage.write_part(window_id(window), dump_grounding(found))
                scene.stage.commit(window_id(window), {"found": len(found.detections)}, files)
    return len(windows)


def merge_windows(
    scene: DetectorScene, phrases: Sequence[str]
) -> tuple[Grounding, list[tuple[str, ...]], list[int]]:
    """Merge the detections of all windows over the scene.

    Returns:
        The grounding, further phrases of each object, and for each phrase how many of its boxes became
        another phrase's object.
    """
    parts, accounts = [], []
    for window in scene.windows():
        found = load_grounding(scene.stage.read_part(window_id(window)))
        parts.append(to_scene(found.detections, window, scene.pyramid))
        accounts.append(found.accounts)
    merged = merge_detections(parts, scene.pyramid, len(phrases))
    also = [tuple(phrases[k] for k in more) for more in merged.also]
    summed = add_accounts(accounts, merged.counts)
    return Grounding(merged.detections, summed), also, [c.also for c in merged.counts]


def dump_grounding(found: Grounding) -> bytes:
    """Exact, as one blob. Detectors match no vocabulary: accounts are numbers."""
    d = found.detections
    accounts = [{**asdict(a), "match": None} for a in found.accounts]
    return dump_arrays(
        start=d.start, stop=d.stop, point=d.point, phrase=d.phrase, score=d.score,
        text=json.dumps({"label": d.label, "accounts": accounts}).encode(),
    )  # fmt: skip


def load_grounding(data: bytes) -> Grounding:
    """The inverse of `dump_grounding`."""
    arrays = load_arrays(data)
    text = json.loads(arrays.pop("text").tobytes())
    detections = Detections(**arrays, label=tuple(text["label"]))
    return Grounding(detections, tuple(PhraseAccount(**a) for a in text["accounts"]))
