"""A file never chooses its interpreter: only its own pixels or features are read, and nothing is written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hostile
import numpy as np
import pytest
import rasterio
from given import job_of, run_all
from hostile import CANARY, Targets, make_targets, raw_band, source, vrt
from world import Ended, World

from segpipe.config.job import Regions
from segpipe.errors import RequestError, SceneError, SegpipeError
from segpipe.geometry.geometry import RasterGeometry
from segpipe.process.gdal_drivers import OWN_DRIVERS, RASTER_DRIVERS, VECTOR_DRIVERS
from segpipe.prompts.inputs.prompt_files import read_prompts
from segpipe.regions.layer import read_layer
from segpipe.sources import discover, open_source

RASTERS = ("mrf", "raw", "nested", "vsicurl", "wms", "wmts", "wcs", "gti")
VECTORS = (
    "virtual", "virtual-url", "polyglot", "wfs", "gml", "crs-link", "crs-link-escaped", "kml-network-link",
)  # fmt: skip
SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_GET(self):
        with open(sys.argv[1], "a") as log:
            print(self.path, file=log)
        path = Path(sys.argv[2]) / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(path.stat().st_size))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(path.read_bytes())
    do_HEAD = do_GET

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""It serves a folder and writes down what it is asked for."""


@dataclass(frozen=True)
class Watched:
    """A folder for hostile files, what they are after, and what the server was asked."""

    folder: Path
    to: Targets
    log: Path

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def require_untouched(self, requests: bool = False) -> None:
        """The canary has its bytes, nothing was made beside it, and nobody made a request."""
        assert self.to.canary.read_bytes() == CANARY
        assert {p.name for p in self.to.canary.parent.iterdir()} <= {
            "canary", "secret", "other.tif", "other.geojson",
        }  # fmt: skip
        assert requests or self.log.read_text() == ""


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    log, folder = tmp_path / "requests", tmp_path / "scenes"
    log.touch()
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(log), str(folder)], stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        yield Watched(folder, make_targets(tmp_path / "elsewhere", address), log)
        server.kill()


def refuse(error: type[SegpipeError], path: Path | str, action: Callable[[], object]) -> None:
    """The action raises one line that names the file."""
    with pytest.raises(error) as caught:
        action()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def read_all(uri: Path | str) -> np.ndarray:
    with open_source(str(uri)) as opened:
        return opened.read(opened.geometry.box).values


@pytest.mark.parametrize("suffix", [".tif", ".png", ".jp2", ".nc"])
@pytest.mark.parametrize("name", RASTERS)
def test_a_text_under_the_name_of_a_raster_is_refused(watched: Watched, name: str, suffix: str) -> None:
    path = watched.write(name + suffix, hostile.rasters(watched.to)[name])
    refuse(SceneError, path, lambda: read_all(path))
    refuse(SceneError, path, lambda: read_all(f"mosaic:{path}"))
    refuse(SceneError, path, lambda: read_all(f"stack:{path}|{watched.to.other}"))
    watched.require_untouched()


@pytest.mark.parametrize("name", [n for n in RASTERS if n != "nested"])
def test_a_vrt_file_holds_nothing_but_files(watched: Watched, name: str) -> None:
    path = watched.write(f"{name}.vrt", hostile.rasters(watched.to)[name])
    refuse(SceneError, path, lambda: read_all(path))
    watched.require_untouched()


@pytest.mark.parametrize("name", RASTERS)
def test_a_source_of_a_vrt_is_held_to_the_same_list(watched: Watched, name: str) -> None:
    inner = watched.write(f"{name}.tif", hostile.rasters(watched.to)[name])
    path = watched.write("outer.vrt", vrt(source(str(inner))))
    refuse(SceneError, inner, lambda: read_all(path))
    watched.require_untouched()


@pytest.mark.parametrize(
    "text",
    [
        vrt("<PixelFunctionType>x</PixelFunctionType>", kind=' subClass="VRTDerivedRasterBand"'),
        vrt(source("<VRTDataset/>".replace("<", "&lt;"))),
        vrt(source("other.tif").replace("SimpleSource", "KernelFilteredSource")),
        vrt("", "<Metadata domain='OVERVIEWS'><MDI key='OVERVIEW_FILE'>/x.tif</MDI></Metadata>"),
        vrt("<SimpleSource><OpenOptions><OOI key='a'>b</OOI></OpenOptions></SimpleSource>"),
        "<VRTDataset",
    ],
    ids=["derived", "inline", "kernel", "overviews", "options", "broken"],
)
def test_a_vrt_with_more_than_copies_is_refused(watched: Watched, text: str) -> None:
    path = watched.write("more.vrt", text)
    refuse(SceneError, path, lambda: read_all(path))


