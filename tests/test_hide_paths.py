"""A run folder that is handed on says nothing of the machine's folders, where the job asks for that."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from world import Ended, World, only_run

from segpipe.export.hide_paths import hide_paths

Here = Callable[..., Ended]


def paths_in(folder: Path, told: bytes) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [str(path.relative_to(folder)) for path in files if told in path.read_bytes()]


@pytest.mark.parametrize("kind", ["raster", "volume"])
def test_no_absolute_path_is_in_the_folder(kind: str, world: World, tmp_path: Path, here: Here) -> None:
    """Scenes whose folder has a blank in its name, a reference, regions, and a scene that fails."""
    data = tmp_path / "some data"
    data.mkdir()
    fields: dict[str, object] = {}
    if kind == "raster":
        shutil.copy(world / "scene1.tif", data / "scene1.tif")
        shutil.copytree(world / "truth", data / "truth")
        shutil.copy(world / "districts.geojson", data)
        (data / "torn.tif").write_text("no raster")
        fields = {
            "scenes": [str(data / "*.tif")],
            "reference": {"path": str(data / "truth")},
            "regions": {"path": str(data / "districts.geojson"), "name": "district"},
        }
    else:
        shutil.copy(world / "volume.nii.gz", data / "sub-01_T1w.nii.gz")
        (data / "torn.nii.gz").write_text("no volume")
        fields = {"scenes": [str(data / "*.nii.gz")], "card": "nearest-volume", "formats": ["nifti", "bids"]}
    formats = fields.pop("formats", ["cog"])
    for hidden, found in ((False, True), (True, False)):
        out = tmp_path / f"out-{hidden}"
        outputs = {"hide_paths": hidden, "formats": formats}
        assert here("run", str(world.job(out, outputs=outputs, **fields)), "--local").code == 1
        folder = only_run(out)
        told = {what: paths_in(folder, what.encode()) for what in (str(tmp_path), str(world.folder))}
        assert any(told.values()) == found, told
        assert paths_in(folder, b"torn.")
        assert here("report", str(folder)).code in (0, 1)
        assert any(paths_in(folder, str(tmp_path).encode())) == found
    assert here("check", str(folder)).code == 0


def test_texts_keep_what_is_no_path_of_the_machine() -> None:
    text = "https://host/a/b.tif: 403; scenes/one/labels.tif; 1/2; ../x/y; data:image/png"
    assert hide_paths([text]) == [text]
    told = hide_paths(
        {"uri": "stack:/my data/a.tif|/my data/b.tif", "error": "/my data/a.tif: torn (/usr/lib/x.py)"}
    )
    assert told == {"uri": "stack:a.tif|b.tif", "error": "a.tif: torn (x.py)"}
