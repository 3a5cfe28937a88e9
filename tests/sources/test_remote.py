"""A raster behind a URL is read in place by ranges, from a real server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from segpipe.boxes import Box
from segpipe.errors import SceneError
from segpipe.sources import open_source

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


def test_a_missing_remote_file_fails_in_one_line(served: tuple[str, Path]) -> None:
    address, _ = served
    with pytest.raises(SceneError, match=r"/gone\.tif: cannot be opened: .*404") as caught:
        open_source(f"{address}/gone.tif")
    assert "\n" not in str(caught.value)


def test_remote_volumes_are_refused() -> None:
    with pytest.raises(SceneError, match="volumes are read from local files only; copy it first"):
        open_source("s3://lake/brain.nii.gz")
