"""VeRA as PEFT writes it (0.21, ``tuners/vera``): vectors of each module, and two random matrices for them all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loreg.adapters.draft import DraftModule, DraftTerm, RawTensor
from loreg.adapters.fusions import SharedTensor
from loreg.adapters.peft.config import check_known
from loreg.adapters.peft.contents import Config, Contents
from loreg.adapters.peft.parts import checked, contents, sort
from loreg.errors import BadInput, Unsupported

KNOWN = frozenset(
    {"r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "fan_in_fan_out", "bias"}
    | {"init_weights"}
)

_SHARED = {"A": "base_model.vera_A", "B": "base_model.vera_B"}


def read(tensors: Mapping[str, RawTensor], config: Config, path: Path) -> Contents:
    """See ``ReadContents``. Every module has the shared matrices among its tensors; they are stored once."""
    check_known(config, KNOWN, path)
    if not config.get("save_projection", True):
        raise Unsupported(
            f"{path}: save_projection is false, so that the random matrices are not in the file, but whatever this "
            "release of torch draws for projection_prng_key, which torch does not promise to keep: load the adapter "
            "where it was trained, set save_projection to true, and save it again."
        )
    shared = {role: _shared(tensors[key]) for role, key in _SHARED.items() if key in tensors}
    if len(shared) != len(_SHARED):
        raise BadInput(
            f"{path}: save_projection is true, but the weights lack {' or '.join(_SHARED.values())}: save them again."
        )
    own = {key: tensor for key, tensor in tensors.items() if key not in _SHARED.values()}
    found = sort(own, ("vera_lambda_d", "vera_lambda_b"))
    modules = {}
    for name, parts in found.modules.items():
        roles = {**shared, "lambda_d": parts["vera_lambda_d"], "lambda_b": parts["vera_lambda_b"]}
        term = checked(DraftTerm("vera", roles, 1.0), name)
        modules[name] = DraftModule((term,), in_out_hint=bool(config.get("fan_in_fan_out")))
    return contents(modules, found.rest, config)


def _shared(tensor: RawTensor) -> RawTensor:
    return SharedTensor(tensor.key, tensor.dtype, tensor.shape, tensor.data, tensor.offset)
