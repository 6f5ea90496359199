"""Live merges by the kernels, in place: all or nothing. Run by ``test_triton.py``, in Triton's interpreter."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from live_models import Bytes, bytes_of, module_of

import loreg
from loreg import serving
from loreg.algebra import Dense, LowRank, WeightedSum, gpu, launching
from loreg.algebra.changing import Space
from loreg.algebra.edits import Prepared
from loreg.algebra.gpu import groups
from loreg.algebra.gpu.groups import Group
from loreg.algebra.gpu.lists import Lists
from loreg.algebra.rounding import bits
from loreg.errors import BadInput, Conflict
from loreg.serving import applying, merging, swapping
from loreg.serving.live import prepare
from loreg.serving.places import Place
from tests import launched
from tests.laws.triton_cases import _nothing_is_zero_by_luck, _on_the_cpu  # noqa: F401

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@contextmanager
def by_torch() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "DEVICES", frozenset())
        yield


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_LEAST", 1)
    monkeypatch.setattr(groups, "SHARE", (0.0, 0.0))


def model_of(*kinds: str) -> dict[str, launched.Case]:
    """Two dtypes, several kinds, a stack, a bias, ties, and a last tensor; as few tiles as that can have."""
    steps = 192 * torch.finfo(BF16).eps
    ties = torch.arange(128, 256).view(8, 16).to(BF16)
    bias = torch.linspace(-1, 1, 7).bfloat16()
    made = {
        "tall": launched.case(17, 16, seed=1),
        "stack": launched.case(2, 5, 8, seed=2),
        "full": launched.case(8, 16, dtype=F32, seed=3),
        "half": launched.case(7, 9, dtype=F16, seed=4, size=1.0),
        "ties": (ties, WeightedSum((LowRank(torch.ones(8, 1), torch.ones(1, 16), steps),))),
        "bias": (bias, WeightedSum((), (Dense(torch.full((7,), 0.25), 0.3),))),
        "last": launched.case(9, 40, seed=6),
    }
    return {kind: made[kind] for kind in kinds or made}


def copied(cases: dict[str, launched.Case]) -> dict[str, torch.Tensor]:
    return {name: W.clone() for name, (W, _) in cases.items()}


def unchanged(cases: dict[str, launched.Case], before: dict[str, torch.Tensor]) -> bool:
    return all(launched.same(W, before[name]) for name, (W, _) in cases.items())


def merged(cases: dict[str, launched.Case]) -> list[applying.Editing]:
    edits = launched.edits(cases)
    return merging.merge(edits, 1, merging.Ahead(edits), list, lambda: None)


def check(cases: dict[str, launched.Case]) -> None:
    before = copied(cases)
    editings = merged(cases)
    with by_torch():
        for name, (W, edit) in cases.items():
            assert launched.same(W, edit.apply(before[name])), name
    merging.unmerge(editings, 1)
    assert unchanged(cases, before)


# ---- bytes ----


@pytest.mark.parametrize("dtype", ["BF16"])
def test_the_bytes_of_a_merge_on_disk(
    registry: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    base = tiny.write_model(tmp_path / "base", tiny.model(dtype=dtype, rows=6, cols=16))
    registry.add_base(base, "base")
    for seed, name in enumerate(("sql", "humor"), 1):
        adapter = tiny.write_adapter(tmp_path / name, tiny.adapter(seed, rank=seed + 1, rows=6, cols=16))
        registry.push(adapter, base="base", name=name)
    model = module_of(tiny.tensors_in(base))
    with by_torch():
        registry.merge("0.3*sql - 2*humor", tmp_path / "out", verify="none")
    expected, before = bytes_of(module_of(tiny.tensors_in(tmp_path / "out"))), bytes_of(model)
    launches, tiles = list[int](), list[str]()
    start, apply = groups.Group.start, applying.Editing.apply
    monkeypatch.setattr(
        groups.Group, "start", lambda group, *rooms: (launches.append(len(group.jobs)), start(group, *rooms))[1]
    )
    monkeypatch.setattr(applying.Editing, "apply", lambda self, space: (tiles.append(""), apply(self, space))[1])
    ready = prepare(model, "0.3*sql - 2*humor", registry)
    assert not launches
    first = ready.apply()
    assert bytes_of(model).items() <= expected.items() and bytes_of(model) != before
    assert launches == [2], "both weights in one launch"
    assert not tiles and first.undo_bytes > 0
    serving.unmerge_(model, first)
    assert bytes_of(model) == before
    second = ready.apply()
    del ready
    gc.collect()
    serving.unmerge_(model, second)  # without what was prepared ahead
    assert bytes_of(model) == before


def test_all_kinds_of_tensors() -> None:
    check(model_of())


@pytest.mark.usefixtures("little_room")
def test_lists_without_room() -> None:
    check(model_of())


def test_what_was_changed_since_is_known(pushed: loreg.Registry, tmp_path: Path) -> None:
    """Though torch does not see what a kernel does. A merge that is refused is no change."""
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before = bytes_of(model)
    first = serving.merge_(model, "sql", pushed)
    second = serving.merge_(model, "humor", pushed, check="none")
    with pytest.raises(Conflict):
        serving.unmerge_(model, first)
    serving.unmerge_(model, second)
    with failing(BadInput, {2}), pytest.raises(BadInput):
        serving.merge_(model, "humor", pushed, check="none")
    serving.unmerge_(model, first)
    assert bytes_of(model) == before


EXPRESSIONS = ("sql", "humor", "0.5*sql - humor", "sql")


def fresh(registry: loreg.Registry, folder: Path, expression: str) -> Bytes:
    with by_torch():
        model = module_of(tiny.tensors_in(folder))
        serving.merge_(model, expression, registry)
        return bytes_of(model)


@pytest.mark.usefixtures("little_room")
def test_swaps(pushed: loreg.Registry, tmp_path: Path) -> None:
    """The bytes of torch's merge of each, and at the end the base's."""
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before, live = bytes_of(model), serving.attach(model, pushed)
    for expression in EXPRESSIONS:
        live.swap(expression)
        assert bytes_of(model) == fresh(pushed, tmp_path / "base", expression)
    live.restore()
    assert bytes_of(model) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_at_some_steps_of_a_swap(pushed: loreg.Registry, tmp_path: Path, error: type[BaseException]) -> None:
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before, live = bytes_of(model), serving.attach(model, pushed)
    live.swap("sql")
    now = bytes_of(model)
    with failing(error, set()) as steps:
        live.swap("humor")
    live.swap("sql")
    for step in range(0, steps[0], EVERY):
        with failing(error, {step}), pytest.raises(error):
            live.swap("humor")
        assert bytes_of(model) == now, step
    live.swap("humor")
    live.restore()
    assert bytes_of(model) == before


@pytest.mark.usefixtures("little_room")
def test_a_swap_from_some_tensors_to_others() -> None:
    """One is only taken out of, two are only merged into, of which one is not launched, and two are swapped; with and
    without an error at some steps."""
    cases = model_of("tall", "stack", "full", "half", "bias")
    base, sizes = copied(cases), {"stack": (2, 5, 8), "full": (8, 16), "half": (7, 9)}
    others = {name: (cases[name][0], launched.case(*size, seed=9)[1]) for name, size in sizes.items()}
    others["bias"] = cases["bias"]
    before, after = launched.edits({name: cases[name] for name in ("tall", "stack", "full")}), launched.edits(others)
    kept = list[applying.Editing]()

    def swap(old: list[applying.Editing]) -> list[applying.Editing]:
        return swapping.swap(old, after, 1, merging.Ahead(after), list, kept.extend)

    old = merging.merge(before, 1, merging.Ahead(before), list, lambda: None)
    with failing(MemoryError, set()) as steps:
        new = swap(old)
    assert launched.same(cases["tall"][0], base["tall"]) and not kept
    for name, (W, edit) in others.items():
        with by_torch():
            assert launched.same(W, edit.apply(base[name])), name
    merging.unmerge(new, 1)
    assert unchanged(cases, base)
    old = merging.merge(before, 1, merging.Ahead(before), list, lambda: None)
    now = copied(cases)
    for step in range(0, steps[0], EVERY):
        with failing(MemoryError, {step}), pytest.raises(MemoryError):
            swap(old)
        assert unchanged(cases, now), step
        old, kept = kept, []
    merging.unmerge(old, 1)
    assert unchanged(cases, base)


def test_edits_that_do_not_go_together_are_swapped() -> None:
    """Of another precision; of a stack and of one of its matrices, either way; and what was merged elsewhere."""
    W, one = launched.case(17, 16, seed=1)
    double = WeightedSum(tuple(LowRank(x.left.double(), x.right.double(), x.scale) for x in one.low_rank))
    stack, all_ = launched.case(2, 5, 8, seed=2)
    part = launched.case(5, 8, seed=3)[1]
    of_stack, of_part = launched.edits({"stack": (stack, all_), "part": (stack[1], part)})
    place = Place("part", stack, 1, (0, 5))
    of_part = applying.Edit(
        SimpleNamespace(name="part", place=place, edit=of_part.target.edit), of_part.combining, part
    )
    for old, new, base in (
        (*(launched.edits({"tall": (W, edit)})[0] for edit in (one, double)), W),
        (of_stack, of_part, stack), (of_part, of_stack, stack),
    ):  # fmt: skip
        before = base.clone()
        first = merging.merge([old], 1, merging.Ahead(), list, lambda: None)
        second = swapping.swap(first, [new], 1, merging.Ahead(), list, lambda _: None)
        with by_torch():
            expected = before.clone()
            here = expected[1] if new is of_part else expected
            assert new.plain is not None
            here.copy_(new.plain.apply(here))
        assert launched.same(base, expected)
        merging.unmerge(second, 1)
        assert launched.same(base, before)
    with by_torch():  # as on a CPU, from where the model then goes to a GPU
        first = merging.merge(launched.edits({"tall": (W, one)}), 1, merging.Ahead(), list, lambda: None)
    before = W.clone()
    second = swapping.swap(first, launched.edits({"tall": (W, one)}), 1, merging.Ahead(), list, lambda _: None)
    assert launched.same(W, before) and second[0].whole is not None


@pytest.mark.usefixtures("little_room")
def test_a_swap_after_an_unmerge_that_was_interrupted() -> None:
    cases = model_of("ties", "full")
    base = copied(cases)
    others = {name: (W, launched.case(*W.shape, seed=9)[1]) for name, (W, _) in cases.items()}
    with failing(MemoryError, set()) as steps:
        merging.unmerge(merged(cases), 1)
    for step in range(0, steps[0], EVERY):
        old, edits = merged(cases), launched.edits(others)
        with failing(MemoryError, {step}), suppress(MemoryError):
            merging.unmerge(old, 1)
        new = swapping.swap(old, edits, 1, merging.Ahead(edits), list, lambda _: None)
        for name, (W, edit) in others.items():
            with by_torch():
                assert launched.same(W, edit.apply(base[name])), (step, name)
        merging.unmerge(new, 1)
        assert unchanged(cases, base)


@pytest.mark.usefixtures("little_room")
def test_a_way_back_that_failed_goes_on_where_it_is_called_again() -> None:
    """Of edits that do not go together, as the old one was merged by torch."""
    W, one = launched.case(17, 16, seed=1)
    edits = launched.edits({"one": (W, one)}), launched.edits({"other": (W, launched.case(17, 16, seed=9)[1])})
    base, space, steps = W.clone(), Space(), 1
    done = False
    while not done:
        with by_torch():
            old = merging.merge(edits[0], 1, merging.Ahead(), list, lambda: None)
        merged_ = W.clone()
        change = swapping.Change(old, [applying.Editing(edits[1][0])], merging.Ahead())
        change.run(space)
        with failing(MemoryError, {steps}):
            try:
                change.back(space)
                done = True
            except MemoryError:
                pass
        change.back(space)
        assert launched.same(W, merged_), steps
        merging.unmerge(change.old, 1)
        assert launched.same(W, base), steps
        steps += 3
    assert steps > 10


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("way", ["merge", "unmerge"])
def test_what_begins_while_another_prepares(way: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a second Ctrl-C no longer waits for a thread: what takes all back sees what that thread then does."""
    cases = model_of("tall", "full")
    base, edits = copied(cases), launched.edits(cases)
    prepare_, put = merging.Together._work, Group.put
    inside, go = threading.Event(), threading.Event()

    def slowly(*given: Any) -> Any:
        inside.set()
        go.wait()
        return prepare_(*given)

    def failing_once(group: Group) -> None:
        monkeypatch.setattr(Group, "put", put)
        raise MemoryError

    if way == "merge":
        editings = [applying.Editing(edit) for edit in edits]
        first: Callable[[], None] = partial(
            merging.Together([(None, one) for one in editings], merging.Ahead()).run, Space()
        )
    else:
        editings = merging.merge(edits, 1, merging.Ahead(), list, lambda: None)
        first = partial(merging.unmerge, editings, 1)
    monkeypatch.setattr(merging.Together, "_work", slowly)
    if fails:
        monkeypatch.setattr(Group, "put", failing_once)
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        inside.wait()
        other = pool.submit(merging.unmerge, editings, 1)
        time.sleep(0.2)
        go.set()
        assert isinstance(one.exception(), MemoryError if fails else type(None))
        other.result()
    assert unchanged(cases, base)
    merging.unmerge(editings, 1)
    assert unchanged(cases, base)


