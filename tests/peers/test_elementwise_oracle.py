"""The elementwise methods against PEFT's and mergekit's own functions, run in float64 on the same random masks.

Both draw their masks with ``torch.bernoulli``; here it is given loreg's numbers, so that whole methods are compared
and not only what surrounds the chance. mergekit drops to float32 on a CPU while it sparsifies: its module is handed a
torch whose ``float32`` is ``float64``, and inputs are float32 values, which its ``.float()`` leaves as they are.

Where a library is wrong the test says so, and holds loreg to the formula in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as of
from hypothesis import strategies as st
from torch import Tensor, nn

from loreg.algebra import LowRank, WeightedSum, apply
from loreg.algebra.elementwise import METHODS, Deltas
from loreg.algebra.elementwise.masks import uniform
from loreg.format.methods import parameters

peft = pytest.importorskip("peft")
merge_utils = pytest.importorskip("peft.utils.merge_utils")
sparsify = pytest.importorskip("mergekit.sparsify")
registry = pytest.importorskip("mergekit.merge_methods.registry")

from mergekit.merge_methods.base import TensorGroup  # noqa: E402
from mergekit.merge_methods.generalized_task_arithmetic import GeneralizedTaskArithmeticMerge  # noqa: E402
from mergekit.merge_methods.karcher import karcher_merge_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The density")

SHAPES = [(12, 17), (64,), (1, 5), (40, 3)]
WEIGHTS = {1: [(0.7,), (-1.0,)], 2: [(1.0, 1.0), (0.3, 0.9)], 3: [(0.7, -0.3, 1.1), (1.0, 1.0, 1.0)]}
DENSITIES = [0.07, 0.5, 0.83, 1.0]


class Torch:
    """torch, but for the precision that mergekit works in and the numbers that it draws."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, ...]], None]:
    """Called with keys: the next draws of both libraries are loreg's masks of these keys, in their order."""
    queue: Iterator[int] = iter(())

    def bernoulli(probability: Tensor) -> Tensor:
        assert probability.dtype == torch.float64
        numbers = uniform(next(queue), 0, probability.numel()).view(probability.shape)
        return (numbers < probability).to(probability.dtype)

    def start(keys: tuple[int, ...]) -> None:
        nonlocal queue
        queue = iter(keys)

    monkeypatch.setattr(Torch, "bernoulli", staticmethod(bernoulli), raising=False)
    monkeypatch.setattr(sparsify, "torch", Torch())
    monkeypatch.setattr(merge_utils, "torch", Torch())
    return start


def inputs(count: int, shape: tuple[int, ...], weights: tuple[float, ...], scale: float = 1.0) -> Deltas:
    random = torch.Generator().manual_seed(count + sum(shape))
    shared, *own = (torch.randn(*shape, generator=random) for _ in range(count + 1))
    values = tuple(((shared + each) * scale).float().double() for each in own)
    return Deltas(values, weights, tuple(range(40, 40 + count)))


def ours(name: str, deltas: Deltas, **given: Any) -> Tensor:
    return METHODS[name](deltas, parameters(name, given))


def mergekit(name: str, deltas: Deltas, base: bool = True, **given: Any) -> Tensor:
    """Of task vectors on a base of zeros."""
    tensors = [torch.zeros_like(deltas.values[0])] * base + list(deltas.values)
    method = name if not isinstance(name, str) else registry.get(name)
    group = TensorGroup.from_tensors(tensors, base_index=0 if base else None)
    result: Tensor = method((group,), parameters=given)[0]
    return result


