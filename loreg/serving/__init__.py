"""What serving layers call: a verified, digest-named directory, tensors on a device, and merges in a live model.

``import loreg.serving`` is light, as ``import loreg`` is: what needs no torch, such as ``preflight``, loads none.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from loreg.serving import signals

if TYPE_CHECKING:
    from loreg.serving.attaching import Live, State, attach
    from loreg.serving.bases import Fit, check_base, check_base_async
    from loreg.serving.beside import Hold
    from loreg.serving.caching import Cache, Pin
    from loreg.serving.live import Merged, merge_, unmerge_
    from loreg.serving.loading import load, load_async
    from loreg.serving.packing import Packed, Stacked, pack, pack_async
    from loreg.serving.preflight import Preflight, preflight, preflight_async
    from loreg.serving.pushing import Pushed, held, push, push_async
    from loreg.serving.resolving import Resolved, resolve, resolve_async
    from loreg.serving.tiers import Statistics
    from loreg.serving.unmerged import Unmerged, unmerged, unmerged_async
    from loreg.serving.watching import Moved, Watch, watch, watch_async

__all__ = [
    "Cache",
    "Fit",
    "Hold",
    "Live",
    "Merged",
    "Moved",
    "Packed",
    "Pin",
    "Preflight",
    "Pushed",
    "Resolved",
    "Stacked",
    "State",
    "Statistics",
    "Unmerged",
    "Watch",
    "attach",
    "check_base",
    "check_base_async",
    "held",
    "load",
    "load_async",
    "merge_",
    "pack",
    "pack_async",
    "preflight",
    "preflight_async",
    "push",
    "push_async",
    "resolve",
    "resolve_async",
    "signals",
    "unmerge_",
    "unmerged",
    "unmerged_async",
    "watch",
    "watch_async",
]

_HOMES = {
    "Cache": "loreg.serving.caching",
    "Fit": "loreg.serving.bases",
    "Hold": "loreg.serving.beside",
    "Live": "loreg.serving.attaching",
    "Merged": "loreg.serving.live",
    "Moved": "loreg.serving.watching",
    "Packed": "loreg.serving.packing",
    "Pin": "loreg.serving.caching",
    "Preflight": "loreg.serving.preflight",
    "Pushed": "loreg.serving.pushing",
    "Resolved": "loreg.serving.resolving",
    "Stacked": "loreg.serving.packing",
    "State": "loreg.serving.attaching",
    "Statistics": "loreg.serving.tiers",
    "Unmerged": "loreg.serving.unmerged",
    "Watch": "loreg.serving.watching",
    "attach": "loreg.serving.attaching",
    "check_base": "loreg.serving.bases",
    "check_base_async": "loreg.serving.bases",
    "held": "loreg.serving.pushing",
    "load": "loreg.serving.loading",
    "load_async": "loreg.serving.loading",
    "merge_": "loreg.serving.live",
    "pack": "loreg.serving.packing",
    "pack_async": "loreg.serving.packing",
    "preflight": "loreg.serving.preflight",
    "preflight_async": "loreg.serving.preflight",
    "push": "loreg.serving.pushing",
    "push_async": "loreg.serving.pushing",
    "resolve": "loreg.serving.resolving",
    "resolve_async": "loreg.serving.resolving",
    "unmerge_": "loreg.serving.live",
    "unmerged": "loreg.serving.unmerged",
    "unmerged_async": "loreg.serving.unmerged",
    "watch": "loreg.serving.watching",
    "watch_async": "loreg.serving.watching",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loreg.serving' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


class _Package(ModuleType):
    """Of ``preflight`` and ``unmerged``, which are modules and functions in them, the function is meant."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOMES and isinstance(value, ModuleType):  # as Python does it after the import of a submodule
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
