"""Volumes by the memory of a video model: slices are frames (SAM 2 and 2.1, EdgeTAM).

Ravi et al., SAM 2, ICLR 2025; Zhou et al., EdgeTAM, CVPR 2025. The networks and their memory are the
transformers library's. Its session keeps everything that it was ever given or told, so one session lives for
one slice here: it is handed what the network's memory looks at (`Memory`), by its own methods, and what it
remembers of the slice is taken from it again. That is exact, for a pass looks at nothing else, and its size
does not grow with the depth. Features come from the embeddings of the same folder's segmenter, one slice at a
time, so no slice is encoded for this alone. Each chain has a memory of its own with all the object's prompted
slices in it, so that a chain answers what ``propagate_in_video_iterator`` does from its slice, whatever else
is tracked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers as library
from torch.nn import functional

from segpipe.config.card import Card
from segpipe.models.network import forward_pass
from segpipe.models.providers.transformers.configs import load_pretrained
from segpipe.prompts.masks.decode import window_prompt
from segpipe.prompts.segmenters.base import Embedding, Prompt, check_prompts
from segpipe.prompts.segmenters.sam import embedding_shapes, read_folder
from segpipe.prompts.segmenters.torch_base import embedding_tensors, library_config
from segpipe.prompts.volumes.propagate import Chain, Embedder, Section, section_of, wider
from segpipe.prompts.volumes.slices import ObjectPrompts, SlicePrompt, placed
from segpipe.tiling.pyramid import Pyramid, Window

FAMILIES = {"sam2_video": "Sam2Video", "edgetam_video": "EdgeTamVideo"}
"""Beginning of the library's class names, by a folder's `model_type`."""

POINTER, SPACE = "object_pointer", ("maskmem_features", "maskmem_pos_enc")
"""What a session remembers of a slice: a vector, and maps."""

Outputs = dict[int, dict[str, torch.Tensor]]
"""What is remembered, by slice."""


def has_memory(card: Card) -> bool:
    """Whether a promptable model's folder is that of a video model, which remembers slices."""
    return card.provider == "transformers" and read_folder(card).kind in FAMILIES


ME, MINE = 1, 0
"""The only object of a session, and its index there."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One object on one slice, as a network saw it."""

    logits: np.ndarray
    """(y, x) float32 of the window; −1024 throughout where the network says that there is no object."""
    iou: float


@dataclass(eq=False)
class Memory:
    """What the network remembers of one object."""

    depth: int
    """Slices of the volume."""
    prompted: Outputs = field(default_factory=dict)
    tracked: Outputs = field(default_factory=dict)


