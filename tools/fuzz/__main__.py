"""Fuzz every parser of what comes in, by coverage (atheris, libFuzzer), for some minutes.

    python -m tools.fuzz --minutes 30 [--target NAME ...]
    python -m tools.fuzz --replay FILE

Each target has a process and an equal share of the time. What it finds is kept in `.fuzz/findings`, the
inputs that reached something new in `.fuzz/corpus`, from where the next call goes on. A crash of a library
that reader processes hold is counted apart. Exit code 1: there are findings.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segpipe.sources.readers import TRUSTED
from tools.fuzz.target import execute
from tools.fuzz.targets import SEEDS, TARGETS

WORK = Path(__file__).parents[2] / ".fuzz"
FINDINGS = WORK / "findings"
LIMITS = ("-rss_limit_mb=4096", "-timeout=10", "-max_len=131072", "-print_final_stats=1", "-detect_leaks=0")
STARTS = 20
"""Of one target: each crash or hang ends its process."""
COVERAGE = re.compile(r"^#\d+\s+(\w+)\s+cov: (\d+) ft: (\d+)", re.MULTILINE)
KINDS = {
    "traceback": "tracebacks",
    "crash": "crashes",
    "oom": "crashes",
    "leak": "crashes",
    "timeout": "hangs",
}


@dataclass
class Result:
    """What came of one target."""

    name: str
    executions: int = 0
    seconds: float = 0.0
    coverage: list[tuple[int, int]] = field(default_factory=list)
    """Edges and features, the first that were told and the last of each process."""
    new: int = 0
    found: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("tracebacks", "crashes", "hangs"), 0)
    )
    walled: int = 0
    """Crashes, of a library, that cost a reader process and end in a clear error."""
    files: list[Path] = field(default_factory=list)

    def row(self) -> str:
        """As a row of the table."""
        first, last = (self.coverage[0], max(self.coverage)) if self.coverage else ((0, 0), (0, 0))
        cells = [
            self.name, self.executions, round(self.executions / max(self.seconds, 1e-9)),
            f"{first[1]}/{first[0]}",
            f"{last[1]}/{last[0]}", self.new, *self.found.values(),
            self.walled,
        ]  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


def fuzz(name: str, seconds: float) -> Result:
    """Fuzz one target in processes of its own, begun again after each crash."""
    result, corpus = Result(name), WORK / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    FINDINGS.mkdir(exist_ok=True)
    begun, end = time.time(), time.monotonic() + seconds
    entries = len(list(corpus.iterdir()))
    for _ in range(STARTS):
        left = end - time.monotonic()
        if left < 1:
            break
        log = WORK / f"{name}.log"
        started = time.monotonic()
        with log.open("w") as file:
            ended = subprocess.run(
                [
                    sys.executable, "-W", "ignore", "-m", "tools.fuzz.child", name, *LIMITS,
                    f"-max_total_time={max(1, round(left))}", f"-artifact_prefix={FINDINGS}/{name}--",
                    str(corpus), str(SEEDS / name),
                ],
                stdout=subprocess.DEVNULL, stderr=file,
            )  # fmt: skip
        result.seconds += time.monotonic() - started
        text = log.read_text(errors="replace")
        units = re.search(r"stat::number_of_executed_units: (\d+)", text)
        result.executions += int(units[1]) if units else 0
        told = [(int(cov), int(ft)) for _, cov, ft in COVERAGE.findall(text)]
        result.coverage += told[:1] + told[-1:]
        if ended.returncode == 0:
            break
        if not units and not told:
            raise SystemExit(f"{name}: could not be started:\n{text[-2000:]}")
    result.new = len(list(corpus.iterdir())) - entries
    result.files = sorted(p for p in FINDINGS.glob(f"{name}--*") if p.stat().st_mtime >= begun - 1)
    if TARGETS[name].walled:
        held = [p for p in result.files if "--traceback" not in p.name and is_walled(p)]
        result.walled, result.files = len(held), [p for p in result.files if p not in held]
    for path in result.files:
        result.found[KINDS[path.name.split("--")[1].partition("-")[0]]] += 1
    return result


def is_walled(path: Path) -> bool:
    """Whether reader processes make a clear error of what ends a process that reads by itself."""
    arguments = [sys.executable, "-W", "ignore", "-m", "tools.fuzz", "--readers", "--replay", str(path)]
    return subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def table(results: Sequence[Result]) -> str:
    """Return the results as a table in Markdown."""
    heads = (
        "target", "executions", "a second", "features/edges at the start", "at the end", "new inputs",
        "tracebacks",
        "crashes", "hangs", "held by readers",
    )  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" + "|---:" * (len(heads) - 1) + "|"]
    total = sum(r.executions for r in results)
    sums = [sum(r.found[key] for r in results) for key in ("tracebacks", "crashes", "hangs")]
    cells = ["all", total, "", "", "", sum(r.new for r in results), *sums, sum(r.walled for r in results)]
    return "\n".join([*lines, *(r.row() for r in results), "| " + " | ".join(map(str, cells)) + " |"])


def replay(path: Path) -> None:
    """Let a target read a finding; its name begins with the target's."""
    name = path.name.partition("--")[0]
    execute(TARGETS[name if name in TARGETS else path.parent.name], path.read_bytes())
    print(f"{path}: read, or refused by a clear error")


def main() -> int:
    """Fuzz, or replay."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="for all targets together")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated; all")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="a finding")
    parser.add_argument("--readers", action="store_true", help="replay through reader processes")
    given = parser.parse_args()
    if given.replay is not None:
        if not given.readers:
            os.environ[TRUSTED] = "1"
        replay(given.replay)
        return 0
    WORK.mkdir(exist_ok=True)
    names = given.target or list(TARGETS)
    results = []
    for name in names:
        results.append(fuzz(name, given.minutes * 60 / len(names)))
        print(f"{name}: {results[-1].executions} executions", file=sys.stderr)
    print(table(results))
    files = [path for result in results for path in result.files]
    for path in files:
        print(f"python -m tools.fuzz --replay {path}")
    return 1 if files else 0


if __name__ == "__main__":
    sys.exit(main())
