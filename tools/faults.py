"""Do to segpipe what was once done to it, by the command line, and print what came of it: a line a fault.

    python -m tools.faults [--before COMMIT] [--only WORD]

With ``--before`` the same is done to the library as it was at a commit, and the lines stand side by side.
A fault is mended where the answer is right, or refused by a line that names the file or field.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from tools.fault_lab import EDGE, Lab, server

ROOT = Path(__file__).parent.parent
Outcome = tuple[bool, str]
FAULTS: dict[str, Callable[[Lab], Outcome]] = {}


def fault(name: str) -> Callable[[Callable[[Lab], Outcome]], Callable[[Lab], Outcome]]:
    """Enter a function as what is done under this name."""

    def enter(function: Callable[[Lab], Outcome]) -> Callable[[Lab], Outcome]:
        FAULTS[name] = function
        return function

    return enter


def hostile(lab: Lab, text: str | bytes, field_name: str = "labels", name: str = "evil.tif") -> Outcome:
    """A file that is more than data, as labels or as a scene."""
    lab.write("canary", b"somebody's file\n")
    lab.write(name, text)
    lab.asked.clear()
    ended = lab.run(**{field_name: name if field_name == "labels" else [name, "scene.tif"]})
    harm = []
    if (lab.folder / "canary").read_bytes() != b"somebody's file\n":
        harm.append("canary changed")
    if lab.asked:
        harm.append(f"{len(lab.asked)} requests")
    if ended.code == 0:
        harm.append(f"taken as labels: {lab.hectares()}")
    return not harm and ended.code in (1, 2), ", ".join([*harm, ended.what])


def _vrt(band: str, kind: str = "") -> str:
    return (
        f'<VRTDataset rasterXSize="{EDGE}" rasterYSize="{EDGE}"><SRS>EPSG:32616</SRS><GeoTransform>'
        f'500000, 10, 0, 4000000, 0, -10</GeoTransform><VRTRasterBand dataType="Byte" band="1"{kind}>{band}'
        "</VRTRasterBand></VRTDataset>"
    )


@fault("a .tif that is MRF and appends to a file")
def _mrf(lab: Lab) -> Outcome:
    size = f'x="{EDGE}" y="{EDGE}" c="1"'
    return hostile(
        lab,
        f"<MRF_META><CachedSource><Source>{lab.folder}/labels.tif</Source></CachedSource><Raster>"
        f"<Size {size}/><PageSize {size}/><Compression>NONE</Compression><DataType>Byte</DataType>"
        f"<DataFile>{lab.folder}/canary</DataFile><IndexFile>{lab.folder}/index</IndexFile></Raster></MRF_META>",
    )


@fault("a .tif that is a VRT and shows another file's bytes")
def _raw(lab: Lab) -> Outcome:
    lab.write("secret", bytes(range(2)) * (EDGE * EDGE // 2))
    band = (
        f'<SourceFilename relativeToVRT="0">{lab.folder}/secret</SourceFilename><ImageOffset>0</ImageOffset>'
        f"<PixelOffset>1</PixelOffset><LineOffset>{EDGE}</LineOffset>"
    )
    return hostile(lab, _vrt(band, ' subClass="VRTRawRasterBand"'))


@fault("a .tif that is a VRT of a URL")
def _curl(lab: Lab) -> Outcome:
    source = f"<SourceFilename>/vsicurl/{lab.address}/x.tif</SourceFilename><SourceBand>1</SourceBand>"
    return hostile(lab, _vrt(f"<SimpleSource>{source}</SimpleSource>"))


@fault("a .tif that is a web service (WMS)")
def _wms(lab: Lab) -> Outcome:
    return hostile(
        lab,
        f'<GDAL_WMS><Service name="TMS"><ServerUrl>{lab.address}/${{z}}</ServerUrl></Service><DataWindow>'
        "<UpperLeftX>0</UpperLeftX><UpperLeftY>1</UpperLeftY><LowerRightX>1</LowerRightX><LowerRightY>0"
        "</LowerRightY><TileLevel>0</TileLevel><TileCountX>1</TileCountX><TileCountY>1</TileCountY></DataWindow>"
        "<Projection>EPSG:32616</Projection><BlockSizeX>64</BlockSizeX><BlockSizeY>64</BlockSizeY>"
        "<BandsCount>1</BandsCount></GDAL_WMS>",
    )


@fault("an HDF5 file that shows another file's bytes")
def _hdf5(lab: Lab) -> Outcome:
    import h5py

    lab.write("secret", bytes(range(2)) * (EDGE * EDGE // 2))
    with h5py.File(lab.folder / "evil.h5", "w") as file:
        file.create_dataset("x", (EDGE, EDGE), "u1", external=[(str(lab.folder / "secret"), 0, EDGE * EDGE)])
    return hostile(lab, (lab.folder / "evil.h5").read_bytes(), name="evil.nc")


@fault("2,000 bands in 14 KB")
def _bands(lab: Lab) -> Outcome:
    lab.raster("bands.tif", np.zeros((2000, 2, 2), np.uint8))
    ended = lab.plan(scenes=["bands.tif", "scene.tif"])
    return ended.names("bands.tif") and ended.seconds < 30, f"plan: {ended.what}, {ended.seconds:.0f} s"


@fault("200,000 x 200,000 pixels in a sparse file")
def _sparse(lab: Lab) -> Outcome:
    with rasterio.open(
        lab.folder / "big.tif", "w", driver="GTiff", width=200_000, height=200_000, count=5, dtype="uint8",
        sparse_ok=True, tiled=True, bigtiff="YES", crs="EPSG:32616", photometric="MINISBLACK",
        transform=rasterio.Affine(10, 0, 5e5, 0, -10, 4e6),
    ):  # fmt: skip
        pass
    bands = ["blue", "green", "red", "nir", "swir16"]
    card = ROOT / "configs/models/landcover-unet.yaml"
    ended = lab.plan(scenes=["big.tif"], labels="", model=str(card), bands=bands)
    return ended.code == 0 and ended.seconds < 30, f"plan: {ended.what}, {ended.seconds:.0f} s"


@fault("a tile of 400 MB in a kilobyte, with 256 MB for readers")
def _bomb(lab: Lab) -> Outcome:
    bomb = lab.raster("bomb.tif", np.zeros((20_000, 20_000), np.uint8), tiled=True, blockxsize=20_000,
                      blockysize=20_000, compress="deflate")  # fmt: skip
    job = lab.job(scenes=["bomb.tif", "scene.tif"], labels="*.tif")
    ended = lab.segpipe("run", str(job), SEGPIPE_READER_MEMORY=str(2**28))
    bomb.unlink()
    return ended.code == 1 and "1 of 2" in ended.out, f"{ended.what}; {ended.out.splitlines()[:1]}"


@fault("an alias bomb of 9 lines")
def _aliases(lab: Lab) -> Outcome:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    path = lab.write("bomb.yaml", "\n".join(lines))
    ended = lab.segpipe("plan", str(path))
    return ended.names("bomb.yaml") and ended.seconds < 30, f"plan: {ended.what}, {ended.seconds:.0f} s"


@fault("a pipe (FIFO) as a scene")
def _fifo(lab: Lab) -> Outcome:
    os.mkfifo(lab.folder / "pipe.tif")
    ended = lab.plan(scenes=["pipe.tif"])
    return ended.names("pipe.tif"), ended.what


@fault("regions with an empty inner ring")
def _ring(lab: Lab) -> Outcome:
    ring = [[5e5, 4e6], [5e5 + 640, 4e6], [5e5 + 640, 4e6 - 640], [5e5, 4e6 - 640], [5e5, 4e6]]
    return _regions(lab, [ring, []], None)


@fault("a region with a vertex that is no number")
def _nan(lab: Lab) -> Outcome:
    ring = [[5e5, 4e6], [float("nan"), 4e6], [5e5 + 640, 4e6 - 640], [5e5, 4e6]]
    return _regions(lab, [ring], "evil.geojson")


def _regions(lab: Lab, rings: list[Any], named: str | None) -> Outcome:
    shape = {"type": "Polygon", "coordinates": rings}
    rows = [{"type": "Feature", "properties": {"name": "a"}, "geometry": shape}]
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32616"}}
    lab.write("evil.geojson", json.dumps({"type": "FeatureCollection", "crs": crs, "features": rows}))
    ended = lab.run(regions={"path": "evil.geojson", "name": "name"})
    good = ended.names(named) if named else ended.code == 0 and lab.hectares().endswith("12.28 ha")
    return good, f"{ended.what}, {lab.hectares()}"


@fault("flipped bits in the store, each before a rerun with regions")
def _flips(lab: Lab) -> Outcome:
    return _store(lab, _flip)


@fault("shards deleted, emptied, cut")
def _shards(lab: Lab) -> Outcome:
    def damage(path: Path, number: int) -> None:
        data = path.read_bytes()
        path.unlink()
        if number % 3:
            path.write_bytes(data[:-9] if number % 3 == 1 else b"")

    return _store(lab, damage)


def _flip(path: Path, number: int) -> None:
    draw = random.Random(number)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _store(lab: Lab, damage: Callable[[Path, int], None]) -> Outcome:
    """Damage the predictions of a run, then measure them in other regions."""
    asked: dict[str, Any] = {
        "labels": "",
        "model": str(ROOT / "configs/models/cloud-otsu.yaml"),
        "bands": ["blue"],
    }
    rng = np.random.default_rng(5)
    lab.raster("scene.tif", rng.integers(1, 255, (256, 256)).astype(np.uint8))
    asked |= {"tiling": {"block": 128}, "outputs": {"dir": "out", "keep": ["labels"]}}
    first = lab.run(**asked)
    if first.code:
        return False, f"could not be tried: {first.err[:90]}"
    whole = shutil.copytree(lab.folder / "out", lab.folder / "whole")
    wrong = told = 0
    expected = ""
    for number in range(5):
        shutil.rmtree(lab.folder / "out")
        shutil.copytree(whole, lab.folder / "out")
        shards = sorted(lab.folder.glob("out/.store/predict-*/**/labels/c/*/*"))
        if number:
            damage(shards[number % len(shards)], number)
        ended = lab.run(**asked, regions={"path": "grid:640"})
        tables = sorted((lab.folder / "out/fault").glob("*/regions.csv"), key=lambda p: p.stat().st_mtime)
        found = tables[-1].read_text()
        expected = expected or found
        wrong += ended.code == 0 and found != expected
        told += ended.code != 0
    return not wrong, f"{wrong} of 4 are wrong numbers with exit code 0, {told} refused"


@fault("labels.tif of an unfinished run cut in half")
def _cut(lab: Lab) -> Outcome:
    first = lab.run()
    [run] = (lab.folder / "out/fault").glob("2*")
    (run / "run.json").unlink()
    [labels] = run.glob("scenes/*/labels.tif")
    whole = labels.read_bytes()
    labels.write_bytes(whole[: len(whole) // 2])
    again = lab.run()
    files = list((lab.folder / "out/fault").glob("2*/scenes/*/labels.tif"))
    intact = all(p.read_bytes() == whole for p in files)
    return intact and again.code == 0, f"{first.what}, {again.what}, labels {'whole' if intact else 'cut'}"


@fault("a tile under a label VRT goes from 30 % to 60 %")
def _tile(lab: Lab) -> Outcome:
    source = '<SourceFilename relativeToVRT="1">labels.tif</SourceFilename><SourceBand>1</SourceBand>'
    lab.write("labels.vrt", _vrt(f"<SimpleSource>{source}</SimpleSource>"))
    lab.run(labels="labels.vrt")
    before = lab.hectares()
    lab.raster("labels.tif", lab.share(60))
    ended = lab.run(labels="labels.vrt")
    return lab.hectares() == "24.57 ha", f"{before}, then {lab.hectares()} ({ended.what})"


@fault("a .dbf with new names")
def _dbf(lab: Lab) -> Outcome:
    import geopandas
    import shapely

    for name in ("old", "new"):
        frame = geopandas.GeoDataFrame(
            {"name": [name]}, geometry=[shapely.box(5e5, 4e6 - 640, 5e5 + 640, 4e6)], crs=32616
        )
        target = lab.folder / "r.shp" if name == "old" else lab.folder / "n.shp"
        frame.to_file(target)
        if name == "new":
            shutil.copy(lab.folder / "n.dbf", lab.folder / "r.dbf")
        ended = lab.run(regions={"path": "r.shp", "name": "name"})
    latest = max((lab.folder / "out/fault").glob("*/regions.csv"), key=lambda p: p.stat().st_mtime)
    has_new = "new" in latest.read_text()
    return has_new, f"the table has {'the new' if has_new else 'the old'} name ({ended.what})"


def refused(name: str, word: str, **fields: Any) -> None:
    """Enter a job that is wrong: plan must say so with exit code 2."""

    def tried(lab: Lab) -> Outcome:
        lab.raster("three.tif", np.zeros((3, EDGE, EDGE), np.uint8))
        lab.raster("other.tif", np.zeros((9, 9), np.uint8))
        lab.write("words.txt", "no regions")
        lab.write("d.geojson", json.dumps({"type": "FeatureCollection", "features": [
            {"type": "Feature", "properties": {"name": "a"}, "geometry": {"type": "Polygon", "coordinates": [
                [[-87, 36], [-86, 36], [-86, 37], [-87, 36]]]}}]}))  # fmt: skip
        ended = lab.plan(**fields)
        return ended.code == 2 and ended.names(word), f"plan: {ended.what}"

    fault(name)(tried)


refused("a wrong region attribute", "nmae", regions={"path": "d.geojson", "name": "nmae"})
refused("regions of another kind", "words.txt", regions={"path": "words.txt", "name": "name"})
refused("a reference with 3 bands", "three.tif", reference={"path": "three.tif"})
refused("a reference on another grid", "other.tif", reference={"path": "other.tif"})
refused("outputs.dir: ''", "outputs.dir", outputs={"dir": ""})
refused("a 5,000-letter path", "scenes", scenes=["x" * 5000 + ".tif"])
refused("~nouser", "nouser", scenes=["~nouser/x.tif"])


def refused_text(name: str, word: str, text: str) -> None:
    """Enter a job's text that is wrong."""

    def tried(lab: Lab) -> Outcome:
        ended = lab.segpipe("plan", str(lab.write("job.yaml", text)))
        return ended.code == 2 and ended.names(word), f"plan: {ended.what}"

    fault(name)(tried)


