"""Laws of loreg/format/: what is written is read back, and nothing that is read raises anything but BadInput."""

from __future__ import annotations

import io
import json
import struct
import sys
import tracemalloc
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import rfc8785
import safetensors
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from loreg.digest import Digest
from loreg.errors import BadInput, UsageError
from loreg.format import canonical_json
from loreg.format.base import BaseManifest, BaseReference, HubPin
from loreg.format.fingerprint import BaseIdentity, BaseTensor, Match, identify, match_base
from loreg.format.manifest import AdapterManifest, BlobRef, Provenance, Source, SourceFile
from loreg.format.module import IN_OUT, OUT_IN, FullTensor, Module
from loreg.format.recipe import DTYPE_NAMES, MergeRecord, Recipe
from loreg.format.reference import Reference, check_name, format_weight, parse_expression
from loreg.format.safetensors import BITS, Header, canonical_header, parse_header, read_header
from loreg.format.terms import BiasTerm, LowRankTerm, TensorRef

settings.register_profile("format", deadline=None, suppress_health_check=[HealthCheck.too_slow])
few = settings(settings.get_profile("format"), max_examples=60)
many = settings(settings.get_profile("format"), max_examples=200)

# ---- strategies

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\/"), min_size=1, max_size=8
).filter(lambda name: name not in (".", "..", "__metadata__"))
digests = st.integers(0, 50).map(lambda n: Digest.of(str(n).encode()))
hexes = st.integers(0, 50).map(lambda n: f"{n:064x}")
doubles = st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not 2**53 <= abs(x) < 1e21 and x != 0)
naturals = st.integers(0, 2**53 - 1)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | doubles | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=12,
)


