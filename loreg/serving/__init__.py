"""What serving layers call: a verified, digest-named directory, or tensors on a device."""

from __future__ import annotations

from loreg.serving.loading import load
from loreg.serving.resolving import Resolved, resolve

__all__ = ["Resolved", "load", "resolve"]
