"""``push``: have a running engine load a version by its HTTP interface, or let go of it.

    push("sql:prod", "sglang", "http://gpu1:30000")            # requests then name the model "sql"
    push("sql:prod", "sglang", "http://gpu1:30000", unload=True)

The engine is told a path: it has to see the same directory under the same path, on a shared disk or on this machine.
What each engine can be told, and which of its versions was read for it, is in ``speaking.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from loreg.digest import Digest
from loreg.errors import Unsupported, UsageError
from loreg.format.reference import Reference
from loreg.registry import Registry
from loreg.serving import signals
from loreg.serving.calling import Again, Server
from loreg.serving.defaults import default_registry
from loreg.serving.preflight import limits_of, preflight
from loreg.serving.resolving import resolve
from loreg.serving.speaking import SPEAKERS, Adapter
from loreg.serving.twins import in_thread

Action = Literal["loaded", "replaced", "present", "unloaded", "absent"]

TIMEOUT = 120.0
_PAUSE = 0.25
"""Seconds before the first retry; each further one waits twice as long."""


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was done. ``present``, ``absent``: nothing, as it was so already.

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
    unload: bool = False,
    key: str | None = None,
    timeout: float = TIMEOUT,
    retries: int = 3,
    **limits: Any,
) -> Pushed:
    """Load the version into the engine at ``url`` under ``name`` (default: the name in the reference), in place of
    what it has under that name; or take out what it has under it, with ``unload``.

    ``limits``: how the engine was started, as ``preflight`` takes them: what it would refuse, misread or ignore is
    refused here, and what the folded form mends is given it in that form. Again is the same: what the engine has
    already it is not told anew. vLLM swaps the name in one step; SGLang is told to let go of the old one first, and
    gets it back if it refuses the new one. ``key``: a bearer token. ``timeout``: seconds for all of it. ``retries``:
    of what may pass, such as a connection that is refused or an engine that is overloaded; each begins with a look
    at what the engine has.

    Raises Unsupported for an engine that cannot be told, and for a version that it would not serve right; RemoteError
    with what the engine says; NotFound, UsageError, and what ``resolve`` raises.
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
        if unload:
            adapter = Adapter(_name(reference, name), "", "")
        else:
            adapter = _ready(reference, engine, registry or default_registry(), name, limits)
        step: Callable[[Adapter], Action] = speaker.unload if unload else speaker.load
        done = _persist(lambda: step(adapter), speaker.server, retries)
        timer.labels["outcome"] = done
    digest = None if unload else Digest.parse(adapter.digest)
    request = {} if unload else speaker.request(adapter)
    return Pushed(engine, speaker.server.shown, adapter.name, done, digest, adapter.path or None, request)


push_async = in_thread(push)


def _ready(reference: str, engine: str, registry: Registry, name: str | None, limits: Mapping[str, Any]) -> Adapter:
    """What is to be loaded, in the form that the engine reads right."""
    chosen = _name(reference, name)
    found = preflight(reference, engine, registry, **limits)
    if found.form is None:
        lasting = [each for each in found.findings if not each.folded]
        reasons = " ".join(f"{each.subject}: {each.reason} {each.remedy}" for each in lasting)
        raise Unsupported(f"{engine} would not serve {reference} as it was trained. {reasons}")
    resolved = resolve(str(found.digest), registry, form=found.form)  # by its digest: the tag may move meanwhile
    return Adapter(chosen, str(resolved.path.absolute()), str(found.digest), found.stacked)


def _name(reference: str, name: str | None) -> str:
    parsed = Reference.parse(reference).name
    chosen = name or parsed
    if not chosen:
        raise UsageError(f"{reference} has no name for the engine to know it by: give one, as with --name.")
    return chosen


def _persist(step: Callable[[], Action], server: Server, retries: int) -> Action:
    pause = _PAUSE
    while True:
        try:
            return step()
        except Again as error:
            if retries <= 0 or time.monotonic() + pause > server.deadline:
                raise error.reason from error.__cause__
        time.sleep(pause)
        retries, pause = retries - 1, 2 * pause