@st.composite
def tensor_entries(draw: st.DrawFn) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Name, dtype, shape and data of a few tensors, names differing."""
    entries = []
    for name in draw(st.lists(names, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        if BITS[dtype] % 8:
            shape = (4, *shape)
        size = prod(shape) * BITS[dtype] // 8
        entries.append((name, dtype, shape, draw(st.binary(min_size=size, max_size=size))))
    return entries


def write(entries: list[tuple[str, str, tuple[int, ...], bytes]], metadata: dict[str, str]) -> bytes:
    header = canonical_header([entry[:3] for entry in entries], metadata)
    data = {name: content for name, _, _, content in entries}
    return header.raw + b"".join(data[info.name] for info in header.tensors)


def read(data: bytes) -> Header:
    return read_header(io.BytesIO(data), len(data), what="a file")


def tensor_refs(*shape: int) -> st.SearchStrategy[TensorRef]:
    return st.builds(TensorRef, st.sampled_from(["BF16", "F16", "F32"]), st.just(shape), digests)


@st.composite
def modules(draw: st.DrawFn, path: str) -> Module:
    inner, outer = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    terms = []
    for rank in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        ends = {"A": draw(tensor_refs(rank, inner)), "B": draw(tensor_refs(outer, rank))}
        terms.append(LowRankTerm(rank, draw(st.none() | doubles), draw(doubles), **ends))
    biases = draw(st.lists(st.builds(BiasTerm, doubles, tensor_refs(outer)), max_size=2))
    return Module(
        tensor=f"{path}.weight",
        kind=draw(st.sampled_from(("linear", "conv1d", "embedding"))),
        orientation=draw(st.sampled_from([OUT_IN, IN_OUT])),
        in_features=inner,
        out_features=outer,
        terms=tuple(terms),
        bias_tensor=f"{path}.bias" if biases else None,
        bias_terms=tuple(biases),
    )


base_tensors = st.lists(
    st.builds(
        lambda name, dtype, size, content: BaseTensor(name, dtype, (size, 4), size * 4 * BITS[dtype] // 8, content),
        names, st.sampled_from(sorted(BITS)), st.integers(0, 5), digests,
    ),
    max_size=4,
    unique_by=lambda tensor: tensor.name,
)  # fmt: skip

recipes = st.builds(
    Recipe.of,
    digests,
    st.lists(st.tuples(digests, st.floats(allow_nan=False, allow_infinity=False)), max_size=4),
    dtype=st.none() | st.sampled_from(sorted(DTYPE_NAMES)),
    base_mismatch=st.booleans(),
)


@st.composite
def manifests(draw: st.DrawFn) -> AdapterManifest:
    paths = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    found = {path: draw(modules(path)) for path in paths}
    edited = [m.tensor for m in found.values()] + [m.bias_tensor for m in found.values() if m.bias_tensor]
    assume(len(set(edited)) == len(edited))
    blobs = [
        BlobRef(Digest.of(role.encode()), draw(hexes), draw(naturals), role) for role in ("factors", "full", "source")
    ]
    full = {"ln.weight": FullTensor(blobs[1].digest, draw(tensor_refs(3)), "ln")} if draw(st.booleans()) else {}
    labels = [f"factors:{name}" for path, module in found.items() for name, _ in module.tensors(path)]
    labels += [f"full:{name}" for name in full]
    files = [
        SourceFile(name, draw(naturals), draw(hexes), blobs[2].digest, tuple(draw(st.lists(st.sampled_from(labels)))))
        for name in draw(st.lists(names, max_size=3, unique=True))
    ]
    hub = HubPin("a/b", "0" * 40, draw(st.dictionaries(texts, hexes, max_size=2)))
    base = BaseReference(
        name=draw(texts),
        hub=draw(st.none() | st.just(hub)),
        identity=BaseIdentity(draw(digests), draw(digests), draw(digests)),
        touched={name: draw(digests) for name in edited},
        recipe=draw(st.none() | recipes),
    )
    return AdapterManifest(
        base=base,
        modules=found,
        full=full,
        blobs=tuple(sorted(blobs, key=lambda blob: blob.digest)),
        source=Source("peft", tuple(files)) if files else None,
        provenance=Provenance(
            tuple(draw(st.lists(digests, max_size=2))), draw(st.none() | recipes), draw(texts), None
        ),
        annotations=draw(st.dictionaries(texts, json_values, max_size=2)),
    )


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
    """Truncated, with bytes changed, taken out or put in: what a disk, a network or an enemy does."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 3))):
        position = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "change", "drop", "insert"]))
        if kind == "cut":
            del data[position:]
        elif kind == "drop":
            del data[position : position + draw(st.integers(1, 9))]
        elif kind == "change":
            data[position : position + 1] = draw(
                st.sampled_from([b"\0", b"\xff", b'"', b"[", b"}", b"-", b"9", b",", b"\\"])
            )
        else:
            data[position:position] = draw(
                st.sampled_from([b"0", b"e9", b"\\u0061", b"null", b"{}", b'"a":1,', b" "])
            )
    return bytes(data)


# ---- canonical safetensors


@many
@given(tensor_entries(), st.dictionaries(texts, texts, max_size=3), st.randoms(use_true_random=False))
def test_canonical_files_load_in_the_library_and_are_stable(entries: Any, metadata: Any, rng: Any) -> None:
    file = write(entries, metadata)
    shuffled, pairs = list(entries), list(metadata.items())
    rng.shuffle(shuffled)
    rng.shuffle(pairs)
    assert write(shuffled, dict(pairs)) == file
    assert read(file).metadata == metadata
    assert (len(read(file).raw)) % 8 == 0
    loaded = dict(safetensors.deserialize(file))
    assert {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in loaded.items()} == {
        n: (dtype, shape, data) for n, dtype, shape, data in entries
    }


