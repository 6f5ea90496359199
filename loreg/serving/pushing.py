"""``push``: have a running engine load a version by its HTTP interface, or let go of it.

    push("sql:prod", "vllm", "http://gpu1:8000").request      # {"model": "sql"}, in requests from then on
    push("sql:prod", "sglang", "http://gpu1:30000").request   # {"lora_path": "sql"}
    push("sql:prod", "sglang", "http://gpu1:30000", unload=True)

The engine is told a path: it has to see the same directory under the same path, on a shared disk or on this machine.
It may read there again at any time, so the directory is held for it (``directories.py``): from before it is told,
until it has let go. What each engine can be told, and which of its versions was read for it, is in ``speaking.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loreg.digest import Digest
from loreg.errors import CheckFailed, Conflict, LoregError, RemoteError, Unsupported, UsageError
from loreg.format import canonical_json
from loreg.format.reference import Reference
from loreg.registry import Registry
from loreg.serving import signals
from loreg.serving.beside import Hold, Holder
from loreg.serving.calling import Again, Server, is_nobody
from loreg.serving.defaults import default_registry
from loreg.serving.directories import Directories
from loreg.serving.preflight import limits_of, preflight
from loreg.serving.resolving import Resolver
from loreg.serving.speaking import SPEAKERS
from loreg.serving.telling import Adapter, Speaker
from loreg.serving.twins import in_thread
from loreg.staging import scratch

Action = Literal["loaded", "replaced", "present", "unloaded", "absent", "released"]

TIMEOUT = 120.0
_PAUSE = 0.25
"""Seconds before the first retry; each further one waits twice as long."""
_TURN = 0.05
"""Seconds between two looks whether another push is done."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was done. ``present``, ``absent``: nothing, as it was so already. ``released``: the engine was not told,
    as it has ended or cannot be; what was held for it is held no more.

    ``digest``, ``path``: of what the engine has under ``name`` now, None after ``unload``. ``request``: the fields by
    which a request to the engine chooses the adapter.
    """

    engine: str
    url: str
    name: str
    action: Action
    digest: Digest | None
    path: str | None
    request: Mapping[str, Any]


def push(
    reference: str,
    engine: str,
    url: str,
    registry: Registry | None = None,
    *,
    name: str | None = None,
    base: str | Path | Digest | None = None,
    unload: bool = False,
    key: str | None = None,
    timeout: float = TIMEOUT,
    retries: int = 3,
    **limits: Any,
) -> Pushed:
    """Load the version into the engine at ``url`` under ``name`` (default: the name in the reference), in place of
    what it has under that name; or take out what it has under it, with ``unload``.

    ``base``: what the engine serves, as ``resolve`` takes it: a version of another is refused before the engine is
    told. Without it nothing is compared: what an engine calls its model need not be a name of one here. ``limits``:
    how the engine was started, as ``preflight`` takes them: what it would refuse, misread or ignore is refused here,
    and what the folded form mends is given it in that form. Again is the same: what the engine has already it is not
    told anew. vLLM swaps the name in one step; SGLang is told to let go of the old one first, and gets it back if it
    refuses the new one. ``key``: a bearer token. ``timeout``: seconds for all of it. ``retries``: of what may pass,
    such as a connection that is refused or an engine that is overloaded; each begins with a look at what the engine
    has.

    The directory stays for the engine, whatever the limits of a ``Cache``: that is recorded before the engine is told
    of it, and ends with the ``unload``, with another version in its place, or where the engine certainly has not got
    it. ``unload`` ends it also where nothing listens at ``url`` any more, and for an engine that cannot be told: of
    all that was pushed under the name, or of one version, if the reference says which. ``serving.held`` lists what is
    held. To one engine there is one push at a time from a registry.

    Raises Unsupported for an engine that cannot be told, and for a version that it would not serve right; RemoteError
    with what the engine says; Conflict if another push to it is not done in time; CheckFailed if it cannot be
    recorded that the directory stays: then nothing is loaded; BaseMismatch, NotFound, UsageError, and what
    ``resolve`` raises.
    """
    if engine not in SPEAKERS:
        raise UsageError(f"{engine!r} is no engine that can be pushed to: expected one of {', '.join(SPEAKERS)}.")
    action = "unload" if unload else "load"
    if not timeout > 0:
        raise UsageError(f"timeout is {timeout}: expected seconds, above 0.")
    with signals.default().time("push", engine=engine, action=action, outcome="failed") as timer:
        speaker = SPEAKERS[engine](Server(url, key, time.monotonic() + timeout))
        speaker.require(unload=unload, named=name is not None)
        limits = limits_of(engine, limits)
        registry = registry or default_registry()
        if speaker.reads:
            chosen = _name(reference, name)
        else:
            chosen = Reference.parse(reference).name or registry.find(reference).name
        errand = _Errand(registry, speaker, reference, chosen, retries, base)
        with errand.alone(even_so=unload):
            adapter, done = errand.unload() if unload else errand.load(limits)
        timer.labels["outcome"] = done
    digest = None if unload else Digest.parse(adapter.digest)
    request = {} if unload else speaker.request(adapter)
    path = None if unload else speaker.place(adapter)
    return Pushed(engine, speaker.server.shown, adapter.name, done, digest, path, request)


push_async = in_thread(push)


class _Errand:
    """One push, to one engine: what is told it, and what is held for it."""

    def __init__(
        self,
        registry: Registry,
        speaker: Speaker,
        reference: str,
        name: str,
        retries: int,
        base: str | Path | Digest | None,
    ) -> None:
        self._registry, self._speaker, self._retries = registry, speaker, retries
        self._reference, self._name, self._base = reference, name, base
        self._resolver = Resolver.of(registry)
        self._holder = Holder(speaker.engine, speaker.server.shown, name)

    @property
    def _directories(self) -> Directories:
        return self._resolver.directories

    @contextmanager
    def alone(self, *, even_so: bool) -> Iterator[None]:
        """No other push to the same engine: of two, the one that was told last would release what the other holds.

        Raises Conflict if that is not so in time. ``even_so``: also where the disk is too full to see to that.
        """
        server = self._speaker.server
        address = Digest.of(canonical_json.dumps([self._holder.engine, self._holder.url])).short
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(scratch(self._directories.root / address, "push"))
                    break
                except Conflict:
                    if time.monotonic() + _TURN > server.deadline:
                        raise Conflict(
                            f"Another push to {server.shown} goes on: wait for it, or allow more time."
                        ) from None
                except CheckFailed:
                    if even_so:
                        break
                    raise
                time.sleep(_TURN)
            yield

    def load(self, limits: Mapping[str, Any]) -> tuple[Adapter, Action]:
        while True:
            adapter = self._ready(limits)
            directory = Path(adapter.path).name
            with suppress(Conflict):  # it was deleted between the two
                new = self._speaker.reads and self._directories.hold(directory, self._holder)
                break
        try:
            done = self._persist(lambda: self._speaker.load(adapter))
        except LoregError:
            if new and not self._speaker.may_have(adapter):
                with suppress(CheckFailed):  # it stays held, for all to see
                    self._release({directory})
            raise
        if self._speaker.replaces:
            self._release({hold.directory for hold in self._held()} - {directory})
        return adapter, done

    def unload(self) -> tuple[Adapter, Action]:
        adapter = Adapter(self._name, "", "", versions=self._versions())
        try:
            done: Action = self._persist(lambda: self._speaker.unload(adapter))
            released = {hold.directory for hold in self._held()}
        except (RemoteError, Unsupported) as error:
            if isinstance(error, RemoteError) and not is_nobody(error.__cause__):
                raise
            done, released = "released", {hold.directory for hold in self._held() if self._is_meant(hold)}
            if not released:
                raise
        self._release(released)
        return adapter, done

    def _ready(self, limits: Mapping[str, Any]) -> Adapter:
        """What is to be loaded, in the form that the engine reads right."""
        engine = self._speaker.engine
        found = preflight(self._reference, engine, self._registry, **limits)
        if found.form is None:
            lasting = [each for each in found.findings if not each.folded]
            reasons = " ".join(f"{each.subject}: {each.reason} {each.remedy}" for each in lasting)
            raise Unsupported(f"{engine} would not serve {self._reference} as it was trained. {reasons}")
        if self._base is not None:
            self._resolver.require_base(self._resolver.find(str(found.digest)), self._base)
        path = ""
        if self._speaker.reads:
            resolved = self._resolver.resolve(str(found.digest), form=found.form)  # by its digest: the tag may move
            path = str(resolved.path.absolute())
        return Adapter(self._name, path, str(found.digest), found.stacked, found.form, self._versions())

    def _versions(self) -> list[Digest]:
        """All of the name, removed ones too: of interest to an engine that knows no names."""
        if self._speaker.reads:
            return []
        rows, removed = self._registry.log(self._name)[0], self._registry.trash()
        return [row.digest for row in (*rows, *removed) if row.name == self._name]

    def _held(self) -> list[Hold]:
        """For this engine, under this name."""
        return [hold for hold in self._directories.holds() if hold.key == self._holder.key]

    def _is_meant(self, hold: Hold) -> bool:
        """Whether the reference stands for it: for an engine that has several versions of a name, not only by its
        name."""
        parsed = Reference.parse(self._reference)
        if self._speaker.replaces or parsed == Reference(parsed.name):
            return True
        return hold.directory.partition("-")[0] == self._registry.find(parsed).digest.hex

    def _release(self, directories: set[str]) -> None:
        for directory in sorted(directories):
            self._directories.release(directory, self._holder)

    def _persist(self, step: Callable[[], Action]) -> Action:
        retries, pause = self._retries, _PAUSE
        while True:
            try:
                return step()
            except Again as error:
                if retries <= 0 or time.monotonic() + pause > self._speaker.server.deadline:
                    raise error.reason from error.__cause__
            time.sleep(pause)
            retries, pause = retries - 1, 2 * pause


def held(registry: Registry | None = None) -> list[Hold]:
    """What stays for engines: of which directory, for which engine, under which name, since when. Raises CheckFailed
    if that cannot be read."""
    return Resolver.of(registry or default_registry()).directories.holds()


def _name(reference: str, name: str | None) -> str:
    parsed = Reference.parse(reference).name
    chosen = name or parsed
    if not chosen:
        raise UsageError(f"{reference} has no name for the engine to know it by: give one, as with --name.")
    return chosen
