"""Prompts on one slice of a CT volume become solids: Dice of three organs, and memory against depth.

    python -m benchmarks.volumes [CARD] [--depth 30 112] [--reach N]

The first table links slices by a promptable model (the starter model by default): a box on the slice on
which each organ is largest; Dice with the published segmentation in all slices and on the prompted one
alone. The second goes through the first slices of the whole CT, each depth in a fresh process, by linking and
by the memory of a SAM 2 with random weights and features as wide as published ones: the most bytes that
sessions hold, peak memory of the process, and how often a window was encoded. Beside it the library's own
session over the same frames. Needs ../shared/data/totalsegmentator_ct.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import transformers
import yaml

from benchmarks.fresh import run_fresh
from segpipe.config.card import Card, load_card
from segpipe.config.prompts import Choice, PlaneOf, Volume
from segpipe.geometry.box import Box
from segpipe.inference.normalise import Normaliser, Statistics, scene_statistics
from segpipe.pipeline.scene_io import SceneBlocks, ScenePixels
from segpipe.prompts.masks.embeddings import Planes, read_box
from segpipe.prompts.masks.patches import patch_cover
from segpipe.prompts.prompt_set import PromptSet, make_boxes, make_outlines, make_points, make_prompts
from segpipe.prompts.segment_scene import RECENT
from segpipe.prompts.segmenters.base import Embedding, Segmenter
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.prompts.volumes.propagate import Direction, SliceMask, Stop, propagate
from segpipe.prompts.volumes.propagate_memory import VideoNetwork, VideoTracker
from segpipe.prompts.volumes.propagate_prompts import Linker
from segpipe.sources import open_source
from segpipe.tiling.pyramid import Pyramid, Window

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data" / "totalsegmentator_ct"
STARTER = ROOT / "configs" / "models" / "starter-sam-volume.yaml"
ORGANS = {"liver": 5, "spleen": 1, "right kidney": 2}
"""Values of TotalSegmentator's segmentation."""
THROUGH = Volume.model_construct(least_iou=-math.inf, least_overlap=0, change=math.inf)
CPU = torch.device("cpu")


class Slices:
    """Axial slices of a volume, and their embeddings, which are encoded once."""

    def __init__(self, path: Path, card: Card, segmenter: Segmenter) -> None:
        with open_source(str(path)) as source:
            pixels = ScenePixels.of(source, channels=(0,))
        geometry, scaling = pixels.geometry, pixels.scaling
        self.store = SceneBlocks(pixels)
        statistics = scene_statistics(card, geometry, scaling, self.store)
        self.normaliser = Normaliser(card, scaling, Statistics(statistics.pairs))
        self.planes = Planes.of(geometry, PlaneOf.axial)
        self.pyramid = Pyramid(self.planes.plane_shape, segmenter.window[0], 0.25)
        self.segmenter = segmenter
        self.kept: dict[tuple[int, Window], Embedding] = {}
        self.encoded: list[tuple[int, Window]] = []
        self.keep = True
        """Whether embeddings stay in memory, as the cache on disk would keep them."""

    def read(self, index: int, window: Window) -> np.ndarray:
        """What the encoder sees, (c, y, x)."""
        box, step = self.pyramid.box(window), 1 << window.level
        return read_box(self.store, self.normaliser, self.planes, box, step, index)[0]

    def __call__(self, index: int, window: Window) -> Embedding:
        """The embedding of a window of a slice, halved."""
        key = index, window
        if key not in self.kept:
            self.encoded.append(key)
            found = self.segmenter.encode(self.read(index, window)).half()
            if not self.keep:
                return found
            self.kept[key] = found
        return self.kept[key]


def box_around(mask: np.ndarray, axis: int, index: int) -> tuple[list[float], list[float]]:
    """Of what is on one slice, as somebody draws it."""
    found = np.argwhere(mask.take([index], axis=axis)).astype(float)
    start, stop = found.min(axis=0) - 0.5, found.max(axis=0) + 0.5
    start[axis] = stop[axis] = index
    return start.tolist(), stop.tolist()


