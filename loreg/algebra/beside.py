"""An edit of a weight as what it adds to the outputs of its layer, beside the weight, which stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from loreg.algebra.delta import LowRank
from loreg.errors import BadInput


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """ΔW = Σ c·BA + diag(``gain``)·W: to the outputs y = Wx of a layer it adds Σ c·B(Ax) + gain∘y, with which W need
    not be multiplied again.

    In module orientation, W (out, in). ``gain``: (out,), float64; None where it is zero. Raises BadInput for NaN or
    infinity in it.
    """

    low_rank: tuple[LowRank, ...] = ()
    gain: Tensor | None = None

    def __post_init__(self) -> None:
        if self.gain is not None and not bool(self.gain.isfinite().all()):
            raise BadInput("a factor of the outputs is NaN or infinity: the adapter is damaged or diverged.")

    @property
    def mT(self) -> Beside:  # noqa: N802 - torch's name
        """Of the transposed weight, which has no factors of outputs where this has some: BadInput."""
        if self.gain is not None:
            raise BadInput("what is scaled is the inputs of the transposed weight, and not its outputs.")
        return Beside(tuple(delta.mT for delta in self.low_rank))

    def scaled(self, weight: float) -> Beside:
        """Each term times ``weight``."""
        gain = None if self.gain is None else weight * self.gain
        return Beside(tuple(delta.scaled(weight) for delta in self.low_rank), gain)

    def __add__(self, other: Beside) -> Beside:
        gains = [gain for gain in (self.gain, other.gain) if gain is not None]
        return Beside(self.low_rank + other.low_rank, sum(gains[1:], gains[0]) if gains else None)
