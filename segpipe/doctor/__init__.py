"""What `segpipe doctor` looks at: whether this machine, and what it talks to, can do a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from segpipe.doctor.finding import Finding, State
from segpipe.doctor.machine import (
    check_engine,
    check_folder,
    check_gdal,
    check_gpu,
    check_gzip,
    check_machine,
    check_onnxruntime,
    check_packages,
    check_python,
    check_torch,
)
from segpipe.doctor.services import check_credentials, check_dask, check_prefect, check_store

__all__ = ["Finding", "State", "examine"]


def examine(out: str, *, dask: str = "", store: str = "", self_test: bool = True) -> Iterator[Finding]:
    """All findings, each as soon as it is there.

    Args:
        out: folder for results, made if absent, or URL of an object store.
        dask: address of a Dask scheduler; empty: not looked at.
        store: URL of an object store; empty: not looked at.
        self_test: whether to run a tiny model through the engine.
    """
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_packages,
        check_machine,
        check_gpu,
        check_torch,
        check_onnxruntime,
        check_gdal,
        check_gzip,
        (lambda: check_store(out, "output")) if "://" in out else (lambda: check_folder(out)),
        check_prefect,
    ]
    if dask:
        checks.append(lambda: check_dask(dask))
    checks.append(check_credentials)
    if store:
        checks.append(lambda: check_store(store))
    if self_test:
        checks.append(check_engine)
    for check in checks:
        yield check()
