"""Rows that need a CUDA device, and those of live models, which ``live.py`` measures."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.merging import ONE
from tests.benchmarks.pairs import HEADER, Row, compared, in_turn, unmeasured

_LIVE = "tests.benchmarks.live"
_UNMERGED = ("live unmerge with the journal, against the merge", "≤ 1.50 ×")
_ROWS = {
    "live": [("live model on the CPU, against PEFT `merge_adapter`", "≥ 5 times faster"), _UNMERGED],
    "gpu": [
        ("live model of 7 B shape, against the limit that moving bytes sets", "≥ 70 %"),
        ("live model of 7 B shape, against PEFT on the same device", "≥ 10 times faster"),
        _UNMERGED,
    ],
}
"""What the functions of ``live.py`` measure, and its goals: printed without figures where there is none."""


def live(bench: Bench) -> Lines:
    """A live model on the CPU against PEFT's ``merge_adapter``."""
    yield from _live("live", bench)


def gpu(bench: Bench) -> Lines:
    """Merges on a CUDA device against the CPU, and live models there."""
    yield from ("## Merging on a CUDA device", "")
    names = {place: f"{place.name}: merge with `--device cuda`" for place in bench.places}
    if not torch.cuda.is_available():
        yield from HEADER
        for name, goal in [*((name, "") for name in names.values()), *_ROWS["gpu"]]:
            yield unmeasured(name, "torch finds no CUDA device here", goal)
        return
    yield from (f"On one {torch.cuda.get_device_name()}, torch's CUDA {torch.version.cuda}.", "", *HEADER)
    for place, name in names.items():
        device, host = in_turn(bench.runs, [place.merge(ONE, options=["--device", "cuda"]), place.merge(ONE)])
        yield compared(name, device, "`--device cpu`", host)
        if device.reason is None and host.reason is None:
            roots = {run.told["weights_root"] for runs in (device, host) for run in runs.runs}
            same = "the same bytes as on the CPU"
            if len(roots) == 1:
                yield Row((name, same, "", "", "the same"))
            else:
                yield unmeasured(name, f"not {same}: {', '.join(sorted(roots))}", "the same")
    yield ""
    yield from _live("gpu", bench)


def _live(name: str, bench: Bench) -> Lines:
    """What a function of ``live.py`` says: it takes the number of runs. A checkout may be without that file."""
    there = importlib.util.find_spec(_LIVE) is not None
    if there and not bench.small:
        yield from getattr(importlib.import_module(_LIVE), name)(bench.runs)
        return
    reason = "live models have no small size" if there else "tests/benchmarks/live.py is not there"
    yield from ("## Live models", "", *HEADER)
    for row, goal in _ROWS[name]:
        yield unmeasured(row, reason, goal)
