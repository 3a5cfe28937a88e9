"""What `segpipe doctor` looks at: whether this machine, and what it talks to, can do a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from segpipe.doctor import machine, services
from segpipe.doctor.finding import Finding, State

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
        machine.check_python,
        machine.check_packages,
        machine.check_machine,
        machine.check_gpu,
        machine.check_torch,
        machine.check_onnxruntime,
        machine.check_gdal,
        machine.check_gzip,
        (lambda: services.check_store(out, "output"))
        if "://" in out
        else (lambda: machine.check_folder(out)),
        services.check_prefect,
    ]
    if dask:
        checks.append(lambda: services.check_dask(dask))
    checks.append(services.check_credentials)
    if store:
        checks.append(lambda: services.check_store(store))
    if self_test:
        checks.append(machine.check_engine)
    for check in checks:
        yield check()
