"""PEFT: a version as an adapter of a model in memory, unmerged, by PEFT's own layers.

    from loreg.integrations import peft
    peft.load(model, "sql:prod")       # a PeftModel, a model of transformers, a component of diffusers, any module
    peft.load(model, "sql:v2")         # the same tensors, overwritten: a compiled model is not compiled again

With several adapters in turn in a compiled model, PEFT's ``prepare_model_for_compiled_hotswap`` makes room for the
largest rank before it is compiled. diffusers' and transformers' own ``hotswap`` are the same functions of PEFT.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from loreg.adapters import renames
from loreg.digest import Digest
from loreg.errors import BadInput, Conflict, NotFound, Unsupported, UsageError
from loreg.format.fingerprint import Match
from loreg.registry import Registry, Version
from loreg.serving.bases import Fit
from loreg.serving.defaults import default_registry
from loreg.serving.places import Tensors, config_of, tensors_of
from loreg.serving.resolving import resolve
from loreg.serving.targets import Leaves, differing

Check = Literal["touched", "none"]
Action = Literal["loaded", "swapped", "replaced"]

_PREFIX = "base_model.model."
"""What PEFT puts before the names of the modules that it saves."""
_HOT = (".lora_A.weight", ".lora_B.weight")
"""What PEFT 0.21's ``hotswap_adapter_from_state_dict`` finds the module of: not embeddings, nor magnitudes."""
_WRAPPERS = {"base_layer", "original_module", "token_adapter"}
"""What PEFT's layers call the ones that they wrap, in the names of parameters."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was done: ``loaded`` beside what was there; ``swapped`` in place, in the tensors of the adapter that had
    the name; or ``replaced``, in other tensors, for which a compiled model is compiled anew."""

    digest: Digest
    adapter_name: str
    action: Action


def load(
    model: torch.nn.Module,
    reference: str,
    registry: Registry | None = None,
    *,
    adapter_name: str = "default",
    check: Check = "touched",
) -> Loaded:
    """Have ``model`` compute with the version, as adapter ``adapter_name``, frozen; nothing is merged.

    ``model``: a PeftModel, or any other module, into which PEFT's layers are then injected in place. A first adapter
    of that name becomes the active one. If there is one already, it is swapped where PEFT can do that right: LoRA of
    linear layers for LoRA, of no larger rank, in the same modules or fewer. Else it is replaced. Which adapters are
    active stays as it is, and so does, in a swap, the dropout of one that PEFT was to train.

    The version is read from its verified directory; LoRA in the folded form, whose scales are all 1, so that a swap
    changes nothing but tensors: each element of B is off by half an ulp of float32 at most. Factors are float32
    beside a base in 16 bits. ``check``: ``touched`` hashes the parameters that the adapter adapts, as long as they
    have not been hashed and left alone, and compares them with what it was trained on; ``none`` takes the model.

    All or nothing but for the layers that PEFT wraps, which compute what they did. Raises NotFound without PEFT or
    for an unknown reference, BaseMismatch, Conflict for an adapter that is merged into the weights now, BadInput for
    what PEFT does not take, UsageError.
    """
    _require_peft()
    if check not in ("touched", "none"):
        raise UsageError(f"check is {check!r}: expected 'touched' or 'none'.")
    if not adapter_name or "." in adapter_name:
        raise UsageError(f"{adapter_name!r} is no name of an adapter: PEFT makes it a part of parameters' names.")
    inner: Any = getattr(model, "_orig_mod", model)
    registry = registry or default_registry()
    version = registry.resolve(reference)
    if check == "touched":
        _require_base(inner, version)
    source = _Source.of(version, registry)
    action: Action = "loaded"
    if adapter_name not in getattr(inner, "peft_config", {}):
        _inject(inner, source, adapter_name)
        _activate(inner, [adapter_name])
    elif _can_swap(inner, source, adapter_name):
        _swap(inner, source, adapter_name)
        action = "swapped"
    else:
        _replace(inner, source, adapter_name)
        action = "replaced"
    return Loaded(version.digest, adapter_name, action)


def _require_peft() -> None:
    try:
        import peft.utils.hotswap  # noqa: F401
    except ImportError as error:
        raise NotFound(f"PEFT cannot be imported ({error}): pip install 'loreg[peft]'.") from error


# The base


