"""Objects in a bucket, below a prefix: written once, read by ranges, and every failure a sentence.

``doing`` is what the caller is about, as in "could not write blob … in the store …".
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, BinaryIO

from loreg.digest import Digest, Hasher
from loreg.errors import LoregError, NotFound, RemoteError, Unsupported
from loreg.store.client import Client, Refusal, interruptible
from loreg.store.upload import CONCURRENCY, Upload

if TYPE_CHECKING:
    from obstore.store import S3Store

ATTEMPTS = 3
"""Of a conditional write whose outcome is not known. obstore repeats each of them, too, if it was surely not done."""

READ = 8 << 20
"""Bytes that are read in one request: a cut connection costs no more, and no request lasts for long."""

_MARK = "loreg-write"


class Objects:
    """Makes no request before it is used. What it raises beside the errors that are said of each method: RemoteError
    for network and server, UsageError for a wrong bucket or refused credentials."""

    def __init__(self, place: str) -> None:
        self._client = Client(place)
        self._tried = False
        self._found = False

    def __str__(self) -> str:
        return str(self._client)

    def size(self, doing: str, location: str) -> int | None:
        """In bytes, None if absent."""
        import obstore

        try:
            return int(self._client.call(obstore.head, location)["size"])
        except Refusal as refusal:
            if refusal.kind != "absent":
                raise self._client.error(doing, refusal) from None
        self._require_bucket(doing)
        return None

    def open(self, doing: str, location: str) -> BinaryIO:
        """For reading in pieces, while it lasts: immutable, so that they fit together. Raises NotFound, then too."""
        return io.BufferedReader(_Reader(self, doing, location))

    def list(self, doing: str, folder: str, beyond: str | None = None) -> Iterator[str]:
        """The locations below a folder, page by page; those that come after ``beyond`` in the order of bytes."""
        import obstore

        pages = obstore.list(self._client.store, f"{folder}/", offset=beyond, chunk_size=1000)
        while True:
            try:
                page = self._client.call(lambda _: next(pages, None))
            except Refusal as refusal:
                raise self._client.error(doing, refusal) from None
            if page is None:
                return
            yield from (entry["path"] for entry in page)

    def delete(self, doing: str, location: str) -> None:
        """Absent is done already."""
        import obstore

        try:
            self._client.call(obstore.delete, location)
        except Refusal as refusal:
            if refusal.kind != "absent":
                raise self._client.error(doing, refusal) from None

    def move(self, doing: str, location: str, target: str) -> bool:
        """False if absent. The object is deleted only when the server has all of it at the target."""
        import obstore

        size = self.size(doing, location)
        if size is None:
            return False
        try:
            self._client.call(obstore.copy, location, target)
            copied = int(self._client.call(obstore.head, target)["size"])
        except Refusal as refusal:
            raise self._client.error(doing, refusal) from None
        if copied != size:
            raise RemoteError(
                f"could not {doing} in the store {self}: of its {size} bytes the server copied {copied}; it is where "
                "it was: try again."
            )
        self.delete(doing, location)
        return True

    def write(self, doing: str, location: str, upload: Upload) -> bool:
        """False if an object is there. Else proved to be there with these bytes: by the tag in the answer, or
        by reading it back; what is wrong is deleted, and RemoteError raised."""
        self._require_preconditions(doing)
        mark = os.urandom(16).hex()
        if upload.whole is not None:
            upload.check()  # before anything is sent
            etag = self._put(doing, location, upload.whole, mark)
        else:
            etag = self._put_parts(doing, location, upload, mark)
        if etag is None:
            return False
        if not upload.proved_by(etag) and (found := self._digest(doing, location)) != upload.digest:
            with suppress(LoregError):
                self.delete(doing, location)
            raise RemoteError(
                f"could not {doing} in the store {self}: the server has other bytes than it was sent, which hash to "
                f"{found}; try again, and check the network."
            )
        return True

    def _put(self, doing: str, location: str, data: bytes, mark: str) -> str | None:
        """The tag of the object that this write has made; None if another one was there."""
        import obstore

        for _ in range(ATTEMPTS):
            try:
                result = self._client.call(
                    obstore.put, location, data, mode="create", use_multipart=False, attributes={_MARK: mark}
                )
                return result["e_tag"] or ""
            except Refusal as found:
                refusal = found
            if refusal.kind not in ("exists", "unknown"):
                break
            # Was it this write, and only its answer lost? Or is it somebody else's object, or no object, as after a
            # 409, which says that another request was under way?
            try:
                there = self._mark(location)
            except Refusal:
                continue
            if there is not None:
                return there[1] if there[0] == mark else None
        raise self._client.error(doing, refusal)

    def _put_parts(self, doing: str, location: str, upload: Upload, mark: str) -> str | None:
        """As :meth:`_put`, in parts; an upload that fails is aborted."""
        import obstore

        if self.size(doing, location) is not None:
            return None

        def send() -> str:
            result = self._client.call(
                obstore.put,
                location,
                iter(upload),
                use_multipart=True,
                chunk_size=upload.part,
                max_concurrency=CONCURRENCY,
                attributes={_MARK: mark},
            )
            return result["e_tag"] or ""

        try:
            return interruptible(send, upload.stop)
        except Refusal as found:
            refusal = found
        if upload.failure is not None:
            raise upload.failure
        # Completed, the answer lost, and asked again: there is no such upload any more.
        if refusal.kind in ("unknown", "absent", "exists"):
            with suppress(Refusal):
                there = self._mark(location)
                if there is not None and there[0] == mark:
                    return there[1]
        raise self._client.error(doing, refusal)

    def _mark(self, location: str) -> tuple[str, str] | None:
        """Which write an object is from, and its tag; None if there is none. Raises Refusal."""
        import obstore

        try:
            found = self._client.call(obstore.get, location, options={"head": True})
        except Refusal as refusal:
            if refusal.kind == "absent":
                return None
            raise
        return str(found.attributes.get(_MARK, "")), found.meta["e_tag"] or ""

    def _digest(self, doing: str, location: str) -> Digest:
        hasher = Hasher(Hasher.ALL)
        with self.open(doing, location) as file:
            while piece := file.read(READ):
                hasher.update(piece)
        return hasher.digest()

    def _block(self, doing: str, location: str, start: int) -> tuple[memoryview, int]:
        """The bytes from ``start`` on, at most :data:`READ` of them, and the size of it all. Raises NotFound."""
        import obstore

        def get(store: S3Store) -> tuple[memoryview, int]:
            found = obstore.get(store, location, options={"range": (start, start + READ)})
            return memoryview(found.bytes()), int(found.meta["size"])

        try:
            block, size = self._client.call(get)
        except Refusal as found:
            refusal = found
        else:
            if len(block) != min(READ, size - start):
                raise RemoteError(
                    f"could not {doing} in the store {self}: the server sent {len(block)} bytes; try again."
                )
            return block, size
        # No range can be satisfied by an object without a byte.
        if start == 0 and refusal.kind == "rejected" and self.size(doing, location) == 0:
            return memoryview(b""), 0
        if refusal.kind == "absent":
            self._require_bucket(doing)
            raise NotFound(f"could not {doing} in the store {self}: {location} is not there.")
        raise self._client.error(doing, refusal)

    # What is asked of the server once

    def _require_preconditions(self, doing: str) -> None:
        """Unsupported unless the server refuses to write what is there: some ignore the condition, and would let two
        writers overwrite each other."""
        if self._tried:
            return
        location = f"probe/{os.urandom(16).hex()}"
        first = self._put(doing, location, b"1", os.urandom(16).hex())
        second = self._put(doing, location, b"2", os.urandom(16).hex())
        with suppress(LoregError):  # a probe that stays behind is one byte that nobody lists
            self.delete(doing, location)
        if first is None or second is not None:
            raise Unsupported(
                f"the server of the store {self} ignores preconditions (If-None-Match), and is not fit to be shared: "
                "use one that keeps them, such as Amazon S3, MinIO, Ceph or SeaweedFS."
            )
        self._tried = self._found = True

    def _require_bucket(self, doing: str) -> None:
        """UsageError unless the bucket is there: of an object in none a server says, too, that it is not there."""
        if not self._found:
            next(self.list(doing, "probe"), None)
            self._found = True


class _Reader(io.RawIOBase):
    def __init__(self, objects: Objects, doing: str, location: str) -> None:
        self._objects, self._doing, self._location = objects, doing, location
        self._block, self._size = objects._block(doing, location, 0)
        self._next = len(self._block)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._block and self._next < self._size:
            self._block, _ = self._objects._block(self._doing, self._location, self._next)
            self._next += len(self._block)
        count = min(len(buffer), len(self._block))
        memoryview(buffer)[:count] = self._block[:count]
        self._block = self._block[count:]
        return count
