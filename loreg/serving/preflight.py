"""``preflight``: what an engine would do with a version, before it is given to it.

found = preflight("sql:prod", "vllm", max_lora_rank=16)
if found.form is None:
    print(*found.findings, sep="\\n")
else:
    path = resolve("sql:prod", form=found.form).path
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from loreg.digest import Digest
from loreg.errors import LoregError, UsageError
from loreg.format.manifest import AdapterManifest
from loreg.registry import Registry
from loreg.registry.storage import Storage
from loreg.serving.defaults import default_registry
from loreg.serving.engines import ENGINES, EngineRules
from loreg.serving.engines.described import Words
from loreg.serving.engines.describing import CONFIG, PEFT, describe, words_of
from loreg.serving.engines.rules import Effect, Finding
from loreg.serving.resolving import Form
from loreg.serving.twins import in_thread

__all__ = ["Effect", "Engine", "Finding", "Form", "Preflight", "preflight"]

Engine: TypeAlias = Literal["vllm", "sglang", "tensorrt-llm", "llama.cpp", "lorax", "peft"]

_LARGEST_CONFIG = 16 << 20


@dataclass(frozen=True, slots=True)
class Preflight:
    """What was found of a version and an engine; ``ok`` if nothing was.

    ``form``: the one to serve: ``peft`` if ok, ``folded`` if that is free of all that was found, else None.
    ``stacked``: whether experts are adapted as one stack, which vLLM has to be told (``is_3d_lora_weight``).
    """

    digest: Digest
    engine: str
    findings: tuple[Finding, ...]
    stacked: bool = False

    @property
    def ok(self) -> bool:
        return not self.findings

    @property
    def form(self) -> Form | None:
        if self.ok:
            return "peft"
        return "folded" if all(finding.folded for finding in self.findings) else None


def preflight(reference: str, engine: str, registry: Registry | None = None, **limits: Any) -> Preflight:
    """Every reason for which ``engine`` would refuse a version, misread it, or ignore a part of it.

    ``engine``: one of :data:`Engine`. ``limits``: how the engine was started, by its own names for that, such as
    ``max_lora_rank``; one that is not given is the engine's default, and without one there is no limit. From the
    manifest: no tensor is read. Of a version that was pushed as a PEFT directory its ``adapter_config.json`` is read
    too, a small file, as that is what an engine is given; where it is not to be had, what it has to have said follows
    from the manifest. What hangs on the model is not seen, such as which layers an engine has LoRA for in it; which
    versions of the engines were read, ``spec/engines.md`` says. Raises NotFound for an unknown reference, UsageError
    for an unknown engine, limit, or value of one.
    """
    rules, given = _rules(engine), limits_of(engine, limits)
    registry = registry or default_registry()
    version = registry.resolve(reference)
    described = describe(version.manifest, _pushed_config(registry.storage, version.manifest))
    return Preflight(version.digest, engine, rules.findings(described, given), bool(described.stacks))


preflight_async = in_thread(preflight)


def limits_of(engine: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given``, whatever its names, as the ``limits`` of ``preflight``. Raises UsageError."""
    limits = _rules(engine).limits
    for name in given:
        if name not in limits:
            known = f"one of {', '.join(limits)}" if limits else "none, as it has none"
            raise UsageError(f"{name!r} is not a limit of {engine} that decides about an adapter: expected {known}.")
    return {name: limits[name](name, value) for name, value in given.items()}


def _rules(engine: str) -> EngineRules:
    if engine not in ENGINES:
        raise UsageError(f"{engine!r} is not an engine that is known here: expected one of {', '.join(ENGINES)}.")
    return ENGINES[engine]


def _pushed_config(storage: Storage, manifest: AdapterManifest) -> Words | None:
    source = manifest.source
    if source is None or source.format != PEFT:
        return None
    file = next((file for file in source.files if file.name == CONFIG), None)
    if file is None or file.size > _LARGEST_CONFIG or file.tensors:
        return None
    with suppress(LoregError):  # resolve says what is wrong with the store; here the manifest is enough
        return words_of(storage.read(file.blob))
    return None
