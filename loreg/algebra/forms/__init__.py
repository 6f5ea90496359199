"""Forms [F1]: what one term of an adapter does to one weight, each a function from its tensors to a weighted sum.

A new kind of adapter is one function here and one row of ``loreg.format.forms``. All are in module orientation,
see :class:`Term`. A form that does not read the weight may have a ``magnitude``, and is DoRA then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NoReturn, TypeAlias

from loreg.algebra.beside import Beside
from loreg.algebra.edits import WeightedSum
from loreg.algebra.forms import decomposed, low_rank, lycoris, orthogonal, scaled
from loreg.algebra.forms.term import Term
from loreg.errors import BadInput, Unsupported

Form: TypeAlias = Callable[[Term], WeightedSum]

FORMS: Mapping[str, Form] = {
    "lora": low_rank.lora,
    "lora_merged": low_rank.lora_merged,
    "lora_reshaped": low_rank.lora_reshaped,
    "lora_expert": low_rank.lora_expert,
    "lora_experts": low_rank.lora_experts,
    "adalora": low_rank.adalora,
    "vera": low_rank.vera,
    "loha": lycoris.loha,
    "lokr": lycoris.lokr,
    "locon": lycoris.locon,
    "dense": lycoris.dense,
    "ia3": scaled.ia3,
    "replaced": scaled.replaced,
    "rows": scaled.rows,
    "oft": orthogonal.oft,
    "boft": orthogonal.boft,
}


def edit_of(form: str, term: Term) -> WeightedSum:
    """What ``form`` makes of ``term``: a sum for a weight of ``term.shape``, so that the edited weight is W + sum.
    For :func:`~low_rank.lora_experts` the weight is a stack of such.

    With a tensor ``magnitude`` the form's sum is decomposed, see :mod:`decomposed`. Raises Unsupported for a form
    that this version does not know, BadInput for a sum of another shape than the weight's, and for NaN or infinity.
    """
    edit = _sum_of(form, term)
    if "magnitude" not in term.tensors:
        return edit
    axis, epsilon = (term.parameters[name] for name in ("axis", "epsilon"))
    return decomposed.decompose(edit, term.base(), term.tensors["magnitude"], axis, epsilon)


def beside_of(form: str, term: Term) -> Beside:
    """``edit_of`` as what it adds to the outputs of the layer.

    Raises what that does, and Unsupported, saying why, for what is no sum of products of two matrices, but for DoRA
    with the norms of outputs, of such a sum.
    """

    def base() -> NoReturn:
        raise Unsupported(f"{form!r} edits the weight by its own values")

    edit = _sum_of(form, replace(term, base=base))
    if edit.dense or len(edit.shape or ()) != 2:
        raise Unsupported(f"{form!r} is here no sum of products of two matrices")
    if "magnitude" not in term.tensors:
        return Beside(edit.low_rank)
    if term.parameters["axis"] != "out":
        raise Unsupported("its DoRA has norms of inputs, and scales these")
    return decomposed.beside(edit, term.base(), term.tensors["magnitude"], term.parameters["epsilon"])


def _sum_of(form: str, term: Term) -> WeightedSum:
    """Without its magnitude, if it has one."""
    if form not in FORMS:
        raise Unsupported(f"the form {form!r} is not one of {', '.join(FORMS)}: a newer format, or a mistake.")
    edit = FORMS[form](term)
    if edit.shape is None or edit.shape[-2:] != term.shape:
        raise BadInput(f"a term of form {form!r} is for a weight of shape {edit.shape}, not {term.shape}.")
    return edit


__all__ = ["FORMS", "Form", "Term", "beside_of", "edit_of"]