class VideoNetwork:
    """A network with a memory, ready on its device."""

    def __init__(self, card: Card, device: torch.device, threads: int = 1) -> None:
        """Load it.

        Args:
            card: of a promptable model whose folder is a video model's.
            device: where it runs.
            threads: on a CPU.

        Raises:
            RequestError: it is none, or the folder is damaged.
        """
        folder = read_folder(card)
        config_json, kind = folder.path / "config.json", folder.kind
        wrong = partial(card.error, "weights")
        if kind not in FAMILIES:
            raise wrong(f"{config_json}: model_type is {kind!r}; valid: {', '.join(FAMILIES)}")
        name = f"{FAMILIES[kind]}Model"
        network = getattr(library, name)
        config = library_config(network.config_class, folder.data, f"{config_json} makes no {name}", wrong)
        found = [config.image_size, list(config.memory_attention_rope_feat_sizes)]
        if found != (valid := [folder.edge, [folder.grid] * 2]):
            raise wrong(
                f"{config_json}: found image_size, memory_attention_rope_feat_sizes {found}; valid: {valid}"
            )
        self.window = (folder.edge, folder.edge)
        self.mask_shape = (4 * folder.grid, 4 * folder.grid)
        self.shapes = embedding_shapes(folder)
        self._device, self._threads = device, threads
        loaded: Any = load_pretrained(network, folder.path, config, wrong)
        self._network = loaded.to(device)
        self._session_class: Any = getattr(library, f"{FAMILIES[kind]}InferenceSession")
        self._iou: Any = None
        self._network.mask_decoder.register_forward_hook(self._note_iou)
        grid = torch.Size((1, self.shapes["image"][0], folder.grid, folder.grid))
        with forward_pass(device, "fp32", threads):
            place = self._network.vision_encoder.neck.position_encoding(grid, device, torch.float32)
            self._place = place.flatten(2).permute(2, 0, 1)

    def _note_iou(self, _module: Any, _inputs: Any, output: Any) -> None:
        """The predicted IoU of the mask that is taken: of several masks the library takes the best."""
        self._iou = output[1].max()

    def prompt(self, memory: Memory, index: int, embedding: Embedding, prompt: Prompt | np.ndarray) -> Seen:
        """Return the mask of a prompted slice, which is remembered as such.

        Args:
            memory: Of the object.
            index: Of the slice.
            embedding: Of the object's window of the slice.
            prompt: Points and a box, or the mask itself, (y, x) bool of the window.
        """
        session = self._session(memory, index, embedding)
        self._ask(session, index, prompt)
        seen = self._run(session, index, reverse=False)
        memory.prompted[index] = self._remembered(session, index, prompted=True)
        return seen

    def track(
        self, memory: Memory, index: int, embedding: Embedding, reverse: bool, prompt: Prompt | None = None
    ) -> Seen:
        """Return the mask of the next slice, by memory.

        Args:
            memory: Of the object; it has a prompted slice.
            index: Of the slice.
            embedding: Of the object's window of the slice.
            reverse: Slices come in descending order.
            prompt: Negative points, which correct what is remembered; None: none.
        """
        session = self._session(memory, index, embedding)
        seen = self._run(session, index, reverse)
        if prompt is not None and len(prompt.points_xy):
            # On a slice that was tracked before, the library heeds points and memory together.
            self._ask(session, index, prompt)
            seen = self._run(session, index, reverse)
        memory.tracked[index] = self._remembered(session, index, prompted=False)
        self._forget(memory.tracked, index)
        return seen

    def _session(self, memory: Memory, index: int, embedding: Embedding) -> Any:
        """Return a session that knows a memory and the features of one slice."""
        session = self._session_class(
            video=torch.empty(memory.depth, 0),  # it counts its frames, to know where the video ends
            inference_device=self._device,
            inference_state_device=self._device,
            dtype=torch.float32,
        )
        session.obj_id_to_idx(ME)
        for outputs, prompted in ((memory.prompted, True), (memory.tracked, False)):
            for other, found in outputs.items():
                session.store_output(MINE, other, output_value=found, is_conditioning_frame=prompted)
        session.cache.cache_vision_features(index, self._features(embedding))
        return session

    def _ask(self, session: Any, index: int, prompt: Prompt | np.ndarray) -> None:
        """Hand a prompt to the session, as the library's processor does."""
        if isinstance(prompt, np.ndarray):
            mask = torch.from_numpy(prompt.astype(np.float32))[None, None]
            session.add_mask_inputs(MINE, index, mask)
        else:
            check_prompts([prompt], self.window, self.mask_shape)
            xy, labels = prompt.points_xy, prompt.labels
            if prompt.box_xyxy is not None:
                xy = np.concatenate((prompt.box_xyxy.reshape(2, 2), xy))
                labels = np.concatenate(([2, 3], labels))
            inputs = {
                "point_coords": torch.from_numpy(xy.astype(np.float32))[None, None],
                "point_labels": torch.from_numpy(labels.astype(np.int32))[None, None],
            }
            session.add_point_inputs(MINE, index, inputs)
        session.obj_with_new_inputs = [ME]

    def _run(self, session: Any, index: int, reverse: bool) -> Seen:
        """Return the answer of one pass of decoder and memory over one slice."""
        with forward_pass(self._device, "fp32", self._threads):
            found = self._network(session, frame_idx=index, reverse=reverse)
            large = functional.interpolate(
                found.pred_masks, self.window, mode="bilinear", align_corners=False
            )
        return Seen(large[0, 0].cpu().numpy(), float(self._iou))

    def _remembered(self, session: Any, index: int, prompted: bool) -> dict[str, torch.Tensor]:
        """Return what later slices look at; masks are large, and never looked at again."""
        names = (POINTER, *SPACE)
        return {name: session.get_output(MINE, index, name, prompted) for name in names}

    def _features(self, embedding: Embedding) -> dict[str, list[torch.Tensor]]:
        """An embedding as the session keeps a frame's features: (y · x, 1, c), finest first.

        A segmenter's embedding has the vector in it that says that there is no memory.
        """
        maps = embedding_tensors(embedding, self.shapes, self._device)
        features = [m[0].flatten(1).T[:, None] for m in maps]
        features[-1] = features[-1] - self._network.no_memory_embedding
        return {"vision_feats": features, "vision_pos_embeds": [self._place]}

    def _forget(self, tracked: Outputs, index: int) -> None:
        """Drop of tracked slices what the memory will not look at from the next slice on."""
        config = self._network.config
        for other in list(tracked):
            behind = abs(index - other) + 1
            if behind >= max(config.max_object_pointers_in_encoder, config.num_maskmem):
                del tracked[other]
            elif behind >= config.num_maskmem:
                tracked[other] = {POINTER: tracked[other][POINTER]}


