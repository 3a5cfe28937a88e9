"""Text of YAML and JSON as plain values: nothing is built before its size, nesting and keys are checked."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MOST_BYTES = 16 * 2**20
"""Of a file of YAML."""
MOST_NODES = 1_000_000
"""Of a document whose aliases are written out."""
MOST_DEPTH = 50
SURROGATES = re.compile("[\ud800-\udfff]")
"""Halves of characters, which no file can hold."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which refuses duplicate keys, deep nesting and aliases that multiply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        alias = self.check_event(AliasEvent)
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested over {MOST_DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias of what it lies in", problem_mark=mark)
        if isinstance(node, ScalarNode) and SURROGATES.search(node.value):
            raise yaml.MarkedYAMLError(problem="half a character (surrogate)", problem_mark=mark)
        if node is not None and not alias:
            self._sizes[id(node)] = size = 1 + sum(self._sizes[id(part)] for part in _parts(node))
            if size > MOST_NODES:
                problem = f"aliases and values come to over {MOST_NODES} nodes"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[Hashable] = set()
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} stands twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add((key.tag, key.value))
        return node


def _parts(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def parse_yaml(text: str) -> Any:
    """Return the plain values of a YAML document.

    Raises:
        yaml.YAMLError: not YAML, a key stands twice, or it is too long, too deep or multiplies by aliases.
    """
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"over {MOST_BYTES} characters")
    try:
        return yaml.load(text, _Loader)
    except (ValueError, OverflowError, TypeError) as error:  # a date of month 13, 0x without digits
        raise yaml.YAMLError(f"a value cannot be read: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """Return the plain values of a JSON document.

    Raises:
        ValueError: not JSON, not UTF-8, too deep, or a key stands twice.
    """
    try:
        found = json.loads(text, object_pairs_hook=_mapping)
        json.dumps(found, ensure_ascii=False).encode()  # a ValueError where it has surrogates
        return found
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} stands twice")
    return found
