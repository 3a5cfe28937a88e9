"""A small laboratory: real files, real cards, networks whose receptive radius is known exactly."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import rasterio
import torch
import yaml
from affine import Affine

from segpipe.config.job import Job
from segpipe.geometry.box import Box
from segpipe.inference.block_result import BlockResult, BlockStore
from segpipe.inference.engine import Engine
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.inference.settings import resolve_settings
from segpipe.models.base import SegmentationModel
from segpipe.pipeline.model_scene import Scene, create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.pipeline.progress import Done
from segpipe.sources import SceneRef
from segpipe.sources.base import Pixels
from segpipe.tiling.windows import Index

CLASSES = [
    {"value": 3, "name": "low", "color": "#000000"},
    {"value": 0, "name": "middle", "color": "#00ff00"},
    {"value": 200, "name": "high", "color": "#0000ff"},
]


class Pyramid(torch.nn.Module):
    """Conv, pool by 2, conv, upsample, skip: total stride 2, receptive radius 1 + 2·1 + 1 + 1 ≤ 6."""

    def __init__(self, ndim: int, channels: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(7)
        conv = torch.nn.Conv2d if ndim == 2 else torch.nn.Conv3d
        self.first = conv(channels, 6, 3, padding=1)
        self.pool = torch.nn.MaxPool2d(2) if ndim == 2 else torch.nn.MaxPool3d(2)
        self.second = conv(6, 6, 3, padding=1)
        self.up = torch.nn.Upsample(scale_factor=2.0, mode="nearest")
        self.last = conv(12, classes, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.first(x))
        b = torch.relu(self.second(self.pool(a)))
        return 8 * self.last(torch.cat([a, self.up(b)], 1))


@lru_cache(maxsize=8)
def scripted(ndim: int, channels: int) -> bytes:
    """The network as TorchScript: the same bytes each time, so that it is loaded once per process."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Pyramid(ndim, channels, len(CLASSES)).eval()), buffer)
    return buffer.getvalue()


RADIUS = 6
STRIDE = 2
CENTRED = [{"op": "subtract", "value": [128]}, {"op": "divide", "value": [40]}]
"""Steps of a card that bring uint8 into the range of the networks here."""


