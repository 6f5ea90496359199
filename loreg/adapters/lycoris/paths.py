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

from loreg.adapters import names
from loreg.adapters.draft import Draft, DraftModule
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


def locate(modules: Mapping[Name, DraftModule], draft: Draft, tensors: Mapping[str, BaseTensor]) -> Draft:
    """The draft with its modules by path. Raises BadInput for a name that no weight of the checkpoint has, or two."""
    known: dict[str, list[str]] = {}
    for tensor in tensors:
        if tensor.endswith(_WEIGHT):
            known.setdefault(_dotted(tensor.removesuffix(_WEIGHT)), []).append(tensor.removesuffix(_WEIGHT))
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
    return replace(draft, modules={path: modules[name] for path, name in placed.items()})


def _dotted(path: str) -> str:
    """A path, or a name, with a dot wherever either may have one."""
    return path.replace("_", ".")


def _resolve(wanted: Iterable[Name], known: Mapping[str, list[str]]) -> dict[Name, str]:
    """Each name with the path in the checkpoint."""
    keys = {name: _dotted(name.flat) + _WEIGHT for name in wanted}
    found = names.resolve(keys.values(), [key + _WEIGHT for key in known])
    paths = {}
    for name, key in keys.items():
        fits = known.get(found.get(key, "").removesuffix(_WEIGHT), [])
        # A prefix that ends within a word of the checkpoint's name is none.
        fits = [
            path for path in fits if not (rest := path[: max(0, len(path + _WEIGHT) - len(key))]) or rest[-1] == "."
        ]
        if len(fits) > 1:
            raise Unsupported(
                f"Module {str(name)!r} of the file may be {' or '.join(sorted(fits))} in the base, and which it is "
                "the file does not say."
            )
        if not fits:
            near = get_close_matches(_dotted(name.flat), known, n=1, cutoff=0)
            nearest = f", and the nearest is {known[near[0]][0]!r}" if near else ""
            raise BadInput(
                f"Module {str(name)!r} of the file is none of the base: no path of its {len(known)} weights is "
                f"written so without dots{nearest}; was it trained on another model, or on one that names its layers "
                "differently?"
            )
        paths[name] = fits[0]
    return paths


def _check(name: Name, module: DraftModule, weight: BaseTensor) -> None:
    """One number for each input channel, where there are such: forms would share fewer among several."""
    for term in module.terms:
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
