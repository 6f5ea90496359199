"""The registry: push, resolve, merge, unmerge, compose, export. The only floor that knows store and catalog."""

from __future__ import annotations

from loreg.registry.copying import copy_store
from loreg.registry.core import Registry, Version
from loreg.registry.opening import open, rebuild_catalog  # noqa: A004 - loreg.open() is the contract

__all__ = ["Registry", "Version", "copy_store", "open", "rebuild_catalog"]
