"""A network that proposes masks, made ready: from windows to objects, one per element."""

from __future__ import annotations

import numpy as np
import torch

from segpipe.config.card import Card
from segpipe.models.base import Candidates, ObjectNetwork
from segpipe.models.network import forward_pass
from segpipe.objects.window import WindowObjects, resolve_instances, resolve_masks


class ReadyObjects:
    """An object network with its arithmetic, and the rules by which its masks compete."""

    def __init__(self, card: Card, network: ObjectNetwork, precision: str, threads: int) -> None:
        self.device = network.device
        self.parameters = network.parameters
        self._network = network
        self._output = card.output
        self._precision = precision
        self._threads = threads
        self._rule = network.rule
        front = [c for c in card.classes if not c.background]
        self._things = [c.value for c in front if c.thing]
        self._stuff = [c.value for c in front if not c.thing]

    def objects(self, batch: torch.Tensor) -> list[WindowObjects]:
        """The objects of each window of a batch (n, c, …), normalised, on `device`.

        Background takes no part; nor, for instances, does stuff. On a CPU windows go through the network
        one by one, so that a window's place in its batch cannot change a bit.
        """
        parts = batch.split(1) if self.device.type == "cpu" else (batch,)
        with forward_pass(self.device, self._precision, self._threads):
            found = [window for part in parts for window in self._network.candidates(part)]
        return [self._resolved(window) for window in found]

    def _resolved(self, window: Candidates) -> WindowObjects:
        score, mask, overlap = self._output.score, self._output.mask, self._output.overlap
        if self._output.kind == "panoptic":
            return resolve_masks(
                window.masks,
                window.classes,
                window.scores,
                score_threshold=score,
                mask_threshold=mask,
                overlap_threshold=overlap,
                things=self._things,
                stuff=self._stuff,
                rule=self._rule,
            )
        kept = np.isin(window.classes, self._things)
        return resolve_instances(
            window.masks[kept],
            window.classes[kept],
            window.scores[kept],
            score_threshold=score,
            mask_threshold=mask,
            overlap_threshold=overlap,
        )
