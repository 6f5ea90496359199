"""Forms [F1]: what one term of an adapter does to one weight, each a function from its tensors to a weighted sum.

A new kind of adapter is one function here and one row of ``loreg.format.forms``. All are in module orientation,
see :class:`Term`. A form that does not read the weight may have a ``magnitude``, and is DoRA then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

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
    if form not in FORMS:
        raise Unsupported(f"the form {form!r} is not one of {', '.join(FORMS)}: a newer format, or a mistake.")
    edit = FORMS[form](term)
    if edit.shape is None or edit.shape[-2:] != term.shape:
        raise BadInput(f"a term of form {form!r} is for a weight of shape {edit.shape}, not {term.shape}.")
    if "magnitude" not in term.tensors:
        return edit
    axis, epsilon = (term.parameters[name] for name in ("axis", "epsilon"))
    return decomposed.decompose(edit, term.base(), term.tensors["magnitude"], axis, epsilon)


__all__ = ["FORMS", "Form", "Term", "edit_of"]
