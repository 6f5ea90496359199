"""Types of PEFT that are refused, and why, in words: what they compute is from PEFT 0.21, ``tuners/``.

Three kinds: what no weight of the model can hold; what needs numbers that are not in the file; and edits of a weight
that no form of ``loreg.algebra.forms`` computes.
"""

from __future__ import annotations

from collections.abc import Mapping

_TOKENS = "which puts trained vectors before the words of every input: no weight of the model holds them"
_CACHE = (
    "which puts trained keys and values before those of the input in every layer: no weight of the model holds them"
)
_NO_MERGE = "so that no weight of the model holds it"
_INSTEAD = "; merge it with PEFT's merge_and_unload instead"
_DRAWN = "not in the file but drawn again when PEFT loads it, as that release of torch draws" + _INSTEAD
_AGAIN = "singular vectors of the base, not in the file but computed again when PEFT loads it" + _INSTEAD
_NO_FORM = "for which loreg has no form" + _INSTEAD

REFUSED: Mapping[str, str] = {
    # no weight holds them
    "PROMPT_TUNING": _TOKENS,
    "MULTITASK_PROMPT_TUNING": _TOKENS,
    "P_TUNING": _TOKENS,
    "CPT": _TOKENS,
    "PREFIX_TUNING": _CACHE,
    "CARTRIDGE": _CACHE,
    "ADAPTION_PROMPT": "which adds a gated attention to trained prompts beside that of the model, " + _NO_MERGE,
    "XLORA": "which mixes several LoRAs at run time, by a router that looks at each input, "
    + _NO_MERGE
    + ": push its LoRAs one by one, and compose them at weights of your choice",
    "POLY": "which mixes several LoRAs at run time, for the task that the caller names, " + _NO_MERGE,
    "LILY": "which mixes several matrices at run time, by a router that looks at each input, " + _NO_MERGE,
    "SHADOW": "which runs a second network beside the model, and mixes its states in, " + _NO_MERGE,
    # half of them is not in the file
    "FOURIERFT": "whose places in the spectrum are " + _DRAWN,
    "WAVEFT": "whose places in the spectrum are " + _DRAWN,
    "UNILORA": "whose places of one vector in all matrices are mostly " + _DRAWN,
    "OSF": "which is the difference to " + _AGAIN,
    "PSOFT": "which rotates " + _AGAIN,
    "ADAMSS": "which clusters " + _AGAIN,
    # edits of a weight
    "BEFT": "a vector on the outputs of layers that mostly have no bias to hold it, " + _NO_FORM,
    "LN_TUNING": "layers that are replaced as a whole, " + _NO_FORM,
    "PVERA": "a VeRA whose vectors are trained means, or drawn around them at run time, " + _NO_FORM,
    "RANDLORA": "a sum of many products of shared random matrices, " + _NO_FORM,
    "FROD": "a weight that is composed anew from shared rotations, " + _NO_FORM,
    "TINYLORA": "singular vectors of the base around a random projection of a few numbers, " + _NO_FORM,
    "GLORA": "products of the weight with matrices, and sums, and the same of the bias, " + _NO_FORM,
    "HRA": "a chain of reflections of the weight, " + _NO_FORM,
    "VBLORA": "matrices whose pieces are mixed from a common bank of vectors, " + _NO_FORM,
    "MISS": "a block that is added to every block of the weight, " + _NO_FORM,
    "BONE": "what PEFT calls MISS today, a block that is added to every block of the weight, " + _NO_FORM,
    "ROAD": "a rotation of pairs of outputs, " + _NO_FORM,
    "HIRA": "the product of the weight and a low-rank matrix, element by element, " + _NO_FORM,
    "SHIRA": "a sum with few elements of the weight, " + _NO_FORM,
    "SUPERTUNING": "a sum with few elements of the weight, " + _NO_FORM,
    "C3A": "circulant blocks, " + _NO_FORM,
    "DELORA": "a low-rank matrix of normalised rows and columns, " + _NO_FORM,
    "GRALORA": "a low-rank matrix for every block of the weight, " + _NO_FORM,
    "PEANUT": "a small network whose input is the weight, " + _NO_FORM,
    "DEFT": "a projection of the weight, and what is put in its place, " + _NO_FORM,
}
"""``peft_type`` → the reason, to follow "peft_type is 'X', "."""


def why_refused(kind: str) -> str:
    """The reason for one that has no reader."""
    return REFUSED.get(kind, "which is none that loreg knows: it is newer, or a mistake")
