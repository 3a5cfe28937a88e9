"""Text and paths that come in are refused on one line, or taken as they are meant."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import shapely
from pydantic import ValidationError

from segpipe.config.card import Clip, SceneQuantiles
from segpipe.config.classes import load_classes
from segpipe.config.job import Job
from segpipe.config.loading import load, read_yaml, validate
from segpipe.config.parsing import parse_json
from segpipe.errors import RequestError, SegpipeError
from segpipe.geometry.geometry import RasterGeometry
from segpipe.regions.layer import make_layer
from segpipe.regions.polygons import place_layer
from segpipe.sources import discover, open_source
from segpipe.sources.base import require_file

BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
WRONG_YAML = {
    "duplicate": ("a: 1\nb: 2\na: 3\n", "line 3, column 1 is not valid YAML: the key 'a' stands twice"),
    "duplicate inside": ("a:\n  - b: 1\n    b: 1\n", "line 3, column 5"),
    "aliases": (BOMB, "nodes"),
    "loop": ("a: &a [*a]\n", "an alias of what it lies in"),
    "deep list": ("a: " + "[" * 5000 + "]" * 5000, "nested over"),
    "deep mapping": ("a: " + "{b: " * 5000 + "1" + "}" * 5000, "nested over"),
    "tab": ("a:\n\t- 1\n", "line 2"),
    "list": ("- 1\n", "a mapping of keys was expected"),
    "date": ("a: 2020-13-45\n", "a value cannot be read"),
    "tag": ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    "control": ("a: \x01\n", "not valid YAML"),
}


@pytest.mark.parametrize("kind", WRONG_YAML)
def test_yaml_is_refused_on_one_line(tmp_path: Path, kind: str) -> None:
    text, told = WRONG_YAML[kind]
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=str(path)) as caught:
        read_yaml(path)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_yaml_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(RequestError, match="not UTF-8 text"):
        read_yaml(tmp_path / "job.yaml")


def test_merged_keys_and_shared_anchors_stay_valid(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\n")
    assert read_yaml(tmp_path / "job.yaml")["c"] == {"x": 3, "y": 4}


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[" * 200_000, '{"b": {"c": 1, "c": 1}}'])
def test_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"stands twice|too deep"):
        parse_json(text)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_is_finite(value: str) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Clip(op="clip", low=float(value), high=1)


@pytest.mark.parametrize("range_", [{"low": 1, "high": 1}, {"low": 1, "high": 0.5}])
def test_a_range_is_not_empty(range_: dict[str, float]) -> None:
    for op in (lambda: Clip(op="clip", **range_), lambda: SceneQuantiles(op="scene_quantiles", **range_)):
        with pytest.raises(ValidationError, match="valid: low below high"):
            op()


def test_two_classes_have_two_names(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_text("value,name\n0,a\n1,b\n2,b\n")
    with pytest.raises(RequestError, match="found twice: b"):
        load_classes(str(path))


def test_what_is_meant_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: landcover-unet\nscenes: [a.tif]\noutputs: {dir: '~/runs'}\n")
    job = load(Job, path, ["scenes=x.tif"])
    assert job.scenes == ["x.tif"]
    assert job.outputs.dir == str(Path.home() / "runs")


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("outputs", {"dir": ""}, "outputs.dir: found ''; no folder"),
        ("outputs", {"dir": None}, "outputs.dir: found None; no folder"),
        ("outputs", {"dir": "~nouser/x"}, "no such user"),
        ("tiling", {"memory": 4}, "4GiB"),
    ],
)
def test_what_is_not_meant_is_told(field: str, value: dict[str, object], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        validate(Job, {"model": "m", "scenes": ["a.tif"], field: value}, "job.yaml")
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["x" * 5000, "~nouser/a.tif", "a\0b.tif", "loop/a.tif", "loop"])
def test_a_path_that_no_system_knows_is_refused(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for ask in (lambda: discover([path]), lambda: open_source(path), lambda: require_file(Path(path))):
        with pytest.raises(SegpipeError) as caught:
            ask()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_unit_outside_the_standard_is_millimetres_and_noted(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros((3, 4, 5), np.uint8), np.eye(4))
    image.header["xyzt_units"] = 4
    image.to_filename(tmp_path / "a.nii")
    with open_source(str(tmp_path / "a.nii")) as scene:
        assert "the unit code is outside the standard: millimetres are assumed" in scene.notes


def test_a_vertex_that_is_not_finite_costs_its_region_only() -> None:
    wild = shapely.Polygon([(0, 0), (4, 0), (float("nan"), 4), (0, 4)])
    layer = make_layer(
        "regions.gpkg", ["wild", "fine"], np.array([wild, shapely.box(0, 0, 1, 1)], object), None
    )
    assert layer.polygons[0].is_empty and layer.polygons[1].area == 1
    assert layer.damaged.tolist() == [True, False]
    geometry = RasterGeometry((4, 4), (1, 0, 0, 0, 1, 0), None)
    regions = place_layer(layer, geometry)
    assert (regions.names, regions.damaged) == (("fine",), ("wild",))


def test_an_empty_inner_ring_is_dropped() -> None:
    holed = shapely.Polygon([(0, 0), (4, 0), (4, 4), (0, 4)], [shapely.LinearRing()])
    layer = make_layer("regions.gpkg", ["a"], np.array([holed], object), None)
    assert layer.polygons[0].area == 16 and not list(layer.polygons[0].interiors)
