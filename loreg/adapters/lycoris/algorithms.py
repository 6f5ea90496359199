"""The parts of a module, and which of LyCORIS' algorithms they are of (4.1.3, ``modules``).

=========  =======================================  ==========================================================
algorithm  parts                                    scale
=========  =======================================  ==========================================================
LoCon      ``lora_up``, ``lora_down``, [``mid``]    α/r, r = the rows of ``lora_down``
LoHa       ``hada_w1_a`` …, [``hada_t1``, ``t2``]   α/r, r = the rows of ``hada_w1_b``
LoKr       ``lokr_w1`` or ``_a``, ``_b``; w2, [t2]  1 where both are whole, else α/r, r = the rows of ``…_b``
full       ``diff``, [``diff_b``]                   1
diag-OFT   ``oft_blocks``, [``rescale``]            1; α is the limit, see ``loreg.algebra.forms.orthogonal``
BOFT       the same, of four dimensions             the same
(IA)³      ``weight``, ``on_input``                 1
=========  =======================================  ==========================================================

α is the part ``alpha``; without it, or where it is 0, it is r. rs_lora is in it already, and a trained ``scalar`` in
another part. The first three may have a ``dora_scale``. LoKr, trained whole and with rs_lora, had a scale of √r,
which LyCORIS itself loads as 1: refused where the file says so, as is what else was computed in another way than the
file is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.lycoris.notes import Notes
from loreg.adapters.one_file import number
from loreg.errors import BadInput, Unsupported

_EPSILON = 2.0**-23
"""Added to a norm: that of float32, in which LyCORIS keeps a magnitude whatever the dtype of the file."""

_GLORA = "GLoRA, which is not handled"
_TLORA = "T-LoRA, whose rank depends on the time step, and which no single weight can stand for"

_REFUSED_PARTS: Mapping[str, str] = {
    "scalar": "a scalar, by which old versions of LyCORIS multiply and newer ones do not",
    "oft_diag": "OFT of LyCORIS 1, with the rotation itself, which newer versions do not load",
    **dict.fromkeys(("w_norm", "b_norm"), "a trained norm, and edits of vectors are not handled"),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), _GLORA),
    **dict.fromkeys(("lambda_layer", "p_layer.weight", "q_layer.weight"), _TLORA),
}

_REFUSED_ALGORITHMS: Mapping[str, str] = {
    "dylora": "DyLoRA, trained with a scale of α/(its blocks) that LyCORIS does not load it with",
    "glora": _GLORA,
    "tlora": _TLORA,
}


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors of one module, by part."""

    name: object
    parts: Mapping[str, RawTensor]
    notes: Notes

    def refuse(self, reason: str, error: type[BadInput] = Unsupported) -> NoReturn:
        raise error(f"Module {str(self.name)!r} of the file {reason}.")

    def roles(self, prefix: str) -> dict[str, RawTensor]:
        """The tensors whose parts begin with ``prefix``, by what follows it."""
        return {part.removeprefix(prefix): raw for part, raw in self.parts.items() if part.startswith(prefix)}

    def alpha(self, rank: int) -> float:
        """``rank`` where there is none or it is 0, which means the same when LyCORIS loads it."""
        return (number(self.parts["alpha"]) if "alpha" in self.parts else 0.0) or float(rank)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """``sign``: a part that says which it is. ``parts``: all that it may have, ``required`` those that it must.

    ``edits``: whether its edit is of the weight, so that LyCORIS' bypass mode, which works on what the layer gives
    out, computes something else.
    """

    name: str
    sign: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    term: Callable[[Found], DraftTerm]
    edits: bool = False


def module(name: object, parts: Mapping[str, RawTensor], notes: Notes) -> DraftModule:
    """One module of the file called ``name``. Raises Unsupported for another algorithm, and for what a file cannot
    tell; BadInput for parts that are missing, do not fit each other, or are not finite."""
    found = Found(name, parts, notes)
    if refused := _REFUSED_ALGORITHMS.get(notes.algorithm or ""):
        found.refuse(f"is of {refused}, as the header says (ss_network_args)")
    algorithm = _algorithm(found)
    term = algorithm.term(found)
    if "dora_scale" in parts:
        term = _decomposed(found, term)
    for raw in term.tensors.values():
        raw.check_finite()
    if notes.says("bypass_mode") and (algorithm.edits or "dora_scale" in parts):
        found.refuse(
            "was trained with bypass_mode, as the header says (ss_network_args), and computed something else then "
            f"than the {'DoRA' if 'dora_scale' in parts else algorithm.name} that LyCORIS loads"
        )
    try:
        term.size()
    except BadInput as error:
        found.refuse(f"is not acceptable {algorithm.name}: {str(error).rstrip('.')}", type(error))
    biases: tuple[DraftTerm, ...] = ()
    if "diff_b" in parts:
        parts["diff_b"].check_finite()
        biases = (DraftTerm("dense", {"value": parts["diff_b"]}, 1.0),)
    return DraftModule((term,), biases)


def _algorithm(found: Found) -> Algorithm:
    """Which one it is. Raises Unsupported for none, and for parts that it has not; BadInput for missing ones."""
    parts = set(found.parts)
    if refused := sorted(parts & set(_REFUSED_PARTS)):
        found.refuse(f"has {refused[0]!r}: it is of {_REFUSED_PARTS[refused[0]]}")
    algorithm = next((each for each in ALGORITHMS if each.sign in parts), None)
    if algorithm is None:
        found.refuse(f"has the parts {', '.join(sorted(parts))}, which are of no algorithm that loreg knows")
    if strange := sorted(parts - {*algorithm.required, *algorithm.optional}):
        found.refuse(f"is {algorithm.name} with {strange[0]!r}, which LyCORIS does not have in one")
    if missing := sorted(set(algorithm.required) - parts):
        found.refuse(f"is {algorithm.name} without {missing[0]!r}: the file is not complete", BadInput)
    return algorithm


