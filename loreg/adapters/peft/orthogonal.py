"""OFT and BOFT as PEFT writes them, of every release: see the table in ``loreg/algebra/forms/orthogonal.py``.

PEFT 0.21 itself loads neither of OFT's older formats, which have ``oft_r``, and gives the series of 0.17 and older
the coefficients of 0.18. Here an adapter means what the release that wrote it computed. A release that wrote no
``peft_version`` into the config is 0.17 or older.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft.config import check_known
from loreg.adapters.peft.contents import Config, Contents
from loreg.adapters.peft.parts import contents, sort
from loreg.errors import BadInput, Unsupported
from loreg.format.fields import Fields

# Number and size of the blocks are those of the tensors.
KNOWN = frozenset(
    {"r", "oft_block_size", "module_dropout", "fan_in_fan_out", "bias", "init_weights", "coft", "eps"}
    | {"block_share", "use_cayley_neumann", "num_cayley_neumann_terms"}
    # of 0.14 and older: r for modules of their own
    | {"rank_pattern", "alpha_pattern"}
)
KNOWN_BOFT = frozenset(
    {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "fan_in_fan_out", "bias"}
    | {"init_weights"}
)

_NOW, _EMBEDDING, _OLD, _OLD_SCALE = "oft_R.weight", "oft_embedding_R.weight", "oft_r", "oft_s"
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})(?![0-9])(?P<rest>.*)", re.DOTALL)

_MOST_TERMS = 64  # the most that the form takes; PEFT's default is 5, and each costs a product of all blocks


def read_oft(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``. A convolution is seen in the base, and may be refused then."""
    check_known(config, KNOWN, path)
    found = sort(tensors, (), (_NOW, _EMBEDDING, _OLD, _OLD_SCALE))
    rotations = {name: _oft(name, parts, config, path) for name, parts in found.modules.items()}
    modules = {name: DraftModule((), embedding=_EMBEDDING in parts) for name, parts in found.modules.items()}
    settle = {name: rotation.settle for name, rotation in rotations.items()}
    return contents(modules, found.rest, config, settle=settle)


