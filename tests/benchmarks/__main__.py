"""``python -m tests.benchmarks [SECTION…]``: makes its inputs, runs pairs alternately, prints Markdown.

Sections are those of ``SECTIONS``; without any, all that need no GPU. No time here passes or fails: those of a shared
machine are for people to read. What could not be measured says why in its row, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from tests.benchmarks.bench import Bench, Line, Lines, opened
from tests.benchmarks.combining import combine
from tests.benchmarks.devices import gpu
from tests.benchmarks.live import live
from tests.benchmarks.memory import memory
from tests.benchmarks.merging import many, merge, undo, verify
from tests.benchmarks.pairs import Row, Unmeasured, unmeasured
from tests.benchmarks.scale import scale
from tests.benchmarks.serving import serving
from tests.benchmarks.startup import startup

SECTIONS: dict[str, Callable[[Bench], Lines]] = {
    "startup": startup,
    "merge": merge,
    "many": many,
    "undo": undo,
    "verify": verify,
    "memory": memory,
    "live": live,
    "serving": serving,
    "combine": combine,
    "scale": scale,
    "gpu": gpu,
}
ON_CPU = [name for name in SECTIONS if name != "gpu"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (all but gpu)")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--dir", type=Path, help="where to make files on a disk (default: the temporary directory)")
    parser.add_argument("--small", action="store_true", help="tiny inputs, to see that all of it works")
    options = parser.parse_args()
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}: expected some of {', '.join(SECTIONS)}")
    lines: list[Line] = []
    with opened(options.runs, options.small, options.dir) as bench:
        for line in lines_of(bench, options.sections or ON_CPU):
            lines.append(line)
            print(line, flush=True)
    if options.out:
        options.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    sys.exit(any(isinstance(line, Row) and line.failed for line in lines))


def lines_of(bench: Bench, names: list[str]) -> Iterator[Line]:
    """The report: the machine, then each section; one that fails costs no other."""
    yield from _machine(bench)
    for name in names:
        yield ""
        try:
            yield from SECTIONS[name](bench)
        except Exception as error:
            reason = str(error) if isinstance(error, Unmeasured) else f"{type(error).__name__}: {error}"
            yield unmeasured(f"all else of `{name}`", reason)


def _machine(bench: Bench) -> Lines:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    yield from (
        "# Benchmarks",
        "",
        f"`python -m tests.benchmarks` on {cores} shared cores ({model}), {memory} GiB, Python "
        f"{platform.python_version()}, torch {torch.__version__}.",
        f"Times are min / **median** / max of runs that alternate (`--runs {bench.runs}`); ratios are of medians.",
    )


if __name__ == "__main__":
    main()
