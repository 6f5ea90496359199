"""Forms that read the weight but do not rotate it: (IA)³, token rows and DoRA, against what the layers of PEFT and
LyCORIS compute, and against NumPy in the stated order."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from form_layers import as_matrix, difference, edited, fill, inputs, layer, same, with_weight, wrapped
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import IA3Config, LoraConfig, TrainableTokensConfig, get_peft_model
from torch import nn

from loreg.algebra import densify
from loreg.algebra.delta import Dense, LowRank
from loreg.algebra.densify import dense_delta
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms import Term, decomposed, scaled
from loreg.algebra.forms.decomposed import decompose
from loreg.algebra.roots import square_root
from loreg.algebra.rounding import round_to
from loreg.errors import BadInput, Unsupported, UsageError

LORA = {"groups": 1}

pytestmark = pytest.mark.usefixtures("seeded")


# (IA)³


@pytest.mark.parametrize("feedforward", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv2d", "conv2d_groups", "conv3d"])
def test_ia3_of_peft(kind: str, feedforward: bool) -> None:
    base, names = layer(kind), ["0"] if feedforward else []
    config = IA3Config(target_modules=["0"], feedforward_modules=names, fan_in_fan_out=kind == "Conv1D")
    oracle = wrapped(base, config)
    fill(oracle, "ia3_l", spread=0.5, about=1.0)
    tensors, x = {"l": oracle.ia3_l["default"]}, inputs(base)
    parameters: dict[str, Any] = {"on": "in" if feedforward else "out"}
    if feedforward and kind == "conv2d_groups":
        parameters["groups"] = 2
    W = edited(as_matrix(base), "ia3", tensors, parameters)
    bias = base.bias if feedforward else edited(base.bias, "ia3", tensors, parameters)
    ours = with_weight(base, W, bias)
    assert same(ours(x), oracle(x))
    assert not same(base(x), oracle(x))
    oracle.merge()
    assert same(W, as_matrix(oracle.get_base_layer()))
    assert same(bias, oracle.get_base_layer().bias)


@pytest.mark.parametrize("on_input", [False, True], ids=["out", "in"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_ia3_of_lycoris(kind: str, on_input: bool) -> None:
    base = layer(kind)
    oracle = IA3Module("x", base, train_on_input=on_input).double()
    fill(oracle, spread=0.5)
    x, y = inputs(base), base(inputs(base))
    W = edited(as_matrix(base), "ia3", {"l": oracle.weight}, {"on": "in" if on_input else "out", "neutral": 0})
    assert not same(y, with_weight(base, W)(inputs(base)))
    assert same(with_weight(base, W)(x), oracle(x))
    assert same(W, oracle.get_merged_weight()[0].flatten(1))
    oracle.bypass_mode = True  # what no merge is: with the output, it scales the bias
    assert same(with_weight(base, W)(x), oracle(x)) is on_input


def test_ia3_is_exact() -> None:
    W, l = torch.randn(5, 7), torch.randn(5)  # noqa: E741
    term = Term({"l": l}, {"on": "out"}, 1.0, (5, 7), lambda: W)
    assert torch.equal(scaled.ia3(term).apply(W), l[:, None] * W)
    one = Term({"l": torch.ones(5)}, {"on": "out"}, 1.0, (5, 7), lambda: W)
    assert torch.equal(scaled.ia3(one).scaled(0.3).apply(W).view(torch.int32), W.view(torch.int32))


# Token rows


@pytest.mark.parametrize("limit", [0, 64], ids=["dense", "low rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_peft(dtype: torch.dtype, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "_LOW_RANK_COLUMNS", limit)
    base, indices = nn.Embedding(9, 4, padding_idx=0), [7, 2, 5]
    base.weight.data[1] = torch.tensor([-0.0, 0.0, 1e-30, -1e30])
    base.to(dtype)
    oracle = wrapped(base, TrainableTokensConfig(target_modules=["0"], token_indices=indices)).to(dtype)
    delta = nn.Parameter(torch.randn(3, 4))  # float32 beside a bfloat16 base, as trained under autocast
    oracle.trainable_tokens_delta["default"] = delta
    W = base.weight.data.T
    term = Term({"rows": delta.detach()}, {"indices": indices}, 1.0, (4, 9), lambda: W)
    merged = scaled.rows(term).apply(W)
    assert torch.equal(merged.T, oracle(torch.arange(9)))
    kept = [0, 1, 3, 4, 6, 8]
    assert torch.equal(merged[:, kept].signbit(), W[:, kept].signbit())
    oracle.merge()
    assert torch.equal(merged.T, oracle.get_base_layer().weight)


# DoRA


@pytest.mark.parametrize("kind", ["linear", "Conv1D", "conv1d", "conv2d", "conv2d_1x1", "conv3d", "embedding"])
def test_dora_of_peft(kind: str) -> None:
    base = layer(kind)
    config = LoraConfig(
        target_modules=["0"], r=3, lora_alpha=5, use_dora=True, fan_in_fan_out=kind == "Conv1D", bias="none"
    )
    oracle = wrapped(base, config)
    fill(oracle, "lora_")
    if kind == "embedding":
        A, B = oracle.lora_embedding_A["default"], oracle.lora_embedding_B["default"]
    else:
        A, B = oracle.lora_A["default"].weight, oracle.lora_B["default"].weight
    tensors = {"A": A, "B": B, "magnitude": oracle.lora_magnitude_vector["default"].weight}
    W = edited(as_matrix(base), "lora", tensors, LORA | {"axis": "out", "epsilon": 0}, oracle.scaling["default"])
    x = inputs(base)
    assert same(with_weight(base, W)(x), oracle(x))
    assert not same(base(x), oracle(x))
    oracle.merge()
    assert same(W, as_matrix(oracle.get_base_layer()))


def test_two_doras_of_peft_are_no_sum() -> None:
    base = layer("linear")
    config = LoraConfig(target_modules=["0"], r=3, lora_alpha=3, use_dora=True)
    model = get_peft_model(nn.Sequential(deepcopy(base)), config).double()
    model.add_adapter("other", config)
    oracle = model.double().base_model.model[0]
    fill(oracle, "lora_")
    W, x, in_turn, added = as_matrix(base), inputs(base), as_matrix(base), as_matrix(base)
    for name in ("default", "other"):
        A, B = oracle.lora_A[name].weight.data, oracle.lora_B[name].weight.data
        m = oracle.lora_magnitude_vector[name].weight.data
        in_turn = (m / (W + B @ A).norm(dim=1))[:, None] * (in_turn + B @ A)
        added = added + dense_delta(decompose(WeightedSum((LowRank(B, A),)), W, m, "out", 0.0))
    model.base_model.set_adapter(["default", "other"])
    assert same(with_weight(base, in_turn)(x), oracle(x))
    assert difference(with_weight(base, added)(x), oracle(x)) > 0.1


_ROLES = {
    LoConModule: ("lora", {"A": "lora_down.weight", "B": "lora_up.weight"}, LORA),
    LohaModule: ("loha", {f"w{part}": f"hada_w{part}" for part in ("1_a", "1_b", "2_a", "2_b")}, {}),
    LokrModule: ("lokr", {"w1": "lokr_w1", "w2_a": "lokr_w2_a", "w2_b": "lokr_w2_b"}, {"align": "leading"}),
}


@pytest.mark.parametrize("on_out", [True, False], ids=["out", "in"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
@pytest.mark.parametrize("algorithm", _ROLES)
def test_dora_of_lycoris(algorithm: Any, kind: str, on_out: bool) -> None:
    base, (form, roles, parameters) = layer(kind), _ROLES[algorithm]
    oracle = algorithm("x", base, lora_dim=1, alpha=0.5, weight_decompose=True, wd_on_out=on_out, factor=2).double()
    fill(oracle)
    held = oracle.custom_state_dict()
    tensors = {role: held[name] for role, name in roles.items()} | {"magnitude": held["dora_scale"]}
    parameters = parameters | {"axis": "out" if on_out else "in", "epsilon": torch.finfo(torch.float64).eps}
    W, x = edited(as_matrix(base), form, tensors, parameters, oracle.scale), inputs(base)
    assert same(with_weight(base, W)(x), oracle(x))
    assert not same(base(x), oracle(x))
    # LyCORIS' merge of LoHa and LoKr multiplies by α/r twice
    assert same(W, oracle.get_merged_weight(shape=base.weight.shape)[0].flatten(1)) is (algorithm is LoConModule)


def test_lycoris_precise_merge_drops_dora() -> None:
    base = layer("linear")
    oracle = LoConModule("x", base, lora_dim=2, alpha=2, weight_decompose=True).double()
    fill(oracle)
    W, x = as_matrix(base).clone(), inputs(base)
    D = oracle.lora_up.weight @ oracle.lora_down.weight
    truth = with_weight(base, decompose(_low_rank(oracle), W, oracle.dora_scale.data, "out", 0.0).dense[0].value)
    assert same(truth(x), oracle(x))
    oracle.merge_to(precise=True)
    assert same(base.weight, W + D)
    assert difference(base(x), truth(x)) > 0.1


def _low_rank(module: Any) -> WeightedSum:
    return WeightedSum((LowRank(module.lora_up.weight.data, module.lora_down.weight.data),))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_identity_and_rounding(axis: str) -> None:
    W = torch.randn(40, 24).bfloat16()
    nothing = WeightedSum(dense=(Dense(torch.zeros(40, 24)),))
    norms = _dora(W.double().numpy(), axis, 24)[1]
    for m, edit in ((norms, nothing), (norms, WeightedSum())):
        back = decompose(edit, W, torch.from_numpy(m), axis, 0.0)
        assert torch.equal(back.dense[0].value, W.double())
        assert torch.equal(back.scaled(0.7).apply(W).view(torch.int16), W.view(torch.int16))
    m = torch.from_numpy(norms).float()
    close = decompose(nothing, W, m, axis, 0.0)
    assert same(close.dense[0].value, W.double(), 2.0**-23)
    edit = WeightedSum((LowRank(torch.randn(40, 3), torch.randn(3, 24), 0.3),))
    result = decompose(edit, W, m, axis, 1e-7)
    assert torch.equal(result.apply(W), round_to(result.dense[0].value, torch.bfloat16))
    assert not torch.equal(result.apply(W), W)


# The stated order, against NumPy


def _total(x: Any) -> Any:
    """Each row's folded sum."""
    while x.shape[1] > 1:
        half = (x.shape[1] + 1) // 2
        folded = x[:, :half].copy()
        folded[:, : x.shape[1] - half] += x[:, half:]
        x = folded
    return x[:, 0]


