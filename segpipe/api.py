"""The Python door: run, plan, open, predict, prompt and measure, in this process and without Prefect.

Everything here is exported by the package, lazily: ``import segpipe; segpipe.run("job.yaml")``.
"""

from __future__ import annotations

import base64
import html
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from segpipe.config.job import Job
from segpipe.config.loading import read_yaml, validate
from segpipe.errors import RequestError, SceneError
from segpipe.export.run_folder import RunFolder
from segpipe.geometry.geometry import Geometry, geometry_from_dict
from segpipe.report.markdown import headline
from segpipe.runs.check import check_request
from segpipe.runs.local import Progress, run_local
from segpipe.runs.plan import ScenePlan, plan_scenes
from segpipe.runs.run import load_run, read_table
from segpipe.sources import Source, open_source
from segpipe.sources.arrays import array_parts, lazy_array
from segpipe.sources.memory import hold
from segpipe.store.location import is_url, join
from segpipe.store.stage import Stage
from segpipe.tables.record import RunRecord, SceneRecord

if TYPE_CHECKING:
    import geopandas
    import xarray

    Array = np.ndarray | xarray.DataArray

JobLike = Job | Mapping[str, Any] | str | Path
"""A job: as it is, as plain values, or the path of its YAML file."""


class Run:
    """A finished run: its tables, label maps and page."""

    def __init__(self, folder: RunFolder, record: RunRecord) -> None:
        """Of a folder and its record; `run` and `open_run` make these."""
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
                lambda box: np.asarray(stored[box.slices]), geometry, np.dtype(stored.dtype), name=name
            )
        elif name in record.files:
            array = open(join(self.path, record.files[name])).to_xarray().isel(band=0, drop=True)
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
        if name is None and len(self.record.done) == 1:
            return self.record.done[0]
        for scene in self.record.done:
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
        for scene in [] if is_url(self.path) else self.record.done[:count]:
            picture = Path(self.path) / scene.files.get("preview", "-")
            if picture.is_file():
                data = base64.b64encode(picture.read_bytes()).decode()
                name = html.escape(scene.name, quote=True)
                source = f"data:image/png;base64,{data}"
                yield f"<img alt='{name}' title='{name}' style='max-width:32em' src='{source}'>"


def run(job: JobLike, *, progress: Callable[[Progress], None] | None = None, **changes: Any) -> Run:
    """Run a job in this process: segment, measure, export and report; run it again to resume.

    Args:
        job: a `Job`, plain values of one, or the path of a YAML file.
        progress: called after each block and each scene; None: nobody is told.
        **changes: keys of the job over those given; a mapping changes only the keys that it has, e.g.
            ``run("job.yaml", compute={"batch": 4})``.

    Returns:
        The run; scenes that failed are in `Run.failed`, the others are done.

    Raises:
        RequestError: the job is wrong; nothing was started.
    """
    resolved = check_request(as_job(job, changes))
    return Run(*run_local(resolved, progress or (lambda step: None)))


def plan(job: JobLike, **changes: Any) -> list[ScenePlan]:
    """Say what a job would take, scene by scene, without doing it.

    Args:
        job: as for `run`.
        **changes: as for `run`.

    Returns:
        The plan of each scene; one that cannot be planned says why.

    Raises:
        RequestError: the job is wrong.
    """
    return list(plan_scenes(check_request(as_job(job, changes))))


def open(uri: str | Path, *, bands: Sequence[str] = ()) -> Source:
    """Open a scene lazily: its shape, geometry, bands, `Source.read` and `Source.to_xarray`.

    Args:
        uri: as in a job's `scenes`, but one scene; see `segpipe.sources.open_source`.
        bands: names of the channels in file order, over those of the file.

    Raises:
        SceneError: it is missing, damaged, or of a kind that cannot be a scene.
    """
    return open_source(str(uri), band_names=bands)


def open_run(path: str | Path) -> Run:
    """A run that ended before, by its folder or URL.

    Raises:
        RequestError: no run lies there.
    """
    return Run(*load_run(str(path)))


