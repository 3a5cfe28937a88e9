"""Volumes by the memory of a video model: slices are frames (SAM 2 and 2.1, EdgeTAM).

Ravi et al., SAM 2, ICLR 2025; Zhou et al., EdgeTAM, CVPR 2025. The networks and their memory are the
transformers library's. Here its sessions hold no frames: features come from the embeddings of the same
folder's segmenter, one slice at a time, so no slice is encoded for this alone, and what a session remembers
is cut to what the memory looks at: its size does not grow with the depth. Each chain has a session of its
own with all the object's prompted slices in it, so that a chain answers what
``propagate_in_video_iterator`` does from its slice, whatever else is tracked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers as library
from torch.nn import functional

from segpipe.config.card import Card, card_error
from segpipe.errors import RequestError
from segpipe.models.network import forward_pass
from segpipe.models.providers.transformers.folder import REFUSED, data_alone, load_pretrained
from segpipe.prompts.masks.decode import window_prompt
from segpipe.prompts.prompt_set import PromptSet
from segpipe.prompts.segmenters.base import Embedding, Prompt, check_prompts
from segpipe.prompts.segmenters.sam_folder import embedding_shapes, read_folder
from segpipe.prompts.volumes.propagate import (
    RECENT,
    Chain,
    Embedder,
    Rules,
    Section,
    SliceMask,
    Stop,
    propagate,
    section_of,
    wider,
)
from segpipe.prompts.volumes.slices import ObjectPrompts, SlicePrompt, placed, prompts_by_slice
from segpipe.tiling.pyramid import Pyramid, Window

FAMILIES = {"sam2_video": "Sam2Video", "edgetam_video": "EdgeTamVideo"}
"""Beginning of the library's class names, by a folder's `model_type`."""

MEMORY = ("maskmem_features", "maskmem_pos_enc")
"""What a session remembers of a slice in space; beside these, a pointer."""


def has_memory(card: Card) -> bool:
    """Whether a promptable model's folder is that of a video model, which remembers slices."""
    data = json.loads((read_folder(card).path / "config.json").read_text(encoding="utf-8"))
    return data["model_type"] in FAMILIES


ME = 1
"""The only object of a session."""


