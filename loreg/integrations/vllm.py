"""vLLM: adapters of a registry under the names that requests ask for, and other weights when a tag moves.

    LOREG_HOME=… VLLM_PLUGINS=loreg VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora

Then ``"model": "sql:prod"`` is that version, and so is whatever else refers to one: ``sql``, ``sql:v2``,
``sql@blake3:…``. For vLLM 0.31 or later: earlier ones take what their KV cache holds for a name for that of all
versions of it. There are two plugins of one name.

``register`` (``vllm.general_plugins``) registers a ``LoRAResolver``, which vLLM asks for a name that it does not
know. It answers with a directory that is named by the version's digest and never overwritten, so that the KV cache,
whose blocks vLLM keys by the adapter's name and path (0.32, ``v1/core/kv_cache_utils.py``,
`_gen_lora_extra_hash_keys`), is never that of other weights. To all that it does not serve it answers None, and logs
one line: an exception there is a 500, and the end of the search for one who does.

``Following`` (``vllm.endpoint_plugins``) is loaded if ``VLLM_PLUGINS`` names it. vLLM keeps the name of what it has
loaded, and does not ask for it again (0.32, ``entrypoints/openai/models/serving.py``, `OpenAIServingModels`): without
this plugin, a tag that moved is served once ``POST /v1/unload_lora_adapter`` was sent. With it, the catalog is asked
each second to what the names refer that are loaded; other weights are loaded beside the old ones and take over their
name: what is running ends with the weights that it began with, and no request finds the name missing. It also tells
the resolver how the engine was started, so that an adapter that is too large for it is refused before it is fetched.

``LOREG_VLLM_BASE``: the base that the engine serves, if that is not to be seen from its model: the name of a
registered one, a directory, or a weights_root. ``LOREG_VLLM_POLL``: seconds between two looks at the tags. A name
that refers to nothing any more, or to what vLLM does not serve, goes on as it was until it is unloaded; the log says
so.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loreg.addresses import directory
from loreg.digest import Digest
from loreg.errors import BaseMismatch, LoregError, NotFound, Unsupported, UsageError

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

    from loreg.registry import Registry, Version
    from loreg.serving.resolving import Form

NAME = "loreg"
BASE, POLL = "LOREG_VLLM_BASE", "LOREG_VLLM_POLL"

_FOLLOWING = (0, 31)
"""The first vLLM whose KV cache tells two versions under one name apart: 0.30 has no path in its key."""
_PATTERNS = (0, 32)
"""The first that reads rank_pattern and alpha_pattern: 0.31 gives all modules the scale of one, and no error."""
_ANY_RANK = 512
"""The largest that vLLM can be started with (0.32, ``config/lora.py``): where its own limit is not known, it refuses
by itself what is above."""
_POLL_S = 1.0
_AGAIN_S = 60.0
"""Until a name that has moved, and could not be served from there, is tried again."""
_NAME, _SAID = 100, 512
"""Characters of a name, and of what is said of it, that are logged: both may hold what a stranger asked for."""

# vLLM sets up the loggers below its own name, and no others.
_log = logging.getLogger("vllm.loreg")


def register() -> None:
    """Register the resolver with vLLM; once, however often this is called."""
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    LoRAResolver.register(Resolver)
    if NAME not in LoRAResolverRegistry.get_supported_resolvers():
        LoRAResolverRegistry.register_resolver(NAME, RESOLVER)


class Served(NamedTuple):
    """What vLLM was given for a name, and the version that it is.

    ``pin``: keeps its directory until it is closed, and an hour longer, as requests may still run: vLLM reads it
    again whenever it has made room for other adapters.
    """

    request: LoRARequest
    digest: Digest
    pin: ExitStack


@dataclass(slots=True)
class Resolver:
    """A ``LoRAResolver`` of vLLM's (0.32, ``lora/resolver.py``). What it opens, it opens when it is asked, once for
    each process.

    ``limits``: how the engine was started, as ``preflight`` takes it. ``patience``: seconds for one answer.
    ``served``: by name, what was answered last.
    """

    limits: dict[str, Any] = field(default_factory=lambda: {"max_lora_rank": _ANY_RANK})
    patience: float = 60.0
    served: dict[str, Served] = field(default_factory=dict)

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The version that ``lora_name`` refers to, or None; never an exception.

        ``base_model_name``: the model that the engine was started with, a directory or a Hub id. Waits for a thread;
        what was not ready in time is still being made, for whoever asks again. vLLM puts an id of its own into what
        is returned.
        """
        found = await self.answer(base_model_name, lora_name)
        if found is None:
            return None
        self.serve(lora_name, found)
        return found.request

    def serve(self, name: str, found: Served) -> None:
        """Note that vLLM has ``found`` under ``name``."""
        before = self.served.get(name)
        self.served[name] = found
        if before is not None:
            before.pin.close()

    async def answer(self, base_model_name: str, lora_name: str) -> Served | None:
        """``resolve_lora``, for one who does not serve it yet."""
        name = _short(lora_name)
        try:
            return await asyncio.wait_for(asyncio.to_thread(self._answer, base_model_name, lora_name), self.patience)
        except TimeoutError:
            _log.warning("%s is not served yet: it is not ready after %g s; ask again.", name, self.patience)
        except NotFound as error:  # perhaps another resolver knows it
            _log.info("%s is not served from the registry: %s", name, _cut(error))
        except LoregError as error:
            _log.warning("%s is not served: %s", name, _cut(error))
        except Exception as error:
            _log.error("%s is not served: %s: %s", name, type(error).__name__, _cut(error))
        return None

    def _answer(self, base_model_name: str, lora_name: str) -> Served:
        from vllm.lora.request import LoRARequest

        from loreg.serving import resolving

        registry = _registry()
        version = registry.resolve(lora_name)
        _check_base(registry, version, base_model_name)
        reference = str(version.digest)  # the tag may move meanwhile
        resolver, pin = resolving.Resolver.of(registry), ExitStack()
        form, stacked = _form(registry, reference, self.limits)
        found = resolver.resolve(reference, form=form)
        pin.enter_context(resolver.directories.pinned(found.path.name))
        pin.callback(resolver.directories.note, found.path.name)
        request = LoRARequest(lora_name, request_id(found.digest), str(found.path))
        if stacked:
            request.is_3d_lora_weight = True
        return Served(request, found.digest, pin)


