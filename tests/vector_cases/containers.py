"""Cases for canonical JSON, safetensors files and canonical safetensors files."""

from __future__ import annotations

import json
import struct
from typing import Any

from vector_cases.primitives import BITS, Tensor, canonical_file, container, digest
from vector_cases.record import Vector, b64, document, rejected, valid

LAX = ("AcceptedByLibrary",)

# RFC 8785, appendix B: the bits of a double, and its one text form.
_NUMBERS = {
    "0000000000000001": "5e-324",
    "8000000000000001": "-5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "41b3de4355555554": "333333333.33333325",
    "becbf647612f3696": "-0.0000033333333333333333",
    "43143ff3c1cb0959": "1424953923781206.2",
}


def canonical_json() -> list[Vector]:
    def parsed(name: str, description: str, clauses: str, text: str, canonical: str | None) -> Vector:
        return valid(name, description, clauses, {"utf8": text}, {"canonical": canonical})

    def refused(name: str, description: str, clauses: str, data: bytes | str) -> Vector:
        raw = data.encode() if isinstance(data, str) else data
        return rejected(name, description, clauses, document(raw))

    numbers = [
        parsed(
            f"number-{bits}", f"The double of bits {bits}, as 17 digits, has one text.", "J3 J6", _long(bits), text
        )
        for bits, text in _NUMBERS.items()
    ]
    return [
        parsed("empty-object", "An empty object.", "J1 J6", "{}", "{}"),
        parsed("white-space", "White space between tokens is read, and not written.", "J1 J6", " [ 1 ,\n2 ]\t",
                "[1,2]"),
        parsed("key-order", "Keys are written in order of their UTF-16 code units.", "J6",
               '{"\u20ac":1,"\\r":2,"\ufb33":7,"1":4,"\U0001f600":5}',
               '{"\\r":2,"1":4,"\u20ac":1,"\U0001f600":5,"\ufb33":7}'),
        parsed("escapes", "Escapes that are not needed are not written.", "J4 J6",
               '"\\u0041\\/\\u000f\\u00e9\\n"', '"A/\\u000fé\\n"'),
        parsed("surrogate-pair", "A whole surrogate pair is one character.", "J4 J6", '"\\ud83d\\ude00"', '"😀"'),
        parsed("integer-limit", "The largest integers.", "J3 J6",
               "[9007199254740991,-9007199254740991]", "[9007199254740991,-9007199254740991]"),
        parsed("minus-zero-real", "The double -0 is written as 0.", "J3 J6", "[-0.0]", "[0]"),
        parsed("no-canonical-form", "A double whose text would be too large an integer has no canonical form.",
               "J3 J6", "[1e17]", None),
        parsed("depth-64", "64 levels are read.", "J5", "[" * 64 + "]" * 64, "[" * 64 + "]" * 64),
        parsed("brackets-in-text", "Brackets inside text do not nest.", "J5", '"' + "[" * 99 + '"',
                '"' + "[" * 99 + '"'),
        *numbers,
        refused("byte-order-mark", "A byte order mark.", "J1", b"\xef\xbb\xbf{}"),
        refused("utf-16", "UTF-16.", "J1", "{}".encode("utf-16-le")),
        refused("latin-1", "A byte that is not UTF-8.", "J1", b'"\xe9"'),
        refused("overlong", "An overlong encoding of '/'.", "J1", b'"\xc0\xaf"'),
        refused("raw-surrogate", "A surrogate encoded in UTF-8 (CESU-8).", "J1", b'"\xed\xa0\xbd\xed\xb8\x80"'),
        refused("empty", "No bytes.", "J1", b""),
        refused("truncated", "A document that ends early.", "J1", '{"a":1'),
        refused("two-values", "Two values.", "J1", "{}{}"),
        refused("trailing-comma", "A comma before a closing bracket.", "J1", "[1,]"),
        refused("comment", "A comment.", "J1", "[1]//"),
        refused("single-quotes", "Single quotes.", "J1", "{'a':1}"),
        refused("leading-zero", "A leading zero.", "J1", "[01]"),
        refused("plus-sign", "A plus sign.", "J1", "[+1]"),
        refused("raw-control", "A control character inside text.", "J1", '"a\nb"'),
        refused("bad-escape", "An escape that JSON does not have.", "J1", '"\\x41"'),
        refused("other-white-space", "A no-break space between tokens.", "J1", "[1,\u00a02]"),
        refused("duplicate-key", "A key twice.", "J2", '{"a":1,"a":1}'),
        refused("duplicate-key-escaped", "A key twice, once as an escape.", "J2", '{"a":1,"\\u0061":2}'),
        refused("duplicate-key-nested", "A key twice, deep inside.", "J2", '[{"b":{"a":1,"c":2,"a":3}}]'),
        refused("integer-2-53", "2^53: its neighbour 2^53 + 1 is the same double.", "J3", "[9007199254740992]"),
        refused("integer-minus-2-53", "-2^53.", "J3", "[-9007199254740992]"),
        refused("integer-long", "An integer of 400 digits.", "J3", "[" + "9" * 400 + "]"),
        refused("integer-minus-zero", "-0 as an integer.", "J3", "[-0]"),
        refused("real-overflow", "A number that no double holds.", "J3", "[1e400]"),
        refused("nan", "NaN.", "J3", "[NaN]"),
        refused("infinity", "Infinity.", "J3", "[-Infinity]"),
        refused("half-pair", "The first half of a surrogate pair.", "J4", '["\\ud83d"]'),
        refused("half-pair-second", "The second half alone.", "J4", '["\\ude00"]'),
        refused("pair-reversed", "Both halves in the wrong order.", "J4", '["\\ude00\\ud83d"]'),
        refused("half-pair-key", "Half a pair in a key.", "J4", '{"\\udc00":1}'),
        refused("depth-65", "65 levels.", "J5", "[" * 65 + "]" * 65),
        refused("depth-objects", "65 levels of objects.", "J5", '{"a":' * 65 + "1" + "}" * 65),
        refused("unterminated-escapes",
                "Text without an end, full of escaped quotes: a matcher that backtracks is slow.",
                "J1", '"' + '\\"' * 4000),
    ]  # fmt: skip


