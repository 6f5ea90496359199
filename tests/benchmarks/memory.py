"""What a merge needs of memory beyond ``import torch``: the same for a base that is several times as large."""

from __future__ import annotations

import json
import statistics
import sys

from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.merging import ONE
from tests.benchmarks.pairs import HEADER, Goal, Row, Run, Runs, in_turn, process, unmeasured

ABOVE = Goal(150, "≤ 150 MB")
APART = Goal(20, "≤ 20 MB")
_IMPORT = """
import json, torch
peak, = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(json.dumps({"peak_rss_bytes": peak << 10}))
"""


def memory(bench: Bench) -> Lines:
    """Peak resident memory of a merge, of the model and of a larger one of sparse files."""
    yield from ("## Peak memory above `import torch`", "", *HEADER)
    larger = bench.larger
    try:
        small, large, bare = in_turn(bench.runs, [bench.disk.merge(ONE), larger.merge(ONE), _imported])
    finally:
        larger.remove()
    above = []
    for place, runs, kind in zip((bench.disk, larger), (small, large), ("", ", sparse files"), strict=True):
        name = f"merge of {place.shape.name}, {2 * place.shape.parameters / 1e9:.3g} GB{kind}"
        if reason := runs.reason or bare.reason:
            yield unmeasured(name, reason, ABOVE.text)
            continue
        above.append(_peak(runs) - _peak(bare))
        found = ABOVE.judged(above[-1], f"{above[-1]:.0f} MB above")
        yield Row((name, _spread(runs), f"`import torch` {_spread(bare)}", found, ABOVE.text))
    name = "how far the two are apart"
    if len(above) < 2:
        yield unmeasured(name, "one of the two is missing", APART.text)
    else:
        apart = abs(above[1] - above[0])
        yield Row((name, "", "", APART.judged(apart, f"{apart:.0f} MB"), APART.text))


def _imported() -> Run:
    taken, said = process([sys.executable, "-c", _IMPORT])
    return Run(taken, taken, json.loads(said))


def _megabytes(runs: Runs) -> list[float]:
    return [run.told["peak_rss_bytes"] / 1e6 for run in runs.runs]


def _peak(runs: Runs) -> float:
    return statistics.median(_megabytes(runs))


def _spread(runs: Runs) -> str:
    found = _megabytes(runs)
    return f"{min(found):.0f} / **{statistics.median(found):.0f}** / {max(found):.0f} MB"
