"""NVIDIA Dynamo: ``loreg://sql:prod`` as the source of an adapter.

    DYN_LORA_DOWNLOADER_PLUGIN=loreg.integrations.dynamo:Source DYN_LORA_ALLOWED_SCHEMES=loreg …

``Source`` is both of the things that Dynamo asks such a class to be. Its main branch (``components/src/dynamo/common/
lora/runtime.py``, protocol version 2 of ``RuntimeLoRAResolverProtocol``) loads it by that variable, and asks it for
adapters that requests name. Dynamo 1.6.1 (``dynamo/common/lora/manager.py``, ``LoRASourceProtocol``) has no variable
for it: there ``LoRAManager.register_custom_source("loreg", Source())`` makes it known, in the program that makes the
manager.

What a URI means is asked anew each time, so a tag that moved is another directory, and its digest another revision.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loreg.errors import NotFound, RemoteError, Unsupported, UsageError

if TYPE_CHECKING:
    from loreg.registry import Registry
    from loreg.serving.preflight import Engine
    from loreg.serving.resolving import Resolved

SCHEME = "loreg"
ENGINE = "LOREG_DYNAMO_ENGINE"


class Source:
    """Versions of a registry. ``registry``: default is one that is opened once for the process.

    ``engine``: what Dynamo's worker runs, ``vllm`` (the default, or ``$LOREG_DYNAMO_ENGINE``), ``sglang`` or
    ``tensorrt-llm``: a version comes in the form that it reads right, and one that it would misread is refused.
    """

    protocol_version = 2

    def __init__(self, registry: Registry | None = None, engine: Engine | None = None) -> None:
        self._registry = registry
        self._engine: Any = engine or os.environ.get(ENGINE) or "vllm"

    @property
    def schemes(self) -> frozenset[str]:
        return frozenset({SCHEME})

    async def resolve(self, *, source_uri: str, context: Any) -> Any:
        """Dynamo's ``ResolvedLoRA``, or None for what is not there. ``context``: Dynamo's ``ResolveContext``, whose
        deadline, limit and place of the cache are kept. Raises what ``serving.resolve`` does, and Unsupported."""
        from dynamo.common.lora.runtime import ResolvedLoRA

        left = context.deadline_monotonic - asyncio.get_running_loop().time()
        if left <= 0:
            raise RemoteError(f"{source_uri} was asked for {-left:.1f} s after its deadline: ask with more time.")
        limits = {"timeout": left, "max_bytes": context.max_download_bytes}
        try:
            # Below Dynamo's own root: it counts what lies there, and takes nothing from elsewhere for its own.
            found = await asyncio.to_thread(self._resolved, source_uri, context.cache_root / SCHEME, **limits)
        except NotFound:
            return None
        return ResolvedLoRA(local_path=found.path, source_revision=str(found.digest), size_bytes=found.nbytes)

    async def exists(self, lora_uri: str) -> bool:
        """Whether the URI means anything now. Raises UsageError for one that is malformed."""
        return await asyncio.to_thread(self._open().digest_of, reference_of(lora_uri)) is not None

    async def download(self, lora_uri: str, dest_path: Path) -> Path:
        """Where the version lies: beside ``dest_path``, which Dynamo names by the URI, and a tag can move."""
        return (await asyncio.to_thread(self._resolved, lora_uri, dest_path.parent / SCHEME)).path

    def _open(self) -> Registry:
        from loreg.serving.defaults import default_registry

        return self._registry or default_registry()

    def _resolved(self, uri: str, cache: Path, **limits: Any) -> Resolved:
        from loreg.serving.preflight import preflight
        from loreg.serving.resolving import resolve

        registry = self._open()
        # How large a rank the worker was started for is its own to say: here it is only asked what is misread.
        found = preflight(reference_of(uri), self._engine, registry)
        lasting = [each for each in found.findings if not each.folded and each.subject != "rank"]
        if lasting:
            reasons = " ".join(f"{each.subject}: {each.reason} {each.remedy}" for each in lasting)
            raise Unsupported(f"{self._engine} would not serve {uri} as it was trained. {reasons}")
        form: Any = "folded" if any(each.folded for each in found.findings) else "peft"
        return resolve(str(found.digest), registry, form=form, cache=cache, **limits)


def reference_of(uri: str) -> str:
    """``loreg://sql:prod``, or with one colon and no slashes, as the reference. Raises UsageError for another URI."""
    scheme, colon, rest = uri.partition(":")
    reference = rest.removeprefix("//")
    if scheme.lower() != SCHEME or not colon or not reference:
        raise UsageError(
            f"{uri!r} is no source of an adapter: expected {SCHEME}:// and a reference, as in loreg://sql."
        )
    return reference