def prompts_of(boxes: list[tuple[int, list[float], list[float]]]) -> PromptSet:
    """Of boxes alone."""
    return make_prompts(make_points([], 3), make_boxes(boxes, 3), make_outlines([]), {})[0]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Of two masks; NaN where both are empty."""
    both = int(a.sum() + b.sum())
    return float(2 * (a & b).sum() / both) if both else math.nan


def linked(slices: Slices, prompts: PromptSet, rules: Volume, choice: Choice) -> Iterator[SliceMask | Stop]:
    """Masks that prompts lead to, each slice prompted by the one before."""
    axis = slices.planes.axis or 0
    linker = Linker(axis, slices.pyramid, slices.segmenter, lru_cache(RECENT)(slices), choice)
    return propagate(prompts, axis, slices.planes.shape, slices.pyramid, linker, rules)


def organs(path: str, rules: Volume, choice: Choice) -> None:
    """The first table."""
    card = load_card(path)
    slices = Slices(DATA / "example_ct_sm.nii.gz", card, load_segmenter(card, CPU, torch.get_num_threads()))
    truth = np.asarray(nib.load(DATA / "example_seg.nii.gz").dataobj).T
    axis, shape = slices.planes.axis or 0, truth.shape
    assert shape == slices.planes.shape
    others = tuple(i for i in range(3) if i != axis)
    best = {n: int((truth == n).sum(axis=others).argmax()) for n in ORGANS.values()}
    boxes = [(n, *box_around(truth == n, axis, index)) for n, index in best.items()]
    begun = time.perf_counter()
    events = list(linked(slices, prompts_of(boxes), rules, choice))
    seconds = time.perf_counter() - begun
    print(f"{card.name}, {shape[axis]} axial slices: {seconds:.1f} s, {len(slices.encoded)} encoder passes")
    print(f"{'organ':<14}{'voxels':>8}{'slices':>8}{'reached':>9}{'Dice 3D':>9}{'Dice slice':>12}  stopped")
    for name, n in ORGANS.items():
        mine = [e for e in events if isinstance(e, SliceMask) and e.mask.object == n]
        stops = [e for e in events if isinstance(e, Stop) and e.object == n]
        solid = np.zeros(shape, bool)
        for e in mine:
            if e.mask.patch is not None:
                solid |= patch_cover(e.mask.patch, Box.whole(shape))
        there, index = truth == n, best[n]
        alone = dice(solid.take(index, axis), there.take(index, axis))
        extent = int(there.any(axis=others).sum())
        why = "; ".join(f"{s.how.value} at {s.last}: {s.why.value} {s.value:.2f}" for s in stops)
        print(
            f"{name:<14}{int(there.sum()):>8}{extent:>8}{len(mine):>9}"
            f"{dice(solid, there):>9.3f}{alone:>12.3f}  {why}"
        )


def random_card(folder: Path) -> Path:
    """A SAM 2 with random weights: windows of 256, features and memory as wide as the published ones."""
    torch.manual_seed(0)
    hiera = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [256, 256],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 2, 2, 2],
        "global_attention_blocks": [3], "window_positional_embedding_background_size": [4, 4],
    }  # fmt: skip
    vision = {
        "model_type": "sam2_vision_model", "backbone_config": hiera,
        "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[64, 64], [32, 32], [16, 16]],
    }  # fmt: skip
    network = transformers.Sam2VideoModel(
        transformers.Sam2VideoConfig(
            vision_config=vision, prompt_encoder_config={"image_size": 256}, image_size=256,
            memory_attention_rope_feat_sizes=[16, 16],
        )
    )  # fmt: skip
    torch.nn.init.constant_(network.mask_decoder.pred_obj_score_head.proj_out.bias, 20.0)
    network.save_pretrained(folder / "net")
    card = {
        "name": "random", "kind": "volume", "provider": "transformers", "weights": "net",
        "input": {"normalisation": [{"op": "scene_zscore"}]},
        "window": {"size": [1, 256, 256], "fixed": True}, "output": {"kind": "prompted"},
    }  # fmt: skip
    (folder / "random.yaml").write_text(yaml.safe_dump(card))
    return folder / "random.yaml"


def one(way: str, path: str, volume: str) -> None:
    """One row of the second table, in this process."""
    card = load_card(path)
    slices = Slices(Path(volume), card, load_segmenter(card, CPU, 1))
    slices.keep = False
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    held = {"linking": by_linking, "video": by_video, "library": by_library}[way](slices, card)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    different = len(set(slices.encoded))
    print(slices.planes.count, held, len(slices.encoded), different, f"{peak:.0f} {peak - loaded:.0f}")


def middle_box(slices: Slices) -> PromptSet:
    """Of half the plane, on the middle slice."""
    axis, shape = slices.planes.axis or 0, slices.planes.shape
    start, stop = [n / 4 for n in shape], [3 * n / 4 for n in shape]
    start[axis] = stop[axis] = shape[axis] // 2
    return prompts_of([(1, start, stop)])


def by_linking(slices: Slices, card: Card) -> int:
    """Nothing but a mask a chain is held."""
    for _ in linked(slices, middle_box(slices), THROUGH, Choice.score):
        pass
    return 0


def by_video(slices: Slices, card: Card) -> int:
    """The most bytes that sessions held."""
    axis, shape = slices.planes.axis or 0, slices.planes.shape
    tracker = VideoTracker(axis, shape[axis], slices.pyramid, VideoNetwork(card, CPU), slices)
    most = prompted = 0
    for event in propagate(middle_box(slices), axis, shape, slices.pyramid, tracker, THROUGH):
        memories = (*tracker._prompted.values(), *tracker._chains.values())
        most = max(most, held_bytes([vars(memory) for memory in memories]))
        prompted += isinstance(event, SliceMask) and event.how is Direction.prompted
    assert prompted == 1
    return most


def by_library(slices: Slices, card: Card) -> int:
    """Bytes that the library's session holds after both directions, all frames given at once."""
    path = Path(card.folder) / str(card.weights)
    network: Any = transformers.Sam2VideoModel.from_pretrained(path).eval()
    window = Window(slices.pyramid.levels - 1, (0, 0))
    frames = np.stack([slices.read(i, window) for i in range(slices.planes.count)])
    slices.encoded += [(i, window) for i in range(len(frames))]
    video = torch.from_numpy(frames).repeat(1, 3, 1, 1)
    session = transformers.Sam2VideoInferenceSession(
        video=video, video_height=256, video_width=256, dtype=torch.float32
    )
    middle = len(frames) // 2
    prompt = {"point_coords": torch.tensor([[[[60.0, 50.0]]]]), "point_labels": torch.ones(1, 1, 1).int()}
    session.add_point_inputs(session.obj_id_to_idx(1), middle, prompt)
    session.obj_with_new_inputs = [1]
    with torch.inference_mode():
        network(session, frame_idx=middle)
        for reverse in (False, True):
            for _ in network.propagate_in_video_iterator(session, middle, reverse=reverse):
                pass
    return held_bytes([vars(session), vars(session.cache)])


