"""The safetensors container: a strict reader of headers, and a writer whose bytes follow from the content.

The reference library accepts duplicate names, unknown fields, leading white space and names with ``../``, and
writes metadata in another order every time. A content-addressed store can afford neither, so loreg parses the
header itself, refuses what two readers could understand differently, and writes headers itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, NoReturn

from loreg.errors import BadInput
from loreg.format import canonical_json

MAX_HEADER_BYTES = 100_000_000  # the reference library's own limit
MAX_DIMENSIONS = 64
MAX_NAME = 4096  # characters; the longest of a model on the Hub has a hundred or two
_SHOWN = 200

# Width of one element in bits, for every dtype of the container's specification.
BITS: Mapping[str, int] = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# Control characters end up in terminals and logs; the path forms end up in somebody's open().
_BAD_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]|^/|(?:^|/)\.\.?(?:/|$)")
_FIELDS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a file. ``start`` and ``end`` count bytes from the beginning of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed header: ``raw`` are the bytes of the file before the data, the length field included."""

    raw: bytes
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]
    """In the order of their data."""

    @property
    def data_start(self) -> int:
        """The offset in the file of the first byte of data."""
        return len(self.raw)

    @property
    def file_size(self) -> int:
        return self.data_start + (self.tensors[-1].end if self.tensors else 0)

    def by_name(self) -> dict[str, TensorInfo]:
        return {tensor.name: tensor for tensor in self.tensors}


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor [S4, S5]; raises BadInput for an unknown dtype, or a shape that is none or too large."""
    if dtype not in BITS:
        raise BadInput(f"{dtype!r} is not a safetensors dtype: expected one of {', '.join(BITS)}.")
    # The number of dimensions comes first: the product of a million sizes takes minutes.
    if len(shape) > MAX_DIMENSIONS or not _naturals(list(shape)):
        raise BadInput(f"A shape has at most {MAX_DIMENSIONS} sizes, all whole numbers: found {str(shape)[:60]}.")
    bits = prod(shape) * BITS[dtype]
    if bits % 8:
        raise BadInput(f"A tensor of shape {list(shape)} and dtype {dtype} does not fill whole bytes.")
    if bits // 8 > canonical_json.MAX_INTEGER:
        raise BadInput(f"A tensor of shape {list(shape)} and dtype {dtype} has more than 2^53 - 1 bytes.")
    return bits // 8


def read_header(file: BinaryIO, size: int, *, what: str) -> Header:
    """Parse the header at the current position of ``file`` [S1–S5].

    ``size`` is the size of the whole file in bytes; ``what`` names the file in errors. Reads the header only.
    Raises BadInput for anything that the specification lists as rejected.
    """
    prefix = _up_to(file, 8)
    if len(prefix) < 8 or size < 8:  # [S1]
        raise BadInput(f"{what} is not a safetensors file: it has {size} bytes; the length field needs 8.")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length > size - 8:  # [S1]
        raise BadInput(
            f"{what} is truncated or not a safetensors file: it announces a header of {length:,} bytes, "
            f"and has {size - 8:,} bytes after the length."
        )
    text = _up_to(file, length)
    if len(text) != length:  # [S1]
        raise BadInput(f"{what} is truncated: expected a header of {length:,} bytes, found {len(text):,}.")
    return parse_header(prefix + text, size, what=what)


def _up_to(file: BinaryIO, size: int) -> bytes:
    """``size`` bytes, or all that there are: a file without a buffer may give fewer at once than it has."""
    found = b""
    while len(found) < size and (piece := file.read(size - len(found))):
        found += piece
    return found


def parse_header(raw: bytes, size: int | None, *, what: str) -> Header:
    """Parse the first ``8 + n`` bytes of a file of ``size`` bytes, None where only they are there [S2–S5]. Raises
    BadInput."""
    text = raw[8:].rstrip(b" ")
    if not (text.startswith(b"{") and text.endswith(b"}")):  # [S2]
        raise BadInput(f"{what} is not a safetensors file: its header is not '{{' to '}}' and then spaces.")
    document = canonical_json.loads(text, what=f"header of {what}", max_bytes=MAX_HEADER_BYTES)
    if not isinstance(document, dict):  # [S2]
        raise BadInput(f"The header of {what} is not a JSON object.")
    metadata = _metadata(document.pop("__metadata__", {}), what)
    tensors = sorted((_tensor(name, entry, what) for name, entry in document.items()), key=lambda t: (t.start, t.end))
    position = 0
    for tensor in tensors:  # [S5]
        if tensor.start != position:
            kind = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise BadInput(
                f"Tensor {tensor.name!r} in {what} {kind}: expected to begin at byte {position:,}, "
                f"found {tensor.start:,}."
            )
        position = tensor.end
    if size is not None and len(raw) + position != size:  # [S5]
        raise BadInput(
            f"{what} is {'truncated' if size < len(raw) + position else 'too long'}: its header describes "
            f"{len(raw) + position:,} bytes, found {size:,}; fetch it again."
        )
    return Header(raw, metadata, tuple(tensors))


def _metadata(value: object, what: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(
        isinstance(item, str) for pair in value.items() for item in pair
    ):  # [S3]
        raise BadInput(f"__metadata__ of {what} is not a map from text to text.")
    return value


def _tensor(name: str, entry: object, what: str) -> TensorInfo:
    def refuse(reason: str) -> NoReturn:
        raise BadInput(f"Tensor {name!r} in {what} is not acceptable: {reason}.")

    check_name(name, what)  # [S3]
    if not isinstance(entry, dict) or set(entry) != _FIELDS:  # [S4]
        refuse(f"expected exactly the fields {sorted(_FIELDS)}, found {_keys(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:  # [S4]
        refuse(f"{dtype!r} is not a known dtype")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:  # [S4]
        refuse(f"the shape {str(shape)[:60]} is not a list of at most {MAX_DIMENSIONS} whole numbers")
    if not _naturals(offsets) or len(offsets) != 2:  # [S4]
        refuse(f"data_offsets {str(offsets)[:60]} is not a pair of whole numbers")
    start, end = offsets
    if end - start != nbytes_of(dtype, tuple(shape)):  # [S5]
        expected = nbytes_of(dtype, tuple(shape))
        refuse(f"{shape} elements of {dtype} are {expected:,} bytes, found {end - start:,}")
    return TensorInfo(name, dtype, tuple(shape), start, end)


def check_name(name: str, what: str) -> None:
    """Refuse a tensor name that is empty, endless, or could be taken for a path or a terminal escape [S3]."""
    if not name or len(name) > MAX_NAME or _BAD_NAME.search(name):
        shown = repr(name) if len(name) <= _SHOWN else f"{name[:_SHOWN]!r}… ({len(name):,} characters)"
        raise BadInput(
            f"{what} has a tensor named {shown}: a name is not empty, has at most {MAX_NAME:,} characters, holds no "
            "control character or backslash, and is no absolute or relative path."
        )


def _naturals(value: object) -> bool:
    # bool is an int to Python, and 1.0 is 1 to some parsers: neither is a size.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _keys(entry: object) -> str:
    return str(sorted(entry)) if isinstance(entry, dict) else repr(entry)


def canonical_order(name: str, dtype: str) -> tuple[int, bytes]:
    """The sort key of a tensor in a canonical file: wide elements first, then the bytes of the name [S6].

    Wide first keeps every tensor aligned to its element size without padding between tensors.
    """
    return (-BITS[dtype], name.encode("utf-8"))


def canonical_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> Header:
    """The one header [S6, S7] of a file with these ``(name, dtype, shape)``, in whatever order they come.

    The data follow in the order of ``Header.tensors``, without holes. Raises BadInput for two tensors of one
    name, and for whatever ``parse_header`` would refuse.
    """
    sized = []
    for name, dtype, shape in tensors:
        check_name(name, "a new file")
        sized.append((name, dtype, tuple(shape), nbytes_of(dtype, tuple(shape))))
    document: dict[str, Any] = {}
    if metadata:
        pairs = _metadata(dict(metadata), "a new file").items()
        canonical_json.dumps(dict(metadata))  # refuses half of a surrogate pair
        document["__metadata__"] = dict(sorted(pairs, key=lambda pair: pair[0].encode("utf-8")))
    infos: list[TensorInfo] = []
    position = 0
    for name, dtype, shape, nbytes in sorted(sized, key=lambda each: canonical_order(each[0], each[1])):
        if name in document or name == "__metadata__":
            raise BadInput(f"Two tensors of one file would be named {name!r}: names must differ.")
        info = TensorInfo(name, dtype, shape, position, position + nbytes)
        document[name] = {"dtype": dtype, "shape": shape, "data_offsets": [info.start, info.end]}
        infos.append(info)
        position = info.end
    # Strings have the form of RFC 8785: the shortest escapes, and UTF-8 for everything else.
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return Header(len(text).to_bytes(8, "little") + text, dict(metadata or {}), tuple(infos))
