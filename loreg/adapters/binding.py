"""Binding a draft to a base: names resolved, orientations decided, shapes checked, nothing left over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

from loreg import layers
from loreg.adapters import fusions, models, renames, ties, tying
from loreg.adapters.bound import Binding, BoundFull, BoundModule
from loreg.adapters.draft import Draft, DraftModule, DraftTerm
from loreg.errors import BadInput, LoregError, Unsupported
from loreg.format import forms
from loreg.format.fingerprint import BaseTensor
from loreg.format.manifest import Tie
from loreg.format.module import IN_OUT, OUT_IN

_STACKED = ("lora_experts",)

# The roles of each form that hold the kernel of a convolution in dimensions of its own; no others do. PEFT's AdaLoRA
# has it in one dimension with the inputs, as has a LoHa or a LoKr without a core. VeRA is of no convolution.
_KERNELS: Mapping[str, tuple[str, ...]] = {
    "lora": ("A",),
    "vera": ("A",),
    "locon": ("mid",),
    "loha": ("t1", "t2"),
    "lokr": ("w2", "t2"),
    "dense": ("value",),
}
_VECTORS = ("magnitude", "l", "E", "lambda_b", "lambda_d", "s")
_ROTATIONS = ("R",)

Found = Callable[[str], BaseTensor]
"""The base's weight for a module path."""


def bind(draft: Draft, tensors: Mapping[str, BaseTensor], config: Mapping[str, Any]) -> Binding:
    """Tie ``draft`` to a checkpoint with these ``tensors`` and this ``config.json``.

    Raises BadInput naming the first module or tensor that has no place in the checkpoint, or does not fit it;
    Unsupported for one whose orientation or second use in the model cannot be told.
    """
    pairs = models.ties_of(config, tensors)
    known = {**{name: tensors[to] for name, to in pairs}, **tensors}
    draft = fusions.placed(draft.located(known, config), tensors, config)
    weights = {path: f"{path}.{module.parameter}".rstrip(".") for path, module in draft.modules.items()}
    biases = {path: f"{path}.{module.bias}" for path, module in draft.modules.items() if module.bias_terms}
    wanted_names = [*weights.values(), *biases.values(), *draft.full]
    found = renames.resolve(wanted_names, known, config)
    ties.check_stacks(config, {wanted: found.get(wanted, wanted) for wanted in wanted_names})
    for wanted in weights.values():
        if wanted not in found:
            raise _missing(wanted, tensors, config)
    for path, wanted in biases.items():
        if wanted not in found:
            raise _without_bias(path, wanted, draft.modules[path])

    one = [(name, to) for name, to in pairs if known[name].content == known[to].content]
    replaced = tying.replaced(one, _full(draft, found, known, config), draft.together)
    resized = tying.shapes(one, replaced)

    def weight_of(path: str) -> BaseTensor:
        weight = known[found[weights[path]]]
        return replace(weight, shape=resized.get(found[weights[path]], weight.shape))

    modules = {}
    for path, module in draft.modules.items():
        fit = _fit(path, module, draft, weight_of, config)
        bias = found[biases[path]] if path in biases else None
        modules[path] = BoundModule(
            module, found[weights[path]], fit.kind, fit.orientation, fit.out_in, bias, fit.stored
        )
    _check_attention(draft, tensors, found, weights)
    _check_rows(modules, pairs, known)
    tying.check_heads(config, pairs, resized, known)
    settled = tying.settled(pairs, modules, replaced, known)
    if not ties.forced(config):
        _check_one(settled.ties, tensors)
    tying.check_sizes(models.words_of(config, tensors), settled, known)
    return Binding(settled.modules, settled.full, settled.ties, replaced.copies)


def _check_rows(
    modules: Mapping[str, BoundModule], pairs: Sequence[ties.Pair], known: Mapping[str, BaseTensor]
) -> None:
    """PEFT 0.21 computes a linear layer with trained rows without its bias (``tuners/trainable_tokens/layer.py``)."""
    for path, bound in modules.items():
        if any(term.form == "rows" for term in bound.draft.terms):
            places = [bound.tensor, *(name for name, to in pairs if to == bound.tensor)]
            biases = [bias for name in places if (bias := f"{name.removesuffix('.weight')}.bias") in known]
            if biases:
                raise Unsupported(
                    f"Module {path!r} has trained rows that are of a head as well, and PEFT computed that without "
                    f"its bias {biases[0]!r}, so that another model was trained; adapt the embedding by LoRA instead."
                )


def _check_one(tied: Mapping[str, Tie], tensors: Mapping[str, BaseTensor]) -> None:
    for name, tie in tied.items():
        if name in tensors and tensors[name].content != tensors[tie.to].content:
            raise Unsupported(
                f"The base stores {name!r} and {tie.to!r} with different values, and its config says that they are "
                "one (tie_word_embeddings): which the model uses cannot be told; set it to false in config.json."
            )


