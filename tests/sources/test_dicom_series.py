"""Which slices of a folder are one series, and the one that is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from segpipe.errors import SceneError
from segpipe.sources import open_source

Find = Callable[[str], Path]
Write = Callable[..., Path]
Noise = Callable[..., np.ndarray]


def test_without_series_uids_frame_orientation_and_size_tell_series_apart(
    tmp_path: Path, write_series: Write, slice_file: Write, noise: Noise
) -> None:
    folder = write_series(tmp_path / "ct", noise((3, 4, 4)), SeriesInstanceUID="")
    assert open_source(str(folder)).geometry.shape == (3, 4, 4)
    slice_file(folder / "z.dcm", noise((8, 8)), SeriesInstanceUID="")
    with pytest.raises(SceneError, match="holds 2 series"):
        open_source(str(folder))


def test_one_series_of_a_folder_that_holds_several(tmp_path: Path, write_series: Write, noise: Noise) -> None:
    """The other series is not even looked at: it has no position. Two frames of reference are no volume."""
    first, second = noise((3, 4, 5)), noise((2, 4, 5), seed=1)
    folder = write_series(tmp_path / "ct", first, FrameOfReferenceUID="5.5")
    write_series(tmp_path / "more", second, SeriesInstanceUID="1.2.9", FrameOfReferenceUID="5.6")
    for path in (tmp_path / "more").iterdir():
        path.rename(folder / f"b{path.name}")
    with pytest.raises(SceneError, match=r"holds 2 series .*or name one: folder#series=SeriesInstanceUID"):
        open_source(str(folder))
    for series, volume in (("1.2.3.4", first), ("1.2.9", second), ("1.2.9@5.6", second)):
        with open_source(f"{folder}#series={series}") as source:
            np.testing.assert_array_equal(source.read(source.geometry.box).values[0], volume)
            assert source.uri == source.identity["uri"] == f"{folder}#series={series}"
    for series in ("1.2", "1.2.9@5.5", ""):
        with pytest.raises(SceneError, match="no DICOM image slices"):
            open_source(f"{folder}#series={series}")


def test_two_frames_of_reference_are_no_volume(tmp_path: Path, slice_file: Write, noise: Noise) -> None:
    for k, plane in enumerate(noise((4, 3, 3))):
        frame = "5.5" if k < 2 else "5.6"
        slice_file(tmp_path / f"{k}.dcm", plane, ImagePositionPatient=[0, 0, k], FrameOfReferenceUID=frame)
    with pytest.raises(SceneError, match="holds 2 series"):
        open_source(str(tmp_path))
    with open_source(f"{tmp_path}#series=1.2.3.4@5.6") as source:
        assert source.geometry.shape == (2, 3, 3)
