"""Names without dots: LyCORIS gives them, and what it names is what they are resolved to, or they are refused."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from lycoris import LycorisNetwork
from safetensors.torch import save_file
from torch import nn

from loreg import adapters
from loreg.digest import Digest
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor

_WORDS = ("a", "b", "a_b", "b_a")


def tensors(paths: Iterable[str], shape: tuple[int, ...] = (4, 4)) -> dict[str, BaseTensor]:
    """A base whose modules have weights of ``shape``."""
    return {f"{p}.weight": BaseTensor(f"{p}.weight", "F32", shape, 64, Digest.of(b"")) for p in paths}


def located(folder: Path, names: Iterable[str], base: dict[str, BaseTensor]) -> dict[str, str]:
    """Name in the file → path in the base, for a file with a LoRA of each name."""
    file = folder / "names.safetensors"
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    save_file({f"{n}.lora_{part}.weight": x.clone() for n in names for part, x in (("down", down), ("up", up))}, file)
    modules = adapters.read(file).located(base, {}).modules
    return {module.terms[0].tensors["A"].key.partition(".")[0]: path for path, module in modules.items()}


def tree(rng: random.Random, depth: int = 3) -> nn.Module:
    if not depth or (depth < 3 and rng.random() < 0.2):
        return nn.Linear(4, 4)
    return nn.ModuleDict({name: tree(rng, depth - 1) for name in rng.sample(_WORDS, 3)})


def models() -> list[nn.Module]:
    return [nn.ModuleDict({"x": tree(random.Random(seed))}) for seed in range(6)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", models())
def test_a_name_is_the_module_that_lycoris_calls_so(tmp_path: Path, model: nn.Module) -> None:
    paths = {path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    network = LycorisNetwork(model, warn_on_unmatched=False)
    count = Counter(f"lycoris_{path}".replace(".", "_") for path in paths)
    named = {lora.lora_name: lora.org_module[0] for lora in network.loras}
    assert set(named) == set(count)
    unique = [name for name in named if count[name] == 1]
    assert unique
    found = located(tmp_path, unique, tensors(paths))
    assert {name: model.get_submodule(path) for name, path in found.items()} == {n: named[n] for n in unique}
    # LyCORIS adapts one of several modules of one name, and does not say which.
    for name in set(named) - set(unique):
        with pytest.raises(Unsupported, match=f"'{name}' of the file may be .* or .* in the base"):
            located(tmp_path, [name], tensors(paths))


def test_the_models_have_ambiguous_names() -> None:
    paths = [[path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)] for model in models()]
    assert any(len({path.replace(".", "_") for path in each}) < len(each) for each in paths)
    assert all(len(each) > 4 for each in paths)


@pytest.mark.parametrize(
    ("model", "checkpoint"),
    [
        ("", ""),
        ("transformer.", ""),
        ("", "transformer."),
        ("", "text_model."),
        ("base_model.inner.", ""),
    ],
)
def test_a_prefix_of_the_model_or_of_the_checkpoint(tmp_path: Path, model: str, checkpoint: str) -> None:
    paths = [f"layers.{i}.self_attn.{leaf}" for i in range(3) for leaf in ("q_proj", "v_proj")]
    names = {f"lora_te_{model}{path}".replace(".", "_"): f"{checkpoint}{path}" for path in paths}
    assert located(tmp_path, names, tensors([*names.values(), f"{checkpoint}embed"])) == names


def test_a_prefix_ends_with_a_word_of_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"'lora_unet_q' of the file is none of the base.*nearest is 'block\.to_q'"):
        located(tmp_path, ["lora_unet_q"], tensors(["block.to_q"]))


def test_two_prefixes_fit(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"could be one of one\.q\.weight, two\.q\.weight"):
        located(tmp_path, ["lycoris_q"], tensors(["one.q", "two.q"]))


def test_a_file_for_two_models(tmp_path: Path) -> None:
    """Both text encoders of SDXL have layers of the same names; one of them is the base."""
    with pytest.raises(BadInput, match=r"'lora_te1_text_q' and 'lora_te2_text_q' of the file both fit 'text\.q'"):
        located(tmp_path, ["lora_te1_text_q", "lora_te2_text_q"], tensors(["text.q"]))
    both = located(tmp_path, ["lora_te_text_q", "lora_unet_mid_q"], tensors(["encoder.text.q", "mid.q"]))
    assert both == {"lora_te_text_q": "encoder.text.q", "lora_unet_mid_q": "mid.q"}


def test_a_module_that_the_base_has_not(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="'lycoris_layers_7_q' of the file is none of the base"):
        located(tmp_path, ["lycoris_layers_0_q", "lycoris_layers_7_q"], tensors(["layers.0.q", "layers.1.q"]))
