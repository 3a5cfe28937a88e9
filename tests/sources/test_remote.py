"""A raster behind a URL is read in place by ranges, from a real server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.sources import open_source, remote
from segpipe.sources.remote import fetch, remote_identity

Write = Callable[..., Path]
Noise = Callable[..., np.ndarray]

SERVER = """
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self): self.answer(False)
    def do_GET(self): self.answer(True)
    def log_message(self, *_): pass
    def answer(self, body):
        path = Path(self.path.partition("?")[0].lstrip("/"))
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\\d+)-(\\d*)", self.headers.get("Range", ""))
        first, last = 0, len(data) - 1
        if wanted:
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.send_header("ETag", '"abc"')
        self.end_headers()
        if body:
            self.wfile.write(data[first : last + 1])

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""A server that knows ranges, as every object store does; http.server alone does not."""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of a server and the folder it serves."""
    # In a process of its own: rasterio holds the interpreter's lock while GDAL opens a file.
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}", tmp_path
        server.kill()


def test_a_window_of_a_remote_raster(served: tuple[str, Path], write_tif: Write, noise: Noise) -> None:
    address, folder = served
    array = noise((2, 300, 300))
    path = write_tif(folder / "a.tif", array, tiled=True, blockxsize=128, blockysize=128, nodata=0)
    box = Box((100, 50), (290, 260))
    with open_source(f"{address}/a.tif") as source:
        pixels = source.read(box)
        (file,) = source.identity["files"]
    np.testing.assert_array_equal(pixels.values, array[(slice(None), *box.slices)])
    assert file["size"] == path.stat().st_size
    assert file["etag"] and file["mtime"].startswith("2024-01-01")


def test_a_signed_address_is_not_part_of_what_it_identifies(
    served: tuple[str, Path], write_tif: Write, noise: Noise
) -> None:
    address, folder = served
    write_tif(folder / "a.tif", noise((1, 64, 64)))
    one, two = (open_source(f"{address}/a.tif?signature={n}") for n in (1, 2))
    assert one.identity == two.identity
    assert "signature" not in str(one.identity)
    assert any("identified by its address alone" in note for note in one.notes)
    for name in ("a.tif", "gone.tif"):  # with a password in front, there or not
        entry, note = remote_identity(f"{address.replace('//', '//me:word@')}/{name}")
        assert entry["uri"] == f"{address}/{name}"
        assert (note is None) == (name == "a.tif")
        assert "word" not in f"{entry} {note}"


def test_a_missing_remote_file_fails_in_one_line(served: tuple[str, Path]) -> None:
    address, _ = served
    with pytest.raises(SceneError, match=r"/gone\.tif: cannot be opened: .*404") as caught:
        open_source(f"{address}/gone.tif")
    assert "\n" not in str(caught.value)


def test_a_remote_volume_is_fetched_once_and_its_copy_goes(
    served: tuple[str, Path], noise: Noise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and geometry of the local file; opened again it is not asked for again, only looked at."""
    address, folder = served
    array, affine = noise((7, 6, 5)), np.diag([-2.0, 2.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(array.T, affine), folder / "brain.nii.gz")
    nib.save(nib.Nifti1Image(noise((4, 3, 2)).T, affine), folder / "other.nii")
    box = Box((1, 0, 2), (5, 6, 5))
    with open_source(f"{address}/brain.nii.gz") as source, open_source(str(folder / "brain.nii.gz")) as local:
        np.testing.assert_array_equal(source.read(box).values[0], array[box.slices])
        assert source.geometry == local.geometry
        assert source.uri == f"{address}/brain.nii.gz"
        (file,) = source.identity["files"]
        assert (file["uri"], file["size"]) == (source.uri, (folder / "brain.nii.gz").stat().st_size)
    copy = fetch(f"{address}/brain.nii.gz")
    assert fetch(f"{address}/brain.nii.gz") is copy
    monkeypatch.setattr(remote, "COPIES_BYTES", 1)
    with open_source(f"{address}/other.nii"):  # the one used last stays, others only while they are read
        assert copy.path.exists()
        assert fetch(f"{address}/brain.nii.gz") is not copy
    path = copy.path
    del copy, source
    assert not path.exists()


def test_a_remote_volume_that_is_damaged_or_missing_is_named_by_its_address(
    served: tuple[str, Path], noise: Noise
) -> None:
    address, folder = served
    nib.save(nib.Nifti1Image(noise((7, 6, 5)).T, np.eye(4)), folder / "short.nii")
    (folder / "short.nii").write_bytes((folder / "short.nii").read_bytes()[:400])
    with pytest.raises(SceneError, match=rf"^{address}/short\.nii: truncated: 400 bytes"):
        open_source(f"{address}/short.nii")
    with pytest.raises(SceneError, match=rf"^{address}/gone\.nii\.gz: .*404"):
        open_source(f"{address}/gone.nii.gz")
    with pytest.raises(SceneError, match="truncated: 400 bytes"):
        open_source(f"{address}/short.nii?signature=1")
    with pytest.raises(SceneError, match="cannot be read from there; valid behind a URL: rasters and"):
        open_source(f"{address}/1.dcm")