def _check_attention(
    draft: Draft, tensors: Mapping[str, BaseTensor], found: Mapping[str, str], weights: Mapping[str, str]
) -> None:
    """torch's MultiheadAttention reads the weight of ``out_proj`` and never calls it: what wraps it alone is idle."""
    for path, wanted in weights.items():
        name = found[wanted]
        owner = name.removesuffix("out_proj.weight")
        if (
            owner != name
            and f"{owner}in_proj_weight" in tensors
            and path.removesuffix(".out_proj") not in draft.modules
        ):
            raise Unsupported(
                f"Module {path!r} is the projection of a torch MultiheadAttention, which uses its weight and not "
                "what was trained beside it: the model that was trained does not have this change. Leave it out."
            )


def _full(
    draft: Draft, found: Mapping[str, str], tensors: Mapping[str, BaseTensor], config: Mapping[str, Any]
) -> dict[str, BoundFull]:
    full: dict[str, BoundFull] = {}
    for name, tensor in draft.full.items():
        module = name.rpartition(".")[0]
        added = name not in found
        if added and not _is_new(name, draft.saved_modules, tensors):
            raise _missing(name, tensors, config)
        target = found.get(name, name)
        if target in full:
            raise BadInput(f"Two tensors of the adapter would replace {target!r}: expected one.")
        full[target] = BoundFull(tensor, module, added)
    return full


def _is_new(name: str, saved_modules: Collection[str], tensors: Collection[str]) -> bool:
    """Whether the tensor is of a saved module that the base knows nothing of, such as a classifier's head.

    Where the base has that module somewhere, a tensor of it that fits nowhere is a stranger: layer 7 of 2.
    """
    of = [f".{saved}." for saved in saved_modules if f".{saved}." in f".{name}"]
    return bool(of) and not any(part in f".{known}" for part in of for known in tensors)


class _Fit(NamedTuple):
    """How a module's terms lie on its weight."""

    kind: str
    orientation: str
    out_in: tuple[int, int]
    stored: tuple[int, ...] | None


def _fit(path: str, module: DraftModule, draft: Draft, found: Found, config: Mapping[str, Any]) -> _Fit:
    weight = found(path)
    if len(weight.shape) < 2:
        raise BadInput(f"Module {path!r}: expected a weight of two dimensions or more, found {list(weight.shape)}.")
    stacked = module.terms[0].form in _STACKED
    orientation = _orientation(path, module, draft, found, config)
    matrix = _matrix(weight.shape, stacked)
    out_in = matrix if orientation == OUT_IN else matrix[::-1]
    for term in (*module.terms, *module.bias_terms):
        size = out_in if term in module.terms else (out_in[0], 1)
        forms.check(term.form, term.shapes, term.parameters, size, f"Module {path!r}")
    if not stacked:
        _check_kernels(path, module, weight.shape)
    if len(weight.shape) == 2:
        kind = "embedding" if module.embedding else "linear" if orientation == OUT_IN else "conv1d"
        return _Fit(kind, orientation, out_in, None)
    return _Fit("experts" if stacked else "conv", orientation, out_in, weight.shape)


def _check_kernels(path: str, module: DraftModule, stored: tuple[int, ...]) -> None:
    """BadInput for a tensor that has the weight's dimensions in another order: as a matrix it would fit."""
    for term in module.terms:
        kernels = _KERNELS.get(term.form, ())
        for role, shape in term.shapes.items():
            if role in _ROTATIONS:
                continue
            if role in _VECTORS:
                wrong, expected = sum(size != 1 for size in shape) > 1, "of one number after another"
            elif role in kernels and prod(stored[2:]) > 1:
                wrong = _kernel(shape) != _kernel(stored)
                expected = f"with a kernel of {list(stored[2:])}, as its layer has"
            else:
                wrong, expected = prod(shape[2:]) > 1, "without a kernel"
            if wrong:
                raise BadInput(
                    f"Module {path!r}: expected {role} {expected}, found {list(shape)}; was the adapter trained on "
                    "another base?"
                )


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the dimensions of 1 at the end: PEFT's cores for a Conv1d have one."""
    kernel = shape[2:]
    while kernel[-1:] == (1,):
        kernel = kernel[:-1]
    return kernel


def _matrix(shape: tuple[int, ...], stacked: bool) -> tuple[int, int]:
    """A weight as a matrix: of each expert in a stack, else with all dimensions but the first as one."""
    return (shape[1], prod(shape[2:])) if stacked else (shape[0], prod(shape[1:]))


