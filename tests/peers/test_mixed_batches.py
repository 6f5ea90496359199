"""``serving.unmerged`` against PEFT's forward with ``adapter_names``, and generation by each adapter alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from live_models import bytes_of, load
from peer_models import BaseOf, inputs, load_model, load_peft, save_adapter
from peft import IA3Config, LoraConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

import loreg
from loreg import serving
from loreg.errors import Unsupported
from tests.peers.variants.experts import mixtral
from tests.peers.variants.models import IDS, llama, randomise

CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama": (["q_proj", "v_proj", "down_proj", "lm_head", "embed_tokens"], {"rank_pattern": {"q_proj": 7}}),
    "gpt2": (["c_attn", "attn.c_proj", "wte"], {"use_rslora": True}),
    "gpt2-hub": (["c_attn", "mlp.c_fc"], {"alpha_pattern": {"c_attn": 3}}),
    "roberta": (["query", "value", "word_embeddings"], {}),
}


BENT: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "DoRA, bias='lora_only'": {"use_dora": True, "bias": "lora_only"},
    "bias='all'": {"bias": "all"},
    "lora_bias": {"lora_bias": True},
}


@pytest.fixture
def made(base_of: BaseOf, registry: loreg.Registry, tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Path]]]:
    """Pushes three adapters for a family: of two ranks, and one with fewer targets; or with ``bent``, of which the
    first is of that kind."""

    def make(family: str, bent: str | None = None) -> tuple[Path, dict[str, Path]]:
        base = base_of(family, "fp32")
        registry.add_base(base, "base")
        targets, more = CASES[family]
        if bent == "lora_bias":  # not of embeddings, nor of what has no bias
            targets = [name for name in targets if name not in ("wte", "word_embeddings")]
        folders = {}
        for seed, (name, rank, which) in enumerate(
            (("one", 4, targets), ("two", 2, targets[:1]), ("three", 3, targets)), 1
        ):
            options = {**more, **(BENT[bent] if bent is not None and name == "one" else {})}
            folders[name] = save_adapter(
                family, base, tmp_path / name, "fp32", seed, target_modules=which, r=rank, lora_alpha=7, **options
            )
            registry.push(folders[name], base="base", name=name)
        return base, folders

    return make


@pytest.mark.parametrize("family", CASES)
def test_outputs_are_those_of_pefts_mixed_batches(family: str, made: Any, registry: loreg.Registry) -> None:
    base, folders = made(family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = load_peft(family, base, folders, torch.float32).double()
    model = load_model(family, base, torch.float32).double()
    before = bytes_of(model)
    ids = inputs()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), serving.unmerged(model, list(folders), registry, check="none") as mixed:
        for rows in ([0, 1, 2, None], [2, 2, 0, 1], [None, None, 1, 1], [None] * 4):
            names = ["__base__" if row is None else list(folders)[row] for row in rows]
            expected = peft(**batch, adapter_names=names)[0]
            with mixed.rows(rows):
                found = model(**batch)[0]
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert bytes_of(model) == before


_WITH = [(family, bent) for family in CASES for bent in BENT if (family, bent) != ("llama", "lora_bias")]


@pytest.mark.parametrize(("family", "bent"), _WITH)
@torch.no_grad()
def test_rows_with_dora_and_trained_biases(
    family: str, bent: str, made: Any, registry: loreg.Registry, tmp_path: Path
) -> None:
    """PEFT mixes no such rows, so each is by a model that has one adapter; and beside it the model that is merged."""
    base, folders = made(family, bent)
    batch = {"input_ids": inputs(), "attention_mask": torch.ones_like(inputs())}
    expected, merged = {}, {}
    for name, folder in folders.items():
        expected[name] = load_peft(family, base, {name: folder}, torch.float32).double()(**batch)[0]
        registry.merge(name, out=tmp_path / f"merged-{name}")
        merged[name] = load_model(family, tmp_path / f"merged-{name}", torch.float32).double()(**batch)[0]
    model = load_model(family, base, torch.float32).double()
    expected["base"] = merged["base"] = model(**batch)[0]
    before = bytes_of(model)
    with serving.unmerged(model, list(folders), registry, check="none") as mixed:
        for rows in (["one", "two", "base", "three"], ["three", "one", "one", "base"], ["one"] * 4, ["two"] * 4):
            with mixed.rows([None if name == "base" else name for name in rows]):
                found = model(**batch)[0]
            truth, other = (torch.stack([of[name][n] for n, name in enumerate(rows)]) for of in (expected, merged))
            assert (found - truth).abs().max() <= 1e-12 * truth.abs().max()
            # W' is rounded once to float32, by 2⁻²⁴ of itself, which the layers add up; the rest is float64.
            assert (found - other).abs().max() <= 32 * 2**-24 * truth.abs().max()
    assert bytes_of(model) == before


@pytest.mark.parametrize("family", CASES)
def test_what_is_loaded_is_what_peft_adds_to_each_weight(family: str, made: Any, registry: loreg.Registry) -> None:
    """scale·BA is of the layer, (out, in), also where the weight is stored the other way round."""
    base, folders = made(family)
    peft = load_peft(family, base, folders, torch.float32)
    for name in folders:
        loaded, seen = serving.load(name, registry), set()
        for path, module in peft.base_model.model.named_modules():
            if isinstance(module, LoraLayer) and name in module.r:
                A, B, scale = loaded[path]
                expected = module.get_delta_weight(name).double()
                turned = isinstance(module.get_base_layer(), torch.nn.Embedding) or module.fan_in_fan_out
                found = scale * (B.double() @ A.double())
                assert torch.allclose(found.T if turned else found, expected, rtol=1e-5, atol=1e-7)
                seen.add(path)
        assert seen == loaded.keys()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"num_beams": 2, "use_cache": False}],
    ids=str,
)
@pytest.mark.parametrize(("family", "bent"), [("llama", None), ("gpt2-hub", None), ("gpt2-hub", "DoRA")])
def test_generate_gives_each_row_its_adapters_words(
    family: str, bent: str | None, options: dict[str, Any], made: Any, registry: loreg.Registry
) -> None:
    """The weights of each adapter alone are those of a merge, here in the memory of the same model."""
    base, folders = made(family, bent)
    model = load_model(family, base, torch.float32)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    ids = inputs()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    rows = [0, None, 2, 0]
    expected = []
    for n, row in enumerate(rows):
        merged = None if row is None else serving.merge_(model, list(folders)[row], registry)
        alone = {key: value[n : n + 1] if torch.is_tensor(value) else value for key, value in batch.items()}
        expected.append(model.generate(**alone, **options))
        if merged is not None:
            serving.unmerge_(model, merged)
    assert len({tuple(words.flatten().tolist()) for words in expected}) > 2
    with serving.unmerged(model, list(folders), registry) as mixed, mixed.rows(rows):
        found = model.generate(**batch, **options)
    assert torch.equal(found, torch.cat(expected))


def test_an_encoder_and_a_decoder_with_beams(registry: loreg.Registry, tmp_path: Path) -> None:
    """Beams are of the decoder's rows alone."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    base = transformers.T5ForConditionalGeneration(config).eval()
    base.save_pretrained(tmp_path / "base")
    registry.add_base(tmp_path / "base", "base")
    for seed, name in enumerate(("one", "two"), 1):
        adapted = get_peft_model(load(tmp_path / "base"), LoraConfig(target_modules=["q", "v", "wo"], r=3))
        randomise(adapted, seed, 0.3)
        adapted.save_pretrained(tmp_path / name)
        registry.push(tmp_path / name, base="base", name=name)
    model: Any = load(tmp_path / "base")
    ids = torch.randint(1, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    options = {"num_beams": 3, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = []
    for n, name in enumerate(("two", "one", "two")):
        merged = serving.merge_(model, name, registry)
        expected.append(model.generate(input_ids=ids[n : n + 1], **options))
        serving.unmerge_(model, merged)
    with serving.unmerged(model, ["one", "two"], registry) as mixed, mixed.rows(["two", "one", "two"]):
        found = model.generate(input_ids=ids, **options)
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]], ids=str)
def test_a_head_that_is_its_embedding(
    targets: list[str], together: bool, dora: bool, registry: loreg.Registry, tmp_path: Path
) -> None:
    """What an adapter adapts of the two, is adapted: one, or both. A load has no name for the second."""
    base = llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=targets, ensure_weight_tying=together, use_dora=dora)
    )
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="adapter")
    peft = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").double().eval()
    model: Any = load(tmp_path / "base").double()
    with torch.no_grad():
        expected = peft(input_ids=IDS).logits
        with serving.unmerged(model, ["adapter"], registry, check="none") as mixed, mixed.rows([0, 0]):
            found = model(input_ids=IDS).logits
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    if dora:
        with pytest.raises(Unsupported, match=r"in a way that depends on the base's weight \(DoRA"):
            serving.load("adapter", registry)
    elif together:
        with pytest.raises(Unsupported, match=r"adapts 'model.embed_tokens', and with it 'lm_head.weight'"):
            serving.load("adapter", registry)
    else:
        assert serving.load("adapter", registry)


