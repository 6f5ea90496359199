"""Merges in the memory of a live model, in place, against PEFT's: on the CPU, and on a CUDA device.

Both sides have the base and the adapter in memory already; what is timed is the merge alone, and the way back.
"""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import loreg
from loreg.serving.live import Check, Merged, Ready, prepare
from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.pairs import (
    HEADER,
    Goal,
    Row,
    Run,
    Runs,
    Unmeasured,
    at_most,
    compared,
    faster,
    in_turn,
    unmeasured,
)
from tests.benchmarks.places import ADAPTERS, Place

ON_CPU = "live model on the CPU, against PEFT `merge_adapter`"
LIMIT = "live model of 7 B shape, against the limit that moving bytes sets"
ON_CARD = "live model of 7 B shape, against PEFT on the same device"
UNMERGED = "live unmerge with the journal, against the merge"
SWAP = "swap of one adapter for another, against PEFT `unmerge_adapter` and `merge_adapter`"
SWAP_LIMIT = "swap of one adapter for another, against the limit that moving bytes sets"
JOURNAL = "what is kept for it in memory, of the touched bytes"
AGAINST_PEFT, AGAINST_PEFT_ON_CARD, AGAINST_MERGE = faster(5), faster(10), at_most(1.5)
KEPT = Goal(0.04, "≤ 4 %")
OF_LIMIT = Goal(0.7, "≥ 70 %", least=True)
SWAP_OF_LIMIT = Goal(0.6, "≥ 60 %", least=True)
ROWS = {
    "live": [
        (ON_CPU, AGAINST_PEFT.text),
        (UNMERGED, AGAINST_MERGE.text),
        (JOURNAL, KEPT.text),
        (SWAP, AGAINST_PEFT.text),
    ],
    "gpu": [
        (LIMIT, OF_LIMIT.text),
        (ON_CARD, AGAINST_PEFT_ON_CARD.text),
        (UNMERGED, AGAINST_MERGE.text),
        (JOURNAL, KEPT.text),
        (SWAP_LIMIT, SWAP_OF_LIMIT.text),
        (SWAP, AGAINST_PEFT.text),
    ],
}
"""What each function measures, and its goals."""


def live(bench: Bench) -> Lines:
    """A live model on the CPU."""
    yield from (f"## A live model of {bench.disk.shape.name} in bf16, rank 16 on every linear layer", "", *HEADER)
    with _models(bench.disk, torch.device("cpu")) as models:
        ours, back, peft = in_turn(bench.runs, [models.merge, models.unmerge, models.peft])
        yield compared(ON_CPU, ours, "`merge_adapter`", peft, AGAINST_PEFT)
        yield compared(UNMERGED, back, "the merge", ours, AGAINST_MERGE)
        yield models.kept(ours)
        ours, peft = in_turn(bench.runs, [models.swap, models.peft_swap])
        yield compared(SWAP, ours, "both", peft, AGAINST_PEFT)
    yield ""
    yield (
        "The adapter is loaded, and the base was checked, before: that is not timed on either side. Each unmerge "
        "gave back the base, bit for bit."
    )


def gpu(bench: Bench) -> Lines:
    """A live model on a CUDA device."""
    yield from (f"## A live model of {bench.larger.shape.name} in bf16 on the device, rank 16", "", *HEADER)
    if not torch.cuda.is_available():
        for row, goal in ROWS["gpu"]:
            yield unmeasured(row, "torch finds no CUDA device here", goal)
        return
    with _models(bench.larger, torch.device("cuda")) as models:
        copies, ours, back, peft = in_turn(bench.runs, [models.copy, models.merge, models.unmerge, models.peft])
        yield _of_limit(LIMIT, ours, copies, OF_LIMIT)
        yield compared(ON_CARD, ours, "`merge_adapter`", peft, AGAINST_PEFT_ON_CARD)
        yield compared(UNMERGED, back, "the merge", ours, AGAINST_MERGE)
        yield models.kept(ours)
        copies, ours, peft = in_turn(bench.runs, [models.copy, models.swap, models.peft_swap])
        yield _of_limit(SWAP_LIMIT, ours, copies, SWAP_OF_LIMIT)
        yield compared(SWAP, ours, "both", peft, AGAINST_PEFT)


def _of_limit(name: str, ours: Runs, copies: Runs, goal: Goal) -> Row:
    if ours.reason is not None or copies.reason is not None:
        return unmeasured(name, str(ours.reason or copies.reason), goal.text)
    share = copies.work.median / ours.work.median
    found = goal.judged(share, f"{100 * share:.3g} %")
    return Row((name, str(ours.work), f"a copy on the device {copies.work}", found, goal.text))


