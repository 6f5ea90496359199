"""``serving.attach``: adapters in and out of a live model, by whoever, and the base bit for bit at the end."""

from __future__ import annotations

import asyncio
import copy
import inspect
import io
import itertools
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import steps
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_models import Bytes, bytes_of, module_of

import loreg
from loreg import serving
from loreg.algebra import native
from loreg.algebra.corrections import Corrections
from loreg.errors import BadInput, BaseMismatch, CheckFailed, Conflict, NotFound, Unsupported, UsageError
from loreg.serving import applying, swapping
from loreg.serving.readers import Readers

compiled = pytest.mark.skipif(native.library is None, reason="loreg was installed where there was no C compiler")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    steps.make_small(monkeypatch)


@pytest.fixture
def model(pushed: loreg.Registry, tmp_path: Path) -> torch.nn.Module:
    return module_of(tiny.tensors_in(tmp_path / "base"))


def merged(registry: loreg.Registry, base: Path, expression: str, **options: Any) -> Bytes:
    """What the same merge gives on a fresh model."""
    model = module_of(tiny.tensors_in(base))
    serving.merge_(model, expression, registry, **options)
    return bytes_of(model)


def push_dora(registry: loreg.Registry, folder: Path) -> None:
    """Of which the originals are kept, as its edit reads them; with a norm that is replaced."""
    rng, norm = np.random.default_rng(5), tiny.model()[tiny.NORM]
    saved = tiny.write_adapter(
        folder, tiny.adapter(seed=4), full={tiny.NORM: tiny.tensor(norm.dtype, norm.values + 1)},
        modules_to_save=["norm"], use_dora=True,
    )  # fmt: skip
    file = saved / "adapter_model.safetensors"
    tensors = tiny.contents(file)
    for path, rows in ((tiny.Q, 8), (tiny.V, 6)):
        tensors[f"base_model.model.{path}.lora_magnitude_vector"] = tiny.normal(rng, "F32", rows)
    file.write_bytes(tiny.container(tensors.items(), {"format": "pt"}))
    registry.push(saved, base="base", name="dora")


EXPRESSIONS = ["sql", "humor", "0.5*sql - 2*humor", "dora", "humor + dora"]


@pytest.mark.usefixtures("engine")
def test_after_each_change_it_is_what_a_fresh_merge_is(
    pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path
) -> None:
    push_dora(pushed, tmp_path / "dora")
    before = bytes_of(model)
    live = serving.attach(model, pushed)
    assert live.state == serving.State()
    for first in EXPRESSIONS:
        live.apply(first)
        for second in EXPRESSIONS:
            state = live.swap(second)
            assert bytes_of(model) == merged(pushed, tmp_path / "base", second), (first, second)
            assert state == live.state and state.expression == second and state.undo_bytes > 0
        assert live.restore().expression is None
        assert bytes_of(model) == before


def test_other_methods_and_their_parameters(pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path) -> None:
    before, live = bytes_of(model), serving.attach(model, pushed)
    given: dict[str, Any] = {"method": "ties", "parameters": {"density": 0.5}}
    live.swap("sql + humor", **given)
    assert bytes_of(model) == merged(pushed, tmp_path / "base", "sql + humor", **given)
    live.scale(0.5)
    assert live.state.method == "ties"
    assert bytes_of(model) == merged(pushed, tmp_path / "base", "0.5*sql + 0.5*humor", **given)
    live.swap("sql")
    assert bytes_of(model) == merged(pushed, tmp_path / "base", "sql")
    live.restore()
    assert bytes_of(model) == before


