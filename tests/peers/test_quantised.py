"""Quantised bases, against the libraries that quantise, and against their layouts spelled out in plain Python.

``fixtures/quantised/generate.py`` says which library wrote what; transformers' float8 is asked here and now. For
GPTQ's second zero-point convention, DeepSeek's cut blocks and scales in ``float8_e8m0fnu`` no library is at hand:
there the other side is the layout as documented, one number at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from loreg.algebra.rounding import bits, from_ordered, ordered
from loreg.checkpoint import Checkpoint
from loreg.errors import BadInput, Conflict, Unsupported, UsageError
from loreg.quantised import of, quantisation, values
from loreg.quantised.writing import Dequantised, dequantise
from loreg.tensors import torch_dtype

FIXTURES = Path(__file__).parent / "fixtures" / "quantised"
CASES = sorted(path.name.removesuffix(".expected.safetensors") for path in FIXTURES.glob("*.expected.safetensors"))
DOUBLE = torch.float64


def made(path: Path, out: Path, dtype: str = "BF16") -> Dequantised:
    return dequantise(Checkpoint.open(path), out, dtype, lambda done: None)


def real(path: Path) -> dict[str, Tensor]:
    """What each packed weight of a checkpoint stands for, float64, (out, in)."""
    checkpoint = Checkpoint.open(path)
    stored = load_file(path / "model.safetensors")
    scheme = of(checkpoint)
    assert scheme is not None and not scheme.refusal, scheme
    found = {}
    for one in scheme.packed:
        numbers = values.numbers(one, lambda name: stored[name])
        rows, step = math.prod(numbers.shape[:-1]), 3 * numbers.unit
        tiles = [numbers.tile(first, min(rows, first + step)) for first in range(0, rows, step)]
        whole = torch.cat(tiles).view(numbers.shape)
        found[one.name] = whole.mT if one.transposed else whole
    return found


def assert_nearest(stored: Tensor, exact: Tensor) -> None:
    """No neighbour of a stored value is nearer to the exact one; of two as near, the even one is stored."""
    error = (stored.double() - exact).abs()
    for step in (-1, 1):
        other = (from_ordered(ordered(stored) + step, stored.dtype).double() - exact).abs()
        even = bits(stored) % 2 == 0
        assert bool(((error < other) | ((error == other) & even) | (stored == 0)).all())


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def llama(**said: Any) -> dict[str, Any]:
    return {"model_type": "llama", "torch_dtype": "float16", "quantization_config": said}


@pytest.mark.parametrize("case", CASES)
def test_the_library_says_the_same(case: str) -> None:
    """Equal to the bit once rounded to what the library computes in; LLM.int8() rounds three times in float32."""
    expected = load_file(FIXTURES / f"{case}.expected.safetensors")
    expected.pop("logits", None)
    found = real(FIXTURES / case)
    assert expected and set(expected) <= set(found)
    for name, truth in expected.items():
        if "int8" in case:
            assert ((found[name] - truth.double()).abs() <= 2.0**-22 * truth.double().abs()).all()
            assert truth.unique().numel() > 100
        else:
            assert torch.equal(found[name].to(truth.dtype), truth), name


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("case", CASES)
def test_written_numbers_are_the_nearest(case: str, dtype: str, tmp_path: Path) -> None:
    result = made(FIXTURES / case, tmp_path / "plain", dtype)
    written, before = (
        load_file(tmp_path / "plain" / "model.safetensors"),
        load_file(FIXTURES / case / "model.safetensors"),
    )
    numbers = real(FIXTURES / case)
    for name, exact in numbers.items():
        assert written[name].dtype == torch_dtype(dtype, name)
        assert_nearest(written[name], exact)
    others = set(written) - set(numbers)
    assert others <= set(before) and all(torch.equal(written[name], before[name]) for name in others)
    assert not any(name.rpartition(".")[2] in ("qweight", "absmax", "SCB", "weight_scale") for name in written)
    assert result.dropped == tuple(name for name in before if name.endswith("input_scale"))
    plain = Checkpoint.open(tmp_path / "plain")
    assert of(plain) is None and plain.manifest() == result.manifest
    assert result.source == Checkpoint.open(FIXTURES / case).manifest().identity.weights_root
    config = plain.config()
    assert "quantization_config" not in config
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {
        "bfloat16" if dtype == "BF16" else "float16"
    }


@pytest.mark.parametrize("case", [case for case in CASES if "bnb" in case and case != "bnb-nf4-rows"])
def test_the_plain_model_computes_what_the_quantised_one_did(case: str, tmp_path: Path) -> None:
    """Names, orientations (GPT-2's are turned round by bitsandbytes) and config, as transformers reads them."""
    logits = load_file(FIXTURES / f"{case}.expected.safetensors")["logits"]
    made(FIXTURES / case, tmp_path / "plain")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        found = model(torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])).logits.float()
    # LLM.int8() rounds what goes into a layer to 8 bits, too.
    assert (found - logits).abs().max() < (0.04 if "int8" in case else 0.02) * logits.abs().max()


