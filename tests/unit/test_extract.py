"""Extracting an adapter from two checkpoints, and resizing one: what is stored of each tensor, what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from refusal import refused

import loreg
from loreg.cli import main
from loreg.errors import BadInput, LoregError, NotFound, Unsupported, UsageError
from loreg.format.manifest import Tie
from loreg.registry.extracting import Extracted
from loreg.registry.room import Room

ROWS, COLS, WORDS, RANK = 24, 20, 40, 2
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GPT2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
TIED = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "tie_word_embeddings": True,
    "vocab_size": WORDS,
}


def low_rank(seed: int, *shape: int, rank: int = RANK, stack: int | None = None) -> np.ndarray:
    """Products of small integers: with integers for weights, every sum below is exact, and none is zero."""
    rng = np.random.default_rng(seed)
    lead = () if stack is None else (stack,)
    return rng.integers(-2, 3, (*lead, shape[0], rank)) @ rng.integers(-2, 3, (*lead, rank, *shape[1:]))


def weights(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 60, shape).astype(float)


def plus(tensor: tiny.Tensor, delta: np.ndarray) -> tiny.Tensor:
    return tiny.tensor(tensor.dtype, tensor.values + delta.reshape(tensor.shape))


def llama(dtype: str = "BF16") -> dict[str, tiny.Tensor]:
    shapes = {EMBED: (WORDS, COLS), f"{tiny.Q}.weight": (ROWS, COLS), f"{tiny.Q}.bias": (ROWS,)}
    shapes |= {f"{tiny.V}.weight": (COLS, COLS), tiny.NORM: (COLS,), HEAD: (WORDS, COLS)}
    found = {name: tiny.tensor(dtype, weights(i, *shape)) for i, (name, shape) in enumerate(shapes.items())}
    return {**found, "model.positions": tiny.tensor("I64", np.arange(5)[None])}


class Desk:
    """A registry, and the directories of a base and of what became of it."""

    def __init__(self, registry: loreg.Registry, folder: Path) -> None:
        self.registry, self.folder = registry, folder

    def base(self, tensors: tiny.Tensors, **options: Any) -> None:
        tiny.write_model(self.folder / "base", tensors, **options)

    def tuned(self, tensors: tiny.Tensors, **options: Any) -> None:
        tiny.write_model(self.folder / "tuned", tensors, **options)

    def extract(self, **options: Any) -> Extracted:
        options = options or {"energy": 1.0}
        return self.registry.extract(self.folder / "base", self.folder / "tuned", "found", **options)

    def merged(self, out: str = "merged") -> dict[str, tiny.Tensor]:
        result = self.registry.merge("found", self.folder / out, verify="exact")
        assert result.verification.ok
        return tiny.tensors_in(self.folder / out)


@pytest.fixture
def desk(registry: loreg.Registry, tmp_path: Path) -> Desk:
    return Desk(registry, tmp_path)


def ranks(found: Extracted) -> dict[str, int | None]:
    return {tensor.name: tensor.rank for tensor in found.tensors}


# What is stored of each tensor.


def test_matrices_become_factors_and_the_rest_is_replaced(desk: Desk) -> None:
    before = llama()
    after = dict(before)
    for seed, name in enumerate((EMBED, f"{tiny.Q}.weight", f"{tiny.V}.weight", HEAD)):
        after[name] = plus(before[name], low_rank(seed, *before[name].shape))
    for name in (f"{tiny.Q}.bias", tiny.NORM):
        after[name] = plus(before[name], np.arange(len(before[name].values)) % 3)
    desk.base(before)
    desk.tuned(after, shards=[[EMBED, tiny.NORM], [name for name in after if name not in (EMBED, tiny.NORM)]])
    found = desk.extract()
    vectors = {f"{tiny.Q}.bias": None, tiny.NORM: None}
    assert ranks(found) == {EMBED: 2, f"{tiny.Q}.weight": 2, f"{tiny.V}.weight": 2, HEAD: 2} | vectors
    modules = found.version.manifest.modules
    assert {path: (module.kind, module.orientation) for path, module in modules.items()} == {
        "model.embed_tokens": ("embedding", "in_out"),
        tiny.Q: ("linear", "out_in"),
        tiny.V: ("linear", "out_in"),
        "lm_head": ("linear", "out_in"),
    }
    assert (modules["model.embed_tokens"].in_features, modules["model.embed_tokens"].out_features) == (WORDS, COLS)
    assert all(term.A.dtype == "F32" for module in modules.values() for term in module.terms)
    assert found.relative_error < 2.0**-22 and found.left_out == ()
    assert desk.merged() == after
    training = found.version.manifest.provenance.training
    root = desk.registry.bases.find(desk.folder / "tuned", lambda done: None).manifest.identity.weights_root
    assert training == {
        "method": "extract", "rank": None, "energy": 1, "tuned": str(root), "targets": [], "exclude": []
    }  # fmt: skip


def test_a_difference_whose_factors_are_no_smaller_is_replaced(desk: Desk) -> None:
    """Rank r of (m, n) is worth it while r·(m + n) < m·n: for 24×20 up to 10."""
    before = llama()
    name = f"{tiny.Q}.weight"
    desk.base(before)
    for rank, expected in ((10, 10), (11, None)):
        rng = np.random.default_rng(rank)
        left = np.eye(ROWS, rank) @ np.diag(rng.permutation(np.arange(1, rank + 1)))
        after = {**before, name: plus(before[name], left @ np.eye(rank, COLS))}
        desk.tuned(after)
        assert ranks(desk.extract()) == {name: expected}
        assert desk.merged(f"merged-{rank}") == after


def test_conv1d_keeps_the_orientation_and_the_names_of_the_whole_model(desk: Desk) -> None:
    """GPT-2 on the Hub has no prefix, and stores (in, out); what is saved after training has one."""
    before = {
        "wte.weight": tiny.tensor("F32", weights(0, WORDS, COLS)),
        "h.0.attn.c_attn.weight": tiny.tensor("F32", weights(1, COLS, 3 * COLS)),
        "h.0.attn.c_proj.weight": tiny.tensor("F32", weights(2, COLS, COLS)),
        "h.0.attn.c_proj.bias": tiny.tensor("F32", weights(3, COLS)),
    }
    deltas = {name: low_rank(i, *before[name].shape) for i, name in enumerate(before) if name.endswith("weight")}
    after = {name: plus(before[name], deltas[name]) if name in deltas else before[name] for name in before}
    desk.base(before, config=GPT2)
    desk.tuned({f"transformer.{name}": tensor for name, tensor in after.items()}, config=GPT2)
    found = desk.extract()
    modules = found.version.manifest.modules
    assert {path: (module.tensor, module.kind) for path, module in modules.items()} == {
        "transformer.wte": ("wte.weight", "embedding"),
        "transformer.h.0.attn.c_attn": ("h.0.attn.c_attn.weight", "conv1d"),
        "transformer.h.0.attn.c_proj": ("h.0.attn.c_proj.weight", "conv1d"),
    }
    for path, delta in desk.registry.load("found").items():
        assert np.allclose(delta.dense(), deltas[modules[path].tensor], atol=1e-5)
        A, B = modules[path].terms[0].A.shape, modules[path].terms[0].B.shape
        assert (A[1], B[0]) == before[modules[path].tensor].shape  # (in, out), as it is stored
    assert desk.merged() == after


def test_convolutions_and_stacks_of_experts_keep_their_shapes(desk: Desk) -> None:
    conv, stack = "conv_in.weight", "model.layers.0.mlp.experts.down_proj"
    before = {
        conv: tiny.tensor("F32", weights(0, 16, 8, 3, 3)),
        stack: tiny.tensor("F32", weights(1, 3, ROWS, COLS)),
    }
    experts = low_rank(3, ROWS, COLS, rank=3, stack=3)
    experts[1] = low_rank(4, ROWS, COLS, rank=1)
    experts[2] = 0
    after = {conv: plus(before[conv], low_rank(2, 16, 72)), stack: plus(before[stack], experts)}
    desk.base(before)
    desk.tuned(after)
    found = desk.extract()
    modules = found.version.manifest.modules
    assert {path: (module.kind, module.stored, module.rank) for path, module in modules.items()} == {
        "conv_in": ("conv", (16, 8, 3, 3), 2),
        stack: ("experts", (3, ROWS, COLS), 3),
    }
    assert found.relative_error < 2.0**-22
    assert desk.merged() == after


def test_new_tensors_and_more_words_are_stored_whole(desk: Desk) -> None:
    before = llama("F16")
    longer = np.vstack([before[EMBED].values, weights(9, 3, COLS)])
    after = {**before, EMBED: tiny.tensor("F16", longer), HEAD: tiny.tensor("F16", longer + 1)}
    after["score.weight"] = tiny.tensor("F32", weights(8, 2, COLS))
    desk.base(before, config={**tiny.CONFIG, "vocab_size": WORDS})
    desk.tuned(after)
    found = desk.extract(rank=1)
    assert ranks(found) == {EMBED: None, HEAD: None, "score.weight": None}
    assert found.relative_error == 0 and not found.version.manifest.modules
    assert desk.merged() == after
    assert json.loads((desk.folder / "merged" / "config.json").read_text())["vocab_size"] == WORDS + 3


def test_the_rank_bounds_every_module_and_the_error_is_told(desk: Desk) -> None:
    before = llama("F32")
    names = [f"{tiny.Q}.weight", f"{tiny.V}.weight"]
    deltas = {name: np.random.default_rng(i).normal(0, 1, before[name].shape) for i, name in enumerate(names)}
    after = {**before, **{name: plus(before[name], deltas[name]) for name in names}}
    desk.base(before)
    desk.tuned(after)
    found = desk.extract(rank=3)
    assert ranks(found) == dict.fromkeys(names, 3) and found.version.manifest.rank == 3
    lost = total = 0.0
    for tensor in found.tensors:
        sigma = np.linalg.svd(after[tensor.name].values - before[tensor.name].values, compute_uv=False)
        assert tensor.relative_error == pytest.approx(np.linalg.norm(sigma[3:]) / np.linalg.norm(sigma), rel=1e-6)
        lost, total = lost + sum(sigma[3:] ** 2), total + sum(sigma**2)
    assert found.relative_error == pytest.approx(np.sqrt(lost / total), rel=1e-6)


# Head and embedding.


def tied(**more: tiny.Tensor) -> dict[str, tiny.Tensor]:
    """A model whose head is its embedding; with ``head`` it stores one."""
    found = {name: tensor for name, tensor in llama().items() if name != HEAD}
    return found | ({HEAD: more["head"]} if more else {})


def test_a_tied_embedding_stays_tied(desk: Desk) -> None:
    before = tied()
    after = {**before, EMBED: plus(before[EMBED], low_rank(1, WORDS, COLS))}
    desk.base(before, config=TIED)
    desk.tuned(after, config=TIED)
    found = desk.extract()
    assert ranks(found) == {EMBED: 2}
    assert found.version.manifest.ties == {HEAD: Tie(EMBED, untied=False)}
    assert desk.merged() == after


def test_a_head_that_is_stored_twice_and_then_once_is_one(desk: Desk) -> None:
    before = tied(head=tied()[EMBED])
    after = {**tied(), EMBED: plus(before[EMBED], low_rank(1, WORDS, COLS))}
    desk.base(before, config=TIED)
    desk.tuned(after, config=TIED)
    assert ranks(desk.extract()) == {EMBED: 2}
    assert desk.merged() == {**after, HEAD: after[EMBED]}


def test_a_head_that_was_trained_by_itself_is_untied(desk: Desk) -> None:
    before = tied()
    after = {**before, HEAD: plus(before[EMBED], low_rank(1, WORDS, COLS))}
    desk.base(before, config=TIED)
    desk.tuned(after, config={**TIED, "tie_word_embeddings": False})
    found = desk.extract()
    assert ranks(found) == {HEAD: 2}
    assert found.version.manifest.ties == {HEAD: Tie(EMBED, untied=True)}
    assert desk.merged() == after
    assert json.loads((desk.folder / "merged" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_training_tied_has_what_its_embedding_has(desk: Desk) -> None:
    before = llama()
    after = {**tied(), EMBED: plus(before[HEAD], low_rank(1, WORDS, COLS))}
    desk.base(before, config={**TIED, "tie_word_embeddings": False})
    desk.tuned(after, config=TIED)
    assert ranks(desk.extract()) == {EMBED: None, HEAD: 2}
    assert desk.merged() == {**after, HEAD: after[EMBED]}


def test_a_module_beside_a_tied_embedding_touches_neither(desk: Desk) -> None:
    before = tied()
    name = f"{tiny.Q}.weight"
    desk.base(before, config=TIED)
    desk.tuned({**before, name: plus(before[name], low_rank(1, ROWS, COLS))}, config=TIED)
    assert desk.extract().version.manifest.ties == {}


# Dtypes.


def test_a_wider_copy_counts_by_its_values(desk: Desk) -> None:
    """Trained and saved in float32 from a bfloat16 base: only what was trained differs."""
    before = llama("BF16")
    wide = {n: t if t.dtype == "I64" else tiny.tensor("F32", t.values) for n, t in before.items()}
    name = f"{tiny.Q}.weight"
    wide[name] = plus(wide[name], low_rank(1, ROWS, COLS) + 0.0)
    wide[tiny.NORM] = plus(wide[tiny.NORM], np.full(COLS, 2.0**-12))
    desk.base(before)
    desk.tuned(wide)
    assert ranks(desk.extract()) == {name: 2, tiny.NORM: None}
    merged = desk.merged()
    assert merged[name] == tiny.tensor("BF16", wide[name].values)
    assert merged[tiny.NORM] == before[tiny.NORM]  # in bfloat16 it is the same


def test_a_narrower_copy_counts_by_what_is_more_than_its_rounding(desk: Desk) -> None:
    rng = np.random.default_rng(0)
    before = {n: t if t.dtype == "I64" else tiny.normal(rng, "F32", *t.shape) for n, t in llama().items()}
    narrow = {n: t if t.dtype == "I64" else tiny.tensor("BF16", t.values) for n, t in before.items()}
    desk.base(before)
    desk.tuned(narrow)
    with pytest.raises(UsageError, match="the values of 'base' in every tensor"):
        desk.extract()
    name = f"{tiny.Q}.weight"
    narrow[name] = tiny.tensor("BF16", before[name].values + low_rank(1, ROWS, COLS))
    desk.tuned(narrow)
    found = desk.extract(rank=2)
    assert ranks(found) == {name: 2} and 0 < found.relative_error < 2.0**-7


def test_integers_are_replaced(desk: Desk) -> None:
    before = llama()
    after = {**before, "model.positions": tiny.tensor("I64", np.arange(5)[None] + 1)}
    desk.base(before)
    desk.tuned(after)
    assert ranks(desk.extract(rank=1)) == {"model.positions": None}
    assert desk.merged() == after


# What is asked for.


def changed() -> tuple[dict[str, tiny.Tensor], dict[str, tiny.Tensor]]:
    before = llama()
    names = (EMBED, f"{tiny.Q}.weight", f"{tiny.V}.weight")
    after = {**before, **{n: plus(before[n], low_rank(i, *before[n].shape)) for i, n in enumerate(names)}}
    return before, {**after, f"{tiny.Q}.bias": plus(before[f"{tiny.Q}.bias"], np.ones(ROWS))}


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q_proj"], [], [f"{tiny.Q}.weight"]),
        (["q_proj.*"], [], [f"{tiny.Q}.bias", f"{tiny.Q}.weight"]),
        (["*_proj"], [], [f"{tiny.Q}.weight", f"{tiny.V}.weight"]),
        (["layers.0.*"], ["v_proj"], [f"{tiny.Q}.bias", f"{tiny.Q}.weight"]),
        ([], ["embed_tokens", "bias"], [f"{tiny.Q}.weight", f"{tiny.V}.weight"]),
        ([f"{tiny.V}.weight", EMBED], [], [f"{tiny.V}.weight", EMBED]),
    ],
)
def test_patterns_choose_tensors(desk: Desk, targets: list[str], exclude: list[str], expected: list[str]) -> None:
    before, after = changed()
    desk.base(before)
    desk.tuned(after)
    found = desk.extract(energy=1.0, targets=targets, exclude=exclude)
    assert sorted(ranks(found)) == sorted(expected)
    everything = {name for name in before if before[name] != after[name]}
    assert set(found.left_out) == everything - set(expected)
    assert desk.merged() == {name: (after if name in expected else before)[name] for name in before}


def test_what_the_tuned_model_lacks_can_be_left_out(desk: Desk) -> None:
    """GPT-2's file on the Hub holds the masks of its attention, which is not saved any more."""
    before, after = changed()
    del after["model.positions"]
    desk.base(before)
    desk.tuned(after)
    with pytest.raises(BadInput, match=r"has no 'model.positions', which 'base' has .*--exclude"):
        desk.extract()
    found = desk.extract(energy=1.0, exclude=["positions"])
    assert found.left_out == ("model.positions",)
    assert desk.merged() == {**after, "model.positions": before["model.positions"]}


