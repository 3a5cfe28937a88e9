"""The Python door: run, plan, open, predict, prompt and measure, in this process and without Prefect.

Everything here is exported by the package, lazily: ``import segpipe; segpipe.run("job.yaml")``.
"""

from __future__ import annotations

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
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import geometry_from_dict
from segpipe.runs.check import check_request
from segpipe.runs.find_run import load_run
from segpipe.runs.finished import Run
from segpipe.runs.local import Progress, run_local
from segpipe.runs.plan import ScenePlan, plan_scenes
from segpipe.sources import Source, open_source
from segpipe.sources.arrays import array_parts, lazy_array
from segpipe.sources.memory import hold
from segpipe.store.stage import Stage
from segpipe.tables.table_files import csv_bytes

if TYPE_CHECKING:
    import geopandas
    import xarray

    Array = np.ndarray | xarray.DataArray

JobLike = Job | Mapping[str, Any] | str | Path
"""A job: as it is, as plain values, or the path of its YAML file."""


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
        stage = Stage(found._folder.out, found._scene(None).keys["predict"])
        geometry = geometry_from_dict(stage.read_json("stage.json")["geometry"])

        def read(box: Box) -> np.ndarray:
            return stage.read("scores", (slice(None), *box.slices))

        names = [c.name for c in found.record.legend]
        array = lazy_array(read, geometry, np.dtype("float32"), names, "scores")
        return array.rename(band="class").assign_attrs(classes=found.labels().attrs["classes"]).load()


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
    path.write_bytes(csv_bytes(pd.DataFrame({"value": list(classes), "name": list(classes.values())})))
    return str(path)


def _run_in_temporary(fields: dict[str, Any]) -> Run:
    """The run of one scene in a folder that lives as long as the returned object."""
    with ExitStack() as unless_done:
        place = tempfile.mkdtemp(prefix="segpipe-")
        unless_done.callback(shutil.rmtree, place, ignore_errors=True)
        found = _only(run(fields, outputs={"dir": place}))
        unless_done.pop_all()
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
