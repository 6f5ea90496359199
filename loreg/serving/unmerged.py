"""``unmerged``: several adapters side by side in one batch, each request its own, beside a base that stays as it is.

    with serving.unmerged(model, ["sql", "humor"]) as mixed:
        with mixed.rows(["sql", "humor", None, "sql"]):
            model.generate(**batch)

Each adapted layer adds s·B(Ax) to its output: one product of a batch of matrices with the factors of each row's
adapter (``torch.bmm``), whatever adapters the rows mix. DoRA scales the output of the base too, by a number for each
channel that is known beforehand, and a trained bias shifts it. Weights are neither copied nor written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from loreg.errors import UsageError
from loreg.registry import Registry
from loreg.serving.defaults import default_registry
from loreg.serving.live import Check
from loreg.serving.sites import Chosen, Site, sites
from loreg.serving.twins import in_thread

Row = int | str | None
"""What serves a row: an adapter, by its place among the references or by the reference itself; None: none."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The adapters of the rows of a batch, -1 for none; and what that means for a layer."""

    adapters: tuple[int, ...]
    _chosen: dict[tuple[object, ...], Chosen | None] = field(default_factory=dict)

    def of(self, site: Site) -> Chosen | None:
        """None where it adds nothing to any. Made once for layers that have factors of the same adapters."""
        key = site.slots, site.bends, site.A.device
        if key not in self._chosen:
            self._chosen[key] = site.choose(self.adapters)
        return self._chosen[key]


_ROWS: ContextVar[Mapping[int, _Rows]] = ContextVar("loreg_rows", default={})  # noqa: B039 - never written to
"""By the ``id`` of an ``Unmerged`` that is entered. Of a context: threads and tasks that share a model do not mix."""


_SCALED: WeakKeyDictionary[torch.nn.Module, Unmerged] = WeakKeyDictionary()
"""Layer → the one that scales its outputs, where one that is entered does."""


def unmerged(
    model: torch.nn.Module,
    references: Sequence[str | None],
    registry: Registry | None = None,
    *,
    check: Check = "touched",
    dtype: torch.dtype | None = None,
) -> Unmerged:
    """The adapters of ``references``, loaded to be served by ``model`` side by side: enter it, and name the adapter
    of each row by ``Unmerged.rows``.

    ``model``: any ``torch.nn.Module``, its parameters under the names of the checkpoint or of transformers 5; what is
    adapted must be ``torch.nn.Linear``, ``torch.nn.Embedding`` or transformers' ``Conv1D``, on CPU or CUDA devices.
    ``references``: adapters of this base; None, anywhere among them, is the base alone. ``registry``: default
    ``loreg.open()``. ``check``: as ``merge_`` has it: ``touched`` compares every parameter that the adapters adapt
    with what they know of their base.

    The factors lie on the devices of their layers, padded to the largest rank of each layer, with the scale folded
    into B. ``dtype``: theirs, and that of the product, also under autocast; default is the widest of the factors and
    the weight. Each factor is rounded once to it (exact where it is as wide as the stored one and the scale a power
    of two), and an output once to its own dtype. What None serves is the base's own output, and a weight that two
    layers share is adapted in those layers that the adapter adapts.

    *DoRA* (Liu et al. 2024, arXiv 2402.09353, eq. 5). With y the base's output and b its bias, a row gets
    g∘(y - b) + b + s·g∘B(Ax), g = m / ‖W + sBA‖ of rows: what merged weights give, also of a composed version, with
    several terms at any weights. The norms are computed here in float64, by blocks of W as the model has it now; g is
    rounded once, to float32 or to ``dtype`` if that is wider, and multiplied in it. What the base has rounded of y is
    scaled with it. *Biases*: one that is added to the layer's, and one that takes its place, of a
    ``torch.nn.LayerNorm`` of one dimension too, are added to the output, in float32 or wider. Rows of other adapters,
    and of none, are to the bit what they are without such beside them.

    What was read of the model, the weight for a norm, the bias that is replaced or not scaled, has to stay as it is:
    to enter, and a row for which it counts, raises Conflict where it is another parameter by now, or was changed, as
    torch counts that (a change by way of memory that is shared is not counted, nor one of inference tensors). Such
    rows are served again once the old state is back, as ``attach`` brings it. Of several that are entered one may
    scale a layer.

    Under ``torch.compile`` the graph breaks at each layer that is adapted; outputs stay right.

    Raises NotFound, UsageError, BaseMismatch for a model of another base; BadInput for a tensor of an adapter that
    the model has no place for, and for DoRA of a row of zeros; Unsupported, naming it, for what is neither a sum of
    two factors' products nor DoRA of one with norms of outputs (LyCORIS' norms of inputs, rotations, (IA)³,
    convolutions, weights that are replaced) and for layers of other classes (experts, attention that reads its
    weights itself), before any layer is changed.
    """
    registry = registry or default_registry()
    if check not in ("touched", "none"):
        raise UsageError(f"{check!r} is not a kind of check: expected 'touched' or 'none'.")
    return Unmerged(tuple(references), tuple(sites(model, references, registry, check=check, dtype=dtype)))