# What is refused, with nothing stored.


def spoilt(name: str, value: float, model: Mapping[str, tiny.Tensor]) -> dict[str, tiny.Tensor]:
    values = np.array(model[name].values, copy=True)
    values.reshape(-1)[3] = value
    words = values.astype("<f4")
    return {**model, name: tiny.Tensor("F32", values.shape, words.tobytes())}


def quantised(model: Mapping[str, tiny.Tensor]) -> dict[str, tiny.Tensor]:
    name = f"{tiny.Q}.weight"
    return {**model, name: tiny.tensor("U8", np.zeros((ROWS, COLS)))}


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (dict, {}, UsageError, "the values of 'base' in every tensor: there is nothing to extract"),
        (None, {"rank": 0}, UsageError, "rank"),
        (None, {"rank": 1, "energy": 1.5}, UsageError, "energy"),
        (None, {"energy": float("nan")}, UsageError, "energy"),
        (None, {"targets": ["lm_head"], "rank": 1}, UsageError, "only in what was not asked for"),
        (None, {"targets": ["qproj"], "rank": 1}, UsageError, "--target 'qproj' fits no tensor"),
        (None, {"exclude": [""], "rank": 1}, UsageError, "--exclude '' fits no tensor"),
        (None, {"rank": 1, "device": "tpu"}, UsageError, "'tpu'"),
        (lambda m: spoilt(tiny.NORM, np.nan, m), {}, BadInput, r"tuned.*NaN or infinity in 'model.norm.weight'"),
        (lambda m: spoilt(f"{tiny.Q}.weight", np.inf, m), {}, BadInput, "NaN or infinity in .*q_proj.weight'"),
        (lambda m: spoilt("model.extra", np.nan, {**m, "model.extra": m[tiny.NORM]}), {}, BadInput, "'model.extra'"),
        (quantised, {}, Unsupported, "q_proj.weight' is stored as BF16 in the base and as U8"),
        (lambda m: {n: t for n, t in m.items() if n != EMBED}, {}, BadInput, "has no 'model.embed_tokens.weight'"),
    ],
)
def test_refusals(desk: Desk, change: Any, options: dict[str, Any], error: type[LoregError], message: str) -> None:
    before, after = changed()
    desk.base(before)
    desk.tuned(change(before) if change else after)
    with refused(desk.registry, desk.folder / "out", error, message, error.exit_code):
        desk.extract(**({"rank": 2} | options))


