"""``svd`` of four rank-16 adapters: factors against PEFT's dense matrix, and every module of a 7B model's shape.

Both have the adapters in memory. Ours is timed over several modules in a row and divided, as a model has many and the
first after PEFT's pays for the memory that PEFT's gave back.

``python -m tests.benchmarks.combining [--runs N]`` prints this section alone.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loreg.algebra import LowRank
from loreg.algebra.factor_space import METHODS
from loreg.algebra.truncate import truncate_dense
from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.pairs import Timing, alternately, seconds_of

ADAPTERS, RANK = 4, 16
IN_A_ROW = 8
WEIGHTS = (1.0, 0.7, 0.5, -0.3)
Given = list[tuple[float, tuple[LowRank, ...]]]


@dataclass(frozen=True)
class Sizes:
    """``side`` of the module that is compared; ``name``, width, inner width and number of layers of a model."""

    side: int
    name: str
    hidden: int
    inner: int
    layers: int

    @property
    def shapes(self) -> list[tuple[int, int]]:
        hidden, inner = self.hidden, self.inner
        return [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]


FULL = Sizes(2048, "7B", 4096, 11008, 32)
SMALL = Sizes(128, "tiny", 128, 320, 2)


def combine(bench: Bench) -> Lines:
    """The section."""
    yield from combining(bench.runs, SMALL if bench.small else FULL)


def combining(runs: int, sizes: Sizes = FULL) -> list[str]:
    """The section, as lines of Markdown."""
    side, modules_of_model = sizes.side, sizes.layers * len(sizes.shapes)
    modules = [_deltas(_factors(side, side, seed)) for seed in range(IN_A_ROW)]
    factors = _factors(side, side, seed=0)
    ours, theirs = alternately(
        max(runs, 7),
        [lambda: seconds_of(lambda: [_ours(given) for given in modules]) / IN_A_ROW, _peft(factors, side)],
    )
    whole, work = _model(sizes)
    delta = _dense(factors, side)
    extract, lapack = alternately(
        max(1, runs // 2),
        [
            lambda: seconds_of(lambda: truncate_dense(delta, rank=RANK)),
            lambda: seconds_of(lambda: torch.linalg.svd(delta, full_matrices=False)),
        ],
    )
    return [
        f"## Combining: {ADAPTERS} adapters of rank {RANK} truncated to rank {RANK}",
        "",
        "| work | ours | theirs | faster | goal |",
        "| --- | --- | --- | --- | --- |",
        _row(f"`svd`, per module of {side}²", ours, "PEFT `add_weighted_adapter`", theirs, "≥ 200 times"),
        f"| `svd`, all {modules_of_model} modules of a {sizes.name} Llama | **{whole:.3g}** s ({work:.3g} s without "
        "making the factors) |  |  | < 120 s |",
        _row(f"extract, a dense delta of {side}²", extract, "`torch.linalg.svd`, float64", lapack, ""),
    ]


def _row(name: str, ours: Timing, other: str, theirs: Timing, goal: str) -> str:
    return f"| {name} | {ours} | {other} {theirs} | {theirs.median / ours.median:.3g} times | {goal} |"


def _factors(rows: int, columns: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(B, A) of each adapter, float32, as an adapter on disk has them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            0.02 * torch.randn(rows, RANK, generator=generator),
            torch.randn(RANK, columns, generator=generator) / columns**0.5,
        )
        for _ in range(ADAPTERS)
    ]


def _deltas(factors: list[tuple[Tensor, Tensor]]) -> Given:
    return [(weight, (LowRank(B, A, 2.0),)) for weight, (B, A) in zip(WEIGHTS, factors, strict=True)]


def _ours(given: Given) -> tuple[Tensor, Tensor]:
    """(B, A) of the result, float32, as PEFT's is."""
    (delta,) = METHODS["svd"](given, {"rank": RANK}).terms
    return delta.left.float(), delta.right.float()


def _dense(factors: list[tuple[Tensor, Tensor]], side: int) -> Tensor:
    noise = 1e-5 * torch.randn(side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return sum((w * LowRank(B, A).dense() for w, (B, A) in zip(WEIGHTS, factors, strict=True)), noise)


def _peft(factors: list[tuple[Tensor, Tensor]], side: int) -> Callable[[], float]:
    """Times PEFT's ``add_weighted_adapter(combination_type="svd")`` on a model of one layer."""
    import peft

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(side, side, bias=False)

    names = [f"adapter{index}" for index in range(ADAPTERS)]
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["proj"])
    model = peft.get_peft_model(Layer(), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    layer = model.base_model.model.proj
    for name, (B, A) in zip(names, factors, strict=True):
        layer.lora_B[name].weight.data, layer.lora_A[name].weight.data = B, A

    def work() -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            taken = seconds_of(
                lambda: model.base_model.add_weighted_adapter(names, list(WEIGHTS), "merged", "svd", svd_rank=RANK)
            )
        _check(layer.get_delta_weight("merged"), factors)
        model.base_model.delete_adapter("merged")
        return taken

    return work


def _check(theirs: Tensor, factors: list[tuple[Tensor, Tensor]]) -> None:
    """That both did the same work."""
    B, A = _ours(_deltas(factors))
    ours = LowRank(B, A).dense()
    off = torch.linalg.matrix_norm(theirs.double() - ours) / torch.linalg.matrix_norm(ours)
    if not off < 1e-4:
        raise RuntimeError(f"PEFT's result is {off:.1e} from ours.")


def _model(sizes: Sizes) -> tuple[float, float]:
    """Seconds for all modules of a Llama, one after the other, and without making their factors."""
    began, work = time.perf_counter(), 0.0
    for layer in range(sizes.layers):
        for index, (rows, columns) in enumerate(sizes.shapes):
            factors = _factors(rows, columns, seed=layer * len(sizes.shapes) + index)
            work += seconds_of(lambda given=factors: _ours(_deltas(given)))  # type: ignore[misc]
    return time.perf_counter() - began, work


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.combining")
    parser.add_argument("--runs", type=int, default=9)
    print("\n".join(combining(parser.parse_args().runs)))
