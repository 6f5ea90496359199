"""LyCORIS' algorithms on linear layers and convolutions, and kohya's names.

The truth is what a network computes when it is applied. Where LyCORIS' merge is another, the case says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import load_file, save_file
from torch import nn

from tests.peers.variants import Built, Case
from tests.peers.variants.models import IDS, llama, logits, randomise, run_causal


class Block(nn.Module):
    """Two linear layers, one of them square, with an underscore and a dot in the same place of their names."""

    def __init__(self) -> None:
        super().__init__()
        self.mix_in = nn.Linear(16, 32)
        self.mix = nn.ModuleDict({"out": nn.Linear(32, 32, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix["out"](torch.tanh(self.mix_in(x)))


class Net(nn.Module):
    """Convolutions of several kinds, and linear layers."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.res = nn.ModuleList(
            [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, (2, 3), padding=(1, 2), dilation=2, groups=groups)]
        )
        self.norm = nn.GroupNorm(2, 16)
        self.mid_block = Block()
        self.along = nn.Conv1d(32, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.conv_in(x))
        for layer in self.res:
            x = torch.tanh(layer(x))
        x = self.mid_block(self.norm(x).flatten(2).mT)
        return self.along(x.mT)


def _image() -> torch.Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def _run(folder: Path, groups: int = 2) -> torch.Tensor:
    net = Net(groups)
    net.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return net(_image()).double()


