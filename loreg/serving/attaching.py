"""``attach``: adapters in and out of a live model, thousands of times, and the base's own bytes at the end.

live = serving.attach(model, registry)
live.apply("sql + humor")
live.swap("0.5*sql")
live.restore()
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import threading
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial, update_wrapper
from typing import Any

import torch

from loreg.digest import Digest
from loreg.errors import Conflict, NotFound, UsageError
from loreg.format.reference import parse_expression
from loreg.registry import Registry
from loreg.serving import signals
from loreg.serving.defaults import default_registry
from loreg.serving.live import Check, Merged, Ready, prepare, state_of
from loreg.serving.originals import Originals
from loreg.serving.places import Layout, layout_of
from loreg.serving.readers import Readers
from loreg.serving.resolving import Resolver
from loreg.serving.twins import in_thread

KEPT = 8
"""Expressions that stay prepared: with their factors, on a GPU too."""


@dataclass(frozen=True, slots=True)
class State:
    """What is merged into a model. ``expression`` None: nothing, it has the base's bytes.

    ``terms``: each version with its weight, ``scale`` included. ``changes``: how often it was changed so far.
    ``touched_bytes``: of the parameters that are edited; ``undo_bytes``: of what is kept to take it back.
    """

    expression: str | None = None
    method: str = "linear"
    scale: float = 1.0
    terms: tuple[tuple[Digest, float], ...] = ()
    touched_bytes: int = 0
    undo_bytes: int = 0
    changes: int = 0


def attach(
    model: torch.nn.Module,
    registry: Registry | None = None,
    *,
    check: Check = "touched",
    threads: int | None = None,
    keep: int = KEPT,
    guard: bool = True,
) -> Live:
    """Have adapters in ``model``, in place, with the way back: see ``Live``.

    ``model``: as ``merge_`` takes it; parameters that are sharded (DTensor, FSDP), quantised, on the meta device or
    not contiguous are refused by name where an adapter adapts them. ``check``: ``touched`` compares what the adapters
    know of their base with the model before they are first merged, each parameter once; ``none`` takes it as it is.
    ``threads``: of the CPU. ``keep``: how many expressions stay prepared. ``guard``: every forward pass of ``model``
    waits for a change that is under way, and a change for those (of a compiled model, attach what ``torch.compile``
    returned); else whoever calls it has to, by ``reading``.
    """
    if keep < 0:
        raise UsageError(f"{keep} prepared expressions cannot be kept: expected at least 0.")
    return Live(model, registry or default_registry(), check, threads, keep, guard)


class Live:
    """A model with adapters in it. Thread-safe: changes wait for each other, and for those who read.

    After a change every parameter has, byte for byte, what ``Registry.merge`` writes for the expression; after
    ``restore`` what it had before the first. A change is all or nothing, whatever is raised: the model is then as it
    was. A reader sees what was before a change or after it, and never something between: a forward pass of the model
    that is attached is a reader (``guard``), and so is a block of ``reading``, in which a whole generation, of many
    forward passes, sees one state.
    """

    def __init__(
        self, model: torch.nn.Module, registry: Registry, check: Check, threads: int | None, keep: int, guard: bool
    ) -> None:
        self._model, self._registry = model, registry
        self._check, self._threads, self._keep = check, threads, keep
        self._readers = Readers()
        self._merged: Merged | None = None
        self._state = State()
        self._given: tuple[float, str, Mapping[str, Any] | None] = 1.0, "linear", None
        self._half = self._lost = False
        self._preparing = threading.Lock()
        self._ready: OrderedDict[tuple[object, ...], Ready] = OrderedDict()
        self._layout: Layout = {}
        self._originals = Originals()
        self._guard = _Guarded(model, self._readers, self._require_whole) if guard else None
        if self._guard is not None:
            model.forward = self._guard

    @property
    def state(self) -> State:
        """What is merged into the model now."""
        return self._state

    def apply(self, expression: str, *, method: str = "linear", parameters: Mapping[str, Any] | None = None) -> State:
        """Merge ``expression`` into the base. Raises Conflict if something is merged already (``swap`` is what
        replaces that), and what ``merge_`` raises."""
        return self._change(expression, 1.0, method, parameters, replace=False)

    def swap(self, expression: str, *, method: str = "linear", parameters: Mapping[str, Any] | None = None) -> State:
        """Merge ``expression`` into the base, in place of whatever is merged into it now, in one pass over what
        either changes. Raises what ``merge_`` raises, and Conflict if a parameter was changed by somebody else."""
        return self._change(expression, 1.0, method, parameters, replace=True)

    def scale(self, weight: float) -> State:
        """Merge what is merged now with ``weight`` times the weights of its expression, as that was given: 1 is the
        expression itself, and 0 the base. Raises UsageError if nothing is merged, or ``weight`` is no number."""
        expression, (_, method, parameters) = self._state.expression, self._given
        if expression is None:
            raise UsageError("nothing is merged into the model that could be scaled: apply an expression first.")
        if not math.isfinite(weight):
            raise UsageError(f"{weight} is not a weight: expected a finite number.")
        return self._change(expression, weight, method, parameters, replace=True)

    def restore(self, *, verify: bool = True) -> State:
        """Give every parameter the bytes that it had before the first ``apply``.

        ``verify``: what was edited is hashed, and compared with the digest that it had before. Raises Conflict if a
        parameter was changed by somebody else, CheckFailed if bytes differ. If it is interrupted it goes on to the
        end first.
        """
        with self._readers.writing(), signals.default().time("change", done="restore"):
            if self._lost:
                self._require_whole()
            if self._merged is not None:
                self._undo(self._merged)
            if verify:
                self._originals.verify()
            return self._state

    @contextmanager
    def reading(self) -> Iterator[State]:
        """A block in which nothing changes: of as many threads as like. What is called in it by ``asyncio.to_thread``
        is a part of it; a thread that is begun in it otherwise is a reader of its own, which waits behind a change
        that waits for the block, so that the block must not wait for that thread. Raises Conflict if a change failed
        half-way and could not be taken back."""
        with self._readers.reading():
            self._require_whole()
            yield self._state

    def detach(self) -> None:
        """Restore the model, and take the guard off it."""
        self.restore()
        if self._guard is not None:
            self._guard.remove()

    apply_async = in_thread(apply)
    swap_async = in_thread(swap)
    scale_async = in_thread(scale)
    restore_async = in_thread(restore)

    def prepare(
        self, expression: str, *, method: str = "linear", parameters: Mapping[str, Any] | None = None
    ) -> None:
        """Load what ``expression`` needs, so that an ``apply`` or ``swap`` of it is the pass alone. Changes nothing,
        and waits for nobody."""
        self._prepared(expression, 1.0, method, parameters)

    prepare_async = in_thread(prepare)

    # ---- inside ----

    def _change(
        self, expression: str, scale: float, method: str, parameters: Mapping[str, Any] | None, replace: bool
    ) -> State:
        ready = self._prepared(expression, scale, method, parameters)
        done = "swap" if self._merged is not None else "apply"
        with self._readers.writing(), signals.default().time("change", done=done):
            self._require_whole()
            if self._merged is not None and not replace:
                raise Conflict(
                    f"{self._state.expression!r} is merged into the model already: swap it for {expression!r}, or "
                    "restore the model first."
                )
            self._originals.compare(ready, self._merged, self._check == "touched")
            if self._merged is not None:
                self._merged.check(self._model)
            terms = tuple((adapter.digest, adapter.weight) for adapter in ready.adapters)

            def told(merged: Merged) -> None:
                sizes = merged.touched_bytes, merged.undo_bytes
                state = State(expression, method, scale, terms, *sizes, self._state.changes + 1)
                self._merged, self._given, self._state = merged, (scale, method, parameters), state

            change = ready.apply if self._merged is None else partial(ready.replace, self._merged)
            self._or_as_it_was(ready, partial(change, told))
            return self._state

    def _or_as_it_was(self, ready: Ready, change: Callable[[Callable[[], None]], object]) -> None:
        """Where ``change`` fails, this says again what it said before; and that the model is lost, unless what is
        given to it was called, which says that all parameters are as they were, or none was changed."""
        was, whole = (self._merged, self._given, self._state), False
        tensors = [edit.target.place.tensor for edit in ready.edits]
        tensors += self._merged.tensors.values() if self._merged is not None else ()
        before = [state_of(tensor) for tensor in tensors]

        def back() -> None:
            nonlocal whole
            whole = True

        try:
            change(back)
        except BaseException:
            self._merged, self._given, self._state = was
            uncounted = any(tensor.is_inference() for tensor in tensors)
            after = [state_of(tensor) for tensor in tensors]
            self._lost = not whole and (uncounted or after != before)
            raise

    def _prepared(self, expression: str, scale: float, method: str, parameters: Mapping[str, Any] | None) -> Ready:
        """What was prepared before, if it is of the same versions, and the model has the same tensors in the same
        memory."""
        key, layout = self._key(expression, scale, method, parameters), layout_of(self._model)
        with self._preparing:
            if layout != self._layout:
                self._ready.clear()
                self._layout = layout
            ready = self._ready.pop(key, None) if key is not None else None
            if ready is None:
                ready = prepare(
                    self._model, expression, self._registry, method=method, parameters=parameters, check="none",
                    threads=self._threads, scale=scale,
                )  # fmt: skip
            if key is not None and self._keep:
                self._ready[key] = ready
                while len(self._ready) > self._keep:
                    self._ready.popitem(last=False)
            return ready

    def _key(
        self, expression: str, scale: float, method: str, parameters: Mapping[str, Any] | None
    ) -> tuple[object, ...] | None:
        """None for what is not found: to prepare it says why."""
        find = Resolver.of(self._registry).find
        try:
            terms = [(find(str(term.reference)).digest, term.weight) for term in parse_expression(expression)]
        except NotFound:
            return None
        return (tuple(terms), scale, method, json.dumps(dict(parameters or {}), sort_keys=True, default=str))

    def _undo(self, merged: Merged) -> None:
        """To the end, whatever happens on the way."""
        restored = False, None, State(changes=self._state.changes + 1)
        merged.check(self._model)
        self._half = True
        try:
            merged.undo(self._model)
        except BaseException:
            if not merged.undone:
                merged.undo(self._model)  # it goes on where it was
            self._half, self._merged, self._state = restored
            raise
        self._half, self._merged, self._state = restored

    def _require_whole(self) -> None:
        if self._lost or self._half:
            raise Conflict(
                "a change of the model failed half-way, and could not be taken back: "
                + ("load the model again." if self._lost else "restore it, which goes on where it was.")
            )


class _Guarded:
    """The ``forward`` of a model whose every pass is a reader. Not by hooks: none of these is called when Ctrl-C ends
    a pass, and a reader that never leaves would stop all changes. A copy of the model has its own again."""

    def __init__(self, model: torch.nn.Module, readers: Readers, check: Callable[[], None]) -> None:
        self._model, self._readers, self._check = weakref.ref(model), readers, check
        self._own = model.__dict__.get("forward")  # of a model that torch compiled, or another program wrapped
        update_wrapper(self, self._own or type(model).forward)
        with suppress(TypeError, ValueError):  # of what is no Python
            self.__signature__ = inspect.signature(model.forward)  # without the ``self`` of its class's

    def __call__(self, *given: Any, **named: Any) -> Any:
        with self._readers.reading():
            self._check()
            return self._forward(self._model())(*given, **named)

    def remove(self) -> None:
        model = self._model()
        if model is not None and model.__dict__.get("forward") is self:
            del model.forward
            if self._own is not None:
                model.forward = self._own

    def _forward(self, model: Any) -> Callable[..., Any]:
        return self._own if self._own is not None else types.MethodType(type(model).forward, model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._own is not None:
            return copy.deepcopy(self._own, memo)
        return self._forward(memo[id(self._model())])

    def __reduce__(self) -> tuple[Any, ...]:
        model: Any = self._model()
        if self._own is not None:
            return copy.copy, (self._own,)
        return getattr, (model, "forward")  # which is its class's, before it has what else it has
