"""(IA)³ as PEFT writes it (0.21, ``tuners/ia3``): one vector for each module, by which its outputs are multiplied,
bias included, or the inputs where it is feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.peft import patterns
from loreg.adapters.peft.config import check_known
from loreg.adapters.peft.contents import Config, Contents
from loreg.adapters.peft.parts import Settle, contents, sort
from loreg.errors import BadInput

KNOWN = frozenset({"feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})


def read(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``. Whether there is a bias to scale, and how many groups, is seen in the base."""
    check_known(config, KNOWN, path)
    names = config.get("feedforward_modules")
    if isinstance(names, str):
        patterns.check(names, f"{path}: feedforward_modules", inside=False)
    elif names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise BadInput(f"{path}: feedforward_modules: expected text or a list of it, found {str(names)[:80]}.")
    found = sort(tensors, ("ia3_l",))
    turned = bool(config.get("fan_in_fan_out"))
    settle: dict[str, Settle] = {}
    for name, parts in found.modules.items():
        settle[name] = _Vector(name, parts["ia3_l"], _axis(name, parts["ia3_l"].shape, names)).settle
    modules = {name: DraftModule((), in_out_hint=turned) for name in settle}
    return contents(modules, found.rest, config, settle=settle)


def _axis(path: str, shape: tuple[int, ...], names: str | list[str] | None) -> str:
    """What is scaled, "in" or "out". A linear layer's vector is (1, in) or (out, 1), a convolution's (1, n, 1…)."""
    if len(shape) < 2 or prod(shape) not in shape:
        raise BadInput(f"Module {path!r} of the adapter: expected ia3_l of one number in a row, found {list(shape)}.")
    if len(shape) == 2 and prod(shape) > 1:
        return "in" if shape[0] == 1 else "out"
    if names is None:
        raise BadInput(
            f"Module {path!r} of the adapter: ia3_l is {list(shape)}, and only feedforward_modules of the config "
            "would tell whether it is for inputs or outputs: it is missing, give it."
        )
    if isinstance(names, str):
        return "in" if patterns.fits(names, path) else "out"
    return "in" if any(path.endswith(name) for name in names) else "out"


@dataclass(frozen=True, slots=True)
class _Vector:
    """The vector of a module, before its base is known."""

    path: str
    l: RawTensor  # noqa: E741 - its name in the paper
    on: str

    def settle(self, shape: tuple[int, ...], biased: bool) -> DraftModule:
        """For a weight of ``shape``. PEFT scales the bias with the outputs, and has a number for every input
        channel, also where a weight has those of one group only."""
        parameters: dict[str, Any] = {"on": self.on}
        channels = prod(self.l.shape)
        if len(self.l.shape) != len(shape) or (len(shape) > 2 and self.l.shape[1] != channels):
            raise BadInput(
                f"Module {self.path!r} of the adapter: expected ia3_l of {len(shape)} dimensions, channels of a "
                f"convolution in the second, as the weight of the base is {list(shape)}, found {list(self.l.shape)}; "
                "was the adapter trained on another base?"
            )
        if self.on == "in" and len(shape) > 2 and channels != shape[1]:
            if channels % shape[1]:
                raise BadInput(
                    f"Module {self.path!r} of the adapter: expected numbers for groups of {shape[1]} channels, as "
                    f"the base has them, found {channels}; was the adapter trained on another base?"
                )
            parameters["groups"] = channels // shape[1]
        term = DraftTerm("ia3", {"l": self.l}, 1.0, parameters=parameters)
        bias = (DraftTerm("ia3", {"l": self.l}, 1.0, parameters={"on": "out"}),)
        return DraftModule((term,), bias if self.on == "out" and biased else ())
