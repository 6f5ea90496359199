"""Whether the modules of a file are those that its config names: by PEFT's rules (0.21, ``tuners/tuners_utils.py``,
`check_target_module_exists`), which make the layers that tensors are loaded into.

PEFT ignores the tensors that it has no layer for, with a warning. What it serves is then without them, and a merge
that had them would be another model: they are refused. A release that wrote another rule into the same config is
given the benefit of the doubt, as of the index of a layer: PEFT has taken the first number in a path for it, and the
last.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from loreg.adapters.draft import DraftModule, RawTensor
from loreg.adapters.fusions import DraftParameters
from loreg.adapters.peft import attention, patterns
from loreg.adapters.peft.contents import PREFIX, Config, Contents
from loreg.errors import BadInput

_ALL_LINEAR = "all-linear"
_DIGITS = 18  # of the number of a layer; Python turns no text of thousands into one
_HEADS = ("lm_head", "embed_out")
"""What `get_output_embeddings` gives in transformers: "all-linear" leaves it out."""

_WRAPPER = ".base_layer"
_WRAPPERS = re.compile(r"\.base_layer(?=\.|$)")

Names: TypeAlias = str | tuple[str, ...] | None
"""An expression for whole paths, or paths and ends of them."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a config says of the modules that have tensors. ``modules`` is None where a release of PEFT has its own
    list for the architecture; ``layers`` where all are meant, ``layers_pattern`` is what such a list is called."""

    path: Path
    modules: Names
    excluded: Names
    saved: tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]

    @classmethod
    def of(cls, config: Config, path: Path) -> Targets:
        """Raises BadInput for fields of another type, and for what is no regular expression; Unsupported for one that
        is not matched here."""
        names = {
            field: _names(config.get(field), f"{path}: {field}") for field in ("target_modules", "exclude_modules")
        }
        called = config.get("layers_pattern") or ()
        called = (called,) if isinstance(called, str) else tuple(called)
        for pattern in called:
            patterns.check(pattern, f"{path}: layers_pattern")
        modules = names["target_modules"]
        if modules is None and config.get("target_parameters"):
            modules = ()
        return cls(
            path,
            modules,
            names["exclude_modules"],
            tuple(config.get("modules_to_save") or ()),
            _layers(config.get("layers_to_transform"), path),
            called,
        )

    def check(self, name: str, module: DraftModule, tied: bool) -> None:
        """Raises BadInput where PEFT would not make a layer for the module ``name``. ``tied``: whether it may be
        another name of one that is named."""
        if _fits(self.excluded, name):
            raise self._refused(name, module, "exclude_modules leaves it out", "take it out of exclude_modules")
        if saved := next((each for each in self.saved if f".{each}." in f".{name}."), None):
            raise self._refused(
                name, module, f"modules_to_save has {saved!r}, which is saved whole", "take it out of modules_to_save"
            )
        if tied or self.modules is None:
            return
        if self._all_linear():
            if module.embedding or name.rpartition(".")[2] in _HEADS:
                raise self._refused(
                    name, module, "target_modules is 'all-linear', which means no embedding or head",
                    "list the names in target_modules",
                )  # fmt: skip
            return
        if not _fits(self.modules, name):
            raise self._refused(name, module, "target_modules does not name it", "add it to target_modules")
        if not self._is_layer(name):
            raise self._refused(
                name, module, f"layers_to_transform has only {str(list(self.layers or ()))[:60]}", "add its layer"
            )

    def _all_linear(self) -> bool:
        return isinstance(self.modules, str) and self.modules.lower() == _ALL_LINEAR

    def _is_layer(self, name: str) -> bool:
        """PEFT asks for the layer only where ``name`` is the end of a path in a list, and not all of it."""
        if not self.layers or isinstance(self.modules, str) or name in (self.modules or ()):
            return True
        numbers = {int(part) for part in name.split(".") if part.isdecimal() and len(part) <= _DIGITS}
        meant = sorted(numbers & set(self.layers))
        if not self.layers_pattern:
            return bool(meant)
        return any(
            patterns.fits(rf"(?:.*\.)?(?:{called})\.0*{layer}\..*", name)
            for called in self.layers_pattern
            for layer in meant
        )

    def _refused(self, name: str, module: DraftModule, why: str, what: str) -> BadInput:
        keys = sorted(tensor.key for term in module.terms for tensor in term.tensors.values())
        key = next((key for key in keys if name in key), f"{PREFIX}{name}")
        return BadInput(
            f"The adapter has tensors of module {name!r}, such as {key!r}, and by its config ({self.path}) it is not "
            f"adapted: {why}. PEFT does not load them; {what} if it was trained, else leave its tensors out."
        )


def check(contents: Contents, tensors: Mapping[str, RawTensor], config: Config, path: Path) -> None:
    """Raises BadInput, naming it, for the first module or tensor of ``contents`` that PEFT would ignore.

    ``tensors``: all of the file, by key.
    """
    targets = Targets.of(config, path)
    adapted = _adapted(contents, tensors)
    for name, module in contents.modules.items():
        rows = any(term.form == "rows" for term in module.terms) and config.get("peft_type") == "LORA"
        # Parameters, and rows beside a LoRA, are named by fields of their own, which their readers compare.
        if not rows and not isinstance(module, DraftParameters):
            together = config.get("ensure_weight_tying") or config.get("peft_type") == "TRAINABLE_TOKENS"
            tied = bool(module.repeats) or (bool(together) and _may_be_tied(name))
            targets.check(_wrapped(name, contents.modules), module, tied)
    plain = _plain(contents, adapted, config)
    for tensor in contents.full.values():
        _check_whole(tensor.key, adapted, plain)


def _plain(contents: Contents, adapted: Collection[str], config: Config) -> set[str]:
    """Tensors that a release before 0.7 wrote under their plain names though their layers were adapted: trained
    biases, and embeddings that were saved beside their LoRA. Such a config has no ``loftq_config``."""
    trained = str(config.get("bias") or "none") != "none"
    found = {f"{name}.bias" for name in adapted if trained}
    if "loftq_config" in config or config.get("peft_version"):
        return found
    return found | {
        f"{name}.weight" for name, module in contents.modules.items() if module.embedding and module.terms
    }


def _check_whole(key: str, adapted: Collection[str], plain: Collection[str]) -> None:
    """PEFT puts a layer of its own around what it adapts, and the layer of the base into that, as ``base_layer``.

    ``plain``: names of tensors that may be without.
    """
    name = key.removeprefix(PREFIX).replace(".token_adapter", "")
    inside = list(_WRAPPERS.finditer(name))
    for wrapper in inside:
        owner = _WRAPPERS.sub("", name[: wrapper.start()])
        if owner not in adapted:
            raise BadInput(
                f"Tensor {key!r} is of the layer inside an adapted {owner!r}, and the adapter has no tensors that "
                "adapt it, so that PEFT does not load it: save the adapter again, or leave the tensor out."
            )
    owner, _, parameter = name.rpartition(".")
    if not inside and owner in adapted and name not in plain:
        raise BadInput(
            f"Tensor {key!r} would replace the {parameter} of {owner!r}, which is adapted, so that PEFT keeps it as "
            f"'{PREFIX}{owner}{_WRAPPER}.{parameter}' and does not load this one: leave it out, or name it so."
        )


def _adapted(contents: Contents, tensors: Mapping[str, RawTensor]) -> set[str]:
    """Paths of all modules that have tensors of their own: of AdaLoRA also such that it left no rank."""
    idle = {key.removesuffix(".lora_E").removeprefix(PREFIX) for key in tensors if key.endswith(".lora_E")}
    return {*contents.modules, *idle}


def _wrapped(name: str, modules: Mapping[str, DraftModule]) -> str:
    """The module that PEFT was told to adapt: an attention for the projection inside it."""
    owner = name.removesuffix(".out_proj")
    inside = owner != name and owner in modules and modules[owner].parameter == attention.PARAMETER
    return owner if inside else name


def _may_be_tied(name: str) -> bool:
    """PEFT ties embeddings and heads, which no list of layers holds."""
    return not any(part.isdecimal() for part in name.split("."))


def _fits(names: Names, path: str) -> bool:
    if isinstance(names, str):
        return patterns.fits(names, path)
    return names is not None and (path in names or path.endswith(tuple(f".{each}" for each in names)))


def _names(value: object, where: str) -> Names:
    if value is None:
        return None
    if isinstance(value, str):
        patterns.check(value, where, inside=False)
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise BadInput(f"{where}: expected text, a list of names, or null, found {str(value)[:80]}.")


def _layers(value: object, path: Path) -> tuple[int, ...] | None:
    if value is None:
        return None
    found = value if isinstance(value, list) else [value]
    if not all(type(layer) is int and layer >= 0 for layer in found):
        raise BadInput(
            f"{path}: layers_to_transform: expected a whole number, a list of them, or null, found {str(value)[:80]}."
        )
    return tuple(found) or None
