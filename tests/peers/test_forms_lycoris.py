"""LoHa, LoKr and LoCon against the layers of PEFT and LyCORIS, one by one, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
from form_sums import A, agree, check, dense, edit, edited, inputs, out_in, randomised
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoHaConfig, LoKrConfig
from peft.tuners import loha, lokr
from torch import Tensor, nn
from torch.nn.functional import conv2d

from loreg.algebra.edits import WeightedSum

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("seeded")]


# LoHa and LoKr of PEFT

LYCORIS_BASES: Mapping[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(12, 30),
    "conv1d": lambda: nn.Conv1d(24, 30, 3, stride=2, dilation=2, groups=2),
    "conv2d": lambda: nn.Conv2d(12, 30, (2, 3), padding=1, dilation=2),
    "conv2d-grouped": lambda: nn.Conv2d(24, 30, 3, stride=2, groups=2),
    "conv2d-1x1": lambda: nn.Conv2d(12, 30, 1),
    "conv1d-1": lambda: nn.Conv1d(12, 30, 1),
}


def peft_kind(module: ModuleType, base: nn.Module) -> type[nn.Module]:
    return getattr(module.layer, type(base).__name__)


def tensors_of(layer: nn.Module, prefix: str) -> dict[str, Tensor]:
    """The adapter's tensors by role: the names of PEFT and LyCORIS without their prefix."""
    found: dict[str, Tensor] = {}
    for name, parameter in layer.named_parameters():
        role = name.split(".")[0].removeprefix(prefix)
        if name.startswith(prefix):
            found[role] = parameter
    return found


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("kind", LYCORIS_BASES)
def test_peft_loha(kind: str, effective: bool) -> None:
    base = LYCORIS_BASES[kind]()
    config = LoHaConfig(use_effective_conv2d=effective)
    layer = randomised(peft_kind(loha, base)(base, A, config=config, r=2, alpha=3.0))
    tensors = tensors_of(layer, "hada_")
    assert ("t1" in tensors) == (effective and kind in ("conv1d", "conv2d", "conv2d-grouped"))
    check(base, layer, edit("loha", tensors, 1.5, out_in(base.weight)))


LOKR = {
    "w2-in-two": {"r": 2},
    "both-in-two": {"r": 2, "decompose_both": True},
    "whole": {"r": 20},
    "w1-in-two": {"r": 2, "decompose_both": True, "decompose_factor": 10},
}


@pytest.mark.parametrize("effective", [False, True])
@pytest.mark.parametrize("case", LOKR)
@pytest.mark.parametrize("kind", LYCORIS_BASES)
def test_peft_lokr(kind: str, case: str, effective: bool) -> None:
    base = LYCORIS_BASES[kind]()
    config = LoKrConfig(use_effective_conv2d=effective, **{k: v for k, v in LOKR[case].items() if k != "r"})
    r = LOKR[case]["r"]
    layer = randomised(peft_kind(lokr, base)(base, A, config=config, r=r, alpha=3.0))
    tensors = tensors_of(layer, "lokr_")
    # PEFT's Conv1d with a whole w2 is another product than LyCORIS', but it is what the layer computes.
    align = "trailing" if "w2" in tensors and tensors["w2"].ndim == 3 else "leading"
    check(base, layer, edit("lokr", tensors, 3 / r, out_in(base.weight), align=align))
    if align == "trailing":
        other = dense(edit("lokr", tensors, 3 / r, out_in(base.weight), align="leading"))
        assert not torch.allclose(other.reshape(base.weight.shape), layer.get_delta_weight(A))


# LyCORIS


def lycoris(kind: type[LycorisBaseModule], base: nn.Module, r: int, **options: Any) -> LycorisBaseModule:
    return randomised(kind("name", base, 1.0, r, 3.0, **options))


def check_lycoris(base: nn.Module, module: LycorisBaseModule, found: WeightedSum, twice: float | None = None) -> None:
    """As ``check``; ``twice``: the scale that the module's merge has once too often."""
    delta = dense(found).reshape(base.weight.shape)
    x = inputs(base)
    computed = module(x)
    assert not torch.allclose(computed, base(x))
    agree(edited(base, delta, x), computed)
    W = base.weight.detach().clone()
    module.merge_to()
    agree(base.weight, W + delta * (1.0 if twice is None else twice))


