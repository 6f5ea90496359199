"""A model directory on disk: its shards, its tensors, the files beside them, and its identity.

Reads headers when opened, and bytes only when asked. Knows safetensors, sharded or not; anything that would
have to be unpickled is refused.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from loreg.digest import Digest, Hasher
from loreg.errors import BadInput, CheckFailed, NotFound
from loreg.format import canonical_json
from loreg.format.base import BaseManifest
from loreg.format.fingerprint import BaseTensor
from loreg.format.safetensors import Header, TensorInfo, read_header

_INDICES = ("model.safetensors.index.json", "diffusion_pytorch_model.safetensors.index.json")
_SINGLES = ("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.safetensors")
_CHUNK = 4 << 20

# Copied beside a merge is what is not weights: another copy of the weights would be a stale one.
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot", ".npz"}
)
_OWN_FILES = frozenset({"loreg.json", "loreg.undo", *_INDICES})

# A file changed within one clock tick of being read keeps its stamp, so a fresh stamp is not cached (git's
# "racy" index entries). Two seconds covers the coarsest clock of a file system in use.
_SETTLED_NS = 2_000_000_000

Advance = Callable[[int], None]
"""Told the number of bytes just done."""


@dataclass(frozen=True, slots=True)
class FileStamp:
    """What says that a file is still the one that was read."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        try:
            stat = path.stat()
        except OSError as error:
            raise NotFound(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:  # a null byte in a name that a file gave us
            raise BadInput(f"{str(path)!r} cannot be the path of a file.") from error
        return cls(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)

    def settled_at(self, now_ns: int) -> bool:
        return max(self.mtime_ns, self.ctime_ns) < now_ns - _SETTLED_NS


class LeafCache(Protocol):
    """Remembers the content digests of a file's tensors, by its stamp."""

    def get(self, stamp: FileStamp) -> str | None: ...

    def put(self, stamp: FileStamp, leaves: str) -> None: ...


class NoCache:
    """Hashes every time."""

    def get(self, stamp: FileStamp) -> str | None:
        return None

    def put(self, stamp: FileStamp, leaves: str) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Shard:
    """One weight file of a checkpoint."""

    path: Path
    header: Header
    stamp: FileStamp

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor on disk: ``offset`` counts bytes from the beginning of the file."""

    info: TensorInfo
    shard: Shard

    @property
    def offset(self) -> int:
        return self.shard.header.data_start + self.info.start

    def chunks(self, size: int = _CHUNK, buffer: memoryview | None = None) -> Iterator[memoryview]:
        """Its bytes, in pieces of at most ``size``; each piece is valid until the next is asked for. ``buffer``: what
        they are read into, of at least that size."""
        yield from read_range(self.shard.path, self.offset, self.info.nbytes, size, buffer)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. ``root`` is its directory, ``tensors`` maps each name to where its bytes are."""

    root: Path
    shards: tuple[Shard, ...]
    tensors: Mapping[str, StoredTensor]
    index: Path | None
    """The shard index, if there is one."""
    lone: bool = False
    """Whether it was opened as a file, and not as the directory of a model."""

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a directory (sharded, or with one file), or a safetensors file. Raises NotFound, BadInput."""
        if path.is_file():
            return replace(cls._of(path.parent, [path], None), lone=True)
        if not path.is_dir():
            raise NotFound(f"{path} does not exist: expected the directory of a model.")
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise BadInput(f"{path} holds an adapter: expected the model that it is for.")
        whole = [name for name in (*_SINGLES, *_INDICES) if (path / name).is_file()]
        if len(whole) > 1:
            raise BadInput(
                f"{path} holds {' and '.join(whole)}: which is the model cannot be told; remove the other."
            )
        if whole:
            file = path / whole[0]
            return cls._sharded(path, file) if whole[0] in _INDICES else cls._of(path, [file], None)
        alone = sorted(path.glob("*.safetensors"))
        if len(alone) == 1:
            return cls._of(path, alone, None)
        others = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHT_SUFFIXES)
        expected = f"expected {_SINGLES[0]} or {_INDICES[0]}"
        if others:
            raise BadInput(
                f"{path} holds {', '.join(others[:4])}, {expected}: loreg reads safetensors only, as the others may "
                "run code; save the model with save_pretrained."
            )
        raise NotFound(f"{path} holds no weights: {expected}.")

    @classmethod
    def _sharded(cls, root: Path, index: Path) -> Checkpoint:
        document = canonical_json.loads(read_whole(index), what=str(index))
        weight_map = document.get("weight_map") if isinstance(document, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise BadInput(f"{index}: expected 'weight_map', a map from tensors to files.")
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name or name in ("", ".", ".."):
                raise BadInput(f"{index}: expected bare file names, found {name!r}.")
        checkpoint = cls._of(root, [root / name for name in names], index)
        for tensor, file in weight_map.items():
            if tensor not in checkpoint.tensors or checkpoint.tensors[tensor].shard.name != file:
                raise BadInput(f"{index} says that {tensor!r} is in {file}, and it is not: fetch the model again.")
        if unlisted := sorted(set(checkpoint.tensors) - set(weight_map)):
            raise BadInput(f"{index} does not list {unlisted[0]!r}, which is in the shards: fetch the model again.")
        return checkpoint

    @classmethod
    def _of(cls, root: Path, files: list[Path], index: Path | None) -> Checkpoint:
        shards = tuple(_open_shard(file) for file in files)
        tensors: dict[str, StoredTensor] = {}
        for shard in shards:
            for info in shard.header.tensors:
                if info.name in tensors:
                    first = tensors[info.name].shard.name
                    raise BadInput(f"{root}: tensor {info.name!r} is in both {first} and {shard.name}.")
                tensors[info.name] = StoredTensor(info, shard)
        if not tensors:
            raise BadInput(f"{root} holds no tensors.")
        return cls(root, shards, tensors, index)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.info.nbytes for tensor in self.tensors.values())

    def config(self) -> dict[str, Any]:
        """``config.json``, or {} where there is none."""
        path = self.root / "config.json"
        if not path.is_file():
            return {}
        try:
            # Leniently: it is another program's file, and some hold Infinity.
            document = json.loads(path.read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            raise BadInput(f"{path} cannot be read as JSON: {error}.") from error
        return document if isinstance(document, dict) else {}

    def side_files(self) -> list[Path]:
        """The files beside the weights (config, tokenizer, code, licence), relative to ``root``, in order."""
        if self.lone:
            return []  # beside a single file may lie anything
        found, shards = [], {shard.path for shard in self.shards}
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(folder) / name
                weights = path in shards or path.suffix.lower() in _WEIGHT_SUFFIXES or name in _OWN_FILES
                if not weights and not name.startswith(".") and path.is_file():
                    found.append(path.relative_to(self.root))
        return found

    def left_out(self) -> list[Path]:
        """What lies in ``root`` and is neither the model's tensors nor copied beside them, relative, in order."""
        if self.lone:
            return []
        own = {shard.path for shard in self.shards} | {self.root / path for path in self.side_files()}
        own |= {self.root / name for name in _OWN_FILES}
        files = (Path(folder) / name for folder, _, names in os.walk(self.root) for name in names)
        return sorted(path.relative_to(self.root) for path in files if path not in own)

    def manifest(self, cache: LeafCache | None = None, advance: Advance | None = None) -> BaseManifest:
        """Every tensor with its digest: from the cache, or by reading the file. Raises BadInput."""
        tensors: list[BaseTensor] = []
        for shard in self.shards:
            contents = _contents(shard, cache or NoCache(), advance or (lambda done: None))
            tensors += (describe(info, contents[info.name]) for info in shard.header.tensors)
        return BaseManifest(tuple(sorted(tensors, key=lambda tensor: tensor.name.encode("utf-8"))))

    def check_unchanged(self) -> None:
        """BadInput if a shard is not the file that was opened."""
        for shard in self.shards:
            if FileStamp.of(shard.path) != shard.stamp:
                raise BadInput(f"{shard.path} was changed while it was read: run the command again.")


def describe(info: TensorInfo, content: Digest) -> BaseTensor:
    return BaseTensor(info.name, info.dtype, info.shape, info.nbytes, content)


def read_range(
    path: Path, offset: int, length: int, size: int = _CHUNK, buffer: memoryview | None = None
) -> Iterator[memoryview]:
    """``length`` bytes of ``path`` from ``offset``, through one buffer that every piece reuses.

    Raises BadInput if the file ends early or the disk reports an error.
    """
    buffer = (memoryview(bytearray(min(size, length))) if buffer is None else buffer)[: min(size, length)]
    with open_binary(path) as file:
        done = 0
        while done < length:
            piece = buffer[: min(len(buffer), length - done)]
            read_exactly(file.fileno(), piece, offset + done, path)
            yield piece
            done += len(piece)


def read_exactly(descriptor: int, into: memoryview, offset: int, path: Path) -> None:
    """Fill ``into`` from ``offset``. Raises BadInput naming ``path``."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(descriptor, [into[done:]], offset + done)
        except OSError as error:
            raise BadInput(f"{path} cannot be read at byte {offset + done:,}: {error.strerror}.") from error
        if count == 0:
            raise BadInput(f"{path} is truncated: expected more bytes at {offset + done:,}, found its end.")
        done += count


def read_whole(path: Path) -> bytes:
    """The bytes of a small file. Raises BadInput if it cannot be read."""
    with reading(path):
        return path.read_bytes()


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """BadInput, naming ``path``, for what the disk says in the block; CheckFailed where too many files are open."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise CheckFailed(
                f"{path} cannot be read: {error.strerror}; raise the limit, as with `ulimit -n 4096`, or do less "
                "at once."
            ) from error
        raise BadInput(f"{path} cannot be read: {error.strerror}.") from error