@dataclass(eq=False)
class VideoTracker:
    """A `segpipe.prompts.volumes.propagate.Tracker` with a memory an object and chain.

    An object has one window for all its slices: the one that the pyramid gives the envelope of all that is
    said of it. Masks that it cuts are asked for again in another, as `propagate.wider` says:
    those of all prompted slices together; and in a chain the memory begins anew there, from the prompts and
    the mask of the slice before.
    """

    axis: int
    """Across which the volume is cut."""
    depth: int
    """Slices of the volume."""
    pyramid: Pyramid
    """Of a slice."""
    network: VideoNetwork
    """With the pyramid's window."""
    embed: Embedder
    """Gives embeddings of the same folder's segmenter."""
    _prompted: dict[int, Memory] = field(default_factory=dict)
    """By object: of its prompted slices."""
    _chains: dict[Chain, Memory] = field(default_factory=dict)

    def begin(self, objects: Sequence[ObjectPrompts]) -> Iterator[tuple[SlicePrompt, Section]]:
        """As `Tracker.begin`."""
        for one in objects:
            extents = [p.extent for p in one.prompted]
            corners = np.stack(extents)
            start, stop = corners[:, 0].min(axis=0).tolist(), corners[:, 1].max(axis=0).tolist()
            window: Window | None = self.pyramid.window_of(start, stop)
            tried: set[Window] = set()
            while window is not None:
                memory, sections = self._begin(one, window)
                tried.add(window)
                window = wider(sections, extents, self.pyramid, tried)
            self._prompted[one.object] = memory
            yield from zip(one.prompted, sections, strict=True)

    def follow(self, index: int, chains: Sequence[Chain]) -> list[Section]:
        """As `Tracker.follow`."""
        sections = []
        for chain in chains:
            if chain not in self._chains:
                known = self._prompted[chain.prompts.object]
                self._chains[chain] = Memory(self.depth, dict(known.prompted))
            section = self._track(chain, index, chain.window)
            tried, extents = {chain.window}, [p.extent for p in chain.prompts.prompted]
            while (window := wider([section], extents, self.pyramid, tried)) is not None:
                self._restart(chain, index - chain.step, window)
                section = self._track(chain, index, window)
                tried.add(window)
            sections.append(section)
        return sections

    def drop(self, chain: Chain) -> None:
        """Its memory."""
        self._chains.pop(chain, None)

    def _begin(self, one: ObjectPrompts, window: Window) -> tuple[Memory, list[Section]]:
        """Return a memory of an object's prompted slices in a window, and the masks there."""
        memory, sections = Memory(self.depth), []
        for said in one.prompted:
            prompt = window_prompt(window, self.pyramid, said.points, said.positive, said.box)
            seen = self.network.prompt(memory, said.index, self.embed(said.index, window), prompt)
            sections.append(self._section(one.object, said.index, window, seen, "prompted"))
        return memory, sections

    def _restart(self, chain: Chain, index: int, window: Window) -> None:
        """Begin a memory in another window, of the prompted slices and the mask of slice ``index``."""
        memory, _ = self._begin(chain.prompts, window)
        if index != chain.origin:
            mask = placed(chain.patch, window, self.pyramid)
            self.network.prompt(memory, index, self.embed(index, window), mask)
        self._chains[chain] = memory

    def _track(self, chain: Chain, index: int, window: Window) -> Section:
        beside = chain.prompts.hints.get(index)
        prompt = None
        if beside is not None:
            prompt = window_prompt(window, self.pyramid, beside, np.zeros(len(beside), bool), None)
        seen = self.network.track(
            self._chains[chain], index, self.embed(index, window), chain.step < 0, prompt
        )
        return self._section(chain.prompts.object, index, window, seen, "by the memory of slices before")

    def _section(self, number: int, index: int, window: Window, seen: Seen, reason: str) -> Section:
        plane = (self.axis, index)
        return section_of(
            number, seen.logits[None], np.array([seen.iou]), 0, reason, window, self.pyramid, plane
        )
