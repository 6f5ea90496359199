"""Weights that a model has in common: what an adapter does to one of them, and to both [M10].

Mostly these are the head and the embedding of a decoder; the biases of a head, too, and embeddings of an encoder.
A trainer adapts the layer that it was told to, and leaves the other as it was: the two are then no more one weight.
But some edits are of both: rows of tokens that PEFT trains in both places, a weight that was resized before training.
While all edits are of both, the model stays tied; else it is untied, and each gets what is its own. A config unties
all or nothing: where one pair is untied, so are the others.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from loreg.adapters import ties
from loreg.adapters.bound import BoundFull, BoundModule
from loreg.adapters.draft import DraftTerm
from loreg.adapters.ties import Pair
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.format.manifest import Tie
from loreg.format.module import OUT_IN
from loreg.layers import Config

_HOLDER = re.compile(r"(.+\.)?shared\.weight")


class Replaced(NamedTuple):
    """``full`` with every tensor once; ``shared``: names whose replacement is that of the one they are tied to;
    ``copies``: as in ``Binding``."""

    full: dict[str, BoundFull]
    shared: frozenset[str]
    copies: dict[str, str]


def replaced(pairs: Sequence[Pair], full: Mapping[str, BoundFull], together: Collection[str]) -> Replaced:
    """Which of the replaced tensors are one. ``together``: keys of those that are of both of a pair."""
    found = dict(full)
    shared, copies = set(), {}
    for name, to in pairs:
        one, other = found.get(name), found.get(to)
        if one is not None and other is not None and one.tensor.same_as(other.tensor):
            del found[name]
            shared.add(name)
            copies[one.tensor.key] = to
        elif one is not None and other is None and one.tensor.key in together:
            del found[name]
            found[to] = one
            shared.add(name)
        elif other is not None and other.tensor.key in together:
            shared.add(name)
    return Replaced(found, frozenset(shared), copies)


def shapes(pairs: Sequence[Pair], replaced: Replaced) -> dict[str, tuple[int, ...]]:
    """Name of a tensor → the shape that it has once the adapter has replaced it."""
    found = {name: full.tensor.shape for name, full in replaced.full.items()}
    for name, to in pairs:
        if name in replaced.shared:
            found.setdefault(name, found[to])
    return found


class Settled(NamedTuple):
    """What is done to each of a pair, and whether they are still one."""

    modules: dict[str, BoundModule]
    full: dict[str, BoundFull]
    ties: dict[str, Tie]


def settled(
    pairs: Sequence[Pair], modules: Mapping[str, BoundModule], replaced: Replaced, known: Mapping[str, BaseTensor]
) -> Settled:
    """The edits with those of both written out where two part. Raises Unsupported where they cannot be."""
    found, full = dict(modules), dict(replaced.full)
    tied: dict[str, Tie] = {}
    for pair in pairs:
        at = _at(pair, found)
        if len(at) == 2 and _is_repeated(found, at[pair[0]], at[pair[1]]):
            del found[at[pair[0]]]
        edited = (
            {bound.tensor for bound in found.values()} | {bound.bias_tensor for bound in found.values()} | {*full}
        )
        if not edited.isdisjoint(pair):
            _check_uses(pair, pairs, found, full, known)
            tied[pair[0]] = Tie(pair[1], untied=not _is_of_both(pair, found, full, replaced, known))
    if any(tie.untied for tie in tied.values()):
        for pair in pairs:
            tied[pair[0]] = Tie(pair[1], untied=True)
            _part(pair, found, full, replaced, known)
    return Settled(found, full, tied)


def _at(pair: Pair, modules: Mapping[str, BoundModule]) -> dict[str, str]:
    """Each of the two that is the weight of an adapted module → the path of that."""
    return {bound.tensor: path for path, bound in modules.items() if bound.tensor in pair}


def _is_of_both(
    pair: Pair,
    modules: Mapping[str, BoundModule],
    full: Mapping[str, BoundFull],
    replaced: Replaced,
    known: Mapping[str, BaseTensor],
) -> bool:
    """Only an edit of the second can be of both: a trainer that changes the first alone has not touched the other."""
    at = _at(pair, modules)
    if pair[0] in full or pair[0] in at or any(bound.bias_tensor in pair for bound in modules.values()):
        return False
    if known[pair[0]].content != known[pair[1]].content:
        return False
    return (pair[0] in replaced.shared or pair[1] not in full) and (
        pair[1] not in at or modules[at[pair[1]]].draft.together
    )


def _part(
    pair: Pair,
    modules: dict[str, BoundModule],
    full: dict[str, BoundFull],
    replaced: Replaced,
    known: Mapping[str, BaseTensor],
) -> None:
    """Write what is done to the second of a pair, and is of both, for the first as well."""
    name, to = pair
    at = _at(pair, modules)
    if name in replaced.shared and name not in full and _changes(full[to], known[to]):
        full[name] = replace(full[to], module=_module_of(name))
    if to in at and modules[at[to]].draft.together:
        path = at.get(name, _module_of(name))
        modules[path] = _with(replace(modules[at[to]], tensor=name), modules.get(path))


def _check_uses(
    pair: Pair,
    pairs: Sequence[Pair],
    modules: Mapping[str, BoundModule],
    full: Mapping[str, BoundFull],
    known: Mapping[str, BaseTensor],
) -> None:
    """Raises Unsupported for a weight that is used in three places or more, and for one that is used by its other
    names alone: what is called ``shared`` only holds it, and what is trained there is idle."""
    others = [name for name, to in pairs if to == pair[1]]
    changed = pair[1] in full and _changes(full[pair[1]], known[pair[1]])
    if (len(others) > 1 or _HOLDER.fullmatch(pair[1])) and (changed or _at((pair[1], pair[1]), modules)):
        raise Unsupported(
            f"{pair[1]!r} is changed, and the model uses it as {', '.join(map(repr, others))} as well: which of them "
            "were trained with it cannot be told; adapt one of those instead, or untie the base before training."
        )


def check_heads(
    config: Config, pairs: Sequence[Pair], shapes: Mapping[str, tuple[int, ...]], known: Mapping[str, BaseTensor]
) -> None:
    """Raises Unsupported for an embedding of another size, where its head may have more than a weight."""
    for name, to in pairs if ties.is_known(config) else ():
        if shapes.get(to, known[to].shape) != known[to].shape or shapes.get(name, known[to].shape) != known[to].shape:
            raise Unsupported(
                f"The adapter resizes {to!r} or {name!r}, which are one weight in this model, of shape "
                f"{list(known[to].shape)}: what else of the model has as many rows, such as the bias of its head, "
                "would not follow; resize the base, save it, and train on that."
            )


def check_sizes(pair: Pair | None, settled: Settled, known: Mapping[str, BaseTensor]) -> None:
    """BadInput where head and embedding had a row for each word, and now have not the same number of them."""
    if pair is None or not all(name in known for name in pair):
        return
    if any(not tie.untied for tie in settled.ties.values()):
        return
    before = {name: known[name].shape[0] for name in pair}
    after = {name: settled.full[name].tensor.shape[0] if name in settled.full else before[name] for name in pair}
    if len(set(before.values())) == 1 and len(set(after.values())) == 2:
        resized, left = sorted(pair, key=lambda name: after[name] == before[name])
        raise BadInput(
            f"The adapter resizes {resized!r} to {after[resized]} rows, and {left!r} has {after[left]}: PEFT saved "
            "only the layer that it adapts, and the new rows of the other are lost; save both, with "
            f"{_module_of(left)!r} in modules_to_save."
        )


def _is_repeated(modules: Mapping[str, BoundModule], one: str, other: str) -> bool:
    return modules[one].draft.repeats == other or modules[other].draft.repeats == one


def _changes(full: BoundFull, known: BaseTensor) -> bool:
    tensor = full.tensor
    return (tensor.dtype, tensor.shape) != (known.dtype, known.shape) or tensor.digest() != known.content


def _module_of(tensor: str) -> str:
    return tensor.removesuffix(".weight")


def _with(both: BoundModule, own: BoundModule | None) -> BoundModule:
    """What an edit of both and the module's own do together. The own one is brought into the other's orientation."""
    if own is None or own.draft.together:
        return own or both
    terms = own.draft.terms
    if own.orientation != both.orientation:
        if own.bias_tensor is not None or own.orientation != OUT_IN or not all(_is_plain(term) for term in terms):
            raise Unsupported(
                f"{own.tensor!r} is changed together with the weight that it is tied to, and by more than LoRA on "
                "its own, which has no form here: untie the base before training."
            )
        terms = tuple(_turned(term) for term in terms)
    draft = replace(both.draft, terms=both.draft.terms + terms, together=False)
    return replace(both, draft=draft, bias_tensor=own.bias_tensor)


def _is_plain(term: DraftTerm) -> bool:
    return term.form == "lora" and set(term.tensors) == {"A", "B"} and term.parameters == {"groups": 1}


def _turned(term: DraftTerm) -> DraftTerm:
    return replace(term, tensors={"A": term.tensors["B"].transposed(), "B": term.tensors["A"].transposed()})
