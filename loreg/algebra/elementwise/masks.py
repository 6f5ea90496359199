"""Random numbers that are a function of (key, index) and of nothing else [C3].

A generator that is stepped gives other numbers on another device, with another tiling or after another draw. This
one is a counter and a hash: SplitMix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014), whose n-th output is a mix of key + n·γ. It is written in 64-bit integers that wrap, so that CPU and
CUDA cannot differ; torch's shift is arithmetic, so what it carries in from the sign is masked off.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return ((number + 2**63) % 2**64) - 2**63


_GAMMA = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _shifted(x: Tensor, by: int) -> Tensor:
    """``x`` as an unsigned integer, shifted right."""
    return (x >> by).bitwise_and_(2 ** (64 - by) - 1)


def bits(key: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,), int64: the outputs first … first + count - 1 of SplitMix64 from the state ``key`` mod 2⁶⁴."""
    z = torch.arange(first + 1, first + 1 + count, dtype=torch.int64, device=device)
    z.mul_(_GAMMA).add_(_signed(key))
    for by, factor in _ROUNDS:
        z.bitwise_xor_(_shifted(z, by)).mul_(factor)
    return z.bitwise_xor_(_shifted(z, 31))


def uniform(key: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """(count,), float64 in [0, 1): the upper 53 bits of :func:`bits`, times 2⁻⁵³; both steps exact."""
    return _shifted(bits(key, first, count, device), 11).double().mul_(2.0**-53)
