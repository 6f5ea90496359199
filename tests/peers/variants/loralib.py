"""loralib's layers, in a small model and in GPT-2, for whose c_attn it was written.

Nothing is merged behind the test's back (``merge_weights``): what the layers compute unmerged is what was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import loralib
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from tests.peers.variants import Built, Case
from tests.peers.variants.models import gpt2, logits, randomise, run_causal

_R: dict[str, Any] = {"r": 2, "lora_alpha": 6, "merge_weights": False}
_Q_AND_V = {"enable_lora": [True, False, True]}
_IDS = torch.tensor([[1, 2, 3], [7, 0, 10]])
_CONVOLUTIONS = {1: (nn.Conv1d, loralib.Conv1d), 2: (nn.Conv2d, loralib.Conv2d)}


class Net(nn.Module):
    """Words, linear layers and a convolution of ``dims`` dimensions, of loralib or of torch."""

    def __init__(self, lora: bool, dims: int = 2, kernel: int = 3) -> None:
        super().__init__()
        given, layers = (_R, loralib) if lora else ({}, nn)
        merged: Any = loralib.MergedLinear if lora else nn.Linear
        self.words = layers.Embedding(11, 16, **given)
        self.qkv = merged(16, 24, **(_Q_AND_V if lora else {}), **given)
        self.all = merged(24, 32, **({"enable_lora": [True, True]} if lora else {}), **given)
        self.square = layers.Linear(32, 32, **given)
        self.norm = nn.LayerNorm(32)
        self.conv = _CONVOLUTIONS[dims][lora](4, 6, kernel, groups=2, **given)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(torch.tanh(self.square(torch.tanh(self.all(self.qkv(self.words(ids)))))))
        return self.conv(x.reshape(len(ids), 4, *((4, -1) if self.dims == 2 else (-1,))))

    @property
    def dims(self) -> int:
        return getattr(self.conv, "conv", self.conv).weight.ndim - 2


def small(
    file: str, bias: str = "none", *, own: bool = False, push: Mapping[str, Any] | None = None, **options: Any
) -> Callable[[Path], Built]:
    """A case's ``build``: ``file`` is what the state dict is saved as, in a directory if there is one in its name.

    ``own``: whether the base has the names of a model that was made with loralib, ``conv.conv``.
    """

    def build(folder: Path) -> Built:
        torch.manual_seed(0)
        net = Net(lora=True, **options)
        (folder / "base").mkdir()
        base = {
            name if own else name.replace("conv.conv.", "conv."): value.contiguous()
            for name, value in net.state_dict().items()
            if "lora_" not in name
        }
        save_file(base, folder / "base" / "model.safetensors")
        (folder / "base" / "config.json").write_text('{"tie_word_embeddings": false}')
        loralib.mark_only_lora_as_trainable(net, bias)
        randomise(net, size=0.3)
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        state = loralib.lora_state_dict(net, bias)
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        given = {"alpha": 6, "enable_lora": [True, False, True]} if push is None else push
        adapter = path if path.parent == folder else path.parent

        @torch.no_grad()
        def run(merged: Path) -> torch.Tensor:
            net = Net(lora=False, **options)
            state = load_file(merged / "model.safetensors")
            net.load_state_dict({name.replace("conv.conv.", "conv."): value for name, value in state.items()})
            return net(_IDS).double()

        with torch.no_grad():
            expected = net(_IDS).double()
        return Built(folder / "base", adapter, expected, run, push=given)

    return build


def _replaced(layer: Any, kind: Any, **options: Any) -> Any:
    """A layer of loralib with the weights of one of transformers' GPT-2."""
    sizes = layer.weight.shape
    if kind is not loralib.Embedding:
        options |= {"fan_in_fan_out": True}
    new = kind(*sizes, **_R, **options)
    new.weight.data = layer.weight.data
    if getattr(layer, "bias", None) is not None:
        new.bias.data = layer.bias.data
    return new


def on_gpt2(kinds: Mapping[str, Any], options: Mapping[str, Any], push: Mapping[str, Any]) -> Callable[[Path], Built]:
    """A case's ``build``: GPT-2 with layers of loralib in the place of those called ``c_attn``, ``wte`` …"""

    def build(folder: Path) -> Built:
        model = gpt2()
        model.save_pretrained(folder / "base")
        torch.manual_seed(0)
        for path, layer in list(model.named_modules()):
            parent, _, leaf = path.rpartition(".")
            if leaf in kinds:
                given = options if kinds[leaf] is loralib.MergedLinear else {}
                setattr(model.get_submodule(parent), leaf, _replaced(layer, kinds[leaf], **given))
        loralib.mark_only_lora_as_trainable(model)
        randomise(model)
        expected = logits(model)
        torch.save(loralib.lora_state_dict(model), folder / "adapter.pt")

        def reload(exported: Path) -> torch.Tensor:
            clean = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
            return logits(peft.PeftModel.from_pretrained(clean, exported))

        return Built(folder / "base", folder / "adapter.pt", expected, run_causal, push=push, reload=reload)

    return build


_ATTENTION = on_gpt2({"c_attn": loralib.MergedLinear}, _Q_AND_V, {"alpha": 6, "enable_lora": [True, False, True]})

CASES = [
    Case(
        "Linear, Embedding, MergedLinear, Conv2d (grouped)", "loralib", small("adapter.pt"),
        note="alpha and, where it is not of all blocks, enable_lora have to be given",
    ),
    Case("the same, all biases", "loralib", small("adapter.safetensors", "all")),
    Case("the same, biases of LoRA layers, on a base made with loralib", "loralib",
         small("adapter/lora.bin", "lora_only", own=True)),
    Case("Conv1d of a kernel of 1", "loralib", small("adapter.pth", dims=1, kernel=1)),
    Case("MergedLinear for GPT-2's c_attn", "loralib", _ATTENTION),
    Case("Linear for GPT-2's other layers", "loralib",
         on_gpt2({"c_proj": loralib.Linear, "c_fc": loralib.Linear}, {}, {"alpha": 6})),
    Case("Embedding, tied (GPT-2)", "loralib",
         on_gpt2({"wte": loralib.Embedding}, {}, {"alpha": 6}),
         note="of the embedding alone: with merge_weights loralib's eval() changes the tied head as well"),
    Case("without alpha", "loralib", small("adapter.pt", push={}), refused="stores no alpha"),
    Case("MergedLinear without enable_lora", "loralib", small("adapter.pt", push={"alpha": 6}),
         refused="give enable_lora .* such as 1,1,0"),
]  # fmt: skip
