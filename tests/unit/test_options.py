"""The options of the suite itself reach the modules of tests, also in the workers of xdist."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import options
import postgres_server
import pytest
import s3_server


def test_what_was_asked_is_known(pytestconfig: pytest.Config) -> None:
    assert options.nightly == pytestconfig.getoption("--nightly")
    assert options.need_servers == pytestconfig.getoption("--need-servers")


def test_a_night_tries_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for nightly, expected in ((False, (300, 16)), (True, (3000, 1))):
        monkeypatch.setattr(options, "nightly", nightly)
        assert (options.counts(300), options.one_of(16)) == expected


@pytest.mark.parametrize("begin", [s3_server.new_seaweed, postgres_server._binaries.__wrapped__])
@pytest.mark.parametrize("needed", [False, True])
def test_a_server_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, needed: bool, begin: Callable[[], object]
) -> None:
    monkeypatch.setattr(options, "need_servers", needed)
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(postgres_server.Path, "is_file", lambda _: False)
    with pytest.raises(pytest.fail.Exception if needed else pytest.skip.Exception, match="installed"):
        begin()
