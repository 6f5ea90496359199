"""What serving layers call: a verified, digest-named directory, tensors on a device, and merges in a live model."""

from __future__ import annotations

from loreg.serving.attaching import Live, State, attach
from loreg.serving.bases import Fit, check_base
from loreg.serving.caching import Cache, Pin
from loreg.serving.live import Merged, merge_, unmerge_
from loreg.serving.loading import load
from loreg.serving.packing import Packed, Stacked, pack
from loreg.serving.preflight import Preflight, preflight
from loreg.serving.pushing import Pushed, push, push_async
from loreg.serving.resolving import Resolved, resolve, resolve_async
from loreg.serving.tiers import Statistics
from loreg.serving.unmerged import Unmerged, unmerged
from loreg.serving.watching import Moved, Watch, watch, watch_async

__all__ = [
    "Cache",
    "Fit",
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
    "load",
    "merge_",
    "pack",
    "preflight",
    "push",
    "push_async",
    "resolve",
    "resolve_async",
    "unmerge_",
    "unmerged",
    "watch",
    "watch_async",
]