def close(found: Tensor, expected: Tensor, rtol: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def every(*counts: int) -> Iterator[Deltas]:
    for count, shape in itertools.product(counts, SHAPES):
        for weights in WEIGHTS[count]:
            yield inputs(count, shape, weights)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("name", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_peft(name: str, sign: str, density: float, draw: Callable[[tuple[int, ...]], None]) -> None:
    """Weights as float64; PEFT itself first rounds them to float32 (tuners/lora/model.py, torch.tensor(weights))."""
    elects = {"majority_sign": sign} if name.endswith("ties") else {}
    given = {"majority_sign_method": sign} if elects else {}
    full = name if name == "magnitude_prune" else f"{name}:peft"
    for deltas in every(1, 2, 3):
        draw(deltas.keys)
        weights = torch.tensor(deltas.weights, dtype=torch.float64)
        expected = getattr(merge_utils, name)(list(deltas.values), weights, density, **given)
        close(ours(full, deltas, density=density, **elects), expected)


def test_peft_svd_is_task_arithmetic() -> None:
    for deltas in every(1, 2, 3):
        weights = torch.tensor(deltas.weights, dtype=torch.float64)
        close(ours("task_arithmetic", deltas), merge_utils.task_arithmetic(list(deltas.values), weights))


GENERALISED: list[tuple[str, dict[str, Any]]] = [
    ("task_arithmetic", {}),
    ("ties", {}),
    ("dare_linear", {}),
    ("dare_ties", {}),
    ("della", {"epsilon": 0.05}),
    ("della_linear", {"epsilon": 0.05}),
    ("breadcrumbs", {}),
    ("breadcrumbs", {"gamma": 0.2}),
    ("breadcrumbs_ties", {"gamma": 0.2}),
]


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"normalize": True, "rescale": False, "lambda": 1.0},
        {"normalize": False, "rescale": True, "lambda": 0.6},
    ],
    ids=["defaults", "normalize", "rescale"],
)
@pytest.mark.parametrize(("name", "more"), GENERALISED, ids=str)
def test_mergekit_generalised(
    name: str, more: dict[str, Any], flags: dict[str, Any], draw: Callable[[tuple[int, ...]], None]
) -> None:
    full = name if name in METHODS else f"{name}:mergekit"
    for density in DENSITIES if name != "task_arithmetic" else [1.0]:
        given = {**more, **flags} | ({} if name == "task_arithmetic" else {"density": density})
        known = {key: value for key, value in given.items() if name != "task_arithmetic" or key != "rescale"}
        for deltas in every(1, 2, 3):
            draw(deltas.keys)
            expected = mergekit(name, deltas, weight=list(deltas.weights), **given)
            close(ours(full, deltas, **known), expected)


def test_mergekit_defaults() -> None:
    """What loreg fills in is what mergekit fills in."""
    same_name = {"nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"}
    for name in METHODS:
        if name.endswith(":peft") or name in ("magnitude_prune", "slerp"):
            continue
        theirs = {
            same_name.get(p.name, p.name): p.default
            for p in registry.get(name.removesuffix(":mergekit")).spec.parameters
            if p.name not in ("weight", "int8_mask")
        }
        found = parameters(name, {})
        added = {"seed", "consensus"} | ({"rescale", "density"} if name == "task_arithmetic" else set())
        assert {key: found[key] for key in theirs if key not in added} == {
            key: value for key, value in theirs.items() if key not in added
        }
        assert set(found) - set(theirs) <= {"seed", "consensus"}


def counting(name: str) -> GeneralizedTaskArithmeticMerge:
    """mergekit's method, with the consensus that it has and offers by no name."""
    method = registry.get(name)
    fields = {field: getattr(method, field) for field in method.__dataclass_fields__ if field != "consensus_method"}
    return GeneralizedTaskArithmeticMerge(consensus_method="count", **fields)


def test_mergekit_count_consensus() -> None:
    for deltas in every(3):
        expected = mergekit(counting("ties"), deltas, weight=list(deltas.weights), density=0.6)
        close(ours("ties:mergekit", deltas, density=0.6, consensus="count"), expected)