def _orientation(path: str, module: DraftModule, draft: Draft, found: Found, config: Mapping[str, Any]) -> str:
    weight = found(path)
    fits = _fitting(module, weight)
    if not fits:
        _explain(path, module, weight)
        size = ["any" if n is None else n for n in _size(module)]
        raise BadInput(
            f"Module {path!r} does not fit its base: expected {weight.name!r} of shape {size}, found "
            f"{list(weight.shape)}; was the adapter trained on another base?"
        )
    if len(fits) == 1:
        return fits.pop()
    if len(weight.shape) > 2:
        # PEFT says so of the layer that holds the parameter; a square expert does not tell.
        return IN_OUT if module.in_out_hint else OUT_IN
    leaf = path.rpartition(".")[2]
    if layers.stores_in_out(config, leaf):
        return IN_OUT
    # The config's fan_in_fan_out speaks of the last layer that PEFT looked at, so for a square layer it proves
    # nothing; other layers of the same name whose shapes tell do.
    if not module.in_out_hint and not layers.may_store_in_out(leaf, config):
        return OUT_IN
    told = [_fitting(other, found(name)) for name, other in draft.modules.items() if name.rpartition(".")[2] == leaf]
    evidence = {kind for kinds in told if len(kinds) == 1 for kind in kinds}
    if len(evidence) == 1:
        return evidence.pop()
    raise Unsupported(
        f"Module {path!r} is square, and neither config.json (model_type {config.get('model_type')!r}) nor another "
        "layer of that name tells whether it is stored as (in, out): its orientation would be a guess."
    )


def _explain(path: str, module: DraftModule, weight: BaseTensor) -> None:
    """Raises Unsupported where a form itself says why its terms do not fit, as of a grouped convolution."""
    for term in module.terms:
        try:
            forms.check(term.form, term.shapes, term.parameters, _matrix(weight.shape, False), f"Module {path!r}")
        except Unsupported:
            raise
        except BadInput:
            continue


def _size(module: DraftModule) -> tuple[int | None, int | None]:
    """(out, in) of the weights that all terms of a module fit; BadInput where they contradict each other."""
    sizes = [term.size() for term in module.terms]
    outs, ins = ({size[axis] for size in sizes} - {None} for axis in (0, 1))
    if len(outs) > 1 or len(ins) > 1:
        raise BadInput(f"The terms of a module are for weights of different sizes: {sizes}.")
    return next(iter(outs), None), next(iter(ins), None)


def _fitting(module: DraftModule, weight: BaseTensor) -> set[str]:
    """The orientations in which the terms have the size of the weight."""
    stacked = module.terms[0].form in _STACKED
    if len(weight.shape) < 2 or (stacked and len(weight.shape) < 3):
        return set()
    rows, columns = _matrix(weight.shape, stacked)
    size = _size(module)
    shapes = {OUT_IN: (rows, columns), IN_OUT: (columns, rows)}
    fits = {
        orientation
        for orientation, shape in shapes.items()
        if all(wanted in (None, there) for wanted, there in zip(size, shape, strict=True))
    }
    # Sizes alone do not tell of a rotation; if neither is taken, ``forms.check`` says why.
    fits = {each for each in fits if all(_takes(term, shapes[each]) for term in module.terms)} or fits
    if len(weight.shape) > 2 and not stacked:
        return fits & {OUT_IN}  # a convolution has its outputs first
    return fits & {IN_OUT} if module.embedding else fits


def _takes(term: DraftTerm, out_in: tuple[int, int]) -> bool:
    try:
        forms.FORMS[term.form].fits(term.shapes, term.parameters, out_in)
    except BadInput:
        return False
    return True


def _without_bias(path: str, wanted: str, module: DraftModule) -> BadInput:
    key = next((tensor.key for term in module.bias_terms for tensor in term.tensors.values()), wanted)
    return BadInput(
        f"Tensor {key!r} of the adapter is added to a bias, and the layer {path!r} of the base has none (there is no "
        f"such tensor as {wanted!r}), so that nothing can hold it: train without it (PEFT: lora_bias=False), or take "
        "a base whose layer has a bias, of zeros if need be."
    )


def _missing(name: str, tensors: Mapping[str, BaseTensor], config: Mapping[str, Any]) -> LoregError:
    if models.may_be_tied(config, name):
        return Unsupported(
            f"The adapter has {name!r}, of which the base stores nothing: this model may tie it to a weight that is "
            "stored, as a head to its embedding, in a way that loreg does not know; untie it in the base first."
        )
    example = min(tensors)
    return BadInput(
        f"The adapter has {name!r}, and the base has no such tensor (it has {len(tensors)}, such as {example!r}); "
        "was the adapter trained on another base?"
    )
