"""What a job lists under ``scenes`` becomes scenes: all of them, once, in order, well named."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segpipe.errors import RequestError, SceneError
from segpipe.sources import discover, open_source, package_file
from segpipe.sources.discover import _unique, safe_name, scene_stem
from segpipe.sources.uri import reveal

Write = Callable[..., Path]
Noise = Callable[..., np.ndarray]


def _touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def _found(entries: Sequence[str], root: Path) -> list[tuple[str, str]]:
    """Names and URIs, these relative to a folder."""
    return [(s.name, s.uri.replace(f"{root}/", "")) for s in discover(entries)]


def test_files_globs_and_folders_in_their_order_each_once(tmp_path: Path) -> None:
    _touch(tmp_path, "b.tif", "a.tif", "deep/er/c.tif", "mri/v.nii.gz", "mri/notes.txt")
    entries = [f"{tmp_path}/b.tif", f"{tmp_path}/**/*.tif", f"{tmp_path}/mri", f"{tmp_path}/*.tif"]
    assert _found(entries, tmp_path) == [
        ("b", "b.tif"),
        ("a", "a.tif"),
        ("c", "deep/er/c.tif"),
        ("v", "mri/v.nii.gz"),
    ]


def test_relative_entries_name_the_same_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _touch(tmp_path, "a.tif", "b.tif")
    monkeypatch.chdir(tmp_path)
    assert discover(["a.tif", "*.tif"]) == discover([f"{tmp_path}/*.tif"])


def test_a_folder_gives_its_scenes_not_their_previews_sidecars_and_subfolders(
    tmp_path: Path,
) -> None:
    _touch(tmp_path, "s.tif", "s.tif.msk", "s.tif.aux.xml", "s_preview.png", "s.jpg", ".hidden.tif")
    _touch(tmp_path, "v.nii", "pair.img", "pair.hdr", "labels/s.tif")
    assert _found([str(tmp_path)], tmp_path) == [
        ("pair", "pair.img"),
        ("s", "s.tif"),
        ("v", "v.nii"),
    ]


def test_a_glob_takes_pictures_and_any_suffix_it_names(tmp_path: Path) -> None:
    _touch(tmp_path, "a.png", "b.dat", "c.txt", "d.tif")
    assert _found([f"{tmp_path}/*"], tmp_path) == [("a", "a.png"), ("d", "d.tif")]
    assert _found([f"{tmp_path}/*.dat"], tmp_path) == [("b", "b.dat")]


def test_series_folders_are_found_at_any_depth_however_they_are_matched(
    tmp_path: Path, write_series: Write, noise: Noise
) -> None:
    for inside in ("p1/ct", "p2/mr/t1", "p2/mr/t2"):
        write_series(tmp_path / inside, noise((2, 4, 4)))
    for file in (tmp_path / "p2/mr/t2").iterdir():
        file.rename(file.with_suffix(""))  # as scanners write them: no suffix at all
    _touch(tmp_path, "p1/atlas.nii.gz")
    all_three = [("ct", "p1/ct"), ("t1", "p2/mr/t1"), ("t2", "p2/mr/t2")]
    assert _found([str(tmp_path)], tmp_path) == all_three
    assert _found([f"{tmp_path}/*/**/IM*"], tmp_path) == all_three
    assert _found([f"{tmp_path}/p2/mr/*"], tmp_path) == all_three[1:]
    assert _found([f"{tmp_path}/p1"], tmp_path) == [("atlas", "p1/atlas.nii.gz"), all_three[0]]
    for scene in discover([str(tmp_path)]):
        assert open_source(scene.uri).geometry.shape == (2, 4, 4)


def test_names_come_from_paths_never_from_patients(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    write_series(tmp_path / "series", noise((2, 4, 4)))
    assert [s.name for s in discover([str(tmp_path)])] == ["series"]


def test_names_that_collide_get_their_folder_then_a_number(tmp_path: Path) -> None:
    _touch(tmp_path, "x/a.tif", "y/a.tif", "y/a.nii.gz", "y/A.jp2", "z/b.tif", "z/y_a-2.tif")
    names = [s.name for s in discover([f"{tmp_path}/**/*"])]
    assert names == ["x_a", "y_A", "y_a-3", "y_a-4", "b", "y_a-2"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a.nii.gz", "a"),
        ("sub-01_T1w.NII.GZ", "sub-01_T1w"),
        ("LC08.v2.tif", "LC08.v2"),
        ("a.tar.gz", "a.tar"),
        ("plain", "plain"),
        (".tif", ".tif"),
    ],
)
def test_stems(name: str, stem: str) -> None:
    assert scene_stem(name) == stem


@given(st.text(max_size=300))
def test_names_are_safe_for_folders(text: str) -> None:
    name = safe_name(text)
    assert 0 < len(name) <= 100
    assert re.fullmatch(r"[\w.-]+", name)
    assert name[0] not in ".-_" and name[-1] not in ".-_"


@given(st.lists(st.tuples(st.sampled_from(["a", "A", "a-2", "p_a", "b"]), st.sampled_from("pq"))))
def test_names_are_unique_where_case_does_not_count(stems: list[tuple[str, str]]) -> None:
    names = _unique(stems)
    assert len({n.casefold() for n in names}) == len(stems)
    assert names == _unique(stems)


def test_letters_of_any_script_stay(tmp_path: Path) -> None:
    _touch(tmp_path, "Zürich 2024.tif", "地図.tif")
    assert [s.name for s in discover([f"{tmp_path}/*.tif"])] == ["Zürich_2024", "地図"]


def test_a_path_with_glob_characters_that_exists_is_a_path(tmp_path: Path) -> None:
    _touch(tmp_path, "scene[1].tif", "scene1.tif")
    assert _found([f"{tmp_path}/scene[1].tif"], tmp_path) == [("scene_1", "scene[1].tif")]


def test_frames_are_scenes_of_their_own(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(48, dtype="int16").reshape(2, 3, 4, 2), np.eye(4))
    nib.save(image, tmp_path / "bold.nii.gz")
    _touch(tmp_path, "map.tif")
    entries = [f"{tmp_path}/bold.nii.gz#frame=0", f"{tmp_path}#frame=1"]
    assert _found(entries, tmp_path) == [
        ("bold_frame0", "bold.nii.gz#frame=0"),
        ("bold_frame1", "bold.nii.gz#frame=1"),
        ("map_frame1", "map.tif"),
    ]


def test_a_frame_of_a_raster_fails_alone(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    path = write_tif(tmp_path / "a.tif", noise((1, 4, 4)))
    with pytest.raises(SceneError, match="only a 4D NIfTI file has frames"):
        open_source(f"{path}#frame=0")


def test_urls_pass_through(tmp_path: Path) -> None:
    urls = ["s3://lake/2024/a.tif", "https://host/b.tif?sig=1%2F2", "gs://lake/2025/a.tif"]
    scenes = discover(urls)
    assert [reveal(s.uri) for s in scenes] == urls
    assert [s.name for s in scenes] == ["2024_a", "b", "2025_a"]
    with pytest.raises(RequestError, match="globs work on local folders only"):
        discover(["s3://lake/*.tif"])


def test_a_mosaic_is_one_scene_named_for_what_is_fixed(tmp_path: Path) -> None:
    _touch(tmp_path, "tiles/north_1.tif", "tiles/north_2.tif", "tiles/south_1.tif")
    entries = [f"mosaic:{tmp_path}/tiles/north_*.tif", f"mosaic:{tmp_path}/tiles/*.tif"]
    assert [s.name for s in discover(entries)] == ["north", "tiles"]
    assert discover(entries)[0].uri == entries[0]


def test_a_missing_file_fails_alone_when_it_is_opened(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    write_tif(tmp_path / "a.tif", noise((1, 4, 4)))
    present, gone = discover([f"{tmp_path}/a.tif", f"{tmp_path}/gone.tif"])
    assert open_source(present.uri).geometry.shape == (4, 4)
    with pytest.raises(SceneError, match=r"gone\.tif: no such file"):
        open_source(gone.uri)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{}/*.tif", r"\*\.tif: no raster, NIfTI file or DICOM series matches"),
        ("{}", r"the folder holds no \.tif, .* name other files by a glob such as"),
        ("{}/gone.tif", r"no such file: .*gone\.tif"),
        ("mosaic:{}/*.tif", "no file matches"),
        ("pkg://no-such-dist/a.tif", "'no-such-dist' is not installed"),
        ("{}/a.nii#frame=x", "expected #frame=N"),
        ("", "an entry is empty"),
    ],
)
def test_a_request_for_nothing_is_wrong(entry: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=message):
        discover([entry.format(tmp_path)])


def test_no_entries_is_wrong() -> None:
    with pytest.raises(RequestError, match="nothing is listed"):
        discover([])


def test_files_of_installed_distributions() -> None:
    uri = "pkg://nibabel/nibabel/tests/data/anatomical.nii"
    path = package_file(uri)
    assert path == Path(nib.__file__).parent / "tests" / "data" / "anatomical.nii"
    (scene,) = discover([uri])
    assert (scene.name, scene.uri) == ("anatomical", uri)
    with open_source(uri) as source:
        expected = nib.load(path).get_fdata()
        np.testing.assert_array_equal(source.read(source.geometry.box).values[0].T, expected)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("pkg://nibabel", "expected pkg://DISTRIBUTION/PATH/IN/IT"),
        ("nibabel/x", "expected pkg://"),
        (
            "pkg://nibabel/data/anatomical.nii",
            "no file 'data/anatomical.nii'; it has nibabel/tests",
        ),
        ("pkg://nibabel/../secrets.txt", "has no file '../secrets.txt'"),
        ("pkg://no-such-dist/x", "'no-such-dist' is not installed; try: pip install no-such-dist"),
    ],
)
def test_package_files_that_are_not_there(uri: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        package_file(uri)


def test_importing_sources_loads_neither_torch_nor_prefect_nor_pydicom() -> None:
    code = (
        "import sys, segpipe.sources;"
        "print(sorted({'torch', 'prefect', 'pydicom', 'obstore'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stacks_and_series_are_entries(tmp_path: Path) -> None:
    _touch(tmp_path, "x/LC08_B4.tif", "x/LC08_B5.tif", "x/B4.tif", "x/B5.tif", "ct/1.dcm")
    stacks = [f"stack:{tmp_path}/x/{a}|{tmp_path}/x/{b}" for a, b in
              [("LC08_B4.tif", "LC08_B5.tif"), ("B4.tif", "B5.tif"), ("B4.tif", "B9.tif")]]  # fmt: skip
    series = [f"{tmp_path}/ct#series=1.2", f"{tmp_path}/ct#series=1.2@3.4"]
    scenes = discover([*stacks, *series, "stack:s3://b/day/r.tif|https://h/n.tif?sig=1"])
    assert [reveal(s.uri) for s in scenes] == [
        *stacks,
        *series,
        "stack:s3://b/day/r.tif|https://h/n.tif?sig=1",
    ]
    assert [s.name for s in scenes][:3] == ["LC08", f"{tmp_path.name}_x", f"{tmp_path.name}_x-2"]
    assert re.fullmatch(r"ct_[0-9a-f]{8}", scenes[3].name)
    assert scenes[3].name != scenes[4].name
    assert scenes[5].name == "day"
    for wrong in ("stack:a.tif", "stack:", "stack:a.tif|"):
        with pytest.raises(RequestError, match=r"expected stack:FILE\|FILE, two files or more"):
            discover([wrong])
    with pytest.raises(RequestError, match=r"#series=UID with digits and dots; found 'x/../y'"):
        discover([f"{tmp_path}/ct#series=x/../y"])
    with pytest.raises(SceneError, match="only a folder of DICOM files has series"):
        open_source(f"{tmp_path}/x/B4.tif#series=1.2")