unmerged_async = in_thread(unmerged)


class Unmerged:
    """Adapters beside a model, which they change only while this is entered: then layers have a forward hook, which
    is removed whatever is raised. Parameters and ``state_dict`` stay as they are."""

    def __init__(self, references: tuple[str | None, ...], found: tuple[Site, ...]) -> None:
        self.references = references
        self._sites = found
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def nbytes(self) -> int:
        """Of all factors on their devices, and of what scales and shifts."""
        return sum(site.nbytes for site in self._sites)

    def __enter__(self) -> Unmerged:
        if self._hooks:
            raise UsageError("These adapters are served by their model already: enter them once, for all threads.")
        for site in self._sites:
            site.check()
        try:
            for site in self._sites:
                if site.scales and _SCALED.setdefault(site.module, self) is not self:
                    raise UsageError(
                        f"{site.name!r} is served by another serving.unmerged with DoRA there, and this one's would "
                        "scale what that adds: load the adapters of both together."
                    )
                hook = partial(self._hook, site)
                # What is scaled is what the layer gives, before others add to it.
                added = site.module.register_forward_hook(hook, with_kwargs=True, prepend=site.scales)
                self._hooks.append(added)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        for site in self._sites:
            if _SCALED.get(site.module) is self:
                del _SCALED[site.module]

    @contextmanager
    def rows(self, rows: Sequence[Row]) -> Iterator[None]:
        """What serves each row of the batches of the block, in this thread or task: others have their own.

        ``rows``: for each row its adapter, as an index into ``references`` or as it is written there, None for the
        base alone. The first dimension of what a layer is given must be the rows, or a multiple of them with those
        of one row in succession: beams and ``num_return_sequences`` as transformers' ``generate`` has them, or rows
        and positions in one dimension. Embeddings may be given one row for all, as positions are. A model that is
        called outside of such a block, or a layer that is given another number of rows, raises UsageError.
        """
        if not rows:
            raise UsageError("No rows to serve: expected an adapter, or None, for each row of a batch.")
        value = _Rows(tuple(self._adapter(row) for row in rows))
        token = _ROWS.set({**_ROWS.get(), id(self): value})
        try:
            yield
        finally:
            _ROWS.reset(token)

    def _adapter(self, row: Row) -> int:
        """An index into ``references``, -1 for none."""
        if isinstance(row, str):
            if row not in self.references:
                known = ", ".join(repr(reference) for reference in self.references)
                raise UsageError(f"{row!r} is none of the adapters that are served: expected one of {known}.")
            row = self.references.index(row)
        if row is None:
            return -1
        if not 0 <= row < len(self.references):
            raise UsageError(f"{row} is no index of the {len(self.references)} adapters that are served.")
        return row if self.references[row] is not None else -1

    def _hook(
        self, site: Site, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        rows = _ROWS.get().get(id(self))
        if rows is None:
            raise UsageError(
                f"{site.name!r} was called, and nothing says which adapter serves which row: call the model in a "
                "`with mixed.rows([…])`, in the same thread."
            )
        (x,) = (*args, *kwargs.values())  # these layers have one argument, whatever it is called
        chosen = rows.of(site)
        return output if chosen is None else site.add(x, output, chosen)