def patches(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random squares of 6 elements with a little noise, uint8, never 0: (1, y, x)."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 230, [-(-n // 6) for n in shape])
    fine = np.kron(coarse, np.ones([6] * len(shape), int))[tuple(slice(0, n) for n in shape)]
    return (fine + rng.integers(-15, 16, shape)).astype(np.uint8)[None]


@dataclass(frozen=True)
class Lab:
    """A folder with cards and scenes."""

    folder: Path

    def card(self, ndim: int, channels: int = 1, **changes: Any) -> str:
        """A card of the network above; ``changes`` replace keys."""
        weights = self.folder / f"pyramid{ndim}d{channels}.pt"
        if not weights.exists():
            weights.write_bytes(scripted(ndim, channels))
        bands = [f"b{i}" for i in range(channels)] if ndim == 2 else []
        card = {
            "name": f"pyramid-{ndim}d",
            "kind": "raster" if ndim == 2 else "volume",
            "provider": "torchscript",
            "allow_torchscript": True,
            "weights": weights.name,
            "input": {"bands": bands, "normalisation": []},
            "window": {"size": [32] * ndim, "halo": [8], "stride": STRIDE},
            "classes": CLASSES,
            **changes,
        }
        path = self.folder / f"card-{abs(hash(repr(card)))}.yaml"
        path.write_text(yaml.safe_dump(card))
        return str(path)

    def raster(
        self, values: np.ndarray, nodata: float | None = None, path: str | None = None, **profile: Any
    ) -> SceneRef:
        """(c, y, x) as a GeoTIFF, a new one or over another."""
        path = path or str(self.folder / f"scene-{len(list(self.folder.iterdir()))}.tif")
        settings = {
            "driver": "GTiff",
            "dtype": values.dtype,
            "count": values.shape[0],
            "height": values.shape[1],
            "width": values.shape[2],
            "crs": "EPSG:32633",
            "transform": Affine(10, 0, 500000, 0, -10, 5000000),
            "nodata": nodata,
            **profile,
        }
        with rasterio.open(path, "w", **settings) as target:
            target.write(values)
        return SceneRef("scene", path)

    def volume(self, values: np.ndarray, affine: np.ndarray) -> SceneRef:
        """(z, y, x) as a NIfTI file."""
        path = self.folder / f"scene-{len(list(self.folder.iterdir()))}.nii.gz"
        nib.save(nib.Nifti1Image(values.T, affine), path)
        return SceneRef("scene", str(path))

    def job(self, ref: SceneRef, card: str, out: str, scores: bool = False, **keys: Any) -> Job:
        """A job over one scene."""
        outputs = {"dir": str(self.folder / out), "scores": scores, "keep": ["labels", "image"]}
        return Job.model_validate({"scenes": [ref.uri], "model": card, "outputs": outputs, **keys})


def prepared(job: Job, ref: SceneRef) -> Scene:
    """The scene, planned, with its stages."""
    from segpipe.config.card import read_card

    assert job.model is not None
    settings = resolve_settings(job.compute, read_card(job.model))
    return create_stages(prepare_scene(job, read_card(job.model), ref, settings))


def predict(scene: Scene, blocks: Sequence[Index] | None = None) -> Done:
    """Compute blocks (all that are pending) and clean up."""
    done = predict_blocks(scene, pending_blocks(scene) if blocks is None else blocks)
    if not pending_blocks(scene):
        finish_labels(scene)
    return done


def labels_of(scene: Scene) -> np.ndarray:
    """The finished label map."""
    return np.asarray(scene.labels.array("labels")[...])


def scores_of(scene: Scene) -> np.ndarray:
    """The score map (k, …)."""
    return np.asarray(scene.predict.array("scores")[...])


def low_middle_high(x: torch.Tensor) -> torch.Tensor:
    """Logits of the three classes from the first channel, pixel by pixel."""
    x = x[:, :1]
    return torch.cat([-x, 0 * x + 0.31, x], 1)


@dataclass
class Network:
    """A network that is a function; it remembers how many windows each call saw."""

    answer: Callable[[torch.Tensor], torch.Tensor] = low_middle_high
    calls: list[int] = field(default_factory=list)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(batch))
        return self.answer(batch)


@dataclass
class Watched:
    """A store in front of a real one: it remembers what happened, and a hook runs before each act."""

    store: BlockStore
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    """Called before ``read``, ``ingest`` or ``finish`` is passed on; it may raise."""
    seen: list[str] = field(default_factory=list)
    """``read`` when a read begins, ``ingest`` and ``finish`` when they are done."""

    def read(self, box: Box) -> Pixels:
        self.seen.append("read")
        self.before.get("read", lambda: None)()
        return self.store.read(box)

    def ingest(self, index: Index, box: Box, pixels: Pixels) -> None:
        self.before.get("ingest", lambda: None)()
        self.store.ingest(index, box, pixels)
        self.seen.append("ingest")

    def finish(self, result: BlockResult) -> None:
        self.before.get("finish", lambda: None)()
        self.store.finish(result)
        self.seen.append("finish")

    @property
    def ahead(self) -> int:
        """Most blocks that were read and not yet committed, at any time."""
        most = now = 0
        for event in self.seen:
            now += {"read": 1, "finish": -1, "ingest": 0}[event]
            most = max(most, now)
        return most


def compute(
    scene: Scene,
    model: SegmentationModel,
    store: BlockStore | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> Engine:
    """All pending blocks of a scene by another network than its card's, through the engine itself."""
    card = scene.card
    normaliser = Normaliser(card, scene.pixels.scaling, Statistics(scene.statistics))
    with scene.open_blocks() as real:
        engine = Engine(
            scene.plan,
            card,
            normaliser,
            model,
            store or real,
            scene.settings.tta,
        )
        engine.run(pending_blocks(scene), check_stop)
    return engine
