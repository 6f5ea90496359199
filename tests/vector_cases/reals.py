"""Real numbers to 90 digits, for what IEEE 754 does not define: textbook series on Python's decimals."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal, localcontext
from functools import wraps
from typing import ParamSpec, TypeVar

P, T = ParamSpec("P"), TypeVar("T")

_NOTHING = Decimal(10) ** -95


def precise(function: Callable[P, T]) -> Callable[P, T]:
    """Runs a function with 90 digits."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with localcontext(Context(prec=90)):
            return function(*args, **kwargs)

    return run


def _series(first: Decimal, ratio: Callable[[int], Decimal]) -> Decimal:
    """first·(1 + ratio(1) + ratio(1)·ratio(2) + …)"""
    total = term = first
    n = 1
    while abs(term) > _NOTHING:
        term *= ratio(n)
        total += term
        n += 1
    return total


def sin(x: Decimal) -> Decimal:
    return _series(x, lambda n: -x * x / (2 * n * (2 * n + 1)))


def cos(x: Decimal) -> Decimal:
    return _series(Decimal(1), lambda n: -x * x / (2 * n * (2 * n - 1)))


def atan(x: Decimal) -> Decimal:
    """By halving the angle until the series is short."""
    doublings = 0
    while abs(x) > Decimal("0.01"):
        x = x / (1 + (1 + x * x).sqrt())
        doublings += 1
    power, total, n = x, x, 1
    while abs(power) > _NOTHING:
        power *= -x * x
        n += 2
        total += power / n
    return total * 2**doublings


def pi() -> Decimal:
    return 4 * atan(Decimal(1))


def acos(x: Decimal) -> Decimal:
    return pi() if x == -1 else 2 * atan(((1 - x) / (1 + x)).sqrt())