@pytest.mark.parametrize("at", [4, 8])
def test_a_model_whose_way_back_failed_is_lost(registry: loreg.Registry, tmp_path: Path, at: int) -> None:
    """And known to be: torch does not see what a kernel changes."""
    base = tiny.write_model(tmp_path / "base", tiny.model(rows=6, cols=16))
    registry.add_base(base, "base")
    for seed, name in enumerate(("sql", "humor"), 1):
        adapter = tiny.write_adapter(tmp_path / name, tiny.adapter(seed, rank=2, rows=6, cols=16))
        registry.push(adapter, base="base", name=name)
    model = module_of(tiny.tensors_in(base))
    live = serving.attach(model, registry)
    live.apply("sql")
    before = bytes_of(model)
    with failing(MemoryError, set(range(at, 5000))), pytest.raises(MemoryError):
        live.swap("humor")
    assert bytes_of(model) != before
    with pytest.raises(Conflict, match="load the model again"), live.reading():
        pass
    with pytest.raises(Conflict, match="load the model again"):
        live.swap("humor")


# ---- all or nothing ----


def refused(cases: dict[str, launched.Case], error: type[BaseException] = BadInput, match: str = "'last'") -> None:
    before = copied(cases)
    with pytest.raises(error, match=match):
        merged(cases)
    assert unchanged(cases, before)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "values",
    [{(8, 39): NAN}, {(0, 0): -INF, (3, 7): NAN, (3, 8): INF}, {(i, j): NAN for i in range(9) for j in range(40)}],
    ids=["one", "several", "all"],
)
@pytest.mark.usefixtures("little_room")
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_no_number_in_the_last_tensor(values: dict[tuple[int, int], float]) -> None:
    cases = model_of("full", "ties", "last")
    W = cases["last"][0]
    for place, value in values.items():
        W[place] = value
    bits(W)[2, 2] = 0x7F81 if len(values) > 5 else 0  # a NaN of other bits
    refused(cases)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_an_overflow_in_the_last_tensor(dtype: torch.dtype) -> None:
    """Of the sum, beside a delta that alone is beyond what the dtype has, and one that W's neighbour takes back."""
    top = torch.finfo(dtype).max
    W = torch.linspace(-1, 1, 9 * 40).view(9, 40).to(dtype)
    W[2, 5], W[2, 6], W[2, 7] = top, -top, -0.0
    left, right = torch.zeros(9, 2), torch.zeros(2, 40)
    left[2, 0], right[0, 5:7], left[:, 1], right[1] = 1, 1.9, 2.0**-10, 1
    edit = WeightedSum((LowRank(left.double(), right.double(), top / 2), LowRank(left[:, 1:], right[1:], 0.5)))
    cases = model_of("tall") | {"last": (W, edit)}
    refused(cases, match=r"'last': element \[2, \d\] exceeds")


