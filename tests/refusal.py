"""What every refusal has in common: a type, a message, an exit code, and no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import loreg
from loreg.errors import LoregError


def catalog(registry: loreg.Registry) -> object:
    """What people can see of the catalog."""
    versions = registry.list_versions(all_versions=True)
    return versions, [(row.name, row.weights_root, row.path) for row in registry.list_bases()]


@contextmanager
def refused(registry: loreg.Registry, out: Path, error: type[LoregError], message: str, code: int) -> Iterator[None]:
    """The block raises ``error``, its class has that exit code, and neither disk nor catalog shows a trace."""
    before = catalog(registry), sorted(out.parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        yield
    assert caught.value.exit_code == code
    assert (catalog(registry), sorted(out.parent.iterdir())) == before
