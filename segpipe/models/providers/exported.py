"""``torch.export`` programs (.pt2): a graph of ATen operators, and only what was checked reaches PyTorch.

`torch.export.load` warns that it runs what a file says: it unpickles example inputs and some tensors, hands
shape expressions to sympy's ``eval``, names of values to generated Python code, and loads compiled
libraries. So the file is read here as a plain zip, its graph is held against closed lists, and a new archive
of it is written in memory: the graph without traces of source code, guards or example inputs, and tensors as
raw bytes.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.base import Network
from segpipe.models.card_checks import only_arguments
from segpipe.models.network import other_channels
from segpipe.models.weights import resolve_weights

FUNCTIONS = frozenset(
    {"Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "Float", "FloatTrueDiv"}
    | {"FloorDiv", "FloorToInt", "Ge", "GreaterThan", "Gt", "IntTrueDiv", "Integer", "Le", "LessThan", "Lt"}
    | {"Max", "Min", "Mod", "ModularIndexing", "Mul", "Ne", "Not", "Or", "Pow", "PowByNatural", "PythonMod"}
    | {"Rational", "RoundToInt", "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToInt"}
    | {"Unequality", "ceiling", "false", "floor", "true"}
)
"""What a shape expression may call: sympy's and torch's arithmetic."""

_TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+"
    r"|_operator\.(add|sub|mul|truediv|floordiv|mod|neg|pow|eq|ne|lt|le|gt|ge|and_|or_|getitem)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(int|float|max|min|not|ite)",
    re.ASCII,
)
_PLAIN = re.compile(r"[\w.+:-]*", re.ASCII)
"""Names, versions, devices: with these characters nothing can be called in generated code."""
_PAYLOAD = re.compile(r"(weight|tensor)_\d+", re.ASCII)
_SYMBOL = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_BANNED = ("as_graph", "as_custom_obj", "as_operator")
_LEAF: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
_FOLDERS = (
    ("data/weights/", "model_weights_config.json"),
    ("data/constants/", "model_constants_config.json"),
)
_PARTS = ("archive_format", "archive_version", "byteorder", ".data/version")
_ROOT = "program/"


class UnsafeProgramError(Exception):
    """A program that is not of the plain kind that segpipe loads; the text says what was found."""


UNREADABLE = (
    zipfile.BadZipFile, zlib.error, KeyError, ValueError, TypeError, AttributeError, IndexError, EOFError,
    RuntimeError, OverflowError,
)  # fmt: skip
"""What archives raise that are damaged, encrypted (RuntimeError), nested too deep, or of another kind."""


def sanitised(content: bytes) -> io.BytesIO:
    """The archive with what is needed for prediction and was checked, to be given to `torch.export.load`.

    Raises:
        UnsafeProgramError: an operator, expression, name or payload outside the lists; another format.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _rewritten(archive)
    except UNREADABLE as error:
        raise UnsafeProgramError(
            f"no archive of torch.export.save of torch 2.8 or later ({type(error).__name__}: {error})"
        ) from error


def _rewritten(archive: zipfile.ZipFile) -> io.BytesIO:
    root = archive.namelist()[0].partition("/")[0] + "/"

    def read(name: str) -> bytes:
        return archive.read(root + name)

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as clean:

        def write(name: str, data: bytes) -> None:
            clean.writestr(_ROOT + name, data)

        for part in _PARTS:
            write(part, read(part))
        program = json.loads(read("models/model.json"))
        write("models/model.json", json.dumps(_checked_program(program)).encode())
        write("data/sample_inputs/model.pt", b"")  # a pickle, and not needed
        for folder, config_name in _FOLDERS:
            config = json.loads(read(folder + config_name))
            write(folder + config_name, json.dumps(config).encode())
            for name in sorted(_payloads(config)):
                write(folder + name, read(folder + name))
    out.seek(0)
    return out


def _payloads(config: Any) -> set[str]:
    """Files of raw tensors that a payload configuration names."""
    _check_strings(config, "weights")
    names = set()
    for key, entry in config["config"].items():
        if entry["use_pickle"] or entry["tensor_meta"] is None or not _PAYLOAD.fullmatch(entry["path_name"]):
            raise UnsafeProgramError(f"{key} is stored as a pickle or an object; valid: plain dense tensors")
        names.add(entry["path_name"])
    return names