RESOLVER = Resolver()
"""The one of this process, which both plugins use."""


class Following:
    """An ``EndpointPlugin`` of vLLM's (0.32, ``plugins/endpoint_plugins/interface.py``). It adds no route: plugins of
    this kind are given the server's list of adapters, which is what it needs."""

    name = NAME
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Nothing to attach."""

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Begin to follow, until the event loop ends. Raises UsageError, which ends the start of the server."""
        interval = _interval()
        config = engine_client.vllm_config.lora_config if engine_client is not None else None
        if config is None:
            _log.warning("No adapters are served: vLLM was started without --enable-lora.")
            return
        RESOLVER.limits |= _limits(config)
        if _version() < _FOLLOWING:
            _log.warning("Tags are not followed: that needs vLLM %d.%d or later.", *_FOLLOWING)
            return
        state.loreg = asyncio.create_task(Follower(state.openai_serving_models, RESOLVER).run(interval))


@dataclass(slots=True)
class Follower:
    """Brings what ``models``, an ``OpenAIServingModels``, has loaded to where its names point now.

    Uses of that (0.32) ``lora_requests``, ``lora_resolver_lock``, ``model_config``, ``engine_client``, and
    ``lora_id_counter``, whose numbers no other adapter has in the engine. Its own way to load other weights under a
    name, ``load_inplace``, would put them into requests that are running, and has the files read again at each step
    of the engine (``lora/worker_manager.py``, `LRUCacheWorkerLoRAManager.add_adapter`).
    """

    models: Any
    resolver: Resolver
    _reached: bool = True
    _refused: dict[str, tuple[Digest | None, float]] = field(default_factory=dict)

    async def run(self, interval: float) -> None:
        """Look every ``interval`` seconds, until the task is cancelled."""
        while True:
            await asyncio.sleep(interval)
            await self.look()

    async def look(self) -> None:
        """Load what names have moved to. Raises nothing."""
        try:
            loaded = {
                name: served for name, served in self.resolver.served.items()
                if self.models.lora_requests.get(name) is served.request
            }  # fmt: skip
            if not loaded:
                return
            known = {name: served.digest for name, served in loaded.items()}
            moved = await asyncio.to_thread(_moved, known)
        except Exception as error:
            if self._reached:
                _log.warning("Tags are not followed for now: %s: %s", type(error).__name__, _cut(error))
            self._reached = False
            return
        self._reached = True
        for name, digest in moved.items():
            refused = self._refused.get(name)
            if refused is not None and refused[0] == digest and time.monotonic() - refused[1] < _AGAIN_S:
                continue
            if not await self._follow(name, digest, loaded[name]):
                self._refused[name] = digest, time.monotonic()

    async def _follow(self, name: str, digest: Digest | None, old: Served) -> bool:
        still = f"{_short(name)} is still served from {old.request.lora_path}"
        if digest is None:
            _log.warning("%s, and refers to no version any more; unload it if it should end.", still)
            return False
        new = await self.resolver.answer(self.models.model_config.model, name)
        if new is None:
            _log.warning("%s, though it refers to %s now.", still, digest)
            return False
        try:
            async with self.models.lora_resolver_lock[name]:
                if self.models.lora_requests.get(name) is not old.request:  # unloaded, or loaded from elsewhere
                    return True
                new.request.lora_int_id = self.models.lora_id_counter.inc(1)
                await self.models.engine_client.add_lora(new.request)
                self.models.lora_requests[name] = new.request
        except Exception as error:
            _log.warning("%s: vLLM does not load %s: %s", still, new.request.lora_path, _cut(error))
            return False
        self.resolver.serve(name, new)
        _log.info("%s is served from %s now.", _short(name), new.request.lora_path)
        return True


