"""Check and load the promptable network of a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from segpipe.config.card import Card
from segpipe.prompts.segmenters.base import Segmenter


def check_segmenter(card: Card) -> Mapping[str, tuple[int, int, int]]:
    """Check everything about a card as a segmenter that can be checked before its network is built.

    Returns:
        `Segmenter.shapes`: what an embedding will take.

    Raises:
        RequestError: names the field, what was found and what would be valid.
    """
    if card.provider == "literature":
        from segpipe.prompts.segmenters import looknet

        return looknet.embedding_shapes(*looknet.read_network(card))
    from segpipe.prompts.segmenters import sam

    return sam.embedding_shapes(sam.read_folder(card))


def load_segmenter(
    card: Card, device: torch.device, threads: int = 1, precision: str = "fp32", batch: int = 1
) -> Segmenter:
    """The segmenter of a card: SAM's families are told apart by their folder's config.json.

    Args:
        card: of provider transformers, whose weights are a folder or a pinned snapshot of the hub, or of
            provider literature: a LookNet.
        device: where it runs.
        threads: on a CPU.
        precision: of the encoder: fp32, bf16 or fp16. Masks are decoded in fp32.
        batch: prompts of a kind in one pass of the decoder; short batches are padded, so that other prompts
            change no bit of a mask where prompts go one by one, and nothing beyond rounding otherwise.

    Raises:
        RequestError: as `check_segmenter`; or the weights do not fit.
    """
    if card.provider == "literature":
        from segpipe.prompts.segmenters.looknet import LookSegmenter

        return LookSegmenter(card, device, threads, precision, batch)
    from segpipe.prompts.segmenters.sam import SamSegmenter

    return SamSegmenter(card, device, threads, precision, batch)