class _Plain(Tensors):
    """A model's own tensors, by the names that they had before PEFT wrapped its layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.config = config_of(model)
        self.tensors = dict(_plain_tensors(model))
        self._known = renames.Known(self.tensors, self.config)


def _plain_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    added: set[str] = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            own = {name for name, _ in module.named_children()} - _WRAPPERS
            own |= {name for name, _ in module.named_parameters(recurse=False)}
            added |= {f"{path}.{name}" for name in own}
    for name, tensor in tensors_of(model).items():
        parts = name.split(".")
        if not any(".".join(parts[:length]) in added for length in range(1, len(parts) + 1)):
            yield ".".join(part for part in parts if part not in _WRAPPERS).removeprefix(_PREFIX), tensor


_HASHED: WeakKeyDictionary[torch.nn.Module, dict[str, tuple[tuple[int, int], Leaves]]] = WeakKeyDictionary()
"""What was hashed of a model; and where the tensor was then, and how often it had been changed, as torch counts."""


def _require_base(model: torch.nn.Module, version: Version) -> None:
    manifest = version.manifest
    places = _Plain(model).find(dict.fromkeys({*manifest.base.touched, *manifest.ties}, ()))
    hashed = _HASHED.setdefault(model, {})
    states = {name: (place.tensor.data_ptr(), place.tensor._version) for name, place in places.items()}
    known = {name: leaves for name, (state, leaves) in hashed.items() if states.get(name) == state}
    wrong = differing(manifest, places, known)
    hashed.update({name: (states[name], leaves) for name, leaves in known.items()})
    Fit(Match.NONE if wrong else Match.TOUCHED, tuple(wrong)).require(version, "the model")


# The adapter


@dataclass(frozen=True, slots=True)
class _Source:
    """A version as PEFT takes it: ``state`` by the names that PEFT saves. ``folded``: whether all scales are 1."""

    config: Any
    state: Mapping[str, torch.Tensor]
    folded: bool
    label: str

    @classmethod
    def of(cls, version: Version, registry: Registry) -> _Source:
        from peft import PeftConfig
        from peft.utils import load_peft_weights

        reference, folded = str(version.digest), True
        try:
            path = resolve(reference, registry, form="folded").path
        except Unsupported:  # more than LoRA: PEFT has to make of it what it can
            path, folded = resolve(reference, registry).path, False
        config = PeftConfig.from_pretrained(str(path))
        config.inference_mode = True
        state = load_peft_weights(str(path), device="cpu")
        if folded:  # the last parts of names may fit other modules too, which have nothing to be loaded
            config.target_modules = sorted({_module(key) for key in state})
        return cls(config, state, folded, str(version))

    def keys(self, model: torch.nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
        """By the names of the model's parameters: for those of ``_HOT`` alone."""
        start = _PREFIX if _is_peft(model) else ""
        return {
            f"{start}{key.removeprefix(_PREFIX).removesuffix('.weight')}.{adapter_name}.weight": value
            for key, value in self.state.items()
        }


def _module(key: str) -> str:
    return key.removeprefix(_PREFIX).rpartition(".lora_")[0]


