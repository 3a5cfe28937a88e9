"""The memory of video models over slices: the library's own sessions, frames held in full, say the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as library

from segpipe.config.prompts import Volume
from segpipe.errors import RequestError
from segpipe.prompts.segment_scene import RECENT
from segpipe.prompts.segmenters.base import Embedding, Prompt
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.prompts.volumes.propagate import StopReason, propagate
from segpipe.prompts.volumes.propagate_memory import Memory, VideoNetwork, VideoTracker
from segpipe.tiling.pyramid import Pyramid
from tests.prompts.solids import Truth, TruthMemory, ball, collect, embedder, said, slanted, slice_box
from tests.prompts.tiny_sams import VIDEO_NETWORKS, card_for, picture, tiny, weighted

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
EDGE, DEPTH = 64, 8
NEAR = 3e-3
"""Of logits of some units: rounding grows from slice to slice, and is handed on by the memory."""
ANY = Volume(least_iou=0, least_overlap=0, change=1e30)
BOX = (1, (3, 9.5, 12.5), (3, 50.5, 40.5))
"""On slice 3; in x and y of the library, whose boxes go from centre to centre: 13, 10, 40, 50."""


VIDEO_CLASSES = {"sam2_video": library.Sam2VideoModel, "edgetam_video": library.EdgeTamVideoModel}
WIDE = [
    ("vision_config", "fpn_hidden_size"),
    ("prompt_encoder_config", "hidden_size"),
    ("mask_decoder_config", "hidden_size"),
    ("", "memory_attention_hidden_size"),
    ("", "memory_encoder_hidden_size"),
    ("", "mask_downsampler_embed_dim"),
    ("", "memory_fuser_embed_dim"),
]


def network_of(family: str) -> Any:
    """Random weights, under which an object is always said to be there."""
    config = VIDEO_NETWORKS[family][0]().config
    # The library's memory attention takes keys of 64 numbers alone.
    config.memory_encoder_output_channels = 64
    for part, name in WIDE:
        setattr(getattr(config, part) if part else config, name, 128)
    if family == "edgetam_video":
        config.memory_attention_rope_k_sizes = [4, 4]
        config.perceiver_resampler_num_latents = config.perceiver_resampler_num_latents_2d = 16
    network = weighted(partial(VIDEO_CLASSES[family], config))
    torch.nn.init.constant_(network.mask_decoder.pred_obj_score_head.proj_out.bias, 20.0)
    return network


@dataclass(frozen=True)
class World:
    """One family: the library's model with eight frames, and ours from the folder that it was saved in."""

    published: Any
    kind: str
    network: VideoNetwork
    card: Any
    frames: np.ndarray
    embeddings: list[Embedding]

    def session(self) -> Any:
        session = getattr(library, f"{self.kind}InferenceSession")
        return session(
            video=torch.from_numpy(self.frames), video_height=EDGE, video_width=EDGE, dtype=torch.float32
        )

    def add(self, session: Any, frame: int, **given: Any) -> Any:
        """By the library's processor; then the frame's own mask."""
        self.processor.add_inputs_to_inference_session(session, frame, 1, **given)
        return self.large(self.published(session, frame_idx=frame))

    @property
    def processor(self) -> Any:
        size = {"height": EDGE, "width": EDGE}
        return library.Sam2VideoProcessor(
            library.Sam2ImageProcessor(size=size), library.Sam2VideoVideoProcessor(size=size)
        )

    def large(self, output: Any) -> np.ndarray:
        [masks] = self.processor.post_process_masks([output.pred_masks], [[EDGE, EDGE]], binarize=False)
        return masks[0, 0].numpy()

    def propagated(self, session: Any, start: int, reverse: bool) -> dict[int, np.ndarray]:
        """Without the frame that it starts from."""
        outputs = self.published.propagate_in_video_iterator(session, start, reverse=reverse)
        return {o.frame_idx: self.large(o) for o in outputs if o.frame_idx != start}


