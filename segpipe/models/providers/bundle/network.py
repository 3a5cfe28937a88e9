"""MONAI bundles: the network that their configuration defines, from the list of provider monai."""

from __future__ import annotations

import torch

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.base import Network
from segpipe.models.card_checks import known, only_arguments
from segpipe.models.network import TorchNetwork, fill
from segpipe.models.providers import monai
from segpipe.models.providers.bundle.files import WEIGHTS, Bundle, network_definition
from segpipe.models.weights import load_state, resolve_weights


def check(card: Card) -> None:
    """Whether bundle and card fit one another.

    Raises:
        RequestError: the bundle would have to run code, its network is not on the list, or the card says
            other bands, classes or axes.
    """
    _as_monai(card, Bundle(resolve_weights(card)))


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The bundle's network with its weights.

    Raises:
        RequestError: as `check`; or the weights do not fit the definition.
    """
    bundle = Bundle(resolve_weights(card))
    described = _as_monai(card, bundle)
    network = monai.module(described)
    with bundle.weights() as path:
        fill(described, network, load_state(path))
    return TorchNetwork(network, device)


def _as_monai(card: Card, bundle: Bundle) -> Card:
    """The card with the bundle's architecture and arguments, as provider monai builds it."""
    only_arguments(card, ())
    try:
        definition = network_definition(bundle)
        bundle.first(WEIGHTS)
    except RequestError as error:
        raise card.error("weights", str(error)) from error
    if card.architecture not in (None, definition.architecture):
        raise card.error(
            "architecture", f"found {card.architecture!r}; the bundle's is {definition.architecture!r}"
        )
    described = card.model_copy(
        update={
            "provider": "monai",
            "architecture": definition.architecture,
            "arguments": definition.arguments,
        }
    )
    known(described, monai.ARCHITECTURES)
    for argument, field, needed in (
        ("spatial_dims", "kind", card.ndim),
        ("in_channels", "input.bands", card.channels),
        ("out_channels", "classes", card.output_channels),
    ):
        given = definition.arguments.get(argument, needed)
        if given != needed:
            raise card.error(field, f"the card makes {argument} {needed}; the bundle's network has {given}")
    return described