@pytest.mark.parametrize("bent", [None, "DoRA"])
def test_a_compiled_model(made: Any, bent: str | None, registry: loreg.Registry) -> None:
    """Its graph breaks at the layers that are adapted; rows may change without another compilation of the rest."""
    base, folders = made("llama", bent)
    model = load_model("llama", base, torch.float32)
    compiled = torch.compile(model, backend="aot_eager")
    batch = {"input_ids": inputs(), "use_cache": False}
    with torch.no_grad(), serving.unmerged(model, list(folders), registry) as mixed:
        for rows in ([0, 1, 2, None], [2, 2, 0, 1]):
            with mixed.rows(rows):
                expected, found = model(**batch)[0], compiled(**batch)[0]
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def _refused(base: Any, registry: loreg.Registry, folder: Path, words: str, config: PeftConfig) -> None:
    base.save_pretrained(folder / "base")
    adapted = get_peft_model(base, config)
    randomise(adapted)
    adapted.save_pretrained(folder / "adapter")
    registry.push(folder / "adapter", base=folder / "base", name="adapter")
    model = load(folder / "base")
    with pytest.raises(Unsupported, match=words):
        serving.unmerged(model, ["adapter"], registry)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (OFTConfig(target_modules=["q_proj"], oft_block_size=4), "oft"),
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "ia3"),
    ],
)
def test_what_edits_the_weight_by_its_own_values(
    config: PeftConfig, form: str, registry: loreg.Registry, tmp_path: Path
) -> None:
    words = (
        rf"adapter:v1 changes .*_proj' by what cannot be added to its outputs \('{form}' edits the weight by its own"
    )
    _refused(llama(), registry, tmp_path, words, config)