def read_boft(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``. The permutations, which PEFT 0.11 saved too, follow from the sizes.

    PEFT 0.13 and older, whose configs have no ``exclude_modules``, took a convolution's weight for a matrix of its
    inputs without transposing it, so that what they rotated were no inputs: refused.
    """
    check_known(config, KNOWN_BOFT, path)
    found = sort(tensors, ("boft_R", "boft_s"), ("boft_P",))
    parameters = {"side": "in", "factor": 0.5, "total_limit": None, "order": "halves"}
    modules = {
        name: DraftModule((DraftTerm("boft", {"R": parts["boft_R"], "s": parts["boft_s"]}, 1.0, None, parameters),))
        for name, parts in found.modules.items()
    }
    for name, parts in found.modules.items():
        s = parts["boft_s"].shape  # (1, out) of a convolution, else (out, 1)
        if "exclude_modules" not in config and s[0] == 1 < math.prod(s):
            raise Unsupported(
                f"Module {name!r} is a convolution by BOFT of PEFT 0.13 or older, which took the numbers of its "
                "weight in another order than that of its inputs, as no later one does: merge it with that release."
            )
    return contents(modules, found.rest, config)


def _oft(name: str, parts: Mapping[str, RawTensor], config: Config, path: Path) -> _Rotation:
    kind = set(parts)
    fields = Fields(dict(config), str(path))
    limited = bool(config.get("coft"))
    eps = fields.real("eps") if limited else None
    shared = bool(config.get("block_share"))
    if kind == {_OLD}:
        # Up to 0.13 it rotated outputs, and a block's size was ⌈out/r⌉.
        R = parts[_OLD]
        scaled = None if eps is None else eps * R.shape[-1] ** 2
        return _Rotation(name, {"R": R}, "out", None, scaled, shared)
    if kind == {_OLD, _OLD_SCALE}:
        tensors = {"R": parts[_OLD], "s": parts[_OLD_SCALE]}
        return _Rotation(name, tensors, "in", None, eps, shared, eps_by_outputs=True)
    if kind not in ({_NOW}, {_EMBEDDING}):
        raise BadInput(
            f"Module {name!r} of the adapter: expected {_NOW}, {_EMBEDDING}, or {_OLD} with or without {_OLD_SCALE}, "
            f"found {', '.join(sorted(kind))}."
        )
    series = _series(fields.natural("num_cayley_neumann_terms"), config, path) if _truncated(fields) else None
    if kind == {_EMBEDDING}:
        return _Rotation(name, {"R": parts[_EMBEDDING]}, "out", series, eps, shared)
    return _Rotation(name, {"R": parts[_NOW]}, "in", series, eps, shared, kernels=False)


def _truncated(fields: Fields) -> bool:
    """Whether Cayley's formula is summed up to some terms; 0.15 and older have no such field."""
    return fields.flag("use_cayley_neumann")


def _series(terms: int, config: Config, path: Path) -> list[float]:
    """The coefficients of so many terms of Neumann's series, as the release that wrote the config has them."""
    if terms > _MOST_TERMS:
        raise Unsupported(
            f"{path}: num_cayley_neumann_terms is {terms}, and a sum of {_MOST_TERMS} at most is computed here: "
            "merge it with PEFT's merge_and_unload instead."
        )
    if terms <= 1:
        return [1.0]
    version = str(config.get("peft_version") or "0.17")
    found = _VERSION.match(version)
    if found is None or ((found[1], found[2]) == ("0", "18") and "dev" in found["rest"]):
        raise Unsupported(
            f"{path}: peft_version is {version[:40]!r}, which does not tell whether use_cayley_neumann is that of "
            "0.18 or of older releases: write the release into it."
        )
    if (int(found[1]), int(found[2])) < (0, 18):
        return [1.0] + [2.0] * (terms - 1)
    # What 0.18 and later add for 3 terms is the sum of 4.
    return [1.0, 2.0] if terms == 2 else [1.0] + [2.0] * (max(terms, 4) - 2) + [1.0]


@dataclass(frozen=True, slots=True)
class _Rotation:
    """The rotation of a module, before its base is known.

    ``eps``: of COFT, if it is on, which 0.14 and 0.15 multiply by c² (``eps_by_outputs``), c = ⌈out/blocks⌉.
    ``shared``: one block for all. ``kernels``: whether it is a form of a kernel of more than one element, too.
    """

    path: str
    tensors: Mapping[str, RawTensor]
    side: str
    series: list[float] | None
    eps: float | None
    shared: bool
    eps_by_outputs: bool = False
    kernels: bool = True

    def settle(self, shape: tuple[int, ...], biased: bool) -> DraftModule:
        R, into = self.tensors["R"].shape, math.prod(shape[1:])
        if not self.kernels and math.prod(shape[2:]) > 1:
            raise Unsupported(
                f"Module {self.path!r} is a convolution with a kernel of {list(shape[2:])}: OFT of PEFT 0.16 and "
                "later rotates patches of its input and adds them up where they overlap, which no weight of it does "
                "(PEFT's own merge makes a model that computes something else): train it with BOFT."
            )
        if 0 in R:
            raise BadInput(f"Module {self.path!r} of the adapter: expected blocks, found R of shape {list(R)}.")
        size = R[2] if len(R) == 3 else (1 + math.isqrt(1 + 8 * R[-1])) // 2
        if self.side == "in" and (
            len(R) not in (2, 3) or into % size or R[0] != (1 if self.shared else into // size)
        ):
            raise BadInput(
                f"Module {self.path!r} of the adapter: expected {'one block' if self.shared else 'blocks'} for "
                f"{into} inputs, as the base has, found R of shape {list(R)}: was it trained on another base?"
            )
        limit = self.eps
        if limit is not None and self.eps_by_outputs:
            limit *= math.ceil(shape[0] / (into // size)) ** 2
        parameters: dict[str, Any] = {
            "side": self.side,
            "factor": 0.5 if self.side == "in" else -0.5,
            "series": self.series,
            "block_limit": None if limit is None else limit / math.sqrt(R[0]),
            "total_limit": None,
        }
        return DraftModule((DraftTerm("oft", self.tensors, 1.0, None, parameters),))
