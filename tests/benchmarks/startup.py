"""What a command takes before it does anything."""

from __future__ import annotations

import os
import sys

from tests.benchmarks.bench import Bench, Lines
from tests.benchmarks.pairs import alternately, command, row

LOREG = [sys.executable, "-m", "loreg.cli"]


def startup(bench: Bench) -> Lines:
    environment = {**os.environ, "LOREG_HOME": str(bench.scratch / "empty")}
    python = command([sys.executable, "-c", "pass"], env=environment)
    works = [command([*LOREG, *words], env=environment) for words in (["--help"], ["ls"])]
    works[1]()  # makes the catalog
    bare, helped, listed = alternately(2 * bench.runs, [python, *works])
    yield from (
        "## Starting",
        "",
        "| work | ours | a bare `python -c pass` | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
        row("`loreg --help`", helped, bare, "", "≤ 0.3 s"),
        row("`loreg ls`", listed, bare, "", "≤ 0.6 s"),
    )
