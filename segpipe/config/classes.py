"""Classes of label maps that came without a model: from a file, or the values that were found."""

from __future__ import annotations

import colorsys
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from segpipe.config.card import Class
from segpipe.config.cells import CSV_ERRORS, plain_cell
from segpipe.config.loading import read_yaml, validate
from segpipe.errors import RequestError

LARGEST_VALUE = 2**31 - 1
BACKGROUND = 0
"""The value that is background where a file of classes does not say."""
_TURN = 0.6180339887498949
"""Golden section: hues of consecutive values lie far apart."""


class LabelClass(Class):
    """A class of a given label map; colour and background may be left out."""

    value: int = Field(ge=0, le=LARGEST_VALUE, description="Value in label maps.")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        data = {k: v for k, v in data.items() if v not in (None, "")}
        try:
            value = int(data.get("value", ""))
        except (TypeError, ValueError):
            return data  # the field's own check says what is wrong
        if not 0 <= value <= LARGEST_VALUE:
            return data
        return {"color": color_of(value), "background": value == BACKGROUND, **data}


class _ClassFile(BaseModel):
    """What is read of a YAML file of classes; a model card is one."""

    classes: list[LabelClass] = Field(min_length=1, description="A list of value, name, color, background.")

    @model_validator(mode="after")
    def _values_differ(self) -> _ClassFile:
        values = [c.value for c in self.classes]
        twice = sorted({v for v in values if values.count(v) > 1})
        if twice:
            raise ValueError(f"classes: a value stands once; found twice: {', '.join(map(str, twice))}")
        names = [c.name for c in self.classes]
        if same := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"classes: a name stands once; found twice: {', '.join(same)}")
        return self


def load_classes(path: str) -> tuple[Class, ...]:
    """Classes of a CSV with the columns value, name (, color, background), or of a YAML file.

    YAML is a mapping of value to name, or has a list ``classes`` as a model card has.

    Raises:
        RequestError: the file or a class is wrong; names it and what would be valid.
    """
    lower = path.lower()
    if lower.endswith(".csv"):
        data: dict[Any, Any] = {"classes": _csv_rows(path)}
    elif lower.endswith((".yaml", ".yml")):
        data = read_yaml(path)
        if "classes" not in data:
            data = {"classes": [{"value": value, "name": str(name)} for value, name in data.items()]}
    else:
        raise RequestError(f"classes: found {path}; give a CSV with columns value,name or a YAML file")
    return tuple(validate(_ClassFile, {"classes": data["classes"]}, path).classes)


def _csv_rows(path: str) -> list[dict[str, str]]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        reader = csv.DictReader(text.splitlines(), skipinitialspace=True)
        columns = reader.fieldnames = [c.strip() for c in reader.fieldnames or ()]
        rows = list(reader)
    except CSV_ERRORS as error:
        why = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        reason = getattr(error, "strerror", None) or why
        raise RequestError(f"classes: {path} cannot be read ({reason}); give a CSV or YAML file") from error
    if not {"value", "name"} <= set(columns):
        raise RequestError(
            f"classes: {path} has columns {', '.join(columns) or 'none'}; "
            "needed: value, name (, color, background)"
        )
    known = ("value", "name", "color", "background")
    return [{k: plain_cell((row[k] or "").strip()) for k in known if k in row} for row in rows]


def with_found(listed: Sequence[Class], values: Iterable[int]) -> tuple[Class, ...]:
    """The classes listed, then a class for each further value, named by its number."""
    known = {c.value for c in listed}
    names = {BACKGROUND: "background"}
    more = (LabelClass(value=v, name=names.get(v, str(v))) for v in sorted(set(values) - known))  # type: ignore[call-arg]
    return (*listed, *more)


def color_of(value: int) -> str:
    """A colour of a value that has none: always the same, and unlike its neighbours'; 0 is black."""
    if value == BACKGROUND:
        return "#000000"
    lightness = (0.45, 0.6, 0.35)[value % 3]
    parts = colorsys.hls_to_rgb(value * _TURN % 1.0, lightness, 0.7)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)