@dataclass(frozen=True, eq=False)
class Seen:
    """One object on one slice, as a network saw it."""

    logits: np.ndarray
    """(y, x) float32 of the window; −1024 throughout where the network says that there is no object."""
    iou: float


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
        config_json = folder.path / "config.json"
        data = data_alone(json.loads(config_json.read_text(encoding="utf-8")))
        kind = data["model_type"]
        if kind not in FAMILIES:
            raise card_error(
                card, "weights", f"{config_json}: model_type is {kind!r}; valid: {', '.join(FAMILIES)}"
            )
        network = getattr(library, f"{FAMILIES[kind]}Model")
        try:
            config = network.config_class.from_dict(data)
        except REFUSED as error:
            reason = " ".join(str(error).split())
            raise card_error(
                card, "weights", f"{config_json} makes no {network.__name__}: {reason}"
            ) from error
        found = [config.image_size, list(config.memory_attention_rope_feat_sizes)]
        if found != (valid := [folder.edge, [folder.grid] * 2]):
            raise card_error(
                card,
                "weights",
                f"{config_json}: found image_size, memory_attention_rope_feat_sizes {found}; valid: {valid}",
            )
        self.window = (folder.edge, folder.edge)
        self.mask_shape = (4 * folder.grid, 4 * folder.grid)
        self.shapes = embedding_shapes(folder)
        self._device, self._threads = device, threads
        loaded: Any = load_pretrained(
            network, folder.path, config, lambda problem: card_error(card, "weights", problem)
        )
        self._network = loaded.to(device)
        self._session: Any = getattr(library, f"{FAMILIES[kind]}InferenceSession")
        self._iou = np.nan
        self._network.mask_decoder.register_forward_hook(self._note_iou)
        grid = torch.Size((1, self.shapes["image"][0], folder.grid, folder.grid))
        with forward_pass(device, "fp32", threads):
            place = self._network.vision_encoder.neck.position_encoding(grid, device, torch.float32)
            self._place = place.flatten(2).permute(2, 0, 1)

    def _note_iou(self, _module: Any, _inputs: Any, output: Any) -> None:
        """The predicted IoU of the mask that is taken: of several masks the library takes the best."""
        self._iou = output[1].max()

    def begin(self, depth: int, known: Any = None) -> Any:
        """A session without frames.

        Args:
            depth: slices of the volume.
            known: a session whose prompted slices it remembers too; None: of none.
        """
        # The library counts the frames that it holds, to know where the video ends.
        session = type("Session", (self._session,), {"num_frames": depth})(
            inference_device=self._device,
            inference_state_device=self._device,
            dtype=torch.float32,
        )
        own = session.obj_id_to_idx(ME)
        if known is not None:
            session.output_dict_per_obj[own]["cond_frame_outputs"] = dict(
                known.output_dict_per_obj[own]["cond_frame_outputs"]
            )
        return session

    def prompt(self, session: Any, index: int, embedding: Embedding, prompt: Prompt | np.ndarray) -> Seen:
        """The mask of a prompted slice, which the session remembers as such.

        Args:
            session: of the object.
            index: of the slice.
            embedding: of the session's window of the slice.
            prompt: points and a box, or the mask itself, (y, x) bool of the window.
        """
        self._ask(session, index, prompt)
        return self._run(session, index, embedding, reverse=False, conditioning=True)

    def track(
        self, session: Any, index: int, embedding: Embedding, reverse: bool, prompt: Prompt | None = None
    ) -> Seen:
        """The mask of the next slice, by memory.

        Args:
            session: of the object; it has a prompted slice.
            index: of the slice.
            embedding: of the session's window of the slice.
            reverse: slices come in descending order.
            prompt: negative points, which correct what is remembered; None: none.
        """
        if prompt is not None and len(prompt.points_xy):
            self._ask(session, index, prompt)
            # On a slice that counts as tracked the library heeds points and memory together.
            session.frames_tracked_per_obj[0][index] = {"reverse": reverse}
        seen = self._run(session, index, embedding, reverse, conditioning=False)
        self._forget(session, index)
        return seen

    def _ask(self, session: Any, index: int, prompt: Prompt | np.ndarray) -> None:
        """Hand a prompt to the session, as the library's processor does."""
        if isinstance(prompt, np.ndarray):
            mask = torch.from_numpy(prompt.astype(np.float32))[None, None]
            session.add_mask_inputs(0, index, mask)
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
            session.add_point_inputs(0, index, inputs)
        session.obj_with_new_inputs = [ME]

    def _run(self, session: Any, index: int, embedding: Embedding, reverse: bool, conditioning: bool) -> Seen:
        """One pass of decoder and memory over one slice."""
        with forward_pass(self._device, "fp32", self._threads):
            session.cache.cache_vision_features(index, self._features(embedding))
            found = self._network(session, frame_idx=index, reverse=reverse)
            large = functional.interpolate(
                found.pred_masks, self.window, mode="bilinear", align_corners=False
            )
        session.cache.clear_all()
        session.frames_tracked_per_obj[0].clear()
        session.remove_point_inputs(0, index)
        session.remove_mask_inputs(0, index)
        kept = session.output_dict_per_obj[0][f"{'cond' if conditioning else 'non_cond'}_frame_outputs"]
        for name in ("pred_masks", "high_res_masks"):  # large, and never looked at again
            kept[index].pop(name, None)
        return Seen(large[0, 0].cpu().numpy(), float(self._iou))

    def _features(self, embedding: Embedding) -> dict[str, list[torch.Tensor]]:
        """An embedding as the session keeps a frame's features: (y · x, 1, c), finest first.

        A segmenter's embedding has the vector in it that says that there is no memory.
        """
        found = {name: a.shape for name, a in embedding.arrays.items()}
        if found != dict(self.shapes):
            raise RequestError(f"embedding: found {found}; valid: {dict(self.shapes)}")
        maps = [
            torch.from_numpy(np.ascontiguousarray(embedding.arrays[name], np.float32)).to(self._device)
            for name in self.shapes
        ]
        features = [m.flatten(1).T[:, None] for m in maps]
        features[-1] = features[-1] - self._network.no_memory_embedding
        return {"vision_feats": features, "vision_pos_embeds": [self._place]}

    def _forget(self, session: Any, index: int) -> None:
        """Drop of tracked slices what the memory will not look at from the next slice on."""
        config = self._network.config
        tracked = session.output_dict_per_obj[0]["non_cond_frame_outputs"]
        for other in list(tracked):
            behind = abs(index - other) + 1
            if behind >= config.num_maskmem:
                for name in MEMORY:
                    tracked[other].pop(name, None)
            if behind >= max(config.max_object_pointers_in_encoder, config.num_maskmem):
                del tracked[other]


