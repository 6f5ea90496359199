"""loreg: a registry and a versioned checkpoint format for LoRA adapters.

``import loreg`` is light: the public names load what they need when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loreg.algebra.delta import LowRank
    from loreg.digest import Digest
    from loreg.errors import LoregError
    from loreg.registry import Registry, Version, copy_store, open, rebuild_catalog  # noqa: A004 - the contract

__all__ = [
    "Digest",
    "LoregError",
    "LowRank",
    "Registry",
    "Version",
    "__version__",
    "copy_store",
    "open",
    "rebuild_catalog",
]

_HOMES = {
    "Digest": "loreg.digest",
    "LoregError": "loreg.errors",
    "LowRank": "loreg.algebra.delta",
    "Registry": "loreg.registry",
    "Version": "loreg.registry",
    "copy_store": "loreg.registry",
    "open": "loreg.registry",
    "rebuild_catalog": "loreg.registry",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loreg' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