def predict(
    image: Array | str | Path, *, model: str | Path, scores: bool = False, volume: bool = False, **job: Any
) -> xarray.DataArray:
    """Segment one image and return its label map.

    Args:
        image: (y, x), (c, y, x) or, of a volume, (z, y, x), (c, z, y, x); a DataArray says where it is; or a
            file or URL, as in a job's `scenes`.
        model: path of a model card, or the name of one that comes with segpipe.
        scores: return the probability of each class instead, (class, …) float32.
        volume: the last three axes of an array are space.
        **job: further keys of a job, such as ``bands`` or ``tiling={"blend": "gaussian"}``.

    Returns:
        Class values on the native grid, in memory; names by value in ``attrs["classes"]``.

    Raises:
        RequestError, SceneError: the image does not suit the model.
    """
    with _temporary(model=str(model), **job) as (fields, stack):
        fields["scenes"] = [_address(image, volume, stack)]
        fields["outputs"] |= {"scores": scores, "formats": []}
        found = _only(run(fields))
        if not scores:
            return found.labels().load()
        record = found._scene(None)
        stage = Stage(found._folder.out, record.keys["predict"])
        labels, stored = found.labels(), stage.array("scores")
        names = [c.name for c in found.record.legend]
        geometry = geometry_from_dict(stage.read_json("stage.json")["geometry"])
        return _scores(stored, geometry, names, labels.attrs)


def _scores(stored: Any, geometry: Geometry, names: list[str], attrs: Mapping[str, Any]) -> xarray.DataArray:
    array = lazy_array(
        lambda box: np.asarray(stored[(slice(None), *box.slices)]),
        geometry,
        np.dtype("float32"),
        names,
        "scores",
    )
    return array.rename(band="class").assign_attrs(classes=attrs["classes"]).load()


def prompt(
    image: Array | str | Path,
    *,
    model: str | Path,
    text: str | Sequence[str] = (),
    boxes: str | Path | geopandas.GeoDataFrame | None = None,
    points: str | Path | geopandas.GeoDataFrame | None = None,
    volume: bool = False,
    out: str | Path | None = None,
    **job: Any,
) -> Run:
    """Segment the objects that phrases, boxes or points name.

    Args:
        image: as for `predict`.
        model: card of a promptable model, by path or name.
        text: phrases; they need ``prompts={"grounder": CARD}``.
        boxes: file or GeoDataFrame of boxes or polygons around objects.
        points: file or GeoDataFrame of points: `label` 1 in the object, 0 beside it.
        volume: as for `predict`.
        out: where the run and the embeddings stay, so that the next prompt encodes nothing; None: a
            temporary folder, which is deleted with the returned object.
        **job: further keys of a job.

    Returns:
        The run: `Run.objects` has a row per object, ``Run.labels(ids=True)`` their ids.

    Raises:
        RequestError, SceneError: nothing is asked for, or it does not suit the model.
    """
    if boxes is not None and points is not None:
        raise RequestError("boxes, points: give one file: it may hold both")
    prompts = dict(job.pop("prompts", {}))
    if text:
        prompts["text"] = [text] if isinstance(text, str) else list(text)
    with ExitStack() as stack:
        given = boxes if boxes is not None else points
        if given is not None:
            prompts["path"] = _layer(given, stack)
        fields = {"name": "prompt", "model": str(model), "prompts": prompts, **job}
        fields["scenes"] = [_address(image, volume, stack)]
        if out is None:
            return _run_in_temporary(fields)
        fields["outputs"] = {**fields.get("outputs", {}), "dir": str(out)}
        return _only(run(fields))