_TEXT = "name: fault\nscenes: [scene.tif]\nlabels: labels.tif\noutputs: {dir: out}\n"
refused_text("a key that stands twice", "twice", _TEXT + "labels: other.tif\n")
refused_text("NaN where a number is meant", "tolerance", _TEXT + "measure: {tolerance: .nan}\n")


@fault("an unusable PREFECT_HOME")
def _home(lab: Lab) -> Outcome:
    lab.write("file", "")
    ended = lab.segpipe("run", str(lab.job()), PREFECT_HOME=str(lab.folder / "file" / "x"))
    return ended.code == 2 and "Traceback" not in ended.err, ended.what


@fault("serve --port 99999999")
def _port(lab: Lab) -> Outcome:
    ended = lab.segpipe("serve", "--port", "99999999")
    return ended.code == 2 and "Traceback" not in ended.err, ended.what


@fault("a signed URL as a scene: where its signature is found")
def _secret(lab: Lab) -> Outcome:
    secret = "c2VjcmV0LXNpZ25hdHVyZQ0123456789"
    lab.run(scenes=["scene.tif", f"{lab.address}/x.tif?X-Amz-Signature={secret}"], labels="*.tif")
    found = [p.name for p in lab.folder.rglob("*") if p.is_file() and p.name != "job.yaml"
             and secret.encode() in p.read_bytes()]  # fmt: skip
    return not found, ", ".join(sorted(set(found))) or "nowhere"


