"""The network's way from and to files: what is stored is what is scored, and what begins where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from segpipe.config.card import load_card
from segpipe.config.job import Precision
from segpipe.config.recipe import Recipe
from segpipe.errors import RequestError
from segpipe.models.registry import load_model
from segpipe.models.trainable import untrained
from segpipe.training.network import TrainNetwork, begin_with, precision_here
from segpipe.training.run import write_card
from tests.training.conftest import recipe_of

CPU = torch.device("cpu")
DYNUNET = {
    "architecture": "DynUNet",
    "arguments": {
        "kernel_size": [3, 3, 3],
        "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2],
        "filters": [4, 8, 8],
        "norm_name": "BATCH",
    },
    "window": {"stride": 4},
}
UNET = {
    "provider": "smp",
    "architecture": "Unet",
    "arguments": {"encoder_name": "mobilenet_v2", "encoder_depth": 3, "decoder_channels": [8, 8, 8]},
    "window": {"stride": 8},
}


def network_of(recipe: Recipe, seed: int = 3) -> TrainNetwork:
    """A network whose average is no longer its first weights."""
    network = TrainNetwork(recipe, CPU, "fp32")
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in network.average.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * (torch.rand(tensor.shape) - 0.5)
    return network


def stored(network: TrainNetwork, folder: Path) -> Path:
    network.save(folder / "weights.safetensors")
    write_card(network.card, folder / "card.yaml", "weights.safetensors", network.recipe, "")
    return folder / "card.yaml"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("kind", "card"),
    [("raster", {}), ("raster", DYNUNET), ("volume", DYNUNET), ("raster", UNET)],
    ids=["unet", "dynunet", "dynunet-3d", "smp"],
)
def test_the_card_gives_the_logits_that_were_tried(
    tmp_path: Path, kind: str, card: dict[str, Any], precision: str
) -> None:
    network = network_of(recipe_of(tmp_path, kind, card=card, weights=precision))
    before = [p.clone() for p in network.average.parameters()]
    model = load_model(load_card(stored(network, tmp_path)), "cpu", 1, "fp32")
    torch.set_num_threads(1)
    images = torch.randn(1, network.card.channels, *[16] * network.card.ndim)
    with torch.no_grad():
        tried = network.predict(images)
        used = model(images)
    # The layout in memory differs between training and prediction, and with it the order of sums.
    torch.testing.assert_close(used, tried, rtol=1e-5, atol=1e-5)
    network.layout = torch.contiguous_format if card != UNET else torch.channels_last
    network.average.to(memory_format=network.layout)
    with torch.no_grad():
        assert torch.equal(model(images), network.predict(images))
    changed = [not torch.equal(a, b) for a, b in zip(before, network.average.parameters(), strict=True)]
    assert any(changed) == (precision == "fp16")


def test_half_the_bytes_but_for_what_is_too_large(tmp_path: Path) -> None:
    network = network_of(recipe_of(tmp_path, card=DYNUNET, weights="fp16"))
    running = next(b for n, b in network.average.named_buffers() if n.endswith("running_var"))
    running.fill_(1e6)  # of data that are not normalised; fp16 ends at 65504
    network.save(tmp_path / "weights.safetensors")
    dtypes = {n: t.dtype for n, t in load_file(tmp_path / "weights.safetensors").items()}
    single = [n for n, dtype in dtypes.items() if dtype == torch.float32]
    assert len(single) == 1
    assert single[0].endswith("running_var")
    assert sum(dtype == torch.float16 for dtype in dtypes.values()) > 5
    assert (running == 1e6).all()


def test_the_same_recipe_begins_alike(tmp_path: Path) -> None:
    first, second, other = (
        TrainNetwork(recipe_of(tmp_path, optimise={"seed": seed}), CPU, "fp32").module for seed in (0, 0, 1)
    )
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not all(torch.equal(a, c) for a, _, c in pairs)


def test_decay_is_for_kernels_alone(tmp_path: Path) -> None:
    network = TrainNetwork(recipe_of(tmp_path, card=DYNUNET, optimise={"decay": 0.3}), CPU, "fp32")
    kernels, others = network.groups()
    assert (kernels["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in kernels["params"]} == {4}  # type: ignore[attr-defined]
    assert {p.ndim for p in others["params"]} == {1}  # type: ignore[attr-defined]
    both = [*kernels["params"], *others["params"]]  # type: ignore[misc]
    assert {id(p) for p in both} == {id(p) for p in network.module.parameters()}
    assert len(both) == len(list(network.module.parameters()))


def test_begin_with_a_network_of_the_same_shape(tmp_path: Path) -> None:
    network = network_of(recipe_of(tmp_path, card=DYNUNET))
    start = stored(network, tmp_path)
    module = untrained(network.card)
    assert begin_with(module, 2, str(start)) == []
    wanted = network.average.state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in module.state_dict().items() if t.is_floating_point())


def test_begin_with_other_bands_and_classes(tmp_path: Path) -> None:
    """Bands are taken in turn, scaled by their numbers; the head for other classes begins at random."""
    network = network_of(recipe_of(tmp_path))
    start = str(stored(network, tmp_path))
    classes = [*network.card.model_dump(mode="json")["classes"][:2]]
    card = {"input": {"bands": ["a", "b", "c", "d", "e"]}, "classes": classes}
    module = untrained(recipe_of(tmp_path, card=card).card)
    notes = begin_with(module, 5, start)
    old, new = network.average.state_dict(), module.state_dict()
    first = next(name for name in new if new[name].ndim == 4)
    assert new[first].shape[1] == 5
    for band, source in enumerate((0, 1, 0, 1, 0)):
        torch.testing.assert_close(new[first][:, band], old[first][:, source] * 2 / 5)
    assert notes[0] == f"{first}: 2 bands in turn for 5"
    differing = [n for n in new if n != first and old[n].shape != new[n].shape]
    assert differing
    assert notes[1:] == [f"{len(differing)} of {len(new)} tensors begin at random, e.g. {differing[0]}"]
    kept = [n for n in new if n != first and n not in differing]
    assert all(torch.equal(new[n], old[n]) for n in kept)


def test_begin_with_nothing_that_fits(tmp_path: Path) -> None:
    start = stored(network_of(recipe_of(tmp_path)), tmp_path)
    save_file({"alien": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(RequestError, match=f"start: no tensor of {start} fits this network"):
        begin_with(untrained(recipe_of(tmp_path).card), 2, str(start))


def test_precision(tmp_path: Path) -> None:
    assert precision_here(Precision.bf16, CPU) == "bf16"
    assert precision_here(Precision.auto, CPU) in ("bf16", "fp32")
    with pytest.raises(RequestError, match=r"compute\.precision: found fp16 on a CPU"):
        precision_here(Precision.fp16, CPU)
