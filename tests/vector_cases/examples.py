"""The worked examples of the specification, as text; made here so that they cannot drift from the layouts."""

from __future__ import annotations

from collections.abc import Callable

from blake3 import blake3

from vector_cases.primitives import Tensor, canonical_file, digest, identity, jcs, listing

A = Tensor("a", "F32", (1, 2), bytes.fromhex("0000803f00000040"))
B = Tensor("b", "BF16", (2,), bytes.fromhex("803f0040"))


def dump(data: bytes) -> str:
    """Sixteen bytes a line: offset, hex, and what is printable."""
    lines = []
    for start in range(0, len(data), 16):
        row = data[start : start + 16]
        shown = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{start:04x}  {row.hex(' '):<47}  {shown}\n")
    return "".join(lines)


def leaf() -> str:
    return dump(A.leaf_input) + f"BLAKE3 = {blake3(A.leaf_input).hexdigest()}\n"


def roots() -> str:
    lines = [f"leaf of {t.name}      = {digest(t.leaf_input)}\n" for t in (A, B)]
    lines += [f"{name:<14} = {value}\n" for name, value in identity([A, B]).items()]
    return "".join(lines)


def base_manifest() -> str:
    text = jcs({"format": "loreg/1", "kind": "base", "tensors": listing([A, B])})
    return text.decode() + f"\nBLAKE3 = {blake3(text).hexdigest()}\n"


def canonical() -> str:
    file = canonical_file([B, A], {"format": "pt"})
    return dump(file) + f"BLAKE3 = {blake3(file).hexdigest()}\n"


EXAMPLES: dict[str, Callable[[], str]] = {
    "canonical_safetensors": canonical,
    "leaf": leaf,
    "roots": roots,
    "base_manifest": base_manifest,
}
