"""The registry of whoever names none: opened once in a process, as the environment says then."""

from __future__ import annotations

import os
import threading

from loreg.registry import Registry
from loreg.registry import open as open_registry

_SETTINGS = ("LOREG_HOME", "LOREG_CATALOG", "LOREG_STORE", "LOREG_VERIFY", "HOME")
_opened: dict[tuple[object, ...], Registry] = {}
_opening = threading.Lock()


def default_registry() -> Registry:
    """``loreg.open()``, the same one as long as the process and its environment are: what was verified stays known.

    A child that was forked opens its own, as connections to a catalog cannot be shared. Raises as ``loreg.open``.
    """
    key = os.getpid(), *(os.environ.get(name) for name in _SETTINGS)
    with _opening:
        if key not in _opened:
            _opened[key] = open_registry()
        return _opened[key]


os.register_at_fork(after_in_child=lambda: globals().update(_opening=threading.Lock()))
