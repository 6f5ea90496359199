"""Hostile ``adapter_config.json``: whatever stands in a field, an adapter is read or refused by a typed error."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loreg.adapters import peft
from loreg.adapters.binding import bind
from loreg.adapters.peft import adalora, config, ia3, lora_fields, lycoris, orthogonal, parameters, rows, vera
from loreg.checkpoint import Checkpoint
from loreg.errors import BadInput, Unsupported, UsageError
from loreg.format import canonical_json
from loreg.format.fingerprint import BaseTensor
from loreg.format.module import IN_OUT

PREFIX = "base_model.model."
P = f"{PREFIX}{tiny.V}."  # of a matrix of (6, 6)
EMBEDDING = f"{PREFIX}model.embed_tokens."


def ones(*shape: int) -> tiny.Tensor:
    return tiny.tensor("F32", np.full(shape, 0.5))


class Adapter(NamedTuple):
    """A good adapter: its config beside the type, its tensors, and the fields that its type has."""

    config: Mapping[str, Any]
    tensors: Mapping[str, tiny.Tensor]
    known: frozenset[str]


LORA = {f"{P}lora_A.weight": ones(2, 6), f"{P}lora_B.weight": ones(6, 2)}
HADA = {f"{P}hada_{w}_{x}": ones(*((6, 2) if x == "a" else (2, 6))) for w in ("w1", "w2") for x in "ab"}
SHARED = {"base_model.vera_A": ones(2, 6), "base_model.vera_B": ones(6, 2)}
LORA_FIELDS = lora_fields.HANDLED | {"layer_replication", "eva_config"}
OFT = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5, "coft": False, "eps": 6e-5, "block_share": False}
ADAPTERS: Mapping[str, Adapter] = {
    "LORA": Adapter({"r": 2, "lora_alpha": 4}, LORA, LORA_FIELDS),
    "LORA with rows": Adapter(
        {"r": 2, "lora_alpha": 4, "trainable_token_indices": [1, 3]},
        {**LORA, f"{EMBEDDING}token_adapter.trainable_tokens_delta": ones(2, 6)},
        frozenset({"trainable_token_indices"}),
    ),
    "ADALORA": Adapter(
        {"init_r": 2, "lora_alpha": 4},
        {f"{P}lora_A": ones(2, 6), f"{P}lora_B": ones(6, 2), f"{P}lora_E": ones(2, 1)},
        adalora.KNOWN,
    ),
    "VERA": Adapter({"r": 2}, {f"{P}vera_lambda_d": ones(2), f"{P}vera_lambda_b": ones(6), **SHARED}, vera.KNOWN),
    "LOHA": Adapter({"r": 2, "alpha": 4}, HADA, lycoris.KNOWN),
    "LOKR": Adapter({"r": 2, "alpha": 4}, {f"{P}lokr_w1": ones(2, 2), f"{P}lokr_w2": ones(3, 3)}, lycoris.KNOWN_LOKR),
    "IA3": Adapter({"feedforward_modules": []}, {f"{P}ia3_l": ones(6, 1)}, ia3.KNOWN),
    "OFT": Adapter({**OFT, "peft_version": "0.21.0"}, {f"{P}oft_R.weight": ones(2, 3)}, orthogonal.KNOWN),
    "BOFT": Adapter({}, {f"{P}boft_R": ones(1, 2, 3, 3), f"{P}boft_s": ones(6, 1)}, orthogonal.KNOWN_BOFT),
    "TRAINABLE_TOKENS": Adapter(
        {"token_indices": [1, 3]}, {f"{EMBEDDING}trainable_tokens_delta": ones(2, 6)}, rows.KNOWN
    ),
}


class Case(NamedTuple):
    """One of ADAPTERS in a directory, and the model that it is for."""

    folder: Path
    config: Mapping[str, Any]
    known: tuple[str, ...]
    base: Mapping[str, BaseTensor]

    def read(self, **changed: Any) -> None:
        """All that a push reads of it. Raises what is raised there."""
        (self.folder / "adapter_config.json").write_text(json.dumps({**self.config, **changed}))
        draft = peft.read(self.folder)
        canonical_json.dumps({"training": dict(draft.training), "base": draft.base_name})
        bind(draft, self.base, tiny.CONFIG)

    def try_to_read(self, **changed: Any) -> bool:
        try:
            self.read(**changed)
        except (BadInput, UsageError):  # Unsupported is a BadInput
            return False
        return True


def base(folder: Path) -> Mapping[str, BaseTensor]:
    return Checkpoint.open(tiny.write_model(folder / "model", tiny.model())).manifest().by_name()


@pytest.fixture(scope="module", params=ADAPTERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    name: str = request.param
    adapter, folder = ADAPTERS[name], tmp_path_factory.mktemp("adapter")
    (folder / "adapter_model.safetensors").write_bytes(tiny.container(adapter.tensors.items()))
    embeds = any(key.startswith(EMBEDDING) for key in adapter.tensors)
    targets = ["embed_tokens", "v_proj"] if embeds else ["v_proj"]
    document = {"peft_type": name.partition(" ")[0], "target_modules": targets, **adapter.config}
    common = config.COMMON if name in ("LORA", "OFT") else frozenset({"target_modules", "modules_to_save"})
    return Case(folder, document, tuple(sorted(adapter.known | common)), base(folder))


VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, -1, 2**53 - 1, 0.5, 2.5, -0.25, 1e308, 5e-324),
    *("", "v_proj", "0.18.0", "9" * 5000, "0." + "9" * 5000, "0.18.9" + "9" * 5000),
    *("(", "a{99999999999}", "x" * 9000),
    *([], [None], [""], ["v_proj"], [5], [1.5], [-1], [2**53 - 1], [[]], [{}], [1, 1], [True, False], [10**6] * 3),
    *({}, {"v_proj": None}, {"v_proj": 0}, {"v_proj": -1}, {"v_proj": 1.5}, {"v_proj": "x"}, {"v_proj": True}),
    *({"": 1}, {"(": 1}, {"a": {}}, {"nblocks": 0}, {"nblocks": "a"}, {"nblocks": None}, {"nblocks": 2.5}),
    *({"nblocks": 2, f"target_modules_bd_{factor}": value} for factor in "ab" for value in (5, ["v_proj"], [5], {})),
    *({"embed_tokens": 5}, {"embed_tokens": [1.5]}, {"embed_tokens": []}, {f"{tiny.V}.lora_E": [True]}),
    *({f"{tiny.V}.lora_E": 5}, {f"{tiny.V}.lora_E": [True, 0]}, {f"{tiny.V}.lora_E": [False, False]}),
]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(["v_proj", "q_proj", "pissa", "all", "lora_only", "0.17", "all-linear"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4) | st.just("v_proj"), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


def test_every_adapter_is_good_as_it_is(case: Case) -> None:
    case.read()


def test_no_value_of_a_field_breaks_the_reader(case: Case) -> None:
    """Any other error than those of ``try_to_read`` fails."""
    outcomes = {case.try_to_read(**{name: value}) for name in case.known for value in VALUES}
    assert outcomes == {True, False}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_json_in_fields_breaks_the_reader(case: Case, data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from(case.known), min_size=1, max_size=3, unique=True))
    case.try_to_read(**{name: data.draw(JSON) for name in names})


FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying", "coft", "block_share")


@pytest.mark.parametrize("value", ["false", 1, 0.5, [], {}])
@pytest.mark.parametrize("name", [*FLAGS, "use_cayley_neumann", "save_projection"])
def test_a_flag_is_true_or_false(tmp_path: Path, name: str, value: Any) -> None:
    """ "false" would be a yes."""
    (tmp_path / config.CONFIG).write_text(json.dumps({name: value}))
    with pytest.raises(BadInput, match=f"{name}: expected true, false or null, found"):
        config.read_config(tmp_path / config.CONFIG)


@pytest.mark.parametrize("value", [5, True, "lm_head", {"a": 1}, [None], [5]])
def test_modules_to_save_is_a_list_of_names(tmp_path: Path, value: Any) -> None:
    folder = tiny.write_adapter(tmp_path / "adapter", tiny.adapter(), modules_to_save=value)
    with pytest.raises(BadInput, match="modules_to_save: expected a list of names or null, found"):
        peft.read(folder)


@pytest.mark.parametrize(
    "name", ["peft_type", "base_model_name_or_path", "revision", "peft_version", "task_type", "bias"]
)
@pytest.mark.parametrize("value", [5, True, ["x"], {"a": 1}])
def test_what_is_text_is_text(tmp_path: Path, name: str, value: Any) -> None:
    folder = tiny.write_adapter(tmp_path / "adapter", tiny.adapter(), **{name: value})
    with pytest.raises(BadInput, match=f"{name}: expected text or null, found"):
        peft.read(folder)


@pytest.fixture
def oft(tmp_path: Path) -> Case:
    adapter = ADAPTERS["OFT"]
    (tmp_path / "adapter_model.safetensors").write_bytes(tiny.container(adapter.tensors.items()))
    return Case(tmp_path, {"peft_type": "OFT", "target_modules": ["v_proj"], **adapter.config}, (), base(tmp_path))


@pytest.mark.parametrize("terms", [65, 3_000_000, 2**53 - 1])
def test_a_series_of_too_many_terms_is_refused(oft: Case, terms: int) -> None:
    oft.read(num_cayley_neumann_terms=64)
    with pytest.raises(Unsupported, match=f"num_cayley_neumann_terms is {terms}, and a sum of 64 at most"):
        oft.read(num_cayley_neumann_terms=terms)


@pytest.mark.parametrize("version", ["0." + "9" * 5000, "9" * 5000 + ".1", "0.99999", "x", "0.18.dev"])
def test_a_version_that_is_none_is_refused_where_it_decides(oft: Case, version: str) -> None:
    with pytest.raises(Unsupported, match=r"peft_version is '.*', which does not tell") as caught:
        oft.read(peft_version=version)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("shape", [(2, 0), (0, 3), (0, 0)])
def test_rotations_without_numbers_are_refused(oft: Case, shape: tuple[int, int]) -> None:
    for key in ("oft_R.weight", "oft_r"):
        tensors = {f"{P}{key}": tiny.tensor("F32", np.zeros(shape if key == "oft_R.weight" else (*shape, shape[1])))}
        (oft.folder / "adapter_model.safetensors").write_bytes(tiny.container(tensors.items()))
        with pytest.raises(BadInput, match=r"expected blocks, found R of shape \["):
            oft.read(coft=True)


@pytest.mark.parametrize("version", ["0.18." + "9" * 5000, "9" * 5000 + ".18.0", "0.18", "", None])
def test_a_version_of_endless_digits_is_none(version: str | None) -> None:
    """It would say in which orientation experts are stored."""
    assert parameters._orientations({"peft_version": version}) == (None, None)
    assert parameters._orientations({"peft_version": "0.18.1"}) == (IN_OUT, IN_OUT)