def _long(bits: str) -> str:
    return format(struct.unpack(">d", bytes.fromhex(bits))[0], ".16e")


F32 = bytes.fromhex("0000803f000000400000404000008040")  # 1, 2, 3, 4


def _entry(dtype: str = "F32", shape: str = "[1]", offsets: str = "[0,4]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def safetensors() -> list[Vector]:
    def file(name: str, description: str, clauses: str, header: str, data: bytes, *tensors: tuple[Any, ...],
             metadata: dict[str, str] | None = None) -> Vector:  # fmt: skip
        keys = ("name", "dtype", "shape", "start", "end")
        result = {
            "metadata": metadata or {},
            "data_start": 8 + len(header.encode()),
            "tensors": [dict(zip(keys, tensor, strict=True)) for tensor in tensors],
        }
        return valid(name, description, clauses, {"base64": b64(container(header, data))}, result)

    every = [(f"t.{dtype}", dtype, [8], i, i + BITS[dtype]) for dtype, i in _ends()]
    every_header = json.dumps({n: {"dtype": d, "shape": s, "data_offsets": [a, e]} for n, d, s, a, e in every})
    return [
        file("no-tensors", "A file without tensors.", "S1 S2 S5", "{}", b""),
        file("one-tensor", "One tensor.", "S1 S2 S4 S5", f'{{"a":{_entry()}}}', F32[:4], ("a", "F32", [1], 0, 4)),
        file("padded", "A header padded with spaces.", "S2", f'{{"a":{_entry()}}}   ', F32[:4], ("a", "F32", [1], 0,
                4)),
        file("inner-white-space", "White space between tokens.", "S2", '{ "a" :\n' + _entry() + "}", F32[:4],
             ("a", "F32", [1], 0, 4)),
        file("metadata", "Metadata, at the end of the header.", "S3",
                f'{{"a":{_entry()},"__metadata__":{{"k":"v"}}}}',
             F32[:4], ("a", "F32", [1], 0, 4), metadata={"k": "v"}),
        file("any-order", "The header names tensors in another order than that of their data.", "S5",
             f'{{"b":{_entry(offsets="[4,8]")},"a":{_entry()}}}', F32[:8], ("a", "F32", [1], 0, 4), ("b", "F32",
                     [1], 4, 8)),
        file("scalar", "A scalar has an empty shape.", "S4 S5", f'{{"a":{_entry(shape="[]")}}}', F32[:4],
             ("a", "F32", [], 0, 4)),
        file("empty-tensor", "A tensor without elements, between two others.", "S5",
             f'{{"a":{_entry()},"e":{_entry(shape="[0,7]", offsets="[4,4]")},"b":{_entry(offsets="[4,8]")}}}',
                     F32[:8],
             ("a", "F32", [1], 0, 4), ("e", "F32", [0, 7], 4, 4), ("b", "F32", [1], 4, 8)),
        file("sub-byte", "Two elements of 4 bits fill one byte.", "S4 S5",
             f'{{"a":{_entry("F4", "[2]", "[0,1]")}}}', b"\x21", ("a", "F4", [2], 0, 1)),
        file("every-dtype", "Each dtype of the container, eight elements.", "S4 S5", every_header,
             bytes(every[-1][4]), *every),
        file("name-4096", "The longest name, of 8,192 bytes.", "S3", f'{{"{"é" * 4096}":{_entry()}}}', F32[:4],
             ("é" * 4096, "F32", [1], 0, 4)),
        file("names", "Names that look odd and are fine.", "S3",
             f'{{"a/b..c":{_entry()},"…é":{_entry(offsets="[4,8]")},"...":{_entry(offsets="[8,12]")}}}', F32[:12],
             ("a/b..c", "F32", [1], 0, 4), ("…é", "F32", [1], 4, 8), ("...", "F32", [1], 8, 12)),
        *_bad_lengths(),
        *_bad_headers(),
        *_bad_entries(),
    ]  # fmt: skip


def _ends() -> list[tuple[str, int]]:
    """Each dtype and where its eight elements begin."""
    position, starts = 0, []
    for dtype, bits in BITS.items():
        starts.append((dtype, position))
        position += bits
    return starts


def _bad(name: str, description: str, clauses: str, file: bytes, flags: tuple[str, ...] = ()) -> Vector:
    return rejected(name, description, clauses, {"base64": b64(file)}, flags)


def _bad_lengths() -> list[Vector]:
    good = container(f'{{"a":{_entry()}}}', F32[:4])
    return [
        _bad("no-bytes", "An empty file.", "S1", b""),
        _bad("seven-bytes", "A file of seven bytes.", "S1", bytes(7)),
        _bad("length-only", "A length, and nothing that it counts.", "S1", struct.pack("<Q", 2)),
        _bad("length-too-large", "A header longer than the file.", "S1", struct.pack("<Q", len(good)) + good[8:]),
        _bad("length-2-63", "A length of 2^63.", "S1", struct.pack("<Q", 2**63) + good[8:]),
        _bad("length-all-ones", "A length of 2^64 - 1, which 8 more would wrap.", "S1", b"\xff" * 8 + good[8:]),
        _bad("length-zero", "An empty header.", "S2", container(b"")),
        _bad(
            "big-endian-length", "A length in big-endian order.", "S1", struct.pack(">Q", len(good) - 12) + good[8:]
        ),
        _bad("pickle", "The beginning of a pickle.", "S1", b"\x80\x02}q\x00X\x01\x00\x00\x00a"),
        _bad("truncated-data", "A byte is missing at the end.", "S5", good[:-1]),
        _bad("no-data", "The data are missing.", "S5", good[:-4]),
        _bad("trailing-data", "A byte too many at the end.", "S5", good + b"\0"),
    ]


def _bad_headers() -> list[Vector]:
    def header(name: str, description: str, clauses: str, text: str | bytes, flags: tuple[str, ...] = ()) -> Vector:
        return _bad(name, description, clauses, container(text, F32[:4]), flags)

    one = f'"a":{_entry()}'
    return [
        header("leading-space", "A space before the object.", "S2", f" {{{one}}}", LAX),
        header("leading-newline", "A newline before the object.", "S2", f"\n{{{one}}}", LAX),
        header("trailing-newline", "Padding that is not a space.", "S2", f"{{{one}}}\n", LAX),
        header("byte-order-mark", "A byte order mark.", "S2 J1", f"\ufeff{{{one}}}"),
        header("array", "The header is a list.", "S2", f"[{one}]"),
        header("trailing-zero", "Padding with zero bytes.", "S2 J1", f"{{{one}}}\0"),
        header("two-objects", "Two objects.", "S2 J1", f"{{{one}}}{{}}"),
        header("not-utf-8", "A name that is not UTF-8.", "S2 J1", b'{"\xff":' + _entry().encode() + b"}"),
        header("duplicate-name", "A name twice.", "S2 J2", f"{{{one},{one}}}", LAX),
        header("duplicate-name-escaped", "A name twice, once through \\u0061.", "S2 J2",
               f'{{{one},"\\u0061":{_entry()}}}', LAX),
        header("duplicate-metadata", "A metadata key twice.", "S2 J2",
               f'{{"__metadata__":{{"k":"1","k":"2"}},{one}}}', LAX),
        header("duplicate-field", "A field twice.", "S2 J2",
               '{"a":{"dtype":"I32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}'),
        header("half-pair", "Half a surrogate pair in a name.", "S2 J4", f'{{"\\ud800":{_entry()}}}'),
        header("deep", "A field nested 65 deep.", "S2 J5", f'{{{one},"b":' + "[" * 65 + "]" * 65 + "}"),
        header("metadata-number", "A metadata value that is a number.", "S3", f'{{"__metadata__":{{"k":1}},{one}}}'),
        header("metadata-null-value", "A metadata value that is null.", "S3",
               f'{{"__metadata__":{{"k":null}},{one}}}'),
        header("metadata-list", "Metadata that are a list.", "S3", f'{{"__metadata__":[],{one}}}'),
        header("metadata-null", "Metadata that are null.", "S3", f'{{"__metadata__":null,{one}}}', LAX),
        *(
            header(f"name-{key}", description, "S3", f'{{"{text}":{_entry()}}}', LAX)
            for key, description, text in (
                ("empty", "An empty name.", ""),
                ("parent", "A name that leaves its directory.", "../a"),
                ("inner-parent", "A name with .. inside.", "a/../../b"),
                ("dot", "A name with a lone dot.", "a/./b"),
                ("parent-last", "A name that ends in a parent.", "a/.."),
                ("absolute", "An absolute path.", "/etc/passwd"),
                ("backslash", "A backslash.", "..\\\\a"),
                ("nul", "A NUL.", "a\\u0000b"),
                ("newline", "A newline.", "a\\nb"),
                ("escape", "A terminal's escape character.", "a\\u001b[31m"),
                ("delete", "A DEL.", "a\u007f"),
                ("long", "4,097 characters.", "a" * 4097),
                ("c1", "A control sequence introducer of eight bits.", "a\u009b31m"),
            )
        ),
    ]  # fmt: skip


def _bad_entries() -> list[Vector]:
    def entry(name: str, description: str, clauses: str, text: str, flags: tuple[str, ...] = ()) -> Vector:
        return _bad(name, description, clauses, container(f'{{"a":{text}}}', F32[:4]), flags)

    def pair(name: str, description: str, first: str, second: str, size: int) -> Vector:
        one, two = (_entry(offsets=offsets) for offsets in (first, second))
        return _bad(name, description, "S5", container(f'{{"a":{one},"b":{two}}}', bytes(size)))

    return [
        entry("unknown-field", "A field that the container does not have.", "S4", _entry()[:-1] + ',"x":1}', LAX),
        entry("missing-field", "No shape.", "S4", '{"dtype":"F32","data_offsets":[0,4]}'),
        entry("entry-null", "An entry that is null.", "S4", "null"),
        entry("entry-list", "An entry that is a list.", "S4", '["F32",[1],[0,4]]', LAX),
        entry("unknown-dtype", "A dtype that nobody knows.", "S4", _entry("F33")),
        entry("lower-case-dtype", "A dtype in lower case.", "S4", _entry("f32")),
        entry("shape-number", "A shape that is a number.", "S4", _entry(shape="1")),
        entry("shape-negative", "A negative size.", "S4", _entry(shape="[-1]")),
        entry("shape-minus-zero", "A size of -0.", "S4 J3", _entry(shape="[-0]", offsets="[0,0]")),
        entry("shape-real", "A size of 1.0.", "S4", _entry(shape="[1.0]")),
        entry("shape-bool", "A size of true.", "S4", _entry(shape="[true]")),
        entry("shape-text", "A size that is text.", "S4", _entry(shape='["1"]')),
        entry("shape-long", "65 dimensions.", "S4", _entry(shape=str([1] * 65)), LAX),
        entry("shape-huge", "A product that wraps 64 bits to the right size.", "S5",
              _entry(shape="[1,4503599627370496,4096]", offsets="[0,0]")),
        entry("shape-2-53", "A size that no double holds.", "S4 J3", _entry(shape="[9007199254740993]")),
        entry("offsets-one", "One offset.", "S4", _entry(offsets="[4]")),
        entry("offsets-three", "Three offsets.", "S4", _entry(offsets="[0,4,4]")),
        entry("offsets-negative", "A negative offset.", "S4", _entry(offsets="[-4,0]")),
        entry("offsets-null", "No offsets.", "S4", _entry(offsets="null")),
        entry("offsets-exponent", "An offset with an exponent.", "S4", _entry(offsets="[0,4e0]")),
        entry("too-small", "Fewer bytes than the shape needs.", "S5", _entry(shape="[2]")),
        entry("too-large", "More bytes than the shape needs.", "S5", _entry("F16")),
        entry("backwards", "An end before the beginning.", "S5", _entry(shape="[0]", offsets="[4,0]")),
        entry("not-whole-bytes", "One element of 4 bits.", "S4 S5", _entry("F4", "[1]", "[0,1]")),
        entry("late-start", "A hole before the first tensor.", "S5", _entry(shape="[0]", offsets="[4,4]")),
        pair("hole", "A hole between two tensors.", "[0,4]", "[8,12]", 12),
        pair("overlap", "Two tensors that overlap.", "[0,4]", "[2,6]", 6),
        pair("same-bytes", "Two tensors over the same bytes.", "[0,4]", "[0,4]", 4),
        pair("beyond", "A tensor beyond the end of the file.", "[0,4]", "[4,8]", 4),
    ]  # fmt: skip


def canonical_safetensors() -> list[Vector]:
    def described(tensors: list[Tensor], metadata: dict[str, str] | None) -> dict[str, Any]:
        entries = [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "data": b64(t.data)} for t in tensors]
        return {"metadata": metadata or {}, "tensors": entries}

    def written(name: str, description: str, clauses: str, tensors: list[Tensor],
                metadata: dict[str, str] | None = None) -> Vector:  # fmt: skip
        file = canonical_file(tensors, metadata)
        return valid(
            name, description, clauses, described(tensors, metadata), {"base64": b64(file), "digest": digest(file)}
        )

    def refused(name: str, description: str, clauses: str, *tensors: Tensor) -> Vector:
        return rejected(name, description, clauses, described(list(tensors), None))

    a, b = Tensor("a", "F32", (1,), F32[:4]), Tensor("b", "F32", (2,), F32[:8])
    mixed = [
        Tensor("wide", "I64", (1,), bytes(8)), Tensor("byte", "U8", (3,), b"\1\2\3"),
        Tensor("half", "BF16", (2, 1), F32[:4]), Tensor("a.half", "F16", (1,), b"\0\x3c"),
        Tensor("single", "F32", (1,), F32[:4]), Tensor("nibbles", "F4", (2,), b"\x21"),
        Tensor("six", "F6_E2M3", (4,), b"\1\2\3"),
    ]  # fmt: skip
    return [
        written("none", "No tensor and no metadata.", "S6 S7", []),
        written("one", "One tensor.", "S6 S7", [a]),
        written("by-name", "Equal widths go by the bytes of the name.", "S6", [b, a]),
        written("by-width", "Wide elements go first.", "S6", mixed),
        written("utf-8-order", "Names go by UTF-8, where UTF-16 has another order.", "S6",
                [Tensor("\U0001f600", "U8", (1,), b"\1"), Tensor("\ufb33", "U8", (1,), b"\2")]),
        written("upper-before-lower", "Names go by bytes, not by a language's order.", "S6",
                [Tensor("a", "U8", (1,), b"\1"), Tensor("B", "U8", (1,), b"\2"), Tensor("a.10", "U8", (1,), b"\3"),
                 Tensor("a.9", "U8", (1,), b"\4")]),
        written("metadata", "Metadata go first, keys in order of their bytes.", "S7", [a],
                {"z": "1", "format": "pt", "Z": 'a "b" \n', "é": "é"}),
        written("quotes", "A name with a quote, and one beyond ASCII, escaped as RFC 8785 has it.", "S7",
                [Tensor('say "a"', "U8", (1,), b"\1"), Tensor("…", "U8", (1,), b"\2")]),
        written("empty-tensors", "Tensors without elements, and a scalar.", "S6 S7",
                [Tensor("e", "F32", (0, 3), b""), Tensor("s", "F32", (), F32[:4]), Tensor("d", "F64", (0,), b"")]),
        refused("same-name", "Two tensors of one name.", "S6", a, Tensor("a", "F16", (1,), b"\0\0")),
        refused("reserved-name", "A tensor named as the metadata are.", "S6", Tensor("__metadata__", "U8", (1,),
                b"\0")),
        refused("path-name", "A name that leaves its directory.", "S3 S6", Tensor("../a", "U8", (1,), b"\0")),
        refused("unknown-dtype", "A dtype that nobody knows.", "S4 S6", Tensor("a", "Q9", (1,), b"\0")),
        refused("not-whole-bytes", "Three elements of 4 bits.", "S5 S6", Tensor("a", "F4", (3,), b"\0\0")),
        refused("many-dimensions", "65 dimensions.", "S4 S6", Tensor("a", "U8", (1,) * 65, b"\0")),
    ]  # fmt: skip
