"""What a serving layer waits for: the factors of an adapter, and a batch in which every row has its own.

A row of the table is a function in ``WORKS``, which yields it.
"""

from __future__ import annotations

import importlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

import loreg
from loreg import serving as library
from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.models import Shape, make_adapter, make_base
from tests.benchmarks.pairs import HEADER, Row, Run, Unmeasured, at_most, compared, in_turn

MIXED = Shape("four layers", 1024, 2816, 4, 16, 4, 4096)
ADAPTERS = 8
TOLERANCE = 1e-4
"""How far the outputs of the two sides may be apart, of the largest: both compute in float32."""


def serving(bench: Bench) -> Lines:
    """Nothing here needs a server."""
    yield from ("## Serving", "", *HEADER)
    for work in WORKS:
        yield from work(bench)


def loads(bench: Bench) -> Iterator[Row]:
    """Of a stored adapter onto the CPU, its file in the page cache, as for who only reads it."""
    shape = bench.disk.shape
    with _registry(bench.scratch / "load", shape, {"sql": 32}) as registry:
        blob = registry.resolve("sql").manifest.blob("factors")
        if blob is None:
            raise Unmeasured("the adapter has no factors")
        path = registry.storage.path(blob.digest)
        size = f"{path.stat().st_size / 1e6:.3g} MB"
        time.sleep(0 if bench.small else 2.1)  # until then its file is not remembered as verified
        with loreg.open(registry.home, strict=True) as strict:
            works = [
                _timed(lambda: library.load("sql", registry)),
                _timed(lambda: library.load("sql", strict)),
                _timed(path.read_bytes),
            ]
            for work in works:
                work()
            loaded, hashed, read = in_turn(4 * bench.runs, works)
    yield compared(f"load of an adapter of {size}", loaded, "reading its file", read, at_most(1.3))
    yield compared(f"load of an adapter of {size}, hashed first", hashed, "reading its file", read)


def batches(bench: Bench) -> Iterator[Row]:
    """A forward of eight rows, each by an adapter of its own, in float32: of a prompt, and of one position."""
    transformers, peft = importlib.import_module("transformers"), importlib.import_module("peft")
    transformers.utils.logging.disable_progress_bar()
    shape = bench.disk.shape if bench.small else MIXED
    names = [f"adapter{number}" for number in range(ADAPTERS)]
    folder = bench.scratch / "mixed"
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        registry = stack.enter_context(_registry(folder, shape, dict.fromkeys(names, 16)))
        ours, theirs = (_model(transformers, shape) for _ in range(2))
        theirs = peft.PeftModel.from_pretrained(theirs, folder / names[0], adapter_name=names[0])
        for name in names[1:]:
            theirs.load_adapter(folder / name, adapter_name=name)
        theirs.eval()
        mixed = stack.enter_context(library.unmerged(ours, names, registry, check="none"))
        stack.enter_context(torch.inference_mode())
        for positions in (32, 1):
            ids = torch.arange(ADAPTERS * positions).reshape(ADAPTERS, positions) % shape.vocabulary

            def by_us(ids: torch.Tensor = ids) -> torch.Tensor:
                with mixed.rows(names):
                    return ours(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

            def by_peft(ids: torch.Tensor = ids) -> torch.Tensor:
                return theirs(input_ids=ids, use_cache=False, adapter_names=names).logits  # type: ignore[no-any-return]

            def by_base(ids: torch.Tensor = ids) -> torch.Tensor:
                with mixed.rows([None] * ADAPTERS):
                    return ours(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]

            found, expected = by_us(), by_peft()
            if not (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
                raise Unmeasured("the outputs differ from PEFT's")
            us, base, other = in_turn(2 * bench.runs, [_timed(by_us), _timed(by_base), _timed(by_peft)])
            what = f"{ADAPTERS} adapters unmerged in a batch, {positions} position{'s' * (positions > 1)} each"
            yield compared(what, us, "PEFT's mixed batch", other, at_most(1))
            yield compared(f"{what}: beside the base", us, "the base alone", base)


WORKS: tuple[Callable[[Bench], Iterator[Row]], ...] = (loads, batches)


def _timed(work: Callable[[], object]) -> Callable[[], Run]:
    def timed() -> Run:
        began = time.perf_counter()
        result = work()
        seconds = time.perf_counter() - began
        del result  # to give memory back is not timed on either side
        return Run(seconds, seconds)

    return timed


@contextmanager
def _registry(folder: Path, shape: Shape, adapters: dict[str, int]) -> Iterator[loreg.Registry]:
    """A registry with adapters of these ranks for a base of zeros, of which only the names and shapes are needed."""
    make_base(folder / "base", shape, sparse=True)
    try:
        with loreg.open(folder / "home") as registry:
            registry.add_base(folder / "base", "base")
            for seed, (name, rank) in enumerate(adapters.items()):
                make_adapter(folder / name, shape, seed, rank=rank)
                registry.push(folder / name, base="base", name=name)
            yield registry
    finally:
        shutil.rmtree(folder)


def _model(transformers: Any, shape: Shape) -> Any:
    """Random weights, the same each time, in float32."""
    torch.manual_seed(0)
    given = {name: value for name, value in shape.config.items() if name not in ("architectures", "dtype")}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**given)).eval()