@pytest.fixture(scope="module", params=["sam2_video", "edgetam_video"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp(request.param)
    published = network_of(request.param)
    published.save_pretrained(folder / "net")
    card = card_for(folder)
    image = np.moveaxis(picture(EDGE), -1, 0).astype(np.float32) / 100 - 1
    frames = np.stack([np.roll(image, (3 * i, 2 * i), (1, 2)) for i in range(DEPTH)])
    kind = {"sam2_video": "Sam2Video", "edgetam_video": "EdgeTamVideo"}[request.param]
    segmenter = load_segmenter(card, CPU)
    return World(published, kind, VideoNetwork(card, CPU), card, frames, segmenter.encode_batch(frames))


def ours(world: World, prompts: Any, depth: int = DEPTH) -> tuple[dict[int, np.ndarray], list[int]]:
    shape = (depth, EDGE, EDGE)
    asked: list[int] = []

    def embed(index: int, _: Any) -> Embedding:
        asked.append(index)
        return world.embeddings[index % DEPTH]

    pyramid = Pyramid(shape[1:], EDGE, 0.25)
    tracker = VideoTracker(0, depth, pyramid, world.network, lru_cache(RECENT)(embed))
    events = propagate(prompts, 0, shape, pyramid, tracker, ANY)
    return collect(events, shape)[0], asked


def test_both_directions_are_the_librarys(world: World) -> None:
    """A box and a negative point on slice 3, forward and, in a session of its own, backward."""
    given = {
        "input_boxes": [[[13, 10, 40, 50]]],
        "input_points": [[[[20, 45]]]],
        "input_labels": [[[0]]],
    }
    expected = {}
    for reverse in (False, True):
        session = world.session()
        expected[3] = world.add(session, 3, **given)
        expected.update(world.propagated(session, 3, reverse))
    assert sorted(expected) == [*range(DEPTH)]
    solids, asked = ours(world, said([(1, (3, 45, 20), False)], [BOX]))
    assert sorted(asked) == [*range(DEPTH)]  # each once, for both directions
    for index, logits in expected.items():
        clear = np.abs(logits) > NEAR
        assert 0.01 < (logits > 0).mean() < 0.99
        assert clear.mean() > 0.98
        np.testing.assert_array_equal(solids[1][index][clear], (logits > 0)[clear])


def test_logits_corrections_and_masks_are_the_librarys(world: World) -> None:
    """Two prompted slices, one of them a mask, and a negative point on a slice that was tracked."""
    mask = np.hypot(*(np.mgrid[:EDGE, :EDGE] - 30)) < 14
    network, session = world.network, world.session()
    point = np.array([[30, 25]], np.float32)
    mine = Memory(DEPTH)
    for frame, given, prompt in (
        (1, {"input_points": [[point.tolist()]], "input_labels": [[[1]]]}, Prompt(point, np.array([1]))),
        (6, {"input_masks": mask}, mask),
    ):
        theirs = world.add(session, frame, **given)
        seen = network.prompt(mine, frame, world.embeddings[frame], prompt)
        np.testing.assert_allclose(seen.logits, theirs, atol=NEAR)
    beside = Prompt(np.array([[5, 6]], np.float32), np.array([0]))
    for index in (2, 3, 4):
        correction = None
        if index == 3:
            correction = beside
            # a click on a frame that was tracked, as the library has it
            session.frames_tracked_per_obj[0][3] = {"reverse": False}
            world.processor.add_inputs_to_inference_session(
                session, 3, 1, input_points=[[[[5, 6]]]], input_labels=[[[0]]]
            )
        theirs = world.large(world.published(session, frame_idx=index))
        seen = network.track(mine, index, world.embeddings[index], False, correction)
        np.testing.assert_allclose(seen.logits, theirs, atol=NEAR)


def test_two_prompted_slices(world: World) -> None:
    """Each chain knows both, and goes half way: the library started at 1, and backward from 6."""
    points = [(1, (1, 25, 30), True), (1, (6, 30, 28), True)]
    expected: dict[int, np.ndarray] = {}
    for start, reverse, wanted in ((1, False, (2, 3)), (6, True, (5, 4)), (6, False, (7,)), (1, True, (0,))):
        session = world.session()
        for frame, xy in ((1, [30, 25]), (6, [28, 30])):
            expected[frame] = world.add(session, frame, input_points=[[[xy]]], input_labels=[[[1]]])
        found = world.propagated(session, start, reverse)
        expected.update({index: found[index] for index in wanted})
    solids, _ = ours(world, said(points))
    assert sorted(expected) == [*range(DEPTH)]
    for index, logits in expected.items():
        clear = np.abs(logits) > NEAR
        np.testing.assert_array_equal(solids[1][index][clear], (logits > 0)[clear])
    both, _ = ours(world, said([*points, (2, (2, 40, 12), True)]))
    np.testing.assert_array_equal(both[1], solids[1])  # another object changes no bit


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors(one)


def test_memory_does_not_grow_with_depth(world: World) -> None:
    """Bytes of tensors held after each slice: the most of 30 slices is the most of 112."""
    most = {}
    for depth in (30, 112):
        shape = (depth, EDGE, EDGE)
        pyramid = Pyramid(shape[1:], EDGE, 0.25)
        tracker = VideoTracker(0, depth, pyramid, world.network, lambda i, _: world.embeddings[i % DEPTH])
        prompts = said([(1, (4, 25, 30), True)])
        held = []
        for _ in propagate(prompts, 0, shape, pyramid, tracker, ANY):
            memories = (*tracker._prompted.values(), *tracker._chains.values())
            held.append(sum(t.numel() * t.element_size() for m in memories for t in tensors(vars(m))))
        most[depth] = max(held)
        assert len(held) == depth + 2  # every slice and two ends
    assert most[30] == most[112]
    session = world.session()
    world.add(session, 0, input_points=[[[[30, 25]]]], input_labels=[[[1]]])
    world.propagated(session, 0, False)
    held = sum(t.numel() * t.element_size() for t in tensors(vars(session)))
    assert held > most[112]  # the library's, of one object and eight frames


def test_solids_by_a_memory_that_knows() -> None:
    """Windows widen and follow: nothing is cut, and a solid is found whole."""
    shape = (34, 100, 100)
    solid = slanted(shape, (9, 12), 2.0, 5)
    pyramid = Pyramid(shape[1:], 32, 0.1)
    embed, _ = embedder(solid.astype(int), 0, pyramid, Truth(32).encode)
    tracker = VideoTracker(0, shape[0], pyramid, TruthMemory(32), embed)  # type: ignore[arg-type]
    events = propagate(said(boxes=[slice_box(solid, 0, 2)]), 0, shape, pyramid, tracker, ANY)
    solids, answers, stops = collect(events, shape)
    assert not any(a.mask.cut for a in answers)
    assert sorted(a.index for a in answers) == [*range(34)]
    assert {s.why for s in stops.values()} == {StopReason.end}
    fine = [a.index for a in answers if a.mask.patch.scale == 1]
    assert len(fine) > 5
    np.testing.assert_array_equal(solids[1][fine], solid[fine])
    assert (solids[1] & solid).sum() / (solids[1] | solid).sum() > 0.75


def test_ends_of_a_ball_and_two_objects() -> None:
    shape = (26, 40, 40)
    labels = np.zeros(shape, int)
    labels[ball(shape, (12, 14, 17), 9)], labels[ball(shape, (14, 30, 30), 6)] = 1, 2
    pyramid = Pyramid(shape[1:], 64, 0.25)
    embed, asked = embedder(labels, 0, pyramid, Truth(64).encode)
    boxes = [slice_box(labels == n, 0, 13, n) for n in (1, 2)]
    tracker = VideoTracker(0, shape[0], pyramid, TruthMemory(64), lru_cache(RECENT)(embed))  # type: ignore[arg-type]
    events = propagate(said(boxes=boxes), 0, shape, pyramid, tracker, ANY)
    solids, _, stops = collect(events, shape)
    for number, (first, last) in ((1, (3, 21)), (2, (8, 20))):
        np.testing.assert_array_equal(solids[number], labels == number)
        assert stops[number, 13, "forward"].last == last
        assert stops[number, 13, "backward"].last == first
    assert {s.why for s in stops.values()} == {StopReason.empty}
    assert len(asked) == len(set(asked))


def test_refused(tmp_path: Path) -> None:
    tiny("sam").save_pretrained(tmp_path / "net")
    with pytest.raises(RequestError, match="model_type is 'sam'; valid: sam2_video, edgetam_video"):
        VideoNetwork(card_for(tmp_path), CPU)
