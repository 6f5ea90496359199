"""Methods that combine dense deltas element by element, or by their lengths and angles: :data:`METHODS`.

Each takes :class:`Deltas` and the parameters that ``loreg.format.methods`` gives for its name, and returns one
float64 delta that is to be added to the weight. All are ``loreg-f64-1``: the same bits on CPU and CUDA, for any
number of threads and any size of block. They read what they are given and never write to it; beside the k deltas at
most three more tensors of the weight's size are alive, and one byte per element and delta for masks.

Order. The result belongs to the deltas *in their order*: the caller sorts them (as a recipe sorts its terms), and
then any permutation gives the same bits. Without that, two deltas give the same bits either way and three or more
the same up to the rounding of their sums; but ``karcher`` starts at the first of deltas that are opposite, and
``sce`` may select another of two elements whose variances are equal up to rounding.

``family:peft`` and ``family:mergekit`` are two definitions that share a name; see :mod:`consensus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from loreg.algebra.elementwise.consensus import mergekit, peft, peft_magnitude
from loreg.algebra.elementwise.deltas import Deltas, Method
from loreg.algebra.elementwise.geometry import karcher, model_stock, nuslerp, slerp
from loreg.algebra.elementwise.selection import sce
from loreg.algebra.elementwise.sparsify import by_rank, magnitude, outliers, random

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "task_arithmetic": mergekit,
        "magnitude_prune": partial(peft, sparsifier=peft_magnitude),
        "ties:peft": partial(peft, sparsifier=peft_magnitude, elect=True),
        "ties:mergekit": partial(mergekit, sparsifier=magnitude, elect=True),
        "dare_linear:peft": partial(peft, sparsifier=random, rescale=True),
        "dare_linear:mergekit": partial(mergekit, sparsifier=random),
        "dare_ties:peft": partial(peft, sparsifier=random, rescale=True, elect=True),
        "dare_ties:mergekit": partial(mergekit, sparsifier=random, elect=True),
        "della": partial(mergekit, sparsifier=by_rank, elect=True),
        "della_linear": partial(mergekit, sparsifier=by_rank),
        "breadcrumbs": partial(mergekit, sparsifier=outliers),
        "breadcrumbs_ties": partial(mergekit, sparsifier=outliers, elect=True),
        "sce": sce,
        "slerp": slerp,
        "nuslerp": nuslerp,
        "karcher": karcher,
        "model_stock": model_stock,
    }
)
"""Every method by its full name."""

__all__ = ["METHODS", "Deltas", "Method"]
