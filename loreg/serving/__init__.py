"""What serving layers call: a verified, digest-named directory, tensors on a device, and merges in a live model."""

from __future__ import annotations

from loreg.serving.attaching import Live, State, attach
from loreg.serving.bases import Fit, check_base, check_base_async
from loreg.serving.caching import Cache, Pin
from loreg.serving.live import Merged, merge_, unmerge_
from loreg.serving.loading import load, load_async
from loreg.serving.packing import Packed, Stacked, pack, pack_async
from loreg.serving.preflight import Preflight, preflight, preflight_async
from loreg.serving.pushing import Pushed, push, push_async
from loreg.serving.resolving import Resolved, resolve, resolve_async
from loreg.serving.tiers import Statistics
from loreg.serving.unmerged import Unmerged, unmerged, unmerged_async
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
    "check_base_async",
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
    "unmerge_",
    "unmerged",
    "unmerged_async",
    "watch",
    "watch_async",
]
