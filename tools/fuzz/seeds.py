"""Write the inputs that fuzzing begins with: small files of every kind, none of anybody else's.

python -m tools.fuzz.seeds
"""

# ruff: noqa: E501  (data)
from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geopandas
import h5py
import nibabel as nib
import numpy as np
import pandas as pd
import rasterio
import shapely
import torch
import yaml
from affine import Affine
from scipy.io import netcdf_file

from tools.fuzz.requests import SEEDS as FILES
from tools.fuzz.scenes import raster_geometry
from tools.fuzz.target import joined, scratch
from tools.fuzz.targets import SEEDS

ROOT = Path(__file__).parents[2]
PIXELS = np.arange(2 * 16 * 16, dtype=np.uint16).reshape(2, 16, 16)
CORNERS = ((500_100.0, 3_999_000.0), (501_000.0, 3_999_000.0), (501_000.0, 3_999_900.0))


def raster(driver: str, suffix: str, dtype: str = "uint16", **profile: Any) -> list[bytes]:
    """A raster of 16 x 16, and its header if it has one beside it."""
    with scratch() as folder:
        path = folder / f"scene.{suffix}"
        with rasterio.open(
            path, "w", driver=driver, width=16, height=16, count=2, dtype=dtype, crs="EPSG:32617",
            transform=Affine(30.0, 0.0, 500_000.0, 0.0, -30.0, 4_000_000.0), **profile,
        ) as file:  # fmt: skip
            file.write(PIXELS.astype(dtype))
        header = path.with_suffix(".hdr")
        return [path.read_bytes(), *([header.read_bytes()] if header.exists() else [])]


def scene_files() -> Iterator[tuple[str, str, bytes]]:
    """Yield target, name and content of rasters and volumes."""
    deflate: dict[str, Any] = {
        "compress": "deflate",
        "tiled": True,
        "blockxsize": 16,
        "blockysize": 16,
        "nodata": 0,
    }
    yield "tif", "strips", raster("GTiff", "tif")[0]
    yield "tif", "tiles", raster("GTiff", "tif", **deflate)[0]
    yield "tif", "float", raster("GTiff", "tif", "float32", compress="lzw", predictor=3)[0]
    yield "png", "grey-alpha", raster("PNG", "png", "uint8")[0]
    yield "jp2", "lossless", raster("JP2OpenJPEG", "jp2", "uint8", quality="100", reversible="yes")[0]
    yield "bil", "envi", joined(raster("ENVI", "bil", interleave="bil"))
    tile = raster("GTiff", "tif", "uint8", **deflate)[0]
    yield "vrt", "mosaic", joined([VRT.encode(), tile])
    yield "atlas", "tif", tile
    with scratch() as folder:
        with netcdf_file(str(folder / "a.nc"), "w") as file:
            file.createDimension("y", 16)
            file.createDimension("x", 16)
            file.createVariable("band", "h", ("y", "x"))[:] = PIXELS[0]
        yield "nc", "classic", (folder / "a.nc").read_bytes()
        with h5py.File(folder / "a.h5", "w", libver="latest") as file:
            file.create_dataset("band", data=PIXELS[0], compression="gzip")
        yield "h5", "gzip", (folder / "a.h5").read_bytes()
    voxels = np.arange(8 * 7 * 6, dtype=np.int16).reshape(8, 7, 6)
    for name, kind in (("one", nib.Nifti1Image), ("two", nib.Nifti2Image)):
        image = kind(voxels, np.diag([-2.0, 2.0, 2.0, 1.0]))  # type: ignore[no-untyped-call]
        image.header.set_xyzt_units("mm")
        yield "nii", name, image.to_bytes()
        yield "atlas-nii", name, image.to_bytes()
    image = nib.Nifti1Image(voxels, np.diag([-2.0, 2.0, 2.0, 1.0]))
    image.header.set_slope_inter(2.0, 1.0)
    with scratch() as folder:
        nib.save(image, folder / "a.nii.gz")
        yield "nii-gz", "scaled", (folder / "a.nii.gz").read_bytes()
        nib.save(nib.Nifti1Pair(voxels, np.eye(4)), folder / "a.hdr")
        yield "nifti-pair", "pair", joined([(folder / n).read_bytes() for n in ("a.hdr", "a.img")])
    yield "dicom", "series", joined([dicom_slice(number) for number in range(3)])