@fault("a formula as a region's name, in the CSV")
def _formula(lab: Lab) -> Outcome:
    shape = {"type": "Polygon", "coordinates": [[[5e5, 4e6], [5e5 + 640, 4e6], [5e5, 4e6 - 640], [5e5, 4e6]]]}
    row = {"type": "Feature", "properties": {"name": "=1+1"}, "geometry": shape}
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32616"}}
    lab.write("f.geojson", json.dumps({"type": "FeatureCollection", "crs": crs, "features": [row]}))
    ended = lab.run(regions={"path": "f.geojson", "name": "name"})
    tables = [p.read_text() for p in (lab.folder / "out/fault").glob("*/regions.csv")]
    raw = any(",=1+1" in text or "\n=1+1" in text for text in tables)
    return ended.code == 0 and not raw, f"{ended.what}, {'a formula' if raw else 'a text'}"


def try_all(tree: Path, only: str) -> Iterator[tuple[str, bool, str]]:
    """Do all that is entered to a tree."""
    for name, function in FAULTS.items():
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lab = Lab(tree, Path(folder).resolve() / "lab")
            with server(lab.asked) as address:
                lab.address = address
                good, what = function(lab)
        yield name, good, what


def main() -> int:
    """Print the table; exit code 1 where a fault is not mended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", default="", help="a commit")
    parser.add_argument("--only", default="", help="faults with this in their name")
    given = parser.parse_args()
    before: dict[str, str] = {}
    if given.before:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "-q", "--detach", str(tree), given.before], check=True)
            try:
                before = {
                    name: f"{what}{'' if good else ' ✗'}" for name, good, what in try_all(tree, given.only)
                }
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    print(f"| fault | {'before | ' if before else ''}now |\n|---|{'---|' if before else ''}---|")
    mended = True
    for name, good, what in try_all(ROOT, given.only):
        mended &= good
        old = f"{before[name]} | " if before else ""
        print(f"| {name} | {old}{what}{'' if good else ' ✗'} |", flush=True)
    return 0 if mended else 1


if __name__ == "__main__":
    sys.exit(main())
