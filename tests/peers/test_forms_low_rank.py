"""LoRA and its relatives against the layers of PEFT and loralib, one by one, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loralib
import pytest
import torch
from form_sums import DOUBLE, A, agree, check, dense, edit, edited, inputs, out_in, randomised
from peft import AdaLoraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from peft.tuners import adalora, lora, vera
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from transformers.pytorch_utils import Conv1D

from loreg.errors import Unsupported

CONV: Mapping[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("seeded")]


# PEFT: LoRA


def peft_lora(base: nn.Module, kind: type[nn.Module], r: int = 4, alpha: float = 6, **config: Any) -> nn.Module:
    given = LoraConfig(r=r, lora_alpha=alpha, **config)
    extra = {"is_target_conv_1d_layer": True} if isinstance(base, Conv1D) else {}
    extra |= {"target_name": "target"} if config.get("use_bdlora") else {}
    return randomised(kind(base, A, config=given, r=r, lora_alpha=alpha, **extra))


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_linear(rslora: bool) -> None:
    base = nn.Linear(7, 5)
    layer = peft_lora(base, lora.Linear, use_rslora=rslora)
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    check(base, layer, edit("lora", factors, 6 / math.sqrt(4) if rslora else 6 / 4, (5, 7), groups=1))


def test_peft_conv1d_of_transformers_stores_the_transpose() -> None:
    base = Conv1D(6, 6)  # nf, nx: square, so that only the values can tell
    layer = peft_lora(base, lora.Linear, fan_in_fan_out=True)
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    check(base, layer, edit("lora", factors, 1.5, (6, 6), groups=1), transposed=True)


def test_peft_embedding() -> None:
    base = nn.Embedding(11, 6)
    layer = peft_lora(base, lora.Embedding)
    factors = {"A": layer.lora_embedding_A[A], "B": layer.lora_embedding_B[A]}
    check(base, layer, edit("lora", factors, 1.5, (6, 11), groups=1), transposed=True)


@pytest.mark.parametrize("where", ["A", "B"])
def test_peft_block_diagonal_lora(where: str) -> None:
    blocks = {f"target_modules_bd_{where.lower()}": ["target"]}
    base = nn.Linear(12, 9 if where == "A" else 8)
    layer = peft_lora(base, lora.Linear, use_bdlora=BdLoraConfig(nblocks=2, **blocks))
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    groups = {"groups": 2} if where == "B" else {"groups": 1, "groups_in": 2}
    check(base, layer, edit("lora", factors, 1.5, out_in(base.weight), **groups), merge=False)
    W = base.weight.detach().clone()
    layer.merge()
    agree(base.weight - W, dense(edit("lora", factors, 1.5, out_in(base.weight), **groups)))


GEOMETRY = {
    "plain": {"kernel_size": 3},
    "stride-padding": {"kernel_size": 3, "stride": 2, "padding": 1},
    "same": {"kernel_size": 3, "padding": "same"},
    "1x1": {"kernel_size": 1},
    "1x1-dilated": {"kernel_size": 1, "dilation": 2},
}


@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize("dims", CONV)
def test_peft_convolution(dims: int, geometry: str) -> None:
    base = CONV[dims](4, 6, **GEOMETRY[geometry])
    layer = peft_lora(base, {1: lora.layer.Conv1d, 2: lora.Conv2d, 3: lora.layer.Conv3d}[dims])
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    # PEFT takes a 1x1x1 kernel for one of two dimensions, and cannot merge it.
    merge = (dims, base.kernel_size[0]) != (3, 1)
    check(base, layer, edit("lora", factors, 1.5, out_in(base.weight), groups=1), merge)
    if not merge:
        with pytest.raises(RuntimeError):
            layer.merge()


def test_peft_convolution_with_an_oblong_kernel() -> None:
    base = nn.Conv2d(4, 6, (1, 3), stride=(2, 1), padding=(0, 1))
    layer = peft_lora(base, lora.Conv2d)
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    check(base, layer, edit("lora", factors, 1.5, (6, 12), groups=1))


@pytest.mark.parametrize("what", [{"dilation": 2}, {"padding_mode": "reflect"}], ids=str)
def test_peft_merges_wrongly_where_its_convolution_has_another_geometry(what: dict[str, Any]) -> None:
    """PEFT's A is a convolution without dilation or padding mode: no weight of the layer computes that."""
    base = nn.Conv2d(4, 6, 3, padding="same", **what)
    layer = peft_lora(base, lora.Conv2d)
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    delta = dense(edit("lora", factors, 1.5, (6, 36), groups=1)).reshape(base.weight.shape)
    x = inputs(base)
    computed = layer(x)
    agree(base(x) + conv2d(x, delta, padding="same"), computed)
    layer.merge()
    assert (layer(x) - computed).abs().max() > 0.1


