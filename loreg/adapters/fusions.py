"""Parameters of the live model that a checkpoint stores under other names, or in pieces.

transformers 5 stacks the experts of a layer, and joins their gate and up projections, when it loads a model; it
writes them apart again when it saves one (``conversion_mapping.py``, 5.23). An adapter of the live model is then for
one parameter, and the checkpoint has two or three tensors for each expert. Here is what it does to the models that
are known, and nothing more: a module that is not found so is refused by ``binding``, under its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import permutations
from typing import Any, NamedTuple, NoReturn, TypeAlias

import numpy as np

from loreg import layers
from loreg.adapters import renames
from loreg.adapters.draft import Draft, DraftModule, DraftTerm, RawTensor
from loreg.digest import Digest
from loreg.errors import BadInput, Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.format.module import IN_OUT, OUT_IN

Tensors: TypeAlias = Mapping[str, BaseTensor]
Config: TypeAlias = Mapping[str, Any]
_Words: TypeAlias = "np.ndarray[Any, np.dtype[np.void]]"

_PIECES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
"""A stack in memory → the layers of one expert, ``{expert}.{layer}.weight``, whose rows are on top of each other in
it. Mixtral, MiniMax, PhiMoE, LFM2: w1, w2, w3; Qwen, DeepSeek, OLMoE, GLM, Jamba and others: the long names."""

_ORDER = ("gate_up_proj", "gate_up_proj_bias", "gate_proj", "up_proj", "down_proj", "down_proj_bias")
"""In which order the classes of transformers define the parameters of their experts: all of them do in this one."""

# Stacked on disk under the names of memory, and as (in, out) where memory has (out, in).
TURNED_ON_DISK = frozenset({"qwen3_vl_moe", "qwen3_vl_moe_text"})

_PIECE = re.compile(r"(.+)\.(\d+)\.([^.]+)\.weight")


class InStack(NamedTuple):
    """Where memory may have a layer of one expert: in the parameter ``stack``, of that ``expert``, of so many
    ``pieces`` on top of each other the one at ``piece``."""

    stack: str
    expert: int
    piece: int
    pieces: int


def in_stack(name: str) -> Iterator[InStack]:
    """All places of a stored tensor that transformers may have stacked; none of one that is no layer of an expert."""
    if match := _PIECE.fullmatch(name):
        for parameter, known in _PIECES.items():
            for pieces in known:
                if match[3] in pieces:
                    yield InStack(f"{match[1]}.{parameter}", int(match[2]), pieces.index(match[3]), len(pieces))


class SharedTensor(RawTensor):
    """A tensor of many modules, which is hashed once and not for each of them."""

    @cached_property
    def _digest(self) -> Digest:
        return RawTensor.digest(self)

    def digest(self) -> Digest:
        return self._digest


@dataclass(frozen=True, slots=True)
class DraftParameters(DraftModule):
    """LoRA on parameters of one module, where the file tells neither which nor how many matrices each is.

    ``levels``: A (E·r, in) and B (out, r·E) of each parameter, in the order in which the module defines them.
    ``alphas`` and ``ranks``: by the name of each parameter that they may be for. ``root``: α/√r and not α/r.
    ``untransposed``, ``transposed``: the orientation in which the trainer takes a stack, by whether the module says
    of itself that it ``is_transposed``; None where that is not known. ``otherwise``: the module that it is if it has
    none of these parameters. ``terms`` is empty.
    """

    levels: tuple[tuple[RawTensor, RawTensor], ...] = ()
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    root: bool = False
    untransposed: str | None = None
    transposed: str | None = None
    otherwise: DraftModule | None = None


@dataclass(frozen=True, slots=True)
class _Site:
    """Where a parameter is on disk: the tensor ``name``, or the layers ``pieces`` of ``experts`` experts below it.

    ``shape``: in memory, where it is in pieces; on disk, where it is not.
    """

    parameter: str
    name: str
    shape: tuple[int, ...]
    pieces: tuple[str, ...] = ()

    @property
    def experts(self) -> int:
        return self.shape[0] if len(self.shape) == 3 else 1

    def orientations(self, A: RawTensor, B: RawTensor) -> set[str]:
        """The ways in which B·A lies on it. One matrix is never transposed (PEFT 0.21, `get_delta_weight`)."""
        size, (rows, columns) = (B.shape[0], A.shape[1]), self.shape[-2:]
        fits = {OUT_IN} if size == (rows, columns) else set()
        return fits | ({IN_OUT} if size == (columns, rows) and self.experts > 1 else set())


def placed(draft: Draft, tensors: Tensors, config: Config) -> Draft:
    """The draft with modules in the place of every ``DraftParameters``: one for each tensor that is stored.

    Raises BadInput, Unsupported where the parameters are not in the checkpoint, or cannot be told.
    """
    wrapped = {path: module for path, module in draft.modules.items() if isinstance(module, DraftParameters)}
    if not wrapped:
        return draft
    disk = _Disk(tensors, config)
    sites: dict[str, tuple[_Site, ...]] = {}
    modules = {path: module for path, module in draft.modules.items() if path not in wrapped}
    for path, module in wrapped.items():
        found = [site for name in module.alphas if (site := disk.site(path, name)) is not None]
        if found:
            sites[path] = _assigned(path, module, found)
        elif module.otherwise is not None:
            modules[path] = module.otherwise
        else:
            raise disk.missing(path, module.alphas)
    seen = _evidence(sites, wrapped)
    for path, assigned in sites.items():
        for site, level in zip(assigned, wrapped[path].levels, strict=True):
            orientation = _orientation(path, site, level, wrapped[path], seen, config)
            for key, made in _modules(path, site, level, wrapped[path], orientation):
                if key in modules:
                    raise BadInput(f"The adapter has {key!r} twice, alone and as a part of {path!r}: expected one.")
                modules[key] = made
    return replace(draft, modules=modules)


def _end(name: str) -> str:
    """What no shift of prefixes changes: the last two parts."""
    return ".".join(name.split(".")[-2:])


class _Disk:
    """A checkpoint, and where in it a parameter of memory is."""

    def __init__(self, tensors: Tensors, config: Config) -> None:
        self._tensors, self._known = tensors, renames.Known(tensors, config)
        self._ends = {_end(name) for name in (*tensors, *self._known.memory)}
        self._experts: dict[tuple[str, str], set[int]] = {}
        for name in tensors:
            if match := _PIECE.fullmatch(name):
                self._experts.setdefault((match[1], match[3]), set()).add(int(match[2]))

    def site(self, path: str, parameter: str) -> _Site | None:
        if found := self._find(f"{path}.{parameter}"):
            return _Site(parameter, found, self._tensors[found].shape)
        for pieces in _PIECES.get(parameter, ()):
            end = f".0.{pieces[0]}.weight"
            if found := self._find(path + end):
                return self._in_pieces(parameter, found.removesuffix(end), pieces)
        return None

    def _in_pieces(self, parameter: str, stem: str, pieces: tuple[str, ...]) -> _Site:
        numbers = self._experts[stem, pieces[0]]
        every = [f"{stem}.{number}.{piece}.weight" for number in numbers for piece in pieces]
        shapes = {self._tensors[name].shape if name in self._tensors else () for name in every}
        if len(shapes) != 1 or len(shape := next(iter(shapes))) != 2 or numbers != set(range(len(numbers))):
            raise Unsupported(
                f"{stem!r} has experts {min(numbers)} to {max(numbers)}, but not each with {' and '.join(pieces)} of "
                "one shape: in memory they would be one stack, and these are not."
            )
        return _Site(parameter, stem, (len(numbers), len(pieces) * shape[0], shape[1]), pieces)

    def _find(self, name: str) -> str | None:
        """Its name on disk. Most that are asked for are not there, which their ends tell without a search."""
        return self._known.resolve([name]).get(name) if _end(name) in self._ends else None

    def missing(self, path: str, parameters: Iterable[str]) -> BadInput:
        return BadInput(
            f"The adapter changes parameters ({', '.join(parameters)}) of {path!r}, and the base has none of them, "
            f"nor layers of single experts that they are made of (it has {len(self._tensors)} tensors, such as "
            f"{min(self._tensors)!r}); was the adapter trained on another base?"
        )


def _assigned(path: str, module: DraftParameters, found: Sequence[_Site]) -> tuple[_Site, ...]:
    """The parameter that each level is for: by the order in which the class defines them, or by shapes alone."""
    if len(found) != len(module.levels):
        raise BadInput(
            f"{path!r} is adapted by {len(module.levels)} pairs of factors, and target_parameters name "
            f"{', '.join(site.parameter for site in found)} of it: expected as many, as PEFT writes them."
        )
    if len(found) == 1 or all(site.parameter in _ORDER for site in found):
        candidates = [tuple(sorted(found, key=lambda site: (*_ORDER, site.parameter).index(site.parameter)))]
    else:
        candidates = list(permutations(found))
    fitting = [
        sites for sites in candidates if all(_fits(*pair, module) for pair in zip(sites, module.levels, strict=True))
    ]
    if not fitting:
        _misfit(path, candidates[0], module)
    if len(fitting) > 1:
        raise Unsupported(
            f"{path!r} has parameters {', '.join(site.parameter for site in found)}, and the adapter does not say "
            "which of its factors are for which, nor do their shapes: its order would be a guess."
        )
    return fitting[0]


def _fits(site: _Site, level: tuple[RawTensor, RawTensor], module: DraftParameters) -> bool:
    """Whether the shapes are those of a LoRA on the parameter, for all of its experts and with the rank it was given.

    PEFT loads no other. The rank counts the experts a second time: a checkpoint may store fewer than memory has.
    """
    A, B = level
    whole = len(site.shape) == 2 or A.shape[0] == site.experts * module.ranks[site.parameter]
    return len(site.shape) in (2, 3) and whole and bool(site.orientations(A, B))


def _misfit(path: str, sites: Sequence[_Site], module: DraftParameters) -> NoReturn:
    for site, level in zip(sites, module.levels, strict=True):
        if not _fits(site, level, module):
            A, B = level
            stack = f" of rank {module.ranks[site.parameter]} for each expert" if len(site.shape) == 3 else ""
            raise BadInput(
                f"{path}.{site.parameter}: expected factors{stack} that fit {list(site.shape)}, found A "
                f"{list(A.shape)} and B {list(B.shape)}; was the adapter trained on another base?"
            )
    raise BadInput(f"{path!r}: its factors do not fit its parameters in any order.")


def _evidence(sites: Mapping[str, Sequence[_Site]], wrapped: Mapping[str, DraftParameters]) -> Mapping[str, set[str]]:
    """The orientations that shapes tell, by the last part of the module's path: its class orients all alike."""
    seen: dict[str, set[str]] = {}
    for path, assigned in sites.items():
        for site, level in zip(assigned, wrapped[path].levels, strict=True):
            fits = site.orientations(*level)
            if site.experts > 1 and len(fits) == 1:
                seen.setdefault(path.rpartition(".")[2], set()).update(fits)
    return seen