def test_a_scale_is_of_the_expression_and_not_of_what_it_was(
    pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path
) -> None:
    before, live = bytes_of(model), serving.attach(model, pushed)
    with pytest.raises(UsageError, match="nothing is merged"):
        live.scale(0.5)
    live.apply("sql - 2*humor")
    for weight, same in ((0.5, "0.5*sql - humor"), (3.0, "3*sql - 6*humor"), (1.0, "sql - 2*humor")):
        assert live.scale(weight).scale == weight
        assert bytes_of(model) == merged(pushed, tmp_path / "base", same)
    assert [w for _, w in live.state.terms] and {abs(w) for _, w in live.state.terms} == {1.0, 2.0}
    live.scale(0.0)
    assert bytes_of(model) == before
    with pytest.raises(UsageError, match="nan is not a weight"):
        live.scale(float("nan"))
    live.scale(1.0)
    assert bytes_of(model) == merged(pushed, tmp_path / "base", "sql - 2*humor")


def test_what_is_refused_leaves_everything(pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path) -> None:
    live = serving.attach(model, pushed)
    live.apply("sql")
    state, now = live.state, bytes_of(model)
    with pytest.raises(Conflict, match="'sql' is merged into the model already: swap it"):
        live.apply("humor")
    for wrong in (lambda: live.swap("nobody"), lambda: live.swap("sql +"), lambda: live.swap("sql", method="none")):
        with pytest.raises((NotFound, UsageError)):
            wrong()
    other = tiny.write_model(tmp_path / "other", tiny.model(seed=8))
    pushed.add_base(other, "other")
    pushed.push(tmp_path / "humor", base="other", name="stranger")
    with pytest.raises(BaseMismatch, match=r"stranger:v1 was trained on 'other', and the model differs"):
        live.swap("stranger")
    assert (live.state, bytes_of(model)) == (state, now)
    live.restore()
    with pytest.raises(BaseMismatch):
        live.apply("stranger")


