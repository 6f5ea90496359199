"""LoRA on parameters, as PEFT's ``target_parameters`` has it: experts that are one tensor, first of all.

PEFT wraps the module that holds the parameter, once for each that is adapted, in the order in which the module
defines them (0.17 to 0.21, ``tuners_utils.py``, `_inject_parameters`). So factors of ``P.base_layer.lora_A`` are for
an earlier parameter than those of ``P.lora_A``, and no key has its name: it follows from the config, and from the
parameters that the base has. Patterns of ranks and alphas are matched with the whole path, parameter included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import NoReturn, TypeAlias

from loreg.adapters.draft import DraftModule, RawTensor
from loreg.adapters.fusions import DraftParameters
from loreg.adapters.peft import lora_fields
from loreg.adapters.peft.config import CONFIG, first_match
from loreg.adapters.peft.contents import Config
from loreg.errors import BadInput, Unsupported
from loreg.format.module import IN_OUT, OUT_IN

Parts: TypeAlias = Mapping[str, RawTensor]
"""The tensors of a module by the ends of their keys, such as ``lora_A.weight``."""

_WRAPPERS = re.compile(r"(?:\.base_layer)+(?=\.|$)")
_WRAPPER = ".base_layer"
_VERSION = re.compile(r"([0-9]{1,4})\.([0-9]{1,4})\.([0-9]{1,4})(?![0-9])(.*)", re.DOTALL)
_FACTORS = {"lora_A.weight", "lora_B.weight"}


def read(
    parts: Mapping[str, Parts],
    config: Config,
    ordinary: Callable[[str, Parts], DraftModule],
    alpha: Callable[[str], float],
) -> dict[str, DraftModule]:
    """All modules of an adapter: ``ordinary`` ones, and those of which parameters are, or may be, adapted.

    ``parts``: by module path as the keys have it. ``alpha``: that of a path. Raises BadInput, Unsupported.
    """
    targets = _targets(config)
    levels: dict[str, dict[int, Parts]] = {}
    for name, found in parts.items():
        plain, depth = _unwrapped(name, parts, targets)
        levels.setdefault(plain, {})[depth] = found
    modules: dict[str, DraftModule] = {}
    for name, found_at in levels.items():
        parameters = _parameters(name, targets)
        depths = sorted(found_at)
        if depths != list(range(len(depths))) or (not parameters and (depths != [0] or name.endswith(_WRAPPER))):
            raise BadInput(
                f"Module {name!r} of the adapter is wrapped, and target_parameters ({', '.join(targets) or 'none'}) "
                "do not say for which of its parameters: expected one of them for each wrapper; save it again."
            )
        if parameters and all(set(found) == _FACTORS for found in found_at.values()):
            modules[name] = _wrapped(name, parameters, found_at, config, ordinary, alpha)
        else:
            modules[name] = ordinary(name, found_at[0])
    return modules


def _targets(config: Config) -> list[str]:
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) and target for target in targets):
        raise BadInput(f"{CONFIG}: expected target_parameters to be a list of names, found {str(targets)[:80]}.")
    return targets


def _unwrapped(name: str, parts: Collection[str], targets: list[str]) -> tuple[str, int]:
    """A module's path, and how many wrappers are around the one that the key is of.

    A module below a wrapped one has its ``base_layer`` in its own path.
    """
    if not targets:
        return name, 0
    for match in _WRAPPERS.finditer(name):
        owner = name[: match.start()]
        if owner in parts and _parameters(owner, targets):
            rest = name[match.end() :]
            if rest == ".out_proj":
                raise Unsupported(
                    f"Module {owner!r} may be an attention or have a parameter adapted: it is not told."
                )
            return (owner, match[0].count(_WRAPPER)) if not rest else (owner + rest, 0)
    return name, 0


def _parameters(name: str, targets: list[str]) -> list[str]:
    """Names that a parameter of the module may have if it is a target: PEFT compares ends of whole paths."""
    named = [(owner, parameter) for owner, _, parameter in (target.rpartition(".") for target in targets)]
    return sorted({parameter for owner, parameter in named if not owner or f".{name}".endswith(f".{owner}")})


def _wrapped(
    name: str,
    parameters: list[str],
    found_at: Mapping[int, Parts],
    config: Config,
    ordinary: Callable[[str, Parts], DraftModule],
    alpha: Callable[[str], float],
) -> DraftParameters:
    def refuse(reason: str) -> NoReturn:
        raise BadInput(f"Parameters of {name!r}: {reason}.")

    levels = []
    for depth in sorted(found_at, reverse=True):
        A, B = (found_at[depth][part] for part in ("lora_A.weight", "lora_B.weight"))
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1] or not A.shape[0]:
            refuse(f"expected A (rank, in) and B (out, rank), found {list(A.shape)} and {list(B.shape)}")
        levels.append((A, B))
    if lora_fields.changes_base(config, Path(CONFIG)):
        raise Unsupported(
            f"Parameters of {name!r} are adapted and init_lora_weights is {config['init_lora_weights']!r}: what PEFT "
            "takes out of a parameter that is not a layer's weight is not defined; train it with another."
        )
    untransposed, transposed = _orientations(config)
    return DraftParameters(
        terms=(),
        levels=tuple(levels),
        alphas={parameter: alpha(f"{name}.{parameter}") for parameter in parameters},
        ranks={parameter: _rank(f"{name}.{parameter}", config) for parameter in parameters},
        root=bool(config.get("use_rslora")),
        untransposed=untransposed,
        transposed=transposed,
        otherwise=ordinary(name, found_at[0]) if len(found_at) == 1 else None,
    )


def _rank(path: str, config: Config) -> int:
    ranks: Mapping[str, int] = config.get("rank_pattern") or {}
    return int(ranks.get(first_match(path, ranks), config["r"]))


def _orientations(config: Config) -> tuple[str | None, str | None]:
    """How PEFT takes a stack: of a module that does not, and that does, say of itself that it ``is_transposed``.

    Until 0.18 always as (experts, in, out). 0.19.0 has it the wrong way round, which trains and merges as well.
    """
    match = _VERSION.match(str(config.get("peft_version") or ""))
    if match is None:
        return None, None
    version = int(match[1]), int(match[2]), int(match[3])
    if "dev" in match[4] and (0, 18, 0) <= version < (0, 20, 0):
        return None, None
    if version < (0, 19, 0):
        return IN_OUT, IN_OUT
    return (IN_OUT, OUT_IN) if version == (0, 19, 0) else (OUT_IN, IN_OUT)
