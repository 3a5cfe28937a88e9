"""Providers by name: those that come with segpipe, and those that installed packages add.

How a package adds a provider: it declares an entry point whose name is what cards write as `provider`, ::

    [project.entry-points."segpipe.providers"]
    acme = "acme_segpipe:PROVIDER"

and whose value is a `ProviderSpec` in a module that imports no heavy library, for it is read early, ::

    PROVIDER = ProviderSpec("acme_segpipe.adapter", install="acme-segpipe[gpu]")

The module that the spec names is an `Adapter`; it is imported when a card is checked or built.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import SimpleNamespace
from typing import TYPE_CHECKING, Protocol, cast

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.process.extras import EXTRAS

if TYPE_CHECKING:
    import torch

    from segpipe.models.base import Network, ObjectNetwork

GROUP = "segpipe.providers"


class Adapter(Protocol):
    """What a provider's module offers.

    It may offer more: ``module`` where its networks can be trained here, ``objective`` and ``finder`` where
    those find objects (`segpipe.models.trainable`), and ``without_cuda`` where its models are computed by a
    runtime other than torch (`segpipe.models.registry.runtime_without_cuda`).
    """

    check: Callable[[Card], None]
    """Everything that can be refused without building."""
    build: Callable[[Card, torch.device, int], Network | ObjectNetwork]
    """The network with its weights, on a device, with that many CPU threads."""


class CompositeAdapter(Adapter, Protocol):
    """What the module of a provider offers beside whose spec says `composite`."""

    members: Callable[[Card], list[Card]]
    """The cards whose models make up a card's."""


@dataclass(frozen=True)
class WeightsFolder:
    """What is looked for where weights are a folder; names as glob patterns."""

    files: tuple[str, ...]
    """What is fetched, hashed and read."""
    needed: tuple[str, ...]
    """One file of each pattern must be there."""
    written_by: str
    """What writes such folders, for messages."""


@dataclass(frozen=True)
class ProviderSpec:
    """What must be known of a provider before anything heavy is imported."""

    module: str
    """Dotted name of its `Adapter`."""
    install: str = ""
    """What pip is to install where a package that the adapter imports is missing."""
    files: tuple[str, ...] = (".safetensors", ".pt", ".pth")
    """Endings of files of weights that it reads; none where weights are a folder."""
    folder: WeightsFolder | None = None
    """Folders of weights that it reads."""
    needs_weights: bool = True
    """False: its cards may have no weights of their own."""
    as_stored: bool = False
    """Its files fix their own arithmetic: only fp32 is asked of them."""
    learned: bool = True
    """Its labels come from training, not from a rule."""
    composite: bool = False
    """A card's model is made of other cards' models, and its weights are theirs."""


BUILT_IN = SimpleNamespace(
    smp=ProviderSpec("segpipe.models.providers.smp"),
    monai=ProviderSpec("segpipe.models.providers.monai"),
    transformers=ProviderSpec(
        "segpipe.models.providers.transformers",
        files=(".safetensors",),
        folder=WeightsFolder(
            files=(
                *("config.json", "*.safetensors", "*.safetensors.index.json"),
                *("preprocessor_config.json", "processor_config.json"),
                *("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt"),
                *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
            ),
            needed=("config.json", "*.safetensors"),
            written_by="save_pretrained",
        ),
    ),
    torchvision=ProviderSpec("segpipe.models.providers.torchvision"),
    literature=ProviderSpec("segpipe.models.providers.builtin"),
    classical=ProviderSpec(
        "segpipe.models.providers.classical.adapter",
        files=(".safetensors",),
        needs_weights=False,
        as_stored=True,
        learned=False,
    ),
    bundle=ProviderSpec(
        "segpipe.models.providers.bundle.network",
        files=(".zip",),
        folder=WeightsFolder(
            files=("configs/*.json", "configs/*.yaml", "models/model.*"),
            needed=("configs/*", "models/model.*"),
            written_by="monai.bundle",
        ),
    ),
    nnunet=ProviderSpec(
        "segpipe.models.providers.nnunet.network",
        files=(),
        folder=WeightsFolder(
            files=("dataset.json", "plans.json", "fold_*/checkpoint_*.pth"),
            needed=("dataset.json", "plans.json", "fold_*/checkpoint_*.pth"),
            written_by="nnUNetv2_train",
        ),
    ),
    onnx=ProviderSpec("segpipe.models.providers.onnx", files=(".onnx",), as_stored=True),
    exported=ProviderSpec("segpipe.models.providers.exported", files=(".pt2",), as_stored=True),
    torchscript=ProviderSpec(
        "segpipe.models.providers.torchscript", files=(".pt", ".pth", ".ts", ".torchscript"), as_stored=True
    ),
    ensemble=ProviderSpec("segpipe.models.providers.ensemble", needs_weights=False, composite=True),
)
"""Those of segpipe: what its own entry points name, found as well where it runs without being installed."""


def provider_spec(card: Card) -> ProviderSpec:
    """What is known of the card's provider without importing it.

    Raises:
        RequestError: nothing of that name is installed, several packages have one, or the package is broken.
    """
    entry = _entry(card)
    try:
        spec = entry.load()
    except Exception as error:  # the code of another package: whatever it raises, other cards go on
        raise _broken(card, entry, error) from error
    if not isinstance(spec, ProviderSpec):
        raise _broken(card, entry, TypeError(f"{entry.value} is no segpipe.models.plugins.ProviderSpec"))
    return spec


def load_adapter(card: Card) -> Adapter:
    """The module of the card's provider, imported when first needed: each one is seconds and megabytes.

    Raises:
        RequestError: as `provider_spec`, or a package that it needs is missing.
    """
    spec, entry = provider_spec(card), _entry(card)
    try:
        module = importlib.import_module(spec.module)
    except Exception as error:  # as above
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or missing.partition(".")[0] == spec.module.partition(".")[0]:
            raise _broken(card, entry, error) from error
        extra = EXTRAS.get(missing.partition(".")[0])
        install = spec.install or (f"segpipe[{extra}]" if extra else "")
        hint = f"pip install '{install}'" if install else "install it"
        raise card.error("provider", f"{card.provider} needs the package {missing}: {hint}") from error
    for name in ("check", "build"):
        if not callable(getattr(module, name, None)):
            raise _broken(card, entry, TypeError(f"{spec.module} has no function {name}"))
    return cast(Adapter, module)


@cache
def _entries() -> dict[str, list[EntryPoint]]:
    """What stands under each name; one of segpipe's own is the same whether installed or not."""
    found = {name: [EntryPoint(name, f"{__name__}:BUILT_IN.{name}", GROUP)] for name in vars(BUILT_IN)}
    for entry in entry_points(group=GROUP):
        same = found.setdefault(entry.name, [])
        if entry not in same:
            same.append(entry)
    return found


def _entry(card: Card) -> EntryPoint:
    entries = _entries()
    found = entries.get(card.provider, [])
    if not found:
        close = difflib.get_close_matches(card.provider, entries, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise card.error(
            "provider",
            f"found {card.provider!r}; {hint}valid here: {', '.join(entries)}; a package that adds others "
            f"has entry points of the group {GROUP}",
        )
    if len(found) > 1:
        packages = " and ".join(map(_package, found))
        raise card.error("provider", f"{card.provider} is in {packages}: uninstall all but one")
    return found[0]


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "segpipe"


def _broken(card: Card, entry: EntryPoint, error: Exception) -> RequestError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return card.error(
        "provider", f"{card.provider} of the package {_package(entry)} cannot be loaded ({reason})"
    )
