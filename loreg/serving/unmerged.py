"""``unmerged``: several adapters side by side in one batch, each request its own, beside a base that stays as it is.

    with serving.unmerged(model, ["sql", "humor"]) as mixed:
        with mixed.rows(["sql", "humor", None, "sql"]):
            model.generate(**batch)

Each adapted layer adds s·B(Ax) to its output: one product of a batch of matrices with the factors of each row's
adapter (``torch.bmm``), whatever adapters the rows mix. Weights are neither copied nor written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from loreg.errors import UsageError
from loreg.registry import Registry
from loreg.serving.defaults import default_registry
from loreg.serving.live import Check
from loreg.serving.sites import Site, sites
from loreg.serving.twins import in_thread

Row = int | str | None
"""What serves a row: an adapter, by its place among the references or by the reference itself; None: none."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """The adapters of the rows of a batch, -1 for none; and these as indices into the factors of a layer."""

    adapters: tuple[int, ...]
    _indices: dict[tuple[tuple[int, ...], torch.device], Tensor | None] = field(default_factory=dict)

    def index(self, site: Site) -> Tensor | None:
        """Of each row, on the device of the layer; None where it adds nothing to any."""
        key = site.slots, site.A.device
        if key not in self._indices:
            slots = [site.slots[adapter] for adapter in self.adapters]
            served = any(slot != site.slots[-1] for slot in slots)
            self._indices[key] = torch.tensor(slots, device=site.A.device) if served else None
        return self._indices[key]


_ROWS: ContextVar[Mapping[int, _Rows]] = ContextVar("loreg_rows", default={})  # noqa: B039 - never written to
"""By the ``id`` of an ``Unmerged`` that is entered. Of a context: threads and tasks that share a model do not mix."""


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

    Under ``torch.compile`` the graph breaks at each layer that is adapted; outputs stay right.

    Raises NotFound, UsageError, BaseMismatch for a model of another base; BadInput for a tensor of an adapter that
    the model has no place for; Unsupported, naming it, for what is no sum of two factors' products (DoRA, LoHa,
    convolutions, trained biases, replaced tensors) and for layers of other classes (experts, attention that reads
    its weights itself), before any layer is changed.
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
        """Of all factors on their devices."""
        return sum(site.A.nbytes + site.B.nbytes for site in self._sites)

    def __enter__(self) -> Unmerged:
        if self._hooks:
            raise UsageError("These adapters are served by their model already: enter them once, for all threads.")
        try:
            for site in self._sites:
                hook = partial(self._hook, site)
                self._hooks.append(site.module.register_forward_hook(hook, with_kwargs=True))
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
        index = rows.index(site)
        if index is None:
            return output
        return site.add(x, output, index)