def _dora(V: Any, axis: str, n: int, m: Any = None, epsilon: float = 0.0) -> tuple[Any, Any]:
    """V with norms of m, if there are any, and the norms of V itself."""
    groups = V[:, None] if axis == "out" else V.reshape(len(V), n, -1).swapaxes(0, 1)
    norm = np.sqrt(_total((groups * groups).reshape(len(groups), -1)))
    if m is None:
        return V, norm
    result = (m / (norm + epsilon))[:, None, None] * groups
    return (result[:, 0] if axis == "out" else result.swapaxes(0, 1).reshape(V.shape)), norm


def _sum(edit: WeightedSum) -> Any:
    """The sum of an edit, one operation at a time."""
    out = np.zeros(edit.shape or ())
    for term in edit.low_rank:
        left, right = term.scale * term.left.double().numpy(), term.right.double().numpy()
        product = np.zeros_like(out)
        for k in range(left.shape[-1]):
            product += left[..., k : k + 1] * right[..., k : k + 1, :]
        out += product
    for dense in edit.dense:
        out += dense.scale * dense.value.double().numpy()
    return out


def test_square_roots_are_correctly_rounded() -> None:
    numbers = [*(torch.rand(5000).double() * 10.0 ** torch.randint(-300, 300, (5000,))).tolist(), 0.0, math.inf]
    assert square_root(torch.tensor(numbers, dtype=torch.float64)).tolist() == list(map(math.sqrt, numbers))


