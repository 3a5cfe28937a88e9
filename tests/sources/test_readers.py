"""Readers: what a scene does to the process that reads it costs that process and the scene, nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
import rasterio
from given import job_of

import segpipe
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.sources import open_in_process, open_source
from segpipe.sources.readers import Access, readers, roots_of


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A raster of 300 x 200 pixels in three bands with a nodata value."""
    rng = np.random.default_rng(1)
    path = tmp_path / "lake" / "scene.tif"
    path.parent.mkdir()
    with rasterio.open(
        path, "w", driver="GTiff", width=200, height=300, count=3, dtype="int16", nodata=-1, tiled=True,
        blockxsize=64, blockysize=64, crs="EPSG:32633", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as file:  # fmt: skip
        file.write(rng.integers(-1, 300, (3, 300, 200), dtype=np.int16))
    return path


def children() -> list[psutil.Process]:
    """The readers of this process."""
    return [c for c in psutil.Process().children() if "reader_process" in " ".join(c.cmdline())]


@pytest.fixture(autouse=True)
def _no_reader_is_left() -> None:
    readers.end()


def test_a_reader_gives_what_the_process_itself_would(scene: Path) -> None:
    with open_source(str(scene)) as apart, open_in_process(str(scene)) as here:
        for name in ("uri", "geometry", "dtype", "count", "bands", "scaling", "notes", "identity", "tags"):
            assert getattr(apart, name) == getattr(here, name), name
        for box in (here.geometry.box, Box((17, 5), (290, 6)), Box((3, 3), (3, 9))):
            mine, theirs = apart.read(box, (2, 0)), here.read(box, (2, 0))
            np.testing.assert_array_equal(mine.values, theirs.values)
            np.testing.assert_array_equal(mine.valid, theirs.valid)
            mine.values[...] = 1  # the caller's own


def test_many_threads_share_few_readers(scene: Path) -> None:
    with open_source(str(scene)) as source, open_in_process(str(scene)) as here:
        whole = here.read(here.geometry.box).values
        wrong: list[Box] = []

        def read(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(20):
                start = rng.integers(0, (200, 100))
                box = Box.at(tuple(start.tolist()), (int(rng.integers(1, 100)), int(rng.integers(1, 100))))
                if not np.array_equal(source.read(box).values, whole[(slice(None), *box.slices)]):
                    wrong.append(box)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert len(children()) <= max(2, os.cpu_count() or 1)


def test_a_reader_that_dies_costs_one_read(scene: Path) -> None:
    """As by a crash in a library or a lack of memory: stopped first, so that it dies in the read."""
    with open_source(str(scene)) as source:
        (child,) = children()
        child.suspend()
        killer = threading.Timer(0.3, lambda: child.send_signal(signal.SIGKILL))
        killer.start()
        with pytest.raises(SceneError, match=r"scene\.tif: cannot be read: the process .* ended by SIGKILL"):
            source.read(source.geometry.box)
        assert source.read(source.geometry.box).values.shape == (3, 300, 200)


def test_a_forked_process_has_readers_of_its_own(scene: Path) -> None:
    """It reads, layers too, and its parent's readers answer its parent."""
    code = (
        "import os, sys; import numpy as np; import psutil; from segpipe.sources import open_source\n"
        "from segpipe.sources.vectors import list_layers\n"
        "source = open_source(sys.argv[1]); whole = source.read(source.geometry.box).values\n"
        "pid = os.fork()\n"
        "assert list_layers(sys.argv[2]) == ['a']\n"
        "assert pid or len(psutil.Process().children()) == 1\n"
        "assert np.array_equal(source.read(source.geometry.box).values, whole)\n"
        "if pid == 0: os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0; print('both')\n"
    )
    layer = scene.parent / "a.geojson"
    feature = {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [1, 2]}}
    layer.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(scene), str(layer)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout == "both\n", done


def test_a_reader_that_says_nothing_is_ended(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGPIPE_READER_SECONDS", "5")
    with open_source(str(scene)) as source:
        (child,) = children()
        child.suspend()
        with pytest.raises(SceneError, match="gave no answer within 5 s"):
            source.read(source.geometry.box)
        assert not child.is_running()
        assert source.read(source.geometry.box).values.shape == (3, 300, 200)


def write_bomb(path: Path, edge: int) -> None:
    """A raster of zeros that is one tile, whose size in memory is not that of the file."""
    with rasterio.open(
        path, "w", driver="GTiff", width=edge, height=edge, count=1, dtype="uint8", tiled=True,
        blockxsize=edge, blockysize=edge, compress="deflate", zlevel=1, crs="EPSG:32633",
        transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
    ) as file:  # fmt: skip
        file.write(np.zeros((1, edge, edge), np.uint8))


def test_a_bomb_ends_at_the_limit_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGPIPE_READER_MEMORY", str(2**28))
    path = tmp_path / "bomb.tif"
    write_bomb(path, 20_000)
    with open_source(str(path)) as source:
        with pytest.raises(SceneError, match=r"bomb\.tif: cannot be read"):
            source.read(Box((0, 0), (8, 8)))
        assert max(child.memory_info().rss for child in children()) < 2**28
    monkeypatch.setenv("SEGPIPE_READER_MEMORY", str(2**31))
    with open_source(str(path)) as source:
        assert source.read(Box((0, 0), (8, 8))).values.max() == 0


def test_a_bomb_costs_one_scene_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are done; with memory enough, the next run does the rest."""
    monkeypatch.setenv("SEGPIPE_READER_MEMORY", str(2**28))
    lake = tmp_path / "lake"
    lake.mkdir()
    write_bomb(lake / "bomb.tif", 20_000)
    for name in ("a", "z"):
        write_bomb(lake / f"{name}.tif", 64)
    job = job_of(tmp_path / "out", lake, lake)
    ended = segpipe.run(job)
    assert list(ended.failed) == ["bomb"]
    assert "bomb.tif: cannot be read" in ended.failed["bomb"]
    assert [scene.name for scene in ended.record.done] == ["a", "z"]


def test_a_file_that_changed_is_not_read_as_the_one_that_was_opened(scene: Path) -> None:
    with open_source(str(scene)) as source:
        readers.end()
        with rasterio.open(scene, "r+") as file:
            file.write(np.zeros((3, 300, 200), np.int16))
        with pytest.raises(SceneError, match="changed since it was opened"):
            source.read(source.geometry.box)


def test_a_reader_of_another_environment_is_replaced(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_source(str(scene)):
        (first,) = children()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with open_source(str(scene)):
        assert first.pid not in [c.pid for c in children() if c.status() != psutil.STATUS_ZOMBIE][-1:]


def test_a_lake_needs_few_readers(scene: Path) -> None:
    for n in range(6):
        folder = scene.parent / f"sub-{n}"
        folder.mkdir()
        (folder / "scene.tif").write_bytes(scene.read_bytes())
        with open_source(str(folder / "scene.tif")) as source:
            source.read(source.geometry.box)
    assert len(children()) <= 2


def test_links_among_the_files_are_followed(scene: Path, tmp_path: Path) -> None:
    """As git-annex and DVC keep files: a link with the name, the content elsewhere."""
    annex = tmp_path / "annex" / "xx"
    annex.mkdir(parents=True)
    scene.rename(annex / "content")
    scene.symlink_to(annex / "content")
    assert roots_of([scene]) == {str(scene.parent), str(annex)}
    with open_source(str(scene)) as source:
        assert source.read(source.geometry.box).values.shape == (3, 300, 200)


def test_an_access_covers_what_lies_below(tmp_path: Path) -> None:
    lake = Access(frozenset({"/data/lake"}))
    assert lake.covers(Access(frozenset({"/data/lake/sub-01/ct"})))
    assert not lake.covers(Access(frozenset({"/data/lake2"})))
    assert not lake.covers(Access(frozenset({"/data/lake"}), network=True))
    assert not lake.covers(Access(frozenset({"/data/lake"}), links=True))


RESTRICTED = """
import os, socket, subprocess, sys
from pathlib import Path
from segpipe.process.sandbox import limit_files, restrict_access

inside, outside, port = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
if len(sys.argv) > 4:
    limit_files()
elif not restrict_access([inside, Path(sys.prefix), Path(sys.base_prefix)], network=False):
    print("this kernel has no Landlock")
    sys.exit(0)

def tried(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "done"

print(tried((inside / "a").read_bytes), tried((outside / "b").read_bytes),
      tried(lambda: (inside / "a").write_bytes(b"x")), tried(lambda: (inside / "new").write_bytes(b"x")),
      tried((inside / "a").unlink), tried(lambda: subprocess.run(["/bin/true"])),
      tried(lambda: socket.create_connection(("127.0.0.1", port))))
"""


def restricted(tmp_path: Path, *more: str) -> str:
    """What a process can do that has given up what it does not need."""
    for name, file in (("in", "a"), ("out", "b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_bytes(b"content")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", RESTRICTED, str(tmp_path / "in"), str(tmp_path / "out")]
        port = str(server.getsockname()[1])
        ended = subprocess.run([*command, port, *more], capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def test_a_reader_reads_below_its_folders_and_does_nothing_else(tmp_path: Path) -> None:
    found = restricted(tmp_path)
    if "no Landlock" in found:
        pytest.skip(found)
    assert found == "done" + " PermissionError" * 6
    assert (tmp_path / "in" / "a").read_bytes() == b"content"


def test_no_reader_writes_into_a_file_on_any_kernel(tmp_path: Path) -> None:
    found = restricted(tmp_path, "limits").split()
    assert found[2:4] == ["OSError", "OSError"]


def hdf5(path: Path, other: Path, kind: str) -> None:
    """A file whose only dataset shows the bytes of another file."""
    with h5py.File(path, "w") as file:
        if kind == "external storage":
            file.create_dataset("x", (64, 64), "u1", external=[(str(other), 0, 4096)])
        elif kind == "external link":
            file["x"] = h5py.ExternalLink(str(other), "x")
        elif kind == "link in a group":
            file.create_group("a/b")["x"] = h5py.ExternalLink(str(other), "x")
            file["a/c"] = file["a"]  # a group in itself
        else:
            layout = h5py.VirtualLayout((64, 64), "u1")
            layout[...] = h5py.VirtualSource(str(other), "x", (64, 64))
            file.create_virtual_dataset("x", layout)


@pytest.mark.parametrize("suffix", [".h5", ".nc", ".tif"])
@pytest.mark.parametrize("kind", ["external storage", "external link", "link in a group", "virtual dataset"])
@pytest.mark.parametrize("opened", [open_source, open_in_process])
def test_hdf5_shows_no_other_file(tmp_path: Path, kind: str, suffix: str, opened: type) -> None:
    other = tmp_path / "elsewhere" / "other"
    other.parent.mkdir()
    with h5py.File(other, "w") as file:
        file["x"] = np.full((64, 64), 77, np.uint8)
    path = tmp_path / f"scene{suffix}"
    hdf5(path, other, kind)
    with pytest.raises(SceneError, match=r"scene.*'x' lies in another file"):
        opened(str(path))


def test_hdf5_with_its_own_pixels_is_read(tmp_path: Path) -> None:
    path = tmp_path / "scene.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    with open_source(str(path)) as source:
        np.testing.assert_array_equal(source.read(source.geometry.box).values[0].ravel(), np.arange(4096))


@pytest.mark.parametrize("suffix", [".tif", ".nii.gz", ".vrt", ".geojson"])
def test_what_is_no_regular_file_does_not_make_anybody_wait(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pipe{suffix}"
    os.mkfifo(path)
    with pytest.raises(SceneError, match="is no regular file"):
        if suffix == ".geojson":
            from segpipe.sources.vectors import list_layers

            list_layers(str(path))
        else:
            open_source(str(path))


def test_two_thousand_bands_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bands.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=2, height=2, count=2000, dtype="uint8", sparse_ok=True
    ):
        pass
    with pytest.raises(SceneError, match="found 2000 bands; valid: up to 1024"):
        open_source(str(path))
