"""A job held against the world before any work starts, the fingerprint of what its results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path
from typing import Any

from segpipe import ANSWER_VERSION, ENGINE_VERSION
from segpipe.config.card import Card, Class, WindowZscore, read_card
from segpipe.config.classes import load_classes
from segpipe.config.job import TTA, Blend, Identity, Job, parse_size
from segpipe.config.loading import apply_overrides, load_groups, read_yaml, validate
from segpipe.errors import RequestError
from segpipe.inference.settings import NO_MODEL, Settings, resolve_settings
from segpipe.models.registry import build_network, check_card, load_model, load_object_model
from segpipe.pipeline.measure import TALLY_VERSION
from segpipe.pipeline.plan_scene import model_parts
from segpipe.pipeline.surfaces import tolerances
from segpipe.prompts.phrases import phrase_classes
from segpipe.redact import address, seal, whole
from segpipe.regions import check_regions
from segpipe.regions.base import is_grid
from segpipe.runs.plan import check_scenes
from segpipe.sources import SceneRef, discover
from segpipe.sources.base import matches
from segpipe.sources.identity import file_identity, input_identity, members
from segpipe.sources.mosaic import MOSAIC
from segpipe.sources.remote import is_remote
from segpipe.sources.stack import STACK, stack_files
from segpipe.sources.uri import PACKAGE, package_file
from segpipe.store.location import check_writable, is_url, join


@dataclass(frozen=True, kw_only=True)
class ResolvedJob:
    """A job that can run: checked once, then handed on to every step. Small and picklable."""

    job: Job
    card: Card | None
    """The model's card, with the bands that prompts show it; None: labels are measured as given."""
    settings: Settings
    """What `auto` is on this machine."""
    scenes: tuple[SceneRef, ...] = ()
    fingerprint: str = ""
    """Of everything that the results depend on."""

    def without_scenes(self) -> ResolvedJob:
        """What one step of one scene needs: ten thousand references do not travel with each task."""
        return replace(self, scenes=())

    def with_batch(self, batch: int) -> ResolvedJob:
        """The same with other batches, for a device that is too small for those planned."""
        return replace(self, settings=replace(self.settings, batch=batch))


def check_request(job: Job) -> ResolvedJob:
    """Find the scenes and reject, before any work, whatever can be known to be wrong.

    Raises:
        RequestError: naming the field, what was found and what would be valid.
    """
    resolved = check_job(job)
    scenes = tuple(discover(job.scenes))
    if job.measure.groups:
        load_groups(job.measure.groups, [scene.name for scene in scenes])
    check_writable(job.outputs.dir)
    mark = fingerprint(job, resolved.card, resolved.settings, scenes)
    request = replace(resolved, scenes=scenes, fingerprint=mark)
    if not _has_ended(request):
        check_network(request)
        check_scenes(request)
    return request


def _has_ended(request: ResolvedJob) -> bool:
    """Whether there is a run of this request: what it was checked for is as it was."""
    folder = join(request.job.outputs.dir, request.job.name)
    if not is_url(folder) and not Path(folder).is_dir():
        return False  # opening it would make it
    from segpipe.runs.find_run import open_run  # it loads what makes pages

    return open_run(request.job, request.fingerprint)[1] is not None


def check_network(resolved: ResolvedJob) -> None:
    """Build the network of a card that answers without prompts: its weights are read and must fit.

    Where this process computes it is kept for that (`segpipe.models.registry.load_model`).

    Raises:
        RequestError: the weights are damaged or of another network, or the network does not take what the
            card says.
    """
    card, settings = resolved.card, resolved.settings
    if card is None or card.answers_prompts:
        return
    if resolved.job.compute.clustered:
        import torch

        build_network(card, torch.device("cpu"), 1)
    elif card.output.kind == "semantic":
        how = settings.device, settings.threads, settings.precision
        load_model(card, *how, compile=settings.compile)
    else:
        load_object_model(card, settings.device, settings.threads, settings.precision)