def test_a_swap_hashes_nothing_that_it_has_hashed(
    pushed: loreg.Registry, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loreg.serving.targets import Leaves

    hashed: list[str] = []
    real = Leaves._leaf

    def leaf(self: Leaves, tensor: torch.Tensor) -> Any:
        hashed.append(self._name)
        return real(self, tensor)

    monkeypatch.setattr(Leaves, "_leaf", leaf)
    live = serving.attach(model, pushed)
    live.apply("sql")
    assert sorted(hashed) == sorted(pushed.resolve("sql").manifest.base.touched)
    live.swap("humor")
    hashed.clear()
    for expression in ("sql", "humor", "sql + humor"):
        live.swap(expression)
    live.restore(verify=False)
    live.apply("sql")
    assert hashed == []
    live.restore()
    assert set(hashed) == set(pushed.resolve("sql").manifest.base.touched)


def test_a_change_by_somebody_else_is_not_lost(pushed: loreg.Registry, model: torch.nn.Module) -> None:
    live = serving.attach(model, pushed)
    live.apply("sql")
    with torch.no_grad():
        model.get_parameter(f"{tiny.Q}.weight")[0, 0] += 1
    now = bytes_of(model)
    for change in (lambda: live.swap("humor"), lambda: live.restore()):
        with pytest.raises(Conflict, match=f"{tiny.Q}.weight.*was changed since 'sql'"):
            change()
    assert bytes_of(model) == now
    fresh = serving.attach(model, pushed)
    with pytest.raises(BaseMismatch):
        fresh.apply("sql")


def test_a_model_that_is_trained_between_is_taken_as_it_is(pushed: loreg.Registry, model: torch.nn.Module) -> None:
    live = serving.attach(model, pushed, check="none")
    live.apply("sql")
    live.restore()
    with torch.no_grad():
        model.get_parameter(f"{tiny.Q}.weight").add_(0.25)
    before = bytes_of(model)
    live.apply("sql")
    live.swap("humor")
    live.restore()
    assert bytes_of(model) == before


def test_a_restore_is_compared(
    pushed: loreg.Registry, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = serving.attach(model, pushed)
    live.apply("sql")
    real = applying.Editing.undo

    def wrong(self: applying.Editing, space: applying.Space) -> None:
        real(self, space)
        if self.edit.target.name == f"{tiny.V}.weight":
            self.edit.target.place.weight.view(-1)[3] += 1

    monkeypatch.setattr(applying.Editing, "undo", wrong)
    with pytest.raises(CheckFailed, match=f"1 of 2 restored parameters.*{tiny.V}.weight"):
        live.restore()


# ---- all or nothing ----


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError(), BadInput("no")])
@pytest.mark.parametrize(("old", "new"), [("sql", "humor"), ("sql", "dora"), ("dora", "humor + sql")])
@pytest.mark.usefixtures("engine")
def test_an_error_at_any_step_of_a_swap(
    pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path, old: str, new: str, error: BaseException,
    threads: int,
) -> None:  # fmt: skip
    """The model is then as it was, and still knows the way back."""
    push_dora(pushed, tmp_path / "dora")
    before = bytes_of(model)
    live = serving.attach(model, pushed, threads=threads)
    live.apply(old)
    now, state = bytes_of(model), live.state
    with steps.failing(error, lambda _: False) as count:
        live.swap(new)
    live.swap(old)
    for step in range(1, count[0] + 1, 2):
        with steps.failing(error, step.__eq__), pytest.raises(type(error)):
            live.swap(new)
        assert bytes_of(model) == now, step
        assert (live.state.expression, live.state.undo_bytes) == (state.expression, state.undo_bytes)
    live.swap(new)
    assert bytes_of(model) == merged(pushed, tmp_path / "base", new)
    live.restore()
    assert bytes_of(model) == before


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("old", "new"), [("sql", "humor"), ("dora", "humor + sql")])
@compiled
def test_no_memory_for_what_undoes_a_step_that_is_done(
    pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path, old: str, new: str, threads: int
) -> None:
    """It is then taken back by what is still in the workspace."""
    push_dora(pushed, tmp_path / "dora")
    live, moves = serving.attach(model, pushed, threads=threads), [0]
    before, real = bytes_of(model), Corrections.move_out
    for step in itertools.count(1):
        live.apply(old)
        now = bytes_of(model)
        moves[0] = 0

        def move_out(self: Corrections, step: int = step) -> None:
            moves[0] += 1
            if moves[0] == step:
                raise MemoryError
            real(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Corrections, "move_out", move_out)
            with suppress(MemoryError):
                live.swap(new)
        if moves[0] >= step:
            assert bytes_of(model) == now, step
        live.restore()
        assert bytes_of(model) == before, step
        if moves[0] < step:
            break
    assert step > 3


