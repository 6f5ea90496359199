"""Low-rank edits on a GPU, in one pass over the weights: ``kernels``, by Triton.

*Why single precision first.* A 7 B model in bfloat16 has 6.5·10⁹ weights in its linear layers: 26 GB to read and
write, 8.6 ms at the 3.0 TB/s that an H100 copies. At rank 16 that is 2.1·10¹¹ floating-point operations: 6.1 ms of
its 34 TFLOPS in float64, with twice the registers, and 3.5 ms of the unit that converts to and from float64; but
160 ms on a card for games, of 1.3 TFLOPS. In float32 they are less than half the instructions that a weight takes,
which are issued in about the time that the bytes take. (Tensor cores would have to compute in float64, as how they
round sums of anything narrower is nowhere stated.) So bfloat16 is summed in float32, with the margin of ``native``,
and the words of 8 weights that this leaves in doubt, one in a hundred, are listed. A second kernel sums those in
float64 and leaves only ties, and what is as close to one, to the exact stage. For float16 and float32 all is float64,
as float32 would leave too much in doubt.

*Many weights, one launch.* To start a kernel takes as long as it needs for one layer, so there is one for all of a
kind. Lists have bounded room. A tile makes room for itself before it stores anything, also in place: one that finds
none leaves W as it is and only says what it needs, and is done by a launch that follows.

*A swap is one pass.* A tile is taken back in registers, by the integers that its last edit left (``undo``), and the
next edit applied to what is then there: W is read once and written once. The same kernel only takes back, or only
applies. No GPU was there to measure that. What it compiles to for an H100 is 130 instructions a weight at rank 16,
of which 39 are the two deltas; as two launches it was 118, and some ten passes of torch over what they had listed.
The time of a copy has room for 39: so instructions limit it, and not bytes. Deltas by float64 tensor cores, which
round as IEEE says, came to 178: what they leave in a thread are no words, and all that follows has to be gathered.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from loreg.algebra.delta import LowRank
from loreg.algebra.gpu.fused import Fused, single
from loreg.algebra.gpu.groups import CODES

__all__ = ["DEVICES", "Fused", "computes", "is_there", "single"]

DEVICES = frozenset({"cuda"})
_MOST_RANK = 1024  # beyond it float64 products by torch are as fast


def computes(edit: Sequence[LowRank], dtype_in: torch.dtype, dtype_out: torch.dtype, device: torch.device) -> bool:
    """Whether there is a ``Fused`` for these."""
    small = sum(term.rank for term in edit) <= _MOST_RANK
    return small and device.type in DEVICES and {dtype_in, dtype_out} <= CODES.keys() and is_there()


@functools.cache
def is_there() -> bool:
    return torch.version.hip is None and find_spec("triton") is not None