def open_binary(path: Path) -> Any:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise NotFound(f"{path} cannot be opened: {error.strerror}.") from error


def _open_shard(path: Path) -> Shard:
    stamp = FileStamp.of(path)
    if not path.is_file():  # opening a pipe would wait for ever for somebody to write
        raise BadInput(f"{path} is no regular file: expected the weights of a model.")
    with open_binary(path) as file, reading(path):
        return Shard(path, read_header(file, stamp.size, what=str(path)), stamp)


def _contents(shard: Shard, cache: LeafCache, advance: Advance) -> dict[str, Digest]:
    cached = cache.get(shard.stamp)
    if cached is not None:
        return {name: Digest(text) for name, text in json.loads(cached).items()}
    began = time.time_ns()
    contents: dict[str, Digest] = {}
    for info in shard.header.tensors:
        hasher = Hasher(threads=Hasher.ALL)
        for piece in StoredTensor(info, shard).chunks():
            hasher.update(piece)
            advance(len(piece))
        contents[info.name] = hasher.digest()
    if FileStamp.of(shard.path) != shard.stamp:
        raise BadInput(f"{shard.path} was changed while it was read: run the command again.")
    if shard.stamp.settled_at(began):
        cache.put(shard.stamp, json.dumps({name: digest.hex for name, digest in contents.items()}))
    return contents