@few
@given(tensor_entries())
def test_every_tensor_is_aligned_to_its_element(entries: Any) -> None:
    header = canonical_header([entry[:3] for entry in entries])
    for info in header.tensors:
        assert (header.data_start + info.start) % max(1, BITS[info.dtype] // 8) == 0


@few
@given(tensor_entries(), st.dictionaries(texts, texts, max_size=3))
def test_a_header_is_what_its_parse_says(entries: Any, metadata: Any) -> None:
    header = canonical_header([entry[:3] for entry in entries], metadata)
    assert parse_header(header.raw, header.file_size, what="a file") == header


class Trap:
    """A stream that may be asked for so many bytes and no more."""

    def __init__(self, data: bytes, most: int) -> None:
        self._stream, self._left = io.BytesIO(data), most

    def read(self, size: int) -> bytes:
        self._left -= size
        assert self._left >= 0, "read more than the header"
        return self._stream.read(size)


def test_reading_a_header_reads_no_data() -> None:
    file = write([("a", "U8", (1000,), bytes(1000))], {})
    size = len(file)
    header_only: Any = Trap(file, size - 1000)
    assert read_header(header_only, size, what="a file").file_size == size
    lying: Any = Trap(struct.pack("<Q", 10**15), 8)
    with pytest.raises(BadInput, match="announces a header"):
        read_header(lying, 10**6, what="a file")


def test_a_file_that_shrinks_while_it_is_read_is_refused() -> None:
    file = write([("a", "U8", (4,), bytes(4))], {})
    with pytest.raises(BadInput, match="truncated"):
        read_header(io.BytesIO(file[:20]), len(file), what="a file")


# ---- hostile bytes


def survives(parse: Callable[[bytes], object], data: bytes) -> bool:
    """Whether ``parse`` accepts ``data``; anything that it raises but BadInput is an error."""
    try:
        parse(data)
    except BadInput:
        return False
    return True


GOOD_FILE = write([("a.weight", "F32", (2, 2), bytes(16)), ("b", "BF16", (3,), bytes(6))], {"format": "pt"})


@many
@given(damaged(GOOD_FILE))
def test_damaged_safetensors(data: bytes) -> None:
    """And what loreg still accepts, the library accepts and understands alike."""
    if survives(read, data):
        loaded = dict(safetensors.deserialize(data))
        header = read(data)
        assert {n: (t["dtype"], tuple(t["shape"])) for n, t in loaded.items()} == {
            t.name: (t.dtype, t.shape) for t in header.tensors
        }
        for info in header.tensors:
            assert bytes(loaded[info.name]["data"]) == data[header.data_start :][info.start : info.end]


@many
@given(st.recursive(json_values, lambda inner: st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "U8", "F4"]) | inner, "shape": st.lists(st.integers(-1, 3)) | inner,
     "data_offsets": st.lists(st.integers(-1, 9), min_size=2, max_size=2) | inner}), max_leaves=4),
    texts, st.integers(0, 9))  # fmt: skip
def test_headers_of_any_json(entry: Any, name: str, size: int) -> None:
    text = json.dumps({name: entry}).encode()
    survives(read, struct.pack("<Q", len(text)) + text + bytes(size))


@many
@given(st.binary(max_size=64))
@example(b"\xff" * 8)
@example(struct.pack("<Q", 2) + b"{}")
def test_random_bytes(data: bytes) -> None:
    parsers = (read, canonical_json.loads, AdapterManifest.parse, Recipe.parse, MergeRecord.parse, BaseManifest.parse)
    for parse in parsers:
        survives(parse, data)


@few
@given(st.data())
def test_damaged_manifests(data: st.DataObject) -> None:
    """A changed digest or name may still parse: but then it is another manifest, with another identity."""
    original = data.draw(manifests())
    bytes_ = data.draw(damaged(original.dump()))
    if survives(AdapterManifest.parse, bytes_):
        assert AdapterManifest.parse(bytes_).dump() == bytes_


