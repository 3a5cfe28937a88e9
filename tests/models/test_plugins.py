"""Providers by entry point: those of segpipe, and one of a package that is built and installed here."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from segpipe.errors import RequestError
from segpipe.models.plugins import BUILT_IN, GROUP, load_adapter, provider_spec
from segpipe.models.registry import check_card

ROOT = Path(__file__).parents[2]

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1.2"

[project.entry-points."segpipe.providers"]
{provider} = "{module}:PROVIDER"

[tool.setuptools]
packages = ["{module}"]
"""

SPEC = """
from segpipe.models.plugins import ProviderSpec

PROVIDER = ProviderSpec("acme_segpipe.adapter", install="acme-segpipe[gpu]", needs_weights=False)
"""

ADAPTER = """
import torch

from segpipe.models.card_checks import only_arguments
from segpipe.models.network import TorchNetwork


class Brightest(torch.nn.Module):
    def forward(self, batch):
        bright = batch.mean(1, keepdim=True)
        return torch.cat([self.level - bright, bright - self.level], 1)


def check(card):
    only_arguments(card, ("level",))


def build(card, device, threads):
    module = Brightest()
    module.level = float(card.arguments["level"])
    return TorchNetwork(module, device)
"""

CARD = """
name: bright
kind: raster
provider: acme
arguments: {level: 100}
input: {bands: [gray]}
window: {size: [32], halo: [0]}
output: {activation: softmax}
classes:
  - {value: 0, name: dark, color: "#000000", background: true}
  - {value: 7, name: bright, color: "#ffff00"}
"""

RUN = """
import sys
from pathlib import Path

import numpy as np
import rasterio

from segpipe.config.job import Job
from segpipe.errors import RequestError
from segpipe.models.registry import check_card
from segpipe.config.card import load_card
import segpipe.models.weights

card = load_card("card.yaml")
assert "torch" not in sys.modules
try:
    check_card(card)
except RequestError as error:
    sys.exit(str(error))

import torch

from segpipe.models.registry import load_model

with rasterio.open("scene.tif") as scene:
    pixels = scene.read().astype(np.float32)
scores = load_model(card, "cpu", 1, "fp32")(torch.from_numpy(pixels)[None])
found = np.array(card.values)[scores.argmax(1)[0].numpy()]
assert np.array_equal(found, np.where(pixels[0] > 100, 7, 0))
print("labelled", int((found == 7).sum()))
"""


def install(folder: Path, site: Path, provider: str = "acme", **files: str) -> None:
    """Build a package from source as a wheel, and install that."""
    module = f"{provider}_segpipe"
    (folder / module).mkdir(parents=True)
    (folder / "pyproject.toml").write_text(
        PROJECT.format(name=f"{provider}-segpipe", provider=provider, module=module)
    )
    for name, text in files.items():
        (folder / module / f"{name.replace('init', '__init__')}.py").write_text(text)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels = folder / "wheels"
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(wheels), str(folder)]
    subprocess.run([*pip, *build], check=True, cwd=folder)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)],
        check=True,
        cwd=folder,
    )


