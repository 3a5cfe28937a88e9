"""Limits that a process puts on itself before it touches files of strangers: they hold to its end.

On Linux, Landlock (kernel 5.13 and later; connections from 6.7 on) lets a process give up access to
files and connections. Elsewhere the limits of POSIX are all there is.
Source: https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Iterable
from pathlib import Path

OPEN_FILES = 1024
NO_NEW_PRIVILEGES = 38  # PR_SET_NO_NEW_PRIVS
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
PATH_BENEATH = 1
READ_FILE, READ_DIR = 1 << 2, 1 << 3
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""Rights over files that Landlock knows, by the first version of its interface that does."""
NETWORK_SINCE = 4
NETWORK_RIGHTS = 0b11
"""To bind and to connect by TCP."""


def landlock_version() -> int:
    """Of the kernel's interface; 0 where it has none."""
    if os.uname().sysname != "Linux":
        return 0
    kernel = ctypes.CDLL(None, use_errno=True)
    return max(0, int(kernel.syscall(CREATE_RULESET, None, 0, 1)))


def limit_memory(size: int) -> None:
    """Let the process have no more private memory than so many bytes; shared memory does not count."""
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def limit_files() -> None:
    """Let the process write into no file, leave no core, and hold few files open."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    few = OPEN_FILES if most == resource.RLIM_INFINITY else min(OPEN_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))


def restrict_access(readable: Iterable[Path], *, network: bool) -> bool:
    """Give up every access to files but reading below some paths, and connections unless they are needed.

    Args:
        readable: files and folders; what does not exist is passed over.
        network: whether the process may connect by TCP.

    Returns:
        Whether the kernel can do this. The process goes on without, where it cannot.
    """
    version = landlock_version()
    if version < 1:
        return False
    kernel = ctypes.CDLL(None, use_errno=True)
    files = FILE_RIGHTS[max(v for v in FILE_RIGHTS if v <= version)]
    rights = struct.pack("=Q", files)
    if version >= NETWORK_SINCE:
        rights += struct.pack("=Q", 0 if network else NETWORK_RIGHTS)
    ruleset = kernel.syscall(CREATE_RULESET, rights, len(rights), 0)
    if ruleset < 0:
        return False
    for path in readable:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        access = READ_FILE | READ_DIR if path.is_dir() else READ_FILE
        kernel.syscall(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", access, place), 0)
        os.close(place)
    kernel.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = bool(kernel.syscall(RESTRICT_SELF, ruleset, 0) == 0)
    os.close(ruleset)
    return done
