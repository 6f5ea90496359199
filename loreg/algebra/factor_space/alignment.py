"""Methods that bring deltas into common coordinates and let an elementwise method combine them there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loreg.algebra.factor_space.adapters import Adapters, Combined, Keys, Stacks, check, truncated
from loreg.algebra.truncate import spectrum, triangle
from loreg.errors import BadInput, UsageError


@torch.no_grad()
def knots(adapters: Adapters, parameters: Mapping[str, Any], keys: Keys = None) -> Combined:
    """KnOTS: an elementwise method on the deltas' coordinates in the singular basis of all of them.

    [Δ₁ … Δ_k] = U·S·[V₁ᵀ … V_kᵀ], (m, k·n); the (R, n) matrices S·Vᵢᵀ = UᵀΔᵢ are combined by ``inner``, and the
    result is U times that. (Stoica et al., "Model merging with SVD to tie the KnOTS", ICLR 2025; gstoica27/KnOTS,
    task_merger.py, S on V's side as its configurations have it.) Needs k·R·n doubles.

    ``inner``: a name of ``loreg.algebra.elementwise.METHODS``, with its parameters beside it, or "linear", the
    weighted sum. Default "ties:mergekit". ``keys`` seed ``inner``'s random masks; it is for the caller to derive
    them from the recipe, as for dense deltas.

    Decided here. *Weights* go to ``inner``; the basis is that of the unweighted deltas, as in the paper. So scaling,
    order and a single adapter do what they do for ``inner``; with "linear" this is the sum, and one adapter at weight
    1 is itself. *Zeros*: singular values that are rounding noise (:meth:`~loreg.algebra.truncate.Spectrum.rank`) are
    left out, since rows of noise would count for a density; the authors leave out what is below 1e-5, whatever the
    scale. *A density* is of this weight's elements; the authors' code ranks those of all layers together. An adapter
    that leaves this weight alone takes part as zeros.

    Raises UsageError for an unknown ``inner``, BadInput for another number of keys, and what ``inner`` raises.
    """
    stacks = check(adapters, parameters)
    blocks = [triangle(stack.right.T) for stack in stacks.each]
    found = spectrum(triangle(stacks.left), torch.block_diag(*blocks))  # type: ignore[no-untyped-call]
    basis, rows = found.basis(stacks.left, found.rank((stacks.shape[0], len(blocks) * stacks.shape[1])))
    if basis.shape[1] == 0:
        return stacks.zero()
    coordinates = [rows[:, stack.place] @ stack.right for stack in stacks.each]
    merged = _combined(stacks, coordinates, parameters, _checked(keys, adapters), "ties:mergekit")
    return truncated(basis, merged, parameters)


@torch.no_grad()
def core_space(adapters: Adapters, parameters: Mapping[str, Any], keys: Keys = None) -> Combined:
    """Core Space merging: a method on small cores of the deltas, in bases that span all their factors.

    U: the left singular vectors of [B₁ … B_k], V: the right ones of [A₁; …; A_k], at most R of each. The cores
    Mᵢ = UᵀΔᵢV, (R, R), are combined by ``inner``, and the result is U·M·Vᵀ. Nothing is lost on the way: U·Mᵢ·Vᵀ = Δᵢ.
    (Panariello et al., "Accurate and efficient low-rank model merging in core space", NeurIPS 2025;
    apanariello4/core-space-merging, task_merger.py.)

    ``inner`` and ``keys`` as for :func:`knots`, but by default "linear", the weighted sum; with it this is the sum,
    and one adapter at weight 1 is itself.

    Decided here. *Weights* go to ``inner``. *Scales* (alpha / r) go into the cores, and the bases are those of the
    factors as they are stored; so, as in the paper, the result depends on how a delta is factored, unless ``inner``
    is linear. *Zeros*: directions that are rounding noise are left out of U and V, as for :func:`knots`.

    Raises what :func:`knots` raises.
    """
    stacks = check(adapters, parameters)
    terms = [term for stack in stacks.each for term in adapters[stack.index][1]]
    scales = [term.scale for term in terms for _ in range(term.rank)]
    u, of_left = _span(torch.cat([term.left.double() for term in terms], dim=1))
    v, of_right = _span(stacks.right.T)
    if u.shape[1] == 0 or v.shape[1] == 0:
        return stacks.zero()
    of_left = of_left * torch.tensor(scales, dtype=torch.float64, device=of_left.device)
    cores = [of_left[:, stack.place] @ of_right[:, stack.place].T for stack in stacks.each]
    merged = _combined(stacks, cores, parameters, _checked(keys, adapters), "linear")
    return truncated(u @ merged, v.T, parameters)


def _span(x: Tensor) -> tuple[Tensor, Tensor]:
    """The left singular vectors U of ``x`` that are not noise, and Uᵀx."""
    found = spectrum(triangle(x), torch.eye(x.shape[1], dtype=x.dtype, device=x.device))
    return found.basis(x, found.rank(x.shape))


def _checked(keys: Keys, adapters: Adapters) -> Sequence[int]:
    """One key for each adapter, or BadInput."""
    found = range(len(adapters)) if keys is None else keys
    if len(found) != len(adapters):
        raise BadInput(f"random masks need one key for each of {len(adapters)} adapters, found {len(found)}.")
    return found


def _combined(
    stacks: Stacks, values: Sequence[Tensor], parameters: Mapping[str, Any], keys: Sequence[int], default: str
) -> Tensor:
    """``values``, one for each of ``stacks``, combined by ``inner`` with the adapters' weights and ``keys``."""
    # Late, as no other method here needs that package.
    from loreg.algebra.elementwise import METHODS, Deltas

    name = parameters.get("inner", default)
    weights = tuple(stack.weight for stack in stacks.each)
    if name == "linear":
        return torch.stack([weight * value for weight, value in zip(weights, values, strict=True)]).sum(0)
    if name not in METHODS:
        raise UsageError(f"there is no inner method {name!r}: choose one of linear, {', '.join(METHODS)}.")
    deltas = Deltas(tuple(values), weights, tuple(keys[stack.index] for stack in stacks.each))
    return METHODS[name](deltas, parameters)
