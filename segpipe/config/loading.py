"""Files held against what is asked of them: every mistake told with its path and what would be valid."""

from __future__ import annotations

import csv
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from segpipe.config.cells import CSV_ERRORS, plain_cell
from segpipe.config.parsing import parse_yaml
from segpipe.errors import RequestError


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file, by the safe loader.

    Raises:
        RequestError: no such file, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL, text that is not UTF-8
        text_error = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        reason = getattr(error, "strerror", None) or text_error
        raise RequestError(f"{path}: cannot be read ({reason}); give the path of a YAML file") from error
    try:
        data = parse_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise RequestError(f"{path}:{where} is not valid YAML: {problem}") from error
    if not isinstance(data, dict):
        raise RequestError(f"{path}: found {type(data).__name__}, a mapping of keys was expected")
    return data


ModelT = TypeVar("ModelT", bound=BaseModel)


def load(model: type[ModelT], path: str | Path, overrides: Sequence[str] = ()) -> ModelT:
    """Read and validate a YAML file; ``overrides`` are ``a.b=value`` items, see `apply_overrides`.

    Raises:
        RequestError: every mistake, one a line, with its path and what would be valid.
    """
    data = read_yaml(path)
    apply_overrides(data, overrides)
    return validate(model, data, str(path))


def validate(model: type[ModelT], data: Mapping[str, Any], origin: str) -> ModelT:
    """Validate a mapping, with mistakes told in the words of the file.

    Raises:
        RequestError: one line a mistake: ``file: path: what was found; what is valid``.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [f"{origin}: {_explain(model, dict(e))}" for e in error.errors()]
        raise RequestError("\n".join(lines)) from error


def as_request(model: type[ModelT], given: ModelT | Mapping[str, Any], origin: str) -> ModelT:
    """A request as a model: as it is, or the plain values that a form or schedule sends.

    Raises:
        RequestError: as `validate`.
    """
    return given if isinstance(given, model) else validate(model, dict(given), origin)


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set ``a.b=value`` items in a nested mapping.

    Raises:
        RequestError: an item without ``=``, or below a value.
    """
    for item in overrides:
        key, sign, value = item.partition("=")
        item = item if item.isprintable() else ascii(item)  # an error is one line
        if not sign or not key.strip():
            raise RequestError(f"--set {item}: found no `key=value`; e.g. --set tiling.window=256")
        *parents, last = key.strip().split(".")
        inner = data
        for part in parents:
            inner = inner.setdefault(part, {})
            if not isinstance(inner, dict):
                raise RequestError(f"--set {item}: `{part}` is a value, it has no keys")
        try:
            inner[last] = parse_yaml(value)
        except yaml.YAMLError as error:
            raise RequestError(f"--set {item}: {value!r} is not a YAML value") from error


def _explain(model: type[BaseModel], error: dict[str, Any]) -> str:
    """One pydantic error as ``path: what was found; what is valid there``."""
    loc: tuple[str | int, ...] = error["loc"]
    path = ".".join(str(part) for part in loc)
    path = path if path.isprintable() else ascii(path)
    found = error["input"]
    if error["type"] == "extra_forbidden":
        valid = sorted(_model_at(model, loc[:-1]).model_fields)
        close = difflib.get_close_matches(str(loc[-1]), valid, n=1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        return f"{path}: unknown key; {hint}valid keys: {', '.join(valid)}"
    if error["type"] == "missing":
        return f"{path}: missing; {_describe(model, loc)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    if not path:
        return message
    if error["type"] in ("string_pattern_mismatch", "too_short"):
        return f"{path}: found {found!r}; {_describe(model, loc)}"
    return f"{path}: found {found!r}; {message[:1].lower()}{message[1:]}"


def _field_at(model: type[BaseModel], loc: Sequence[str | int]) -> FieldInfo | None:
    """The field a location names, looking through lists and optional models."""
    field: FieldInfo | None = None
    for part in loc:
        if isinstance(part, int):
            continue
        field = model.model_fields.get(part)
        if field is None:
            return None
        inner = _models_in(field.annotation)
        if inner:
            model = inner[0]
    return field


def _model_at(model: type[BaseModel], loc: Sequence[str | int]) -> type[BaseModel]:
    field = _field_at(model, loc)
    inner = _models_in(field.annotation) if field else []
    return inner[0] if inner else model


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models_in(a)]


def _describe(model: type[BaseModel], loc: Sequence[str | int]) -> str:
    field = _field_at(model, loc)
    text = field.description if field else None
    return f"valid: {text}" if text else "see the documentation of this key"


FIELD = "measure.groups"


def load_groups(path: str, scenes: Iterable[str]) -> dict[str, str]:
    """Scene to group, of a CSV with the columns scene and group.

    Raises:
        RequestError: the file cannot be read, lacks a column, or a scene of the run is not in it or twice.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except CSV_ERRORS as error:
        raise RequestError(f"{FIELD}: {path} cannot be read: {error}") from error
    columns = list(rows[0]) if rows else []
    if not {"scene", "group"} <= set(columns):
        raise RequestError(f"{FIELD}: {path} has the columns {columns}; valid: scene,group and a row a scene")
    found: dict[str, str] = {}
    for row in rows:
        scene, group = (plain_cell(row[name] or "") for name in ("scene", "group"))
        if found.setdefault(scene, group) != group:
            raise RequestError(f"{FIELD}: {path} has {scene!r} in two groups; valid: one")
    missing = [scene for scene in scenes if not found.get(scene)]
    if missing:
        raise RequestError(f"{FIELD}: {path} has no group for {missing[0]!r}; every scene needs one")
    return {scene: found[scene] for scene in scenes}
