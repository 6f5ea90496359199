"""Names of modules without their dots, and the paths in a checkpoint that they stand for.

kohya's scripts and LyCORIS name a module by its path with ``_`` for ``.``, so that ``to_q`` and ``to.q`` are one. A
name is resolved against the checkpoint's own, its prefix included, where that differs as in ``adapters.names``; what
two paths or none are written like is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod

from loreg import layers
from loreg.adapters import names, renames
from loreg.adapters.draft import Draft, DraftModule, DraftTerm
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class Name:
    """A module in a file: ``prefix`` says of which model it is, ``flat`` is its path without dots."""

    prefix: str
    flat: str

    def __str__(self) -> str:
        return f"{self.prefix}_{self.flat}"


def locate(
    modules: Mapping[Name, DraftModule], draft: Draft, tensors: Mapping[str, BaseTensor], config: layers.Config
) -> Draft:
    """The draft with its modules by path in memory, as PEFT has them.

    Raises BadInput for a name that no weight of the checkpoint has, or two.
    """
    known: dict[str, dict[str, str]] = {}
    live = renames.all_in_memory(tensors, config)
    for tensor in tensors:
        if tensor.endswith(_WEIGHT):
            for called in (tensor, live[tensor]):
                path = called.removesuffix(_WEIGHT)
                known.setdefault(_dotted(path), {})[tensor.removesuffix(_WEIGHT)] = path
    placed: dict[str, Name] = {}
    for prefix in sorted({name.prefix for name in modules}):
        # Each prefix is another model: what shift fits the one says nothing of the other.
        for name, path in _resolve([name for name in modules if name.prefix == prefix], known).items():
            if path in placed:
                raise BadInput(
                    f"Modules {str(placed[path])!r} and {str(name)!r} of the file both fit {path!r} of the base: it "
                    "is for several models, of which the base is one; keep the tensors of that one and push them."
                )
            placed[path] = name
    for path, name in placed.items():
        _check(name, modules[name], tensors[path + _WEIGHT])
    in_memory = {path: live[path + _WEIGHT].removesuffix(_WEIGHT) for path in placed}
    return replace(draft, modules={in_memory[path]: modules[name] for path, name in placed.items()})


def _dotted(path: str) -> str:
    """A path, or a name, with a dot wherever either may have one."""
    return path.replace("_", ".")


def _resolve(wanted: Iterable[Name], known: Mapping[str, Mapping[str, str]]) -> dict[Name, str]:
    """Each name with the path in the checkpoint. ``known``: without dots → such paths, each with what is written so,
    which is the path itself or what transformers calls it."""
    keys = {name: _dotted(name.flat) + _WEIGHT for name in wanted}
    found = names.resolve(keys.values(), [key + _WEIGHT for key in known])
    paths = {}
    for name, key in keys.items():
        written = known.get(found.get(key, "").removesuffix(_WEIGHT), {})
        # A prefix that ends within a word of the checkpoint's name is none.
        fits = [
            path
            for path, called in written.items()
            if not (rest := called[: max(0, len(called + _WEIGHT) - len(key))]) or rest[-1] == "."
        ]
        if len(fits) > 1:
            raise Unsupported(
                f"Module {str(name)!r} of the file may be {' or '.join(sorted(fits))} in the base, and which it is "
                "the file does not say."
            )
        if not fits:
            near = get_close_matches(_dotted(name.flat), known, n=1, cutoff=0)
            nearest = f", and the nearest is {min(known[near[0]])!r}" if near else ""
            raise BadInput(
                f"Module {str(name)!r} of the file is none of the base: no path of its {len(known)} weights is "
                f"written so without dots{nearest}; was it trained on another model, or on one that names its layers "
                "differently?"
            )
        paths[name] = fits[0]
    return paths


def _check(name: Name, module: DraftModule, weight: BaseTensor) -> None:
    """One number for each input channel, where there are such: forms would share fewer among several; and vectors in
    the dimension that LyCORIS has them in, as they are broadcast over the weight."""
    for term in module.terms:
        _check_vectors(name, term, weight)
        role = (
            "l" if term.parameters.get("on") == "in" else "magnitude" if term.parameters.get("axis") == "in" else None
        )
        if role is None or len(weight.shape) < 2:
            continue
        out, into = weight.shape[:2]
        found = prod(term.tensors[role].shape)
        # A magnitude of one number may be of one output as well, and means the same.
        if found != into and not (role == "magnitude" and found == out == 1):
            raise BadInput(
                f"Module {str(name)!r} of the file has {found} numbers for input channels, expected {into}, as "
                f"{weight.name!r} has; was it trained on another model?"
            )


def _check_vectors(name: Name, term: DraftTerm, weight: BaseTensor) -> None:
    """BadInput for a magnitude, or the vector of (IA)³ on a convolution, that lies along another dimension.

    In LyCORIS (4.1.3) a magnitude is (out, 1…) or (1, in, 1…), and such a vector (1, n, 1…), of outputs too.
    """
    place = {"in": 1, "out": 0}[str(term.parameters.get("axis", "in"))]
    vector = "magnitude" if "magnitude" in term.tensors else "l" if len(weight.shape) > 2 else ""
    if vector not in term.tensors:
        return
    shape = term.tensors[vector].shape
    if len(shape) != len(weight.shape) or shape[place] != prod(shape):
        raise BadInput(
            f"Tensor {term.tensors[vector].key!r} has shape {list(shape)}, expected {len(weight.shape)} dimensions, "
            f"all but number {place + 1} of 1, as {weight.name!r} is {list(weight.shape)}; was it trained on another "
            "model?"
        )
