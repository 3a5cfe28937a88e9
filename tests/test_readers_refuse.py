"""What libraries raise at damaged tables and vector files is told in one line that names the file."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import geopandas
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely

from segpipe.config.classes import load_classes
from segpipe.config.job import Regions
from segpipe.config.loading import load_groups
from segpipe.errors import SegpipeError
from segpipe.export.run_folder import RunFolder
from segpipe.prompts.inputs.prompt_files import read_file_attributes
from segpipe.regions.atlas import read_names
from segpipe.regions.layer import read_layer
from segpipe.runs.find_run import read_table
from segpipe.sources.vectors import frame_here, layers_here
from segpipe.tables.table_files import parquet_bytes

CELL = b"x" * 140_000
"""Longer than a cell may be for Python's csv."""
CSV = {
    "classes": (lambda path: load_classes(str(path)), b"value,name\n1," + CELL),
    "classes: first line": (lambda path: load_classes(str(path)), b"value,name," + CELL + b"\n1,a"),
    "classes: value": (lambda path: load_classes(str(path)), b"value,name\n" + b"9" * 400 + b",a"),
    "groups": (lambda path: load_groups(str(path), ["a"]), b"scene,group\na," + CELL),
    "names": (lambda path: read_names(str(path)), b"value,name\n1," + CELL),
    "names: first line": (lambda path: read_names(str(path)), b"value,name," + CELL + b"\n1,a"),
    "prompts": (lambda path: read_file_attributes(path, ""), b"x,y\n1," + CELL),
}


@pytest.mark.parametrize(("read", "content"), CSV.values(), ids=CSV)
def test_a_csv_is_refused_in_a_line(read: Callable[[Path], object], content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "given.csv"
    path.write_bytes(content)
    with pytest.raises(SegpipeError) as caught:
        read(path)
    assert "given.csv" in str(caught.value)


def pandas_metadata(text: bytes) -> bytes:
    """A table with other words in what pandas keeps of it."""
    table = pq.read_table(io.BytesIO(parquet_bytes(pd.DataFrame({"scene": ["a"], "area_m2": [1.0]}))))
    target = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({b"pandas": text}), target)
    return target.getvalue()


COLUMN = {"name": "area_m2", "field_name": "area_m2", "pandas_type": "float64", "metadata": None}
TABLES = {
    "no Parquet": b"PAR1 and nothing else",
    "empty": b"",
    "not JSON": pandas_metadata(b"{'a'"),
    "not UTF-8": pandas_metadata(b'{"a": "\xad"}'),
    "no type": pandas_metadata(json.dumps({"index_columns": [], "columns": [COLUMN]}).encode()),
}


@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES)
def test_a_table_of_a_run_is_refused_in_a_line(content: bytes, tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path), "job", "run", "")
    path = tmp_path / "job" / "run" / "regions.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(SegpipeError, match=r"regions\.parquet: cannot be read") as caught:
        read_table(run, "regions")
    assert "\n" not in str(caught.value)


def open_ring(path: Path) -> None:
    ring = [[0, 0], [4, 0], [4, 4], [1, 1]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [[*ring[:3], [0, 0]], [*ring, [2, 2]]]}))


def unknown_crs(path: Path) -> None:
    frame = geopandas.GeoDataFrame({"a": [1]}, geometry=[shapely.box(0, 0, 1, 1)], crs="EPSG:32617")
    frame.to_parquet(path)
    table = pq.read_table(path)
    about = table.schema.metadata[b"geo"].replace(b'"ProjectedCRS"', b'"ProjectedXYZ"')
    pq.write_table(table.replace_schema_metadata({b"geo": about}), path)


def wrong_metadata(path: Path) -> None:
    unknown_crs(path)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({b"geo": b'{"primary_column": 3, "columns": []}'}), path)


def damaged_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.shp", bytes(range(256)) * 40)
    whole = bytearray(path.read_bytes())
    whole[40:60] = b"\xff" * 20
    path.write_bytes(whole)


LAYERS = {
    "ring.geojson": open_ring,
    "crs.parquet": unknown_crs,
    "metadata.parquet": wrong_metadata,
    "layer.shz": damaged_zip,
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    LAYERS[name](path)
    with pytest.raises(SegpipeError, match=name):
        frame_here(str(path), None if name.endswith("parquet") else layers_here(str(path))[0])
    with pytest.raises(SegpipeError, match=name):
        read_layer(Regions(path=str(path)))
