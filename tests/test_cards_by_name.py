"""Cards by name: which one a name means, and that a path means what it did."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from world import World

import segpipe
from segpipe.config.builtin import builtin_folder, card_files, find_card
from segpipe.config.card import load_card, read_card
from segpipe.config.job import load_job
from segpipe.errors import RequestError
from segpipe.runs.check import check_request


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_card(path: Path, title: str) -> Path:
    data = yaml.safe_load((builtin_folder() / "models" / "cloud-otsu.yaml").read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**data, "title": title}))
    return path


def test_a_file_is_taken_first_then_the_working_folders_card_then_that_of_segpipe(here: Path) -> None:
    assert load_card("cloud-otsu").title == "Bright clouds by Otsu's threshold on the blue band"
    assert find_card("cloud-otsu").parent == builtin_folder() / "models"
    mine = write_card(here / "configs" / "models" / "cloud-otsu.yaml", "of the working folder")
    assert load_card("cloud-otsu").title == read_card("cloud-otsu").title == "of the working folder"
    assert card_files()["cloud-otsu"] == mine.relative_to(here)
    assert card_files()["landcover-unet"].parent == builtin_folder() / "models"
    write_card(here / "cloud-otsu", "a file of this name")
    assert load_card("cloud-otsu").title == "a file of this name"


def test_an_unknown_name_is_told_with_those_there_are(here: Path) -> None:
    with pytest.raises(RequestError, match=r"no model card 'landcover-unett': did you mean landcover-unet\?"):
        load_card("landcover-unett")
    with pytest.raises(RequestError, match=r"no model card 'xyz': valid: .*brain-box, .*starter-sam"):
        find_card("xyz")


@pytest.mark.parametrize("path", ["nowhere.yaml", "models/landcover-unet", "./landcover-unet.yml"])
def test_a_path_is_never_searched_for(here: Path, path: str) -> None:
    with pytest.raises(RequestError, match=r"cannot be read \(No such file or directory\)"):
        load_card(path)


def test_a_name_gives_what_its_path_gives(here: Path, world: World) -> None:
    """By name it is another request (what was asked is another text), of the same card."""
    shutil.copytree(world.models, here / "configs" / "models")
    by_path, by_name = (
        check_request(load_job(world.job(here / kind, model=model)))
        for kind, model in (("a", "configs/models/nearest.yaml"), ("b", "nearest"))
    )
    assert by_path.card == by_name.card
    assert by_path.fingerprint != by_name.fingerprint
    pixels = world.pixels()
    first = segpipe.predict(pixels, model="nearest", bands=["red", "nir"])
    second = segpipe.predict(pixels, model=here / "configs/models/nearest.yaml", bands=["red", "nir"])
    assert (first.values == second.values).all()
