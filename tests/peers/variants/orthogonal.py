"""OFT and BOFT by PEFT, and the formats of its older releases."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from peft import BOFTConfig, OFTConfig
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file, save_file
from torch import nn

from tests.peers.variants import Built, Case
from tests.peers.variants.hadamard import network_adapter
from tests.peers.variants.models import llama, peft_adapter

_LINEAR = ["q_proj", "k_proj", "down_proj"]


def _layers() -> nn.Module:
    """What OFT rotates the inputs of: linear layers with biases, and a convolution of one element."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 1), nn.Flatten(2), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 5)).eval()


def _kernels() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 2), nn.Conv2d(6, 8, 2, padding=1)).eval()


class _BlockDiagonal:
    """What PEFT's CUDA extension does, which it needs for a BOFT of more than one factor."""

    @staticmethod
    def forward(x: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*blocks) for blocks in x])]


def _butterflies(build: Callable[[Path], Built]) -> Callable[[Path], Built]:
    def extended(*arguments: Any, run: Callable[..., Any]) -> Any:
        with patch.object(boft_layer, "get_fbd_cuda", lambda: _BlockDiagonal):
            return run(*arguments)

    def whole(folder: Path) -> Built:
        built = extended(folder, run=build)
        reload = built.reload
        assert reload is not None
        return Built(
            built.base, built.adapter, built.expected, built.run, reload=lambda out: extended(out, run=reload)
        )

    return whole


def _rewritten(
    build: Callable[[Path], Built],
    tensor: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]] = lambda key, value: (key, value),
    config: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
    more: Callable[[dict[str, torch.Tensor]], None] = lambda tensors: None,
) -> Callable[[Path], Built]:
    """The same adapter in another format, that of an older release, which PEFT does not load any more."""

    def rewritten(folder: Path) -> Built:
        built = build(folder)
        weights, settings = built.adapter / "adapter_model.safetensors", built.adapter / "adapter_config.json"
        tensors = dict(tensor(key, value) for key, value in load_file(weights).items())
        more(tensors)
        save_file(tensors, weights, {"format": "pt"})
        found = json.loads(settings.read_text()) | dict(config or {})
        settings.write_text(json.dumps({key: value for key, value in found.items() if key not in without}))
        return Built(built.base, built.adapter, built.expected, built.run)

    return rewritten


def _as_oft_of_0_15(key: str, value: torch.Tensor) -> tuple[str, torch.Tensor]:
    """OFT of 0.14 and 0.15 computed what BOFT of one factor does."""
    return key.replace("boft_R", "oft_r").replace("boft_s", "oft_s"), value.squeeze(0) if "boft_R" in key else value


