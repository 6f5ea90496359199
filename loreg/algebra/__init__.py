"""The algebra of adapters: tensors in, tensors out. No I/O, no global random state, no logging.

Deltas and edits are values (:mod:`delta`, :mod:`edits`). What an adapter does to a weight is a form (:mod:`forms`);
several are combined by concatenation, element by element (:mod:`elementwise`) or by their factors
(:mod:`factor_space`, :mod:`truncate`). A merged weight is correctly rounded (:mod:`rounding`, :mod:`exact`), and what
has to be computed before is, in a stated order (:mod:`ordered`, :mod:`densify`). Imports torch, NumPy, mpmath and
``loreg.errors``, and nothing else of loreg.
"""

from __future__ import annotations

from loreg.algebra.delta import FACTOR_DTYPES, Dense, LowRank, concatenate
from loreg.algebra.edits import Prepared, WeightedSum, apply
from loreg.algebra.rounding import STORAGE_DTYPES, from_ordered, half_ulp, round_to, ulp_distance
from loreg.algebra.truncate import Truncated, truncate, truncate_dense

__all__ = [
    "FACTOR_DTYPES",
    "STORAGE_DTYPES",
    "Dense",
    "LowRank",
    "Prepared",
    "Truncated",
    "WeightedSum",
    "apply",
    "concatenate",
    "from_ordered",
    "half_ulp",
    "round_to",
    "truncate",
    "truncate_dense",
    "ulp_distance",
]