def held_bytes(session: Any) -> int:
    """Of all tensors that a session holds: frames, features, prompts and memory."""
    parts = [
        session.processed_frames or {},
        session.cache._vision_features,
        session.point_inputs_per_obj,
        session.mask_inputs_per_obj,
        session.output_dict_per_obj,
    ]
    return sum(t.numel() * t.element_size() for t in _tensors(parts))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def track(
    prompts: PromptSet,
    axis: int,
    shape: Sequence[int],
    pyramid: Pyramid,
    network: VideoNetwork,
    embed: Embedder,
    rules: Rules,
) -> Iterator[SliceMask | Stop]:
    """Masks on all slices that prompts on some of them lead to; see `propagate.propagate`.

    An object has one window for all its slices: the one that the pyramid gives the envelope of all that is
    said of it. Masks that it cuts are asked for again in another, as `propagate.wider` says:
    those of all prompted slices together; and in a chain the memory begins anew there, from the prompts and
    the mask of the slice before.

    Args:
        prompts: of the volume.
        axis: across which it is cut.
        shape: of the volume.
        pyramid: of a slice.
        network: with the pyramid's window.
        embed: gives embeddings of the same folder's segmenter.
        rules: when a chain stops.

    Raises:
        RequestError: as `prompts_by_slice`.
    """
    tracker = VideoTracker(axis, shape[axis], pyramid, network, lru_cache(RECENT)(embed))
    yield from propagate(prompts_by_slice(prompts, axis, shape), axis, shape, pyramid, tracker, rules)


@dataclass(eq=False)
class VideoTracker:
    """A `segpipe.prompts.volumes.propagate.Tracker` with a session an object and chain."""

    axis: int
    depth: int
    pyramid: Pyramid
    network: VideoNetwork
    embed: Embedder
    _prompted: dict[int, Any] = field(default_factory=dict)
    """By object: the session that knows its prompted slices."""
    _chains: dict[Chain, Any] = field(default_factory=dict)

    @property
    def held_bytes(self) -> int:
        """Of the tensors that sessions hold; those of a prompted slice are counted in each."""
        return sum(held_bytes(s) for s in (*self._prompted.values(), *self._chains.values()))

    def begin(self, objects: Sequence[ObjectPrompts]) -> Iterator[tuple[SlicePrompt, Section]]:
        """As `Tracker.begin`."""
        for one in objects:
            extents = [p.extent for p in one.prompted]
            corners = np.stack(extents)
            start, stop = corners[:, 0].min(axis=0).tolist(), corners[:, 1].max(axis=0).tolist()
            window: Window | None = self.pyramid.window_of(start, stop)
            tried: set[Window] = set()
            while window is not None:
                session, sections = self._begin(one, window)
                tried.add(window)
                window = wider(sections, extents, self.pyramid, tried)
            self._prompted[one.object] = session
            yield from zip(one.prompted, sections, strict=True)

    def follow(self, index: int, chains: Sequence[Chain]) -> list[Section]:
        """As `Tracker.follow`."""
        sections = []
        for chain in chains:
            if chain not in self._chains:
                self._chains[chain] = self.network.begin(self.depth, self._prompted[chain.prompts.object])
            section = self._track(chain, index, chain.window)
            tried, extents = {chain.window}, [p.extent for p in chain.prompts.prompted]
            while (window := wider([section], extents, self.pyramid, tried)) is not None:
                self._restart(chain, index - chain.step, window)
                section = self._track(chain, index, window)
                tried.add(window)
            sections.append(section)
        return sections

    def drop(self, chain: Chain) -> None:
        """Its session."""
        self._chains.pop(chain, None)

    def _begin(self, one: ObjectPrompts, window: Window) -> tuple[Any, list[Section]]:
        """A session that knows an object's prompted slices in a window, and what it says of them."""
        session, sections = self.network.begin(self.depth), []
        for said in one.prompted:
            prompt = window_prompt(window, self.pyramid, said.points, said.positive, said.box)
            seen = self.network.prompt(session, said.index, self.embed(said.index, window), prompt)
            sections.append(self._section(one.object, said.index, window, seen, "prompted"))
        return session, sections

    def _restart(self, chain: Chain, index: int, window: Window) -> None:
        """A session in another window that knows the prompted slices, and the mask of slice ``index``."""
        session, _ = self._begin(chain.prompts, window)
        if index != chain.origin:
            mask = placed(chain.patch, window, self.pyramid)
            self.network.prompt(session, index, self.embed(index, window), mask)
        self._chains[chain] = session

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