def request_id(digest: Digest) -> int:
    """1 to 2³¹ - 1, the same for the same version. vLLM keeps ids in 32 bits (0.32, ``v1/worker/gpu/lora_utils.py``),
    so two versions of very many may have the same: where it takes ours, it has to give ids itself, and does."""
    return int.from_bytes(digest.raw[:4], "big") >> 1 or 1


def _registry() -> Registry:
    """The one of the environment, opened once. Raises NotFound where there is none, which opening it would make."""
    from loreg.serving.defaults import default_registry

    home = directory(os.environ.get("LOREG_HOME") or "~/.loreg", "the home of a registry")
    if not os.environ.get("LOREG_CATALOG") and not (home / "catalog.db").is_file():
        raise NotFound(f"there is no registry in {home}: set LOREG_HOME to where it is.")
    return default_registry()


def _moved(known: Mapping[str, Digest]) -> dict[str, Digest | None]:
    """Those of the names that refer to another version now; None for one that refers to none. Asks the catalog if
    somebody has written into it since."""
    from loreg.serving.resolving import Resolver as Resolving

    resolving, found = Resolving.of(_registry()), dict[str, Digest | None]()
    for name in known:
        try:
            found[name] = resolving.find(name).digest
        except (NotFound, UsageError):
            found[name] = None
    return {name: digest for name, digest in found.items() if digest != known[name]}


def _limits(config: Any) -> dict[str, Any]:
    """What ``preflight`` wants to know of a ``LoRAConfig`` (0.32, ``config/lora.py``)."""
    given = {
        "max_lora_rank": config.max_lora_rank,
        "lora_target_modules": config.target_modules,
        "max_lora_cls_labels": config.max_lora_cls_labels,
        "enable_mixed_moe_lora_format": config.enable_mixed_moe_lora_format,
    }
    return {name: value for name, value in given.items() if value is not None}


def _form(registry: Registry, reference: str, limits: Mapping[str, Any]) -> tuple[Form, bool]:
    """As which directory vLLM reads the version right, and whether it has experts in one stack, which a vLLM that
    takes them either way has to be told. Raises Unsupported where it would read it right in none."""
    from loreg.serving.preflight import preflight

    checked = preflight(reference, "vllm", registry, **limits)
    if checked.form is None:
        raise Unsupported(" ".join(f"{finding.reason} {finding.remedy}" for finding in checked.findings))
    return checked.form if _version() >= _PATTERNS else "folded", checked.stacked


def _version() -> tuple[int, int]:
    """Of the vLLM that runs."""
    from vllm import __version_tuple__

    return int(__version_tuple__[0]), int(__version_tuple__[1])


def _check_base(registry: Registry, version: Version, served: str) -> None:
    """Raises BaseMismatch unless the version is for the model that vLLM serves, ``served`` or what is said of it."""
    from loreg.serving.bases import fit

    expected, told = version.manifest.base, os.environ.get(BASE)
    spec = told or served
    if spec == str(expected.identity.weights_root):
        return
    if Path(spec).is_dir():  # hashed, or known by what stat says of its files
        fit(registry, version, Path(spec)).require(version, spec)
        return
    names = [row.name for row in registry.list_bases() if spec in (row.name, row.hub_repo)]
    if not any(fit(registry, version, name).holds for name in names):
        raise BaseMismatch(
            f"{version} was trained on {expected.name!r}, and {spec!r} is no name of that here; serve that base, or "
            f"set {BASE} to what the engine serves."
        )
    if not told:
        _log.warning(
            "%s is served on %r, of which only the name was compared: serve a directory, or set %s, to be sure.",
            version, spec, BASE,
        )  # fmt: skip


def _interval() -> float:
    text = os.environ.get(POLL) or str(_POLL_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{POLL} is {text!r}: expected seconds, above 0.")
    return seconds


def _short(name: str) -> str:
    return repr(name if len(name) <= _NAME else name[:_NAME] + "…")


def _cut(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= _SAID else text[:_SAID] + "…"
