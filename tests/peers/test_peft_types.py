"""Every type of PEFT's has a reader or a reason, every field of a config is known or refused, and what does not
fit is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.oft.layer import OFTRotationModule

from loreg.adapters import peft as readers
from loreg.adapters.binding import bind
from loreg.adapters.bound import Binding
from loreg.adapters.draft import RawTensor
from loreg.adapters.peft import adalora, ia3, lycoris, orthogonal, rows, vera
from loreg.adapters.peft.config import COMMON
from loreg.adapters.peft.refused import REFUSED
from loreg.digest import Digest
from loreg.errors import BadInput, LoregError, Unsupported
from loreg.format.fingerprint import BaseTensor

# Types


def test_every_type_is_read_or_refused_with_a_reason() -> None:
    names = {kind.value for kind in peft.PeftType}
    assert len(names) > 40
    assert not set(readers.TYPES) & set(REFUSED)
    assert names - set(readers.TYPES) - set(REFUSED) == set()
    # BONE is of releases before 0.19.
    assert {*readers.TYPES, *REFUSED} - names == {"BONE"}


@pytest.mark.parametrize("kind", [*REFUSED, "TOMORROW"])
def test_the_reason_is_given_before_a_tensor_is_looked_for(kind: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(Unsupported, match=f"peft_type is '{kind}', ") as caught:
        readers.read(tmp_path)
    assert REFUSED.get(kind, "newer, or a mistake") in str(caught.value)


# Fields

# What LoRA's config has and AdaLoRA inherits, and what it would change if it were set.
_ADALORA_REFUSED = {
    "alora_invocation_tokens", "arrow_config", "corda_config", "ensure_weight_tying", "kasa_config",
    "layer_replication", "loftq_config", "lora_ga_config", "megatron_config", "monteclora_config",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora", "velora_config",
}  # fmt: skip

_FIELDS = {
    "ADALORA": (adalora.KNOWN, _ADALORA_REFUSED),
    "VERA": (vera.KNOWN, set()),
    "LOHA": (lycoris.KNOWN, set()),
    "LOKR": (lycoris.KNOWN_LOKR, set()),
    "IA3": (ia3.KNOWN, set()),
    "OFT": (orthogonal.KNOWN, set()),
    "BOFT": (orthogonal.KNOWN_BOFT, set()),
    "TRAINABLE_TOKENS": (rows.KNOWN, set()),
}


def test_every_type_has_its_fields_tested() -> None:
    assert set(_FIELDS) == set(readers.TYPES) - {"LORA"}


@pytest.mark.parametrize("kind", _FIELDS)
def test_every_field_of_a_config_is_known_or_refused(kind: str) -> None:
    known, refused = _FIELDS[kind]
    fields = {field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)])}
    assert fields - known - COMMON == refused
    # Nothing is on the list that PEFT does not have, but what older releases wrote.
    assert known - fields <= {"rank_pattern", "alpha_pattern"}


@pytest.mark.parametrize(
    ("kind", "name"), [*(("ADALORA", n) for n in sorted(_ADALORA_REFUSED)), ("IA3", "from_2030")]
)
def test_a_field_that_is_not_known_is_refused(kind: str, name: str) -> None:
    with pytest.raises(Unsupported, match=f"{name} is "):
        readers.TYPES[kind]({}, {name: {"x": 1}}, Path("config"))


# Readers, without a registry

ADALORA = {"init_r": 4, "lora_alpha": 6}
LOHA = {"r": 2, "alpha": 6, "peft_version": "0.21.2"}
LOKR = {"rank_dropout_scale": False, "peft_version": "0.21.2"}
OFT = {"use_cayley_neumann": False, "num_cayley_neumann_terms": 5, "peft_version": "0.21.2"}

Shapes = dict[str, tuple[int, ...]]


def _read(kind: str, config: dict[str, Any], shapes: Shapes, base: Shapes | None = None) -> Binding:
    """An adapter with tensors of these shapes, by keys without the prefix, bound to such a base."""
    data = {key: torch.randn(shape).numpy().tobytes() for key, shape in shapes.items()}
    keys = {key: key if key.startswith("base_model.") else f"base_model.model.{key}" for key in shapes}
    tensors = {keys[key]: RawTensor(keys[key], "F32", shape, data[key]) for key, shape in shapes.items()}
    found = readers.TYPES[kind](tensors, {"peft_type": kind, **config}, Path("config"))
    draft = readers.Draft(
        "peft", None, found.modules, found.full, frozenset(), (), found.together, locate=found.locate
    )
    digest = Digest.of(b"")
    known = {
        name: BaseTensor(name, "F32", shape, 0, digest) for name, shape in (base or {"m.weight": (6, 8)}).items()
    }
    return bind(draft, known, {})


def _parameters(binding: Binding) -> dict[str, Any]:
    return dict(binding.modules["m"].draft.terms[0].parameters)


def _adalora(rank: int = 4) -> Shapes:
    return {"m.lora_A": (rank, 8), "m.lora_B": (6, rank), "m.lora_E": (rank, 1)}


@pytest.mark.parametrize(("alpha", "scale"), [(6, 6 / (4 + 1e-5)), (-1, 4 / (4 + 1e-5))])
@pytest.mark.parametrize("kept", [4, 3])
def test_the_scale_of_adalora_is_that_of_the_first_rank(kept: int, alpha: int, scale: float) -> None:
    config = {"init_r": 4, "lora_alpha": alpha, "rank_pattern": {"m.lora_E": [i < kept for i in range(4)]}}
    (term,) = _read("ADALORA", config, _adalora(kept)).modules["m"].draft.terms
    assert (term.rank, term.scale) == (kept, scale)


def test_whole_factors_of_lokr_are_scaled_by_the_rank_of_the_config() -> None:
    config = {"r": 8, "alpha": 3, "rank_pattern": {"m": 6}, "alpha_pattern": {"m": 5, "x.m": 7}} | LOKR
    shapes = {"x.m.lokr_w1": (2, 4), "x.m.lokr_w2": (3, 2)}
    (term,) = _read("LOKR", config, shapes, {"x.m.weight": (6, 8)}).modules["x.m"].draft.terms
    assert (term.scale, term.alpha) == (5 / 6, 5.0)


@pytest.mark.parametrize(
    ("kind", "config", "shapes"),
    [
        ("ADALORA", {"init_r": 4, "lora_alpha": 6}, {"m.lora_A": (4, 8), "m.lora_B": (6, 4), "m.lora_E": (4, 1)}),
        ("BOFT", {}, {"m.boft_R": (1, 2, 4, 4), "m.boft_s": (6, 1)}),
        ("OFT", {"use_cayley_neumann": False}, {"m.oft_R.weight": (2, 6)}),
    ],
)
def test_trained_biases_that_were_not_saved_are_missed(kind: str, config: dict[str, Any], shapes: Shapes) -> None:
    base = {"m.weight": (6, 8), "m.bias": (6,)}
    with pytest.raises(Unsupported, match=r"'lora_only'.*'m.bias' is not in the file"):
        _read(kind, config | {"bias": "lora_only"}, shapes, base)
    assert not _read(kind, config | {"bias": "none"}, shapes, base).full
    assert not _read(kind, config | {"bias": "lora_only"}, shapes).full
    assert set(_read(kind, config | {"bias": "all"}, shapes | {"m.base_layer.bias": (6,)}, base).full) == {"m.bias"}


def test_the_projections_of_vera_are_one_tensor_of_all_modules() -> None:
    shapes = {"base_model.vera_A": (2, 8), "base_model.vera_B": (6, 2)}
    shapes |= {f"{name}.vera_lambda_{part}": (size,) for name in "mn" for part, size in (("b", 6), ("d", 2))}
    bound = _read("VERA", {"save_projection": True}, shapes, {"m.weight": (6, 8), "n.weight": (6, 5)})
    first, second = (bound.modules[name].draft.terms[0].tensors for name in "mn")
    assert first["A"] is second["A"]
    assert first["B"] is second["B"]
    assert first["lambda_b"] is not second["lambda_b"]
    assert first["A"].digest() is first["A"].digest(), "hashed once, not for every module"


@pytest.mark.parametrize("terms", range(1, 9))
def test_the_series_is_that_of_peft(terms: int) -> None:
    module = OFTRotationModule(1, 6, 4, 4, num_cayley_neumann_terms=terms)
    torch.nn.init.normal_(module.weight, std=0.3)
    module.double()
    computed = module.get_weight()
    series = _parameters(_read("OFT", _neumann(terms, "0.18.0"), {"m.oft_R.weight": (2, 6)}))["series"]
    S = module._pytorch_skew_symmetric(module.weight, 4)[0]
    powers = [torch.eye(4).double()]
    for _ in series[1:]:
        powers.append(powers[-1] @ S)
    assert torch.allclose(computed, sum(c * power for c, power in zip(series, powers, strict=True)), 0, 1e-15)


def _neumann(terms: int, version: str | None) -> dict[str, Any]:
    return {"use_cayley_neumann": True, "num_cayley_neumann_terms": terms, "peft_version": version}


@pytest.mark.parametrize(
    ("version", "terms", "series"),
    [
        ("0.17.1", 4, [1, 2, 2, 2]),
        (None, 3, [1, 2, 2]),
        ("0.18.0", 3, [1, 2, 2, 1]),
        ("0.21.3.dev0@a1b2", 5, [1, 2, 2, 2, 1]),
        ("1.2.0", 5, [1, 2, 2, 2, 1]),
        ("0.17.2.dev0@a1b2", 2, [1, 2]),
    ],
)
def test_the_series_is_that_of_the_release(version: str | None, terms: int, series: list[float]) -> None:
    assert _parameters(_read("OFT", _neumann(terms, version), {"m.oft_R.weight": (2, 6)}))["series"] == series


@pytest.mark.parametrize(
    ("parts", "shared", "limit"),
    [
        ({"m.oft_R.weight": (4, 1)}, False, 0.1 / 2),
        ({"m.oft_R.weight": (1, 1)}, True, 0.1),
        # ⌈6/4⌉ = 2 of 0.15, where blocks of 2 cover 8 inputs, and 3 = ⌈6/2⌉ of 0.13
        ({"m.oft_r": (4, 2, 2), "m.oft_s": (6, 1)}, False, 0.1 * 2**2 / 2),
        ({"m.oft_r": (1, 2, 2), "m.oft_s": (6, 1)}, True, 0.1 * 2**2),
        ({"m.oft_r": (2, 3, 3)}, False, 0.1 * 3**2 / 2**0.5),
    ],
)
def test_the_limit_of_coft_is_that_of_the_format(parts: Shapes, shared: bool, limit: float) -> None:
    found = _parameters(_read("OFT", OFT | {"coft": True, "eps": 0.1, "block_share": shared}, parts))
    assert found["block_limit"] == pytest.approx(limit, rel=1e-15)
    assert found["side"] == ("out" if set(parts) == {"m.oft_r"} else "in")


def test_a_bias_is_scaled_where_the_base_has_one() -> None:
    config = {"feedforward_modules": ["n"]}
    shapes = {"m.ia3_l": (6, 1), "n.ia3_l": (1, 8), "o.ia3_l": (6, 1)}
    base = {f"{name}.weight": (6, 8) for name in "mno"} | {"m.bias": (6,), "n.bias": (6,)}
    bound = _read("IA3", config, shapes, base).modules
    assert {name: module.bias_tensor for name, module in bound.items()} == {"m": "m.bias", "n": None, "o": None}
    assert bound["m"].draft.bias_terms[0].parameters == {"on": "out"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("m", {"on": "in", "groups": 2}),
        (["x.m", "m"], {"on": "in", "groups": 2}),
        ([], {"on": "out"}),
        ("n|.m", {"on": "out"}),
    ],
)
def test_the_config_says_what_of_a_convolution_is_scaled(names: Any, expected: dict[str, Any]) -> None:
    bound = _read("IA3", {"feedforward_modules": names}, {"m.ia3_l": (1, 8, 1, 1)}, {"m.weight": (8, 4, 2, 2)})
    assert _parameters(bound) == expected


def _vera(out: int) -> Shapes:
    shapes: Shapes = {"base_model.vera_A": (2, 8), "base_model.vera_B": (out, 2)}
    return shapes | {"m.vera_lambda_b": (out,), "m.vera_lambda_d": (2,)}


def _rotation(n: int) -> Shapes:
    return {"m.oft_R.weight": (n, 6)}


@dataclasses.dataclass(frozen=True)
class Wrong:
    """An adapter that is refused, and a word of the reason."""

    kind: str
    config: dict[str, Any]
    shapes: Shapes
    match: str
    base: Shapes | None = None
    error: type[LoregError] = BadInput


_LOHA_SHAPES: Shapes = {
    "m.hada_w1_a": (6, 2), "m.hada_w1_b": (2, 8), "m.hada_w2_a": (6, 2), "m.hada_w2_b": (2, 8),
}  # fmt: skip

WRONG = {
    "adalora: no init_r": Wrong("ADALORA", {"lora_alpha": 6}, _adalora(), "init_r"),
    "adalora: another rank": Wrong("ADALORA", ADALORA, _adalora(3), "'m'.* expected 4 singular values.*found 3"),
    "adalora: mask of another rank": Wrong(
        "ADALORA", ADALORA | {"rank_pattern": {"m.lora_E": [True] * 3}}, _adalora(3), "expected 4 flags.*found 3"
    ),
    "adalora: mask of numbers": Wrong(
        "ADALORA", ADALORA | {"rank_pattern": {"m.lora_E": [1, 1, 1, 1]}}, _adalora(), "true and false"
    ),
    "adalora: mask of a stranger": Wrong(
        "ADALORA", ADALORA | {"rank_pattern": {"n.lora_E": [True] * 4}}, _adalora(), "'n', of which"
    ),
    "adalora: no singular values": Wrong(
        "ADALORA", ADALORA, {"m.lora_A": (4, 8), "m.lora_B": (6, 4)}, "'m'.* lacks 'lora_E'"
    ),
    "adalora: a LoRA's file": Wrong(
        "ADALORA", ADALORA, {"m.lora_A.weight": (4, 8), "m.lora_B.weight": (6, 4)}, "no such tensor"
    ),
    "vera: no projections": Wrong("VERA", {}, {"m.vera_lambda_b": (6,), "m.vera_lambda_d": (2,)}, "weights lack"),
    "vera: square, (in, out) of nobody knows which": Wrong(
        "VERA", {"fan_in_fan_out": True}, _vera(8), "is square", {"m.weight": (8, 8)}, Unsupported
    ),
    "adalora: square, (in, out) of nobody knows which": Wrong(
        "ADALORA",
        ADALORA | {"fan_in_fan_out": True},
        {"m.lora_A": (4, 8), "m.lora_B": (8, 4), "m.lora_E": (4, 1)},
        "is square",
        {"m.weight": (8, 8)},
        Unsupported,
    ),
    "ia3: square, (in, out) of nobody knows which": Wrong(
        "IA3", {"fan_in_fan_out": True}, {"m.ia3_l": (8, 1)}, "is square", {"m.weight": (8, 8)}, Unsupported
    ),
    "vera: too narrow": Wrong(
        "VERA",
        {},
        {"base_model.vera_A": (2, 7), "base_model.vera_B": (6, 2), "m.vera_lambda_b": (6,), "m.vera_lambda_d": (2,)},
        "'m'",
    ),
    "loha: another rank": Wrong("LOHA", LOHA | {"r": 3}, _LOHA_SHAPES, "expected w1_b of rank 3.*found 2"),
    "loha: one core": Wrong("LOHA", LOHA, _LOHA_SHAPES | {"m.hada_t1": (2, 2, 3)}, "'m'.*t1 alone"),
    "loha: overlapping patterns, of no release": Wrong(
        "LOHA",
        {"r": 3, "alpha": 6, "rank_pattern": {"m": 2}, "alpha_pattern": {".*": 4}},
        _LOHA_SHAPES,
        "overlap",
        error=Unsupported,
    ),
    "loha: a pattern without end": Wrong(
        "LOHA", LOHA | {"rank_pattern": {r"(a+)\1": 2}}, _LOHA_SHAPES, "for ever", error=Unsupported
    ),
    "lokr: half a factor": Wrong("LOKR", LOHA, {"m.lokr_w1": (2, 4), "m.lokr_w2_a": (3, 2)}, "'m'.*expected either"),
    "ia3: a matrix": Wrong("IA3", {}, {"m.ia3_l": (6, 8)}, "'m'.*found \\[6, 8\\]"),
    "ia3: another size": Wrong("IA3", {}, {"m.ia3_l": (5, 1)}, "'m'"),
    "ia3: a convolution, of nobody knows what": Wrong(
        "IA3", {}, {"m.ia3_l": (1, 8, 1, 1)}, "feedforward_modules.*missing", {"m.weight": (8, 8, 2, 2)}
    ),
    "ia3: a convolution of other channels": Wrong(
        "IA3",
        {"feedforward_modules": "m"},
        {"m.ia3_l": (1, 9, 1, 1)},
        "groups of 4.*found 9",
        {"m.weight": (8, 4, 2, 2)},
    ),
    "ia3: an expression without end": Wrong(
        "IA3", {"feedforward_modules": r"(a*)\1"}, {"m.ia3_l": (6, 1)}, "for ever", error=Unsupported
    ),
    "ia3: no such layer": Wrong("IA3", {}, {"n.ia3_l": (6, 1)}, "the base has no 'n.weight'"),
    "oft: nobody knows which series": Wrong(
        "OFT", _neumann(5, "0.18.0.dev0@UNKNOWN"), _rotation(2), "peft_version", error=Unsupported
    ),
    "oft: not said whether a series": Wrong("OFT", {}, _rotation(2), "use_cayley_neumann"),
    "oft: blocks of another layer": Wrong("OFT", OFT, _rotation(3), "'m'.*blocks for 8 inputs"),
    "oft: one block, not shared": Wrong("OFT", OFT, _rotation(1), "'m'.*blocks for 8 inputs"),
    "oft: shared, two blocks": Wrong("OFT", OFT | {"block_share": True}, _rotation(2), "'m'.*one block for 8 inputs"),
    "oft: a shared block across groups": Wrong(
        "OFT",
        OFT | {"block_share": True},
        {"m.oft_R.weight": (1, 3)},
        "one block for 4 inputs",
        {"m.weight": (9, 4, 1, 1)},
    ),
    "oft: of both releases": Wrong(
        "OFT", OFT, _rotation(2) | {"m.oft_r": (2, 4, 4)}, "'m'.*found oft_R.weight, oft_r"
    ),
    "oft: a kernel": Wrong(
        "OFT", OFT, {"m.oft_R.weight": (4, 6)}, "adds them up", {"m.weight": (6, 4, 2, 2)}, Unsupported
    ),
    "boft: a convolution, of 0.13": Wrong(
        "BOFT",
        {},
        {"m.boft_R": (1, 4, 4, 4), "m.boft_s": (1, 6)},
        "BOFT of PEFT 0.13",
        {"m.weight": (6, 4, 2, 2)},
        Unsupported,
    ),
    "boft: no scale": Wrong("BOFT", {}, {"m.boft_R": (1, 2, 4, 4)}, "lacks 'boft_s'"),
    "boft: blocks of another layer": Wrong("BOFT", {}, {"m.boft_R": (1, 3, 4, 4), "m.boft_s": (6, 1)}, "'m'"),
    "tokens: another number": Wrong(
        "TRAINABLE_TOKENS", {"token_indices": [1, 2]}, {"m.trainable_tokens_delta": (3, 8)}, "3, 8"
    ),
    "tokens: which": Wrong("TRAINABLE_TOKENS", {}, {"m.trainable_tokens_delta": (3, 8)}, "token_indices: expected"),
    "tokens: beyond the base": Wrong(
        "TRAINABLE_TOKENS", {"token_indices": [6]}, {"m.trainable_tokens_delta": (1, 8)}, "exceed"
    ),
    "another prefix": Wrong("IA3", {}, {"base_model.m.ia3_l": (6, 1)}, "does not begin", error=Unsupported),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    wrong = WRONG[case]
    with pytest.raises(BadInput, match=wrong.match) as caught:
        _read(wrong.kind, wrong.config, wrong.shapes, wrong.base)
    assert type(caught.value) is wrong.error
