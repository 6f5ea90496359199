"""Bad files of LyCORIS, kohya and loralib: refused on push by what is wrong with them; nothing is stored."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from refusal import refused

import loreg
from loreg.cli import main
from loreg.errors import BadInput, LoregError, NotFound, Unsupported, UsageError

Tensors = dict[str, tiny.Tensor]

_Q, _V = "lycoris_model_layers_0_self_attn_q_proj", "lycoris_model_layers_0_self_attn_v_proj"  # (8, 6), (6, 6)


def ones(*shape: int, dtype: str = "F32") -> tiny.Tensor:
    return tiny.tensor(dtype, np.ones(shape))


def lora(name: str = _V, **more: tiny.Tensor) -> Tensors:
    """A good LoRA of rank 2 for a weight of (6, 6); ``more`` by part, ``_`` for ``.``."""
    parts = {"lora_down.weight": ones(2, 6), "lora_up.weight": ones(6, 2), "alpha": ones(), **more}
    return {f"{name}.{part}": value for part, value in parts.items()}


def parts(name: str = _V, **found: tiny.Tensor) -> Tensors:
    return {f"{name}.{part}": value for part, value in found.items()}


def write(path: Path, tensors: Mapping[str, tiny.Tensor], **metadata: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(tiny.container(tensors.items(), metadata))
    return path


def args(**arguments: str) -> str:
    return json.dumps(arguments)


_OFT = {"oft_blocks": ones(3, 2, 2), "alpha": ones()}
_LOHA = {"hada_w1_a": ones(6, 2), "hada_w1_b": ones(2, 6), "hada_w2_a": ones(6, 2), "hada_w2_b": ones(2, 6)}


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[loreg.Registry]:
    """A registry with ``tiny.model()`` as ``base``, for all that is refused: it leaves no trace."""
    folder = tmp_path_factory.mktemp("stocked")
    with loreg.open(folder / "home") as registry:
        registry.add_base(tiny.write_model(folder / "base", tiny.model()), "base")
        yield registry


BAD_FILES: dict[str, tuple[Tensors, type[LoregError], str]] = {
    "another module": (lora("lycoris_model_layers_9_q_proj"), BadInput, "layers_9_q_proj' of the file is none of"),
    "another shape": (lora(_Q), BadInput, r"expected 'model.layers.0.self_attn.q_proj.weight' of shape \[6, 6\]"),
    "another prefix": (lora("oft_unet_x"), NotFound, "holds no adapter that loreg knows"),
    "a stranger beside": (
        lora() | {"bundle_emb.x.string_to_param": ones(2)},
        Unsupported,
        "'bundle_emb.x.* is none of",
    ),
    "half a module": (parts(**{"lora_up.weight": ones(6, 2)}), BadInput, "is LoCon without 'lora_down.weight'"),
    "parts of two": (lora(hada_w1_a=ones(6, 2)), Unsupported, "is LoCon with 'hada_w1_a', which LyCORIS does not"),
    "parts of none": (parts(lokr_w2=ones(2, 2)), Unsupported, "has the parts lokr_w2, which are of no algorithm"),
    "factors of two sizes": (lora() | parts(**{"lora_up.weight": ones(6, 3)}), BadInput, "is not acceptable LoCon"),
    "no rank": (lora(**{"lora_down.weight": ones(0, 6)}), BadInput, "expected .r, …."),
    "up of no dimensions": (lora(**{"lora_up.weight": ones()}), BadInput, r"not acceptable LoCon: B has shape \(\)"),
    "down of no dimensions": (lora(**{"lora_down.weight": ones()}), BadInput, r"of shape \[\], expected .r, …."),
    "LoHa of no dimensions": (parts(**_LOHA | {"hada_w1_a": ones()}), BadInput, r"LoHa: w1_a has shape \(\)"),
    "LoKr of no dimensions": (parts(lokr_w1=ones(), lokr_w2=ones()), BadInput, r"LoKr: w1 has shape \(\)"),
    "full of no dimensions": (parts(diff=ones()), BadInput, "not acceptable full: value has no dimensions"),
    "full of no elements": (parts(diff=ones(0, 6)), BadInput, r"of shape \[0, 6\], found \[6, 6\]"),
    "a bias of no dimensions": (
        parts(_Q, diff=ones(8, 6), diff_b=ones()),
        BadInput,
        r"shape \(\), expected one with",
    ),
    "not finite": (lora(**{"lora_up.weight": tiny.tensor("F32", np.full((6, 2), np.nan))}), BadInput, "NaN or inf"),
    "alpha not finite": (
        lora(alpha=tiny.tensor("F32", np.array(np.inf))),
        BadInput,
        "alpha' is inf: expected a fini",
    ),
    "two alphas": (lora(alpha=ones(2)), BadInput, r"alpha' has shape \[2\]: expected a single number"),
    "alpha of booleans": (lora(alpha=ones(dtype="BOOL")), Unsupported, "alpha' has dtype BOOL: expected a number"),
    "integers": (lora(**{"lora_up.weight": ones(6, 2, dtype="I64")}), Unsupported, "has dtype I64"),
    "magnitudes of no axis": (lora(dora_scale=ones(6)), BadInput, r"dora_scale of shape \[6\], expected .out, 1"),
    "magnitudes of two axes": (lora(dora_scale=ones(6, 6)), BadInput, r"dora_scale of shape \[6, 6\], expected"),
    "too few magnitudes": (lora(dora_scale=ones(1, 3)), BadInput, "has 3 numbers for input channels, expected 6"),
    "one magnitude": (lora(dora_scale=ones(1, 1)), BadInput, "has 1 numbers for input channels, expected 6"),
    "magnitudes of another weight": (lora(dora_scale=ones(5, 1)), BadInput, r"magnitude has shape \(5, 1\)"),
    "an old scalar": (lora(scalar=ones()), Unsupported, "has 'scalar': it is of a scalar, by which old versions"),
    "an old OFT": (parts(oft_diag=ones(3, 2, 2)), Unsupported, "has 'oft_diag': it is of OFT of LyCORIS 1"),
    "a core without the other": (parts(**_LOHA, hada_t1=ones(2, 2, 1)), BadInput, "found t1 alone, expected both"),
    "LoKr of two ranks": (
        parts(lokr_w1_a=ones(2, 1), lokr_w1_b=ones(1, 2), lokr_w2_a=ones(3, 2), lokr_w2_b=ones(2, 3)),
        BadInput,
        r"one rank, found .* of ranks \[1, 2\]",
    ),
    "half a LoKr": (
        parts(lokr_w1=ones(2, 2)),
        BadInput,
        "is not acceptable LoKr: expected w1 and w2 whole or in two",
    ),
    "OFT without a limit": (parts(oft_blocks=ones(3, 2, 2)), BadInput, "is OFT without 'alpha'"),
    "OFT of no blocks": (parts(**_OFT | {"oft_blocks": ones(3, 2)}), BadInput, r"oft_blocks of shape \[3, 2\]"),
    "OFT of another size": (parts(**_OFT | {"oft_blocks": ones(2, 2, 2)}), BadInput, "do not cover vectors of 6"),
    "DoRA of OFT": (parts(**_OFT, dora_scale=ones(6, 1)), Unsupported, "is OFT with 'dora_scale', which LyCORIS"),
    "(IA)³ on neither": (parts(weight=ones(6), on_input=tiny.tensor("I64", np.array(2))), BadInput, "has on_input 2"),
    "(IA)³ of another size": (
        parts(weight=ones(3), on_input=tiny.tensor("I64", np.array(1))),
        BadInput,
        "has 3 numbers for input channels, expected 6",
    ),
    "a bias that the base has not": (
        parts(diff=ones(6, 6), diff_b=ones(6)),
        BadInput,
        r"'lycoris_.*\.diff_b' of the adapter is added to a bias.*v_proj' of the base has none.*train without it",
    ),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_bad_file_is_refused(stocked: loreg.Registry, tmp_path: Path, what: str) -> None:
    tensors, error, message = BAD_FILES[what]
    file = write(tmp_path / "bad.safetensors", tensors)
    with refused(stocked, tmp_path / "out", error, message, error.exit_code):
        stocked.push(file, base="base")


BAD_HEADERS = {
    "no JSON": ("{", BadInput, "ss_network_args in the header .* is not acceptable JSON"),
    "no object": ("[1]", BadInput, r"ss_network_args in its header is '\[1\]', expected a JSON object"),
    "DyLoRA": (args(algo="DyLoRA"), Unsupported, "is of DyLoRA"),
    "bypass": (args(algo="lora", bypass_mode="True"), Unsupported, "bypass_mode.* than the DoRA that LyCORIS loads"),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_bad_header_is_refused(stocked: loreg.Registry, tmp_path: Path, what: str) -> None:
    text, error, message = BAD_HEADERS[what]
    file = write(tmp_path / "bad.safetensors", lora(dora_scale=ones(6, 1)), ss_network_args=text)
    with refused(stocked, tmp_path / "out", error, message, error.exit_code):
        stocked.push(file, base="base")


GOOD_FILES: dict[str, Tensors] = {
    "LoRA": lora(),
    "no alpha": {key: value for key, value in lora().items() if not key.endswith("alpha")},
    "DoRA": lora(dora_scale=ones(1, 6)),
    "LoHa": parts(**_LOHA),
    "LoKr": parts(lokr_w1=ones(2, 2), lokr_w2=ones(3, 3)),
    "OFT": parts(**_OFT),
    "full": parts(_Q, diff=ones(8, 6), diff_b=ones(8)),
}


@pytest.mark.parametrize("what", GOOD_FILES)
def test_a_good_file_is_not_refused(registry: loreg.Registry, tiny_base: Path, tmp_path: Path, what: str) -> None:
    notes = {"ss_network_args": args(algo="lora", bypass_mode="False", rs_lora="false"), "ss_network_dim": "2"}
    file = write(tmp_path / "My Style.safetensors", GOOD_FILES[what], **notes, other="x")
    version = registry.push(file, base=tiny_base)
    assert (version.name, version.number, version.left_out) == ("my-style", 1, ())
    assert version.manifest.provenance.training == notes
    (term,) = next(iter(version.manifest.modules.values())).terms
    assert term.scale == (0.5 if what in ("LoRA", "DoRA") else 1.0)
    assert registry.export("my-style", tmp_path / "out").joinpath(file.name).read_bytes() == file.read_bytes()


def test_a_directory_holds_one_file_of_weights(registry: loreg.Registry, tiny_base: Path, tmp_path: Path) -> None:
    folder = write(tmp_path / "style" / "a.safetensors", lora()).parent
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "optimizer.pt").write_bytes(b"not read")
    version = registry.push(folder, base=tiny_base)
    assert (version.name, version.left_out) == ("style", ("optimizer.pt",))
    assert version.manifest.provenance.license == "mit"
    write(folder / "b.safetensors", lora())
    with refused(registry, tmp_path / "out", BadInput, "holds 2 files of weights, such as a.safetensors, b.safe", 5):
        registry.push(folder, base=tiny_base, name="new")
    assert registry.push(folder / "b.safetensors", base=tiny_base, name="new").created


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "txt", "none"])
def test_no_adapter_at_all(stocked: loreg.Registry, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad.{suffix}"
    if suffix != "none":
        path.write_bytes(b"\x80" * 100)
    error = NotFound if suffix in ("txt", "none") else BadInput
    message = {"none": "does not exist", "txt": "holds no adapter that loreg knows"}.get(
        suffix, "is not a s|truncated"
    )
    with refused(stocked, tmp_path / "out", error, message, error.exit_code):
        stocked.push(path, base="base")


class Bomb:
    """Pickles into a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("boom",)


