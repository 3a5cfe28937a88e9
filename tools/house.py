"""Measure the structure of the repository: imports, files that a job enters, names, lines, docstrings.

    python -m tools.house [--root FOLDER] [--static]

The table compares commit 7b0aeb9, the aim and now. ``--static`` leaves out the jobs, which take a minute.

Definitions, chosen so that commit 7b0aeb9 gives the numbers of its first measurement:

- A *unit* is a direct child of segpipe (module or package), or flows, or tasks. A *knot* is a strongly
  connected component of units; edges are imports that run when a module is imported: those inside
  functions and under TYPE_CHECKING do not count.
- A *circle of files* is a strongly connected component of files over all imports: those inside functions
  and under TYPE_CHECKING count.
- *Floors* are the imports on the longest chain of files; edges as for knots, components condensed.
- An import *climbs* if it goes from a lower layer to a higher one, or between siblings that are declared
  independent, by the layers contracts of import-linter in pyproject.toml; edges as for circles.
- Names that exist twice are counted once each. Of files, those that several packages may give (`base`,
  `network`, `card`, `registry`) are left out; with them the commit had 40.
- Lines, comments and docstrings are those of segpipe. Functions and methods are public without a leading
  underscore; a parameter is any but ``self`` and ``cls``. Comments that speak to a tool (noqa, fmt) do not
  count; with them the commit had 8 per 1,000 lines.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import networkx as nx

from tools.inputs import ROOT, environment
from tools.text import code_lines, comments, public_functions

FOLDERS = ("segpipe", "flows", "tasks")
COMMON_NAMES = {"__init__", "__main__", "base", "network", "card", "registry"}
"""Names that several packages may give to a file."""
NOT_LOOSE = {"__init__", "__main__", "api", "errors"}
LONG = 100
BEFORE = {
    "packages tied in a knot": ("1 knot of 20", "none"),
    "circles of files": ("6", "0"),
    "imports that climb": ("20", "0"),
    "floors of the import graph": ("25", "≤ 17"),
    "loose modules beside packages": ("36", "0"),
    "class names that exist twice or more": ("35", "≤ 8"),
    "file names that exist twice or more": ("40", "≤ 8"),
    "code lines of segpipe": ("31,573", "≤ 30,000"),
    "public functions of two or more parameters with Args": ("31 %", "≥ 80 %"),
    "lines over 100 characters": ("2,080", "0"),
    "comments per 1,000 lines (per 1,000 code lines)": ("8", "20 to 40"),
    "files entered by a raster job": ("99", "≤ 60"),
    "files entered by a prompt job": ("127", "≤ 80"),
    "a card looked up for one block (parsed)": ("34", "1"),
    "a source opened for one block": ("5", "2"),
}
"""The rows: at commit 7b0aeb9, and the aim."""


@dataclass(frozen=True)
class Import:
    """One import of a file of the repository by another."""

    source: str
    target: str
    eager: bool
    """Whether it runs when the module is imported."""


class House:
    """The files of a repository's packages and what they import of each other."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / "pyproject.toml"
        self.tools = tomllib.loads(path.read_text()).get("tool", {}) if path.exists() else {}
        mapped = self.tools.get("setuptools", {}).get("package-dir", {})
        names = {folder: folder for folder in FOLDERS} | {folder: name for name, folder in mapped.items()}
        self.files = {
            _module(Path(names[folder], path.relative_to(root / folder))): path
            for folder in FOLDERS
            for path in sorted((root / folder).rglob("*.py"))
        }
        self.texts = {name: path.read_text() for name, path in self.files.items()}
        self.trees = {name: ast.parse(text) for name, text in self.texts.items()}
        self.imports = [found for name in self.files for found in self._imports(name)]

    def _imports(self, name: str) -> Iterator[Import]:
        for node, eager in _statements(self.trees[name], eager=True):
            targets = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                parts = name.split(".") if self.files[name].stem == "__init__" else name.split(".")[:-1]
                base = parts[: len(parts) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                submodules = [f"{module}.{target}" for target in targets]
                targets = [target if target in self.files else module for target in submodules]
            yield from (Import(name, t, eager) for t in targets if t in self.files and t != name)

    def graph(self, *, eager_only: bool) -> nx.DiGraph[str]:
        """Return the graph of files."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        graph.add_nodes_from(self.files)
        graph.add_edges_from((i.source, i.target) for i in self.imports if i.eager or not eager_only)
        return graph

    def knots(self) -> list[set[str]]:
        """Return the units that import each other, largest first."""
        graph: nx.DiGraph[str] = nx.DiGraph()
        pairs = {(_unit(i.source), _unit(i.target)) for i in self.imports if i.eager}
        graph.add_edges_from((a, b) for a, b in pairs if a != b)
        return _circles(graph)

    def circles(self) -> list[set[str]]:
        """Return the files that import each other, largest first."""
        return _circles(self.graph(eager_only=False))

    def floors(self) -> int:
        """Return the length of the longest chain of imports."""
        return int(nx.dag_longest_path_length(nx.condensation(self.graph(eager_only=True))))

    def climbs(self) -> list[tuple[str, str]] | None:
        """Return the imports against the layers; None where pyproject.toml declares no layers."""
        if not self.layers:
            return None
        pairs = sorted({(i.source, i.target) for i in self.imports})
        return [pair for pair in pairs if any(_climbs(*pair, layers) for layers in self.layers)]

    @cached_property
    def layers(self) -> list[dict[str, tuple[int, int]]]:
        """By contract and container: a module's layer from the top, and its group within the layer."""
        found = []
        for contract in self.tools.get("importlinter", {}).get("contracts", []):
            if contract.get("type") != "layers":
                continue
            for container in contract.get("containers", [""]):
                ranks = {}
                for rank, layer in enumerate(contract["layers"]):
                    siblings = re.split(r"\s*[|:]\s*", layer)
                    for number, sibling in enumerate(siblings):
                        name = f"{container}.{sibling.strip(' ()')}".lstrip(".")
                        ranks[name] = rank, number if "|" in layer else 0
                found.append(ranks)
        return found

    def loose(self) -> list[str]:
        """Return the modules that lie beside the packages of segpipe."""
        return [p.stem for p in sorted((self.root / "segpipe").glob("*.py")) if p.stem not in NOT_LOOSE]

    def twice(self) -> tuple[list[str], list[str]]:
        """Return the class names and the file names that exist twice or more."""
        nodes = [node for tree in self.trees.values() for node in ast.walk(tree)]
        classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
        files = Counter(path.stem for path in self.files.values())
        return _repeated(classes), [name for name in _repeated(files) if name not in COMMON_NAMES]

    def args_share(self) -> float:
        """Return the share of public functions of two or more parameters that document them."""
        trees = [tree for name, tree in self.trees.items() if _in_library(name)]
        told = ["Args:" in (ast.get_docstring(f) or "") for tree in trees for f in public_functions(tree)]
        return sum(told) / max(len(told), 1)

    def lines(self) -> tuple[int, int, int, int]:
        """Return lines, code lines, lines over 100 characters, and comments that are no directives."""
        texts = [text for name, text in self.texts.items() if _in_library(name)]
        lines = [line for text in texts for line in text.splitlines()]
        long = sum(len(line) > LONG for line in lines)
        return len(lines), sum(map(code_lines, texts)), long, sum(map(comments, texts))


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _in_library(module: str) -> bool:
    return module.partition(".")[0] == "segpipe"


def _unit(module: str) -> str:
    return ".".join(module.split(".")[: 2 if _in_library(module) else 1])


def _statements(node: ast.AST, eager: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield every import below a node, and whether it runs with its module."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield node, eager
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        eager = False
    typing = node.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else []
    for child in ast.iter_child_nodes(node):
        yield from _statements(child, eager and child not in typing)


def _circles(graph: nx.DiGraph[str]) -> list[set[str]]:
    found = [part for part in nx.strongly_connected_components(graph) if len(part) > 1]
    return sorted(found, key=len, reverse=True)


def _climbs(source: str, target: str, layers: dict[str, tuple[int, int]]) -> bool:
    """Whether an import goes up, or sideways to an independent sibling."""
    places = [_place(module, layers) for module in (source, target)]
    if places[0] is None or places[1] is None:
        return False
    (rank, group), (target_rank, target_group) = places[0], places[1]
    return target_rank < rank or (target_rank == rank and target_group != group)


def _place(module: str, layers: dict[str, tuple[int, int]]) -> tuple[int, int] | None:
    parts = module.split(".")
    names = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    return next((layers[name] for name in names if name in layers), None)


def _repeated(names: Counter[str]) -> list[str]:
    return sorted(name for name, number in names.items() if number > 1)


def static_rows(house: House) -> list[str]:
    """Return what is measured without running anything, in the order of `BEFORE`."""
    climbs, (classes, files) = house.climbs(), house.twice()
    lines, code, long, said = house.lines()
    knots = [f"1 knot of {len(knot)}" for knot in house.knots()]
    return [
        " + ".join(knots) or "none",
        str(len(house.circles())),
        "no layers declared" if climbs is None else str(len(climbs)),
        str(house.floors()),
        str(len(house.loose())),
        str(len(classes)),
        str(len(files)),
        f"{code:,}",
        f"{house.args_share():.0%}".replace("%", " %"),
        f"{long:,}",
        f"{1000 * said / max(lines, 1):.0f} ({1000 * said / max(code, 1):.0f})",
    ]


def job_rows(root: Path) -> list[str]:
    """Return what one raster job and one prompt job enter and read, in the order of `BEFORE`."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="segpipe-house-") as folder:
        for name in ("raster", "prompts"):
            paths = {"PYTHONPATH": f"{root}:{ROOT}", "PREFECT_HOME": f"{folder}/prefect"}
            done = subprocess.run(
                [sys.executable, "-m", "tools.traced", name, f"{folder}/{name}"],
                cwd="/", env=environment(**paths), stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found[name] = json.loads(done.stdout.splitlines()[-1])
    counts = found["raster"]["counts"]
    return [
        *(str(len(job["entered"])) for job in found.values()),
        f"{counts['card_lookups']} ({counts['card_parses']})",
        str(counts["source_opens"]),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Measure the structure of the repository.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository; default: this one")
    parser.add_argument("--static", action="store_true", help="leave out what takes a run of jobs")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    measured = static_rows(House(root)) + ([] if arguments.static else job_rows(root))
    print("| | commit 7b0aeb9 | aim | now |\n|---|---|---|---|")
    for (name, (before, aim)), now in zip(BEFORE.items(), measured, strict=False):
        print(f"| {name} | {before} | {aim} | {now} |")


if __name__ == "__main__":
    main()