def _turned(make: Callable[[], Any], side: float) -> Callable[[Path], Built]:
    """OFT of 0.13, whose outputs are those of the base times (I - S)·(I + S)⁻¹, in blocks of 16, bias apart."""

    @torch.no_grad()
    def build(folder: Path) -> Built:
        built = peft_adapter(make, OFTConfig(target_modules=_LINEAR, oft_block_size=16))(folder)
        from tests.peers.variants.models import logits

        model, tensors = make(), {}
        generator = torch.Generator().manual_seed(5)
        for name, layer in model.named_modules():
            if name.rpartition(".")[2] in _LINEAR:
                R = side * torch.randn(-(-layer.out_features // 16), 16, 16, generator=generator)
                tensors[f"base_model.model.{name}.oft_r"] = R
                S = 0.5 * (R - R.mT).double()
                Q = torch.block_diag(*((torch.eye(16) - S) @ torch.linalg.inv(torch.eye(16) + S)))
                Q = Q[: layer.out_features, : layer.out_features].float()
                layer.register_forward_hook(lambda layer, inputs, output, Q=Q: output @ Q)
        save_file(tensors, built.adapter / "adapter_model.safetensors", {"format": "pt"})
        kept = {"r": 2, "coft": False, "eps": 6e-5, "block_share": False, "peft_type": "OFT", "rank_pattern": {}}
        (built.adapter / "adapter_config.json").write_text(json.dumps(kept))
        return Built(built.base, built.adapter, logits(model), built.run)

    return build


def _oft(**options: Any) -> OFTConfig:
    return OFTConfig(**{"target_modules": _LINEAR, "oft_block_size": 8, "use_cayley_neumann": False} | options)


def _permutations(tensors: dict[str, torch.Tensor]) -> None:
    for key in [key for key in tensors if key.endswith("boft_R")]:
        n = tensors[key].shape[1] * tensors[key].shape[2]
        tensors[key.replace("boft_R", "boft_P")] = torch.eye(n)[None]


_OLD_NOTE = "PEFT 0.21 does not load it; as the release that wrote it computed"
_BOFT_FIELDS = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "peft_version")
_OLD_FIELDS = {"peft_type": "OFT", "oft_block_size": 8, "r": 0, "coft": False, "eps": 6e-5, "block_share": False}

CASES = [
    Case("OFT: 5 terms of Neumann's series", "PEFT", peft_adapter(llama, _oft(use_cayley_neumann=True))),
    Case(
        "OFT: 2 terms, one block for all",
        "PEFT",
        peft_adapter(llama, _oft(use_cayley_neumann=True, num_cayley_neumann_terms=2, block_share=True)),
    ),
    Case("OFT: Cayley's formula, r blocks", "PEFT", peft_adapter(llama, _oft(oft_block_size=0, r=4))),
    Case("OFT: constrained (coft)", "PEFT", peft_adapter(llama, _oft(coft=True, eps=0.3))),
    Case(
        "OFT: embedding",
        "PEFT",
        peft_adapter(llama, _oft(target_modules=["embed_tokens", "q_proj"], use_cayley_neumann=True)),
    ),
    Case(
        "OFT: tied embedding",
        "PEFT",
        peft_adapter(lambda: llama(tied=True), _oft(target_modules=["embed_tokens"])),
        note="PEFT rotates the embedding alone, which the merge unties",
    ),
    Case(
        "OFT: layers with biases, trained, and a 1×1 convolution",
        "PEFT",
        network_adapter(_oft(target_modules=["0", "2", "4"], oft_block_size=4, bias="oft_only"), _layers),
    ),
    Case(
        "OFT: convolution",
        "PEFT",
        network_adapter(_oft(target_modules=["0"]), _kernels),
        refused="convolution with a kernel of \\[2, 2\\].*adds them up where they overlap",
        note="PEFT's merge makes a model that computes something else than the adapter",
    ),
    Case(
        "OFT of PEFT 0.17: 2 terms",
        "PEFT",
        _rewritten(
            peft_adapter(llama, _oft(use_cayley_neumann=True, num_cayley_neumann_terms=2)), without=("peft_version",)
        ),
    ),
    Case(
        "OFT of PEFT 0.14 and 0.15",
        "PEFT",
        _rewritten(
            peft_adapter(llama, BOFTConfig(target_modules=_LINEAR, boft_block_size=8)),
            _as_oft_of_0_15,
            _OLD_FIELDS,
            _BOFT_FIELDS,
        ),
        note=_OLD_NOTE + ": as BOFT of one factor",
    ),
    Case(
        "OFT of PEFT 0.14 and 0.15: convolutions",
        "PEFT",
        _rewritten(
            network_adapter(BOFTConfig(target_modules=["0", "1"], boft_block_size=2), _kernels),
            _as_oft_of_0_15,
            _OLD_FIELDS,
            _BOFT_FIELDS,
        ),
        note=_OLD_NOTE,
    ),
    Case("OFT of PEFT 0.13", "PEFT", _turned(llama, 0.1), note=_OLD_NOTE),
    Case("BOFT: one factor", "PEFT", peft_adapter(llama, BOFTConfig(target_modules=_LINEAR, boft_block_size=8))),
    Case(
        "BOFT: three factors",
        "PEFT",
        _butterflies(
            peft_adapter(llama, BOFTConfig(target_modules=_LINEAR, boft_block_size=4, boft_n_butterfly_factor=3))
        ),
        note="PEFT needs its CUDA extension for more than one factor",
    ),
    Case(
        "BOFT: convolutions and a layer with a trained bias",
        "PEFT",
        _butterflies(
            network_adapter(
                BOFTConfig(
                    target_modules=["0", "1"],
                    boft_block_num=2,
                    boft_block_size=0,
                    boft_n_butterfly_factor=2,
                    bias="all",
                ),
                _kernels,
            )
        ),
    ),
    Case(
        "BOFT of PEFT 0.11",
        "PEFT",
        _rewritten(peft_adapter(llama, BOFTConfig(target_modules=_LINEAR, boft_block_size=8)), more=_permutations),
        note="which saved the permutations too",
    ),
]