@st.composite
def cancelling(draw: st.DrawFn) -> Deltas:
    """Deltas whose elements in one place differ by a sign or a factor of 2, so that with such weights many sums are
    zero, exactly; no two elements of one delta have the same magnitude, so that what is largest is no question."""
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    magnitudes = torch.randperm(42, generator=random).double() + 1
    weights = draw(st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0]), min_size=1, max_size=3))
    signs = [torch.randint(0, 2, (42,), generator=random) * 2 - 1 for _ in weights]
    values = tuple((magnitudes * sign * draw(st.sampled_from([1, 2]))).view(6, 7) for sign in signs)
    return Deltas(values, tuple(weights), tuple(range(40, 40 + len(weights))))


@pytest.mark.parametrize(("name", "more"), GENERALISED, ids=str)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@of(
    deltas=cancelling(),
    density=st.sampled_from([0.3, 0.7, 1.0]),
    scale=st.sampled_from([-3.0, -1.0, 0.3, 1.0, 2.5]),
    flags=st.tuples(st.booleans(), st.booleans()),
    by_count=st.booleans(),
)
def test_mergekit_generalised_where_signs_cancel(
    name: str,
    more: dict[str, Any],
    deltas: Deltas,
    density: float,
    scale: float,
    flags: tuple[bool, bool],
    by_count: bool,
    draw: Callable[[tuple[int, ...]], None],
) -> None:
    full = name if name in METHODS else f"{name}:mergekit"
    given = {**more, "density": density, "lambda": scale, "normalize": flags[0], "rescale": flags[1]}
    takes = parameters(full, {})
    known = {key: value for key, value in given.items() if key in takes}
    elects = "consensus" in takes
    draw(deltas.keys)
    method = counting(name) if elects and by_count else name
    expected = mergekit(method, deltas, weight=list(deltas.weights), **given)
    close(ours(full, deltas, **known, **({"consensus": "count"} if elects and by_count else {})), expected)