@pytest.mark.parametrize("groups", [2, 4])
def test_peft_grouped_convolution_is_a_full_one_and_refused(groups: int) -> None:
    base = nn.Conv2d(8, 12, 3, padding=1, groups=groups)
    layer = peft_lora(base, lora.Conv2d)
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    x = inputs(base)
    full = dense(edit("lora", factors, 1.5, (12, 8 * 9), groups=groups)).reshape(12, 8, 3, 3)
    agree(base(x) + conv2d(x, full, padding=1), layer(x))
    with pytest.raises(RuntimeError):  # PEFT has no delta for it
        layer.get_delta_weight(A)
    with pytest.raises(NotImplementedError):
        layer.merge()
    with pytest.raises(Unsupported, match=f"A sees all 72 inputs of a convolution of {groups} groups"):
        edit("lora", factors, 1.5, out_in(base.weight), groups=groups)


def test_two_grouped_convolutions_are_a_grouped_lora() -> None:
    base, down = nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(8, 4, 3, groups=2, bias=False)
    up = nn.Conv2d(4, 12, 1, groups=2, bias=False)
    base, down, up = map(randomised, (base, down, up))
    found = edit("lora", {"A": down.weight, "B": up.weight}, 1.5, (12, 36), groups=2)
    x = inputs(base)
    agree(edited(base, dense(found).reshape(base.weight.shape), x), base(x) + 1.5 * up(down(x)))


class Experts(nn.Module):
    """A stack of three matrices, of which all are applied. ``is_transposed``: stored (E, in, out), as PEFT asks."""

    def __init__(self, is_transposed: bool, out: int = 6, into: int = 5) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.weight = nn.Parameter(torch.zeros(3, into, out) if is_transposed else torch.zeros(3, out, into))

    def forward(self, x: Tensor) -> Tensor:
        W = self.weight if self.is_transposed else self.weight.mT
        return torch.einsum("bi,eio->beo", x, W)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_peft_experts(is_transposed: bool) -> None:
    base = Experts(is_transposed)
    layer = randomised(
        lora.layer.ParamWrapper(base, A, parameter_name="weight", config=LoraConfig(), r=2, lora_alpha=3)
    )
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    stack = dense(edit("lora_experts", factors, 1.5, (6, 5), experts=3))
    each = [dense(edit("lora_expert", factors, 1.5, (6, 5), experts=3, expert=e, rows=None)) for e in range(3)]
    part = dense(edit("lora_expert", factors, 1.5, (4, 5), experts=3, expert=1, rows=[2, 6]))
    agree(torch.stack(each), stack)
    agree(part, stack[1, 2:])
    delta = stack.mT if is_transposed else stack
    x = torch.randn(4, 5, dtype=DOUBLE)
    computed = layer(x)
    agree(edited(base, delta, x), computed)
    agree(layer.get_delta_weight(A), delta)
    layer.merge()
    agree(layer(x), computed)


def test_block_diagonal_experts_are_those_that_they_were_fused_of() -> None:
    """A gate and an up projection of each expert, fused into one stack: B is block-diagonal then."""
    gates, ups = ([randomised(peft_lora(nn.Linear(5, 3), lora.Linear, r=2)) for _ in range(3)] for _ in range(2))
    base = Experts(False)
    layer = randomised(
        lora.layer.ParamWrapper(base, A, parameter_name="weight", config=LoraConfig(), r=4, lora_alpha=12)
    )
    with torch.no_grad():
        base.weight.copy_(torch.stack([torch.cat([g.weight, u.weight]) for g, u in zip(gates, ups, strict=True)]))
        pairs = list(zip(gates, ups, strict=True))
        As = [torch.cat([layer.lora_A[A].weight for layer in pair]) for pair in pairs]
        Bs = [torch.block_diag(*(layer.lora_B[A].weight for layer in pair)) for pair in pairs]
        layer.lora_A[A].weight.copy_(torch.cat(As))
        layer.lora_B[A].weight.copy_(torch.stack(Bs, dim=2).flatten(1))
    factors = {"A": layer.lora_A[A].weight, "B": layer.lora_B[A].weight}
    x = torch.randn(4, 5, dtype=DOUBLE)
    computed = layer(x)
    for parts, rows in ((gates, [0, 3]), (ups, [3, 6])):
        for e, part in enumerate(parts):
            found = dense(edit("lora_expert", factors, 3.0, (3, 5), experts=3, expert=e, rows=rows))
            agree(found, part.get_delta_weight(A))
            agree(linear(x, part.weight + found), computed[:, e, rows[0] : rows[1]])


# PEFT: AdaLoRA and VeRA


def test_peft_adalora() -> None:
    base = nn.Linear(7, 5)
    layer = randomised(adalora.SVDLinear(base, A, config=AdaLoraConfig(total_step=1), r=3, lora_alpha=8))
    with torch.no_grad():
        layer.ranknum[A].fill_(3)
    tensors = {"A": layer.lora_A[A], "B": layer.lora_B[A], "E": layer.lora_E[A]}
    check(base, layer, edit("adalora", tensors, 8 / (3 + 1e-5), (5, 7)))


