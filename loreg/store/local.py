"""Blobs as files below one directory: ``blobs/<aa>/<64 hex>.<generation>``, written through ``tmp/``."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG
from typing import BinaryIO

from loreg.digest import Digest, DoubleHasher, Fingerprint
from loreg.errors import BadInput, CheckFailed, Conflict, LoregError, NotFound, UsageError
from loreg.store.base import BlobKey, new_generation

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOTSUP, errno.EXDEV, errno.ELOOP}


class LocalStore:
    """A :class:`~loreg.store.base.Store` in a directory of a POSIX file system with hard links.

    The directory is made by the first :meth:`put`; reading from one that is not there finds nothing.
    """

    def __init__(self, root: Path) -> None:
        self._root = Path(root).absolute()
        self._durable: set[Path] = set()

    def __repr__(self) -> str:
        return f"LocalStore({str(self._root)!r})"

    def put(self, digest: Digest, generation: str, chunks: Iterable[bytes | memoryview]) -> Fingerprint:
        key = BlobKey(digest, generation)
        final = self.path(key)
        partial = self._root / "tmp" / f"{key.name}.{new_generation()}"
        with _typed(f"write blob {digest}", self._root):
            self._make_root()
            for directory in (partial.parent, final.parent.parent, final.parent):
                self._make_directory(directory)
        try:
            found = self._fill(partial, digest, chunks)
            with _typed(f"write blob {digest}", self._root):
                _publish(partial, final, key)
        finally:
            # Left behind only by a crash, or by a disk that refuses even this; never seen under a key.
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return found

    def size(self, key: BlobKey) -> int | None:
        with _typed(f"look for blob {key.digest}", self._root):
            try:
                status = self.path(key).stat()
            except (FileNotFoundError, NotADirectoryError):
                return None
        return status.st_size if S_ISREG(status.st_mode) else None

    def open(self, key: BlobKey) -> BinaryIO:
        with _typed(f"read blob {key.digest}", self._root):
            try:
                return self.path(key).open("rb")
            except (FileNotFoundError, NotADirectoryError) as error:
                raise NotFound(
                    f"blob {key.digest} is not in the store {self._root} (generation {key.generation}): "
                    "restore the store from a backup, or push its adapter again."
                ) from error

    def path(self, key: BlobKey) -> Path:
        return self._root / key.location

    def read(self, key: BlobKey, verify: bool = True) -> bytes:
        with self.open(key) as file, _typed(f"read blob {key.digest}", self._root):
            data = file.read()
        if verify and (found := Digest.of(data)) != key.digest:
            raise BadInput(
                f"blob {key.digest} in the store {self._root} is corrupt: its {len(data)} bytes hash to "
                f"{found}; restore it from a backup, or push its adapter again."
            )
        return data

    def keys(self) -> Iterator[BlobKey]:
        with _typed("list the blobs", self._root):
            for directory in _entries(self._root / "blobs"):
                for name in _entries(self._root / "blobs" / directory):
                    # What is not named as a blob, in its own directory, is not ours: not listed,
                    # hence never deleted.
                    try:
                        key = BlobKey.parse(name)
                    except BadInput:
                        continue
                    if key.digest.hex[:2] == directory:
                        yield key

    def delete(self, key: BlobKey) -> None:
        # No sync of the directory: a delete that a power loss undoes leaves an orphan, which the next
        # collection finds again.
        with _typed(f"delete blob {key.digest}", self._root), suppress(FileNotFoundError, NotADirectoryError):
            self.path(key).unlink()

    def _fill(self, partial: Path, digest: Digest, chunks: Iterable[bytes | memoryview]) -> Fingerprint:
        """Write and sync the temporary file; returns what was written, which has that digest."""
        doing = f"write blob {digest}"
        hasher = DoubleHasher()
        with _typed(doing, self._root):
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            for chunk in chunks:  # what it raises is the caller's, not a failure of this disk
                data = _as_bytes(chunk)
                hasher.update(data)
                with _typed(doing, self._root):
                    while data:
                        data = data[os.write(descriptor, data) :]
            found = hasher.result()
            if found.digest != digest:
                raise BadInput(
                    f"the bytes given for blob {digest} are not its bytes: {found.size} of them hash to "
                    f"{found.digest}; the source changed while it was read, or was corrupt: try again."
                )
            with _typed(doing, self._root):
                os.fchmod(descriptor, 0o444)
                os.fsync(descriptor)
        finally:
            with _typed(doing, self._root):
                os.close(descriptor)
        return found

    def _make_root(self) -> None:
        missing = [path for path in (self._root, *self._root.parents) if not path.exists()]
        for path in reversed(missing):
            with suppress(FileExistsError):
                path.mkdir()
            _sync_directory(path.parent)

    def _make_directory(self, path: Path) -> None:
        """There, and its entry in its parent on disk.

        Synced once by every process, also where another made it: that one may not have come to its own
        sync yet, and a blob in a directory that is lost is lost.
        """
        try:
            path.mkdir()
        except FileExistsError:
            if path in self._durable:
                return
        _sync_directory(path.parent)
        self._durable.add(path)


def _publish(partial: Path, final: Path, key: BlobKey) -> None:
    """Give the synced file its name, and make the name durable."""
    try:
        # link, not rename: rename would silently replace a file that is there already.
        os.link(partial, final)
    except FileExistsError as error:
        raise Conflict(
            f"blob {key.digest} is already in the store under generation {key.generation}: "
            "every write draws a generation of its own; try again."
        ) from error
    try:
        _sync_directory(final.parent)
    except BaseException:
        with suppress(OSError):
            final.unlink()
        raise


def _as_bytes(chunk: bytes | memoryview) -> memoryview:
    view = memoryview(chunk)
    return view.cast("B") if view.nbytes else memoryview(b"")  # cast() refuses a zero in a shape


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextmanager
def _typed(doing: str, root: Path) -> Iterator[None]:
    """Turn what the operating system refuses into a sentence of the family that is at fault."""
    try:
        yield
    except OSError as error:
        family: type[LoregError]
        if error.errno in _FULL:
            family, advice = CheckFailed, "free some space, or move the store with LOREG_STORE"
        elif error.errno in _UNUSABLE:
            family, advice = UsageError, "choose a writable directory with LOREG_STORE or LOREG_HOME"
        else:
            family, advice = BadInput, "check the disk, and restore a backup if need be"
        where = f" at {error.filename}" if error.filename else ""
        raise family(f"could not {doing} in the store {root}: {error.strerror or error}{where}; {advice}.") from error
