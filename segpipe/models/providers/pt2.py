"""``torch.export`` programs (.pt2) made safe to load: only what was checked reaches PyTorch.

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
from collections.abc import Iterator
from typing import Any

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


def sanitised(content: bytes) -> io.BytesIO:
    """The archive with what is needed for prediction and was checked, to be given to `torch.export.load`.

    Raises:
        UnsafeProgramError: an operator, expression, name or payload outside the lists; another format.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return _rewritten(archive)
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
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
