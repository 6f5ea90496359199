"""Methods that combine adapters by their factors, and never form a matrix of the weight's size: :data:`METHODS`.

Each takes k adapters as (weight, terms), the terms one :class:`~loreg.algebra.delta.LowRank` or several whose sum
is the adapter's delta, or none for an adapter that leaves this weight alone; all of one shape (m, n), on one device.
An adapter of weight 0 is as if it were not there. The result is the combined delta, terms whose sum is to be *added*
to the weight, and the norm of what was cut off: :class:`~loreg.algebra.factor_space.adapters.Combined`. Work is QR of
(m, R) and (n, R) and SVDs of order R, R the sum of ranks: O((m + n)R² + R³).

Everything is float64 through LAPACK (``float64-lapack``), deterministic on one machine; the last bits may differ
between builds, devices and thread counts, so a result is stored as an adapter of its own, whose digest is of what it
holds. Called with one torch thread, as ``merge.workers`` does, a method gives one machine one result. ``cat`` alone
rounds nothing but scales.

Orientation: left is B (m, r) and right A (r, n) of a weight (out, in), as the papers have it. ``knots``, and
``peft_linear`` with negative weights, give something else for the transposed weight; for a weight that is stored
(in, out) the caller passes the transposes and transposes back. To the others it is all one.

Parameters that all but ``cat`` and ``peft_linear`` take: ``rank`` (None, or 1 … min(m, n)) and ``energy`` (None, or
in (0, 1]), as :func:`~loreg.algebra.truncate.truncate` has them; None keeps all. The result is then one delta with
balanced factors. A parameter that a method does not know is ignored: ``loreg.format.methods`` refuses it.
``keys``, one number for each adapter, seed the random masks of an inner method; the others have none.

All raise BadInput if there is no delta or shapes or devices differ, UsageError for a weight that is not finite or a
rank or energy out of range, Unsupported for terms that are stacks of matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from loreg.algebra.factor_space.adapters import Adapters, Combined, FactorMethod
from loreg.algebra.factor_space.alignment import core_space, knots
from loreg.algebra.factor_space.concatenation import cat, peft_linear, svd
from loreg.algebra.factor_space.spectral import iso_c, tsv

METHODS: Mapping[str, FactorMethod] = MappingProxyType(
    {
        "cat": cat,
        "svd": svd,
        "peft_linear": peft_linear,
        "knots": knots,
        "core_space": core_space,
        "tsv": tsv,
        "iso_c": iso_c,
    }
)
"""Every method by its full name."""

__all__ = ["METHODS", "Adapters", "Combined", "FactorMethod"]
