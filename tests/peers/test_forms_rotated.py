"""Forms that rotate: OFT and BOFT, against what the layers of PEFT and LyCORIS compute, against numbers of PEFT's
older releases, and against NumPy in the stated order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from form_layers import as_matrix, difference, edited, fill, inputs, layer, same, with_weight, wrapped
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from peft import BOFTConfig, OFTConfig
from peft.tuners.boft import layer as boft_layer
from torch import Tensor, nn

from loreg.algebra.forms import Term, orthogonal
from loreg.algebra.forms.orthogonal import boft, oft
from loreg.algebra.rounding import round_to
from loreg.errors import BadInput

PEFT = {"side": "in", "factor": 0.5, "series": None, "block_limit": None, "total_limit": None}
BUTTERFLY = {"side": "in", "factor": 0.5, "total_limit": None, "order": "halves"}
FLOAT32 = 3e-7  # PEFT computes COFT's limit in float32

pytestmark = pytest.mark.usefixtures("seeded")


def _series(n: int) -> list[float]:
    """What PEFT 0.18 and later add up for n terms."""
    return {1: [1.0], 2: [1.0, 2.0], 3: [1.0, 2.0, 2.0, 1.0]}.get(n) or [1.0, *[2.0] * (max(n, 4) - 2), 1.0]


# PEFT's OFT


@pytest.mark.parametrize(
    ("kind", "terms", "shared"),
    [*(("linear", terms, False) for terms in (1, 2, 3, 4, 6, 8))]
    + [
        (kind, terms, shared)
        for kind in ("linear", "conv2d_1x1", "embedding")
        for terms in (None, 5)
        for shared in (0, 1)
    ],
)
def test_oft_of_peft(kind: str, terms: int | None, shared: bool) -> None:
    base = layer(kind)
    size = {"oft_block_size": 2} if kind == "embedding" else {"oft_block_size": 0, "r": 2}
    neumann = {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}
    config = OFTConfig(target_modules=["0"], block_share=bool(shared), **size, **neumann)
    oracle = wrapped(base, config)
    fill(oracle, "oft_", spread=0.3)
    R = (oracle.oft_embedding_R if kind == "embedding" else oracle.oft_R)["default"].weight
    parameters = PEFT | {"series": None if terms is None else _series(terms)}
    if kind == "embedding":
        parameters |= {"side": "out", "factor": -0.5}
    W, x = edited(as_matrix(base), "oft", {"R": R}, parameters), inputs(base)
    assert same(with_weight(base, W)(x), oracle(x))
    assert terms == 1 or not same(base(x), oracle(x), 1e-3)
    oracle.merge()
    assert same(W, as_matrix(oracle.get_base_layer()))


@pytest.mark.parametrize("shared", [False, True], ids=["blocks", "shared"])
@pytest.mark.parametrize("eps", [0.1, 100.0])
def test_constrained_oft_of_peft(eps: float, shared: bool) -> None:
    base = layer("linear")
    config = OFTConfig(target_modules=["0"], coft=True, eps=eps, oft_block_size=3, block_share=shared)
    config.use_cayley_neumann = False
    oracle = wrapped(base, config)
    fill(oracle, "oft_", spread=0.5)
    R, x = oracle.oft_R["default"].weight.detach().clone(), inputs(base)
    parameters = PEFT | {"block_limit": eps / len(R) ** 0.5}
    W = edited(as_matrix(base), "oft", {"R": R}, parameters)
    assert same(with_weight(base, W)(x), oracle(x), FLOAT32)
    free = edited(as_matrix(base), "oft", {"R": R}, PEFT)
    assert same(W, free) is (eps == 100)


def test_oft_of_peft_on_a_kernel_is_no_edit_of_the_weight() -> None:
    base = layer("conv2d")
    oracle = wrapped(base, OFTConfig(target_modules=["0"], oft_block_size=6))
    x = inputs(base)
    assert not oracle.oft_R["default"].weight.any()
    assert difference(oracle(x), base(x)) > 0.5  # overlapping patches are added up, each of the input itself
    fill(oracle, "oft_", spread=0.3)
    computed = oracle(x)
    oracle.merge()
    assert difference(computed, oracle(x)) > 0.5


# Numbers that PEFT 0.13.2, 0.15.2 and 0.17.1 computed, in their own forward, for a Linear of these weights


def _grid(*shape: int, k: int) -> Tensor:
    i = torch.arange(int(np.prod(shape)))
    return ((i**2 * 3 + i * k) % 17 - 8).double().reshape(shape) / 32


# fmt: off
_OLD: dict[str, tuple[int, dict[str, Tensor], dict[str, Any], dict[tuple[int, int], float]]] = {
    "0.13.2, r=2": (
        5, {"R": _grid(2, 3, 3, k=5)}, PEFT | {"side": "out", "factor": -0.5},
        {(0, 0): -0.266954302382, (1, 5): -0.272788040836, (2, 3): 0.029867525523, (3, 1): 0.151828180737,
         (3, 4): 0.161860879905, (4, 0): -0.23832491082, (4, 5): -0.159230083234},
    ),
    "0.13.2, r=2, coft, eps=0.01": (
        5, {"R": _grid(2, 3, 3, k=5)},
        PEFT | {"side": "out", "factor": -0.5, "block_limit": 0.01 * 3**2 / 2**0.5},
        {(0, 0): -0.252268335909, (1, 5): -0.253027522045, (2, 3): 0.058315253756, (3, 1): 0.18401467535,
         (3, 4): 0.130298997267, (4, 0): -0.221415211286, (4, 5): -0.184715413367},
    ),
    "0.13.2, r=2, block_share": (
        5, {"R": _grid(1, 3, 3, k=5)}, PEFT | {"side": "out", "factor": -0.5},
        {(0, 0): -0.266954302382, (2, 3): 0.029867525523, (3, 1): 0.185995989305, (4, 5): -0.18722654351},
    ),
    "0.15.2, oft_block_size=3": (
        4, {"R": _grid(2, 3, 3, k=5), "s": _grid(4, 1, k=5)}, PEFT,
        {(0, 0): 0.066465119105, (0, 5): -0.043757431629, (1, 3): 0, (2, 1): -0.006184104582, (2, 4): 0.020880555143},
    ),
    "0.15.2, oft_block_size=3, coft, eps=0.05": (
        4, {"R": _grid(2, 3, 3, k=5), "s": _grid(4, 1, k=5)}, PEFT | {"block_limit": 0.05 * 2**2 / 2**0.5},
        {(0, 0): 0.063730795242, (0, 5): -0.034935777765, (2, 1): -0.005942702355, (2, 4): 0.018430010156},
    ),
    "0.17.1, oft_block_size=3, coft, eps=0.2, block_share": (
        4, {"R": _grid(1, 3, k=5)}, PEFT | {"block_limit": 0.2},
        {(0, 0): -0.271442508801, (1, 4): -0.193122089112, (2, 5): -0.229729482999, (3, 3): -0.177162446291},
    ),
    "0.17.1, oft_block_size=3, 4 Neumann terms": (
        4, {"R": _grid(2, 3, k=5)}, PEFT | {"series": [1, 2, 2, 2]},
        {(0, 0): -0.151916503906, (1, 4): -0.189834594727, (2, 5): -0.094043731689, (3, 3): -0.233337402344},
    ),
}
# fmt: on


@pytest.mark.parametrize("case", _OLD)
def test_oft_of_older_peft(case: str) -> None:
    out, tensors, parameters, expected = _OLD[case]
    W = edited(_grid(out, 6, k=1), "oft", tensors, parameters)
    within = FLOAT32 if parameters["block_limit"] else 1e-12
    assert {place: float(W[place]) for place in expected} == pytest.approx(expected, rel=0, abs=within)


# PEFT's BOFT


class _BlockDiagonal:
    """What PEFT's CUDA extension does, which it needs for more than one factor."""

    @staticmethod
    def forward(x: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*blocks) for blocks in x])]


