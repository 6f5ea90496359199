"""The threads that a merge or a verification works with: a tensor each, and no torch threads inside them.

torch splits every operation over its threads and waits for the slowest. Where another program has one of the
cores, each wait lasts until the scheduler's next turn: a tile of 64 blocks took 3.0 s instead of 0.05 s. Whole
tensors per thread wait for nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")


@contextmanager
def workers(device: torch.device, threads: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """``threads`` of them, each with one of torch's; if that is None, as many as torch would use, or one for CUDA.

    torch's own number of threads is 1 inside the block, and what it was afterwards.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads or (usual if device.type == "cpu" else 1), thread_name_prefix="loreg")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(usual)


def results(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """Run ``jobs`` in ``pool``; their results in their own order. When one fails, the rest is dropped."""
    futures: deque[Future[T]] = deque(pool.submit(job) for job in jobs)
    try:
        while futures:  # a result that was taken is held no longer
            yield futures.popleft().result()
    finally:
        drop(futures)


class Turns:
    """Work for the threads of ``pool`` in turns: what is urgent goes before whatever else waits.

    A context: when it ends well all that was urgent is done, and its errors are raised; else it is dropped.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._urgent: deque[Callable[[], None]] = deque()
        self._begun: list[Future[bool]] = []

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            if kind is None:
                for future in self._begun:
                    future.result()
        finally:
            self._urgent.clear()
            drop(self._begun)

    def submit(self, job: Callable[[], None]) -> Future[None]:
        return self._pool.submit(self._after_urgent, job)

    def urge(self, jobs: Iterable[Callable[[], None]]) -> None:
        """Any thread may call it. A thread that is about to begin another job does these first; the pool is given as
        many turns of its own, as there may be no other."""
        for job in jobs:
            self._urgent.append(job)
            self._begun.append(self._pool.submit(self._one))

    def _one(self) -> bool:
        try:
            job = self._urgent.popleft()
        except IndexError:
            return False
        job()
        return True

    def _after_urgent(self, job: Callable[[], None]) -> None:
        while self._one():
            pass
        job()


def drop(futures: Collection[Future[T]]) -> None:
    """Jobs not yet begun are cancelled, those running waited for: what they write to is open until then."""
    for future in futures:
        future.cancel()
    for future in futures:
        if not future.cancelled():
            future.exception()