def test_a_vrt_is_read_where_it_is_named_and_not_taken_from_a_folder(watched: Watched) -> None:
    shutil.copy(watched.to.other, watched.folder / "tile.tif")
    text = vrt(source("tile.tif")).replace('relativeToVRT="0"', 'relativeToVRT="1"')
    path = watched.write("whole.vrt", text)
    with open_source(str(path)) as opened:
        assert (opened.read(opened.geometry.box).values == 77).all()
        uris = [file["uri"] for file in opened.identity["files"]]
    assert uris == [str(watched.folder / "tile.tif"), str(path)]
    assert [ref.name for ref in discover([str(watched.folder)])] == ["tile"]
    assert [ref.name for ref in discover([str(path)])] == ["whole"]


def test_a_vrt_shows_files_below_its_folder(watched: Watched) -> None:
    """One that came with a delivery must not show the rasters of somebody else."""
    path = watched.write("a.vrt", hostile.rasters(watched.to)["nested"])
    refuse(SceneError, path, lambda: read_all(path))
    below = watched.folder / "tiles"
    below.mkdir()
    shutil.copy(watched.to.other, below / "t.tif")
    path = watched.write("b.vrt", vrt(source("tiles/../tiles/t.tif").replace('"0"', '"1"')))
    assert set(np.unique(read_all(path))) == {77}
    path = watched.write("c.vrt", vrt(source(f"../{watched.to.other.parent.name}/other.tif")))
    refuse(SceneError, path, lambda: read_all(path))


@pytest.mark.parametrize("suffix", [".msk", ".ovr"])
def test_a_sidecar_is_no_program_either(watched: Watched, suffix: str) -> None:
    for number, text in enumerate((raw_band(watched.to.secret), hostile.rasters(watched.to)["vsicurl"])):
        path = watched.folder / f"scene{number}.tif"
        shutil.copy(watched.to.other, path)
        sidecar = watched.write(path.name + suffix, text)
        refuse(SceneError, sidecar, lambda path=path: read_all(path))
    watched.require_untouched()


def test_the_metadata_of_a_raster_name_no_other_file(watched: Watched) -> None:
    path = watched.folder / "scene.tif"
    shutil.copy(watched.to.other, path)
    with rasterio.open(path, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=f"/vsicurl/{watched.to.address}/o.tif")
    watched.log.write_text("")
    refuse(SceneError, path, lambda: read_all(path))
    watched.require_untouched()


@pytest.mark.parametrize("name", RASTERS)
def test_a_text_behind_a_url_is_refused(watched: Watched, name: str) -> None:
    watched.write(f"{name}.tif", hostile.rasters(watched.to)[name])
    uri = f"{watched.to.address}/{name}.tif"
    refuse(SceneError, uri, lambda: read_all(uri))
    watched.require_untouched(requests=True)
    asked = set(watched.log.read_text().split())
    assert f"/{name}.tif" in asked
    assert not asked & {"/x.tif", "/wmts", "/i.gpkg"} and not any("wms?" in a or "wcs?" in a for a in asked)


@pytest.mark.parametrize("suffix", [".msk", ".ovr", ".aux.xml"])
@pytest.mark.parametrize("name", ["raw", "nested", "vsicurl", "overviews"])
def test_a_sidecar_behind_a_url_is_no_program_either(watched: Watched, suffix: str, name: str) -> None:
    """GDAL asks for sidecars by name; a reader has only drivers of data for them, and no local file."""
    other = f"/vsicurl/{watched.to.address}/x.tif"
    metadata = f'<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">{other}</MDI></Metadata>'
    texts = hostile.rasters(watched.to) | {"overviews": f"<PAMDataset>{metadata}</PAMDataset>"}
    shutil.copy(watched.to.other, watched.folder / "scene.tif")
    watched.write(f"scene.tif{suffix}", texts[name])
    try:
        found = read_all(f"{watched.to.address}/scene.tif")
    except SceneError:
        pass  # the overviews in another file
    else:
        assert set(np.unique(found)) == {77}  # its own pixels
    watched.require_untouched(requests=True)
    assert "/x.tif" not in watched.log.read_text().split()


ALONE = """
import os, sys
from pathlib import Path
import rasterio
from segpipe.process.sandbox import limit_files, restrict_access

for name in [n for n in os.environ if n.startswith("GDAL")]:
    del os.environ[name]
system = map(Path, ("/usr", "/lib", "/lib64", sys.prefix))
limit_files()
if sys.argv[2] == "restricted" and not restrict_access([Path(sys.argv[1]).parent, *system], network=False):
    sys.exit(3)
with rasterio.Env() as env:
    assert "MRF" in env.drivers() and "VRT" in env.drivers()
try:
    print(rasterio.open(sys.argv[1]).read().max())
except rasterio.errors.RasterioError:
    print("refused")
"""


