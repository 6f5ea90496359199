"""Calls to an S3-compatible server: bounded, interruptible, and failing in loreg's own words.

What obstore says in an error holds the server's whole answer, and some servers put the caller's key into it; an
endpoint can hold a password. None of that is passed on, not even as the cause of an error: only a status, and the
name that S3 gives to the refusal.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from loreg.errors import LoregError, NotFound, RemoteError, Unsupported, UsageError
from loreg.store import variables

if TYPE_CHECKING:
    from obstore.store import S3Store

T = TypeVar("T")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_PLACE = re.compile(rf"s3://(?P<bucket>{_NAME})/?(?P<prefix>(?<=/){_NAME}(?:/{_NAME})*)?/?")

REQUEST_TIMEOUT = timedelta(seconds=120)
"""For one request with its body: 16 MiB, which a link of 1.2 Mbit/s carries in that time."""

MAX_RETRIES = 8
"""Of one request, after 0.1 s, 0.2 s, … 5 s: what a server that restarts needs; half a minute where there is none."""

_UNABLE = {
    "NoSuchBucket",
    "InvalidBucketName",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "AllAccessDisabled",
}
_REFUSED = {401, 403}
_LATER = {408, 425, 429}


class Refusal(Exception):
    """What became of a request. ``kind``: ``exists``, ``absent``, ``unknown`` (it may have been done all the same),
    or another; the rest is for an error."""

    def __init__(self, kind: str, family: type[LoregError], found: str, advice: str) -> None:
        super().__init__(found)
        self.kind, self.family, self.found, self.advice = kind, family, found, advice


class Client:
    """A bucket and a prefix. Endpoint, region and credentials are those of the ``AWS_*`` environment."""

    def __init__(self, place: str) -> None:
        found = _PLACE.fullmatch(place)
        if found is None:  # not repeated: people write their keys into such addresses
            raise UsageError(
                "an address of an S3 store is s3://bucket or s3://bucket/prefix, of letters, digits and ._-/ alone."
            )
        self.bucket, self.prefix = found["bucket"], found["prefix"] or ""
        self.store = _s3_store(self.bucket, self.prefix)

    def __str__(self) -> str:
        return f"s3://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    def __repr__(self) -> str:
        return f"Client({str(self)!r})"

    def call(self, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """``function(store, …)`` of obstore. Raises Refusal."""
        try:
            return interruptible(lambda: function(self.store, *arguments, **options))
        except Exception as error:
            refusal = _refusal(error)
        except BaseException as error:
            # obstore is written in Rust, whose panics are no Exception.
            if type(error).__name__ != "PanicException":
                raise
            refusal = Refusal("wrong", UsageError, "the request could not be made", "check the AWS_* variables")
        raise refusal

    def error(self, doing: str, refusal: Refusal) -> LoregError:
        """The sentence for people."""
        return refusal.family(f"could not {doing} in the store {self}: {refusal.found}; {refusal.advice}.")


def interruptible(work: Callable[[], T], stop: Callable[[], object] = lambda: None) -> T:
    """The result of ``work``, waited for where Ctrl-C is heard: obstore is deaf until a request has ended, and with a
    server that is gone that takes minutes. An interrupt calls ``stop``, and gives ``work`` a moment to clear up."""
    done, results, errors = threading.Event(), list[T](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="loreg-s3", daemon=True).start()
    try:
        done.wait()
    except BaseException:
        stop()
        done.wait(5)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _s3_store(bucket: str, prefix: str) -> S3Store:
    try:
        from obstore.store import S3Store
    except ImportError as error:
        raise NotFound(
            "a store in S3 needs the package obstore, which is not installed: pip install 'loreg[s3]'."
        ) from error
    variables.check(os.environ)
    # Only ever permitted, never chosen: Amazon's own is spoken to in TLS.
    plain = any(os.environ.get(name, "").startswith("http://") for name in variables.ENDPOINTS)
    try:
        return S3Store(
            bucket,
            prefix=prefix or None,
            # Also where AWS_CONDITIONAL_PUT turns it off: without it two writers could share a key.
            config={"conditional_put": "etag"},
            client_options={
                "allow_http": plain,
                "connect_timeout": timedelta(seconds=10),
                "timeout": REQUEST_TIMEOUT,
            },
            retry_config={
                "max_retries": MAX_RETRIES,
                "retry_timeout": timedelta(seconds=120),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=5),
                    "base": 2,
                },
            },
        )
    except Exception:
        pass
    raise UsageError(
        f"the store s3://{bucket} cannot be used with the AWS_* variables that are set: expected AWS_ACCESS_KEY_ID, "
        "AWS_SECRET_ACCESS_KEY, AWS_REGION and, unless it is Amazon's, AWS_ENDPOINT_URL."
    )


def _refusal(error: Exception) -> Refusal:
    """An exception of obstore, told apart by its class, by the status and the code that it quotes, and by nothing
    else that it says."""
    kind, said = type(error).__name__, str(error)
    status = int(found[1]) if (found := re.search(r"status code: (\d{3})\b", said)) else 0
    code = found[1] if (found := re.search(r"<Code>([A-Za-z]{3,60})</Code>", said)) else ""
    answered = f"the server answered {status}{f' {code}' if code else ''}" if status else ""
    if code in _UNABLE:
        return Refusal(
            "wrong", UsageError, answered, "check the bucket in LOREG_STORE, AWS_REGION and AWS_ENDPOINT_URL"
        )
    if kind in ("AlreadyExistsError", "PreconditionError"):
        return Refusal("exists", RemoteError, answered or "it is there already", "try again")
    if kind == "FileNotFoundError":
        return Refusal("absent", NotFound, answered or "it is not there", "look with `loreg fsck`")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or status in _REFUSED:
        advice = "check the credentials in the AWS_* variables, what they permit, and the clock of this machine"
        return Refusal("denied", UsageError, answered or "the credentials were refused", advice)
    if kind in ("NotSupportedError", "NotImplementedError") or status == 501:
        return Refusal("unsupported", Unsupported, answered or "the server cannot do that", "use another server")
    if 400 <= status < 500 and status not in _LATER:
        return Refusal("rejected", RemoteError, answered, "check AWS_ENDPOINT_URL and the server's log")
    advice = "try again, and check AWS_ENDPOINT_URL and the network"
    if status:
        return Refusal("unknown", RemoteError, answered, "try again later")
    if "kind: Connect" in said:
        return Refusal("unknown", RemoteError, "there is no connection to the server", advice)
    if "kind: Timeout" in said:
        return Refusal("unknown", RemoteError, "the server did not answer in time", advice)
    return Refusal("unknown", RemoteError, "the connection broke, or the answer made no sense", advice)
