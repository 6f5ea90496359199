"""Rows that need a CUDA device: merges there against the CPU, and those of live models, which ``live`` measures."""

from __future__ import annotations

import torch

from tests.benchmarks import live
from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.merging import ONE
from tests.benchmarks.pairs import HEADER, Row, compared, in_turn, unmeasured


def gpu(bench: Bench) -> Lines:
    """Merges on a CUDA device against the CPU, and live models there."""
    yield from ("## Merging on a CUDA device", "")
    names = {place: f"{place.name}: merge with `--device cuda`" for place in bench.places}
    if not torch.cuda.is_available():
        yield from HEADER
        for name in names.values():
            yield unmeasured(name, "torch finds no CUDA device here")
        yield ""
        yield from live.gpu(bench)
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
    yield from live.gpu(bench)