def python(code: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run a program in a process that has segpipe and these folders on its path."""
    path = os.pathsep.join(map(str, (ROOT, *paths)))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.fixture
def scene(tmp_path):
    """A folder with a card of provider acme and a scene."""
    import numpy as np
    import rasterio
    from rasterio.transform import from_origin

    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "card.yaml").write_text(CARD)
    pixels = np.random.default_rng(3).integers(0, 200, (1, 32, 32)).astype(np.uint8)
    with rasterio.open(
        folder / "scene.tif", "w", driver="GTiff", width=32, height=32, count=1, dtype="uint8",
        crs="EPSG:32631", transform=from_origin(0, 0, 10, 10),
    ) as target:  # fmt: skip
        target.write(pixels)
    return folder


def test_a_package_adds_a_provider_and_its_card_runs(scene, tmp_path):
    without = python(RUN, scene)
    assert without.returncode == 1
    assert without.stderr.strip() == (
        "bright: provider: found 'acme'; valid here: " + ", ".join(vars(BUILT_IN)) + "; a package that adds "
        "others has entry points of the group segpipe.providers"
    )
    install(tmp_path / "source", tmp_path / "site", init=SPEC, adapter=ADAPTER)
    found = python(RUN, scene, tmp_path / "site")
    assert found.returncode == 0, found.stderr
    assert int(found.stdout.removeprefix("labelled ")) > 0
    wrong = (scene / "card.yaml").read_text().replace("level: 100", "levle: 100")
    (scene / "card.yaml").write_text(wrong)
    assert "bright: arguments.levle: unknown; valid: level" in python(RUN, scene, tmp_path / "site").stderr


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (
            {"init": "import gone_library"},
            "acme of the package acme-segpipe 1.2 cannot be loaded (ModuleNotFoundError: No module named "
            "'gone_library')",
        ),
        (
            {"init": "PROVIDER = 'acme'"},
            "acme of the package acme-segpipe 1.2 cannot be loaded (TypeError: acme_segpipe:PROVIDER is no "
            "segpipe.models.plugins.ProviderSpec)",
        ),
        (
            {"init": SPEC, "adapter": "def check(card): ..."},
            "acme of the package acme-segpipe 1.2 cannot be loaded (TypeError: acme_segpipe.adapter has no "
            "function build)",
        ),
        (
            {"init": SPEC, "adapter": "1 / 0"},
            "acme of the package acme-segpipe 1.2 cannot be loaded (ZeroDivisionError: division by zero)",
        ),
        (
            {"init": SPEC, "adapter": "import gone_library"},
            "acme needs the package gone_library: pip install 'acme-segpipe[gpu]'",
        ),
    ],
)
def test_a_broken_package_is_told_in_a_line_and_spoils_no_other_card(scene, tmp_path, files, told):
    install(tmp_path / "source", tmp_path / "site", **files)
    found = python(RUN, scene, tmp_path / "site")
    assert found.stderr.strip() == f"bright: provider: {told}"
    otsu = (scene / "card.yaml").read_text().replace("provider: acme", "provider: classical")
    otsu = otsu.replace("arguments: {level: 100}", "architecture: otsu\narguments: {thresholds: [100]}")
    (scene / "card.yaml").write_text(otsu.replace("activation: softmax", "activation: none"))
    assert python(RUN, scene, tmp_path / "site").stdout.startswith("labelled ")


def test_a_name_that_two_packages_give_is_refused(scene, tmp_path):
    install(tmp_path / "source", tmp_path / "site", "classical", init=SPEC)
    (scene / "card.yaml").write_text(CARD.replace("provider: acme", "provider: classical"))
    assert python(RUN, scene, tmp_path / "site").stderr.strip() == (
        "bright: provider: classical is in segpipe and classical-segpipe 1.2: uninstall all but one"
    )


def test_the_entry_points_of_segpipe_are_those_built_in():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == {
        name: f"segpipe.models.plugins:BUILT_IN.{name}" for name in vars(BUILT_IN)
    }


@pytest.mark.parametrize("name", vars(BUILT_IN))
def test_every_provider_built_in_is_an_adapter(make_card, name):
    if name == "nnunet":
        pytest.importorskip("dynamic_network_architectures", reason="needs the extra nnunet")
    card = make_card(name, "")
    assert provider_spec(card) is getattr(BUILT_IN, name)
    assert callable(load_adapter(card).build)


def test_a_provider_that_is_close_is_proposed(make_card):
    with pytest.raises(
        RequestError, match=r"^trial: provider: found 'torchvison'; did you mean torchvision\?"
    ):
        check_card(make_card("torchvison", "net.pt"))


def test_a_missing_library_names_the_extra(scene):
    (scene / "card.yaml").write_text(CARD.replace("acme", "smp"))
    code = """
import sys
from segpipe.config.card import load_card
from segpipe.models.plugins import load_adapter

sys.modules["segmentation_models_pytorch"] = None  # as where it is not installed
load_adapter(load_card("card.yaml"))
"""
    told = python(code, scene).stderr.strip().splitlines()[-1]
    assert told.endswith(
        "bright: provider: smp needs the package segmentation_models_pytorch: pip install 'segpipe[models]'"
    )