def _checked_program(program: dict[str, Any]) -> dict[str, Any]:
    """The graph with every string checked, and without what only debugging needs."""
    graph_module = program["graph_module"]
    for node in graph_module["graph"]["nodes"]:
        node["metadata"] = {}
        if not _TARGET.fullmatch(node["target"]):
            raise UnsafeProgramError(f"operator {node['target']!r}; valid: those of torch.ops.aten")
        training = [i["arg"] for i in node["inputs"] if i["name"] in ("train", "training")]
        if {"as_bool": True} in training:
            raise UnsafeProgramError(
                f"{node['target']} is in training mode: export the network after .eval()"
            )
    calls = [call for call in graph_module["module_call_graph"] if call["fqn"] == ""]
    signature = calls[0]["signature"]
    _check_signature(signature)
    checked = {
        **program,
        "guards_code": [],
        "graph_module": {
            **graph_module,
            "metadata": {},
            "treespec_namedtuple_fields": {},
            "module_call_graph": calls[:1],
        },
    }
    for shape in program["range_constraints"]:
        _check_expression(shape)
    without = {**checked["graph_module"], "module_call_graph": []}
    _check_strings({**checked, "graph_module": without, "range_constraints": []}, "graph")
    _check_strings([list(limits.values()) for limits in program["range_constraints"].values()], "limits")
    _check_strings({k: v for k, v in signature.items() if k not in ("in_spec", "out_spec")}, "signature")
    return checked


def _check_signature(signature: dict[str, Any]) -> None:
    """One tensor in, by position; one tensor out."""
    positional = {"type": "builtins.tuple", "context": "null", "children_spec": [_LEAF]}
    named = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    both = {"type": "builtins.tuple", "context": "null", "children_spec": [positional, named]}
    if json.loads(signature["in_spec"])[1] != both:
        raise UnsafeProgramError("its inputs are not one tensor; valid: export(network, (windows,))")
    if json.loads(signature["out_spec"])[1] != _LEAF:
        raise UnsafeProgramError("its output is not one tensor; valid: scores (n, k, …) alone")


def _check_strings(value: Any, place: str) -> None:
    for key, text in _strings(value, place):
        if key in _BANNED:
            raise UnsafeProgramError(f"{key} in the graph; valid: tensors, numbers and names")
        if key == "expr_str":
            _check_expression(text)
        elif key != "as_string" and not _PLAIN.fullmatch(text):  # as_string is quoted where it is used
            raise UnsafeProgramError(f"the name {text[:80]!r} ({key}); valid: letters, digits, . _ + : -")


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every string with the key it stands under, and every key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield (name, "") if name in _BANNED else ("key", name)
            yield from _strings(item, name)