def _is_peft(model: torch.nn.Module) -> bool:
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _layers(model: torch.nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _auxiliary(model: torch.nn.Module) -> list[Any]:
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def _inject(model: Any, source: _Source, name: str) -> None:
    """Its layers, with what is in ``source``. Whatever is raised, the model computes what it did."""
    active = _active(model)
    try:
        found = _taken(model, source, name)
        missing = [key for key in found.missing_keys if name in key.split(".")]
        if left := [*found.unexpected_keys, *missing]:
            raise BadInput(
                f"PEFT does not load all of {source.label} into this model, and nothing is loaded: {len(left)} "
                f"tensors have no place, or a place has none, first {left[0]!r}; load it into the model that it was "
                "trained on."
            )
    except BaseException:
        _delete(model, name)
        _activate(model, active)
        raise
    for parameter in _own_parameters(model, name):
        parameter.requires_grad_(False)


def _taken(model: Any, source: _Source, name: str) -> Any:
    """What PEFT says of the names of tensors, when it has taken them."""
    from peft import inject_adapter_in_model
    from peft.utils import set_peft_model_state_dict

    state = dict(source.state)
    try:
        if _is_peft(model):
            model.add_adapter(name, source.config)
        else:
            inject_adapter_in_model(source.config, model, name)
            state = {key.removeprefix(_PREFIX): value for key, value in state.items()}
            if hasattr(model, "_hf_peft_config_loaded"):  # transformers' and diffusers' own calls look at it
                model._hf_peft_config_loaded = True
        _widen(model, name)
        return set_peft_model_state_dict(model, state, adapter_name=name)
    except Exception as error:
        said = " ".join(str(error).split())
        raise BadInput(f"PEFT does not load {source.label} into this model, and nothing is loaded: {said}") from error


def _active(model: torch.nn.Module) -> list[str]:
    return list(next((layer.active_adapters for layer in _layers(model)), ()))


def _own(model: torch.nn.Module, name: str) -> Iterator[Any]:
    """The modules and parameters that PEFT's layers have for that adapter."""
    for layer in _layers(model):
        for each in layer.adapter_layer_names:
            held = getattr(layer, each, None)
            if held is not None and name in held:
                yield held[name]


def _own_parameters(model: torch.nn.Module, name: str) -> Iterator[torch.nn.Parameter]:
    for each in _own(model, name):
        yield from each.parameters() if isinstance(each, torch.nn.Module) else [each]


def _widen(model: torch.nn.Module, name: str) -> None:
    """As PEFT does when it loads into a PeftModel: 16 bits for the factors would round what was trained in 32."""
    for parameter in _own_parameters(model, name):
        if parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()


def _delete(model: Any, name: str) -> None:
    if name in getattr(model, "peft_config", {}) and _is_peft(model):
        model.delete_adapter(name)
        return
    for layer in _layers(model):
        layer.delete_adapter(name)
    for each in _auxiliary(model):
        each.delete_adapter(name, None)
    getattr(model, "peft_config", {}).pop(name, None)


def _activate(model: Any, names: list[str]) -> None:
    """These and no others, all of them frozen as before if they were loaded here."""
    if not names:
        return
    frozen = [each for name in names for each in _own_parameters(model, name) if not each.requires_grad]
    if _is_peft(model) and len(names) == 1:
        model.set_adapter(names[0])
    elif _is_peft(model):
        model.base_model.set_adapter(names)
    else:
        for layer in _layers(model):
            layer.set_adapter(names)
        for each in _auxiliary(model):  # which knows no more than its own
            if there := [name for name in names if name in each._adapters]:
                each.set_adapter(there)
    for parameter in frozen:  # PEFT has what is active trained
        parameter.requires_grad_(False)


def _replace(model: Any, source: _Source, name: str) -> None:
    """Under another name first: what PEFT does not take is found out while the old one is there."""
    _require_unmerged(model, name)
    trial = next(free for number in count() if (free := f"{name}-trial{number}") not in model.peft_config)
    active = _active(model)
    _inject(model, source, trial)
    _delete(model, trial)
    _delete(model, name)
    _inject(model, source, name)
    _activate(model, active)


def _require_unmerged(model: torch.nn.Module, name: str) -> None:
    if any(name in layer.merged_adapters for layer in _layers(model)):
        raise Conflict(
            f"the adapter {name!r} is merged into the weights of the model, and what is unmerged later would be "
            "another one: unmerge it first (unmerge_adapter(), or unfuse_lora() of diffusers)."
        )


def _can_swap(model: Any, source: _Source, name: str) -> bool:
    """Whether PEFT swaps it in place, and right.

    PEFT 0.21 takes every parameter with "lora_" and the adapter's name anywhere in its name for that adapter's, and
    fills with zeros what the new one has not: another adapter "sql2" beside "sql", say. There it is not used.
    """
    if not source.folded or not all(key.endswith(_HOT) for key in source.state):
        return False
    if any(name in each._adapters for each in _auxiliary(model)):
        return False
    if any(name in getattr(layer, "lora_variant", {}) for layer in _layers(model)):  # an activated LoRA, say
        return False
    parameters = dict(model.named_parameters(remove_duplicate=False))
    mine = {key for key in parameters if key.endswith(tuple(f"{hot[:-7]}.{name}.weight" for hot in _HOT))}
    if mine != {key for key in model.state_dict() if "lora_" in key and name in key}:
        return False
    if len(mine) != 2 * sum(name in getattr(layer, "lora_A", ()) for layer in _layers(model)):
        return False
    return all(key in mine and _fits(value, parameters[key]) for key, value in source.keys(model, name).items())


def _fits(new: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether it has no larger rank, and else the same shape: a row of A and a column of B for each."""
    return new.ndim == there.ndim == 2 and all(a <= b for a, b in zip(new.shape, there.shape, strict=True))


def _swap(model: Any, source: _Source, name: str) -> None:
    from peft.utils.hotswap import hotswap_adapter_from_state_dict

    _require_unmerged(model, name)
    hotswap_adapter_from_state_dict(model, source.keys(model, name), name, source.config)
    # All scales are 1 now, and what PEFT leaves of the old adapter would say otherwise when it is saved or scaled.
    for layer in _layers(model):
        if name in getattr(layer, "lora_A", ()):
            layer.lora_alpha[name] = layer.r[name]
            layer.use_rslora[name] = False
    config = model.peft_config[name]
    config.lora_alpha, config.alpha_pattern, config.use_rslora = config.r, dict(config.rank_pattern), False
    config.inference_mode = True
    for parameter in _own_parameters(model, name):
        parameter.requires_grad_(False)