def _replaced(value: Any, path: tuple[int, ...], by: Any) -> Any:
    """``value`` with one inner value replaced: ``path`` picks a child at each level, until it ends or cannot."""
    if not path or not isinstance(value, dict | list) or not value:
        return by
    if isinstance(value, list):
        index = path[0] % len(value)
        return [_replaced(item, path[1:], by) if i == index else item for i, item in enumerate(value)]
    key = sorted(value)[path[0] % len(value)]
    return {**value, key: _replaced(value[key], path[1:], by)}


MANIFEST_PARSERS: dict[str, Callable[[bytes], Any]] = {
    "adapter": AdapterManifest.parse, "recipe": Recipe.parse, "merge": MergeRecord.parse, "base": BaseManifest.parse,
}  # fmt: skip
HUGE: Any = {"dtype": "F32", "shape": [2**53 - 1] * 3, "digest": str(Digest.of(b""))}


@many
@given(
    st.one_of(
        manifests().map(AdapterManifest.dump),
        recipes.map(Recipe.dump),
        base_tensors.map(lambda tensors: BaseManifest(tuple(tensors)).dump()),
        st.builds(
            lambda recipe, tensors: MergeRecord(recipe, identify(tensors).weights_root, tuple(tensors)).dump(),
            recipes,
            base_tensors,
        ),
    ),
    st.lists(st.integers(0, 9), max_size=6),
    json_values | st.sampled_from(["", "0", "nan", "\u0661", HUGE, {"a": HUGE}, [{"adapter": "", "weight": ""}]]),
)
def test_documents_with_any_value_anywhere(document: bytes, path: list[int], value: Any) -> None:
    original = json.loads(document)
    changed = canonical_json.dumps(_replaced(original, tuple(path), value))
    for parse in MANIFEST_PARSERS.values():
        if survives(parse, changed):
            assert parse(changed).dump() == changed


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b'"' + b'\\"' * 100_000, id="escaped-quotes"),
        pytest.param(b'"' + b"a" * 2_000_000 + b'"', id="long-text"),
        pytest.param(b"[" * 100_000, id="open"),
        pytest.param(b"]" * 100_000, id="closed"),
        pytest.param(b'{"a":' * 50_000, id="objects"),
        pytest.param(b"9" * 200_000, id="digits"),
        pytest.param(b"0." + b"1" * 200_000, id="fraction"),
        pytest.param(b'"' + b"\\" * 100_001, id="backslashes"),
    ],
)
def test_hostile_json_costs_memory_in_proportion(text: bytes) -> None:
    """A matcher that backtracked took minutes for the first and 2 GB for the second."""
    tracemalloc.start()
    survives(canonical_json.loads, text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(text) + 1_000_000


def test_hostile_shapes_are_refused_before_they_are_multiplied() -> None:
    tensor = {"dtype": "F32", "shape": [2**53 - 1] * 200_000, "digest": str(Digest.of(b""))}
    with pytest.raises(BadInput, match="at most 64"):
        BaseManifest.parse(rfc8785.dumps({"format": "loreg/1", "kind": "base", "tensors": {"a": tensor}}))


def test_limits_of_size(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="at most 9 are read"):
        canonical_json.loads(b'["123456"]', max_bytes=9)
    monkeypatch.setattr("loreg.format.safetensors.MAX_HEADER_BYTES", 15)
    with pytest.raises(BadInput, match="announces"):
        read(struct.pack("<Q", 16) + b"{}" + b" " * 14)


def test_messages_stay_short() -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": ["x"] * 100_000, "data_offsets": [0, 0]}}).encode()
    with pytest.raises(BadInput) as caught:
        read(struct.pack("<Q", len(text)) + text)
    assert len(str(caught.value)) < 1000


# ---- what the reference library accepts and loreg refuses


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ('{"a":ENTRY,"a":ENTRY}', "twice"),
        ('{"a":ENTRY,"\\u0061":ENTRY}', "twice"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"extra":1}}', "exactly the fields"),
        (' {"a":ENTRY}', "not a safetensors file"),
        ('{"../a":ENTRY}', "no absolute or relative path"),
        ('{"/a":ENTRY}', "no absolute or relative path"),
        ('{"":ENTRY}', "not empty"),
        (f'{{"{"a" * 4097}":ENTRY}}', r"a{200}'… .4,097 characters.: a name .* has at most 4,096 characters"),
    ],
)
def test_what_the_library_accepts_and_loreg_refuses(header: str, why: str) -> None:
    text = header.replace("ENTRY", '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}').encode()
    file = struct.pack("<Q", len(text)) + text + bytes(4)
    assert len(dict(safetensors.deserialize(file))) == 1
    with pytest.raises(BadInput, match=why):
        read(file)


