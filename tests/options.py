"""What pytest's command line asks of all tests, as ``pytest --help`` says.

``conftest.py`` sets it before any module of tests is imported.
"""

from __future__ import annotations

from typing import NoReturn

import pytest

nightly = False
need_servers = False


def counts(usual: int) -> int:
    """How many cases are tried: as many as every commit can wait for, and ten times as many at night."""
    return usual * (10 if nightly else 1)


def one_of(usual: int) -> int:
    """Of how many cases one is tried, where it is known how many there are: at night each of them is."""
    return 1 if nightly else usual


def no_server(reason: str) -> NoReturn:
    """Skips a test whose server cannot be had; fails it where all of them have to be there."""
    if need_servers:
        pytest.fail(reason)
    pytest.skip(reason)