def check_job(job: Job) -> ResolvedJob:
    """Reject what is wrong with a job whatever its scenes; those are left out of what is returned.

    Raises:
        RequestError: naming the field, what was found and what would be valid.
    """
    _check_paths(job)
    card, settings = None, NO_MODEL
    classes = load_classes(job.classes) if job.classes else ()
    if job.kind == "prompted":
        from segpipe.prompts.prompt_scene import check_prompts  # loads torch

        card = check_prompts(job)
        settings = resolve_settings(job.compute, card)
        classes = phrase_classes(job.prompts)
    elif job.kind == "predicted":
        card = read_card(job.model)
        _check_kind(card)
        check_card(card)
        _check_tiling(job, card)
        _check_objects(job, card)
        settings = resolve_settings(job.compute, card)
        classes = tuple(card.classes)
    if card is not None:
        _check_ids(job, classes)
    tolerances(job.measure, classes)
    return ResolvedJob(job=job, card=card, settings=settings)


def _check_kind(card: Card) -> None:
    """A job without prompts needs a model that answers without."""
    if card.output.kind == "prompted":
        raise RequestError(
            f"prompts: {card.name!r} answers prompts: give it `prompts.text`, `path`, `earlier` or "
            "`everything`"
        )
    if card.output.kind == "boxes":
        raise RequestError(
            f"model: {card.name!r} finds boxes of phrases: give it as `prompts.grounder`, and a promptable "
            "model"
        )


def _check_objects(job: Job, card: Card) -> None:
    """A reference of objects needs a model that finds some."""
    divisor = bool(job.reference and job.reference.divisor)
    asked = {"measure.objects": job.measure.objects, "reference.divisor": divisor}
    if card.output.kind == "semantic":
        for field in [name for name, value in asked.items() if value]:
            raise RequestError(
                f"{field}: {card.name!r} yields a class for every element, no objects: leave it out, or "
                "give a card whose output.kind is instance or panoptic"
            )


def _check_ids(job: Job, classes: Sequence[Class]) -> None:
    """Ids of a reference are of one class, or say theirs."""
    objects = [c.name for c in classes if not c.background]
    if job.measure.objects and not (job.reference and job.reference.divisor) and len(objects) > 1:
        raise RequestError(
            f"measure.objects: ids alone do not say which of {', '.join(objects)} an object is: give a "
            "reference whose values are class × divisor + number, and `reference.divisor`"
        )


def _check_tiling(job: Job, card: Card) -> None:
    """Sizes that suit no scene of the card's kind, or that the card forbids."""
    tiling, stride = job.tiling, card.window.stride
    if card.output.kind != "semantic":
        in_vain = {
            "tiling.blend": tiling.blend is not Blend.trim,
            "compute.tta": job.compute.tta is not TTA.none,
            "compute.compile": job.compute.compile,
            "outputs.scores": job.outputs.scores,
            "outputs.uncertainty": job.outputs.uncertainty,
        }
        for field in [name for name, asked in in_vain.items() if asked]:
            raise RequestError(f"{field}: {card.name!r} finds objects, not scores by class: leave it out")
        if tiling.halo != "auto" and 0 in parse_size(tiling.halo, card.ndim, "tiling.halo"):
            raise RequestError(
                f"tiling.halo: found {tiling.halo}; {card.name!r} finds objects, which are joined by what "
                "neighbouring windows both see: valid: auto, or elements above 0"
            )
    if tiling.window != "auto":
        by_window = any(isinstance(s, WindowZscore) for s in card.input.normalisation)
        if card.window.fixed or by_window:
            why = "takes its own size only" if card.window.fixed else "normalises by the whole scene"
            raise RequestError(f"tiling.window: found {tiling.window}; {card.name!r} {why}: valid: auto")
    for field in ("window", "halo", "block"):
        value = getattr(tiling, field)
        if value in ("auto", "whole"):
            continue
        sizes = parse_size(value, card.ndim, f"tiling.{field}")
        if field == "window" and any(n % stride for n in sizes):
            raise RequestError(
                f"tiling.window: found {value}; valid: multiples of {stride}, the model's total stride"
            )


def _check_paths(job: Job) -> None:
    """What every scene is measured with; what lies behind a URL or in a glob shows when it is read."""
    paths = {
        "labels": job.labels,
        "regions.path": job.regions.path if job.regions else "",
        "reference.path": job.reference.path if job.reference else "",
        "prompts.earlier": job.prompts.earlier,
    }
    if job.regions and is_grid(job.regions.path):
        del paths["regions.path"]
    for field, path in paths.items():
        if not path or is_url(path) or has_magic(path) or path.startswith("/vsi"):
            continue
        try:
            there = Path(path).exists()
        except OSError as error:  # too long, a loop of links, not permitted
            raise RequestError(f"{field}: {path[:200]} cannot be looked up: {error.strerror}") from error
        if not there:
            raise RequestError(f"{field}: {path} does not exist (seen from the working folder)")
    if job.regions:
        check_regions(job.regions)