@pytest.mark.parametrize("name", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@of(
    deltas=cancelling(),
    density=st.sampled_from([0.3, 0.7, 1.0]),
    sign=st.sampled_from(["total", "frequency"]),
)
def test_peft_where_signs_cancel(
    name: str, deltas: Deltas, density: float, sign: str, draw: Callable[[tuple[int, ...]], None]
) -> None:
    elects = name.endswith("ties")
    draw(deltas.keys)
    weights = torch.tensor(deltas.weights, dtype=torch.float64)
    theirs = {"majority_sign_method": sign} if elects else {}
    expected = getattr(merge_utils, name)(list(deltas.values), weights, density, **theirs)
    full = name if name == "magnitude_prune" else f"{name}:peft"
    close(ours(full, deltas, density=density, **({"majority_sign": sign} if elects else {})), expected)


@pytest.mark.parametrize("select_topk", [0.07, 0.5, 1.0])
def test_mergekit_sce(select_topk: float) -> None:
    """mergekit's has no weights: ours are factors of the deltas, in what is selected too."""
    for deltas in every(1, 2, 3):
        weighted = Deltas(
            tuple(value * weight for value, weight in zip(deltas.values, deltas.weights, strict=True)),
            (1.0,) * len(deltas.values),
            deltas.keys,
        )
        close(ours("sce", deltas, select_topk=select_topk), mergekit("sce", weighted, select_topk=select_topk))


@settings(max_examples=30, deadline=None)
@of(deltas=cancelling())
def test_mergekit_sce_where_signs_cancel(deltas: Deltas) -> None:
    values = tuple(value * weight for value, weight in zip(deltas.values, deltas.weights, strict=True))
    close(ours("sce", deltas), mergekit("sce", Deltas(values, (1.0,) * len(values), deltas.keys)))


def test_mergekit_sce_of_a_delta_with_hardly_any_share() -> None:
    """Where only it has the elected sign, a sum of shares below 1e-6 divides as 1e-6."""
    loud, quiet = torch.ones(12, 17, dtype=torch.float64), torch.zeros(12, 17, dtype=torch.float64)
    loud[0, 0], quiet[0, 0] = 0, 1e-3
    deltas = Deltas((loud, quiet), (1.0, 1.0), (0, 1))
    close(ours("sce", deltas)[0, :1], mergekit("sce", deltas)[0, :1])
    assert 0 < float(ours("sce", deltas)[0, 0]) < 1e-5


def test_mergekit_slerp() -> None:
    for shape, (a, b) in itertools.product(SHAPES, [(1.0, 1.0), (0.3, 0.9), (1.25, -0.25)]):
        deltas = inputs(2, shape, (a, b))
        group = TensorGroup.from_tensors(list(deltas.values), base_index=0)
        (expected,) = registry.get("slerp")((group,), parameters={"t": b / (a + b)})
        close(ours("slerp", deltas), expected)
    first = inputs(1, (12, 17), (1.0,)).values[0]
    for other in (first * 3 + first.sign() * 1e-3, first * -2.0, torch.zeros_like(first)):  # linear, and a zero
        deltas = Deltas((first, other), (0.3, 0.9), (1, 2))
        group = TensorGroup.from_tensors(list(deltas.values), base_index=0)
        (expected,) = registry.get("slerp")((group,), parameters={"t": 0.9 / (0.3 + 0.9)})
        close(ours("slerp", deltas), expected)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
def test_mergekit_nuslerp(flatten: bool, row_wise: bool) -> None:
    for shape, weights in itertools.product(SHAPES, [(1.0, 1.0), (0.3, 0.9), (1.25, -0.25), (-0.5, -1.0), (1, -1)]):
        deltas = inputs(2, shape, weights)
        expected = mergekit(
            "nuslerp", deltas, weight=list(weights), nuslerp_flatten=flatten, nuslerp_row_wise=row_wise
        )
        # A vector of one or a few elements is nearly parallel to another, and mergekit loses digits in its angle.
        close(ours("nuslerp", deltas, flatten=flatten, row_wise=row_wise), expected, rtol=1e-12)


def test_mergekit_karcher() -> None:
    for deltas in every(1, 2, 3):
        if sum(deltas.weights) > 0:
            shares = [weight / sum(deltas.weights) for weight in deltas.weights]
            close(ours("karcher", deltas), karcher_merge_tensors(list(deltas.values), shares))
            equal = Deltas(deltas.values, (2.0,) * len(shares), deltas.keys)
            close(ours("karcher", equal), mergekit("karcher", deltas, base=False))
    deltas = inputs(3, (12, 17), (1.0, 1.0, 1.0))
    for given in ({"max_iter": 1}, {"tol": 0.3}, {"max_iter": 50, "tol": 1e-12}):
        close(ours("karcher", deltas, **given), mergekit("karcher", deltas, base=False, **given), rtol=1e-11)


@pytest.mark.parametrize("max_iter", [1, 2, 10])
def test_mergekit_karcher_of_a_delta_of_zeros(max_iter: int) -> None:
    """Stopped early, it is the shares among those that have a direction that say where."""
    one, other, third = inputs(3, (12, 17), (1.0, 1.0, 1.0)).values
    values, weights = (one, torch.zeros_like(one), other, third), (0.75, 2.0, 0.5, -0.25)
    deltas = Deltas(values, weights, (0, 1, 2, 3))
    expected = karcher_merge_tensors(list(values), [weight / 3.0 for weight in weights], max_iter=max_iter)
    close(ours("karcher", deltas, max_iter=max_iter), expected)


@pytest.mark.parametrize("filter_wise", [True, False])
def test_mergekit_model_stock(filter_wise: bool) -> None:
    for deltas in every(2, 3):
        weighted = Deltas(
            tuple(value * weight for value, weight in zip(deltas.values, deltas.weights, strict=True)),
            (1.0,) * len(deltas.values),
            deltas.keys,
        )
        expected = mergekit("model_stock", weighted, filter_wise=filter_wise)
        close(ours("model_stock", deltas, filter_wise=filter_wise), expected, rtol=1e-10)


# Where mergekit is not what its paper says, in the sizes that adapters have


def test_mergekit_sce_ignores_energies_of_small_deltas() -> None:
    """sce.py: ``abs(weight_sum) < 1e-6`` gives equal shares; elements of 3e-4 have a mean square of 1e-7."""
    deltas = inputs(3, (12, 17), (1.0, 1.0, 1.0), scale=2e-4)
    deltas = Deltas((deltas.values[0], deltas.values[1] * 0.25, deltas.values[2] * 0.5), deltas.weights, deltas.keys)
    stack = torch.stack(deltas.values)
    agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)
    equal = (stack * agree).sum(0) / agree.sum(0)
    close(mergekit("sce", deltas), equal)
    energy = stack.square().sum((1, 2))
    shares = (energy / energy.sum()).view(3, 1, 1) * agree
    truth = (stack * shares).sum(0) / shares.sum(0)
    close(ours("sce", deltas), truth)
    assert float((truth - equal).norm() / truth.norm()) > 0.1