def _decomposed(found: Found, term: DraftTerm) -> DraftTerm:
    """DoRA. The magnitudes are (out, 1…) if they are of the outputs (wd_on_out), else (1, in, 1…); one number alone
    is of the whole weight, which "in" says of it."""
    magnitude = found.parts["dora_scale"]
    others = [size for size in magnitude.shape if size != 1]
    if len(magnitude.shape) < 2 or len(others) > 1 or prod(magnitude.shape[:2]) != prod(magnitude.shape):
        found.refuse(
            f"has a dora_scale of shape {list(magnitude.shape)}, expected (out, 1, …) or (1, in, …)", BadInput
        )
    axis = {"axis": "out" if magnitude.shape[0] != 1 else "in", "epsilon": _EPSILON}
    tensors = {**term.tensors, "magnitude": magnitude}
    return DraftTerm(term.form, tensors, term.scale, term.alpha, {**term.parameters, **axis})


def _locon(found: Found) -> DraftTerm:
    tensors = {role.removesuffix(".weight"): raw for role, raw in found.roles("lora_").items()}
    rank = _rank(found, tensors["down"])
    alpha = found.alpha(rank)
    if "mid" in tensors:
        return DraftTerm("locon", tensors, alpha / rank, alpha)
    return DraftTerm("lora", {"A": tensors["down"], "B": tensors["up"]}, alpha / rank, alpha, {"groups": 1})


def _loha(found: Found) -> DraftTerm:
    tensors = found.roles("hada_")
    rank = _rank(found, tensors["w1_b"])
    alpha = found.alpha(rank)
    return DraftTerm("loha", tensors, alpha / rank, alpha)


def _lokr(found: Found) -> DraftTerm:
    tensors = found.roles("lokr_")
    align = {"align": "leading"}
    if "w1" in tensors and "w2" in tensors:
        if found.notes.says("rs_lora"):
            found.refuse(
                "is a whole LoKr that was trained with rs_lora, as the header says (ss_network_args): with a scale "
                "of √r, of which neither the file nor LyCORIS, when it loads one, knows"
            )
        return DraftTerm("lokr", tensors, 1.0, None, align)
    ranks = {_rank(found, tensors[role]) for role in ("w1_b", "w2_b") if role in tensors}
    if len(ranks) != 1:
        found.refuse(
            f"is not acceptable LoKr: expected w1 and w2 whole or in two, and of one rank, found "
            f"{', '.join(sorted(tensors))}{f' of ranks {sorted(ranks)}' if ranks else ''}",
            BadInput,
        )
    (rank,) = ranks
    alpha = found.alpha(rank)
    return DraftTerm("lokr", tensors, alpha / rank, alpha, align)


def _full(found: Found) -> DraftTerm:
    return DraftTerm("dense", {"value": found.parts["diff"]}, 1.0)


def _oft(found: Found) -> DraftTerm:
    R = found.parts["oft_blocks"]
    if len(R.shape) not in (3, 4) or R.shape[-1] != R.shape[-2]:
        found.refuse(f"has oft_blocks of shape {list(R.shape)}, expected (b, s, s) or (m, b, s, s)", BadInput)
    limit = number(found.parts["alpha"])
    # LyCORIS multiplies what it was given by the number of outputs, and a limit that is not positive is none.
    parameters: dict[str, Any] = {
        "side": "out",
        "total_limit": limit * R.shape[-3] * R.shape[-1] if limit > 0 else None,
    }
    if len(R.shape) == 3:
        parameters |= {"factor": 1.0, "series": None, "block_limit": None}
    else:
        parameters |= {"factor": -1.0, "order": "alternating"}
    tensors = {"R": R, **({"s": found.parts["rescale"]} if "rescale" in found.parts else {})}
    return DraftTerm("oft" if len(R.shape) == 3 else "boft", tensors, 1.0, None, parameters)


def _ia3(found: Found) -> DraftTerm:
    on_input = number(found.parts["on_input"])
    if on_input not in (0, 1):
        found.refuse(f"has on_input {on_input:g}, expected 0 or 1", BadInput)
    return DraftTerm(
        "ia3", {"l": found.parts["weight"]}, 1.0, None, {"on": "in" if on_input else "out", "neutral": 0}
    )


def _rank(found: Found, tensor: RawTensor) -> int:
    """Its rows: the r of α/r."""
    if not tensor.shape or not prod(tensor.shape):
        found.refuse(f"has {tensor.key!r} of shape {list(tensor.shape)}, expected (r, …)", BadInput)
    return tensor.shape[0]


_SCALED = ("alpha", "dora_scale")
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", *_SCALED)

ALGORITHMS: tuple[Algorithm, ...] = (
    Algorithm(
        "LoCon",
        "lora_up.weight",
        ("lora_up.weight", "lora_down.weight"),
        ("lora_mid.weight", *_SCALED),
        _locon,
    ),
    Algorithm("LoHa", "hada_w1_a", _LOHA, ("hada_t1", "hada_t2", *_SCALED), _loha),
    Algorithm("(IA)³", "on_input", ("on_input", "weight"), (), _ia3, edits=True),
    Algorithm("LoKr", "lokr_w1", (), _LOKR, _lokr),
    Algorithm("LoKr", "lokr_w1_a", (), _LOKR, _lokr),
    Algorithm("full", "diff", ("diff",), ("diff_b",), _full),
    Algorithm("OFT", "oft_blocks", ("oft_blocks", "alpha"), ("rescale",), _oft, edits=True),
)
"""In the order in which LyCORIS looks for them."""
