"""What holds of every merge, end to end: from directories that were pushed to the bytes of the files written."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loreg
from loreg.errors import BadInput
from loreg.merge.output import MergeResult

Q, V = tiny.Q, tiny.V
OUTPUTS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_serial = itertools.count()


def values(rng: np.random.Generator, regime: str, dtype: str, *shape: int) -> tiny.Tensor:
    """``dyadic``: where exact ties live; ``near``: just beside them, for a factor whose rows differ in size;
    ``wild``: any finite bits, subnormals and negative zeros with them."""
    if regime in ("dyadic", "near"):
        sizes = 2.0 ** -rng.choice([0, 14, 30], (shape[0], 1)) if regime == "near" and len(shape) == 2 else 1.0
        return tiny.tensor(dtype, rng.integers(-16, 17, shape) / 8 * sizes)
    if regime == "normal":
        return tiny.normal(rng, dtype, *shape)
    width = 4 if dtype == "F32" else 2
    words = rng.integers(0, 2 ** (8 * width), shape, dtype=np.uint64)
    exponent = {"F32": 0x7F800000, "BF16": 0x7F80, "F16": 0x7C00}[dtype]
    words = np.where(words & exponent == exponent, words & ~np.uint64(exponent & -exponent), words)
    return tiny.Tensor(dtype, shape, words.astype(f"<u{width}").tobytes())


@dataclass(frozen=True)
class Adapter:
    """What is pushed: factors by module, and how its config scales them."""

    modules: Mapping[str, tiny.Factors]
    alpha: float
    use_rslora: bool

    def scale(self, path: str) -> float:
        return tiny.scale(self.modules[path], self.alpha, self.use_rslora)


@dataclass(frozen=True)
class Case:
    """A checkpoint, adapters and their weights."""

    model: Mapping[str, tiny.Tensor]
    adapters: tuple[Adapter, ...]
    weights: tuple[float, ...]

    def expected(self, name: str, dtype: str | None = None) -> tiny.Tensor:
        """The tensor as the definition of the arithmetic has it."""
        path, _, part = name.rpartition(".")
        W = self.model[name]
        if W.dtype not in tiny.FORMATS:
            return W
        terms = []
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if (factors := adapter.modules.get(path)) is None:
                continue
            c = weight * adapter.scale(path)
            if part == "weight":
                terms.append((c, factors.A.values, factors.B.values))
            elif factors.bias is not None:
                terms.append((c, np.ones((1, 1)), factors.bias.values.reshape(-1, 1)))
        return tiny.merged(W, terms, dtype) if terms or dtype else W


@st.composite
def cases(
    draw: st.DrawFn, adapters: int = 3, regimes: tuple[str, ...] = ("dyadic", "near", "normal", "wild")
) -> Case:
    dtype = draw(st.sampled_from(sorted(tiny.FORMATS)))
    regime = draw(st.sampled_from(regimes))
    rows, cols = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shapes = {f"{Q}.weight": (rows, cols), f"{Q}.bias": (rows,), f"{V}.weight": (cols, cols), tiny.NORM: (cols,)}
    shapes |= {"logit_scale": (), "conv.weight": (2, 1, 3)}
    stored = "dyadic" if regime == "near" else regime
    model = {name: values(rng, stored, dtype, *shape) for name, shape in shapes.items()}
    model["model.positions"] = tiny.tensor("I64", np.arange(3)[None])
    made = []
    for _ in range(draw(st.integers(1, adapters))):
        kind = draw(st.sampled_from(["BF16", "F16", "F32"]))
        plain = "normal" if regime == "wild" else regime
        modules = {}
        for path, outer in draw(st.sampled_from([((Q, rows),), ((V, cols),), ((Q, rows), (V, cols))])):
            rank = draw(st.integers(1, 4))
            bias = values(rng, plain, kind, outer) if path == Q and draw(st.booleans()) else None
            A = values(rng, plain, kind, rank, cols)
            B = values(rng, "dyadic" if plain == "near" else plain, kind, outer, rank)
            modules[path] = tiny.Factors(A, B, bias)
        made.append(Adapter(modules, draw(st.sampled_from([1, 2, 16, 0.3])), draw(st.booleans())))
    weights = [draw(st.one_of(st.just(1.0), st.floats(-8, 8).filter(bool))) for _ in made]
    return Case(model, tuple(made), tuple(weights))


class World:
    """A registry with one case in it."""

    def __init__(self, registry: loreg.Registry, root: Path, case: Case, **layout: Any) -> None:
        self.registry, self.root, self.case = registry, root, case
        number = next(_serial)
        self.base = tiny.write_model(root / f"base{number}", case.model, **layout)
        self.names = [f"a{number}-{index}" for index in range(len(case.adapters))]
        for name, adapter in zip(self.names, case.adapters, strict=True):
            config = {"alpha": adapter.alpha, "use_rslora": adapter.use_rslora, "lora_bias": True}
            folder = tiny.write_adapter(root / name, adapter.modules, **config)
            registry.push(folder, base=self.base, name=name)

    @property
    def terms(self) -> list[str]:
        pairs = zip(self.case.weights, self.names, strict=True)
        return [f"{'- ' if weight < 0 else ''}{abs(weight)!r}*{name}" for weight, name in pairs]

    def merge(self, expression: str, **options: Any) -> MergeResult:
        return self.registry.merge(expression, self.root / f"out{next(_serial)}", **options)


def joined(terms: Any) -> str:
    first, *rest = terms
    return first + "".join(f" {term}" if term.startswith("-") else f" + {term}" for term in rest)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[loreg.Registry, Path]]:
    """One registry for all examples, whose names are their own; function-scoped fixtures do not suit Hypothesis."""
    # In memory where there is such a place: the laws are about values, and would mostly wait for the disk.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="loreg-laws-", dir=memory))
    with loreg.open(root / "home") as registry:
        yield registry, root
    shutil.rmtree(root)


Shared = tuple[loreg.Registry, Path]
few = settings(max_examples=12, deadline=None)


@settings(max_examples=80, deadline=None)
@given(case=cases(), dtype=st.sampled_from([None, *sorted(OUTPUTS)]), kind=st.sampled_from(["probe", "exact"]))
def test_every_element_is_the_storage_value_nearest_to_the_exact_sum(
    shared: Shared, case: Case, dtype: str | None, kind: str
) -> None:
    world = World(*shared, case)
    options = {"dtype": OUTPUTS[dtype] if dtype else None, "verify": kind}
    try:
        expected = {name: case.expected(name, dtype) for name in case.model}
    except OverflowError:
        with pytest.raises(BadInput, match=r"Tensor '.*exceeds the largest finite"):
            world.merge(joined(world.terms), **options)
        return
    result = world.merge(joined(world.terms), **options)
    assert result.verification.ok
    assert tiny.tensors_in(result.out) == expected


@pytest.mark.parametrize("tiny_term", [2.0**-30, 2.0**-40, 2.0**-60])
@pytest.mark.parametrize("dtype", sorted(tiny.FORMATS))
def test_a_sum_just_beside_a_tie_is_rounded_to_its_side(shared: Shared, dtype: str, tiny_term: float) -> None:
    # In float32 (of 2⁻³⁰ on) or float64 (2⁻⁶⁰) it is the tie itself, and ties go to even.
    half = 2.0 ** -tiny.FORMATS[dtype][0]
    W = tiny.tensor(dtype, 1 + 2 * half * np.arange(16).reshape(4, 4))
    signs = np.array([1, -1, 0, 1])
    A = tiny.tensor("F32", [[1.0] * 4, signs * tiny_term])
    B = tiny.tensor("F32", [[half, 1], [-half, 1], [half, -1], [3 * half, 0]])
    case = Case({f"{V}.weight": W}, (Adapter({V: tiny.Factors(A, B)}, 2, False),), (1.0,))
    world = World(*shared, case)
    written = tiny.tensors_in(world.merge(world.names[0], verify="exact").out)
    assert written[f"{V}.weight"] == case.expected(f"{V}.weight")


@few
@given(case=cases(adapters=1))
def test_one_adapter_at_weight_one_is_itself(shared: Shared, case: Case) -> None:
    world = World(*shared, case)
    try:
        expected = {name: Case(case.model, case.adapters, (1.0,)).expected(name) for name in case.model}
    except OverflowError:
        return
    assert tiny.tensors_in(world.merge(world.names[0]).out) == expected


@few
@given(case=cases(regimes=("dyadic", "normal")), data=st.data())
def test_the_order_of_the_terms_does_not_show(shared: Shared, case: Case, data: st.DataObject) -> None:
    world = World(*shared, case)
    shuffled = data.draw(st.permutations(world.terms))
    outputs = [tiny.files_in(world.merge(joined(terms)).out) for terms in (world.terms, shuffled)]
    assert outputs[0] == outputs[1]


@few
@given(case=cases(regimes=("dyadic", "normal")), data=st.data())
def test_sharding_order_and_metadata_of_the_base_do_not_show(shared: Shared, case: Case, data: st.DataObject) -> None:
    world = World(*shared, case)
    names = data.draw(st.permutations(list(case.model)))
    count = data.draw(st.integers(1, 4))
    shards = [part for part in (names[index::count] for index in range(count)) if part]
    other = tiny.write_model(
        world.root / f"other{next(_serial)}", case.model, shards=shards, metadata={"format": "pt", "x": "é"}
    )
    added = world.registry.add_base(other)
    assert added.manifest == world.registry.bases.find(world.base, lambda done: None).manifest
    first, second = world.merge(joined(world.terms)), world.merge(joined(world.terms), base=other)
    assert (first.weights_root, first.recipe) == (second.weights_root, second.recipe)
    assert tiny.tensors_in(first.out) == tiny.tensors_in(second.out)
    assert (first.out / "loreg.json").read_bytes() == (second.out / "loreg.json").read_bytes()


@few
@given(case=cases(regimes=("dyadic", "normal")), dtype=st.sampled_from([None, "float32"]), sharded=st.booleans())
def test_merge_then_unmerge_gives_the_files_of_the_base(
    shared: Shared, case: Case, dtype: str | None, sharded: bool
) -> None:
    names = list(case.model)
    layout = {"shards": [names[3:], names[:3]], "metadata": {"format": "pt"}} if sharded else {}
    # In a registry of its own: of a copy of the same weights in other files, it would be those that come back.
    with loreg.open(shared[1] / f"home{next(_serial)}") as registry:
        world = World(registry, shared[1], case, **layout)
        before = tiny.files_in(world.base)
        merged = world.merge(joined(world.terms), dtype=dtype)
        back = world.registry.unmerge(merged.out, world.root / f"back{next(_serial)}")
    assert tiny.files_in(back.out) == before
    assert back.matches_base and back.weights_root == merged.record.recipe.base


@few
@given(case=cases(adapters=1), pad=st.integers(0, 40), data=st.data())
def test_push_then_export_gives_the_files_of_the_adapter(
    shared: Shared, case: Case, pad: int, data: st.DataObject
) -> None:
    world = World(*shared, case)
    folder = world.root / world.names[0]
    tensors = list(tiny.contents(folder / "adapter_model.safetensors").items())
    metadata = data.draw(st.dictionaries(st.text('abcé"\\\n'), st.text('abcé"\\\n'), max_size=3))
    shuffled = data.draw(st.permutations(tensors))
    (folder / "adapter_model.safetensors").write_bytes(tiny.container(shuffled, metadata, pad))
    (folder / "README.md").write_bytes(data.draw(st.binary(max_size=20)))
    version = world.registry.push(folder, base=world.base)
    out = world.registry.export(str(version), world.root / f"export{next(_serial)}")
    assert tiny.files_in(out) == tiny.files_in(folder)


@few
@given(case=cases(regimes=("dyadic", "normal")), data=st.data())
def test_a_term_of_weight_zero_is_no_term(shared: Shared, case: Case, data: st.DataObject) -> None:
    world = World(*shared, case)
    zero = f"{data.draw(st.sampled_from(['0', '0.0', '0e9']))}*{data.draw(st.sampled_from(world.names))}"
    terms = list(world.terms)
    terms.insert(data.draw(st.integers(0, len(terms))), zero)
    with_zero, without = world.merge(joined(terms)), world.merge(joined(world.terms))
    assert tiny.files_in(with_zero.out) == tiny.files_in(without.out)


@few
@given(case=cases(adapters=1, regimes=("dyadic", "normal")), power=st.integers(-3, 3))
def test_weights_scale_repeat_and_cancel(shared: Shared, case: Case, power: int) -> None:
    world = World(*shared, case)
    (name,) = world.names
    # A power of two times α/r is exact, so it makes no difference whether weight or α carries it.
    (adapter,) = case.adapters
    config = {"alpha": adapter.alpha * 2.0**power, "use_rslora": adapter.use_rslora, "lora_bias": True}
    louder = tiny.write_adapter(world.root / f"{name}-louder", adapter.modules, **config)
    world.registry.push(louder, base=world.base)
    assert world.merge(f"{2.0**power!r}*{name}").weights_root == world.merge(louder.name).weights_root
    assert world.merge(f"{name} + {name}").weights_root == world.merge(f"2*{name}").weights_root
    cancelled = world.merge(f"{name} - {name}")
    assert cancelled.weights_root == cancelled.record.recipe.base


@few
@given(case=cases(regimes=("dyadic", "normal")))
def test_composing_then_merging_is_merging_the_expression(shared: Shared, case: Case) -> None:
    world = World(*shared, case)
    composed = world.registry.compose(joined(world.terms), f"mix{next(_serial)}")
    assert composed.relative_error == 0
    again = world.registry.compose(joined(reversed(world.terms)), composed.version.name)
    assert (again.version.digest, again.version.created) == (composed.version.digest, False)
    assert world.merge(str(composed.version)).weights_root == world.merge(joined(world.terms)).weights_root


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["BF16", "F16", "F32"]), tile=st.integers(20, 700))
def test_threads_tiles_and_blocks_do_not_show(shared: Shared, seed: int, dtype: str, tile: int) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = 67, 33
    model = {f"{Q}.weight": values(rng, "dyadic", dtype, rows, cols), "wide.weight": tiny.normal(rng, dtype, 5, 300)}
    model[f"{V}.weight"] = tiny.normal(rng, dtype, cols, cols)
    factors = {Q: tiny.factors(rng, rows, cols, 3), V: tiny.factors(rng, cols, cols, 2, "BF16")}
    factors["wide"] = tiny.factors(rng, 5, 300, 4)
    world = World(*shared, Case(model, (Adapter(factors, 1, False),), (0.7,)))
    threads = torch.get_num_threads()
    outputs = []
    for count, elements, block in ((1, 1 << 20, 1 << 18), (2, tile, 1 << 18), (2, 1 << 20, tile), (1, tile, 50)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("loreg.merge.resources.TILE_BYTES", 4 * elements)
            patch.setattr("loreg.algebra.edits.BLOCK_ELEMENTS", block)
            torch.set_num_threads(count)
            try:
                outputs.append(tiny.files_in(world.merge(world.terms[0], dtype="bf16", verify="exact").out))
            finally:
                torch.set_num_threads(threads)
    assert all(output == outputs[0] for output in outputs)


def test_the_truth_that_merges_are_compared_with_rounds_as_numpy_does() -> None:
    rng = np.random.default_rng(0)
    for x in [*rng.normal(0, 1, 50), 1e-45, 6e-8, 2.0**-24, 3 * 2.0**-25, 65519.9, -1e-40]:
        assert tiny.encode(tiny.rounded(Fraction(float(x)), "F32"), "F32") == np.float32(x).tobytes()
        assert tiny.encode(tiny.rounded(Fraction(float(x)), "F16"), "F16", x < 0) == np.float16(x).tobytes()
    with pytest.raises(OverflowError):
        tiny.rounded(Fraction(65520), "F16")


@pytest.mark.parametrize("weights", [(1, 1), (0.5, 1), (1, -0.25), (0.3, 0.7)])
def test_replaced_tensors_compose_at_any_weight(
    pushed: loreg.Registry, tmp_path: Path, weights: tuple[float, float]
) -> None:
    """A norm's weight and an adapted matrix, each replaced by two adapters: composed and merged as one."""
    rng, stored = np.random.default_rng(3), tiny.contents(tmp_path / "base" / "model.safetensors")
    terms = ["sql", "0.5*humor"]
    for index, weight in enumerate(weights):
        full = {
            name: tiny.normal(rng, stored[name].dtype, *stored[name].shape) for name in (tiny.NORM, f"{Q}.weight")
        }
        name = pushed.push(tiny.write_adapter(tmp_path / f"full{index}", {}, full=full), base="base").name
        terms.append(f"{'- ' if weight < 0 else ''}{abs(weight)!r}*{name}")
    expression = joined(terms)
    pushed.compose(expression, "mixed")
    once = pushed.merge("mixed", tmp_path / "once", verify="exact")
    assert once.weights_root == pushed.merge(expression, tmp_path / "again").weights_root
    pushed.compose("0.5*mixed", "halved")
    halved = pushed.merge("halved", tmp_path / "halved", verify="exact")
    assert halved.weights_root == pushed.merge("0.5*mixed", tmp_path / "halved-again").weights_root
    assert pushed.unmerge(tmp_path / "halved", tmp_path / "back").matches_base