@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_that_is_not_recorded_loses_the_model(
    pushed: loreg.Registry, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    """Rows are changed, and an error comes before what undoes that is kept: rather lost, in words, than wrong."""
    live, steps_done = serving.attach(model, pushed, threads=threads), [0]
    live.apply("sql")

    def piece(*given: Any) -> applying.Piece:
        steps_done[0] += 1
        if steps_done[0] == 2:
            raise MemoryError
        return real(*given)

    real = applying.Piece
    monkeypatch.setattr(applying, "Piece", piece)
    with pytest.raises((MemoryError, CheckFailed)):
        live.swap("humor")
    for use in (lambda: live.swap("sql"), lambda: live.restore(), lambda: live.reading().__enter__()):
        with pytest.raises(Conflict, match="load the model again"):
            use()


@pytest.mark.parametrize("inference", [False, True])
def test_where_the_way_back_fails_too_the_model_is_not_used(
    pushed: loreg.Registry, tmp_path: Path, inference: bool
) -> None:
    """Also where torch counts no changes."""
    with torch.inference_mode(inference):
        model = module_of(tiny.tensors_in(tmp_path / "base"))
    assert model.get_parameter(f"{tiny.Q}.weight").is_inference() is inference
    live = serving.attach(model, pushed, threads=1)
    with steps.failing(MemoryError(), (3).__eq__), pytest.raises(MemoryError):
        live.apply("sql")
    live.apply("sql")
    with steps.failing(MemoryError(), (3).__le__), pytest.raises(MemoryError):
        live.swap("humor")
    for use in (lambda: live.swap("sql"), lambda: live.restore(), lambda: live.reading().__enter__()):
        with pytest.raises(Conflict, match="load the model again"):
            use()


def test_a_restore_goes_on_to_the_end(pushed: loreg.Registry, model: torch.nn.Module) -> None:
    before, live = bytes_of(model), serving.attach(model, pushed, threads=1)
    live.apply("sql")
    with steps.failing(KeyboardInterrupt(), (3).__eq__), pytest.raises(KeyboardInterrupt):
        live.restore()
    assert bytes_of(model) == before and live.state.expression is None
    live.apply("sql")
    with steps.failing(MemoryError(), {3, 4}.__contains__), pytest.raises(MemoryError):
        live.restore()
    assert bytes_of(model) != before
    with pytest.raises(Conflict, match="restore it, which goes on"):
        live.swap("humor")
    live.restore()
    assert bytes_of(model) == before


# ---- readers ----


class Sum(torch.nn.Module):
    """A model of which every pass looks at all parameters twice, slowly enough for a change to come between."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        for name, child in inner.named_children():
            self.add_module(name, child)

    def forward(self, pause: float = 0.0) -> tuple[Bytes, Bytes]:
        first = bytes_of(self)
        time.sleep(pause)
        return first, bytes_of(self)


def test_eight_readers_and_one_who_swaps(pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path) -> None:
    """Each pass sees one whole state, of those that there were."""
    summed = Sum(model)
    live = serving.attach(summed, pushed)
    allowed = [bytes_of(model), *(merged(pushed, tmp_path / "base", e) for e in ("sql", "humor", "sql - humor"))]
    stop, wrong, seen = threading.Event(), list[str](), set[int]()

    def read() -> None:
        while not stop.is_set():
            first, second = summed(0.0005)
            if first != second or first not in allowed:
                wrong.append("a mix")
            else:
                seen.add(allowed.index(first))

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        live.swap(("sql", "humor", "sql - humor")[turn % 3])
    live.restore()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and len(seen) >= 3
    assert bytes_of(model) == allowed[0]


def test_without_the_lock_they_would_see_a_mix(
    pushed: loreg.Registry, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail."""
    real = swapping.Change.run

    def slowly(self: swapping.Change, space: applying.Space) -> None:
        time.sleep(0.002)
        real(self, space)

    monkeypatch.setattr(swapping.Change, "run", slowly)
    summed = Sum(model)
    live = serving.attach(summed, pushed, guard=False)
    live.apply("sql")
    stop, mixed = threading.Event(), [0]

    def read() -> None:
        while not stop.is_set():
            first, second = summed(0.0005)
            mixed[0] += first != second

    thread = threading.Thread(target=read)
    thread.start()
    for turn in range(40):
        live.swap(("humor", "sql")[turn % 2])
    stop.set()
    thread.join()
    assert mixed[0] > 0


def test_a_block_of_reading_sees_one_state_in_many_passes(pushed: loreg.Registry, model: torch.nn.Module) -> None:
    summed = Sum(model)
    live = serving.attach(summed, pushed)
    live.apply("sql")
    inside, done = threading.Event(), threading.Event()
    states: list[Any] = []

    def generate() -> None:
        with live.reading() as state:
            states.append((state.expression, summed()))
            inside.set()
            done.wait(0.2)
            states.append((live.state.expression, summed()))  # while the swap waits

    thread = threading.Thread(target=generate)
    thread.start()
    inside.wait()
    live.swap("humor")
    done.set()
    thread.join()
    assert states[0] == states[1] and live.state.expression == "humor"


def test_whoever_reads_cannot_change(pushed: loreg.Registry, model: torch.nn.Module) -> None:
    """It would wait for itself."""
    live = serving.attach(model, pushed)
    with live.reading(), pytest.raises(UsageError, match=r"in the middle of a forward pass"):
        live.apply("sql")
    live.apply("sql")


def test_a_pass_that_ends_badly_does_not_stop_changes(pushed: loreg.Registry, model: torch.nn.Module) -> None:
    class Failing(Sum):
        def forward(self, error: BaseException) -> None:  # type: ignore[override]
            raise error

    failing_ = Failing(model)
    live = serving.attach(failing_, pushed)
    for error in (KeyboardInterrupt(), RuntimeError()):
        with pytest.raises(type(error)):
            failing_(error)
    live.apply("sql")


def test_the_guard_is_taken_off_and_does_not_travel(
    pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path
) -> None:
    summed = Sum(model)
    live = serving.attach(summed, pushed)
    live.apply("sql")
    twin = copy.deepcopy(summed)
    live.swap("humor")
    assert twin()[0] == merged(pushed, tmp_path / "base", "sql") != summed()[0]
    file = io.BytesIO()
    torch.save(summed, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)()[0] == summed()[0]
    live.detach()
    assert "forward" not in summed.__dict__
    assert summed()[0] == bytes_of(module_of(tiny.tensors_in(tmp_path / "base")))


def test_the_async_twins(pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path) -> None:
    live, before = serving.attach(model, pushed), bytes_of(model)

    async def main() -> list[Bytes]:
        found = []
        await live.prepare_async("sql")
        for change in (
            live.apply_async("sql"),
            live.swap_async("humor"),
            live.scale_async(2.0),
            live.restore_async(),
        ):
            await change
            found.append(bytes_of(model))
        return found

    expected = [merged(pushed, tmp_path / "base", text) for text in ("sql", "humor", "2*humor")]
    assert asyncio.run(main()) == [*expected, before]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_the_lock_lets_one_write_and_many_read(steps: list[tuple[int, bool]]) -> None:
    """Whatever four threads do, of which each does a part of the steps."""
    lock, inside = Readers(), {"readers": 0, "writers": 0}
    guard, wrong = threading.Lock(), list[str]()

    def act(who: int) -> None:
        for owner, writes in steps:
            if owner != who:
                continue
            with lock.writing() if writes else lock.reading():
                kind = "writers" if writes else "readers"
                with guard:
                    inside[kind] += 1
                    if inside["writers"] > 1 or (inside["writers"] and inside["readers"]):
                        wrong.append(str(inside))
                with guard:
                    inside[kind] -= 1

    threads = [threading.Thread(target=act, args=(who,)) for who in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not wrong and not any(thread.is_alive() for thread in threads)


# ---- what is prepared ----


def test_what_was_prepared_is_used_again_until_a_tag_moves(
    pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loreg.serving import attaching

    prepared: list[str] = []
    real = attaching.prepare

    def counting(model: torch.nn.Module, expression: str, *given: Any, **named: Any) -> Any:
        prepared.append(expression)
        return real(model, expression, *given, **named)

    monkeypatch.setattr(attaching, "prepare", counting)
    pushed.tag("sql", "prod")
    live = serving.attach(model, pushed)
    live.prepare("sql:prod")
    for _ in range(3):
        live.swap("sql:prod")
        live.swap("humor")
    assert prepared == ["sql:prod", "humor"]
    other = tiny.write_adapter(tmp_path / "newer", tiny.adapter(seed=9))
    pushed.push(other, base="base", name="sql", tags=["prod"])
    live.swap("sql:prod")
    assert prepared[2:] == ["sql:prod"]
    assert bytes_of(model) == merged(pushed, tmp_path / "base", "sql:v2")


def test_parameters_that_were_replaced_are_looked_for_again(
    pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path
) -> None:
    live = serving.attach(model, pushed)
    live.apply("sql")
    live.restore()
    module = model.get_submodule(tiny.Q)
    module.weight = torch.nn.Parameter(module.weight.detach().clone())
    live.apply("sql")
    assert bytes_of(model) == merged(pushed, tmp_path / "base", "sql")


def test_an_adapter_that_is_removed_while_it_is_merged_is_taken_out_all_the_same(
    pushed: loreg.Registry, model: torch.nn.Module
) -> None:
    from datetime import timedelta

    before, live = bytes_of(model), serving.attach(model, pushed)
    live.apply("sql")
    pushed.remove("sql:v1")
    pushed.collect(grace=timedelta(0))
    with pytest.raises(NotFound):
        live.swap("sql")
    live.swap("humor")
    live.restore()
    assert bytes_of(model) == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_changes(
    data: st.DataObject, pushed: loreg.Registry, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not any(row.name == "dora" for row in pushed.list_versions()):
        push_dora(pushed, tmp_path / "dora")
    model = module_of(tiny.tensors_in(tmp_path / "base"))
    before, live = bytes_of(model), serving.attach(model, pushed)
    weight = st.sampled_from(["", "0.5*", "2*", "0.1*"])
    for _ in range(data.draw(st.integers(1, 5))):
        terms = data.draw(st.lists(st.tuples(weight, st.sampled_from(["sql", "humor"])), min_size=1, max_size=2))
        expression = " + ".join(f"{w}{name}" for w, name in dict(terms).items() or terms)
        live.swap(expression)
        assert bytes_of(model) == merged(pushed, tmp_path / "base", expression)
    live.restore()
    assert bytes_of(model) == before


def test_sharded_parameters_are_refused_by_name(pushed: loreg.Registry, model: torch.nn.Module) -> None:
    """As FSDP and tensor parallelism have them."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        module = model.get_submodule(tiny.Q)
        mesh = init_device_mesh("cpu", (1,))
        module.weight = torch.nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
        before = bytes_of(model.get_submodule(tiny.V))
        with pytest.raises(Unsupported, match=f"{tiny.Q}.weight' of the model is a DTensor"):
            serving.attach(model, pushed).apply("sql")
        assert bytes_of(model.get_submodule(tiny.V)) == before
    finally:
        distributed.destroy_process_group()


# ---- Ctrl-C at any moment ----


class Interrupts:
    """Raises KeyboardInterrupt in this thread where Python looks for signals: the n-th time that, in what changes and
    guards a model, a function begins or one of C's has returned."""

    FILES = ("serving/attaching.py", "serving/live.py", "serving/readers.py", "serving/swapping.py")

    def __init__(self, at: int) -> None:
        self.at, self.seen, self.where = at, 0, ""

    def __enter__(self) -> Interrupts:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: Any, event: str, _: object) -> None:
        path = frame.f_code.co_filename
        if event in ("call", "c_return") and path.endswith(self.FILES):
            self.seen += 1
            if self.seen == self.at:
                self.where = f"{path}:{frame.f_lineno}"
                raise KeyboardInterrupt


@pytest.mark.parametrize("change", ["apply", "swap", "other tensors", "restore", "read"])
def test_ctrl_c_at_any_moment(pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path, change: str) -> None:
    """What the state says is what the model has; nothing is lost, and nobody waits for ever."""
    summed, before = Sum(model), bytes_of(model)
    push_dora(pushed, tmp_path / "dora")  # of one tensor more
    live = serving.attach(summed, pushed, threads=1)
    states = {text: merged(pushed, tmp_path / "base", text) for text in ("sql", "humor", "dora")} | {None: before}
    old, act = {
        "apply": (None, lambda: live.apply("humor")),
        "swap": ("sql", lambda: live.swap("humor")),
        "other tensors": ("dora", lambda: live.swap("sql")),
        "restore": ("sql", lambda: live.restore(verify=False)),
        "read": ("sql", lambda: summed()),
    }[change]
    for text in ("humor", "sql", "dora"):
        live.prepare(text)
    at = 0
    while True:
        at += 1
        live.restore()
        assert bytes_of(model) == before
        if old is not None:
            live.apply(old)
        with Interrupts(at) as interrupts, suppress(KeyboardInterrupt):
            act()
        where = interrupts.where
        assert not live._readers._reading and live._readers._writer is None, where
        assert bytes_of(model) == states[live.state.expression], where
        if not where:
            break
    assert at > 10


def test_one_who_waits_to_change_does_not_wait_for_those_whom_a_reader_calls(
    pushed: loreg.Registry, model: torch.nn.Module
) -> None:
    """They are a part of what it waits for."""
    summed = Sum(model)
    live = serving.attach(summed, pushed)
    live.prepare("sql")
    states: list[Any] = []

    async def main() -> None:
        async def generate() -> None:
            with live.reading() as state:
                while not live._readers._waiting:
                    await asyncio.sleep(0.001)
                states.append((state.expression, (await asyncio.to_thread(summed))[0]))
                with pytest.raises(UsageError, match="in the middle"):  # it would wait for this block
                    await live.swap_async("humor")

        reading = asyncio.ensure_future(generate())
        await asyncio.sleep(0.01)
        changing = asyncio.ensure_future(live.swap_async("sql"))
        await reading
        await changing
        with live.reading() as state:
            states.append(state.expression)

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert states == [(None, states[0][1]), "sql"]


def test_a_context_of_a_reading_that_is_over_reads_nothing() -> None:
    """A task that was begun in one may go on for ever."""
    from contextvars import copy_context

    lock = Readers()
    with lock.reading():
        context = copy_context()

    def change() -> None:
        with lock.writing():
            pass

    context.run(change)


# ---- what the model is by then ----


def test_a_model_that_is_laid_out_otherwise_is_looked_at_again(
    pushed: loreg.Registry, model: torch.nn.Module, tmp_path: Path
) -> None:
    live = serving.attach(model, pushed, check="none")
    live.prepare("sql")
    weight = model.get_parameter(f"{tiny.Q}.weight")
    plain = weight.data
    weight.data = plain.t().contiguous().t()
    with pytest.raises(Unsupported, match=f"{tiny.Q}.weight' of the model is not contiguous"):
        live.apply("sql")
    weight.data = plain
    model.add_module("twin", torch.nn.Module())
    model.get_submodule("twin").register_parameter("weight", weight)
    with pytest.raises(Unsupported, match="are one parameter of the model"):
        live.apply("sql")
    del model.twin
    live.apply("sql")
    assert bytes_of(model) == merged(pushed, tmp_path / "base", "sql")


def test_what_is_prepared_does_not_keep_a_model_that_was_replaced(
    pushed: loreg.Registry, model: torch.nn.Module
) -> None:
    import weakref

    live = serving.attach(model, pushed, check="none")
    for text in ("sql", "humor", "sql + humor"):
        live.prepare(text)
    old = weakref.ref(model.get_parameter(f"{tiny.Q}.weight"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    live.prepare("sql")
    assert old() is None


def test_what_others_change_after_a_restore_is_not_taken_for_a_wrong_one(
    pushed: loreg.Registry, model: torch.nn.Module
) -> None:
    live = serving.attach(model, pushed)
    live.apply("sql")
    live.restore(verify=False)
    with torch.no_grad():
        model.get_parameter(f"{tiny.Q}.weight").add_(1)
    live.restore()


def test_the_signature_of_a_pass_is_what_it_was(pushed: loreg.Registry, model: torch.nn.Module) -> None:
    """By which transformers tells what a model takes, and exporters call it."""
    summed = Sum(model)
    before = inspect.signature(summed.forward)
    serving.attach(summed, pushed)
    assert inspect.signature(summed.forward) == before
