"""``Cache``: versions at hand for an engine, on disk, in memory and on a device, each within a number of bytes.

cache = serving.Cache(registry, disk=50 << 30, cpu=8 << 30, gpu=2 << 30)
with cache.factors("sql:prod", "gpu") as factors:
    ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from loreg.errors import Conflict, UsageError
from loreg.registry import Registry
from loreg.registry.inputs import choose_device
from loreg.serving.defaults import default_registry
from loreg.serving.directories import SPARED
from loreg.serving.loading import load, nbytes_of
from loreg.serving.resolving import Form, Resolved, Resolver
from loreg.serving.tiers import Statistics, Tier
from loreg.serving.twins import in_thread

Place = Literal["disk", "cpu", "gpu"]
Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]
"""Module path → (A, B, scale), as ``load`` has them. Of all who use the entry: not to be written to."""


class Cache:
    """Three tiers of what was used lately. Thread-safe; what several ask for at once is made once.

    An entry is a version, by its digest: a tag that moves is another entry. What is in use, or pinned, stays, also if
    it is removed from the registry meanwhile; of the rest the least recently used leave. ``disk``: directories, as
    ``resolve`` gives them, in ``root`` (default: where ``resolve`` has them). The limit is for all processes that
    have one there together; what any of them uses stays, what was pushed into an engine (``serving.held``), and what
    was handed out less than ``spared`` seconds ago, if need be beyond the limit. ``cpu``: factors, mapped from
    verified blobs. ``gpu``: factors on ``device``, in ``dtype`` (default: the stored one). These two never hold more
    than their limits: room is made before something comes, and where all is in use that raises CheckFailed.

    Each limit is in bytes; None is none.
    """

    def __init__(
        self,
        registry: Registry | None = None,
        *,
        disk: int | None = None,
        cpu: int | None = None,
        gpu: int | None = None,
        device: str = "cuda",
        dtype: torch.dtype | None = None,
        root: Path | None = None,
        spared: float = SPARED,
    ) -> None:
        for name, limit in (("disk", disk), ("cpu", cpu), ("gpu", gpu)):
            if limit is not None and limit < 0:
                raise UsageError(f"the limit of {name} is {limit}: expected a number of bytes, or None.")
        self._registry = registry or default_registry()
        self._resolver = Resolver(self._registry, root, disk, spared)
        self._devices: Mapping[Place, tuple[str, torch.dtype | None]] = {"cpu": ("cpu", None), "gpu": (device, dtype)}
        self._tiers: Mapping[Place, Tier[Factors]] = {"cpu": Tier("cpu", cpu), "gpu": Tier("gpu", gpu)}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="loreg-prefetch")

    def close(self) -> None:
        """Ends prefetching. What is on disk stays for the next."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def resolve(self, reference: str, *, form: Form = "peft", **given: Any) -> Resolved:
        """As ``serving.resolve``, within the limit of this cache."""
        return self._resolver.resolve(reference, form=form, **given)

    @contextmanager
    def directory(self, reference: str, *, form: Form = "peft", **given: Any) -> Iterator[Resolved]:
        """A directory that stays as long as the block does, whatever any process does meanwhile. Raises what
        ``resolve`` does."""
        with ExitStack() as stack:
            while True:
                found = self.resolve(reference, form=form, **given)
                with suppress(Conflict):  # it was deleted between the two
                    stack.enter_context(self._resolver.directories.pinned(found.path.name))
                    break
            yield found

    @contextmanager
    def factors(self, reference: str, place: Place = "cpu") -> Iterator[Factors]:
        """Factors in memory or on the device, which stay as long as the block does. Raises what ``load`` does."""
        if place not in self._tiers:
            raise UsageError(f"{place!r} holds no factors: expected cpu or gpu.")
        row = self._resolver.find(reference)
        named = f"{row.name}@{row.digest}"
        device, dtype = self._devices[place]
        choose_device(device)

        def size() -> int:
            return nbytes_of(self._registry.resolve(named).manifest, dtype)

        def make() -> Factors:
            above = self._tiers["cpu"].peek(row.digest) if place == "gpu" and dtype is None else None
            if above is None:
                return load(named, self._registry, device=device, dtype=dtype)
            return {path: (A.to(device), B.to(device), scale) for path, (A, B, scale) in above.items()}

        tier = self._tiers[place]
        found = tier.acquire(row.digest, f"{row.name}:v{row.number}", size, make)
        try:
            yield found
        finally:
            tier.release(row.digest)

    def pin(self, reference: str, place: Place, *, form: Form = "peft") -> Pin:
        """Have it there until the pin is closed. Raises what ``directory`` and ``factors`` do."""
        if place == "disk":
            return Pin(self.directory(reference, form=form))
        return Pin(self.factors(reference, place))

    resolve_async = in_thread(resolve)
    pin_async = in_thread(pin)

    def prefetch(self, references: Sequence[str], place: Place) -> list[Future[None]]:
        """Have them there soon, in the background, in this order, in use by nobody. An error is its future's."""

        def fetch(reference: str) -> None:
            self.pin(reference, place).close()

        return [self._pool.submit(fetch, reference) for reference in references]

    def statistics(self) -> dict[Place, Statistics]:
        """Of each tier. On disk: of all that is there, by whomever; hits, misses and evictions are this cache's."""
        return {"disk": self._resolver.statistics(), **{name: tier.statistics for name, tier in self._tiers.items()}}


class Pin:
    """Keeps something where it is until it is closed, or, as a context, until the block ends."""

    def __init__(self, use: Any) -> None:
        self._stack = ExitStack()
        self.value: Resolved | Factors = self._stack.enter_context(use)

    def close(self) -> None:
        """Nothing the second time."""
        self._stack.close()

    def __enter__(self) -> Resolved | Factors:
        return self.value

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
