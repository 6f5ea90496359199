"""What serving layers call: a verified, digest-named directory, tensors on a device, and merges in a live model."""

from __future__ import annotations

from loreg.serving.live import Merged, merge_, unmerge_
from loreg.serving.loading import load
from loreg.serving.resolving import Resolved, resolve

__all__ = ["Merged", "Resolved", "load", "merge_", "resolve", "unmerge_"]
