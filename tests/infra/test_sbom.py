"""The bill of materials and the list of licences, by the commands of `make sbom`."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from tests.infra.test_locks import LOCKS, entries

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make sbom` fills, elsewhere."""
    pytest.importorskip("cyclonedx_py", reason="cyclonedx-bom is not installed: make lock, make test")
    folder = tmp_path_factory.mktemp("sbom")
    shown = subprocess.run(
        ["make", "--dry-run", "--assume-old=.venv/.installed", "sbom"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    commands = shown.stdout.replace("build/sbom", str(folder)).replace(
        ".venv/bin", str(Path(sys.executable).parent)
    )
    subprocess.run(["sh", "-e", "-c", commands], cwd=ROOT, check=True, capture_output=True)
    return folder


def components(path: Path) -> dict[str, dict[str, str]]:
    return {canonicalize_name(each["name"]): each for each in json.loads(path.read_text())["components"]}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["environment.cdx.json", "image.cdx.json"])
def test_a_bill_is_valid_by_its_own_schema(made: Path, name: str) -> None:
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from cyclonedx.validation import make_schemabased_validator

    text = (made / name).read_text()
    version = SchemaVersion.from_version(json.loads(text)["specVersion"])
    assert make_schemabased_validator(OutputFormat.JSON, version).validate_str(text) is None
    assert make_schemabased_validator(OutputFormat.JSON, version).validate_str(text.replace("bomFormat", "x"))


@pytest.mark.slow
def test_the_environments_bill_has_every_pin(made: Path) -> None:
    found = components(made / "environment.cdx.json")
    pins = [pin for pin in entries(LOCKS[0]) if pin.marker is None or pin.marker.evaluate()]
    assert len(pins) > 300
    for pin in pins:
        assert pin.specifier.contains(found[canonicalize_name(pin.name)]["version"], prereleases=True), pin
    rows = csv.DictReader((made / "licences.csv").read_text().splitlines(keepends=True))
    listed = {canonicalize_name(row["Name"]): row for row in rows}
    system = {"pip", "setuptools", "wheel", "pip-licenses", "prettytable", "wcwidth"}  # left out by the tool
    assert {canonicalize_name(pin.name) for pin in pins} - listed.keys() <= system
    for name, row in listed.items():
        assert row["Version"] == importlib.metadata.version(name) and row["License"], row


@pytest.mark.slow
def test_the_images_bill_has_every_pin_with_its_hashes(made: Path) -> None:
    found = components(made / "image.cdx.json")
    for pin, hashes in entries(LOCKS[2]).items():
        component = found[canonicalize_name(pin.name)]
        assert pin.specifier.contains(component["version"], prereleases=True), pin
        told = {
            f"sha256:{each['content']}"
            for reference in component["externalReferences"]  # type: ignore[attr-defined]
            for each in reference.get("hashes", [])
        }
        assert set(hashes) <= told, pin