def stored(module: LycorisBaseModule, r: int, scale: float) -> dict[str, Tensor]:
    """What the module saves, by role, without α: which says the scale, to the precision of float32."""
    state = {name.removesuffix(".weight"): value for name, value in module.state_dict().items()}
    assert float(state.pop("alpha")) / r == pytest.approx(scale, rel=2**-23)
    return {name.removeprefix("hada_").removeprefix("lokr_").removeprefix("lora_"): x for name, x in state.items()}


OPTIONS: Mapping[str, dict[str, bool]] = {
    "plain": {},
    "rs": {"rs_lora": True},
    "tucker": {"use_tucker": True},
    "scalar": {"use_scalar": True},
}
LYCORIS_3D: Mapping[str, Callable[[], nn.Module]] = {
    **LYCORIS_BASES,
    "conv3d": lambda: nn.Conv3d(12, 30, (1, 2, 3), padding=1),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", LYCORIS_3D)
def test_lycoris_locon(kind: str, option: str) -> None:
    base = randomised(LYCORIS_3D[kind]())
    module = lycoris(LoConModule, base, 2, **OPTIONS[option])
    scale = 3 / math.sqrt(2) if option == "rs" else 1.5
    tensors = stored(module, 2, scale)
    assert ("mid" in tensors) == (option == "tucker" and kind in ("conv1d", "conv2d", "conv2d-grouped", "conv3d"))
    if "mid" in tensors:
        found = edit("locon", tensors, scale, out_in(base.weight))
    else:
        found = edit("lora", {"A": tensors["down"], "B": tensors["up"]}, scale, out_in(base.weight), groups=1)
    check_lycoris(base, module, found)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", LYCORIS_3D)
def test_lycoris_loha_computes_what_it_does_not_merge(kind: str, option: str) -> None:
    """LyCORIS 4.1.3 applies the scale twice when it merges, and no scalar."""
    base = randomised(LYCORIS_3D[kind]())
    module = lycoris(LohaModule, base, 2, **OPTIONS[option])
    scale = 3 / math.sqrt(2) if option == "rs" else 1.5
    found = edit("loha", stored(module, 2, scale), scale, out_in(base.weight))
    check_lycoris(base, module, found, scale / float(module.scalar))


LYCORIS_LOKR: Mapping[str, dict[str, Any]] = {
    **OPTIONS,
    "both": {"decompose_both": True},
    "both-tucker": {"decompose_both": True, "use_tucker": True},
    "factor": {"factor": 2},
    "full": {"full_matrix": True},
    "full-rs": {"full_matrix": True, "rs_lora": True},
    "unbalanced": {"unbalanced_factorization": True},
}


@pytest.mark.parametrize("option", LYCORIS_LOKR)
@pytest.mark.parametrize("kind", LYCORIS_3D)
def test_lycoris_lokr_computes_what_it_does_not_merge(kind: str, option: str) -> None:
    base = randomised(LYCORIS_3D[kind]())
    module = lycoris(LokrModule, base, 2, **LYCORIS_LOKR[option])
    whole = module.use_w1 and module.use_w2
    # Whole, α counts for nothing: 1, though one that was trained with rs_lora has √r, which its file cannot tell.
    scale = (1.0 if whole else 1.5) * (math.sqrt(2) if module.rs_lora else 1)
    found = edit("lokr", stored(module, 2, scale), scale, out_in(base.weight), align="leading")
    check_lycoris(base, module, found, scale / float(module.scalar))


def test_lycoris_full() -> None:
    base = randomised(nn.Conv2d(4, 6, 3))
    x, W, b = inputs(base), base.weight.detach().clone(), base.bias.detach().clone()
    module = FullModule("name", base)
    module.apply_to()
    with torch.no_grad():
        module.weight.add_(torch.randn(W.shape))
        module.bias.add_(torch.randn(b.shape))
    computed = module(x)
    state = module.state_dict()
    delta = dense(edit("dense", {"value": state["diff"]}, 1.0, (6, 36))).reshape(W.shape)
    bias = dense(edit("dense", {"value": state["diff_b"]}, 1.0, (6, 1)))[:, 0]
    agree(conv2d(x, W + delta, b + bias), computed)
