"""A thousand swaps in transformers' models, and at the end every parameter is what it was, bit for bit."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import bytes_of, load
from peft import LoraConfig, get_peft_model

import loreg
from loreg import serving
from tests.peers.variants.experts import mixtral
from tests.peers.variants.models import gpt2, llama, randomise

SWAPS, ADAPTERS = 1000, 10
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LORA: dict[str, tuple[Any, dict[str, Any]]] = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "attn.c_proj", "c_fc"]}),
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "mixtral": (
        mixtral,
        {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


def pushed(kind: str, dtype: torch.dtype, registry: loreg.Registry, folder: Path) -> Any:
    """A model, and ten adapters of its base, of ranks 1 to 4."""
    make, options = LORA[kind]
    make().to(dtype).save_pretrained(folder / "base")
    registry.add_base(folder / "base", "base")
    for number in range(ADAPTERS):
        adapted = get_peft_model(load(folder / "base"), LoraConfig(r=1 + number % 4, lora_alpha=3, **options))
        randomise(adapted, seed=number)
        adapted.save_pretrained(folder / f"a{number}")
        registry.push(folder / f"a{number}", base="base", name=f"a{number}")
    return load(folder / "base")


def expression(chosen: random.Random) -> str:
    names = chosen.sample(range(ADAPTERS), chosen.choice([1, 1, 1, 2, 3]))
    return " + ".join(f"{chosen.choice(['', '0.5*', '1.7*'])}a{number}" for number in names)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", LORA)
def test_a_thousand_random_swaps(kind: str, dtype: str, registry: loreg.Registry, tmp_path: Path) -> None:
    """At every hundredth the bytes are those of a fresh merge."""
    model = pushed(kind, DTYPES[dtype], registry, tmp_path)
    before = bytes_of(model)
    live = serving.attach(model, registry, keep=32)
    chosen = random.Random(f"{kind}-{dtype}")
    pool = [expression(chosen) for _ in range(24)]
    for number in range(SWAPS):
        live.swap(text := chosen.choice(pool))
        if number % 100 == 0:
            fresh = load(tmp_path / "base")
            serving.merge_(fresh, text, registry, check="none")
            assert bytes_of(model) == bytes_of(fresh) != before, number
    assert live.state.changes == SWAPS
    live.restore()
    assert bytes_of(model) == before


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch, so that a pass gives the same bits in whatever thread it runs."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@torch.no_grad()
def run(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(1, 9)[None]).logits
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", LORA)
def test_eight_threads_read_while_one_swaps(kind: str, registry: loreg.Registry, tmp_path: Path) -> None:
    """What a pass gives, is what one of the states gives: of a mix it would be something else."""
    model = pushed(kind, torch.bfloat16, registry, tmp_path)
    before = bytes_of(model)
    live = serving.attach(model, registry, keep=32)
    pool = [expression(random.Random(number)) for number in range(6)]
    known = [run(model)]
    for text in pool:
        live.swap(text)
        known.append(run(model))
    assert not any(torch.equal(one, other) for one, other in pairwise(known))
    stop, wrong, seen = threading.Event(), list[torch.Tensor](), set[int]()

    def read() -> None:
        while not stop.is_set():
            found = run(model)
            places = [place for place, one in enumerate(known) if torch.equal(found, one)]
            seen.update(places)
            if not places:
                wrong.append(found)

    readers = [threading.Thread(target=read) for _ in range(8)]
    for reader in readers:
        reader.start()
    for number in range(100):
        live.swap(pool[number % len(pool)])
    stop.set()
    for reader in readers:
        reader.join()
    live.restore()
    assert not wrong and len(seen) > 1
    assert bytes_of(model) == before
