"""What the PEFT directory of a version says: the one thing that all engines read."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layer:
    """A LoRA layer of the directory. ``path``: in the model.

    ``kind``: as in a manifest, or ``attention`` for both of a MultiheadAttention. ``scale``: what the product of its
    factors is multiplied by. ``divided``: its factors are in blocks (BD-LoRA). ``magnitude``, ``bias``: of DoRA, and
    of ``lora_bias``. ``tied``: it is of a head that shares its weight with an
    embedding in the base, or of that. ``square``: it has as many inputs as outputs.
    """

    path: str
    kind: str
    rank: int
    scale: float
    divided: bool = False
    magnitude: bool = False
    bias: bool = False
    tied: bool = False
    square: bool = False

    @property
    def leaf(self) -> str:
        """The last part of the path: ``q_proj``."""
        return self.path.rpartition(".")[2]

    @property
    def plain(self) -> bool:
        """Whether it is scale·BA on a matrix, and nothing else."""
        matrix = self.kind in ("linear", "conv1d", "embedding")
        return matrix and not (self.divided or self.magnitude or self.bias)


@dataclass(frozen=True, slots=True)
class Stack:
    """Experts of one module that are adapted as parameters. ``parts``: which, by their names where they are stored.
    ``whole``: whether the checkpoint stores them as one tensor too."""

    path: str
    parts: frozenset[str]
    whole: bool


@dataclass(frozen=True, slots=True)
class Words:
    """``adapter_config.json``, as far as an engine reads it. ``root``: ``use_rslora``. ``ranks``: the values of
    ``rank_pattern``. ``targets``: ``target_modules``, a text where it is an expression. ``saved``:
    ``modules_to_save``. ``tying``: ``ensure_weight_tying``. ``parameters``: whether there are ``target_parameters``.
    """

    method: str
    r: int
    alpha: float
    root: bool = False
    ranks: tuple[float, ...] = ()
    bias: str = "none"
    targets: tuple[str, ...] | str = ()
    saved: tuple[str, ...] = ()
    tying: bool = False
    parameters: bool = False


@dataclass(frozen=True, slots=True)
class Described:
    """The directory. ``unsayable``: why there is none.

    ``layers``: the LoRA layers. ``rows``: modules with trained rows. ``stacks``: experts. ``saved``: modules with
    tensors that are replaced, beside ``biases``, and ``beneath`` a LoRA of the same module. ``carried``: tensors in
    the file that are the base's own. ``labels``: rows of the largest replaced classifier. ``strangers``: the name of
    the weights' file, if it holds more than the adapter. ``pickled``: whether it is a pickle. ``rank``: the largest.
    ``foldable``: whether there is a folded form.
    """

    words: Words
    unsayable: str | None = None
    layers: tuple[Layer, ...] = ()
    rows: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    saved: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    beneath: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    labels: int = 0
    strangers: str | None = None
    pickled: bool = False
    rank: int = 0
    foldable: bool = False

    def alpha_of(self, layer: Layer) -> float:
        """The α that gives the layer its scale, by the config's rule."""
        return layer.scale * (math.sqrt(layer.rank) if self.words.root else layer.rank)

    def of_kind(self, *kinds: str) -> list[str]:
        """Paths of the layers of these kinds."""
        return [layer.path for layer in self.layers if layer.kind in kinds]