def fingerprint(job: Job, card: Card | None, settings: Settings, scenes: Sequence[SceneRef]) -> str:
    """Hash of everything a run's results depend on: what was asked, the model, and the inputs' state.

    Runner, workers, memory and block size are left out: they change no result.
    """
    asked = job.model_dump(mode="json")
    for key in ("runner", "workers", "least", "address", "cluster", "retries", "batch_minutes"):
        asked["compute"].pop(key)
    for key in ("memory", "block", "store"):
        asked["tiling"].pop(key)
    outputs = asked["outputs"]
    asked["outputs"] = {k: outputs[k] for k in ("formats", "scores", "uncertainty")}
    asked["outputs"] |= {"hide_paths": True} if outputs["hide_paths"] else {}  # other texts, another folder
    files, prompts = [s.uri for s in scenes], job.prompts
    asked["prompts"].pop("cache")
    asked.pop("identity")  # what it asks of the inputs is said below
    grounder = read_card(prompts.grounder) if prompts.grounder else None
    if job.regions is not None:
        files += [job.regions.path, *([job.regions.name] if job.regions.name else [])]
    if job.reference is not None:
        files += [job.reference.path]
    files += [path for path in (job.labels, job.classes, job.measure.groups, prompts.path) if path]
    files += [prompts.earlier] if prompts.earlier else []
    parts = {
        "asked": asked,
        "model": model_parts(card) if card else None,
        "card": card.model_dump(mode="json") if card else None,
        "grounder": [grounder.model_dump(mode="json"), model_parts(grounder)] if grounder else None,
        "settings": [settings.device_class, settings.precision, settings.batch],
        "inputs": [_state(uri, job.identity) for uri in files],
        "versions": [ENGINE_VERSION, TALLY_VERSION, *([ANSWER_VERSION] if job.kind == "prompted" else [])],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _state(uri: str, how: Identity) -> list[Any]:
    """A path with what tells that it changed: the identity of the file, or of a folder's or glob's files."""
    if uri.startswith(STACK):
        return [uri, *(_state(part, how) for part in stack_files(uri))]
    if is_remote(uri):
        return [address(uri), *input_identity(seal(whole(uri).split("#")[0]), how)]
    location = uri.removeprefix(MOSAIC).split("#")[0]
    if location.startswith(PACKAGE):
        location = str(package_file(location))
    if Path(location).exists():
        return [uri, *input_identity(location, how)]
    files = [] if is_url(location) else [m for p in matches(location) if p.is_file() for m in members(p)]
    return [uri, *file_identity(files, how)]


QUESTION = ("text", "path", "layer", "crs", "earlier", "earlier_ids", "names", "everything")
"""Fields of `prompts` that say what is asked, not how."""


def asked_job(
    what: str,
    text: Sequence[str],
    grounder: str,
    path: str,
    threshold: float | None,
    overrides: Sequence[str],
) -> Job:
    """A job with its question.

    Args:
        what: a job's file, whose own question stays where none is given; or a run's folder or URL, whose
            question goes where another one is given.
        text: phrases.
        grounder: card; empty: the job's.
        path: file of points, boxes or polygons; empty: none.
        threshold: of phrases; None: the job's.
        overrides: ``a.b=value`` items, which come last.

    Raises:
        RequestError: there is neither a job nor a run, or nothing is asked.
    """
    if what.endswith((".yaml", ".yml")):
        data = read_yaml(what)
    else:
        from segpipe.runs.find_run import load_run

        data = load_run(what)[1].job
    asked: dict[str, Any] = dict(data.get("prompts") or {})
    if (text or path) and not what.endswith((".yaml", ".yml")):
        asked = {k: v for k, v in asked.items() if k not in QUESTION}
    asked |= {"text": list(text)} if text else {}
    asked |= {"grounder": grounder} if grounder else {}
    asked |= {"path": path} if path else {}
    asked |= {"threshold": threshold} if threshold is not None else {}
    if not asked.get("text"):
        asked.pop("grounder", None)  # kept by a run that was asked in words
    data = {**data, "prompts": asked}
    apply_overrides(data, overrides)
    job = validate(Job, data, what)
    if not job.prompts.asked:
        raise RequestError(
            f"{what}: nothing is asked: give --text, --points, --boxes, or `prompts` in the job"
        )
    return job