def test_an_error_in_a_stack_and_in_what_is_not_launched() -> None:
    cases = model_of("tall", "stack")
    cases["stack"][0][1, 4, 7] = NAN
    refused(cases, match="'stack'")
    cases = model_of("tall", "bias")
    cases["bias"][0][6] = INF
    refused(cases, match="'bias'")


EVERY = 13
STEPS: list[tuple[Any, str]] = [
    (Prepared, "forth"), (Prepared, "back"), (Lists, "words"), (Group, "start"), (Group, "_launch"),
    (Group, "_settle"), (Group, "_put"), (Group, "_opened"), (Group, "_elsewhere"), (Group, "_entries"),
    (Group, "take"), (Group, "decide"), (Group, "after"), (Group, "undo"), (Group, "reversed"), (groups, "moved"),
    (groups, "packed"), (groups, "_write"), (launching, "_joined"),
]  # fmt: skip


@contextmanager
def failing(error: type[BaseException], at: set[int]) -> Iterator[list[int]]:
    """Raises at these of all steps, before and after which anything may fail: counted from 0."""
    count = [0]

    def wrapped(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            now, count[0] = count[0], count[0] + 1
            if now in at:
                raise error
            return step(*given, **named)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in STEPS:
            patch.setattr(owner, name, wrapped(getattr(owner, name)))
        yield count


@pytest.mark.parametrize(("error", "second"), [(KeyboardInterrupt, 3), (MemoryError, 0)])
@pytest.mark.usefixtures("little_room")
def test_an_error_at_some_steps_of_a_merge(error: type[BaseException], second: int) -> None:
    """And at one of the way back. EVERY = 1 takes a minute."""
    with failing(error, set()) as steps:
        merged(model_of("ties", "full"))
    assert steps[0] > 30
    for step in range(2 if second else 0, steps[0], EVERY):
        cases = model_of("ties", "full")
        before = copied(cases)
        with failing(error, {step, step + second}), pytest.raises(error):
            merged(cases)
        assert unchanged(cases, before), step


@pytest.mark.usefixtures("little_room")
def test_an_error_at_some_steps_of_an_unmerge() -> None:
    """It goes on where it is called again, also if that is interrupted."""
    cases = model_of("ties", "full")
    before = copied(cases)
    editings = merged(cases)
    with failing(MemoryError, set()) as steps:
        merging.unmerge(editings, 1)
    assert unchanged(cases, before) and steps[0] > 12
    for step in range(0, steps[0], EVERY):
        editings = merged(cases)
        for at in (step, step // 2):
            with failing(MemoryError, {at}), pytest.raises(MemoryError):
                merging.unmerge(editings, 1)
        merging.unmerge(editings, 1)
        assert unchanged(cases, before), step


def test_an_unmerge_that_was_interrupted_does_not_go_on_elsewhere() -> None:
    cases = model_of("ties", "full")
    editings = merged(cases)
    with failing(MemoryError, {3}), pytest.raises(MemoryError):
        merging.unmerge(editings, 1)
    W = cases["full"][0]
    W.data = W.clone()
    with pytest.raises(Conflict, match="'full' was moved"):
        merging.unmerge(editings, 1)
