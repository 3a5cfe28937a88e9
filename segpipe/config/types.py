"""Kinds of values that every configuration is made of: strict models, sizes and texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from segpipe.redact import SecretUri, seal


def as_text(value: object) -> object:
    """YAML reads ``512`` as a number; the field is text."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


SIZE = r"(\d+|\d+x\d+|\d+x\d+x\d+)"
AutoSize = Annotated[str, Field(pattern=rf"^(auto|{SIZE})$"), BeforeValidator(as_text)]
"""``auto``, one number for all axes, or one per axis in array order: ``512``, ``96x128x128``."""
AutoNumber = Annotated[str, Field(pattern=r"^(auto|[1-9]\d*)$"), BeforeValidator(as_text)]
WindowSize = Annotated[str, Field(pattern=rf"^(auto|whole|{SIZE})$"), BeforeValidator(as_text)]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
"""Text that may be left out, empty or null. A form shows a plain box, where a union would be two tabs."""


def _sealed(value: object, check: ValidatorFunctionWrapHandler) -> str:
    return value if isinstance(value, SecretUri) else seal(check(value))


Address = Annotated[str, WrapValidator(_sealed)]
"""A path or URL; a secret in it is known to `segpipe.redact.reveal` only."""
AddressText = Annotated[Text, WrapValidator(_sealed)]
"""The same, or empty."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A name that is safe as a folder's."""
Several = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
"""A list that may be given as its one text."""
Memory = Annotated[str, Field(pattern=r"^\d+(\.\d+)?\s?(MiB|GiB|TiB)$"), BeforeValidator(as_text)]


_WORDS = {"crs": "CRS", "iou": "IoU", "tta": "Test-time augmentation", "dir": "Folder"}


def _titled(schema: dict[str, Any]) -> None:
    """A form shows the name of a field, where it would show its type's."""
    for name, node in schema.get("properties", {}).items():
        text = " ".join(_WORDS.get(word, word) for word in name.split("_"))
        node["title"] = text[:1].upper() + text[1:]


def form(*fields: str) -> Callable[[dict[str, Any]], None]:
    """For `json_schema_extra`: a form that shows these fields, in this order, and no others."""

    def arrange(schema: dict[str, Any]) -> None:
        _titled(schema)
        schema["properties"] = {name: schema["properties"][name] for name in fields}
        schema["required"] = [name for name in fields if name in schema.get("required", ())]

    return arrange


class Strict(BaseModel):
    """Unknown keys are mistakes; values don't change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_enum_values=False, allow_inf_nan=False, json_schema_extra=_titled
    )