# ---- canonical JSON


@many
@given(json_values)
def test_json_round_trip(value: Any) -> None:
    data = canonical_json.dumps(value)
    assert data == rfc8785.dumps(value)
    assert canonical_json.loads(data) == value
    assert canonical_json.loads_canonical(data) == value
    assert canonical_json.loads(json.dumps(value, indent=1).encode()) == value


@many
@given(st.floats())
@example(1e17)
@example(2.0**53)
@example(2.0**53 - 1)
@example(1e21)
@example(-0.0)
def test_what_is_written_can_be_read(number: float) -> None:
    try:
        data = canonical_json.dumps([number])
    except BadInput:
        assert number - number != 0 or (number.is_integer() and 2**53 <= abs(number) < 1e21)
    else:
        assert canonical_json.loads_canonical(data) == [number]


@pytest.mark.parametrize("depth", [63, 64, 65, 5000])
def test_depth_is_the_same_for_reader_and_writer(depth: int) -> None:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    data = b"[" * depth + b"]" * depth
    if depth <= canonical_json.MAX_DEPTH:
        assert canonical_json.dumps(value) == data and canonical_json.loads(data) == value
    else:
        for attempt in (lambda: canonical_json.dumps(value), lambda: canonical_json.loads(data)):
            with pytest.raises(BadInput, match="nests deeper"):
                attempt()


@many
@given(st.text(max_size=30))
def test_json_text_agrees_with_the_standard_library(text: str) -> None:
    """Whatever loreg reads, Python's own parser reads alike."""
    data = text.encode("utf-8", "surrogatepass")
    if survives(canonical_json.loads, data):
        assert json.loads(data) == canonical_json.loads(data)


# ---- documents


@few
@given(manifests())
def test_manifest_round_trip(manifest: AdapterManifest) -> None:
    data = manifest.dump()
    assert AdapterManifest.parse(data) == manifest
    assert manifest.digest == Digest.of(data)


@few
@given(recipes, st.randoms(use_true_random=False))
def test_recipe_round_trip_and_order(recipe: Recipe, rng: Any) -> None:
    assert Recipe.parse(recipe.dump()) == recipe
    terms = [(term.adapter, term.value) for term in recipe.terms] + [(Digest.of(b"zero"), 0.0)]
    rng.shuffle(terms)
    again = Recipe.of(recipe.base, terms, dtype=recipe.dtype, base_mismatch=recipe.base_mismatch)
    assert again.dump() == recipe.dump()


@few
@given(base_tensors, recipes, st.randoms(use_true_random=False))
def test_base_and_merge_round_trip(tensors: list[BaseTensor], recipe: Recipe, rng: Any) -> None:
    ordered = tuple(sorted(tensors, key=lambda tensor: tensor.name.encode()))
    assert BaseManifest.parse(BaseManifest(tuple(tensors)).dump()).tensors == ordered
    record = MergeRecord(recipe, identify(tensors).weights_root, ordered)
    assert MergeRecord.parse(record.dump()) == record
    shuffled = list(tensors)
    rng.shuffle(shuffled)
    assert identify(shuffled) == identify(tensors)


