"""Head and embedding of a decoder: where a model ties them, what an adapter does to one of them, and to both [M10].

A trainer adapts the layer that it was told to, and leaves the other as it was: the two are then no more one weight.
But some edits are of both: rows of tokens that PEFT trains in both places, a weight that was resized before training.
While all edits are of both, the model stays tied; else it is untied, and each of the two gets what is its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import NamedTuple

from loreg.adapters.bound import BoundFull, BoundModule
from loreg.adapters.draft import DraftTerm
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.format.manifest import Tie
from loreg.format.module import OUT_IN

Pair = tuple[str, str]
"""(head, embedding), as tensors of the checkpoint."""


class Replaced(NamedTuple):
    """``full`` with every tensor once; ``shared``: that of the embedding is for the head too; ``copies``: as in
    ``Binding``."""

    full: dict[str, BoundFull]
    shared: bool
    copies: dict[str, str]


def replaced(pair: Pair | None, full: Mapping[str, BoundFull], together: Collection[str]) -> Replaced:
    """Which of the two replaced tensors are one. ``together``: keys of those that are of both."""
    found = dict(full)
    if pair is None:
        return Replaced(found, False, {})
    head, embedding = pair
    one, other = found.get(head), found.get(embedding)
    if one is not None and other is not None and one.tensor.same_as(other.tensor):
        del found[head]
        return Replaced(found, True, {one.tensor.key: embedding})
    if one is not None and other is None and one.tensor.key in together:
        del found[head]
        return Replaced({**found, embedding: one}, True, {})
    return Replaced(found, other is not None and other.tensor.key in together, {})


def shapes(pair: Pair | None, replaced: Replaced) -> dict[str, tuple[int, ...]]:
    """Name of a tensor → the shape that it has once the adapter has replaced it."""
    found = {name: full.tensor.shape for name, full in replaced.full.items()}
    if pair is not None and replaced.shared:
        found.setdefault(pair[0], found[pair[1]])
    return found


class Settled(NamedTuple):
    """What is done to each of the two, and whether they are still one."""

    modules: dict[str, BoundModule]
    full: dict[str, BoundFull]
    ties: dict[str, Tie]


def settled(
    pair: Pair | None, modules: Mapping[str, BoundModule], replaced: Replaced, known: Mapping[str, BaseTensor]
) -> Settled:
    """The edits with those of both written out where the two part. Raises Unsupported where they cannot be."""
    found, full = dict(modules), dict(replaced.full)
    if pair is None:
        return Settled(found, full, {})
    head, embedding = pair
    at = {bound.tensor: path for path, bound in found.items() if bound.tensor in pair}
    if len(at) == 2 and _is_repeated(found, at[head], at[embedding]):
        del found[at.pop(head)]
    if not at and not {*pair} & {*full}:
        return Settled(found, full, {})
    # Only the embedding's edit can be of both: a trainer that changes the head alone has not touched the embedding.
    both = replaced.shared or embedding not in full
    both = both and (embedding not in at or found[at[embedding]].draft.together)
    if both and head not in full and head not in at:
        return Settled(found, full, {head: Tie(embedding, untied=False)})
    if replaced.shared and head not in full and _changes(full[embedding], known[embedding]):
        full[head] = replace(full[embedding], module=_module_of(head))
    if embedding in at and found[at[embedding]].draft.together:
        path = at.get(head, _module_of(head))
        found[path] = _with(replace(found[at[embedding]], tensor=head), found.get(path))
    return Settled(found, full, {head: Tie(embedding, untied=True)})


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