def _edit(rows: int, columns: int) -> WeightedSum:
    ranks = [LowRank(torch.randn(rows, r).bfloat16(), torch.randn(r, columns), s) for r, s in ((5, 0.1), (2, -3.7))]
    return WeightedSum(tuple(ranks), (Dense(torch.randn(rows, columns), 1 / 3), Dense(torch.randn(rows, columns))))


def test_dense_delta_is_the_stated_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, vector = _edit(33, 21), WeightedSum(dense=(Dense(torch.randn(9), 0.1), Dense(torch.randn(9))))
    stack = WeightedSum((LowRank(torch.randn(3, 8, 2), torch.randn(3, 2, 5), 0.3),))
    for block in (1, 100, 2**20):
        monkeypatch.setattr(densify, "_BLOCK_ELEMENTS", block)
        for edit in (matrix, vector, stack):
            assert dense_delta(edit).numpy().tobytes() == _sum(edit).tobytes()
    with pytest.raises(UsageError, match="no shape"):
        dense_delta(WeightedSum())


@pytest.mark.parametrize(("axis", "n"), [("out", 200), ("in", 301), ("in", 43)])
def test_decompose_is_as_stated(axis: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, edit, m = torch.randn(200, 301), _edit(200, 301), torch.randn(n)
    expected, _ = _dora(W.double().numpy() + _sum(edit), axis, n, m.double().numpy(), 1e-3)
    found = []
    threads = torch.get_num_threads()
    try:
        for count, block in ((1, 2**20), (2, 2**20), (2, 1000)):
            torch.set_num_threads(count)
            monkeypatch.setattr(decomposed, "_BLOCK_ELEMENTS", block)
            found.append(decompose(edit, W, m, axis, 1e-3).dense[0].value)
    finally:
        torch.set_num_threads(threads)
    assert [value.numpy().tobytes() for value in found] == [expected.tobytes()] * 3


def test_decompose_of_a_transposed_weight() -> None:
    W, edit, m = torch.randn(21, 33), _edit(33, 21), torch.randn(33)
    straight = decompose(edit, W.T.contiguous(), m, "out", 0.0)
    assert torch.equal(decompose(edit, W.T, m, "out", 0.0).dense[0].value, straight.dense[0].value)


# Bad input


def _ia3(shape: tuple[int, ...], n: int, **parameters: Any) -> Term:
    return Term({"l": torch.ones(n)}, parameters, 1.0, shape, lambda: torch.ones(shape))


@pytest.mark.parametrize(
    "term",
    [_ia3((4, 6), 6, on="out"), _ia3((4, 6), 4, on="in"), _ia3((4, 6), 6, on="in", groups=4), _ia3((4,), 4, on="in")],
)
def test_ia3_that_does_not_fit(term: Term) -> None:
    with pytest.raises(BadInput, match="does not fit"):
        scaled.ia3(term)


@pytest.mark.parametrize(("indices", "count"), [([1, 1], 2), ([1], 2), ([6], 1), ([-1], 1)])
def test_rows_that_do_not_fit(indices: list[int], count: int) -> None:
    term = Term({"rows": torch.ones(count, 4)}, {"indices": indices}, 1.0, (4, 6), lambda: torch.ones(4, 6))
    with pytest.raises(BadInput, match=r"do not fit|not below 6"):
        scaled.rows(term)


@pytest.mark.parametrize(("axis", "n"), [("out", 6), ("in", 4), ("in", 0)])
def test_magnitudes_that_do_not_fit(axis: str, n: int) -> None:
    with pytest.raises(BadInput, match="does not fit"):
        decompose(WeightedSum(), torch.ones(4, 6), torch.ones(n), axis, 0.0)


def test_no_direction() -> None:
    W = torch.ones(4, 6)
    W[2] = 0
    with pytest.raises(BadInput, match="group 2 along 'out'"):
        decompose(WeightedSum(), W, torch.ones(4), "out", 0.0)
    assert not decompose(WeightedSum(), W, torch.ones(4), "out", 1e-7).dense[0].value[2].any()
    with pytest.raises(Unsupported, match="matrices"):
        decompose(WeightedSum(), torch.ones(2, 4, 6), torch.ones(4), "out", 0.0)