def bits_at(words: list[int], first: int, width: int) -> int:
    """A number from a run of 32-bit words, low bits first."""
    run = sum((word & 0xFFFFFFFF) << 32 * k for k, word in enumerate(words))
    return run >> first & 2**width - 1


def random_words(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("index", ["g_idx", "none"])
def test_gptq_number_by_number(width: int, form: str, index: str, tmp_path: Path) -> None:
    """The last group is smaller; without g_idx the config says how large the groups are."""
    inputs, outputs, group = 96, 32, 64
    words = random_words(inputs * width // 32, outputs, seed=width)
    zeros = random_words(2, outputs * width // 32, seed=width + 10)
    if form == "gptq":  # no zero of all ones, which v1 kernels do not agree on
        codes = [[bits_at(row, k * width, width) % (2**width - 1) for k in range(outputs)] for row in zeros.tolist()]
        runs = [sum(code << k * width for k, code in enumerate(row)) for row in codes]
        zeros = torch.tensor([[run >> 32 * k & 0xFFFFFFFF for k in range(width)] for run in runs]).to(torch.int32)
    scales = torch.rand(2, outputs, generator=torch.Generator().manual_seed(3)).half()
    groups = torch.arange(inputs, dtype=torch.int32) // group
    tensors = {"m.qweight": words, "m.qzeros": zeros, "m.scales": scales}
    if index == "g_idx":
        groups = groups[torch.randperm(inputs, generator=torch.Generator().manual_seed(1))]
        tensors["m.g_idx"] = groups
    said = {"quant_method": "gptq", "bits": width, "group_size": group, "checkpoint_format": form}
    found = real(write(tmp_path / "q", tensors, llama(**said)))["m.weight"]
    assert found.shape == (outputs, inputs)
    columns, rows = words.T.tolist(), zeros.tolist()
    for o in range(outputs):
        for i in range(inputs):
            g = int(groups[i])
            zero = bits_at(rows[g], o * width, width) + (form == "gptq")
            assert found[o, i] == scales[g, o].double() * (bits_at(columns[o], i * width, width) - zero)


def test_awq_number_by_number(tmp_path: Path) -> None:
    inputs, outputs = 24, 16
    words, zeros = random_words(inputs, outputs // 8, seed=1), random_words(3, outputs // 8, seed=2)
    scales = torch.rand(3, outputs, generator=torch.Generator().manual_seed(3)).half()
    said = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "GEMM"}
    tensors = {"m.qweight": words, "m.qzeros": zeros, "m.scales": scales}
    found = real(write(tmp_path / "q", tensors, llama(**said)))["m.weight"]
    for i in range(inputs):
        for place in range(outputs):
            column = place // 8 * 8 + (0, 2, 4, 6, 1, 3, 5, 7)[place % 8]
            code, zero = (bits_at(x.tolist(), place * 4, 4) for x in (words[i], zeros[i // 8]))
            assert found[column, i] == scales[i // 8, column].double() * (code - zero)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_number_by_number(nested: bool, tmp_path: Path) -> None:
    """An odd row and an odd count: bytes and blocks cross rows, and the last nibble is padding."""
    rows, columns, blocksize = 5, 13, 32
    generator = torch.Generator().manual_seed(4)
    data = torch.randint(0, 256, (33, 1), generator=generator).to(torch.uint8)
    code = torch.tensor(values._NF4)
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float32", "shape": [rows, columns]}
    absmax = torch.rand(3, generator=generator)
    tensors = {"m.weight": data, "m.weight.quant_map": code, "m.weight.absmax": absmax}
    if nested:
        state |= {"nested_blocksize": 2, "nested_dtype": "float32", "nested_offset": 0.3}
        table, outer = torch.rand(256, generator=generator), torch.rand(2, generator=generator)
        inner = torch.tensor([0, 255, 7], dtype=torch.uint8)
        tensors |= {"m.weight.nested_absmax": outer, "m.weight.nested_quant_map": table, "m.weight.absmax": inner}
        absmax = table[inner.int()] * outer[[0, 0, 1]] + torch.tensor(0.3)
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode())).to(torch.uint8)
    folder = write(tmp_path / "q", tensors, llama(quant_method="bitsandbytes", load_in_4bit=True))
    found = real(folder)["m.weight"]
    for e in range(rows * columns):
        byte = int(data[e // 2])
        nibble = byte & 15 if e % 2 else byte >> 4
        assert found.flatten()[e] == code[nibble].double() * absmax[e // blocksize].double()


def float8(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    return torch.where(codes % 128 == 127, 3, codes).to(torch.uint8).view(torch.float8_e4m3fn)


@pytest.mark.parametrize("lead", [(), (3,)])
@pytest.mark.parametrize("grid", [(1, 1), (4, 2), (32, 1)])
def test_float8_as_transformers_reads_it(lead: tuple[int, ...], grid: tuple[int, int], tmp_path: Path) -> None:
    weight = float8(*lead, 32, 64, seed=5)
    scale = torch.rand(*lead, *grid, generator=torch.Generator().manual_seed(6))
    truth = Fp8Dequantize(None)._dequantize_one(weight, scale, output_dtype=torch.float32)
    name = "experts.gate_up_proj" if lead else "m.weight"
    tensors = {name: weight, f"{name}_scale_inv": scale, "m.activation_scale": torch.ones(())}
    if lead:
        del tensors["m.activation_scale"]
    folder = write(tmp_path / "q", tensors, llama(quant_method="fp8", weight_block_size=[8, 32]))
    assert torch.equal(real(folder)[name].float(), truth)


@pytest.mark.parametrize("power", [False, True], ids=["float32", "e8m0"])
def test_float8_blocks_cut_short(power: bool, tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj has 576 rows in blocks of 128: the last block is what is left."""
    weight = float8(5, 7, seed=7)
    scale = torch.tensor([[2.0, 0.5, 8.0], [1.0, 2.0**-100, 0.25], [4.0, 16.0, 2.0**100]])
    stored = scale.to(torch.float8_e8m0fnu) if power else scale * 1.7
    tensors = {"m.weight": weight, "m.weight_scale_inv": stored}
    config = {"text_config": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 3]}}}
    folder = write(tmp_path / "q", tensors, config)
    checkpoint = Checkpoint.open(folder)
    scheme = of(checkpoint)
    assert scheme is not None and scheme.name == "fp8"
    result = dequantise(checkpoint, tmp_path / "plain", "BF16", lambda done: None)
    exact = torch.tensor(
        [[float(weight[r, c]) * float(stored[r // 2, c // 3]) for c in range(7)] for r in range(5)], dtype=DOUBLE
    )
    assert_nearest(load_file(result.out / "model.safetensors")["m.weight"], exact)


GPTQ = {"m.qweight": (4, 8, "I32"), "m.qzeros": (1, 1, "I32"), "m.scales": (1, 8, "F16"), "m.g_idx": (32, "I32")}
FP8 = {"m.weight": (4, 4, "F8_E4M3"), "m.weight_scale": (1, "F32")}
NF4 = {
    "m.weight": (8, 1, "U8"),
    "m.weight.absmax": (1, "F32"),
    "m.weight.quant_map": (16, "F32"),
    "m.weight.quant_state.bitsandbytes__nf4": (90, "U8"),
}
PLAIN = {"m.weight": (4, 4, "BF16")}


def info(stored: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    from loreg.format.safetensors import TensorInfo

    return {name: TensorInfo(name, dtype, tuple(shape), 0, 0) for name, (*shape, dtype) in stored.items()}


@pytest.mark.parametrize(
    ("said", "stored", "name", "reason"),
    [
        ({"quant_method": "hqq"}, PLAIN, "hqq", "loreg knows"),
        ({"quant_method": "aqlm"}, PLAIN, "aqlm", "loreg knows"),
        ({"quant_method": "mxfp4"}, {"e.up_blocks": (4, 4, "U8")}, "mxfp4", "loreg knows"),
        ({}, {"e.up_blocks": (4, 4, "U8"), "e.up_scales": (4, "U8")}, "by an unknown scheme", "up_blocks"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, GPTQ, "gptq marlin", "checkpoint_format is marlin"),
        ({}, GPTQ, "by an unknown scheme", "checkpoint_format is not known"),
        ({"quant_method": "awq"}, GPTQ, "awq", "not what config.json says"),
        ({"quant_method": "awq", "version": "gemv"}, {**GPTQ, "m.qweight": (32, 1, "I32")}, "awq gemv", "is gemv"),
        ({"quant_method": "gptq"}, {**GPTQ, "m.weight": (8, 32, "F16")}, "gptq", "both plain and packed"),
        ({"quant_method": "gptq"}, {**GPTQ, "m.g_idx": (31, "I32")}, "gptq", "for each of 32 inputs"),
        ({"quant_method": "gptq"}, {**GPTQ, "n.qzeros": (1, 1, "I32")}, "gptq", "'n.qzeros'"),
        ({"quant_method": "gptq"}, PLAIN, "gptq", "no tensor is stored so"),
        ({"quant_method": "bitsandbytes"}, {**NF4, "m.weight.absmax": (1, "U8")}, "bitsandbytes", "absmax' is U8"),
        ({"quant_method": "bitsandbytes"}, {**NF4, "n.SCB": (4, "F32")}, "bitsandbytes", "'n.weight' is missing"),
        ({"quant_method": "bitsandbytes"}, {"n.weight": (4, 4, "I8"), "n.SCB": (3, "F32")}, "bitsandbytes", "n.SCB"),
        ({}, {**NF4, **{f"x{k}": v for k, v in GPTQ.items()}}, "by an unknown scheme", "checkpoint_format"),
        ({"quant_method": "fp8"}, {**FP8, "n.weight": (4, 4, "F8_E4M3")}, "fp8", "with no scale"),
        ({"quant_method": "fp8"}, {**FP8, "m.weight_scale_inv": (1, "F32")}, "fp8", "two scales"),
        ({"quant_method": "fp8"}, {**FP8, "m.weight_scale": (2, 2, "F32")}, "fp8", "expected one number"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, {"m.weight_packed": (4, 4, "I32")},
         "compressed-tensors pack-quantized", "weight_packed"),
        ({"quant_method": "compressed-tensors", "format": "int-quantized"}, {**FP8, "m.weight": (4, 4, "I8")},
         "compressed-tensors int-quantized", "weight_scale"),
        ({"quant_method": "compressed-tensors", "transform_config": {"a": 1}}, FP8, "compressed-tensors", "rotated"),
        ({"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}}, FP8,
         "compressed-tensors", "sparse"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"},
         {"m.weight": (4, 2, "U8"), "m.weight_scale": (4, 1, "F8_E4M3"), "m.weight_scale_2": (1, "F32")},
         "modelopt NVFP4", "weight_scale"),
        ({}, {"m.weight": (4, 4, "F8_E4M3"), "m.scale_weight": (1, "F32")}, "by an unknown scheme", "scale_weight"),
        ({}, {"h.0.attn.c_attn.weight": (4, 4, "I8"), "h.0.attn.c_attn.SCB": (4, "F32")}, "by an unknown scheme",
         "orientation"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_named(
    said: dict[str, Any], stored: dict[str, tuple[Any, ...]], name: str, reason: str
) -> None:
    scheme = quantisation({"quantization_config": said}, info(stored))
    assert scheme is not None and scheme.name == name and reason in scheme.refusal, scheme
    with pytest.raises(Unsupported, match=rf"\({name}\) and cannot be dequantised"):
        scheme.require()


@pytest.mark.parametrize(
    ("config", "stored", "name"),
    [
        ({}, PLAIN, None),
        ({"model_type": "llama"}, {"m.weight": (4, 4, "F8_E4M3")}, None),  # float8 as it is: merged as it is
        ({}, {**PLAIN, "m.scales": (4, "F32")}, None),
        ({}, FP8, "plain-fp8"),
        ({}, NF4, "bitsandbytes-nf4"),
        ({"quantization_config": {"load_in_8bit": True}}, {"m.weight": (4, 4, "I8"), "m.SCB": (4, "F16")},
         "bitsandbytes-int8"),
        ({"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}, GPTQ, "gptq-v2"),
        ({"text_config": {"quantization_config": {"quant_method": "fbgemm_fp8"}}},
         {**FP8, "m.weight_scale": (4, 1, "F32")}, "fbgemm_fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, FP8, "compressed-tensors-fp8"),
    ],
)  # fmt: skip
def test_what_is_known(config: dict[str, Any], stored: dict[str, tuple[Any, ...]], name: str | None) -> None:
    scheme = quantisation(config, info(stored))
    assert (scheme and scheme.name) == name and not (scheme and scheme.refusal)


def gptq_tensors(**changes: Tensor) -> dict[str, Tensor]:
    tensors = load_file(FIXTURES / "gptq-4" / "model.safetensors")
    module = "model.layers.0.mlp.down_proj"
    return tensors | {f"{module}.{role}": tensor for role, tensor in changes.items()}


def gptq_config() -> dict[str, Any]:
    return json.loads((FIXTURES / "gptq-4" / "config.json").read_text())  # type: ignore[no-any-return]


def test_what_is_damaged_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    ones = torch.full((3, 4), -1, dtype=torch.int32)
    cases = {
        "libraries read as 0 or as 16": gptq_tensors(qzeros=ones),
        "placeholder": gptq_tensors(g_idx=torch.zeros(96, dtype=torch.int32)),
        "3 groups": gptq_tensors(g_idx=torch.full((96,), 3, dtype=torch.int32)),
        r"a number at \[0, 0\] that is no finite torch.float16": gptq_tensors(
            scales=torch.full((3, 32), 65504.0).half()
        ),
    }
    for number, (reason, tensors) in enumerate(cases.items()):
        folder = write(tmp_path / f"q{number}", tensors, gptq_config())
        with pytest.raises(BadInput, match=reason):
            made(folder, tmp_path / "plain", "F16")
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"q{k}" for k in range(number + 1)]
    folder = tmp_path / "q0"
    stored = load_file(FIXTURES / "bnb-nf4-nested" / "model.safetensors")
    weight = "model.layers.0.mlp.up_proj.weight"
    for part, value, reason in (
        (f"{weight}.quant_map", torch.linspace(-1, 1, 16), "codes of its own"),
        (f"{weight}.absmax", torch.zeros(3, dtype=torch.uint8), "3 scales, expected"),
        (weight, torch.zeros(9, 1, dtype=torch.uint8), "9 bytes, expected"),
        (f"{weight}.quant_state.bitsandbytes__nf4", torch.zeros(9, dtype=torch.uint8), "quant_state"),
    ):
        write(folder, stored | {part: value}, llama(quant_method="bitsandbytes"))
        with pytest.raises(BadInput, match=reason):
            made(folder, tmp_path / "plain")


def test_refusals(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", {"m.weight": torch.ones(2, 2)}, {})
    with pytest.raises(BadInput, match="not quantised"):
        made(plain, tmp_path / "out")
    with pytest.raises(UsageError, match="F32"):
        made(FIXTURES / "bnb-fp4", tmp_path / "out", "F32")
    with pytest.raises(Conflict, match="not an empty directory"):
        made(FIXTURES / "bnb-fp4", plain)
    marlin = gptq_config()
    marlin["quantization_config"]["checkpoint_format"] = "marlin"
    with pytest.raises(Unsupported, match="gptq marlin"):
        made(write(tmp_path / "marlin", gptq_tensors(), marlin), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_shards_side_files_and_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a weight in several shards, one shard with nothing left; the bytes follow from what is stored."""
    tensors, config = gptq_tensors(), gptq_config()
    config["vision_config"] = {"dtype": "float16", "quantization_config": {"quant_method": "gptq"}, "depth": 2}
    folder = tmp_path / "sharded"
    folder.mkdir()
    shards = {
        "a.safetensors": ("qweight", "norm.weight"),
        "b.safetensors": ("scales", "g_idx"),
        "c.safetensors": ("qzeros", "bias"),
    }
    places = {}
    for shard, endings in shards.items():
        part = {name: tensor for name, tensor in tensors.items() if name.endswith(endings)}
        save_file(part, folder / shard)
        places |= dict.fromkeys(part, shard)
    assert set(places) == set(tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    seen: list[int] = []
    result = dequantise(Checkpoint.open(folder), tmp_path / "out", "BF16", seen.append)
    assert sorted(path.name for path in result.out.iterdir()) == [
        "a.safetensors", "c.safetensors", "config.json", "loreg-derived.json", "model.safetensors.index.json",
        "tokenizer.json",
    ]  # fmt: skip
    weight = "model.layers.0.mlp.down_proj.weight"
    plain = Checkpoint.open(result.out)
    assert plain.tensors[weight].shard.name == "a.safetensors" and sum(seen) == plain.nbytes
    index = json.loads((result.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plain.nbytes
    assert plain.config()["vision_config"] == {"dtype": "bfloat16", "depth": 2}
    monkeypatch.setattr(values, "TILE_ELEMENTS", 200)
    whole = made(write(tmp_path / "whole", tensors, gptq_config()), tmp_path / "other")
    assert whole.weights_root == result.weights_root == plain.manifest().identity.weights_root
    assert whole.source == result.source


def test_the_quantisers_own_file(tmp_path: Path) -> None:
    """AutoGPTQ's first releases wrote quantize_config.json and left config.json alone."""
    config = gptq_config()
    said = config.pop("quantization_config")
    del said["quant_method"]
    folder = write(tmp_path / "q", gptq_tensors(), config)
    assert (scheme := of(Checkpoint.open(folder))) is not None and "checkpoint_format is not known" in scheme.refusal
    (folder / "quantize_config.json").write_text(json.dumps(said))
    assert (scheme := of(Checkpoint.open(folder))) is not None and scheme.name == "gptq"
    (folder / "quantize_config.json").write_text("{")
    with pytest.raises(BadInput, match=r"quantize_config\.json"):
        of(Checkpoint.open(folder))
    write(folder, {"m.weight": torch.ones(2, 2)}, {})
    assert of(Checkpoint.open(folder)) is None