def measure(
    labels: Array | str | Path,
    *,
    regions: str | Path | geopandas.GeoDataFrame | Mapping[str, Any] | None = None,
    reference: Array | str | Path | None = None,
    image: Array | str | Path | None = None,
    classes: Mapping[int, str] | str | None = None,
    volume: bool = False,
    **job: Any,
) -> Run:
    """Measure a label map that exists: area or volume per region and class, and overlap with a reference.

    Args:
        labels: whole numbers (y, x) or, of a volume, (z, y, x); a DataArray says where it is; or a file.
        regions: a vector layer or label atlas, a GeoDataFrame (its column `name` names them),
            ``grid:1000``, or the job's `regions` as a mapping; None: the whole scene.
        reference: the ground truth, on the grid of the labels.
        image: the pixels behind the labels, for pictures and intensities; None: the labels themselves.
        classes: name by value; or a CSV or YAML file; None: the values that are found.
        volume: the last three axes of arrays are space.
        **job: further keys of a job, such as ``measure={"surface": True}``.

    Returns:
        The run: `Run.regions`, `Run.metrics`. Its temporary folder is deleted with the object.

    Raises:
        RequestError, SceneError: grids or values do not go together.
    """
    with ExitStack() as stack:
        fields: dict[str, Any] = {"name": "measure", **job}
        fields["outputs"] = {"formats": [], **fields.get("outputs", {})}
        fields["labels"] = _address(labels, volume, stack)
        fields["scenes"] = [_address(labels if image is None else image, volume, stack)]
        if reference is not None:
            fields["reference"] = {**fields.get("reference", {}), "path": _address(reference, volume, stack)}
        if isinstance(regions, Mapping):
            fields["regions"] = dict(regions)
        elif regions is not None:
            named = {"name": "name"} if "name" in getattr(regions, "columns", ()) else {}
            fields["regions"] = {"path": _layer(regions, stack), **named}
        if isinstance(classes, str):
            fields["classes"] = classes
        elif classes is not None:
            fields["classes"] = _class_file(classes, stack)
        return _run_in_temporary(fields)


def as_job(job: JobLike, changes: Mapping[str, Any] | None = None) -> Job:
    """A job from what people have, with some keys changed.

    Raises:
        RequestError: every mistake, one a line, with its path and what would be valid.
    """
    if isinstance(job, Job):
        data, origin = job.model_dump(mode="json"), "job"
    elif isinstance(job, (str, Path)):
        data, origin = read_yaml(job), str(job)
    else:
        data, origin = dict(job), "job"
    return validate(Job, _merged(data, changes or {}), origin)


def _merged(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(data)
    for key, value in changes.items():
        inside = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(inside, Mapping)
        merged[key] = _merged(inside, value) if both and isinstance(inside, Mapping) else value
    return merged


@contextmanager
def _temporary(**job: Any) -> Iterator[tuple[dict[str, Any], ExitStack]]:
    """Fields of a job whose results are read before its folder is deleted."""
    with tempfile.TemporaryDirectory(prefix="segpipe-") as place, ExitStack() as stack:
        yield {"name": "predict", **job, "outputs": {**job.get("outputs", {}), "dir": place}}, stack


def _address(image: Array | str | Path, volume: bool, stack: ExitStack) -> str:
    """What a job calls an image: its path, or the address of an array that is held meanwhile."""
    if isinstance(image, (str, Path)):
        return str(image)
    values, geometry, bands, valid = array_parts(image, volume)
    return stack.enter_context(hold(values, geometry, bands, valid))


def _layer(layer: str | Path | geopandas.GeoDataFrame, stack: ExitStack) -> str:
    """The path of a vector layer; a GeoDataFrame is written to one."""
    if isinstance(layer, (str, Path)):
        return str(layer)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="segpipe-layer-"))
    path = Path(folder) / "layer.gpkg"
    layer.to_file(path)
    return str(path)


def _class_file(classes: Mapping[int, str], stack: ExitStack) -> str:
    path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="segpipe-"))) / "classes.csv"
    pd.DataFrame({"value": list(classes), "name": list(classes.values())}).to_csv(path, index=False)
    return str(path)


def _run_in_temporary(fields: dict[str, Any]) -> Run:
    """The run of one scene in a folder that lives as long as the returned object."""
    place = tempfile.mkdtemp(prefix="segpipe-")
    try:
        found = _only(run(fields, outputs={"dir": place}))
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    weakref.finalize(found, shutil.rmtree, place, ignore_errors=True)
    return found


def _only(found: Run) -> Run:
    """The run of one scene.

    Raises:
        SceneError: it failed.
    """
    for error in found.failed.values():
        raise SceneError(error)
    return found