def _base(folder: Path, groups: int = 2, dtype: torch.dtype = torch.float32) -> Net:
    """A base on disk, and as a float32 model."""
    torch.manual_seed(0)
    net = Net(groups).requires_grad_(False)
    folder.mkdir()
    save_file({name: x.to(dtype) for name, x in net.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    net.load_state_dict({name: x.to(dtype).float() for name, x in net.state_dict().items()})
    return net


@contextmanager
def prefixed(prefix: str) -> Iterator[None]:
    """LyCORIS keeps the prefix of names in its class."""
    usual, LycorisNetwork.LORA_PREFIX = LycorisNetwork.LORA_PREFIX, prefix
    try:
        yield
    finally:
        LycorisNetwork.LORA_PREFIX = usual


def network(
    algo: str, *, computes: bool = True, size: float = 0.3, groups: int = 2, metadata: dict[str, str] | None = None,
    dtype: torch.dtype = torch.float32, prefix: str = "lycoris", r: int = 2, conv: int = 3, holds: str = "",
    **options: Any,
) -> Callable[[Path], Built]:  # fmt: skip
    """A case's ``build``: a network on the small model, as LyCORIS saves it: one file.

    ``computes``: whether its outputs are asked for. ``holds``: parts that the file must have, or the case is another.
    """

    def build(folder: Path) -> Built:
        net = _base(folder / "base", groups, dtype)
        file = folder / "adapter.safetensors"
        with prefixed(prefix):
            made = LycorisNetwork(
                net, 1.0, lora_dim=r, conv_lora_dim=conv, alpha=3.0, conv_alpha=2.0, network_module=algo, **options
            )
        made.apply_to()
        randomise(made, size=size)
        made.eval()
        with torch.no_grad():
            expected = net(_image()).double() if computes else torch.zeros(())
        made.save_weights(str(file), None, metadata)
        assert set(holds.split()) <= {key.partition(".")[2] for key in load_file(file)}
        return Built(folder / "base", file, expected, lambda merged: _run(merged, groups))

    return build


def decoder(tied: bool, algo: str) -> Callable[[Path], Built]:
    """A case's ``build``: every linear layer of a decoder, its head among them."""

    def build(folder: Path) -> Built:
        base = llama(tied)
        base.save_pretrained(folder / "base")
        made = create_lycoris(base, 1.0, linear_dim=4, linear_alpha=6, algo=algo)
        made.apply_to()
        randomise(made)
        made.eval()
        expected = logits(base)
        made.save_weights(str(folder / "adapter.safetensors"), None, _notes(algo=algo))

        def reload(exported: Path) -> torch.Tensor:
            clean = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
            return logits(peft.PeftModel.from_pretrained(clean, exported))

        return Built(folder / "base", folder / "adapter.safetensors", expected, run_causal, reload=reload)

    return build


@torch.no_grad()
def _hidden(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).last_hidden_state.double()


def _text_encoder(folder: Path) -> Built:
    """In half precision, in a directory with a model card, as trainers upload them."""
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.CLIPTextModel(config).eval()
    model.save_pretrained(folder / "base")
    with prefixed("lora_te"):
        made = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, algo="lora")
    made.apply_to()
    randomise(made)
    for parameter in made.parameters():
        parameter.data = parameter.data.half().float()
    expected = _hidden(model)
    (folder / "adapter").mkdir()
    made.save_weights(str(folder / "adapter" / "style.safetensors"), torch.float16, None)
    (folder / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n")
    return Built(
        folder / "base",
        folder / "adapter",
        expected,
        lambda merged: _hidden(transformers.CLIPTextModel.from_pretrained(merged)),
    )


def _notes(**arguments: str) -> dict[str, str]:
    """What kohya's scripts write into the header."""
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": json.dumps(arguments)}


_TWICE = "LyCORIS 4.1.3 computes with the scale once, and merges with it twice: loreg merges what it computes"
_UNLOADED = "LyCORIS 4.1.3 fails to load such a file of its own (create_lycoris_from_weights)"
_DORA = {"weight_decompose": True}
_ROTATED = {"constraint": 0.01, "rescaled": True}

CASES = [
    Case("LoCon: linear, convolutions (also grouped, dilated)", "LyCORIS", network("locon")),
    Case("LoCon, Tucker", "LyCORIS", network("locon", use_tucker=True, holds="lora_mid.weight")),
    Case("LoCon, rs_lora", "LyCORIS", network("locon", rs_lora=True)),
    Case("LoCon, scalar", "LyCORIS", network("locon", use_scalar=True, size=1.0)),
    Case("LoCon, DoRA on outputs", "LyCORIS", network("locon", wd_on_out=True, **_DORA)),
    Case(
        "LoCon, DoRA on inputs, Tucker", "LyCORIS",
        network("locon", wd_on_out=False, use_tucker=True, holds="lora_mid.weight dora_scale", **_DORA),
        note=_UNLOADED,
    ),
    Case(
        "LoCon, bfloat16 base", "LyCORIS", network("locon", dtype=torch.bfloat16), tolerance=2e-2,
        note="the tolerance is bfloat16's",
    ),
    Case("LoCon on a decoder", "LyCORIS", decoder(False, "lora")),
    Case(
        "LoCon on a decoder, tied head", "LyCORIS", decoder(True, "lora"),
        note="of the head alone, as it is computed; LyCORIS' merge changes the embedding as well",
    ),
    Case("LoKr on a decoder, tied head", "LyCORIS", decoder(True, "lokr")),
    Case("LoCon named as kohya's UNets", "LyCORIS", network("locon", prefix="lora_unet")),
    Case("LoCon of a text encoder, float16", "LyCORIS", _text_encoder, tolerance=2e-5),
    Case("LoHa", "LyCORIS", network("loha"), note=_TWICE),
    Case(
        "LoHa, Tucker, rs_lora", "LyCORIS", network("loha", use_tucker=True, rs_lora=True, holds="hada_t1"),
        note=_TWICE,
    ),
    Case("LoHa, scalar, DoRA on outputs", "LyCORIS", network("loha", use_scalar=True, **_DORA), note=_TWICE),
    Case("LoKr", "LyCORIS", network("lokr", holds="lokr_w1 lokr_w2_a"), note=_TWICE),
    Case(
        "LoKr, both in two, Tucker", "LyCORIS",
        network("lokr", r=1, conv=1, decompose_both=True, use_tucker=True, holds="lokr_w1_a lokr_w2_a lokr_t2"),
        note=_UNLOADED,
    ),
    Case("LoKr, whole", "LyCORIS", network("lokr", full_matrix=True)),
    Case("LoKr, unbalanced, rs_lora", "LyCORIS", network("lokr", unbalanced_factorization=True, factor=2)),
    Case("LoKr, DoRA on inputs", "LyCORIS", network("lokr", wd_on_out=False, factor=2, **_DORA), note=_UNLOADED),
    Case(
        "LoKr, whole, rs_lora", "LyCORIS",
        network("lokr", full_matrix=True, rs_lora=True, metadata=_notes(algo="lokr", rs_lora="True")),
        refused="a scale of √r, of which neither the file nor LyCORIS",
    ),
    Case("full, with biases", "LyCORIS", network("full")),
    Case("diag-OFT", "LyCORIS", network("diag-oft")),
    Case("diag-OFT, constrained, rescaled", "LyCORIS", network("diag-oft", **_ROTATED)),
    Case("BOFT", "LyCORIS", network("boft")),
    Case("BOFT, constrained, rescaled", "LyCORIS", network("boft", **_ROTATED)),
    Case(
        "OFT, trained with bypass_mode", "LyCORIS",
        network("diag-oft", bypass_mode=True, metadata=_notes(algo="diag-oft", bypass_mode="True")),
        refused="trained with bypass_mode",
    ),
    Case(
        "(IA)³ on outputs", "LyCORIS", network("ia3"),
        note=_UNLOADED,
    ),
    Case("(IA)³ on inputs", "LyCORIS", network("ia3", groups=1, train_on_input=True), note=_UNLOADED),
    Case("norms", "LyCORIS", network("full", train_norm=True, computes=False), refused="edits of vectors are not"),
    Case("GLoRA", "LyCORIS", network("glora", groups=1, computes=False), refused="of GLoRA, which is not handled"),
    Case("T-LoRA", "LyCORIS", network("tlora", groups=1, computes=False), refused="T-LoRA, whose rank depends on"),
    Case(
        "DyLoRA", "LyCORIS", network("dylora", block_size=1, metadata=_notes(algo="dylora")),
        refused="is of DyLoRA, trained with a scale",
        note="only where the header says so; without it, it is the LoCon that LyCORIS loads",
    ),
]  # fmt: skip
