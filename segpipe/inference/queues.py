"""Overlapping stages with bounded queues: an error anywhere ends the whole with its cause."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from segpipe.errors import StoppedError

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Run an iterator in a thread, at most ``depth`` items ahead.

    The producer's exception is raised in the consumer at the place where its item would have come;
    leaving the `with` block early ends the producer, however full the queue is.
    """

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items = items
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="segpipe-read", daemon=True)

    def _put(self, entry: tuple[T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _produce(self) -> None:
        try:
            for item in self._items:
                if not self._put((item, None)):
                    return
        except BaseException as error:  # noqa: BLE001 - handed to the consumer, which raises it
            self._put((None, error))
        else:
            self._put((None, StopIteration()))

    def __enter__(self) -> Prefetch[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[T]:
        while True:
            item, error = self._queue.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]  # only an error comes without an item


class Writer:
    """Write in a thread, at most ``depth`` writes behind.

    The first failed write is raised by the next `submit`, or on leaving the `with` block.
    """

    def __init__(self, depth: int) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="segpipe-write")
        self._slots = threading.Semaphore(depth)
        self._error: BaseException | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Queue a write; waits while ``depth`` are pending. Writes happen in the order given."""
        self._slots.acquire()
        if self._error is not None:
            self._slots.release()
            raise self._error
        self._pool.submit(work).add_done_callback(self._done)

    def _done(self, future: Future[Any]) -> None:
        if not future.cancelled() and future.exception() is not None and self._error is None:
            self._error = future.exception()
        self._slots.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # a stop is no fault: what is waiting is written
        failed = error is not None and not isinstance(error, StoppedError)
        self._pool.shutdown(wait=True, cancel_futures=failed)
        if error is None and self._error is not None:
            raise self._error
