"""The ``AWS_*`` variables, looked at before obstore reads them: of what makes no URL, or no header, it finds out in
the middle of a request, and ends in a panic of Rust with a stack trace."""

from __future__ import annotations

import re
from collections.abc import Mapping

from loreg.errors import UsageError

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REGION = re.compile(r"[A-Za-z0-9-]+")
_HOST = r"(?:[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:.]+\])"
_ENDPOINT = re.compile(
    rf"https?://(?:[\w.~!$&'()*+,;=:%-]+@)?{_HOST}(?::(?P<port>\d{{1,5}}))?(?:/[\w.~!$&'()*+,;=:@%/-]*)?", re.ASCII
)


def check(variables: Mapping[str, str]) -> None:
    """Raises UsageError, which repeats nothing that may be secret. Those that are empty are as if not set."""
    for name, value in variables.items():
        if name.startswith("AWS_") and _CONTROL.search(value):
            raise UsageError(
                f"{name} cannot be used: expected text of one line, found a line break or another control character."
            )
    for name in _REGIONS:
        value = variables.get(name, "")
        if value and not _REGION.fullmatch(value):
            raise UsageError(f"{name} cannot be used: expected a region such as us-east-1, found {value!r}.")
    for name in ENDPOINTS:
        value = variables.get(name, "")
        if value and not _is_endpoint(value):
            found = "another, not repeated as it may hold a password" if "@" in value else repr(value)
            raise UsageError(
                f"{name} cannot be used: expected a URL such as https://s3.example.org or http://127.0.0.1:9000, "
                f"found {found}."
            )


def _is_endpoint(value: str) -> bool:
    found = _ENDPOINT.fullmatch(value)
    return found is not None and int(found["port"] or 1) in range(1, 1 << 16)
