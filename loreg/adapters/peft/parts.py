"""A PEFT file sorted by module: what the readers of the types beside LoRA have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

from loreg import layers
from loreg.adapters import renames
from loreg.adapters.draft import Draft, DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft import saved
from loreg.adapters.peft.config import first_match
from loreg.adapters.peft.contents import PREFIX, Config, Contents
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor

Settle: TypeAlias = Callable[[tuple[int, ...], bool], DraftModule]
"""What a module is on its base: from the shape of the weight in the checkpoint, and whether there is a bias."""


class Sorted(NamedTuple):
    """``modules``: path → part → tensor; ``rest``: by name without PEFT's prefix."""

    modules: Mapping[str, Mapping[str, RawTensor]]
    rest: Mapping[str, RawTensor]


def sort(tensors: Mapping[str, RawTensor], required: Collection[str], optional: Collection[str] = ()) -> Sorted:
    """Each tensor as a part of a module, whose key is ``base_model.model.PATH.PART``, or of the rest.

    Raises Unsupported for another prefix, BadInput for a module that lacks a required part.
    """
    modules: dict[str, dict[str, RawTensor]] = {}
    rest: dict[str, RawTensor] = {}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX):
            raise Unsupported(f"Tensor {key!r} does not begin with {PREFIX!r}, as PEFT writes it.")
        name = key.removeprefix(PREFIX)
        part = next((part for part in (*required, *optional) if name.endswith(f".{part}")), None)
        if part is None:
            rest[name] = tensor
        else:
            modules.setdefault(name.removesuffix(f".{part}"), {})[part] = tensor
    for path, parts in modules.items():
        if lacking := set(required) - set(parts):
            raise BadInput(
                f"Module {path!r} of the adapter lacks {min(lacking)!r}, and has {', '.join(sorted(parts))}: save it "
                "again."
            )
    return Sorted(modules, rest)


def contents(
    modules: Mapping[str, DraftModule],
    rest: Mapping[str, RawTensor],
    config: Config,
    settle: Mapping[str, Settle] | None = None,
) -> Contents:
    """The modules with what is saved whole of the ``rest``. ``settle``: of modules that have no terms without a base;
    they are in ``modules`` too, with all that is known of them."""
    whole = saved.read(rest, config)
    trained = str(config.get("bias") or "none")
    locate = partial(_located, settle or {}, trained) if settle or trained != "none" else None
    return Contents(modules, whole.full, whole.together, locate=locate)


def _located(
    settle: Mapping[str, Settle], trained: str, draft: Draft, tensors: Mapping[str, BaseTensor], base: layers.Config
) -> Draft:
    """``trained``: the config's ``bias``."""
    weights = {path: f"{path}.weight" for path in draft.modules}
    biases = {path: f"{path}.bias" for path in draft.modules}
    found = renames.resolve([*weights.values(), *biases.values(), *draft.full], tensors, base)
    modules = dict(draft.modules)
    require_biases(trained, [bias for bias in biases.values() if bias in found], draft)
    for path, make in settle.items():
        if weights[path] not in found:
            raise BadInput(
                f"The adapter changes {path!r}, and the base has no {weights[path]!r} (it has {len(tensors)}, such "
                f"as {min(tensors)!r}); was the adapter trained on another base?"
            )
        made = make(tensors[found[weights[path]]].shape, biases[path] in found)
        modules[path] = replace(modules[path], terms=made.terms, bias_terms=made.bias_terms)
    return replace(draft, modules=modules, locate=None)


def require_biases(trained: str, biases: Iterable[str], draft: Draft) -> None:
    """Raises Unsupported where the config's ``bias`` says that ``biases`` were trained, and the file has not all."""
    lost = [bias for bias in biases if bias not in draft.full]
    if trained != "none" and lost:
        raise Unsupported(
            f"The config's bias is {trained!r}, but the trained {lost[0]!r} is not in the file: some PEFT releases "
            "fail to save it. If you can do without, set bias to 'none' in the config; else save the adapter again."
        )


def checked(term: DraftTerm, path: str) -> DraftTerm:
    """The term of the module at ``path``. Raises BadInput where its tensors do not fit each other."""
    try:
        term.size()
    except BadInput as error:
        raise type(error)(f"Module {path!r} of the adapter: a term of form {term.form!r}: {error}") from None
    return term


def from_patterns(path: str, config: Config, rank: str, alpha: str) -> tuple[int, float]:
    """A module's rank and α by ``rank_pattern`` and ``alpha_pattern``, else the fields called ``rank`` and ``alpha``.

    The first key of each, in the order of the file, that matches as ``(.*\\.)?(KEY)$`` (PEFT 0.15 and later,
    ``utils/other.py``). Raises Unsupported where older PEFT meant others and the adapter does not say which wrote it.
    """
    patterns = [dict(config.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")]
    usual = config[rank], config[alpha]
    found = [own.get(first_match(path, own), value) for own, value in zip(patterns, usual, strict=True)]
    # Older PEFT looked for one key in both patterns, those of the ranks first, and for no other in either.
    one = first_match(path, [key for own in patterns for key in own])
    older = [own.get(one, value) for own, value in zip(patterns, usual, strict=True)]
    if not config.get("peft_version") and found != older:
        raise Unsupported(
            f"Module {path!r}: rank_pattern and alpha_pattern overlap, by which rank and α are {found} in today's "
            f"PEFT and {older} in older ones, and the adapter does not say which wrote it: give whole paths in its "
            "config."
        )
    if type(found[0]) is not int or found[0] < 1:
        raise BadInput(
            f"Module {path!r}: rank_pattern of the config gives it the rank {found[0]!r}: expected a whole number of "
            "at least 1; is this the config of these weights?"
        )
    return found[0], float(found[1])