def test_modules_to_save(registry: loreg.Registry, tmp_path: Path) -> None:
    words = r"adapter:v1 replaces 'lm_head.weight'"
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    _refused(llama(), registry, tmp_path, words, config)


def test_a_bias_that_is_of_no_layer(registry: loreg.Registry, tmp_path: Path) -> None:
    words = r"'lm_head.(decoder.)?bias' is 'lm_head.bias' of the model, of a RobertaLMHead, whose outputs cannot be"
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    base = transformers.RobertaForMaskedLM(config)
    _refused(base, registry, tmp_path, words, LoraConfig(target_modules=["query"], bias="all"))


def test_experts(registry: loreg.Registry, tmp_path: Path) -> None:
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    words = r"experts.*whose outputs cannot be added to: expected"
    _refused(mixtral(), registry, tmp_path, words, LoraConfig(r=2, target_modules=[], target_parameters=parameters))


def test_an_attention_that_reads_its_weights_itself(registry: loreg.Registry, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    model.add_module("attention", torch.nn.MultiheadAttention(16, 4, batch_first=True))
    from safetensors.torch import save_file

    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    adapted = get_peft_model(model, LoraConfig(target_modules=["attention"], r=2))
    randomise(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    registry.push(tmp_path / "adapter", base=tmp_path / "base", name="adapter")
    plain = torch.nn.Sequential()
    plain.add_module("attention", torch.nn.MultiheadAttention(16, 4, batch_first=True))
    with pytest.raises(Unsupported, match=r"attention\.(in_proj|out_proj).*whose outputs cannot be added to"):
        serving.unmerged(plain, ["adapter"], registry, check="none")
