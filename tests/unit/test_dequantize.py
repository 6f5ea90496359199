"""A quantised base: refused, unless the user asks for the 16-bit model of it; then it says where it came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import loreg
from loreg.errors import BadInput, BaseMismatch, Unsupported
from loreg.format.derived import DERIVED, Derived
from loreg.format.safetensors import TensorInfo
from loreg.quantised.scheme import quantisation

QUANTISED = Path(__file__).parents[1] / "peers" / "fixtures" / "quantised" / "bnb-nf4-nested"
MODULE = "model.layers.0.self_attn.k_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    plain = load_file(QUANTISED.with_name(QUANTISED.name + ".expected.safetensors"))
    rows, columns = plain[f"{MODULE}.weight"].shape
    return tiny.write_adapter(
        tmp_path / "adapter", {MODULE: tiny.factors(np.random.default_rng(0), rows, columns, 2)}
    )


def test_a_push_to_a_quantised_base_is_refused_and_says_what_to_do(registry: loreg.Registry, adapter: Path) -> None:
    with pytest.raises(Unsupported, match=r"quantised \(bitsandbytes.*--dequantize"):
        registry.push(adapter, base=QUANTISED)
    assert not registry.list_versions() and not registry.list_bases()


def test_the_16_bit_model_is_a_base_of_its_own(registry: loreg.Registry, adapter: Path, tmp_path: Path) -> None:
    base = registry.add_base(QUANTISED, dequantize=tmp_path / "plain")
    record = Derived.parse((tmp_path / "plain" / DERIVED).read_bytes())
    assert record.source == loreg.open(tmp_path / "other").add_base(QUANTISED, "q").manifest.identity.weights_root
    assert record.weights_root == base.manifest.identity.weights_root
    registry.push(adapter, base=base.name, name="a")
    merged = registry.merge("a", tmp_path / "merged", verify="exact")
    assert (tmp_path / "merged" / DERIVED).read_bytes() == record.dump()
    again = registry.merge("a", tmp_path / "again", base=QUANTISED, dequantize=True, verify="exact")
    assert again.weights_root == merged.weights_root
    assert (tmp_path / "again" / DERIVED).read_bytes() == record.dump()
    assert registry.unmerge(tmp_path / "merged", tmp_path / "back").matches_base


def test_a_merge_into_the_quantised_base_itself_is_refused(
    registry: loreg.Registry, adapter: Path, tmp_path: Path
) -> None:
    base = registry.add_base(QUANTISED, dequantize=tmp_path / "plain")
    registry.push(adapter, base=base.name, name="a")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Unsupported, match="quantised"):
        registry.merge("a", tmp_path / "merged", base=QUANTISED)
    with pytest.raises(BadInput, match="is not quantised"):
        registry.merge("a", tmp_path / "merged", dequantize=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_another_quantised_base_is_still_another_base(
    registry: loreg.Registry, adapter: Path, tmp_path: Path
) -> None:
    base = registry.add_base(QUANTISED, dequantize=tmp_path / "plain")
    registry.push(adapter, base=base.name, name="a")
    with pytest.raises(BaseMismatch):
        registry.merge("a", tmp_path / "merged", base=QUANTISED.with_name("bnb-fp4"), dequantize=True)


@pytest.mark.parametrize(
    ("config", "transposed"),
    [
        ({"model_type": "gpt2"}, True),
        ({"model_type": "vision-encoder-decoder", "decoder": {"model_type": "gpt2"}}, True),
        ({"model_type": "gpt_bigcode"}, False),
        ({"model_type": "llama"}, False),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_layer_that_stores_in_out_is_known_in_a_part_of_a_model_too(
    config: dict[str, Any], transposed: bool
) -> None:
    name = "decoder.transformer.h.0.attn.c_attn.weight"
    shapes = {name: ("I8", (12, 4)), name.removesuffix("weight") + "SCB": ("F32", (12,))}
    infos = {key: TensorInfo(key, dtype, shape, 0, 0) for key, (dtype, shape) in shapes.items()}
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    scheme = quantisation(config | said, infos)
    assert scheme is not None and [one.transposed for one in scheme.packed] == [transposed]
