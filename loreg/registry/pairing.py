"""Which tensor of one checkpoint became which of another: names, ties, and what somebody asked for of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from loreg.adapters import models, names, renames
from loreg.checkpoint import Checkpoint, StoredTensor
from loreg.errors import BadInput, UsageError
from loreg.format.fingerprint import BaseTensor
from loreg.format.manifest import Tie


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint that was hashed. ``tensors``: its tensors with their digests, by name."""

    name: str
    checkpoint: Checkpoint
    tensors: Mapping[str, BaseTensor]
    config: Mapping[str, Any]

    def same(self, one: StoredTensor, other: StoredTensor) -> bool:
        """Whether two of its tensors have the same bytes, shape and dtype."""
        first, second = (self.tensors[stored.info.name] for stored in (one, other))
        return _content(first) == _content(second)


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of the tuned model, and the base's that it was. ``name``: that of the base, or its own if it is new.

    ``own``: its name in the tuned model, in memory and not on disk: a model of the whole has the names there that
    adapters use. ``path``: that of the module whose weight it is. ``base``: None if it is new.
    """

    name: str
    own: str
    path: str
    tuned: StoredTensor
    base: StoredTensor | None

    @property
    def module(self) -> str:
        """The path of the module that has it as a parameter."""
        return self.own.rpartition(".")[0]

    @property
    def bare(self) -> bool:
        """Whether it is a parameter of its own, and not the weight of a layer."""
        return self.path == self.own


@dataclass(frozen=True, slots=True)
class Selection:
    """What somebody asked for: patterns in the manner of a shell, for tensors or modules, whole names or their ends.

    Without ``targets`` everything that ``exclude`` does not name.
    """

    targets: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def wants(self, called: Collection[str]) -> bool:
        """Whether a tensor is asked for that is ``called`` so."""
        return (not self.targets or _fits(self.targets, called)) and not _fits(self.exclude, called)

    def check(self, called: Collection[Collection[str]]) -> None:
        """UsageError for a pattern that fits none of the tensors: a typing error, most likely."""
        for option, patterns in (("--target", self.targets), ("--exclude", self.exclude)):
            for pattern in patterns:
                if not any(_fits((pattern,), names) for names in called):
                    raise UsageError(
                        f"{option} {pattern!r} fits no tensor of the two models: expected a name, or the end of one, "
                        "such as 'q_proj' or 'layers.0.*'."
                    )


def _fits(patterns: Collection[str], called: Collection[str]) -> bool:
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in patterns for name in called
    )


@dataclass(frozen=True, slots=True)
class Pairs:
    """``selected``: pairs whose bytes differ and that are asked for, by name. ``left_out``: names of those not asked
    for. ``ties``: how head and embedding go together in the tuned model, where the base ties them."""

    selected: tuple[Pair, ...]
    left_out: tuple[str, ...]
    ties: Mapping[str, Tie]


def pair_up(base: Model, tuned: Model, selection: Selection) -> Pairs:
    """Every tensor of ``tuned`` with the one that it has in ``base``.

    By name, after the one change of prefix that fits all names which differ (see ``loreg.adapters.names``): a model
    saved by another class. A head that one of the two does not store, being tied, is its embedding. Raises BadInput
    if ``tuned`` lacks a tensor that is asked for, UsageError for a pattern that fits nothing.
    """
    own = _names(base, tuned)
    before = dict(base.checkpoint.tensors)
    after = {name: tuned.checkpoint.tensors[called] for name, called in own.items()}
    ties = _tie(base, tuned, own, before, after)
    called = {name: own.get(name, name) for name in (*base.tensors, *own)}
    live = renames.all_in_memory(called.values(), tuned.config)
    known = set(live.values())
    paths = {name: _path(live[theirs], known) for name, theirs in called.items()}
    aliases = {
        name: (name, theirs, _path(theirs, tuned.tensors), live[theirs], paths[name])
        for name, theirs in called.items()
    }
    selection.check([*aliases.values()])
    selected: list[Pair] = []
    left_out: list[str] = []
    lacking: list[str] = []
    for name in sorted({*before, *after}):
        theirs, path = live.get(called.get(name, name), name), paths.get(name, name)
        wanted = selection.wants(aliases.get(name, (name,)))
        if name not in after:
            (lacking if wanted else left_out).append(name)
        elif name not in before or not _equal(base, before[name], tuned, after[name]):
            if wanted:
                selected.append(Pair(name, theirs, path, after[name], before.get(name)))
            else:
                left_out.append(name)
    if lacking:
        raise BadInput(
            f"{tuned.name!r} has no {lacking[0]!r}, which {base.name!r} has ({len(lacking)} such of "
            f"{len(before)}): expected a model of the same kind; what it can do without, leave out with --exclude."
        )
    return Pairs(tuple(selected), tuple(left_out), ties)


def _names(base: Model, tuned: Model) -> dict[str, str]:
    """The name in the base, or its own if it is new, of every tensor of the tuned model → its own."""
    new = sorted(set(tuned.tensors) - set(base.tensors))
    shifted = names.resolve(new, set(base.tensors) - set(tuned.tensors))
    return {shifted.get(name, name): name for name in tuned.tensors}


def _tie(
    base: Model,
    tuned: Model,
    own: Mapping[str, str],
    before: dict[str, StoredTensor],
    after: dict[str, StoredTensor],
) -> dict[str, Tie]:
    """Complete ``before`` and ``after`` by a head that is not stored; or, where head and embedding are one tensor in
    both models, take the head out of them: what happens to the embedding happens to it [M10].

    Whether they are one is told by what is stored, as transformers 5 has it: two that differ are two.
    """
    tie = models.tie_of(base.config, base.tensors)
    if tie is None:
        said = models.tie_of(tuned.config, tuned.tensors)
        place = {called: name for name, called in own.items()}
        if said is not None and said[0] in before:
            after.setdefault(said[0], after[place[said[1]]])
        return {}
    head, embedding = tie
    before.setdefault(head, before[embedding])
    if embedding not in after:
        return {head: Tie(embedding, untied=True)}
    after.setdefault(head, after[embedding])
    one = base.same(before[head], before[embedding]) and tuned.same(after[head], after[embedding])
    if one:
        del before[head], after[head]
    return {head: Tie(embedding, untied=not one)}


def _path(own: str, known: Collection[str]) -> str:
    """The path of the module whose weight a tensor is; its own name, where it is none's."""
    path = own.removesuffix(".weight")
    return own if path in known else path


def _equal(base: Model, one: StoredTensor, tuned: Model, other: StoredTensor) -> bool:
    return _content(base.tensors[one.info.name]) == _content(tuned.tensors[other.info.name])


def _content(tensor: BaseTensor) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.content