@dataclass
class _Models:
    """A model for us and one for PEFT, of the same values. Each work leaves its model as it found it, but ``merge``,
    which ``unmerge`` follows."""

    ours: Any
    peft_model: Any
    ready: Ready
    other: Ready
    device: torch.device
    originals: list[torch.Tensor]
    merged: Merged | None = None

    def merge(self) -> Run:
        self.merged = None

        def work() -> None:
            self.merged = self.ready.apply()

        seconds = self._seconds(work)
        merged = self._done()
        if self._is_base():
            raise Unmeasured("the merge changed nothing")
        return Run(seconds, seconds, {"kept": merged.undo_bytes, "touched": merged.touched_bytes})

    def unmerge(self) -> Run:
        merged = self._done()
        seconds = self._seconds(lambda: merged.undo(self.ours))
        if not self._is_base():
            raise Unmeasured("what came out is not the base")
        return Run(seconds, seconds)

    def peft(self) -> Run:
        seconds = self._seconds(lambda: self.peft_model.merge_adapter([ADAPTERS[0]]))
        self.peft_model.unmerge_adapter()
        return Run(seconds, seconds)

    def swap(self) -> Run:
        """Of the adapter that is merged for the other, and then, untimed, everything back."""
        merged = self.ready.apply()

        def work() -> None:
            self.merged = self.other.replace(merged)

        seconds = self._seconds(work)
        self._done().undo(self.ours)
        if not self._is_base():
            raise Unmeasured("what came out is not the base")
        return Run(seconds, seconds)

    def peft_swap(self) -> Run:
        model = self.peft_model
        model.merge_adapter([ADAPTERS[0]])

        def work() -> None:
            model.unmerge_adapter()
            model.merge_adapter([ADAPTERS[1]])

        seconds = self._seconds(work)
        model.unmerge_adapter()
        return Run(seconds, seconds)

    def copy(self) -> Run:
        """Of the bytes that a merge has to move: each element of what is touched read once, and written once."""
        weights = [edit.target.place.weight for edit in self.ready.edits]
        room = torch.empty(max(weight.numel() for weight in weights), dtype=weights[0].dtype, device=self.device)

        def work() -> None:
            for weight in weights:
                room[: weight.numel()].view(weight.shape).copy_(weight)

        work()
        seconds = self._seconds(work)
        return Run(seconds, seconds)

    def kept(self, ours: Runs) -> Row:
        if ours.reason is not None:
            return unmeasured(JOURNAL, ours.reason, KEPT.text)
        kept, touched = ours.told("kept")[-1], ours.told("touched")[-1]
        found = KEPT.judged(kept / touched, f"{100 * kept / touched:.3g} %")
        return Row((JOURNAL, f"{kept / 1e6:.4g} MB", f"{touched / 1e6:.4g} MB", found, KEPT.text))

    def _done(self) -> Merged:
        if self.merged is None:
            raise Unmeasured("there is no merge to take back")
        return self.merged

    def _seconds(self, work: Callable[[], object]) -> float:
        self._settle()
        began = time.perf_counter()
        work()
        self._settle()
        return time.perf_counter() - began

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _is_base(self) -> bool:
        """Bit for bit."""
        pairs = zip(self.ours.parameters(), self.originals, strict=True)
        return all(torch.equal(now.detach().view(torch.int16), then.view(torch.int16)) for now, then in pairs)


@contextmanager
def _models(place: Place, device: torch.device) -> Iterator[_Models]:
    """Random weights: those of the place on the CPU; drawn on a CUDA device, whose place has files without blocks."""
    place.size
    transformers, peft = importlib.import_module("transformers"), importlib.import_module("peft")
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), loreg.open(place.home) as registry:
        warnings.simplefilter("ignore")
        ours, theirs = (_model(transformers, place, device) for _ in range(2))
        check: Check = "touched" if device.type == "cpu" else "none"
        ready, other = (prepare(ours, name, registry, check=check) for name in ADAPTERS[:2])
        theirs = peft.PeftModel.from_pretrained(theirs, place.adapter(ADAPTERS[0]), ADAPTERS[0])
        theirs.load_adapter(place.adapter(ADAPTERS[1]), ADAPTERS[1])
        yield _Models(ours, theirs, ready, other, device, [weight.detach().clone() for weight in ours.parameters()])


def _model(transformers: Any, place: Place, device: torch.device) -> Any:
    if device.type == "cpu":
        return transformers.LlamaForCausalLM.from_pretrained(place.base, dtype=torch.bfloat16)
    config = transformers.LlamaConfig.from_pretrained(place.base)
    torch.manual_seed(0)
    with device:
        return transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