def _check_expression(text: str) -> None:
    """Only calls of `FUNCTIONS`, on numbers, symbols and one another."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UnsafeProgramError(f"the shape {text[:80]!r}: {error}") from error
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name):
                good = name in FUNCTIONS or re.fullmatch(r"[suz]\d+", name) is not None
            case ast.Constant(value=constant):
                good = not isinstance(constant, str) or bool(_SYMBOL.fullmatch(constant) or _number(constant))
            case _:
                good = isinstance(node, _ARITHMETIC)
        if not good:
            raise UnsafeProgramError(f"the shape {text[:80]!r}; valid: arithmetic of sympy")


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_ARITHMETIC = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Load,
    ast.UnaryOp,
    ast.unaryop,
    ast.BinOp,
    ast.operator,
    ast.Compare,
    ast.cmpop,
)


_ANY = 2**31
"""A limit from here on is none."""


@dataclass(frozen=True)
class Dimension:
    """What a program takes along one axis: multiples of ``factor`` from ``low`` to ``high``."""

    low: int
    high: int | None
    """None: any number."""
    factor: int = 1

    def fits(self, n: int) -> bool:
        """Whether the program takes n elements."""
        return self.low <= n and (self.high is None or n <= self.high) and n % self.factor == 0

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        top = f" to {self.high}" if self.high is not None else ""
        return f"{self.low}{top}" + (f" in multiples of {self.factor}" if self.factor > 1 else "")


@dataclass
class ExportedNetwork:
    """A program, and how many windows it takes at once."""

    program: torch.nn.Module
    device: torch.device
    batch: Dimension
    parameters: int | None

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Raw scores, as many windows as were given whatever batch the program is fixed to."""
        step = min(len(batch), self.batch.high or len(batch))
        parts = [self._run(batch[i : i + step]) for i in range(0, len(batch), step)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _run(self, windows: torch.Tensor) -> torch.Tensor:
        count = len(windows)
        if count < self.batch.low:
            windows = functional.pad(windows, (0, 0) * (windows.ndim - 1) + (0, self.batch.low - count))
        try:
            scores: torch.Tensor = self.program(windows)
        except RuntimeError as error:
            if not str(error).startswith("Expected input"):
                raise
            raise RequestError(
                f"window {tuple(windows.shape)}: the exported program says: {error}"
            ) from error
        return scores[:count]


def check(card: Card) -> None:
    """Whether the file is a plain program and fits the card.

    Raises:
        RequestError: it is not, or takes other bands or windows than the card's.
    """
    only_arguments(card, ())
    _read(card, resolve_weights(card))


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The program on its device; it is in the mode in which it was exported.

    Raises:
        RequestError: as `check`.
    """
    only_arguments(card, ())
    program, batch = _read(card, resolve_weights(card))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()
    count = sum(p.numel() for p in module.parameters())
    return ExportedNetwork(module.requires_grad_(False), device, batch, count)


def _read(card: Card, path: Path) -> tuple[torch.export.ExportedProgram, Dimension]:
    try:
        program = torch.export.load(sanitised(path.read_bytes()))
    except UnsafeProgramError as error:
        raise card.error("weights", f"{path}: {error}") from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise card.error("weights", f"{path}: this torch cannot load it ({reason})") from error
    (entry,) = program.graph_signature.user_inputs
    (out,) = program.graph_signature.user_outputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    taken = [_dimension(n, program) for n in values[str(entry)].shape]
    given = [_dimension(n, program) for n in values[str(out)].shape]
    _check_shape(card, taken)
    if len(given) > 1 and not given[1].fits(card.output_channels):
        raise other_channels(card, given[1])
    return program, taken[0]


def _dimension(size: Any, program: torch.export.ExportedProgram) -> Dimension:
    """A size of the graph: a number, or a multiple of a symbol that has a range."""
    if isinstance(size, int):
        return Dimension(size, size)
    expression = size.node.expr
    factor, symbol = expression.as_coeff_Mul()
    ranges = program.range_constraints
    if not (symbol.is_Symbol and factor.is_Integer) or not {expression, symbol} & ranges.keys():
        return Dimension(1, None)
    # The range of the product itself where there is one, else that of its symbol.
    scale, limits = (1, ranges[expression]) if expression in ranges else (int(factor), ranges[symbol])
    high = int(limits.upper) * scale if limits.upper.is_Integer and limits.upper < _ANY else None
    return Dimension(max(1, int(limits.lower) * scale), high, int(factor))


def _check_shape(card: Card, taken: list[Dimension]) -> None:
    if len(taken) != card.ndim + 2:
        raise card.error(
            "kind", f"a {card.kind} model takes {card.ndim + 2} axes; the file's input has {len(taken)}"
        )
    if not taken[1].fits(card.channels):
        raise card.error("input.bands", f"found {card.channels}; the file takes {taken[1]} channels")
    window, whole = card.window_shape, card.window.size == "whole"
    sizes = ", ".join(map(str, taken[2:]))
    if window is not None and not all(d.fits(n) for d, n in zip(taken[2:], window, strict=True)):
        raise card.error("window.size", f"found {list(window)}; the file takes {sizes}")
    rigid = any(d.low == d.high for d in taken[2:])
    if rigid and not (card.window.fixed or (whole and window is not None)):
        raise card.error("window", f"the file takes {sizes} only; give that as `size` with `fixed: true`")
    if any(card.window.stride % d.factor for d in taken[2:]) and not (card.window.fixed or whole or rigid):
        raise card.error("window.stride", f"found {card.window.stride}; the file takes {sizes}")
