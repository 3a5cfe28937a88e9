"""The measure of a toy repository whose faults are known, and the hashes of files that are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio

from tools.house import House
from tools.same_bytes import differences, hash_of

CONTRACT = """
[[tool.importlinter.contracts]]
name = "layers"
type = "layers"
containers = ["segpipe"]
layers = ["top", "left | right", "low : lower", "base"]
"""
FILES = {
    "top/__init__.py": "from segpipe.left import shape\nfrom segpipe.right import paint\n",
    "left/__init__.py": "",
    "left/shape.py": "from segpipe.low import pixel\n",
    "left/_loop.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import shape\n",
    "right/__init__.py": "",
    "right/paint.py": "def draw(a, b):\n    from segpipe.left.shape import pixel\n",
    "low/__init__.py": "from segpipe.lower import element\n",
    "low/pixel.py": "import segpipe.base.kind\n",
    "lower/__init__.py": "",
    "lower/element.py": "from segpipe.low import pixel\n",
    "base/__init__.py": "",
    "base/kind.py": "def lazily():\n    from segpipe.top import shape\n",
    "loose.py": "class Twice: ...\n",
    "errors.py": "class Twice: ...\n",
    "__init__.py": "",
}


@pytest.fixture
def toy(tmp_path: Path) -> House:
    """A repository: `low` and `lower` are a knot, `base` climbs to the top within a function."""
    for name, text in FILES.items():
        path = tmp_path / "segpipe" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text(CONTRACT)
    return House(tmp_path)


def test_a_knot_is_of_imports_that_run_with_their_module(toy: House) -> None:
    assert toy.knots() == [{"segpipe.low", "segpipe.lower"}]


def test_a_circle_is_of_all_imports(toy: House) -> None:
    # base.kind → top → left.shape → low.pixel → base.kind, where only the first is lazy
    assert toy.circles() == [
        {"segpipe.base.kind", "segpipe.top", "segpipe.left.shape", "segpipe.right.paint", "segpipe.low.pixel"}
    ]


def test_a_climb_goes_up_or_to_an_independent_sibling(toy: House) -> None:
    assert toy.climbs() == [
        ("segpipe.base.kind", "segpipe.top"),
        ("segpipe.right.paint", "segpipe.left.shape"),
    ]


def test_a_repository_without_layers_has_no_number_of_climbs(toy: House) -> None:
    (toy.root / "pyproject.toml").write_text("")
    assert House(toy.root).climbs() is None


def test_floors_are_the_imports_of_the_longest_chain(toy: House) -> None:
    assert toy.floors() == 3  # top → left.shape → low.pixel → base.kind, or by low and lower.element


def test_names_and_modules(toy: House) -> None:
    assert toy.loose() == ["loose"]
    assert toy.twice() == (["Twice"], [])


def test_args_are_counted_of_functions_with_two_parameters(toy: House) -> None:
    path = toy.root / "segpipe" / "loose.py"
    path.write_text('def told(a, b):\n    """Tell.\n\n    Args:\n        a: one.\n    """\n')
    assert House(toy.root).args_share() == 0.5


def test_a_hash_is_of_pixels_and_their_type(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 3, 4)

    def written(name: str, array: np.ndarray, **tags: str) -> str | None:
        path = tmp_path / name
        profile = {"driver": "GTiff", "count": 1, "height": 3, "width": 4, "dtype": array.dtype.name}
        with rasterio.open(path, "w", **profile) as file:
            file.write(array)
            file.update_tags(**tags)
        return hash_of(path)

    first = written("a.tif", pixels)
    assert first is not None
    assert first == written("b.tif", pixels, made="another day")
    assert first != written("c.tif", pixels + 1)
    assert first != written("d.tif", pixels.astype(np.uint16))


def test_a_hash_of_a_table_leaves_out_the_run(tmp_path: Path) -> None:
    texts = ("run,area\n1,2.5\n", "run,area\n2,2.5\n", "run,area\n1,2.6\n")
    paths = [tmp_path / f"{number}.csv" for number in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    first, other_run, other_area = map(hash_of, paths)
    assert first == other_run != other_area


def test_differences_are_new_missing_and_other() -> None:
    before = ["raster a.csv 1", "raster b.csv 2", "raster c.csv 3"]
    now = ["raster a.csv 1", "raster b.csv 9", "raster d.csv 4"]
    assert differences(before, now) == [
        "raster b.csv differs",
        "raster c.csv is missing",
        "raster d.csv is new",
    ]
    assert differences(before, before) == []
