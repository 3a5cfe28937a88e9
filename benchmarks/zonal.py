"""Areas of classes in polygons: segpipe beside exactextract and rasterstats, on the same file.

    python -m benchmarks.zonal [--size 10980] [--polygons 1000]

A label map of five classes (a Sentinel-2 tile at 10 m) and districts that partition it: Voronoi cells
with curved borders. Each library runs in a fresh process, from files to a table region × class, and
prints its seconds and peak memory. exactextract counts by fraction of cover as segpipe does;
rasterstats takes the pixels whose centre is inside, so it may differ by pixels of the border.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from benchmarks.fresh import run_fresh

CLASSES = 5
PIXEL = 10.0
LEFT, TOP, CRS = 500000.0, 5200000.0, "EPSG:32633"
STRIPE = 512
"""Rows of the label map written at once."""
LIMIT_MIB = 1536
"""Peak memory that segpipe must stay under."""


def write_labels(path: Path, size: int) -> None:
    """A tiled label map (size, size) of patches, uint8."""
    rng = np.random.default_rng(0)
    profile = {
        "driver": "GTiff", "width": size, "height": size, "count": 1, "dtype": "uint8", "crs": CRS,
        "transform": rasterio.Affine(PIXEL, 0, LEFT, 0, -PIXEL, TOP),
        "tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate", "zlevel": 1,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        for row in range(0, size, STRIPE):
            rows = min(STRIPE, size - row)
            coarse = rng.integers(0, CLASSES, (rows // 16 + 1, size // 16 + 1), dtype=np.uint8)
            values = coarse.repeat(16, 0).repeat(16, 1)[:rows, :size]
            target.write(values, 1, window=Window(0, row, size, rows))


def write_districts(path: Path, size: int, count: int) -> None:
    """Districts that partition the label map, a vertex every 10 pixels, as a GeoPackage."""
    import geopandas
    import shapely

    extent = size * PIXEL
    points = np.random.default_rng(1).uniform(0, extent, (count, 2))
    frame = shapely.box(0, 0, extent, extent)
    cells = shapely.get_parts(shapely.voronoi_polygons(shapely.MultiPoint(points), extend_to=frame))
    cells = shapely.segmentize(shapely.intersection(cells, frame), 10 * PIXEL)

    def bend(xy: np.ndarray) -> np.ndarray:
        """Waves of 20 pixels that leave the frame where it is; to map coordinates."""
        inside = np.sin(np.pi * xy / extent)
        wave = 20 * PIXEL * inside * np.sin(xy[:, ::-1] / (37 * PIXEL))
        return xy + wave + (LEFT, TOP - extent)

    geopandas.GeoDataFrame(geometry=shapely.transform(cells, bend), crs=CRS).to_file(path)


def with_segpipe(labels: str, districts: str) -> np.ndarray:
    """Elements (fractional) by region and class, from segpipe's tallies tile by tile."""
    from segpipe.config.job import Regions
    from segpipe.geometry.geometry import RasterGeometry
    from segpipe.metrics.tally import SizeScale, add, measure_tile, measure_tiles
    from segpipe.regions import load_regions
    from segpipe.regions.base import FULL

    with rasterio.open(labels, driver="GTiff") as source:
        geometry = RasterGeometry(source.shape, source.transform[:6], source.crs.to_wkt())
        regions = load_regions(Regions(path=districts), geometry)
        scale = SizeScale.of(geometry)
        tally = add(
            measure_tile(
                source.read(1, window=Window.from_slices(*box.slices)),
                None, None, regions, box, geometry.box, scale,
            )
            for box in measure_tiles(geometry)
        )  # fmt: skip
    table = np.zeros((len(regions.names), CLASSES))
    table[tally.region, tally.label] = tally.cover / FULL
    return table


def with_exactextract(labels: str, districts: str) -> np.ndarray:
    """Elements (fractional) by region and class, from exactextract's count and shares."""
    import geopandas
    from exactextract import exact_extract

    frame = geopandas.read_file(districts)
    found = exact_extract(labels, frame, ["count", "unique", "frac"], output="pandas")
    table = np.zeros((len(frame), CLASSES))
    for region, (count, values, shares) in enumerate(found.itertuples(index=False)):
        table[region, np.asarray(values, dtype=int)] = count * np.asarray(shares)
    return table


def with_rasterstats(labels: str, districts: str) -> np.ndarray:
    """Elements (whole ones) by region and class, from rasterstats."""
    from rasterstats import zonal_stats

    found = zonal_stats(districts, labels, categorical=True, nodata=255)
    return np.array([[region.get(value, 0) for value in range(CLASSES)] for region in found], dtype=float)


TOOLS = {"segpipe": with_segpipe, "exactextract": with_exactextract, "rasterstats": with_rasterstats}


def one(tool: str, labels: str, districts: str, out: str) -> None:
    """Run a library in this process; save its table and print seconds, seconds of CPU and peak MiB."""
    wall, cpu = time.perf_counter(), time.process_time()
    table = TOOLS[tool](labels, districts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    np.save(out, table)
    print(f"{wall:.2f} {cpu:.2f} {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")


def main() -> None:
    """Print a line for each library; exit with 1 where segpipe needs too much memory or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=10980)
    parser.add_argument("--polygons", type=int, default=1000)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(*arguments.one)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels, districts = folder / "labels.tif", folder / "districts.gpkg"
        write_labels(labels, arguments.size)
        write_districts(districts, arguments.size, arguments.polygons)
        print(f"{arguments.size}² elements, {arguments.polygons} polygons")
        print("library        seconds     CPU   peak MiB   off segpipe's by, share of the largest region")
        tables, peaks = {}, {}
        for tool in TOOLS:
            out = folder / f"{tool}.npy"
            wall, cpu, peak = run_fresh("benchmarks.zonal", tool, str(labels), str(districts), str(out))
            tables[tool], peaks[tool] = np.load(out), int(peak)
            off = np.abs(tables[tool] - tables["segpipe"]).max() / tables["segpipe"].sum(axis=1).max()
            print(f"{tool:12s} {wall:>9s} {cpu:>7s} {peak:>10s}   {off:.1e}", flush=True)
        whole = tables["segpipe"].sum() / arguments.size**2
        print(f"regions add up to {whole:.9f} of the scene")
    same = np.allclose(tables["segpipe"], tables["exactextract"], rtol=1e-5, atol=0.05)
    if not same or peaks["segpipe"] > LIMIT_MIB:
        sys.exit(f"segpipe: equals exactextract: {same}; peak {peaks['segpipe']} of {LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
