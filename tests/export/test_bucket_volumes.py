"""A volume that lies in a bucket gives the files of the same volume on disk."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import obstore
from obstore.store import from_url
from world import World, nearest_label, write_volume

from tests.finished import finish


def test_a_volume_in_a_bucket_gives_the_files_of_one_on_disk(
    world: World, bucket: str, tmp_path: Path
) -> None:
    """The labels' header is the source's own; BIDS names are read from the URL."""
    volume = world.voxels()
    local = write_volume(tmp_path / "data" / "sub-01" / "anat" / "sub-01_T1w.nii.gz", volume)
    obstore.put(from_url(bucket), "data/sub-01/anat/sub-01_T1w.nii.gz", local.read_bytes())
    outputs = {"formats": ["bids"], "scores": True}
    folders = []
    for out, base in ((tmp_path / "disk", str(tmp_path)), (tmp_path / "bucket", bucket)):
        scene = f"{base}/data/sub-01/anat/sub-01_T1w.nii.gz"
        run, record = finish(world.job(out, card="nearest-volume", scenes=[scene], outputs=outputs))
        assert [(s.name, s.state, s.uri) for s in record.scenes] == [("sub-01_T1w", "done", scene)]
        folders.append(Path(run.location))
    images = [sorted(p.relative_to(folder) for p in folder.rglob("*.nii.gz")) for folder in folders]
    assert images[0] == images[1]
    assert any("derivatives" in p.parts for p in images[0])
    for path in images[0]:
        assert (folders[0] / path).read_bytes() == (folders[1] / path).read_bytes()
    labels = nib.load(folders[1] / "scenes" / "sub-01_T1w" / "labels.nii.gz")
    np.testing.assert_array_equal(np.asarray(labels.dataobj), nearest_label(volume))  # type: ignore[attr-defined]
