"""Addresses that are none, and variables that are set wrongly: a typed error says what was expected, nothing is made
on the disk, and no part of a password is repeated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import s3_server
import tiny

import loreg
from loreg.errors import LoregError, UsageError
from loreg.store import LocalStore, open_store


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for name in ("LOREG_HOME", "LOREG_CATALOG", "LOREG_STORE"):
        monkeypatch.delenv(name, raising=False)


def refused(home: Path | str, family: type[LoregError] = UsageError, **where: str) -> str:
    """What is said; neither the working directory nor the home has anything new."""
    with pytest.raises(family) as raised:
        loreg.open(home, **where)
    assert list(Path().iterdir()) == []
    assert "secret" not in str(raised.value)
    return str(raised.value)


# --- URLs that are mistyped -----------------------------------------------------------------------------


CATALOGS = [
    "postgresql:/bob:topsecret@h/db",
    "postgresql:bob:topsecret@h/db",
    "postgresql+psycopg:/h/db",
    "sqlite:/x.db",
    "sqlite:x.db",
    "s3:/bucket",
    ":/x",
    "://x",
    "bob:topsecret@postgresql://h/db",
]


@pytest.mark.parametrize("address", CATALOGS)
def test_a_mistyped_catalog(tmp_path: Path, address: str) -> None:
    said = refused(tmp_path / "home", catalog=address)
    assert "looks like a URL and is none: expected the path of a file, sqlite:///" in said
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("address", ["sqlite://bob:topsecret@h/x.db", "sqlite://h/x.db", "sqlite://h:1/x.db"])
def test_a_file_on_a_host(tmp_path: Path, address: str) -> None:
    assert "found a host, a user or a password" in refused(tmp_path / "home", catalog=address)


def test_settings_of_a_file(tmp_path: Path) -> None:
    assert "found settings after a ?" in refused(tmp_path / "home", catalog="sqlite:///x.db?key=topsecret")


@pytest.mark.parametrize("address", ["s3:/bucket", "s3:bucket", "file:/x", "file:x", "bob:topsecret@s3://bucket"])
def test_a_mistyped_store(tmp_path: Path, address: str) -> None:
    said = refused(tmp_path / "home", store=address)
    assert "looks like a URL and is none: expected an absolute path" in said


@pytest.mark.parametrize("address", ["x", "file://x", "file://bob:topsecret@h/x"])
def test_a_store_at_a_relative_path(tmp_path: Path, address: str) -> None:
    assert "expected an absolute path" in refused(tmp_path / "home", store=address)


@pytest.mark.parametrize("home", ["s3://bucket/x", "postgresql://bob:topsecret@h/db", "file:///x"])
def test_a_home_that_is_elsewhere(home: str) -> None:
    assert "LOREG_STORE and LOREG_CATALOG" in refused(home)


def test_a_mistyped_source_of_copies(pushed: loreg.Registry) -> None:
    with pytest.raises(UsageError, match="looks like a URL and is none"):
        pushed.fsck(repair=True, sources=["s3:/bucket"])


def test_paths_with_a_colon(tmp_path: Path) -> None:
    """They are paths if they are there, or are written so that they can be nothing else."""
    for catalog in ("./a:b.db", str(tmp_path / "work" / "sqlite:" / "c.db"), "sqlite:/c.db", "a:b.db"):
        loreg.open(tmp_path / "home", catalog=catalog, store=f"{tmp_path}/s3:/store").close()
    assert {path.name for path in Path().iterdir()} >= {"a:b.db", "sqlite:"}


# --- homes ----------------------------------------------------------------------------------------------


def test_the_home_of_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pushed: loreg.Registry) -> None:
    nobody = "~nobody-at-all/x"
    assert "~nobody-at-all" in refused(nobody)
    assert "~nobody-at-all" in refused(tmp_path / "home", store=nobody)
    assert "~nobody-at-all" in refused(tmp_path / "home", store=f"file://{nobody}")
    assert "~nobody-at-all" in refused(tmp_path / "home", catalog=nobody)
    monkeypatch.setenv("LOREG_HOME", nobody)
    assert "~nobody-at-all" in refused("")
    for call in (lambda: pushed.add_base(nobody), lambda: pushed.fsck(repair=True, sources=[nobody])):
        with pytest.raises(UsageError, match="~nobody-at-all"):
            call()


def test_a_home_in_a_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    loreg.open("~/home", catalog="~/here.db", store="~/store").close()
    assert (tmp_path / "here.db").is_file()


# --- the variables of S3 --------------------------------------------------------------------------------


VARIABLES = [
    *(("AWS_ENDPOINT_URL", value) for value in ("127.0.0.1:9000", "http://", "://", "http:///x", "HTTP://h", "h")),
    *(("AWS_ENDPOINT_URL", value) for value in ("http://a b:9", "http://h:99999", "http://h:x", "http://[::1")),
    *(
        ("AWS_ENDPOINT_URL", value)
        for value in ("http://münchen", "http://h/a b", "http://h?x", "http://h#x", "ftp://h")
    ),
    ("AWS_ENDPOINT_URL_S3", "127.0.0.1:9000"),
    ("AWS_ENDPOINT", "127.0.0.1:9000"),
    ("AWS_REGION", "us east"),
    ("AWS_REGION", "us-east-1 "),
    ("AWS_DEFAULT_REGION", "us east"),
]


@pytest.fixture
def _amazon(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a server of Amazon's, which no test may reach."""
    for name, value in s3_server.environment("http://127.0.0.1:1").items():
        monkeypatch.setenv(name, value)
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_amazon")
@pytest.mark.parametrize(("name", "value"), VARIABLES)
def test_a_variable_that_obstore_would_panic_at(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as raised:
        open_store("s3://bucket/x")
    said = str(raised.value)
    assert said.startswith(f"{name} cannot be used: expected ") and f"found {value!r}" in said


@pytest.mark.usefixtures("_amazon")
@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION"])
def test_a_variable_of_two_lines(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "top\nsecret")
    with pytest.raises(UsageError, match=f"^{name} cannot be used: expected text of one line") as raised:
        open_store("s3://bucket/x")
    assert "secret" not in str(raised.value)


@pytest.mark.usefixtures("_amazon")
def test_an_endpoint_with_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://bob:top@secret@h")
    with pytest.raises(UsageError, match="AWS_ENDPOINT_URL cannot be used") as raised:
        open_store("s3://bucket/x")
    assert "secret" not in str(raised.value)


@pytest.mark.usefixtures("_amazon")
@pytest.mark.parametrize(
    "value", ["https://s3.example.org", "http://[::1]:9/", "http://h_x:80/a/b", "http://bob:secret@h", ""]
)
def test_an_endpoint_that_is_one(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", value)
    assert str(open_store("s3://bucket/x")) == "s3://bucket/x"


@pytest.mark.usefixtures("_amazon")
def test_the_command_shows_no_panic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "127.0.0.1:9000")
    monkeypatch.setenv("LOREG_STORE", "s3://bucket/x")
    command = [sys.executable, "-m", "loreg.cli", "ls", "--home", str(tmp_path / "home")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == UsageError.exit_code and done.stderr.count("\n") == 1
    assert "AWS_ENDPOINT_URL" in done.stderr and not (tmp_path / "home").exists()


@pytest.mark.usefixtures("_amazon")
def test_a_panic_that_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3's is."""

    def panic(*_: object) -> None:
        raise PanicException("topsecret")

    monkeypatch.setattr("obstore.head", panic)
    with pytest.raises(UsageError, match=r"check the AWS_\* variables") as raised:
        open_store("s3://bucket/x").quarantine_record(1)
    assert "secret" not in str(raised.value)


# --- what stores are called -----------------------------------------------------------------------------


def test_a_store_is_called_by_its_place(pushed: loreg.Registry, tmp_path: Path) -> None:
    assert str(LocalStore(tmp_path)) == str(tmp_path)
    other = loreg.open(tmp_path / "other")
    other.add_base(tiny.write_model(tmp_path / "model", tiny.model()), "base")
    with pytest.raises(LoregError, match=f"^{tmp_path}/other belongs to another catalog"):
        loreg.open(tmp_path / "third", store=str(tmp_path / "other"))
