"""Files of a folder or a bucket: all that are scenes, once, in order, as a stream."""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.config.scan import Lake
from segpipe.errors import RequestError
from segpipe.lake import files
from segpipe.lake.entry import LakeEntry, place_name
from segpipe.lake.listing import list_lake
from segpipe.sources import open_source
from segpipe.sources.discover import safe_name
from segpipe.sources.gdal import store_options

WriteCog = Callable[..., np.ndarray]

TREE = [
    "b.tif", "a.tif", "a.tif.aux.xml", "a.tif.ovr", "a.tif.msk", "a.jp2", "half.tif.part", "half.tif.tmp",
    "half.tif.crdownload", ".hidden.tif", ".git/x.tif", "2026/07/LC08_x.tif", "2026/07/LC08_x.png",
    "2026/08/y.TIF", "2026/z.nii.gz", "notes.txt", "2026/.part/q.tif",
]  # fmt: skip


def _tree(folder: Path, names: list[str] = TREE) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x" * len(name))


def _all(location: Any, **fields: Any) -> list[LakeEntry]:
    return list(list_lake(Lake(location=str(location), **fields)))


def test_a_folder_gives_its_scenes_named_by_their_places(tmp_path: Path) -> None:
    _tree(tmp_path)
    found = _all(tmp_path)
    assert [(f.name, f.uri.removeprefix(f"{tmp_path}/")) for f in found] == [
        ("2026__07__LC08_x", "2026/07/LC08_x.tif"),
        ("2026__08__y.TIF", "2026/08/y.TIF"),
        ("2026__z", "2026/z.nii.gz"),
        ("a.jp2", "a.jp2"),
        ("a", "a.tif"),
        ("b", "b.tif"),
    ]
    for scene in found:
        files = [(path, Path(path).stat()) for path in scene.files]
        assert scene.size == sum(s.st_size for _, s in files)
        told = [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for path, s in files]
        assert scene.identity == {"files": told}
        assert scene.modified is not None
        newest = max(status.st_mtime for _, status in files)
        assert scene.modified.timestamp() == pytest.approx(newest, abs=1e-5)


def test_another_time_or_size_is_another_digest_and_the_same_name(tmp_path: Path) -> None:
    _tree(tmp_path, ["a.tif"])
    (before,), (same,) = _all(tmp_path), _all(tmp_path)
    assert before.digest == same.digest
    os.utime(tmp_path / "a.tif", ns=(1, 2**60))
    (touched,) = _all(tmp_path)
    (tmp_path / "a.tif").write_bytes(b"longer than before")
    os.utime(tmp_path / "a.tif", ns=(1, 2**60))
    (longer,) = _all(tmp_path)
    assert len({before.digest, touched.digest, longer.digest}) == 3
    assert before.name == touched.name == longer.name == "a"


@pytest.mark.parametrize(
    "pattern",
    ["*.tif", "**/*.tif", "2026/**/*.tif", "2026/*/*.TIF", "**/LC08*", "*/07/*", "**", "2026/0[78]/*.*",
     "[ab].*"],
)  # fmt: skip
@pytest.mark.parametrize("inside", ["pattern", "location"])
def test_globs_match_as_pythons_own(tmp_path: Path, pattern: str, inside: str) -> None:
    _tree(tmp_path)
    suffixes = (".tif", ".TIF", ".jp2", ".nii.gz", ".png")
    expected = {
        f
        for f in glob.glob(f"{tmp_path}/{pattern}", recursive=True)  # noqa: PTH207
        if f.endswith(suffixes) and Path(f).is_file()
    }
    found = _all(tmp_path, pattern=pattern) if inside == "pattern" else _all(f"{tmp_path}/{pattern}")
    assert {f.uri for f in found} == expected != set()
    assert len(found) == len(expected)


def test_only_folders_that_the_pattern_fixes_are_walked(tmp_path: Path) -> None:
    _tree(tmp_path)
    (tmp_path / "closed").mkdir()
    wanted = files.wanted(Lake(location=str(tmp_path), pattern="2026/07/*.tif"))
    assert wanted.head == ("2026", "07")
    assert files.wanted(Lake(location=str(tmp_path), pattern="**/07/*.tif")).head == ()


