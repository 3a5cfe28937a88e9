"""What one worker keeps in memory at its peak, in bytes, with the reasons: from the plan alone."""

from __future__ import annotations

from dataclasses import dataclass

WINDOWS_ALIVE = 5
"""Batches alive at once: two queued, one being filled, one computed, one being stitched."""
IN_FLIGHT = 3
"""Blocks alive at once in the engine: one read ahead, one computed, one written."""
CLEANUP_BYTES = 20
"""Per element: two label maps, components of 32 bits, masks (measured, and rounded up)."""
LIBRARY_BYTES = 900 * 1024**2


@dataclass(frozen=True)
class Workload:
    """What the plan must know of the image and the model to count bytes."""

    image_channels: int
    """Channels stored at ingest."""
    image_itemsize: int
    channels: int
    """Channels the model sees."""
    classes: int
    label_itemsize: int
    batch: int
    keep_scores: bool
    activation_bytes: int = 400
    """Forward pass, bytes per element of a batch (the card's, or an estimate for U-Nets)."""
    uncertainty: int = 0
    """Channels of the uncertainty map; 0: none."""
    source_cache: int = 0
    """Bytes that the source's reader keeps of what it decoded."""
    cleanup: bool = False
    """Whether the card cleans up the finished label map, which is read whole for it."""


@dataclass(frozen=True)
class Memory:
    """Predicted peak of one worker in bytes, with its reasons."""

    libraries: int
    """Python, torch and their caches."""
    read: int
    """Blocks with their margins, as stored, with validity and normalised; the reader's cache."""
    windows: int
    """Batches waiting for the model."""
    forward: int
    """Activations (an estimate)."""
    scores: int
    """Merged labels or scores of the blocks in flight, and of the one being resampled."""
    cleanup: int
    """The whole label map and its components, where the card cleans up; after the forward passes."""

    @property
    def total(self) -> int:
        """The larger of predicting and cleaning up, which follow one another."""
        predicting = self.read + self.windows + self.forward + self.scores
        return self.libraries + max(predicting, self.cleanup)


def predict_memory(
    load: Workload,
    *,
    read: int,
    model: int,
    block: int,
    window: int,
    scene: int,
    labels_only: bool,
) -> Memory:
    """The peak of one worker: from its largest block, not from the scene (but for the clean-up).

    Args:
        load: what is stored and what the model sees.
        read: elements of the largest read, block and margins, native grid.
        model: elements of the largest region of the model grid that a block needs.
        block: elements of the largest block.
        window: elements of a window.
        scene: elements of the scene.
        labels_only: whether only class numbers leave the device.
    """
    per_read = load.image_channels * load.image_itemsize + 1 + 8 * load.channels
    per_model = load.label_itemsize if labels_only else 4 * (load.classes + 2)
    per_block = load.label_itemsize + (20 if load.uncertainty else 0)
    if load.keep_scores:
        per_block += 4 * load.classes
    return Memory(
        libraries=LIBRARY_BYTES,
        read=IN_FLIGHT * read * per_read + load.source_cache,
        windows=WINDOWS_ALIVE * load.batch * window * 4 * load.channels,
        forward=load.batch * window * (load.activation_bytes + 8 * load.classes),
        scores=IN_FLIGHT * (model * per_model + block * per_block) + (0 if labels_only else 16 * block),
        cleanup=CLEANUP_BYTES * scene if load.cleanup else 0,
    )
