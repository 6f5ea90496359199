"""``resolve``: a reference to an immutable directory that an engine loads as a PEFT adapter.

Engines key their caches by name and path (vLLM's KV cache does), so the directory is named by the version's
digest and never overwritten: a tag that moves is a new path.

What was resolved before is found again in three steps, each of which sees a change: whether anybody has written into
the catalog since, which an SQLite catalog answers in microseconds; else what the reference stands for now; and
whether ``stat`` says of the files what it said when they were hashed.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from loreg.addresses import expanded
from loreg.catalog.queries import VersionRow
from loreg.checkpoint import FileStamp
from loreg.digest import Digest
from loreg.errors import BaseMismatch, CheckFailed, NotFound, UsageError
from loreg.registry import Registry, Version
from loreg.registry.exporting import folded_directory, peft_directory
from loreg.registry.storage import Storage
from loreg.serving import signals
from loreg.serving.bases import fit
from loreg.serving.beside import Record
from loreg.serving.defaults import default_registry
from loreg.serving.directories import SPARED, Directories, Files, stamps
from loreg.serving.flights import Flights
from loreg.serving.tiers import Statistics
from loreg.serving.twins import in_thread

Form = Literal["peft", "folded"]
_FORMS: Mapping[str, tuple[str, Callable[[Storage, Version], Files]]] = {
    "peft": ("", peft_directory),
    "folded": ("-folded", folded_directory),
}
_ROLES: Mapping[str, tuple[str, ...]] = {"peft": ("factors", "full"), "folded": ("factors",)}
"""The blobs of which a form has all: what is in ``full`` of one that can be folded is the base's own."""
_KNOWN = 100_000
"""References of which the answer is remembered."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """A version ready to be served. ``path``: its PEFT directory; ``base``: the weights_root it belongs to.

    ``max_rank``: the largest rank of a module. ``nbytes``: the size of the files.
    """

    digest: Digest
    path: Path
    base: Digest
    max_rank: int
    nbytes: int


def resolve(
    reference: str,
    registry: Registry | None = None,
    *,
    base: str | Path | Digest | None = None,
    form: Form = "peft",
    timeout: float | None = None,
    max_bytes: int | None = None,
    cache: Path | None = None,
) -> Resolved:
    """The directory of a version, made on first use, and each of its files checked whenever it may have changed.

    ``registry``: default is one that is opened once for the process. ``base``: what the engine serves, as
    ``check_base`` takes it, or its weights_root: a version of another is refused. ``form``: ``peft``, the files as
    they were pushed where PEFT wrote them; or ``folded``, for engines that read of a config no more than r and
    lora_alpha (see ``adapters.peft_export.folded_files``). ``timeout``: seconds to wait; the work goes on for whoever
    asks next. ``max_bytes``: of the files. ``cache``: where directories are kept, default ``serving/`` in the
    registry's home.

    Atomic: whoever finds the directory finds all of it, and of many callers, in threads and processes, one makes it.
    It is made of bytes that had their digests, and is never overwritten. Raises NotFound for an unknown reference,
    BaseMismatch, CheckFailed for one that is larger than ``max_bytes`` and for a full disk, RemoteError if
    ``timeout`` is over, BadInput for a damaged blob or file, Unsupported for a version that has no such form.
    """
    resolver = Resolver.of(registry or default_registry(), cache)
    return resolver.resolve(reference, base=base, form=form, timeout=timeout, max_bytes=max_bytes)


resolve_async = in_thread(resolve)


class Resolver:
    """What ``resolve`` does, with what it remembers, for one registry and one place of directories. Thread-safe."""

    def __init__(
        self, registry: Registry, root: Path | None = None, limit: int | None = None, spared: float = SPARED
    ) -> None:
        self._registry = registry
        self.directories = Directories(root or registry.home / "serving", limit, spared, check=registry.storage.found)
        self._flights: Flights[tuple[Record, str]] = Flights()
        self._rows: OrderedDict[str, tuple[Hashable, VersionRow]] = OrderedDict()
        self._seen: dict[str, tuple[Record, tuple[FileStamp, ...]]] = {}
        self._hits = self._misses = 0
        self._fits: dict[tuple[Digest, str], tuple[FileStamp, ...]] = {}

    @classmethod
    def of(cls, registry: Registry, root: Path | None = None) -> Resolver:
        """The one that everybody shares, as long as the registry is there."""
        place = root or registry.home / "serving"
        found: Resolver | None = registry.served.get(place)
        # Of two that are made at once one stays; and no lock is held that a child could be born with.
        return found if found is not None else registry.served.setdefault(place, cls(registry, place))

    def resolve(
        self,
        reference: str,
        *,
        base: str | Path | Digest | None = None,
        form: Form = "peft",
        timeout: float | None = None,
        max_bytes: int | None = None,
    ) -> Resolved:
        """See ``resolve``."""
        with signals.default().time("resolve", outcome="error") as timer:
            found, timer.labels["outcome"] = self._resolved(reference, base, form, timeout, max_bytes)
        return found

    def _resolved(
        self,
        reference: str,
        base: str | Path | Digest | None,
        form: Form,
        timeout: float | None,
        max_bytes: int | None,
    ) -> tuple[Resolved, str]:
        """And how: it was at ``hand``, it was ``found`` on the disk, or it was ``made``."""
        if form not in _FORMS:
            raise UsageError(f"{form!r} is not a form of a directory: expected one of {', '.join(_FORMS)}.")
        for what, limit, unit in (("timeout", timeout, "seconds"), ("max_bytes", max_bytes, "a number of bytes")):
            if limit is not None and not limit >= 0:  # nor NaN
                raise UsageError(f"{what} is {limit}: expected {unit}, at least 0.")
        row = self.find(reference)
        name = row.digest.hex + _FORMS[form][0]
        if base is not None:
            self.require_base(row, base)
        how = "hand"
        if (record := self._at_hand(name)) is not None:
            self._hits += 1
        else:
            work = partial(self._make, name, row, form, max_bytes)
            record, how = self._flights.run((name, max_bytes), work, timeout, reference)
        self._refuse_large(row, record.nbytes, max_bytes)
        path = self.directories.path(name)
        return Resolved(row.digest, path, record.base, record.max_rank, record.nbytes), how

    def find(self, reference: str) -> VersionRow:
        """What ``Registry.find`` says, without asking again as long as nobody has committed anything."""
        stamp = self._registry.database.stamp()
        known = self._rows.get(reference)
        if known is not None and stamp is not None and known[0] == stamp:
            return known[1]
        row = self._registry.find(reference)
        self._rows[reference] = stamp, row
        if len(self._rows) > _KNOWN:
            self._rows.popitem(last=False)
        return row

    def version(self, reference: str) -> Version:
        """What ``Registry.resolve`` says, as ``find`` does."""
        return self._registry.version(self.find(reference))

    def statistics(self) -> Statistics:
        """Of all directories that are there; hits, misses and evictions are those of this."""
        entries, nbytes, used = self.directories.look()
        here = self.directories
        return Statistics(entries, nbytes, here.limit, used, self._hits, self._misses, here.evicted)

    def _at_hand(self, name: str) -> Record | None:
        """What was found whole in this process, and nobody has changed since."""
        seen = self._seen.get(name)
        if seen is None or self._registry.storage.strict:
            return None
        record, before = seen
        self.directories.note(name)  # first: from here on nobody deletes it
        try:
            return record if stamps(self.directories.path(name), record) == before else None
        except NotFound:
            return None

    def _make(self, name: str, row: VersionRow, form: Form, max_bytes: int | None) -> tuple[Record, str]:
        began = time.time_ns()
        record, how = self.directories.find(name), "found"
        if record is None:
            how = "made"
            self._misses += 1
            version = self._registry.version(row)
            for limit in (max_bytes, self.directories.limit):
                self._refuse_large(row, _least(version, form), limit)
            record = self.directories.make(
                name,
                lambda: _FORMS[form][1](self._registry.storage, version),
                lambda files: Record(row.digest, row.base_root, row.rank, files),
            )
        else:
            self._hits += 1
            found = stamps(self.directories.path(name), record)
            # One that was just written may be written again within the same tick of the clock, and keep its stamp.
            if all(stamp.settled_at(began) for stamp in found):
                self._seen[name] = record, found
        return record, how

    def _refuse_large(self, row: VersionRow, nbytes: int, limit: int | None) -> None:
        if limit is not None and nbytes > limit:
            raise CheckFailed(
                f"{row.name}:v{row.number} has {nbytes:,} bytes, and {limit:,} at most were asked for: allow more, "
                "or serve another version."
            )

    def require_base(self, row: VersionRow, base: str | Path | Digest) -> None:
        """Raises BaseMismatch unless the version fits the base, which is as ``resolve`` takes it."""
        key, now = (row.digest, str(base)), _weights(base)
        if base == row.base_root or self._fits.get(key) == now:
            return
        version = self._registry.version(row)
        if isinstance(base, Digest):
            known = self._registry.bases.of_root(base)
            if known is None:
                raise BaseMismatch(
                    f"{version} was trained on {row.base_name!r} ({row.base_root}), and the base that is served is "
                    f"{base}, which is not registered: serve that base, or another adapter."
                )
            base = known.name
        fit(self._registry, version, base).require(version, str(base))
        # A registered name stands for the same weights as long as it does; what a Hub id stands for may change.
        if now or any(known.name == str(base) for known in self._registry.list_bases()):
            self._fits[key] = now


def _weights(base: str | Path | Digest) -> tuple[FileStamp, ...]:
    """What ``stat`` says of the files of a directory; nothing for what is none."""
    if isinstance(base, Digest):
        return ()
    return tuple(FileStamp.of(path) for path in sorted(expanded(base).glob("*.safetensors")))


def _least(version: Version, form: Form) -> int:
    """Bytes that a directory has at least: of what is in its blobs but for small files."""
    return sum(blob.size for blob in version.manifest.blobs if blob.role in _ROLES[form])