@few
@given(base_tensors, st.sampled_from(["name", "dtype", "shape", "content"]))
def test_whatever_changes_in_a_tensor_changes_the_root(tensors: list[BaseTensor], what: str) -> None:
    assume(tensors)
    first = tensors[0]
    fields = {key: getattr(first, key) for key in ("name", "dtype", "shape", "nbytes", "content")}
    other = {"name": first.name + "x", "dtype": "I8" if first.dtype == "U8" else "U8", "shape": (*first.shape, 1),
             "content": Digest.of(b"other")}  # fmt: skip
    assume(all(tensor.name != other["name"] for tensor in tensors))
    changed = [BaseTensor(**{**fields, what: other[what]}), *tensors[1:]]
    before, after = identify(tensors), identify(changed)
    assert before.weights_root != after.weights_root
    assert (before.structure_root == after.structure_root) == (what == "content")
    assert what != "name" or before.content_set == after.content_set


def test_an_adapter_that_touches_nothing_does_not_fit_every_base() -> None:
    here = BaseTensor("a", "U8", (1,), 1, Digest.of(b"a"))
    other = identify([BaseTensor("a", "U8", (1,), 1, Digest.of(b"b"))])
    assert match_base(other, {}, {"a": here})[0] == Match.STRUCTURE
    assert match_base(identify([here]), {}, {"a": here})[0] == Match.WEIGHTS


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("Q9", (1,)), ("F32", (-1,)), ("F32", (True,)), ("F4", (1,)), ("U8", (1,) * 65), ("U8", (2**60, 2**60))],
)
def test_the_writer_refuses_what_the_reader_would(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput):
        canonical_header([("a", dtype, shape)])


@pytest.mark.parametrize("name", ["", "..", "/a", "a\n", "a\x9b", "\ud800", "__metadata__"])
def test_the_writer_refuses_names_that_the_reader_would(name: str) -> None:
    with pytest.raises(BadInput):
        canonical_header([(name, "U8", (1,))])


# ---- references and expressions

parts = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,9}", fullmatch=True)
reference_names = st.one_of(parts, st.tuples(parts, parts).map("/".join)).filter(lambda name: name != "blake3")
references = st.one_of(
    st.builds(Reference, reference_names),
    st.builds(Reference, reference_names, tag=parts.filter(lambda tag: not (tag[0] == "v" and tag[1:].isdigit()))),
    st.builds(Reference, reference_names, number=st.integers(1, 999_999_999)),
    st.builds(Reference, st.none() | reference_names, digest_prefix=st.from_regex(r"[0-9a-f]{8,64}", fullmatch=True)),
)


@many
@given(references)
def test_reference_round_trip(reference: Reference) -> None:
    assert Reference.parse(str(reference)) == reference


@many
@given(st.lists(st.tuples(st.floats(allow_nan=False, allow_infinity=False), references), min_size=1, max_size=4))
def test_expression_round_trip(terms: list[tuple[float, Reference]]) -> None:
    written = " ".join(f"{'-' if w < 0 else '+'} {format_weight(abs(w))}*{reference}" for w, reference in terms)
    parsed = parse_expression(written)
    assert [(term.weight, term.reference) for term in parsed] == terms


@pytest.mark.timeout(60)
@many
@given(st.text("ab1.:@/*+- \t\ne_B\u00a0", max_size=12))
@example("1" * 100_000)
@example("a+" + " " * 100_000 + "*")
@example(" " * 100_000)
def test_expressions_raise_nothing_but_usage_errors(text: str) -> None:
    for parse in (parse_expression, Reference.parse, check_name):
        try:
            parse(text)
        except UsageError:
            continue


@many
@given(st.floats(allow_nan=False, allow_infinity=False))
@example(1e17)
@example(sys.float_info.min)
def test_weights_have_one_text(weight: float) -> None:
    text = format_weight(weight)
    assert float(text) == weight and format_weight(float(text)) == text