@pytest.mark.parametrize("name", ["mrf", "raw", "nested", "vsicurl", "wms", "wmts"])
def test_a_reader_alone_would_be_wall_enough(watched: Watched, name: str) -> None:
    """With every driver of GDAL in it, it still writes nothing, reads no other folder and asks nobody."""
    path = watched.write(f"{name}.tif", hostile.rasters(watched.to)[name])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path), "restricted"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    if done.returncode == 3:
        pytest.skip("this kernel has no Landlock")
    assert done.stdout.strip() in ("refused", "0"), done  # 0: a band without what it would show
    watched.require_untouched()


def test_without_the_wall_a_file_reads_another(watched: Watched) -> None:
    """So the test above can fail."""
    path = watched.write("nested.tif", hostile.rasters(watched.to)["nested"])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(path), "open"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "77"


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".shp", ".kml", ".csv"])
@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_file_is_read_alone(watched: Watched, name: str, suffix: str) -> None:
    path = watched.write(name + suffix, hostile.vectors(watched.to)[name])
    grid = RasterGeometry((64, 64), (30, 0, 5e5, 0, -30, 4e6), None)
    refuse(RequestError, path, lambda: read_layer(Regions(path=str(path))))
    if suffix != ".csv":  # a table of prompts is not read by GDAL
        refuse(RequestError, path, lambda: read_prompts(path, grid))
    watched.require_untouched()


def test_a_vector_file_in_a_zip_is_read_alone(watched: Watched) -> None:
    path = watched.folder / "regions.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("regions.geojson", hostile.vectors(watched.to)["crs-link"])
    refuse(RequestError, path, lambda: read_layer(Regions(path=str(path))))
    watched.require_untouched()


def plan(job: Path, **environment: str) -> Ended:
    """``segpipe plan`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "segpipe.cli", "plan", str(job)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def test_a_job_refuses_hostile_scenes_one_line_each(world: World, watched: Watched, tmp_path: Path) -> None:
    texts = hostile.rasters(watched.to)
    paths = [watched.write(f"{n}{s}", texts[n]) for n in RASTERS for s in (".tif", ".png")]
    good = str(world / "scene1.tif")
    ended = plan(world.job(tmp_path / "out", scenes=[good, *map(str, paths)]))
    assert ended.code == 1, ended
    assert len(ended.errors) == len(paths)
    for path, line in zip(paths, ended.errors, strict=True):
        assert line.startswith("failed: ") and f"{path}: cannot be opened" in line
    assert "  scene1: " in ended.out
    watched.require_untouched()


@pytest.mark.parametrize("name", RASTERS)
@pytest.mark.parametrize("field", ["labels", "reference", "regions"])
def test_hostile_labels_reference_and_regions_are_refused(
    world: World, watched: Watched, field: str, name: str, tmp_path: Path
) -> None:
    path = watched.write(f"{name}.tif", hostile.rasters(watched.to)[name])
    labels = path if field == "labels" else world / "truth/scene1.tif"
    fields = {} if field == "labels" else {field: {"path": str(path)}}
    job = job_of(tmp_path / "out", world / "scene1.tif", labels, **fields)
    refuse(SegpipeError, path, lambda: run_all(job))
    watched.require_untouched()


REGISTERED = """
import sys
for name in sys.argv[1].split(","):
    __import__(name)
import pyogrio, rasterio
with rasterio.Env() as env:
    print(*env.drivers(), sep=",")
print(*pyogrio.list_drivers(), sep=",")
"""


@pytest.mark.parametrize(
    "imports",
    ["segpipe.sources,segpipe.regions", "rasterio,pyogrio,segpipe.sources,segpipe.regions.layer"],
    ids=["segpipe first", "GDAL first"],
)
def test_no_other_driver_stays_registered(imports: str) -> None:
    allowed = {*RASTER_DRIVERS, *VECTOR_DRIVERS, *OWN_DRIVERS}
    loaded = f"{imports},segpipe.sources.vectors"
    environment = {k: v for k, v in os.environ.items() if k != "GDAL_SKIP"}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", REGISTERED, loaded],
        env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    rasters, vectors = (set(line.split(",")) for line in done.stdout.splitlines())
    assert {"GTiff", "COG", "VRT", "PNG"} <= rasters <= allowed
    assert {"GPKG", "GeoJSON", "ESRI Shapefile"} <= vectors <= {*VECTOR_DRIVERS, *OWN_DRIVERS}


@pytest.mark.parametrize("given", ["PNG JPEG", "PNG,ESRI Shapefile"])
def test_what_the_user_skips_stays_skipped(given: str) -> None:
    code = "import os, segpipe; print(os.environ['GDAL_SKIP'])"
    first = subprocess.run(
        [sys.executable, "-c", f"{code}; os.execv({sys.executable!r}, ['python', '-c', {code!r}])"],
        env={**os.environ, "GDAL_SKIP": given}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    wanted = given.split(",") if "," in given else given.split()
    names = first.stdout.splitlines()[-1].split(",")
    assert names[:2] == wanted and "MRF" in names and len(names) == len(set(names))
