"""That every section of the benchmarks runs and prints each of its rows; what it measured is nobody's test."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from loreg.cli.program import main

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # a plain `pytest` has tests/unit there, and not what holds tests/
    sys.path.insert(0, str(ROOT))

from tests.benchmarks import bench as benches  # noqa: E402
from tests.benchmarks import devices, memory, places  # noqa: E402
from tests.benchmarks.__main__ import ON_CPU, SECTIONS, lines_of  # noqa: E402
from tests.benchmarks.pairs import Row, Run, Runs, Unmeasured, at_most, compared, faster, in_turn, process  # noqa: E402

PLACES = ("disk", "memory-backed")
ROWS = {
    "startup": ["`loreg --help`", "`loreg ls`"],
    "merge": [
        f"{place}: merge, against {other}{whole}"
        for place in PLACES for other in ("a copy", "PEFT") for whole in ("", ", whole processes")
    ],
    "many": [
        f"{place}: {what}"
        for place in PLACES for what in ("four adapters at once, against one", "three outputs in one pass")
    ],
    "undo": [
        f"{place}: {what}"
        for place in PLACES
        for what in (
            "merge with `--undo`",
            "the journal, of the touched bytes",
            "unmerge by the journal, against a copy",
            "unmerge by the base, against a copy",
        )
    ],
    "verify": [f"{place}: merge and `--verify probe`" for place in PLACES],
    "memory": ["merge of tiny,", "merge of tiny, twice as wide,", "how far the two are apart"],
    "live": ["live model on the CPU, against PEFT `merge_adapter`", "live unmerge with the journal", "what is kept"],
    "serving": [
        "load of an adapter of",
        "8 adapters unmerged in a batch, 32 positions each",
        "8 adapters unmerged in a batch, 1 position each",
    ],
    "combine": ["`svd`, per module of 128²", "`svd`, all 14 modules of a tiny Llama", "extract, a dense"],
    "scale": [
        f"{kind}: {what}"
        for kind in ("SQLite", "PostgreSQL")
        for what in ("find by tag", "show", "ls --base", "ls QUERY", "gc: mark", "fsck: contra", "push, against")
    ],
}  # fmt: skip


def inside(arguments: Sequence[str], **options: Any) -> tuple[float, str]:
    """``process``, of Python alone and without one: that is where nearly all of the time would go."""
    out = io.StringIO()
    before = dict(os.environ)
    os.environ.update(options.get("env", {}))
    argv, sys.argv = sys.argv, list(arguments[2:])
    try:
        with contextlib.redirect_stdout(out):
            if arguments[:3] == [sys.executable, "-m", "loreg.cli"]:
                with contextlib.suppress(SystemExit):
                    main(list(arguments[3:]))
            elif arguments[:2] == [sys.executable, "-c"]:
                exec(arguments[2], {})
            else:
                return process(arguments, **options)
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)
    return 1.0, out.getvalue()


@pytest.fixture(scope="module")
def bench() -> Iterator[benches.Bench]:
    with benches.opened(1, True, None) as opened, pytest.MonkeyPatch.context() as patch:
        patch.setattr(places, "process", inside)
        patch.setattr(memory, "process", inside)
        yield opened


def rows(lines: Sequence[benches.Line]) -> dict[str, str]:
    """The rows of the tables, by their first cells."""
    texts = [str(line) for line in lines if str(line).startswith("| ")]
    return {text.split(" | ")[0].removeprefix("| "): text for text in texts}


def test_sections_are_all_those_of_the_cpu() -> None:
    assert list(ROWS) == ON_CPU
    assert [*ON_CPU, "gpu"] == list(SECTIONS)


@pytest.mark.parametrize("name", ROWS)
def test_a_section_prints_every_row(bench: benches.Bench, name: str) -> None:
    pytest.importorskip("peft")
    lines = list(lines_of(bench, [name]))
    assert [str(line) for line in lines if isinstance(line, Row) and line.failed] == []
    found = rows(lines)
    for row in ROWS[name]:
        assert [text for first, text in found.items() if first.startswith(row)], f"no row {row!r} in {list(found)}"
        text = next(text for first, text in found.items() if first.startswith(row))
        assert re.search(r"\d (m?s|MB|%|times|×)", text), text


def test_what_cannot_be_measured_has_rows_that_say_so(bench: benches.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: False)
    lines = list(lines_of(bench, ["gpu"]))
    assert [line for line in lines if isinstance(line, Row) and line.failed]
    for row in ("live model of 7 B shape", "live unmerge", "disk: merge"):
        assert any(first.startswith(row) and "not measured: " in text for first, text in rows(lines).items()), row


def test_without_memory_backed_files_the_rows_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "MEMORY", tmp_path / "none")
    monkeypatch.setattr(places, "process", inside)
    with benches.opened(1, True, tmp_path) as bench:
        found = rows(list(lines_of(bench, ["verify"])))
        assert "not measured" not in found["disk: merge and `--verify probe`"]
        assert "no inputs in memory-backed files" in found["memory-backed: merge and `--verify probe`"]


def test_a_section_that_fails_costs_no_other(bench: benches.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(bench: benches.Bench) -> Iterator[str]:
        yield "## Broken"
        raise ValueError("on\npurpose")

    monkeypatch.setitem(SECTIONS, "startup", breaks)
    lines = list(lines_of(bench, ["startup", "combine"]))
    assert "not measured: ValueError: on purpose" in rows(lines)["all else of `startup`"]
    assert "## Combining" in "\n".join(map(str, lines))


def test_in_turn_runs_what_works_and_says_what_does_not() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> Run:
        order.append(name)
        if not seconds:
            raise Unmeasured("no such thing")
        return Run(seconds, seconds + 1)

    one, none, two = in_turn(2, [lambda: work("one", 1), lambda: work("none", 0), lambda: work("two", 2)])
    assert order == ["one", "none", "two", "one", "two"]
    assert (one.work.median, two.whole.median, none.reason) == (1, 3, "no such thing")
    assert compared("row", one, "other", none).failed


@pytest.mark.parametrize(
    ("goal", "ours", "theirs", "found"),
    [
        (at_most(1.10), 1.1, 1.0, "1.10 ×"),
        (at_most(1.10), 1.2, 1.0, "1.20 × (missed)"),
        (faster(6), 1.0, 6.5, "6.5 times faster"),
        (faster(6), 1.0, 5.0, "5 times faster (missed)"),
    ],
)
def test_a_missed_goal_is_marked(goal: Any, ours: float, theirs: float, found: str) -> None:
    one, other = (Runs((Run(seconds, seconds),)) for seconds in (ours, theirs))
    assert compared("row", one, "other", other, goal).cells[3] == found


@pytest.mark.slow
def test_the_command_prints_and_keeps_the_tables(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks", "startup", "--small", "--runs", "1", "--dir", str(tmp_path)]
    done = subprocess.run([*command, "--out", str(tmp_path / "kept.md")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "kept.md").read_text() == done.stdout
    assert set(ROWS["startup"]) <= set(rows(done.stdout.splitlines()))
    assert list(tmp_path.iterdir()) == [tmp_path / "kept.md"]
    done = subprocess.run([*command[:3], "gpu", "--small"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, "what was not measured shows in the exit code"
    done = subprocess.run([*command[:3], "nothing"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected some of startup" in done.stderr
