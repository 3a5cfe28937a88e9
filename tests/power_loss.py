"""A disk that forgets what nobody flushed: processes that note every fsync, and what a power loss leaves.

A file's bytes survive as they were at its last fsync, and the names in a folder as they were at the folder's.
Anything later may be there or not, which is drawn by seed. So POSIX promises; file systems may do better.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HOOK = """
import json, os, signal, threading

_journal, _limit, _later = os.environ["JOURNAL"], int(os.environ["KILL_AT"]), float(os.environ["KILL_LATER"])
_fsync, _count, _lock = os.fsync, 0, threading.Lock()


def _noted(descriptor):
    global _count
    with _lock:
        _count += 1
        count = _count
    if count == _limit:
        threading.Timer(_later, os.kill, (os.getpid(), signal.SIGKILL)).start()
    _fsync(descriptor)
    status, path = os.fstat(descriptor), os.readlink(f"/proc/self/fd/{descriptor}")
    entry = {"path": path, "inode": status.st_ino, "size": status.st_size, "time": status.st_mtime_ns}
    if os.path.isdir(path):
        names = {}
        for name in os.scandir(path):
            names[name.name] = name.inode()
            if name.is_file(follow_symlinks=False):  # its bytes stay findable when another takes its name
                try:
                    os.link(name.path, os.path.join(os.environ["KEPT"], str(name.inode())))
                except (FileExistsError, FileNotFoundError):
                    pass
        entry["names"] = names
    with _lock, open(_journal, "a") as file:
        file.write(json.dumps(entry) + "\\n")


os.fsync = _noted
"""
"""The ``sitecustomize`` of the processes that are watched."""


@dataclass
class Disk:
    """A folder on a disk that loses its power."""

    root: Path
    """Where the processes write."""
    aside: Path
    """For the hook, the journal and files that lost their name."""
    flushed: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Size and time of each inode when it was flushed."""
    names: dict[str, dict[str, int]] = field(default_factory=dict)
    """Names and inodes in each folder when it was flushed."""

    def __post_init__(self) -> None:
        (self.aside / "kept").mkdir(parents=True)
        (self.aside / "sitecustomize.py").write_text(HOOK)

    def run(self, command: list[str], kill_at: int = 0, later: float = 0.0) -> int:
        """Run a program; kill it a moment after its n-th fsync.

        Returns:
            How often it flushed.
        """
        journal = self.aside / "journal"
        journal.write_text("")
        environment = {
            **os.environ,
            "JOURNAL": str(journal),
            "KEPT": str(self.aside / "kept"),
            "KILL_AT": str(kill_at),
            "KILL_LATER": str(later),
            "PYTHONPATH": os.pathsep.join([str(self.aside), *filter(None, sys.path)]),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if not kill_at else -9) or kill_at, done.stderr
        entries = [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]
        for entry in entries:
            self.flushed[entry["inode"]] = entry["size"], entry["time"]
            if "names" in entry:
                self.names[entry["path"]] = entry["names"]
        return len(entries)

    def lose_power(self, seed: int) -> int:
        """Leave what a power loss may leave; how many files and names are not as they were."""
        draw = random.Random(seed)
        return self._lose(self.root, draw) if self.root.exists() else 0

    def _lose(self, folder: Path, draw: random.Random) -> int:
        lost = 0
        durable = self.names.get(str(folder), {})
        now = {path.name: path for path in sorted(folder.iterdir())}
        for name in sorted({*durable, *now}):
            path = folder / name
            inode = path.lstat().st_ino if name in now else 0
            if inode != durable.get(name, 0) and draw.random() < 0.5:
                lost += 1
                self._restore(path, durable.get(name, 0))
            if path.is_dir():
                lost += self._lose(path, draw)
            elif path.is_file():
                lost += self._lose_bytes(path, draw)
        return lost

    def _restore(self, path: Path, inode: int) -> None:
        """What the name stood for when its folder was flushed; nothing where it was not there."""
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        kept = self.aside / "kept" / str(inode)
        if inode and kept.exists():
            os.link(kept, path)

    def _lose_bytes(self, path: Path, draw: random.Random) -> int:
        status = path.stat()
        if self.flushed.get(status.st_ino) == (status.st_size, status.st_mtime_ns) or draw.random() < 0.5:
            return 0
        data = path.read_bytes()
        path.unlink()  # another name of the file keeps its bytes
        path.write_bytes(draw.choice([b"", data[: len(data) // 2], bytes(len(data))]))
        return 1