def test_peft_adalora_keeps_the_scale_of_the_rank_before_pruning(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(7, 5))

    trained = get_peft_model(model(), AdaLoraConfig(total_step=1, init_r=4, target_r=2, target_modules=["0"]))
    randomised(trained)
    trained.peft_config[A].rank_pattern = {f"0.lora_E.{A}": [True, False, True, False]}
    trained.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {key.rsplit("lora_")[-1]: tensor for key, tensor in tensors.items() if "lora_" in key}
    assert tensors["A"].shape == (2, 7)
    layer = PeftModel.from_pretrained(model().double(), tmp_path).double().base_model.model[0]
    found = edit("adalora", tensors, 8 / (4 + 1e-5), (5, 7))
    torch.testing.assert_close(layer.get_delta_weight(A), dense(found), rtol=1e-6, atol=0)


def test_peft_adalora_of_a_convolution() -> None:
    base = nn.Conv2d(4, 5, 3, stride=2, padding=2, dilation=2)
    layer = randomised(adalora.layer.SVDConv2d(base, A, config=AdaLoraConfig(total_step=1), r=3, lora_alpha=-1))
    with torch.no_grad():
        layer.ranknum[A].fill_(3)
    tensors = {"A": layer.lora_A[A], "B": layer.lora_B[A], "E": layer.lora_E[A]}
    check(base, layer, edit("adalora", tensors, 3 / (3 + 1e-5), (5, 36)))


@pytest.mark.parametrize("transposed", [False, True])
def test_peft_vera(transposed: bool) -> None:
    base = Conv1D(5, 7) if transposed else nn.Linear(7, 5)
    shared = BufferDict({A: torch.randn(3, 9)}), BufferDict({A: torch.randn(8, 3)})  # of a larger module
    config = VeraConfig(r=3, fan_in_fan_out=transposed)
    layer = randomised(vera.Linear(base, *shared, A, config=config, r=3))
    tensors = {
        "A": shared[0][A],
        "B": shared[1][A],
        "lambda_d": layer.vera_lambda_d[A],
        "lambda_b": layer.vera_lambda_b[A],
    }
    check(base, layer, edit("vera", tensors, 1.0, (5, 7)), transposed=transposed)


# loralib


def loralib_layer(layer: nn.Module) -> nn.Module:
    """As ``randomised``, and unmerged: here ``eval`` merges, and returns nothing."""
    return randomised(layer, train=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_loralib_linear(transposed: bool) -> None:
    layer = loralib_layer(loralib.Linear(7, 5, r=3, lora_alpha=4, fan_in_fan_out=transposed))
    delta = dense(edit("lora", {"A": layer.lora_A, "B": layer.lora_B}, 4 / 3, (5, 7), groups=1))
    W = (layer.weight.T if transposed else layer.weight).detach().clone()
    x = torch.randn(3, 7, dtype=DOUBLE)
    agree(linear(x, W + delta, layer.bias), layer(x))
    layer.eval()
    agree(layer.weight.T if transposed else layer.weight, W + delta)


def test_loralib_embedding() -> None:
    layer = loralib_layer(loralib.Embedding(11, 6, r=3, lora_alpha=4))
    delta = dense(edit("lora", {"A": layer.lora_A, "B": layer.lora_B}, 4 / 3, (6, 11), groups=1))
    W = layer.weight.detach().clone()
    agree(layer(torch.arange(11)), W + delta.T)
    layer.eval()
    agree(layer.weight, W + delta.T)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("enable", [[True, False, True], [True], [False, True], [True, True, True]], ids=str)
def test_loralib_merged_linear(enable: list[bool], transposed: bool) -> None:
    layer = loralib_layer(
        loralib.MergedLinear(7, 12, r=2, lora_alpha=3, enable_lora=enable, fan_in_fan_out=transposed)
    )
    delta = dense(edit("lora_merged", {"A": layer.lora_A, "B": layer.lora_B}, 1.5, (12, 7), enable=enable))
    untouched = delta.reshape(len(enable), -1).eq(0).all(dim=1)
    assert untouched.tolist() == [not enabled for enabled in enable]
    W = (layer.weight.T if transposed else layer.weight).detach().clone()
    x = torch.randn(3, 7, dtype=DOUBLE)
    agree(linear(x, W + delta, layer.bias), layer(x))
    layer.eval()
    agree(layer.weight.T if transposed else layer.weight, W + delta)


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("kernel", [1, 2, 3])
def test_loralib_convolution(kernel: int, groups: int) -> None:
    layer = loralib_layer(loralib.Conv2d(6, 12, kernel, r=1, lora_alpha=3, groups=groups, stride=2, padding=1))
    base = layer.conv
    found = edit("lora_reshaped", {"A": layer.lora_A, "B": layer.lora_B}, 3.0, out_in(base.weight))
    delta = dense(found).reshape(base.weight.shape)
    W = base.weight.detach().clone()
    x = inputs(base)
    agree(edited(base, delta, x), layer(x))
    layer.eval()
    agree(base.weight, W + delta)


@pytest.mark.parametrize("kind", [loralib.Conv1d, loralib.Conv3d])
def test_loralib_has_no_other_convolutions(kind: type[nn.Module]) -> None:
    layer = loralib_layer(kind(4, 6, 3, r=2))
    with pytest.raises(RuntimeError, match="shape"):
        layer(inputs(layer.conv))
