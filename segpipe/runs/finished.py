"""A finished run as people use it from Python: tables, label maps, page."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from segpipe.errors import RequestError
from segpipe.export.run_folder import RunFolder
from segpipe.geometry.geometry import geometry_from_dict
from segpipe.report.markdown import headline
from segpipe.runs.find_run import read_table
from segpipe.sources import open_source
from segpipe.sources.arrays import lazy_array
from segpipe.store.location import is_url, join
from segpipe.store.stage import Stage
from segpipe.tables.record import RunRecord, SceneRecord

if TYPE_CHECKING:
    import xarray


class Run:
    """A finished run: its tables, label maps and page."""

    def __init__(self, folder: RunFolder, record: RunRecord) -> None:
        """Of a folder and its record; `segpipe.run` and `segpipe.open_run` make these."""
        self._folder = folder
        self.record = record
        """Everything that ``run.json`` says."""

    @property
    def path(self) -> str:
        """Folder or URL of the run."""
        return self._folder.location

    @property
    def report(self) -> str:
        """Path or URL of the page."""
        return self._folder.report

    @property
    def scenes(self) -> list[str]:
        """Names of the scenes that are done."""
        return [scene.name for scene in self.record.done]

    @property
    def failed(self) -> dict[str, str]:
        """The scenes that failed, with the reason."""
        return {scene.name: scene.error for scene in self.record.failed}

    @property
    def regions(self) -> pd.DataFrame:
        """Area or volume per scene, region and class (``regions.csv``)."""
        table = self.table("regions")
        assert table is not None  # every run has it
        return table

    @property
    def metrics(self) -> pd.DataFrame | None:
        """IoU, Dice and counts per scene, region and class; None without a reference."""
        return self.table("metrics")

    @property
    def objects(self) -> pd.DataFrame | None:
        """One row per object (``instances.csv``); None where the model finds none."""
        return self.table("instances")

    def table(self, name: str) -> pd.DataFrame | None:
        """Any table of the run by the name of its file, such as ``summary``; None where there is none."""
        return read_table(self._folder, name)

    def labels(self, scene: str | None = None, *, ids: bool = False) -> xarray.DataArray:
        """The label map of a scene on its native grid, read when it is asked for.

        Args:
            scene: its name; None: the only one.
            ids: where objects were found, their ids instead of their classes.

        Returns:
            Dimensions y, x or z, y, x; the geometry as `segpipe.sources.arrays` describes, class names by
            value in ``attrs["classes"]``, the value of elements without data in ``attrs["_FillValue"]``.

        Raises:
            RequestError: no scene of this name is done, or its label map was not kept.
        """
        record = self._scene(scene)
        name = "instances" if ids else "labels"
        stage = Stage(self._folder.out, record.keys.get("labels", ""))
        found = stage.read_json("stage.json") if self.record.model is not None else None
        if found is not None and name in stage.group:
            stored = stage.array(name)
            geometry = geometry_from_dict(found["geometry"])
            array = lazy_array(
                lambda box: stage.read(name, box.slices), geometry, np.dtype(stored.dtype), name=name
            )
        elif name in record.files:
            array = open_source(join(self.path, record.files[name])).to_xarray().isel(band=0, drop=True)
            array.name = name
        else:
            raise RequestError(
                f"{self.path}: the {name} of {record.name} were not kept; valid: outputs.keep: [labels], or "
                "a format in outputs.formats"
            )
        if not ids:
            if found is not None:
                array.attrs["_FillValue"] = int(stored.fill_value)
            array.attrs["classes"] = {c.value: c.name for c in self.record.legend}
        return array

    def _scene(self, name: str | None) -> SceneRecord:
        if name is None and len(self.record.mapped) == 1:
            return self.record.mapped[0]
        for scene in self.record.mapped:
            if scene.name == name:
                return scene
        raise RequestError(f"scene: found {name!r}; valid: {', '.join(self.scenes) or 'none is done'}")

    def __repr__(self) -> str:
        lines = headline(self.record, self.regions, self.metrics, self.table("summary"))
        return "\n".join([*lines, f"report: {self.report}"])

    def _repr_html_(self) -> str:
        """Headline and pictures of the first scenes, for a notebook."""
        pictures = "".join(self._pictures())
        return f"<pre>{html.escape(repr(self))}</pre>{pictures}"

    def _pictures(self, count: int = 4) -> Iterator[str]:
        for scene in [] if is_url(self.path) else self.record.mapped[:count]:
            picture = Path(self.path) / scene.files.get("preview", "-")
            if picture.is_file():
                data = base64.b64encode(picture.read_bytes()).decode()
                name = html.escape(scene.name, quote=True)
                source = f"data:image/png;base64,{data}"
                yield f"<img alt='{name}' title='{name}' style='max-width:32em' src='{source}'>"