def test_mergekit_model_stock_sees_right_angles_between_small_rows() -> None:
    """model_stock.py: the product of two norms is at least 1e-6, so cosines of short rows come out near zero."""
    deltas = inputs(2, (12, 17), (1.0, 1.0), scale=1e-4)
    same = Deltas((deltas.values[0], deltas.values[0]), deltas.weights, deltas.keys)
    assert float((mergekit("model_stock", same, filter_wise=True) / same.values[0]).max()) < 0.7
    close(ours("model_stock", same, filter_wise=True), same.values[0])
    large = Deltas(tuple(value * 2**16 for value in deltas.values), deltas.weights, deltas.keys)
    close(ours("model_stock", deltas, filter_wise=True), mergekit("model_stock", large, filter_wise=True) / 2**16)


def test_mergekit_nuslerp_explodes_on_opposite_deltas() -> None:
    """nuslerp.py: rounding leaves 1 - cos² above its 1e-16, and sin θ near zero divides."""
    ratios = []
    for seed in range(8):
        value = torch.randn(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        opposite = Deltas((value, value * -3), (1.0, 1.0), (0, 1))
        ratios.append(float((mergekit("nuslerp", opposite, weight=[1.0, 1.0]) / value).abs().max()))
        close(ours("nuslerp", opposite), -value)
    assert max(ratios) > 1e6


def test_mergekit_weights_that_cancel_divide_by_their_rounding() -> None:
    """generalized_task_arithmetic.py guards a divisor of a consensus only against an exact zero."""
    value = inputs(1, (12, 17), (1.0,)).values[0]
    deltas = Deltas((value, 2 * value, -3 * value), (0.1, 0.2, -0.3), (0, 1, 2))
    theirs = mergekit("breadcrumbs_ties", deltas, weight=[0.1, 0.2, -0.3], normalize=True)
    assert float((theirs / value).abs().max()) > 1e15
    close(ours("breadcrumbs_ties", deltas, normalize=True), value * (0.1 + 0.4 + 0.9))


def test_mergekit_normalize_cancels_a_single_weight() -> None:
    """Not a defect of arithmetic, but nobody expects it of -1·Δ; loreg gives the same, and says so."""
    deltas = inputs(1, (12, 17), (-1.0,))
    close(mergekit("ties", deltas, weight=[-1.0]), deltas.values[0])
    close(ours("ties:mergekit", deltas), deltas.values[0])
    close(ours("ties:mergekit", deltas, normalize=False), -deltas.values[0])


# Where PEFT's combinations of several adapters are not what they are named after


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(14, 20, bias=False)


@cache
def adapted() -> Any:
    """A layer with three adapters of rank 4: of alpha 8, of alpha 32, and of alpha 8 by rsLoRA."""
    random = torch.Generator().manual_seed(7)
    model = peft.get_peft_model(_Layer(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"]), "sql")
    model.add_adapter("humor", peft.LoraConfig(r=4, lora_alpha=32, target_modules=["proj"]))
    model.add_adapter("code", peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"], use_rslora=True))
    for parameter in (p for name, p in model.named_parameters() if "lora_" in name):
        parameter.data.normal_(generator=random)
    return model.base_model


def combined_by_peft(names: Sequence[str], weights: Sequence[float], kind: str, **options: Any) -> Tensor:
    model = adapted()
    model.add_weighted_adapter(list(names), list(weights), "merged", kind, **options)
    try:
        found: Tensor = model.model.proj.get_delta_weight("merged").detach().double()
        return found
    finally:
        model.delete_adapter("merged")


def trained(names: Sequence[str], weights: Sequence[float]) -> list[LowRank]:
    layer = adapted().model.proj
    factors = [(layer.lora_B[n].weight.detach(), layer.lora_A[n].weight.detach(), layer.scaling[n]) for n in names]
    return [LowRank(b, a, scale).scaled(w) for (b, a, scale), w in zip(factors, weights, strict=True)]


def off(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


MIXES = [
    (("sql", "humor"), (1.0, 1.0)),  # of two alphas
    (("sql", "humor"), (1.0, -1.0)),
    (("sql", "code"), (0.7, -0.4)),  # rsLoRA among others
    (("code", "sql"), (1.0, 0.5)),  # and first, where PEFT's result is rsLoRA too
    (("sql", "humor", "code"), (-0.5, -1.0, 2.0)),
]


@pytest.mark.parametrize(("names", "weights"), MIXES, ids=str)
def test_peft_linear_is_not_the_weighted_sum(names: tuple[str, ...], weights: tuple[float, ...]) -> None:
    """PEFT #3004: of A and B that are summed by themselves, every B meets every A. The sum is in float64."""
    layer = adapted().model.proj
    parts = [layer.scaling[n] * (layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double()) for n in names]
    truth = torch.stack([part.detach() * w for part, w in zip(parts, weights, strict=True)]).sum(0)
    assert off(combined_by_peft(names, weights, "linear"), truth) > 0.5
    merged = apply(torch.zeros(20, 14, dtype=torch.float32), WeightedSum(tuple(trained(names, weights))))
    assert off(merged.double(), truth) < 2.0**-24
    alone = Deltas(tuple(part.detach() for part in parts), weights, tuple(range(len(names))))
    assert off(ours("task_arithmetic", alone), truth) < 1e-15


@pytest.mark.parametrize("kind", ["magnitude_prune", "ties"])
@pytest.mark.parametrize(("names", "weights"), MIXES, ids=str)
def test_peft_prunes_factors(names: tuple[str, ...], weights: tuple[float, ...], kind: str) -> None:
    """Without ``_svd`` in their names these prune A and B, which says little of ΔW. Ours are the same on ΔW."""
    values = tuple(term.dense() for term in trained(names, (1.0,) * len(names)))
    truth = getattr(merge_utils, kind)(list(values), torch.tensor(weights, dtype=torch.float64), 0.5)
    assert off(combined_by_peft(names, weights, kind, density=0.5), truth) > 0.5
    full = kind if kind in METHODS else f"{kind}:peft"
    assert off(ours(full, Deltas(values, weights, tuple(range(len(names)))), density=0.5), truth) < 1e-14


def test_the_sign_of_a_lone_adapter_is_right_in_both() -> None:
    """What PEFT #3004 also reports, that -1 gave the same as 1, this PEFT has mended."""
    truth = -trained(["sql"], [1.0])[0].dense()
    assert off(combined_by_peft(["sql"], [-1.0], "linear"), truth) < 1e-6
    assert off(trained(["sql"], [-1.0])[0].dense(), truth) == 0
