"""The registry: push, resolve, merge, unmerge, compose, export. The only floor that knows store and catalog."""

from __future__ import annotations

from loreg.registry.core import Registry, Version, open  # noqa: A004 - loreg.open() is the contract

__all__ = ["Registry", "Version", "open"]
