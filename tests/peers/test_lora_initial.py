"""The factors before training: only those of the same training are taken off, and nothing is stored else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peer_edits import Edit, with_config, with_tensors

from loreg.cli import main
from loreg.errors import BadInput, LoregError, NotFound, UsageError
from loreg.registry import Registry
from tests.peers.variants import Built
from tests.peers.variants.lora_initial import CASES


@pytest.fixture
def pissa(tmp_path: Path) -> Built:
    return next(case for case in CASES if case.variant == "PiSSA").build(tmp_path)


_KEY = "base_model.model.model.layers.1.mlp.down_proj"


def _without_a_module(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[f"{_KEY}.lora_A.weight"], tensors[f"{_KEY}.lora_B.weight"]


def _of_another_rank(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{_KEY}.lora_A.weight"] = torch.ones(2, 48)
    tensors[f"{_KEY}.lora_B.weight"] = torch.ones(32, 2)


def _not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[f"{_KEY}.lora_A.weight"][0, 0] = float("nan")


OTHERS: dict[str, tuple[Edit, type[LoregError], str]] = {
    "scale": (with_config(lora_alpha=7), BadInput, "lora_alpha is 7.*is 6"),
    "root": (with_config(use_rslora=True), BadInput, "use_rslora"),
    "modules": (with_tensors(_without_a_module), BadInput, "layers.1.mlp.down_proj.*not in the initial factors"),
    "ranks": (with_tensors(_of_another_rank), BadInput, "layers.1.mlp.down_proj.*expected the same"),
    "numbers": (with_tensors(_not_finite), BadInput, "NaN"),
    "nothing": (shutil.rmtree, NotFound, "holds no PEFT adapter"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_factors_of_another_training(name: str, pissa: Built, registry: Registry) -> None:
    edit, kind, message = OTHERS[name]
    edit(pissa.push["initial"])
    with pytest.raises(kind, match=message):
        registry.push(pissa.adapter, base=pissa.base, name="adapter", **pissa.push)
    assert not registry.list_versions()


def test_as_peft_leaves_them(pissa: Built, registry: Registry) -> None:
    """PEFT's conversion writes over the config of the initial adapter: its initialisation is true then."""
    with_config(init_lora_weights=True)(pissa.push["initial"])
    version = registry.push(pissa.adapter, base=pissa.base, name="adapter", **pissa.push)
    module = version.manifest.modules["model.layers.0.self_attn.q_proj"]
    assert [term.scale for term in module.terms] == [1.5, -1.5] and module.rank == 8


def test_the_command_takes_them(pissa: Built, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOREG_HOME", str(registry.home))
    arguments = ["push", str(pissa.adapter), "--base", str(pissa.base), "--name", "adapter"]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code == BadInput.exit_code and "--initial" in refused.output
    taken = CliRunner().invoke(main, [*arguments, "--initial", str(pissa.push["initial"]), "--json"])
    assert taken.exit_code == 0 and json.loads(taken.stdout)["rank"] == 8


def test_only_lora_can_have_them(pissa: Built, registry: Registry) -> None:
    with_config(peft_type="LOHA")(pissa.adapter)
    with pytest.raises(UsageError, match="only LORA can have initial factors"):
        registry.push(pissa.adapter, base=pissa.base, name="adapter", **pissa.push)