def test_more_names_than_are_sorted_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{n * 7919 % 100:03d}.tif" for n in range(50)] + ["ü.tif", "line\nbreak.tif", "deep/x.tif"]
    odd = os.fsdecode(b"\xff.tif")  # no UTF-8, as old archives have
    _tree(tmp_path, [*names, odd])
    monkeypatch.setattr(files, "RUN", 7)
    found = _all(tmp_path)
    assert [f.uri for f in found] == sorted(f"{tmp_path}/{name}" for name in {*names, odd})
    assert len({f.digest for f in found}) == len({f.name for f in found}) == len(found)


def test_a_single_file_an_empty_folder_and_a_link(tmp_path: Path) -> None:
    _tree(tmp_path, ["a.tif", "empty/notes.txt", "real/b.tif"])
    (tmp_path / "real" / "self").symlink_to(tmp_path / "real")
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "gone.tif").symlink_to(tmp_path / "nowhere.tif")
    assert [f.name for f in _all(tmp_path / "a.tif")] == ["a"]
    assert _all(tmp_path / "empty") == []
    assert [f.name for f in _all(tmp_path / "linked")] == ["b"]


@pytest.mark.parametrize(
    ("location", "fields", "message"),
    [
        ("/no/such/folder", {}, "lake.location: /no/such/folder: no such folder"),
        ("/no/such/*.tif", {}, "lake.location: /no/such: no such folder"),
        ("https://example.org/scenes", {}, "lake.location: https://.* cannot be listed; valid: .*s3://"),
        ("/tmp/*.tif", {"pattern": "*.tif"}, "lake.pattern: .*second glob"),
        ("/tmp", {"pattern": "../*.tif"}, r"lake.pattern: .* without \.\."),
        ("s3://bucket/x", {"kind": "bids"}, "lake.location: s3://bucket/x: .* kind bids .* local folder"),
        ("s3://bucket/x", {"kind": "dicom"}, "lake.location: s3://bucket/x: .* kind dicom .* local folder"),
        ("/no/such", {"kind": "bids"}, "lake.location: /no/such: no such folder"),
        ("/no/such", {"kind": "dicom"}, "lake.location: /no/such: no such folder"),
        ("/no/such.json", {"kind": "stac"}, "lake.location: /no/such.json: cannot be read as STAC"),
    ],
)
def test_mistakes_name_the_field(location: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        _all(location, **fields)


def test_a_bucket_is_listed_as_boto3_lists_it(s3: Any) -> None:
    for name in [*TREE, "with space/ü.tif"]:
        s3.put_object(Bucket="lake", Key=f"scenes/{name}", Body=name.encode())
    s3.put_object(Bucket="lake", Key="scenes2/other.tif", Body=b"x")
    told = {o["Key"]: o for o in s3.list_objects_v2(Bucket="lake")["Contents"]}
    found = _all("s3://lake/scenes")
    assert [(f.name, f.uri.removeprefix("s3://lake/scenes/")) for f in found] == [
        ("2026__07__LC08_x", "2026/07/LC08_x.tif"),
        ("2026__08__y.TIF", "2026/08/y.TIF"),
        ("2026__z", "2026/z.nii.gz"),
        ("a.jp2", "a.jp2"),
        ("a", "a.tif"),
        ("b", "b.tif"),
        (place_name("with space/ü.tif"), "with space/ü.tif"),
    ]
    for scene in found:
        entry = told[scene.uri.removeprefix("s3://lake/")]
        assert (scene.size, scene.modified) == (entry["Size"], entry["LastModified"])
        beside = [k for k in told if k.startswith("scenes/a.tif.")] if scene.name == "a" else []
        own = {"size": entry["Size"], "etag": entry["ETag"]}
        sidecars = [[k.removeprefix("scenes/"), told[k]["Size"], told[k]["ETag"]] for k in beside]
        assert scene.identity == own | ({"beside": sidecars} if beside else {})
    assert [f.name for f in _all("s3://lake/scenes/**/LC*.tif")] == ["2026__07__LC08_x"]
    assert [f.name for f in _all("s3://lake", pattern="scenes/2026/*/*.tif")] == ["scenes__2026__07__LC08_x"]
    assert _all("s3://lake/nothing") == []


def test_a_raster_in_a_bucket_is_opened_where_it_was_listed(
    s3: Any, tmp_path: Path, write_cog: WriteCog
) -> None:
    """One environment is enough: GDAL, which has words of its own for it, reads from the same endpoint."""
    values = write_cog(tmp_path / "scene.tif")
    s3.upload_file(str(tmp_path / "scene.tif"), "lake", "2026/scene.tif")
    (scene,) = _all("s3://lake/2026")
    assert scene.identity["etag"] == s3.head_object(Bucket="lake", Key="2026/scene.tif")["ETag"]
    with open_source(scene.uri) as source, open_source(str(tmp_path / "scene.tif")) as local:
        np.testing.assert_array_equal(source.read(source.geometry.box).values, values[np.newaxis])
        assert source.geometry == local.geometry
        (told,) = source.identity["files"]
        assert (told["etag"], told["size"]) == (scene.identity["etag"], scene.size)
    write_cog(tmp_path / "scene.tif", seed=1)
    s3.upload_file(str(tmp_path / "scene.tif"), "lake", "2026/scene.tif")
    (after,) = _all("s3://lake/2026")
    assert (after.name, after.uri) == (scene.name, scene.uri)
    assert after.digest != scene.digest


def test_what_gdal_is_told_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in (
        "AWS_ENDPOINT_URL",
        "AWS_ENDPOINT_URL_S3",
        "AWS_S3_ENDPOINT",
        "AWS_HTTPS",
        "AWS_SKIP_SIGNATURE",
    ):
        monkeypatch.delenv(key, raising=False)
    assert store_options() == {}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://minio.example.org/")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    assert store_options() == {
        "AWS_S3_ENDPOINT": "minio.example.org", "AWS_HTTPS": "YES", "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_NO_SIGN_REQUEST": "YES",
    }  # fmt: skip
    monkeypatch.setenv("AWS_S3_ENDPOINT", "own:9000")
    assert "AWS_S3_ENDPOINT" not in store_options()


