"""The square root of ``loreg-f64-1`` [A6]: ``torch.sqrt`` is not the IEEE operation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def square_root(x: Tensor) -> Tensor:
    """√x of float64 numbers, each correctly rounded, on x's device: IEEE 754's squareRoot, through NumPy.

    torch 2.13 on a CPU takes MKL's vector routine, which is off by the last bit for 0.7 % of random doubles, so
    that a norm would be another one on CUDA or on a build without MKL. NumPy uses the processor's instruction.
    Meant for norms, of which there are few: x goes through the CPU's memory.
    """
    return torch.from_numpy(np.sqrt(x.cpu().numpy())).to(x.device)