@pytest.mark.parametrize("kind", [None, "lycoris", "loralib"])
def test_a_pickle_runs_nothing(
    stocked: loreg.Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({f"{_V}.lora_A": Bomb()}, protocol=2))
    with refused(stocked, tmp_path / "out", BadInput, "is not a state dict that loads without running code", 5):
        stocked.push(tmp_path / "bad.pt", base="base", format=kind, alpha=1 if kind == "loralib" else None)
    assert not (tmp_path / "boom").exists()


# loralib


def pair(path: str = tiny.Q, A: tuple[int, ...] = (2, 6), B: tuple[int, ...] = (8, 2)) -> Tensors:
    return {f"{path}.lora_A": ones(*A), f"{path}.lora_B": ones(*B)}


GIVEN = {"alpha": 4.0}
BAD_LORALIB: dict[str, tuple[Tensors, Mapping[str, Any], type[LoregError], str]] = {
    "no alpha": (pair(), {}, UsageError, r"stores no alpha: give the layers' lora_alpha \(--alpha\)"),
    "alpha not finite": (pair(), {"alpha": float("nan")}, UsageError, "alpha is nan: expected a finite number"),
    "alpha as text": (pair(), {"alpha": "x"}, UsageError, "alpha is x: expected a finite number"),
    "alpha as a flag": (pair(), {"alpha": True}, UsageError, "alpha is True: expected a finite number"),
    "alpha of hundreds of digits": (pair(), {"alpha": 10**400}, UsageError, "alpha is inf: expected a finite"),
    "blocks as a number": (pair(), GIVEN | {"enable_lora": 5}, UsageError, "enable_lora is 5: expected true and"),
    "blocks as text": (pair(), GIVEN | {"enable_lora": "10"}, UsageError, "enable_lora is 10: expected true and"),
    "a bias of another length": (
        pair() | {f"{tiny.Q}.bias": ones(7)}, GIVEN, BadInput, r"of shape \[7\] replaces .*: expected shape \[8\]",
    ),
    "a bias of no dimensions": (pair() | {f"{tiny.Q}.bias": ones()}, GIVEN, BadInput, r"of shape \[\] replaces"),
    "half a module": ({f"{tiny.Q}.lora_A": ones(2, 6)}, GIVEN, BadInput, "has no lora_B: the file is not complete"),
    "a whole model": (pair() | {"model.norm.weight": ones(6)}, GIVEN, Unsupported, "'model.norm.weight' is neither"),
    "another module": (pair("layers.9.q"), GIVEN, BadInput, "'layers.9.q' of the adapter has no weight in the base"),
    "another size": (pair(A=(2, 5)), GIVEN, BadInput, "which no layer of loralib has together"),
    "other ranks": (pair(A=(3, 6)), GIVEN, BadInput, "which no layer of loralib has together"),
    "no number of blocks": (pair(B=(3, 2)), GIVEN, BadInput, "has 8 outputs, of which 1 enabled blocks with B"),
    "no matrices": (pair(A=(2, 6, 1)), GIVEN, BadInput, "expected matrices"),
    "a bias of nothing": (pair() | {"model.other.bias": ones(8)}, GIVEN, BadInput, "'model.other.bias'.* no such"),
    "not finite": (
        pair() | {f"{tiny.Q}.lora_B": tiny.tensor("F32", np.full((8, 2), np.inf))}, GIVEN, BadInput, "NaN or inf",
    ),
    "blocks that are not said": (
        pair(A=(4, 6), B=(4, 2)), GIVEN, UsageError, "MergedLinear of 4 blocks of which 2 are .* such as 1,1,0,0",
    ),
    "other blocks": (
        pair(A=(4, 6), B=(4, 2)), GIVEN | {"enable_lora": [True, False, True]}, UsageError, "enable_lora says",
    ),
    "more blocks": (
        pair(A=(4, 6), B=(4, 2)), GIVEN | {"enable_lora": [True, True, True, False]}, UsageError, "enable_lora says",
    ),
    "blocks of no module": (pair(), GIVEN | {"enable_lora": [True]}, UsageError, "no module of the adapter is a M"),
    "no blocks": (pair(), GIVEN | {"enable_lora": [False]}, UsageError, "at least one of them true"),
    "blocks as numbers": (pair(), GIVEN | {"enable_lora": [1, 0]}, UsageError, "expected true and false for each"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_LORALIB)
def test_a_bad_file_of_loralib_is_refused(stocked: loreg.Registry, tmp_path: Path, what: str) -> None:
    tensors, given, error, message = BAD_LORALIB[what]
    file = write(tmp_path / "bad.safetensors", tensors)
    with refused(stocked, tmp_path / "out", error, message, error.exit_code):
        stocked.push(file, base="base", **given)


def test_a_square_embedding_is_not_guessed(registry: loreg.Registry, tmp_path: Path) -> None:
    """loralib's Embedding adds the transpose of what its Linear does, and wpe of gpt2-medium is 1024 by 1024."""
    base = tiny.write_model(tmp_path / "base", {"h.wpe.weight": ones(6, 6)})
    file = write(tmp_path / "bad.safetensors", pair("h.wpe", B=(6, 2)))
    with refused(registry, tmp_path / "out", Unsupported, "may be a Linear or an Embedding", 5):
        registry.push(file, base=base, alpha=1)


def test_convolutions_that_loralib_cannot_have(registry: loreg.Registry, tmp_path: Path) -> None:
    base = tiny.write_model(tmp_path / "base", {"x.weight": ones(4, 3, 3, 3), "y.weight": ones(4, 3, 3, 2)})
    for path, A, message in (("x", (5, 9), "expected .r·k, in·k. and"), ("y", (6, 9), "for a kernel of one size k")):
        file = write(tmp_path / "bad.safetensors", pair(path, A=A, B=(12, A[0])))
        with refused(registry, tmp_path / "out", BadInput, message, 5):
            registry.push(file, base=base, alpha=1)
    file = write(tmp_path / "good.safetensors", pair("x", A=(6, 9), B=(12, 6)))
    (module,) = registry.push(file, base=base, alpha=1).manifest.modules.values()
    assert module.terms[0].scale == 0.5  # r = 6 / 3


# Options


def test_an_option_of_another_format(pushed: loreg.Registry, tmp_path: Path) -> None:
    for path, kind in ((tmp_path / "sql", "peft"), (write(tmp_path / "x.safetensors", lora()), "lycoris")):
        with refused(pushed, tmp_path / "out", UsageError, f"alpha is no option of {kind} adapters", 2):
            pushed.push(path, base="base", name="new", alpha=1)
    with refused(pushed, tmp_path / "out", UsageError, "initial is no option of lycoris adapters.* take none", 2):
        pushed.push(tmp_path / "x.safetensors", base="base", initial=tmp_path / "sql")
    with refused(pushed, tmp_path / "out", NotFound, "holds no lycoris adapter: expected a file of LyCORIS", 3):
        pushed.push(tmp_path / "sql", base="base", name="new", format="lycoris")


def test_the_command_takes_a_file_and_its_options(pushed: loreg.Registry, tmp_path: Path) -> None:
    Q = torch.ones(4, 6), torch.ones(4, 2)
    torch.save({f"{tiny.Q}.lora_A": Q[0], f"{tiny.Q}.lora_B": Q[1]}, tmp_path / "lora.pt")
    command = ["--home", str(pushed.home), "--json", "push", str(tmp_path / "lora.pt"), "--base", "base"]

    def run(*more: str) -> tuple[int, dict[str, Any]]:
        result = CliRunner().invoke(main, [*command, *more])
        return result.exit_code, json.loads(result.stdout) if result.stdout else {}

    assert run("--alpha", "8")[0] == 2
    assert run("--alpha", "8", "--enable-lora", "1,2")[0] == 2
    code, said = run("--alpha", "8", "--enable-lora", "0,1,1,0")
    assert (code, said["name"], said["rank"]) == (0, "lora", 2)
    (module,) = pushed.resolve("lora").manifest.modules.values()
    assert module.terms[0].parameters == {"enable": [False, True, True, False]}
    assert module.terms[0].scale == 4