def held_bytes(value: Any) -> int:
    """Bytes of all tensors inside mappings and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = list(value.values()) if isinstance(value, dict) else value
    return sum(map(held_bytes, parts)) if isinstance(parts, (list, tuple)) else 0


def memory(depths: list[int], fresh: Callable[..., list[str]] = run_fresh) -> None:
    """The second table."""
    image = nib.load(DATA / "example_ct.nii.gz")
    columns = ("slices", "held, MiB", "encoded", "of them again", "peak, MiB", "after loading")
    print(f"{'way':<9}" + "".join(f"{c:>15}" for c in columns))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        card = random_card(folder)
        for depth in depths:
            volume = folder / f"ct-{depth}.nii.gz"
            nib.save(image.slicer[:, :, :depth], volume)
            for way in ("linking", "video", "library"):
                count, held, encoded, different, peak, more = fresh(
                    "benchmarks.volumes", way, str(card), str(volume), OMP_NUM_THREADS="1"
                )
                again, megabytes = int(encoded) - int(different), f"{int(held) / 2**20:.2f}"
                found = (count, megabytes, encoded, again, peak, more)
                print(f"{way:<9}" + "".join(f"{c:>15}" for c in found))


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", nargs="?", default=str(STARTER), help="of a promptable model for volumes")
    parser.add_argument("--depth", type=int, nargs="*", default=[30, 112])
    parser.add_argument("--reach", type=int, default=0, help="slices at most on each side; 0: no bound")
    parser.add_argument("--choice", type=Choice, default=Choice.score, help="on prompted slices")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(*arguments.one)
        return
    if not DATA.is_dir():
        print(f"{DATA} is not here: nothing was measured")
        return
    card = load_card(arguments.card)
    if (Path(card.folder) / str(card.weights)).exists():
        rules = Volume(reach=arguments.reach)
        organs(arguments.card, rules, arguments.choice)
    else:
        print(f"{arguments.card}: its weights are not here: no Dice was measured")
    if arguments.depth:
        memory(arguments.depth)


if __name__ == "__main__":
    main()