def _wide(kind: str) -> nn.Module:
    base: nn.Module = {
        "linear": lambda: nn.Linear(16, 6),
        "conv2d": lambda: nn.Conv2d(4, 6, 2),
        "linear_odd": lambda: nn.Linear(15, 6),
    }[kind]()
    base.double().requires_grad_(False)
    fill(base)
    return base


@pytest.mark.parametrize(
    ("kind", "size", "factors"),
    [("linear", 4, 1), ("linear", 4, 2), ("linear", 2, 4), ("conv2d", 4, 3), ("conv2d", 2, 2), ("linear_odd", 3, 1)],
)
def test_boft_of_peft(kind: str, size: int, factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", (lambda: _BlockDiagonal) if factors > 1 else lambda: None)
    base = _wide(kind)
    config = BOFTConfig(target_modules=["0"], boft_block_size=size, boft_n_butterfly_factor=factors)
    oracle = wrapped(base, config)
    fill(oracle, "boft_R", spread=0.5)
    fill(oracle, "boft_s", spread=0.3, about=1.0)
    tensors = {"R": oracle.boft_R["default"], "s": oracle.boft_s["default"]}
    assert len(tensors["R"]) == factors
    W = edited(as_matrix(base), "boft", tensors, BUTTERFLY)
    x = torch.randn(3, 4, 5, 5).double() if kind == "conv2d" else torch.randn(3, base.in_features).double()
    assert same(with_weight(base, W)(x), oracle(x))
    assert not same(base(x), oracle(x), 1e-3)
    oracle.merge()
    assert same(W, as_matrix(oracle.get_base_layer()))


# LyCORIS


@pytest.mark.parametrize("constraint", [0, 0.05, 100.0])
@pytest.mark.parametrize("rescaled", [False, True], ids=["", "rescaled"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv2d_groups"])
@pytest.mark.parametrize("form", ["oft", "boft"])
def test_rotations_of_lycoris(
    form: str, kind: str, rescaled: bool, constraint: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # it inverts in float32
    base = layer(kind)
    algorithm = {"oft": DiagOFTModule, "boft": ButterflyOFTModule}[form]
    oracle = algorithm("x", base, lora_dim=4, constraint=constraint, rescaled=rescaled).double()
    fill(oracle, "oft_blocks", spread=0.5)
    fill(oracle, "rescale", spread=0.3, about=1.0)
    tensors = {"R": oracle.oft_blocks} | ({"s": oracle.rescale} if rescaled else {})
    parameters: dict[str, Any] = {"side": "out", "factor": {"oft": 1, "boft": -1}[form]}
    parameters["total_limit"] = oracle.constraint if constraint else None
    parameters |= {"oft": {"series": None, "block_limit": None}, "boft": {"order": "alternating"}}[form]
    W, x = edited(as_matrix(base), form, tensors, parameters), inputs(base)
    assert oracle.oft_blocks.shape == {"oft": (4, 2, 2), "boft": (2, 2, 4, 4)}[form]
    assert same(with_weight(base, W)(x), oracle(x), 1e-12)
    assert not same(base(x), oracle(x), 1e-3)
    assert same(W, oracle.get_merged_weight(shape=base.weight.shape)[0].flatten(1), 1e-12)
    free = edited(as_matrix(base), form, tensors, parameters | {"total_limit": None})
    assert same(W, free) is (constraint != 0.05)


# Laws


def _term(form: str, side: str, W: Tensor, **changes: Any) -> Term:
    n = W.shape[0 if side == "out" else 1]
    if form == "oft":
        R, parameters = torch.randn(n // 8, 28) * 0.3, PEFT | {"block_limit": 2.0}
    else:
        R, parameters = torch.randn(3, n // 8, 8, 8) * 0.3, BUTTERFLY | {"total_limit": 30.0}
    s = 1 + 0.2 * torch.randn(W.shape[0])
    return Term({"R": R, "s": s}, parameters | {"side": side} | changes, 1.0, tuple(W.shape), lambda: W)


_FORMS = {"oft": oft, "boft": boft}


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("form", _FORMS)
def test_identity_and_rounding(form: str, side: str) -> None:
    W = torch.randn(32, 64).bfloat16()
    term = _term(form, side, W)
    edit = _FORMS[form](term)
    W_edited = edit.dense[0].value
    assert torch.equal(edit.apply(W), round_to(W_edited, torch.bfloat16))
    still = Term({"R": torch.zeros_like(term.tensors["R"])}, term.parameters, 1.0, term.shape, term.base)
    back = _FORMS[form](still)
    assert torch.equal(back.dense[0].value, W.double())
    assert torch.equal(back.scaled(0.7).apply(W).view(torch.int16), W.view(torch.int16))
    lengths = (W_edited / term.tensors["s"].double()[:, None], W.double())
    after, before = (x.square().sum(0 if side == "out" else 1) for x in lengths)
    assert same(after, before, 1e-13)


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(("form", "series"), [("oft", None), ("oft", [1.0, 2.0, 2.0, 1.0]), ("boft", None)])
def test_bits_do_not_depend_on_threads_or_blocks(
    form: str, series: list[float] | None, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    W, found, threads = torch.randn(256, 512), [], torch.get_num_threads()
    term = _term(form, side, W, **({"series": series} if form == "oft" else {}))
    try:
        for count, block in ((1, 2**20), (2, 2**20), (2, 5000)):
            torch.set_num_threads(count)
            monkeypatch.setattr(orthogonal, "_BLOCK_ELEMENTS", block)
            monkeypatch.setattr(orthogonal, "_ELIMINATION_ELEMENTS", block)
            found.append(_FORMS[form](term).dense[0].value)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def _inverse(a: Any) -> Any:
    """Gauss-Jordan elimination in place, one matrix, element by element."""
    a = a.copy()
    n = len(a)
    for k in range(n):
        row = a[k] / a[k, k]
        row[k] = 1 / a[k, k]
        for i in (i for i in range(n) if i != k):
            factor = a[i, k]
            a[i, k] = 0
            for j in range(n):
                a[i, j] = a[i, j] - factor * row[j]
        a[k] = row
    return a


def test_cayley_is_as_stated() -> None:
    R = torch.randn(3, 9, 9)
    S = orthogonal._skew(R.double(), 0.5, None, None)
    Q = orthogonal._cayley(S.clone())
    for s, q in zip(S, Q, strict=True):
        expected = 2 * _inverse(np.eye(9) + s.numpy()) - np.eye(9)
        assert q.numpy().tobytes() == expected.tobytes()
        assert same(q, torch.linalg.solve(torch.eye(9).double() + s, torch.eye(9).double() - s, left=False))


@pytest.mark.parametrize("spread", [1e-8, 1.0, 100.0])
def test_elimination_without_pivoting_is_safe(spread: float) -> None:
    S = orthogonal._skew(spread * torch.randn(4, 40, 40).double(), 0.5, None, None)
    Q = orthogonal._cayley(S)
    assert float((Q @ Q.mT - torch.eye(40)).abs().max()) < 1e-15 * max(100, 40 * spread**2)


# Bad input


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 4, 4), (1, 9, 9), (2, 5), (9, 1)])
def test_rotations_that_do_not_fit(shape: tuple[int, ...]) -> None:
    term = Term({"R": torch.zeros(shape)}, PEFT, 1.0, (4, 8), lambda: torch.ones(4, 8))
    if shape == (2, 4, 4):
        assert oft(term).shape == (4, 8)
    else:
        with pytest.raises(BadInput, match=r"do not cover|upper triangle"):
            oft(term)


@pytest.mark.parametrize(
    ("shape", "order"),
    [((1, 3, 2, 2), "halves"), ((3, 4, 2, 2), "halves"), ((1, 1, 9, 9), "alternating"), ((4, 4, 2, 2), "halves")],
)
def test_stages_that_do_not_fit(shape: tuple[int, ...], order: str) -> None:
    n = 9 if shape[2] == 9 else 8
    term = Term({"R": torch.zeros(shape)}, BUTTERFLY | {"order": order}, 1.0, (4, n), lambda: torch.ones(4, n))
    if shape == (3, 4, 2, 2):
        assert boft(term).shape == (4, n)
    else:
        with pytest.raises(BadInput, match="do not fit"):
            boft(term)
