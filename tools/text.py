"""What the text of a Python module says of its size and its documentation."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

DIRECTIVE = re.compile(r"#\s*(noqa|type:|fmt:|mypy:|ruff:|pragma)")
"""A comment that speaks to a tool."""


def code_lines(text: str) -> int:
    """Return the number of lines that are not blank, comments or docstrings."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    layout |= {tokenize.ENCODING, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in layout]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            docstring = isinstance(node.value.value, str)
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) if docstring else set()
    return len(lines)


def comments(text: str) -> int:
    """Return the number of comments that are not directives to a tool."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and not DIRECTIVE.match(token.string) for token in tokens)


def public_functions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield the public functions and methods of two or more parameters."""
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from public_functions(child)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            given = child.args
            every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
            if sum(a is not None and a.arg not in ("self", "cls") for a in every) >= 2:
                yield child
