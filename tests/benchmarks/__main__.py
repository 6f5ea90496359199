"""``python -m tests.benchmarks [--out FILE] [--runs N]``: makes its inputs, runs pairs alternately, prints Markdown.

Nothing here passes or fails: a shared machine's times are for people to read.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.combining import combining
from tests.benchmarks.models import make_adapter, make_base
from tests.benchmarks.pairs import alternately, command, row

LOREG = [sys.executable, "-m", "loreg.cli"]
PEFT_MERGE = """
import sys, time, warnings
warnings.filterwarnings("ignore")
import torch, peft, transformers
began = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dir", type=Path, help="where to make the inputs (default: the temporary directory)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loreg-benchmarks-", dir=options.dir) as scratch:
        lines = [*_machine(), "", *_startup(Path(scratch), options.runs), "", *_merges(Path(scratch), options.runs)]
        lines += ["", *combining(options.runs)]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def _machine() -> list[str]:
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 30
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    return [
        "# Benchmarks",
        "",
        f"`python -m tests.benchmarks` on {cores} shared cores ({model}), {memory} GiB, Python "
        f"{platform.python_version()}, torch {torch.__version__}.",
        "Times are min / **median** / max of runs that alternate; ratios are of medians.",
    ]


def _startup(scratch: Path, runs: int) -> list[str]:
    environment = {**os.environ, "LOREG_HOME": str(scratch / "home")}
    python = command([sys.executable, "-c", "pass"], env=environment)
    works = [command([*LOREG, *words], env=environment) for words in (["--help"], ["ls"])]
    works[1]()  # makes the catalog
    bare, helped, listed = alternately(2 * runs, [python, *works])
    return [
        "## Starting",
        "",
        "| work | ours | a bare `python -c pass` | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
        row("`loreg --help`", helped, bare, "", "≤ 0.3 s"),
        row("`loreg ls`", listed, bare, "", "≤ 0.6 s"),
    ]


def _merges(scratch: Path, runs: int) -> list[str]:
    base, first, second = (scratch / name for name in ("base", "first", "second"))
    size = make_base(base)
    for seed, adapter in enumerate((first, second)):
        make_adapter(adapter, seed)
    environment = {**os.environ, "LOREG_HOME": str(scratch / "home")}
    _json(["base", "add", str(base), "--name", "base"], environment)
    for adapter in (first, second):
        _json(["push", str(adapter), "--base", "base", "--name", adapter.name], environment)
    # A file that was just written is not cached by its stamp; the next hashing is.
    subprocess.run(["sleep", "2.1"], check=True)
    _json(["base", "add", str(base), "--name", "base"], environment)
    out = scratch / "out"
    one = _merge("first", out, environment, "none")
    proved = _merge("first", out, environment, "probe")
    two = _merge("first+second", out, environment, "none")
    memory: list[int] = []
    _json(["merge", "--apply", "first", "--out", str(out), "--verify", "none"], environment, memory)
    shutil.rmtree(out)
    ours, checked, both, copied, theirs = alternately(
        runs, [one, proved, two, _copy(base, out), _peft(base, first, out)]
    )
    probe = "import torch; print(*[line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line])"
    told = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    imported = int(told) << 10
    return [
        f"## Merging from disk to disk: {size / 1e9:.2f} GB of bf16 in 3 shards, rank 16 on every linear layer",
        "",
        "| work | ours | theirs | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
        row("merge one adapter, against a copy", ours, copied, "`cp -r` + sync", "≤ 1.10 × (issue 4)"),
        row("merge one adapter, against PEFT", ours, theirs, "load, merge_and_unload, save", "≤ 0.17 × (issue 4)"),
        row("merge and prove (`probe`), against a copy", checked, copied, "`cp -r` + sync", ""),
        row("two adapters at once, against one", both, ours, "one adapter", ""),
        "",
        f"Peak memory of a merge: {memory[0] / 1e6:.0f} MB; importing torch alone takes {imported / 1e6:.0f} MB.",
    ]


def _json(arguments: list[str], environment: dict[str, str], memory: list[int] | None = None) -> float:
    """Run a command; the seconds it says the merge took (imports left out), or 0."""
    done = subprocess.run([*LOREG, *arguments, "--json"], env=environment, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    if memory is not None:
        memory.append(answer["peak_rss_bytes"])
    return float(answer.get("seconds", 0.0))


def _merge(expression: str, out: Path, environment: dict[str, str], verify: str) -> Callable[[], float]:
    def work() -> float:
        taken = _json(["merge", "--apply", expression, "--out", str(out), "--verify", verify], environment)
        shutil.rmtree(out)
        return taken

    return work


def _copy(base: Path, out: Path) -> Callable[[], float]:
    copy = command(["sh", "-c", f"cp -r '{base}' '{out}' && sync '{out}'/* '{out}'"])

    def work() -> float:
        taken = copy()
        shutil.rmtree(out)
        return taken

    return work


def _peft(base: Path, adapter: Path, out: Path) -> Callable[[], float]:
    def work() -> float:
        done = subprocess.run(
            [sys.executable, "-c", PEFT_MERGE, str(base), str(adapter), str(out)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        shutil.rmtree(out)
        return float(done.stdout.split()[-1])

    return work


if __name__ == "__main__":
    main()