def _orientation(
    path: str,
    site: _Site,
    level: tuple[RawTensor, RawTensor],
    module: DraftParameters,
    seen: Mapping[str, set[str]],
    config: Config,
) -> str:
    fits = site.orientations(*level)
    if len(fits) == 1:
        return fits.pop()
    evidence = seen.get(path.rpartition(".")[2], set())
    if len(evidence) == 1:
        return next(iter(evidence))
    if site.pieces:  # what transformers stacks itself is (experts, out, in), and says so
        told = module.untransposed
    elif not TURNED_ON_DISK.isdisjoint(part.get("model_type") for part in layers.parts(config)):
        told = None
    else:  # whether the module said that it is_transposed depends on the transformers that it was trained with
        told = module.untransposed if module.untransposed == module.transposed else None
    if told is None or evidence:
        raise Unsupported(
            f"{path}.{site.parameter} is a stack of square matrices {list(site.shape)}, and neither another "
            "parameter of the adapter nor its peft_version tells whether they are stored as (in, out): their "
            "orientation would be a guess."
        )
    return told


def _modules(
    path: str, site: _Site, level: tuple[RawTensor, RawTensor], module: DraftParameters, orientation: str
) -> Iterable[tuple[str, DraftModule]]:
    """One module for each stored tensor, by its path."""
    tensors = dict(zip("AB", level, strict=True))
    alpha, rank = module.alphas[site.parameter], level[0].shape[0] // site.experts
    scale = alpha / math.sqrt(rank) if module.root else alpha / rank
    turned = orientation == IN_OUT
    if not site.pieces:
        parameters = {"groups": 1} if len(site.shape) == 2 else {"experts": site.experts}
        term = DraftTerm("lora" if len(site.shape) == 2 else "lora_experts", tensors, scale, alpha, parameters)
        # A matrix of a layer that is called as GPT-2's Conv1D is would be transposed; as a parameter, it is not.
        if site.parameter == "weight" and not layers.may_store_in_out(path.rpartition(".")[2]):
            yield path, DraftModule((term,), in_out_hint=turned)
        else:
            yield f"{path}.{site.parameter}", DraftModule((term,), parameter="", in_out_hint=turned)
        return
    size = site.shape[1] // len(site.pieces)
    if turned:
        for expert, (A, B) in enumerate(_transposed(level, site.experts, rank)):
            for index, piece in enumerate(site.pieces):
                key, rows = f"{site.name}.{expert}.{piece}", B[index * size : (index + 1) * size]
                made = {"A": _raw(f"{key}.A", A, level[1]), "B": _raw(f"{key}.B", rows, level[0])}
                yield key, DraftModule((DraftTerm("lora", made, scale, alpha, {"groups": 1}),))
        return
    shared = {role: SharedTensor(t.key, t.dtype, t.shape, t.data, t.offset) for role, t in tensors.items()}
    for expert in range(site.experts):
        for index, piece in enumerate(site.pieces):
            span = None if len(site.pieces) == 1 else [index * size, (index + 1) * size]
            part: dict[str, Any] = {"experts": site.experts, "expert": expert, "rows": span}
            term = DraftTerm("lora_expert", shared, scale, alpha, part)
            yield f"{site.name}.{expert}.{piece}", DraftModule((term,))


def _transposed(level: tuple[RawTensor, RawTensor], experts: int, rank: int) -> Iterable[tuple[_Words, _Words]]:
    """A LoRA of each expert for (out, in), where the stack was taken as (experts, in, out): (BA)ᵀ = AᵀBᵀ.

    Halves of such a stack are columns of A, of which no term of a manifest takes a part.
    """
    words = [
        np.frombuffer(raw.content(), dtype=f"V{raw.nbytes // math.prod(raw.shape)}").reshape(raw.shape)
        for raw in level
    ]
    A, B = words[0].reshape(experts, rank, -1), words[1].reshape(-1, rank, experts)
    return [(B[:, :, expert].T, A[expert].T) for expert in range(experts)]


def _raw(key: str, words: _Words, source: RawTensor) -> RawTensor:
    return RawTensor(key, source.dtype, words.shape, np.ascontiguousarray(words).tobytes())
