"""The elementwise methods against PEFT's and mergekit's own functions, run in float64 on the same random masks.

Both draw their masks with ``torch.bernoulli``; here it is given loreg's numbers, so that whole methods are compared
and not only what surrounds the chance. mergekit drops to float32 on a CPU while it sparsifies: its module is handed a
torch whose ``float32`` is ``float64``, and inputs are float32 values, which its ``.float()`` leaves as they are.

Where a library is wrong the test says so, and holds loreg to the formula in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from loreg.algebra.elementwise import METHODS, Deltas
from loreg.algebra.elementwise.masks import uniform
from loreg.format.methods import parameters

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


def test_mergekit_count_consensus() -> None:
    method = registry.get("ties")
    counting = GeneralizedTaskArithmeticMerge(
        consensus_method="count",
        **{field: getattr(method, field) for field in method.__dataclass_fields__ if field != "consensus_method"},
    )
    for deltas in every(3):
        expected = mergekit(counting, deltas, weight=list(deltas.weights), density=0.6)
        close(ours("ties:mergekit", deltas, density=0.6, consensus="count"), expected)


@pytest.mark.parametrize("select_topk", [0.07, 0.5, 1.0])
def test_mergekit_sce(select_topk: float) -> None:
    for deltas in every(1, 2, 3):
        weighted = Deltas(
            tuple(value * weight for value, weight in zip(deltas.values, deltas.weights, strict=True)),
            (1.0,) * len(deltas.values),
            deltas.keys,
        )
        close(ours("sce", deltas, select_topk=select_topk), mergekit("sce", weighted, select_topk=select_topk))


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