def dicom_slice(number: int) -> bytes:
    """A CT slice of 8 x 8."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = UID(f"1.2.3.{number}")
    found = Dataset()
    found.file_meta = meta
    values = {
        "SOPClassUID": CTImageStorage, "SOPInstanceUID": f"1.2.3.{number}", "SeriesInstanceUID": "1.2.4",
        "StudyInstanceUID": "1.2.5", "FrameOfReferenceUID": "1.2.6", "Modality": "CT",
        "ImagePositionPatient": [-10.0, -20.0, 2.5 * number], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelSpacing": [1.5, 1.5], "SliceThickness": 2.5, "InstanceNumber": number + 1, "Rows": 8,
        "Columns": 8, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": 16,
        "BitsStored": 16, "HighBit": 15, "PixelRepresentation": 1, "RescaleSlope": 1, "RescaleIntercept": -1024,
    }  # fmt: skip
    for keyword, value in values.items():
        setattr(found, keyword, value)
    found.PixelData = (np.arange(64, dtype=np.int16) + number).tobytes()
    content = io.BytesIO()
    found.save_as(content, enforce_file_format=True)
    return content.getvalue()


def map_files() -> Iterator[tuple[str, str, bytes]]:
    """Yield vector layers, and tables of points."""
    shapes = [shapely.Polygon(CORNERS), shapely.box(500_200, 3_998_500, 501_500, 3_999_500)]
    frame = geopandas.GeoDataFrame(
        {"district": ["north", "south"], "object": [1, 2], "label": [1, 1]}, geometry=shapes, crs="EPSG:32617"
    )
    with scratch() as folder:
        frame.to_file(folder / "a.geojson", driver="GeoJSON")
        yield "geojson", "polygons", (folder / "a.geojson").read_bytes()
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(zipfile.ZipInfo("a.geojson"), (folder / "a.geojson").read_bytes())
        yield "zip", "geojson", content.getvalue()
        frame.set_geometry(frame.geometry.representative_point()).to_file(
            folder / "p.geojson", driver="GeoJSON"
        )
        yield "geojson", "points", (folder / "p.geojson").read_bytes()
        frame.to_file(folder / "a.shp")
        yield (
            "shapefile",
            "polygons",
            joined([(folder / f"a.{s}").read_bytes() for s in ("shp", "shx", "dbf", "prj")]),
        )
        frame.to_parquet(folder / "a.parquet")
        yield "parquet", "polygons", (folder / "a.parquet").read_bytes()
        frame.to_file(folder / "a.gpkg", driver="GPKG", layer="a", SPATIAL_INDEX="NO")
        yield "gpkg", "polygons", (folder / "a.gpkg").read_bytes()
    yield "kml", "polygon", KML.encode()
    yield "region-names", "three", b"value,name\n1,liver\n2,spleen\n7,\n"
    yield "groups", "two", b"scene,group\na,1\nb,2\n"
    yield (
        "prompts-csv",
        "points",
        b"x,y,object,label,phrase,crs\n500100,3999500,1,1,lake,EPSG:32617\n500130,3999470,1,0,lake,EPSG:32617\n",
    )
    yield (
        "prompts-csv",
        "boxes",
        b"lon,lat,lon_min,lon_max,lat_min,lat_max\n,,-80.999,-80.99,36.13,36.14\n-80.995,36.135,,,,\n",
    )
    yield "prompts-volume", "voxels", b"i,j,k,object\n3,4,5,1\n6,2,5,1\n"
    yield "prompts-volume", "boxes", b"x_ras_min,x_ras_max,y_ras_min,y_ras_max,z_ras\n0,10,-20,-10,11\n"


VRT = """\
<VRTDataset rasterXSize="16" rasterYSize="16"><SRS>EPSG:32617</SRS>
<GeoTransform>500000, 30, 0, 4000000, 0, -30</GeoTransform>
<VRTRasterBand dataType="Byte" band="1"><NoDataValue>0</NoDataValue><ColorInterp>Gray</ColorInterp>
<SimpleSource><SourceFilename relativeToVRT="1">tile.tif</SourceFilename><SourceBand>1</SourceBand>
<SourceProperties RasterXSize="16" RasterYSize="16" DataType="Byte" BlockXSize="16" BlockYSize="16"/>
<SrcRect xOff="0" yOff="0" xSize="16" ySize="16"/><DstRect xOff="0" yOff="0" xSize="16" ySize="16"/>
</SimpleSource></VRTRasterBand></VRTDataset>
"""
KML = """\
<?xml version="1.0" encoding="UTF-8"?><kml xmlns="http://www.opengis.net/kml/2.2"><Document><name>a</name>
<Placemark><name>north</name><Polygon><outerBoundaryIs><LinearRing><coordinates>
-81,36.1,0 -80.98,36.1,0 -80.98,36.14,0 -81,36.14,0 -81,36.1,0</coordinates></LinearRing></outerBoundaryIs>
</Polygon></Placemark></Document></kml>
"""
PROMPT_JOB = {
    "name": "ask", "scenes": ["a.tif"], "model": "starter-sam",
    "prompts": {"text": ["lake", "field"], "path": "points.csv", "crs": "EPSG:32617", "threshold": 0.3},
}  # fmt: skip


def requests() -> Iterator[tuple[str, str, bytes]]:
    """Yield what people write; jobs, cards and recipes are those that come with segpipe."""
    for target, folder in (("job", "jobs"), ("scan", "scans"), ("recipe", "train"), ("card", "models")):
        for path in sorted((ROOT / "configs" / folder).glob("*.yaml")):
            yield target, path.stem, path.read_bytes()
    yield "prompt-job", "ask", yaml.safe_dump(PROMPT_JOB).encode()
    yield "classes", "mapping", b"0: ground\n1: crop\n2: water\n"
    yield (
        "classes",
        "list",
        b'classes:\n- {value: 0, name: ground, background: true}\n- {value: 1, name: crop, color: "#22aa22"}\n',
    )
    for number, text in enumerate(
        ("tiling.window=256", "outputs.formats=[cog]", "bands=[a, b]", "measure.smallest=4")
    ):
        yield "set", str(number), text.encode()
    uris = (
        "a.tif", "stack:a.tif|b.tif", "mosaic:*.tif", "c.nii#frame=0", "*.tif", "pkg://numpy/numpy/__init__.py",
        "https://me:secret@host/a.tif?X-Amz-Signature=abc", "s3://bucket/a.tif", "folder#series=1.2.3",
    )  # fmt: skip
    for number, text in enumerate(uris):
        yield "uri", str(number), text.encode()
    for number, text in enumerate(
        ("2026/07/scene.tif", "sub-01_T1w.nii.gz", "lake . dock . field", "Ä b.jp2")
    ):
        yield "name", str(number), text.encode()


def models() -> Iterator[tuple[str, str, bytes]]:
    """Yield weights, and what nnU-Net and MONAI write beside theirs."""
    import onnx
    from onnx import TensorProto, helper
    from safetensors.torch import save

    state = {"conv.weight": torch.arange(18.0).reshape(2, 1, 3, 3), "conv.bias": torch.zeros(2).half()}
    yield "safetensors", "two", save(state)
    content = io.BytesIO()
    torch.save({"state_dict": state}, content)
    yield "torch", "state", content.getvalue()
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, "h", "w0"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, "h", "w0"])],
        [
            helper.make_tensor("w", TensorProto.FLOAT, [2, 1, 3, 3], range(18)),
            helper.make_tensor("b", TensorProto.FLOAT, [2], [0.0, 1.0]),
        ],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    yield "onnx", "conv", model.SerializeToString()
    program = torch.export.export(torch.nn.Conv2d(1, 2, 3, padding=1), (torch.zeros(1, 1, 16, 16),))
    content = io.BytesIO()
    torch.export.save(program, content)
    yield "program", "conv", content.getvalue()
    yield "nnunet", "fullres", joined([json.dumps(PLANS).encode(), json.dumps(DATASET).encode()])
    yield "bundle", "unet", joined([json.dumps(INFERENCE).encode(), json.dumps(METADATA).encode()])


PLANS = {
    "dataset_name": "Dataset900_Spheres", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [1, 0, 2], "transpose_backward": [1, 0, 2],
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 90.0, "std": 30.0, "percentile_00_5": 10.0, "percentile_99_5": 200.0}
    },
    "configurations": {
        "base": {
            "patch_size": [16, 24, 32], "spacing": [2.0, 1.0, 1.5],
            "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 2, "features_per_stage": [6, 12], "conv_op": "torch.nn.modules.conv.Conv3d",
                    "kernel_sizes": [[3, 3, 3]] * 2, "strides": [[1, 1, 1], [1, 2, 2]],
                    "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": True,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                    "norm_op_kwargs": {"eps": 1e-05, "affine": True}, "dropout_op": None,
                    "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        },
        "3d_fullres": {"inherits_from": "base", "batch_size": 4},
    },
}  # fmt: skip
DATASET = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "core": 1}, "file_ending": ".nii.gz"}
INFERENCE = {
    "dims": 3, "size": {"channels": [4, 8]}, "network": "$@network_def.to(@device)",
    "network_def": {
        "_target_": "UNet", "spatial_dims": "@dims", "in_channels": 1, "out_channels": 2,
        "channels": "@size::channels", "strides": [2], "norm": "batch",
    },
    "preprocessing": {
        "_target_": "Compose",
        "transforms": [
            {"_target_": "LoadImaged", "keys": "image"},
            {"_target_": "Orientationd", "keys": "image", "axcodes": "LPS"},
            {"_target_": "Spacingd", "keys": "image", "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"},
            {
                "_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -57, "a_max": 164, "b_min": 0,
                "b_max": 1, "clip": True,
            },
        ],
    },
    "inferer": {"_target_": "SlidingWindowInferer", "roi_size": [16, 16, 24], "overlap": 0.5},
    "postprocessing": {
        "_target_": "Compose", "transforms": [{"_target_": "Activationsd", "keys": "pred", "softmax": True}]
    },
}  # fmt: skip
METADATA = {
    "version": "0.2.0", "task": "spleen", "data_source": "none", "eval_metrics": {"mean_dice": 0.96},
    "network_data_format": {
        "inputs": {"image": {"modality": "CT", "num_channels": 1, "spatial_shape": [16, 16, 24]}},
        "outputs": {"pred": {"num_channels": 2, "channel_def": {"0": "background", "1": "spleen"}}},
    },
}  # fmt: skip


def records() -> Iterator[tuple[str, str, bytes]]:
    """Yield what segpipe itself writes into a store, a run and a ledger; and a STAC catalogue."""
    from segpipe.objects.scene_objects import SceneObjects
    from segpipe.objects.table import ObjectTable
    from segpipe.store.location import Mark, sealed
    from segpipe.tables.record import ClassInfo, ModelSummary, RunRecord, SceneRecord, dump_record

    scene = SceneRecord("a", "a.tif", "done", notes=("no CRS",), files={"labels": "scenes/a/labels.tif"})
    failed = SceneRecord("b", "b.tif", "failed", error="b.tif: no such file")
    classes = (ClassInfo(0, "ground", "#000000", background=True), ClassInfo(1, "crop", "#22aa22"))
    record = RunRecord(
        "job", "run", "2026-01-01T00:00:00+00:00", "2026-01-01T00:01:00+00:00", {"name": "job"},
        ModelSummary("m", classes=classes), scenes=(scene, failed),
    )  # fmt: skip
    table = pd.DataFrame(
        {
            "scene": "a", "region": "scene", "class": ["ground", "crop"], "value": [0, 1], "count": [100, 156],
            "area_ha": [9.0, 14.04], "share": [0.39, 0.61], "outside": 0.0, "seen": 1.0, "state": "measured",
        }
    )  # fmt: skip
    regions = io.BytesIO()
    table.to_parquet(regions)
    yield "run", "two-scenes", joined([dump_record(record).encode(), regions.getvalue()])
    text = dump_record(record).encode()
    mark = Mark.of(text)
    manifest = {
        "job": "job", "run": "run", "checksums": "sha256", "scenes": [],
        "files": {"run.json": {"size": mark.size, "sha256": mark.sha256}},
    }  # fmt: skip
    yield "manifest", "one-file", joined([json.dumps(manifest).encode(), text])
    told = {"name": "a", "uri": "lake/a.tif", "identity": {"size": 1}, "at": "2026-01-01T00:00:00+00:00"}
    from pydantic import TypeAdapter

    ledger = {
        "done/0.json": {**told, "run": "1"}, "quarantine/0.json": {**told, "reason": "damaged", "tries": 3},
        "tries/0.json": {**told, "reason": "busy", "tries": 1},
        "records/1/0.json": TypeAdapter(SceneRecord).dump_python(scene, mode="json"),
        "open/1.json": {"started": told["at"]}, "leases/0/1": {"holder": "other"},
    }  # fmt: skip
    plain = {name: json.dumps(value).encode() for name, value in ledger.items()}
    yield "ledger", "plain", joined(list(plain.values()))
    yield "ledger", "sealed", joined([v if "leases" in n else sealed(n, v) for n, v in plain.items()])
    none = np.zeros(0, np.int64)
    columns: dict[str, Any] = {}
    for name in SceneObjects.__dataclass_fields__:
        columns[name] = np.zeros((0, 2), np.int64) if name in ("start", "stop") else none
    data = sealed("parts-00/table.npz", ObjectTable(SceneObjects(**columns), none, np.zeros((0, 2))).dump())
    part = Mark.of(data)
    layout = {"shape": [16, 16], "block": [16, 16], "absorb": [0, 0]}
    stage = {"token": "00", "blocks": layout, "geometry": raster_geometry().to_dict(), "whole": False}
    receipt = {"files": {"parts-00/table.npz": [part.size, part.sha256]}, "rows": 0}
    stored = {"stage.json": stage, "receipts-00/0.json": receipt, "receipts-00.json": {"0": receipt}}
    yield "stage", "table", joined([*(sealed(n, json.dumps(v).encode()) for n, v in stored.items()), data])
    yield "stac", "item", joined([json.dumps(CATALOG).encode(), json.dumps(ITEM).encode()])


CATALOG = {
    "type": "Catalog", "id": "lake", "stac_version": "1.0.0", "description": "a",
    "links": [{"rel": "item", "href": "item.json"}],
}  # fmt: skip
ITEM = {
    "type": "Feature", "stac_version": "1.0.0", "id": "a", "collection": "c", "bbox": [0, 0, 1, 1],
    "geometry": {"type": "Point", "coordinates": [0, 0]},
    "properties": {"datetime": "2026-01-01T00:00:00Z", "updated": "2026-01-02T00:00:00Z", "eo:cloud_cover": 3},
    "links": [],
    "assets": {
        "b": {"href": "a.tif", "type": "image/tiff; application=geotiff", "roles": ["data"], "file:size": 9}
    },
}  # fmt: skip
MAKERS: tuple[Callable[[], Iterator[tuple[str, str, bytes]]], ...] = (
    scene_files, map_files, requests, models, records,
)  # fmt: skip


def main() -> None:
    """Write all of them anew."""
    shutil.rmtree(SEEDS, ignore_errors=True)
    for make in MAKERS:
        for target, name, content in make():
            path = SEEDS / target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    FILES.mkdir()
    for name, source in (("a.tif", "tif/strips"), ("c.nii", "nii/one")):
        shutil.copyfile(SEEDS / source, FILES / name)


if __name__ == "__main__":
    main()
