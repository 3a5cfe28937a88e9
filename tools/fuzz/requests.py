"""Targets: what people write (jobs, cards, recipes, tables, names, options), and models that they bring."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.fuzz.target import Target


def yaml_file(load: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Read a YAML file, and tell as JSON what came of it."""

    def read(folder: Path) -> None:
        found = load(folder / "file.yaml")
        if hasattr(found, "model_dump_json"):
            found.model_dump_json()

    return read


def _job(path: Path) -> Any:
    from segpipe.config.job import load_job

    return load_job(path)


def _prompt_job(path: Path) -> Any:
    from segpipe.config.job import PromptJob
    from segpipe.config.loading import load

    return load(PromptJob, path)


def _scan(path: Path) -> Any:
    from segpipe.config.scan import load_scan

    return load_scan(path)


def _card(path: Path) -> Any:
    from segpipe.config.card import load_card
    from segpipe.models.registry import check_card

    card = load_card(path)
    card.prediction_fingerprint()
    check_card(card)
    return card


def _recipe(path: Path) -> Any:
    from segpipe.config.recipe import load_recipe

    return load_recipe(path)


def _classes(path: Path) -> Any:
    from segpipe.config.classes import load_classes

    return load_classes(str(path))


def read_groups(folder: Path) -> None:
    """Read the groups of two scenes."""
    from segpipe.config.loading import load_groups

    load_groups(str(folder / "groups.csv"), ["a", "b"])


def read_option(folder: Path) -> None:
    """Read a job with a ``--set`` of the command line."""
    from segpipe.config.job import load_job

    (folder / "job.yaml").write_text("name: a\nscenes: [a.tif]\nmodel: landcover-unet\n")
    text = _argument(folder / "option.txt")
    load_job(folder / "job.yaml", [text]).model_dump_json()


def _argument(path: Path) -> str:
    """A text as the command line has it: any bytes but NUL."""
    return os.fsdecode(path.read_bytes().replace(b"\0", b""))


def read_uri(folder: Path) -> None:
    """Find scenes by what a job lists, and open those that are no URLs."""
    from segpipe.sources import open_in_process
    from segpipe.sources.discover import discover
    from segpipe.sources.remote import is_remote, public_uri

    text = os.fsdecode((folder / "uri.txt").read_bytes())
    public_uri(text)
    for name in ("a.tif", "b.tif", "c.nii"):
        shutil.copyfile(SEEDS / name.replace("b.tif", "a.tif"), folder / name)
    # A glob from the root would look through the whole disk.
    if any(part.lstrip().startswith(("/", "~", "..", "file:")) for part in text.replace(":", "|").split("|")):
        return
    for scene in discover([text]):
        if not is_remote(scene.uri) and "://" not in scene.uri.removeprefix("pkg://"):
            open_in_process(scene.uri).close()


SEEDS = Path(__file__).parents[2] / "tests/fuzz/seeds/files"


def read_name(folder: Path) -> None:
    """Make names of folders from names of files, which must be safe."""
    from segpipe.lake.entry import place_name
    from segpipe.prompts.phrases import parse_phrases
    from segpipe.sources.discover import safe_name, scene_stem

    text = os.fsdecode((folder / "name.txt").read_bytes())
    for name in (safe_name(text), safe_name(scene_stem(text)), place_name(text)):
        assert name and "/" not in name and "\0" not in name and name not in (".", ".."), repr(name)
        assert len(os.fsencode(name)) <= 255 - len(".labels.parquet"), f"{len(os.fsencode(name))} bytes"
        assert name.isprintable(), repr(name)
        (folder / name).mkdir(exist_ok=True)
    parse_phrases(text)


def read_nnunet(folder: Path) -> None:
    """Import a folder that nnU-Net trained."""
    from segpipe.models.providers.nnunet.plans import card_from_nnunet

    card_from_nnunet(folder)


def read_bundle(folder: Path) -> None:
    """Import a bundle of MONAI."""
    from segpipe.models.providers.bundle.files import card_from_bundle

    card_from_bundle(folder)


def read_weights(folder: Path) -> None:
    """Read tensors."""
    from segpipe.models.weights import load_state

    load_state(next(folder.iterdir()))


def read_onnx(folder: Path) -> None:
    """Build the network of an ONNX file."""
    import torch

    from segpipe.config.card import load_card
    from segpipe.models.providers import onnx

    card = folder / "card.yaml"
    card.write_text(ONNX_CARD)
    onnx.build(load_card(card), torch.device("cpu"), 1)


ONNX_CARD = """\
name: a
title: a
kind: raster
provider: onnx
weights: net.onnx
input: {bands: [red]}
window: {size: [16]}
classes: [{value: 0, name: a, color: "#000000", background: true}, {value: 1, name: b, color: "#ffffff"}]
licence: CC0-1.0
"""


def read_program(folder: Path) -> None:
    """Check an archive of `torch.export` without running it."""
    from segpipe.models.providers.exported import UnsafeProgramError, sanitised

    try:
        sanitised((folder / "net.pt2").read_bytes())
    except UnsafeProgramError as error:
        assert str(error)


def _yaml(name: str, load: Callable[[Path], Any], mutants: int = 30) -> Target:
    return Target(name, yaml_file(load), ("file.yaml",), "yaml", several=True, mutants=mutants)


TARGETS = (
    _yaml("job", _job),
    _yaml("prompt-job", _prompt_job),
    _yaml("scan", _scan),
    _yaml("card", _card),
    _yaml("recipe", _recipe),
    _yaml("classes", _classes),
    Target("groups", read_groups, ("groups.csv",), "csv", mutants=60),
    Target("set", read_option, ("option.txt",), "text", several=True, mutants=60),
    Target("uri", read_uri, ("uri.txt",), "text", mutants=40),
    Target("name", read_name, ("name.txt",), "text", mutants=100),
    Target("nnunet", read_nnunet, ("plans.json", "dataset.json"), "json", several=True),
    Target("bundle", read_bundle, ("configs/inference.json", "configs/metadata.json"), "json", several=True),
    Target("safetensors", read_weights, ("net.safetensors",), mutants=40),
    Target("torch", read_weights, ("net.pt",), mutants=40),
    Target("onnx", read_onnx, ("net.onnx",)),
    Target("program", read_program, ("net.pt2",)),
)
