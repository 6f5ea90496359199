"""The algebra of adapters: tensors in, tensors out. No I/O, no global random state, no logging.

Deltas and edits are values (:mod:`delta`, :mod:`edits`), combining them is concatenation or an explicit
truncation (:mod:`combine`, :mod:`truncate`), and a merged weight is correctly rounded (:mod:`rounding`,
:mod:`exact`). Imports torch, NumPy and ``loreg.errors``, and nothing else of loreg.
"""

from __future__ import annotations

from loreg.algebra.combine import Combined, linear, svd
from loreg.algebra.delta import FACTOR_DTYPES, Dense, LowRank, concatenate
from loreg.algebra.edits import Prepared, WeightedSum, apply
from loreg.algebra.rounding import STORAGE_DTYPES, from_ordered, half_ulp, ordered, round_to, ulp_distance
from loreg.algebra.truncate import Truncated, truncate

__all__ = [
    "FACTOR_DTYPES",
    "STORAGE_DTYPES",
    "Combined",
    "Dense",
    "LowRank",
    "Prepared",
    "Truncated",
    "WeightedSum",
    "apply",
    "concatenate",
    "from_ordered",
    "half_ulp",
    "linear",
    "ordered",
    "round_to",
    "svd",
    "truncate",
    "ulp_distance",
]