def test_a_bucket_that_is_not_there_or_does_not_answer(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RequestError, match=r"lake.location: s3://nowhere/x: cannot be listed .*404.* valid: a bucket"
    ):
        _all("s3://nowhere/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(RequestError, match=r"lake.location: s3://lake/x: cannot be listed"):
        _all("s3://lake/x")
    assert time.monotonic() - begun < 30


_PART = st.text(st.sampled_from("ab_.- äÄ\u0301()1Z"), min_size=1, max_size=5) | st.text(
    min_size=1, max_size=60
)
_PLACE = st.lists(_PART.filter(lambda p: "/" not in p and "\0" not in p), min_size=1, max_size=4)


@given(
    st.sets(st.tuples(_PLACE.map("/".join), st.sampled_from([".tif", ".jp2", ".TIF", ".tiff"])), max_size=30)
)
@settings(max_examples=60)
def test_names_are_unlike_and_safe(places: set[tuple[str, str]]) -> None:
    paths = {place + suffix for place, suffix in places}
    names = {place_name(path) for path in paths}
    assert len(names) == len(paths)
    for name in names:
        assert safe_name(name) == name
        assert len(name) <= 100


def test_places_that_look_alike_have_names_of_their_own() -> None:
    paths = [
        "a/b.tif", "a_b.tif", "a__b.tif", "a/_b.tif", "a_/b.tif", "a b.tif", "a_b.TIF", "a_b.jp2",
        "a_b.jp2.tif", "x" * 150 + "1.tif", "x" * 150 + "2.tif",
    ]  # fmt: skip
    names = [place_name(path) for path in paths]
    assert len(set(names)) == len(names)
    assert names[:2] == ["a__b", "a_b"]
    # A name like that of a hashed place is hashed itself.
    assert place_name(f"{names[5]}.tif") != names[5]


PEAK = """
import sys, tracemalloc
from segpipe.config.scan import Lake
from segpipe.lake.listing import list_lake
tracemalloc.start()
count = sum(1 for _ in list_lake(Lake(location=sys.argv[1])))
print(count, tracemalloc.get_traced_memory()[1])
"""
"""In a process of its own: pathlib interns names, and the table of those grows with what is imported."""


@pytest.mark.slow
def test_memory_does_not_follow_the_number_of_scenes(tmp_path: Path) -> None:
    """100,000 files in one folder need hardly more than 10,000 do."""
    peaks = []
    for count in (10_000, 100_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for n in range(count):
            (folder / f"LC08_L1TP_{n:06d}_20260101.tif").touch()
        told = subprocess.run(
            [sys.executable, "-c", PEAK, folder], check=True, capture_output=True, text=True
        )
        listed, peak = map(int, told.stdout.split())
        assert listed == count
        peaks.append(peak)
    print(f"\npeak MB of 10,000 and 100,000 files: {[round(p / 1e6, 2) for p in peaks]}")
    assert peaks[1] - peaks[0] < 2e6
