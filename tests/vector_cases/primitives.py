"""The format's layouts once more, as plainly as the specification states them."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import prod
from typing import Any

from blake3 import blake3

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}


def jcs(value: Any) -> bytes:
    """RFC 8785 for what the documents here hold."""
    return _jcs(value).encode("utf-8")


def _jcs(value: Any) -> str:
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{_quoted(key)}:{_jcs(value[key])}" for key in keys) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_jcs, value)) + "]"
    return _double(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _double(value: float) -> str:
    """ECMAScript's text: Python's shortest digits, written out from 1e-6 up to 1e21."""
    if not value:
        return "0"
    sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
    text = "".join(map(str, digits))
    point = len(text) + int(exponent)
    if 0 < point <= 21:
        made = (text + "0" * (point - len(text))) if point >= len(text) else f"{text[:point]}.{text[point:]}"
    elif -6 < point <= 0:
        made = "0." + "0" * -point + text
    else:
        made = f"{text[0]}{'.' if text[1:] else ''}{text[1:]}e{point - 1:+d}"
    return "-" * sign + made


def digest(data: bytes) -> str:
    return "blake3:" + blake3(data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Tensor:
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @property
    def typed(self) -> bytes:
        dtype = self.dtype.encode("ascii")
        dims = b"".join(struct.pack("<Q", size) for size in self.shape)
        return struct.pack("<B", len(dtype)) + dtype + struct.pack("<I", len(self.shape)) + dims

    @property
    def named(self) -> bytes:
        return struct.pack("<I", len(self.name.encode())) + self.name.encode()

    @property
    def leaf_input(self) -> bytes:
        sized = struct.pack("<Q", len(self.data)) + blake3(self.data).digest()
        return b"loreg-tensor-v1\0" + self.named + self.typed + sized

    @property
    def content_input(self) -> bytes:
        return b"loreg-content-v1\0" + self.typed + struct.pack("<Q", len(self.data)) + blake3(self.data).digest()


def root(domain: bytes, items: list[bytes]) -> str:
    return digest(domain + struct.pack("<Q", len(items)) + b"".join(items))


def identity(tensors: list[Tensor]) -> dict[str, str]:
    ordered = sorted(tensors, key=lambda t: t.name.encode("utf-8"))
    contents = sorted({blake3(t.content_input).digest() for t in ordered})
    return {
        "weights_root": root(b"loreg-base-v1\0", [blake3(t.leaf_input).digest() for t in ordered]),
        "structure_root": root(b"loreg-structure-v1\0", [t.named + t.typed for t in ordered]),
        "content_set": root(b"loreg-content-set-v1\0", contents),
    }


def listing(tensors: list[Tensor]) -> dict[str, Any]:
    """The field ``tensors`` of a base manifest or a merge record."""
    return {t.name: {"dtype": t.dtype, "shape": list(t.shape), "digest": digest(t.data)} for t in tensors}


def container(header: str | bytes, data: bytes = b"") -> bytes:
    """A safetensors file with this header, as it is."""
    text = header.encode("utf-8") if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def canonical_file(tensors: list[Tensor], metadata: dict[str, str] | None = None) -> bytes:
    ordered = sorted(tensors, key=lambda t: (-BITS[t.dtype], t.name.encode("utf-8")))
    entries = []
    if metadata:
        pairs = sorted(metadata.items(), key=lambda pair: pair[0].encode("utf-8"))
        entries.append('"__metadata__":{' + ",".join(f"{_quoted(k)}:{_quoted(v)}" for k, v in pairs) + "}")
    position = 0
    for t in ordered:
        end = position + len(t.data)
        if len(t.data) * 8 != prod(t.shape) * BITS[t.dtype]:
            raise ValueError(f"{t.name}: {len(t.data)} bytes for {t.shape} of {t.dtype}")
        shape = ",".join(map(str, t.shape))
        fields = f'"dtype":"{t.dtype}","shape":[{shape}],"data_offsets":[{position},{end}]'
        entries.append(f"{_quoted(t.name)}:{{{fields}}}")
        position = end
    text = ("{" + ",".join(entries) + "}").encode("utf-8")
    return container(text + b" " * (-len(text) % 8), b"".join(t.data for t in ordered))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@dataclass(frozen=True)
class Float:
    """A binary floating-point format of IEEE 754's shape."""

    exponent: int
    mantissa: int

    @property
    def width(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def infinity(self) -> int:
        """The word after the largest finite one."""
        return (2**self.exponent - 1) << self.mantissa

    @property
    def smallest_exponent(self) -> int:
        return 2 - 2 ** (self.exponent - 1)

    def split(self, data: bytes) -> list[int]:
        size = self.width // 8
        return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]

    def join(self, words: list[int]) -> bytes:
        return b"".join(word.to_bytes(self.width // 8, "little") for word in words)

    def negative(self, word: int) -> bool:
        return bool(word >> (self.width - 1))

    def value(self, word: int) -> Fraction:
        """The exact value of a word. ValueError for NaN and infinity."""
        magnitude = word & (2 ** (self.width - 1) - 1)
        if magnitude >= self.infinity:
            raise ValueError("not finite")
        field, fraction = magnitude >> self.mantissa, magnitude & (2**self.mantissa - 1)
        significand = fraction + (2**self.mantissa if field else 0)
        value = Fraction(significand) * Fraction(2) ** (max(field, 1) - 1 + self.smallest_exponent - self.mantissa)
        return -value if self.negative(word) else value

    def nearest(self, value: Fraction) -> int:
        """The word nearest to a non-zero value, ties to even. OverflowError beyond the largest finite one."""
        size = abs(value)
        exponent = size.numerator.bit_length() - size.denominator.bit_length()
        if Fraction(2) ** exponent > size:
            exponent -= 1
        exponent = max(exponent, self.smallest_exponent)
        steps = round(size / Fraction(2) ** (exponent - self.mantissa))  # Fraction rounds ties to even
        word = ((exponent - self.smallest_exponent) << self.mantissa) + steps
        if word >= self.infinity:
            raise OverflowError("beyond the largest finite value")
        return word | (int(value < 0) << (self.width - 1))


class E4M3(Float):
    """Eight bits, of which all ones are NaN and all else is a number: there is no infinity."""

    @property
    def infinity(self) -> int:
        return 0x7F


FLOATS = {
    "BF16": Float(8, 7),
    "F16": Float(5, 10),
    "F32": Float(8, 23),
    "F64": Float(11, 52),
    "F8_E5M2": Float(5, 2),
    "F8_E4M3": E4M3(4, 3),
}