def test_neither_rank_nor_energy(desk: Desk) -> None:
    before, after = changed()
    desk.base(before)
    desk.tuned(after)
    with refused(desk.registry, desk.folder / "out", UsageError, "neither rank nor energy", 2):
        desk.registry.extract(desk.folder / "base", desk.folder / "tuned", "found")


def test_a_base_that_is_damaged(desk: Desk) -> None:
    before, after = changed()
    desk.base(spoilt(f"{tiny.Q}.weight", np.nan, before))
    desk.tuned(after)
    with refused(desk.registry, desk.folder / "out", BadInput, "base.*NaN or infinity", 5):
        desk.extract()


def test_an_orientation_is_not_guessed(desk: Desk) -> None:
    before = {"h.0.attn.c_proj.weight": tiny.tensor("F32", weights(0, COLS, COLS))}
    desk.base(before, config={})
    desk.tuned({name: plus(tensor, low_rank(1, COLS, COLS)) for name, tensor in before.items()})
    with refused(desk.registry, desk.folder / "out", Unsupported, r"\(in, out\), as GPT-2's do", 5):
        desk.extract()


def test_models_that_are_not_there_and_files_that_change(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = changed()
    desk.base(before)
    with pytest.raises(NotFound, match="tuned does not exist"):
        desk.extract()
    desk.tuned(after)
    (desk.folder / "sql").mkdir()
    tiny.write_adapter(desk.folder / "sql", tiny.adapter())
    with pytest.raises(BadInput, match="holds an adapter"):
        desk.registry.extract(desk.folder / "base", desk.folder / "sql", "found", rank=1)

    from loreg.registry import extracting

    def late(*arguments: Any) -> Iterable[Any]:
        yield from found(*arguments)
        with (desk.folder / "tuned" / "model.safetensors").open("ab") as file:
            file.write(b"\0")

    found = extracting.differences
    monkeypatch.setattr(extracting, "differences", late)
    with pytest.raises(BadInput, match="was changed while it was read"):
        desk.extract()
    assert desk.registry.list_versions() == []


# How it is computed.


def test_the_same_version_whatever_the_threads(desk: Desk) -> None:
    rng = np.random.default_rng(0)
    before = {f"model.layers.{i}.mlp.up_proj.weight": tiny.normal(rng, "F32", 96, 64) for i in range(5)}
    desk.base(before)
    desk.tuned({name: plus(tensor, rng.normal(0, 0.1, tensor.shape)) for name, tensor in before.items()})
    digests, threads = set(), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            digests.add(desk.extract(rank=5).version.digest)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


def test_no_more_is_held_than_there_is_room_for() -> None:
    room, held, most = Room(10), [0], [0]
    lock = threading.Lock()

    def work(count: int) -> None:
        with room.of(count):
            with lock:
                held[0] += count
                most[0] = max(most[0], held[0])
            threading.Event().wait(0.005)
            with lock:
                held[0] -= count

    threads = [threading.Thread(target=work, args=(count,)) for count in (5, 4, 3, 5, 1, 2, 5, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 5 < most[0] <= 10 and room.left == 10


# The original library.


def test_peft_loads_what_was_extracted_from_its_own_merge(desk: Desk) -> None:
    """GPT-2 with trained Conv1D layers, square ones too, and a trained position embedding."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24, "vocab_size": 40}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).eval()
    model.save_pretrained(desk.folder / "base")
    targets = ["c_attn", "c_proj", "wpe"]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False, fan_in_fan_out=True)
    trained = get_peft_model(model, config).eval()
    inputs = torch.randint(40, (3, 20))
    with torch.no_grad():
        expected = trained(input_ids=inputs).logits
    trained.merge_and_unload().save_pretrained(desk.folder / "tuned")
    found = desk.extract(rank=2)
    assert found.version.manifest.rank == 2 and found.relative_error < 1e-5
    desk.registry.export("found", desk.folder / "peft", format="peft")
    base = GPT2LMHeadModel.from_pretrained(desk.folder / "base")
    loaded = PeftModel.from_pretrained(base, desk.folder / "peft").eval()
    with torch.no_grad():
        found_logits = loaded(input_ids=inputs).logits
        base_logits = GPT2LMHeadModel.from_pretrained(desk.folder / "base").eval()(input_ids=inputs).logits
    scale = float((expected - base_logits).abs().max())
    assert scale > 0.1 and float((found_logits - expected).abs().max()) < 1e-4 * scale


# Resizing.


def dense(folder: Path, path: str, alpha: float = 16) -> np.ndarray:
    """ΔW of a module of an adapter's directory, in float64."""
    tensors = tiny.tensors_in(folder)
    A, B = (tensors[f"base_model.model.{path}.lora_{end}.weight"].values.astype(np.float64) for end in ("A", "B"))
    return alpha / len(A) * B @ A


def test_resize_is_svd_of_the_one_and_tells_the_error_of_each_module(pushed: loreg.Registry, tmp_path: Path) -> None:
    found = pushed.resize("sql", "small", rank=1)
    assert found.version.digest == pushed.compose("sql", "other", method="svd", rank=1).version.digest
    lost = total = 0.0
    for module in found.modules:
        sigma = np.linalg.svd(dense(tmp_path / "sql", module.path), compute_uv=False)
        assert (module.before, module.after) == (2, 1)
        assert module.relative_error == pytest.approx(sigma[1] / np.linalg.norm(sigma), rel=1e-6)
        lost, total = lost + sum(sigma[1:] ** 2), total + sum(sigma**2)
    assert [module.path for module in found.modules] == [tiny.Q, tiny.V]
    assert found.relative_error == pytest.approx(np.sqrt(lost / total), rel=1e-6)
    assert found.version.manifest.provenance.parents == (pushed.resolve("sql").digest,)


def test_a_resized_version_is_the_next_of_its_name(pushed: loreg.Registry) -> None:
    first = pushed.resolve("sql")
    found = pushed.resize("sql:v1", energy=0.5, tags=["small"], note="halved")
    assert str(found.version) == "sql:v2" and found.version.created
    assert pushed.resolve("sql").digest == pushed.resolve("sql:small").digest == found.version.digest
    assert pushed.resolve("sql:v1").digest == first.digest
    assert {module.after for module in found.modules} == {1}
    # A rank that is not reached loses nothing but the rounding of the factors to float32.
    whole = pushed.resize("humor", rank=5)
    assert {(module.before, module.after) for module in whole.modules} == {(3, 3)}
    assert 0 < whole.relative_error < 2.0**-22


def test_what_cannot_be_resized(pushed: loreg.Registry, tmp_path: Path) -> None:
    with refused(pushed, tmp_path / "out", UsageError, "neither rank nor energy", 2):
        pushed.resize("sql")
    with refused(pushed, tmp_path / "out", UsageError, "rank", 2):
        pushed.resize("sql", rank=0)
    with refused(pushed, tmp_path / "out", NotFound, "poems", 3):
        pushed.resize("poems", rank=1)
    tuned = {**tiny.model(), tiny.NORM: tiny.tensor("BF16", np.arange(6))}
    pushed.extract("base", tiny.write_model(tmp_path / "normed", tuned), "normed", rank=1)
    with refused(pushed, tmp_path / "out", UsageError, "only replaces tensors", 2):
        pushed.resize("normed", rank=1)


# The commands.


def run(home: Path, *arguments: str) -> str:
    result = CliRunner().invoke(main, ["--home", str(home), *arguments])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def test_the_commands_say_what_came_of_it(desk: Desk) -> None:
    before, after = changed()
    desk.base(before)
    desk.tuned(after)
    home = desk.folder / "home"
    given = ("--base", str(desk.folder / "base"), "--tuned", str(desk.folder / "tuned"), "--name", "sql")
    told = run(home, "extract", *given, "--energy", "1", "--exclude", "embed_tokens", "--tag", "prod", "-m", "why")
    assert "sql:v1" in told and "replaced        1 tensor" in told and "left out        1 tensor" in told
    found = json.loads(run(home, "extract", *given, "--energy", "1", "--exclude", "embed_tokens", "--json"))
    assert (found["name"], found["version"], found["created"], found["rank"]) == ("sql", 1, False, 2)
    assert found["left_out"] == [EMBED] and 0 < found["relative_error"] < 2.0**-22
    rows = {row["name"]: row for row in found["tensors"]}
    assert {name: row["rank"] for name, row in rows.items()} == {
        f"{tiny.Q}.bias": None, f"{tiny.Q}.weight": 2, f"{tiny.V}.weight": 2
    }  # fmt: skip
    assert rows[f"{tiny.Q}.bias"]["relative_error"] == 0 < rows[f"{tiny.Q}.weight"]["relative_error"]

    told = run(home, "resize", "sql:prod", "--rank", "1", "--name", "small")
    assert "small:v1" in told
    lines = [line.split() for line in told.splitlines()]
    assert ["MODULE", "FROM", "TO", "ERROR"] in lines
    assert [line[:3] for line in lines[-2:]] == [[tiny.Q, "2", "1"], [tiny.V, "2", "1"]]
    small = json.loads(run(home, "resize", "sql:prod", "--rank", "1", "--name", "small", "--json"))
    assert (small["version"], small["rank"], small["created"]) == (1, 1, False)
    assert [(row["path"], row["from"], row["rank"]) for row in small["resized"]] == [(tiny.Q, 2, 1), (tiny.V, 2, 1)]
    assert 0 < small["relative_error"] < 1
