"""The command line: every command, every exit code, what is printed where, and what is not imported."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import loreg
from loreg.cli import main, text
from loreg.cli.program import SECTIONS
from loreg.cli.progress import ProgressBar
from loreg.digest import Digest
from loreg.format import canonical_json

if "hub_server" not in sys.modules:  # tests/ is on no path of its own
    _spec = importlib.util.spec_from_file_location("hub_server", Path(__file__).parents[1] / "hub_server.py")
    sys.modules["hub_server"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["hub_server"])
hub = sys.modules["hub_server"].hub

WIDTH, RANK, LAYERS = 8, 2, 2
DIGEST = re.compile(r"blake3:[0-9a-f]{64}")
COMMANDS = [name for section in SECTIONS.values() for name in section]
LEAVES = [
    *(("base", sub) for sub in ("add", "ls", "show")),
    *(("sync", sub) for sub in ("push", "pull")),
    ("store", "copy"),
    *((name,) for name in COMMANDS if name not in ("base", "sync", "store")),
]


def paths() -> list[str]:
    return [f"model.layers.{layer}.self_attn.{kind}" for layer in range(LAYERS) for kind in ("q_proj", "v_proj")]


def make_base(folder: Path, seed: int = 0) -> Path:
    """A llama-like checkpoint of 1 kB, in float32."""
    rng = np.random.default_rng(seed)
    tensors = {f"{path}.weight": rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) for path in paths()}
    tensors["model.norm.weight"] = np.ones(WIDTH, np.float32)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
    return folder


def make_adapter(folder: Path, seed: int) -> Path:
    """A PEFT LoRA of rank 2 and scale 2 on every projection, in small integers: its merges are exact."""
    rng = np.random.default_rng(seed)
    factors = {}
    for path in paths():
        factors[f"base_model.model.{path}.lora_A.weight"] = rng.integers(-3, 4, (RANK, WIDTH)).astype(np.float32)
        factors[f"base_model.model.{path}.lora_B.weight"] = rng.integers(-3, 4, (WIDTH, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def alone(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in ``folder``, with a registry of its own there."""
    for name in ("LOREG_CATALOG", "LOREG_STORE", "NO_COLOR"):
        patch.delenv(name, raising=False)
    patch.setenv("LOREG_HOME", str(folder / "home"))
    patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    patch.chdir(folder)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, and a registry that holds them: made once, and copied for every test."""
    folder = tmp_path_factory.mktemp("shelf")
    make_base(folder / "tiny")
    make_adapter(folder / "sql", 1)
    make_adapter(folder / "humor", 2)
    with pytest.MonkeyPatch.context() as patch:
        alone(patch, folder)
        done("base", "add", "tiny")
        done("push", "sql", "--base", "tiny", "--tag", "prod", "-m", "three epochs")
        done("push", "humor", "--base", "tiny")
    return folder


@pytest.fixture
def here(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the base and the adapters, and no registry yet."""
    for name in ("tiny", "sql", "humor"):
        shutil.copytree(shelf / name, tmp_path / name)
    alone(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def stocked(shelf: Path, here: Path) -> Path:
    """… and the registry."""
    shutil.copytree(shelf / "home", here / "home")
    return here


def run(*arguments: str, **options: object) -> Result:
    return CliRunner().invoke(main, arguments, **options)


def done(*arguments: str) -> dict:
    """The JSON of a command that must succeed; stdout must hold that and nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def refused(code: int, *arguments: str) -> dict:
    """The error of a command that must fail: one object on stdout, the same sentence on stderr, no traceback."""
    plain, result = run(*arguments), run(*arguments, "--json")
    assert plain.exit_code == result.exit_code == code, plain.output
    assert plain.stdout == ""
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == code
    assert result.stderr == f"loreg: {error['message']}\n"
    assert error["message"].count("\n") == 0 and "Traceback" not in plain.stderr
    return error


def environment() -> dict[str, str]:
    """What a child process needs to import this very loreg."""
    return {**os.environ, "PYTHONPATH": str(Path(loreg.__file__).parents[1])}


def python(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    options = {"capture_output": True, "text": True, "timeout": 120, "env": environment(), **options}
    return subprocess.run(command, check=False, **options)


# What each command says to programs.


def test_base_add_reports_the_identity_and_ls_and_show_find_it_again(here):
    added = done("base", "add", "tiny")
    assert (added["name"], added["tensors"], added["bytes"]) == ("tiny", 5, 4 * (4 * WIDTH**2 + WIDTH))
    assert DIGEST.fullmatch(added["weights_root"]) and DIGEST.fullmatch(added["structure_root"])
    (listed,) = done("base", "ls")["bases"]
    assert (listed["name"], listed["weights_root"], listed["bytes"]) == (
        "tiny",
        added["weights_root"],
        added["bytes"],
    )
    shown = done("base", "show", "tiny")
    assert {key: shown[key] for key in added} == added
    assert sorted(shown["manifest"]["tensors"]) == sorted(load_file(here / "tiny" / "model.safetensors"))
    assert done("base", "add", "tiny", "--name", "other")["weights_root"] == added["weights_root"]


def test_push_says_what_was_stored_and_the_same_again_is_not_new(here):
    (here / "sql" / "optimizer.pt").write_bytes(b"state")
    pushed = done("push", "sql", "--base", "tiny", "--name", "text2sql", "--format", "peft")
    expected = {"name": "text2sql", "version": 1, "created": True, "rank": RANK, "modules": 4, "base": "tiny"}
    assert {key: pushed[key] for key in expected} == expected
    assert DIGEST.fullmatch(pushed["digest"]) and pushed["left_out"] == ["optimizer.pt"]
    again = done("push", "sql", "--base", "tiny", "--name", "text2sql")
    assert again == {**pushed, "created": False}


def test_show_prints_the_manifest_whose_digest_is_the_version(stocked):
    shown = done("show", "sql:prod")
    assert (shown["name"], shown["version"], shown["tags"]) == ("sql", 1, ["latest", "prod"])
    assert str(Digest.of(canonical_json.dumps(shown["manifest"]))) == shown["digest"]
    assert done("show", f"sql@{shown['digest']}") == done("show", shown["digest"]) == shown


def test_ls_filters_and_limits(stocked):
    make_adapter(stocked / "again", 3)
    done("push", "again", "--base", "tiny", "--name", "sql")
    rows = done("ls")["adapters"]
    assert [(row["name"], row["version"]) for row in rows] == [("humor", 1), ("sql", 2)]
    for key in ("name", "version", "digest", "base", "rank", "targets", "bytes", "created_at"):
        assert key in rows[0]
    assert (rows[0]["base"], rows[0]["rank"], rows[0]["targets"]) == ("tiny", RANK, ["q_proj", "v_proj"])
    assert abs(datetime.fromisoformat(rows[0]["created_at"]) - datetime.now(UTC)) < timedelta(hours=1)

    def found(*arguments: str) -> list[str]:
        return [f"{row['name']}:v{row['version']}" for row in done("ls", *arguments)["adapters"]]

    assert found("--all") == ["humor:v1", "sql:v1", "sql:v2"]
    assert found("--all", "--limit", "2") == ["humor:v1", "sql:v1"]
    assert found("hum") == ["humor:v1"]
    assert found("--all", "epochs") == ["sql:v1"]
    assert found("--base", "tiny", "--rank", "2", "--target", "q_proj") == ["humor:v1", "sql:v2"]
    assert found("--rank", "3") == found("--target", "k_proj") == found("--base", "gpt2") == []


def test_log_and_tag_tell_the_history(stocked):
    make_adapter(stocked / "again", 3)
    second = done("push", "again", "--base", "tiny", "--name", "sql")
    moved = done("tag", "sql:v2", "prod")
    assert moved == {"name": "sql", "version": 2, "digest": second["digest"], "tag": "prod"}
    history = done("log", "sql")
    assert [(row["version"], row["note"], row["tags"]) for row in history["versions"]] == [
        (1, "three epochs", []),
        (2, None, ["latest", "prod"]),
    ]
    assert history["tags"] == {"latest": 2, "prod": 2}
    assert [move["version"] for move in history["moves"] if move["tag"] == "prod"] == [1, 2]


@pytest.mark.parametrize("form", ["original", "peft"])
def test_export_gives_the_pushed_bytes_back(stocked, form):
    written = done("export", "sql", "--out", "given", "--format", form)
    assert written == {"out": "given", "reference": "sql", "format": form}
    for file in (stocked / "sql").iterdir():
        assert (stocked / "given" / file.name).read_bytes() == file.read_bytes()


def test_rm_restore_and_gc(stocked):
    make_adapter(stocked / "again", 3)
    digest = done("push", "again", "--base", "tiny", "--name", "sql")["digest"]
    refused(6, "rm", "sql:v1")  # prod points to it
    assert "sql:v1" in run("rm", "sql:v1", "--tags-to", "sql:v2").stdout
    assert done("rm", "humor") == {"name": "humor", "version": 1, "digest": done("trash")["adapters"][0]["digest"]}
    assert [row["version"] for row in done("log", "sql")["versions"]] == [2]
    assert done("ls")["adapters"][0]["digest"] == digest and done("log", "sql")["tags"] == {"latest": 2, "prod": 2}
    refused(3, "show", "sql:v1")
    lines = run("trash").stdout.splitlines()
    assert len(lines) == 3 and lines[1].startswith("humor") and "three epochs" in lines[2]
    assert done("restore", "humor:v1")["name"] == "humor"
    refused(3, "restore", "humor:v1")
    refused(2, "restore", "humor")
    kept = {"deleted": 0, "bytes": 0, "versions": [], "unfinished": 0, "dry_run": False}
    assert done("gc") == kept
    rehearsed = done("gc", "--grace", "0", "--dry-run")
    assert rehearsed["versions"] == ["sql:v1"] and rehearsed["deleted"] > 0 and rehearsed["bytes"] > 0
    shown = run("gc", "--grace", "0", "--dry-run").stdout
    assert "would delete" in shown and "sql:v1" in shown
    assert done("gc", "--grace", "0") == {**rehearsed, "dry_run": False}
    assert run("trash").stdout == "The trash is empty.\n" and done("gc", "--grace", "0") == kept
    refused(3, "restore", "sql:v1")
    for wrong in ("14", "-1d", "1y", ""):
        assert "no time such as 14d" in refused(2, "gc", "--grace", wrong)["message"]
    assert "at most a century" in refused(2, "gc", "--grace", "999999w")["message"]
    assert done("gc", "--grace", "5000w")["deleted"] == 0


def test_a_name_whose_versions_are_all_in_the_trash(stocked):
    done("rm", "humor")
    said = refused(3, "show", "humor")["message"]
    assert "'humor' has no version: it has no versions, v1 in the trash (see `loreg trash`), and no tags" in said
    assert "loreg restore humor:v1" in refused(3, "show", "humor:v1")["message"]


def test_fsck_finds_and_mends(stocked):
    shutil.copytree(stocked / "home", stocked / "copy")
    well = done("fsck")
    assert well["ok"] and well["blobs"] > 3 and well["problems"] == []
    assert run("fsck").stdout.endswith("blobs read: all is well\n")
    digest = done("show", "sql")["digest"]
    (path,) = (stocked / "home" / "blobs").glob(f"*/{digest.removeprefix('blake3:')}.*")
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    result = run("fsck")
    assert result.exit_code == 1 and "which sql:v1 need" in result.stdout and "not all is well" in result.stdout
    assert run("fsck", "--json").exit_code == 1
    mended = done("fsck", "--repair", "--from", str(stocked / "copy"))
    assert mended["ok"] and [problem["touches"] for problem in mended["problems"]] == [["sql:v1"]]
    assert done("fsck")["problems"] == [] and done("verify", "sql")["ok"]
    assert "--repair" in refused(2, "fsck", "--from", str(stocked / "copy"))["message"]
    with loreg.open(stocked / "home") as registry, pytest.raises(loreg.errors.UsageError, match="--repair"):
        registry.fsck(sources=[stocked / "copy"])


def test_merge_then_unmerge_is_the_base(stocked):
    merged = done("merge", "--apply", "sql + 0.5*humor", "--out", "model")
    assert merged["out"] == "model" and merged["undo_bytes"] is None
    assert DIGEST.fullmatch(merged["recipe"]) and DIGEST.fullmatch(merged["weights_root"])
    assert merged["touched"] == sorted(f"{path}.weight" for path in paths())
    assert merged["verification"]["ok"] and merged["verification"]["kind"] == "probe"
    assert merged["seconds"] > 0 and merged["peak_rss_bytes"] > 1 << 20

    path = paths()[0]
    W, sql, humor = (
        load_file(stocked / name)
        for name in ("tiny/model.safetensors", "sql/adapter_model.safetensors", "humor/adapter_model.safetensors")
    )
    key = f"base_model.model.{path}.lora_"
    exact = W[f"{path}.weight"].astype(np.float64)
    exact += 2 * (sql[f"{key}B.weight"] @ sql[f"{key}A.weight"]) + humor[f"{key}B.weight"] @ humor[f"{key}A.weight"]
    found = load_file(stocked / "model" / "model.safetensors")[f"{path}.weight"]
    assert np.array_equal(found, exact.astype(np.float32))

    back = done("unmerge", "model", "--out", "back")
    root = done("base", "show", "tiny")["weights_root"]
    assert back == {"out": "back", "weights_root": root, "matches_base": True, "method": "base"}
    for file in (stocked / "tiny").iterdir():
        assert (stocked / "back" / file.name).read_bytes() == file.read_bytes()


def test_merge_passes_its_options_on(stocked):
    done("merge", "--apply", "sql", "--out", "a", "--dtype", "bfloat16", "--device", "cpu", "--verify", "exact")
    checked = done("merge", "--apply", "sql", "--out", "b", "--verify", "none", "--base", "tiny")["verification"]
    assert checked == {"ok": True, "kind": "none", "checks": []}
    size = [(stocked / out / "model.safetensors").stat().st_size for out in "ab"]
    assert size[0] < 0.75 * size[1]


def test_compose_reports_rank_and_error(stocked):
    both = done("compose", "--apply", "sql + humor", "--name", "both", "--tag", "x", "-m", "a note")
    assert (both["name"], both["version"], both["rank"], both["relative_error"]) == ("both", 1, 2 * RANK, 0)
    cut = done("compose", "--apply", "sql + humor", "--name", "cut", "--method", "svd", "--rank", "1")
    assert cut["rank"] == 1 and 0 < cut["relative_error"] < 1
    assert done("show", "both:x")["digest"] == both["digest"]
    one = done("merge", "--apply", "both", "--out", "one")["weights_root"]
    assert one == done("merge", "--apply", "sql+humor", "--out", "two")["weights_root"]


def test_verify_of_a_model_and_of_a_version(stocked):
    done("merge", "--apply", "sql", "--out", "model")
    for kind in ("probe", "exact"):
        result = done("verify", "model", "--kind", kind)
        assert result["ok"] and result["kind"] == kind
        assert all(check["ok"] and check["name"] and check["detail"] for check in result["checks"])
    stored = done("verify", "sql:prod")
    assert stored["ok"] and stored["kind"] == "blobs" and len(stored["checks"]) == 3


def test_preflight_says_which_form_an_engine_can_be_given(stocked):
    assert done("preflight", "sql", "--engine", "vllm") == {
        "engine": "vllm", "digest": done("show", "sql")["digest"], "ok": True, "form": "peft", "findings": [],
    }  # fmt: skip
    result = run("preflight", "sql", "--engine", "vllm", "--limit", "max_lora_rank=1", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (document["ok"], document["form"]) == (False, None)
    (finding,) = document["findings"]
    assert set(finding) == {"effect", "subject", "reason", "remedy", "folded"}
    assert (finding["effect"], finding["subject"], finding["folded"]) == ("refuses", "rank", False)


def test_preflight_tells_people_what_to_do(stocked):
    config = json.loads((stocked / "sql" / "adapter_config.json").read_text())
    (stocked / "sql" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    done("push", "sql", "--base", "tiny", "--name", "root")
    assert run("preflight", "sql", "--engine", "sglang").stdout == "ok: sglang can serve sql as it is\n"
    result = run("preflight", "root", "--engine", "sglang")
    verdict, what, remedy = result.stdout.splitlines()
    assert result.exit_code == 1 and verdict == "not ok: sglang can serve root in its folded form"
    assert what.startswith("- misreads use_rslora: ") and "would get 2," in what
    assert remedy.strip() == "serve its folded form ('loreg export --format folded')"
    result = run("preflight", "root", "--engine", "sglang", "--limit", "max_lora_rank=1")
    assert result.stdout.startswith("not ok: sglang cannot serve root\n")


def test_sync_brings_the_same_version_back(stocked, hub, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")

    def sync(*arguments: str) -> dict:
        result = python("import sys; from loreg.cli import main; main(sys.argv[1:])", "sync", *arguments, "--json")
        assert (result.returncode, result.stderr) == (0, "")  # the Hub's client would draw its own bars
        return json.loads(result.stdout)

    sent = sync("push", "sql", "hf://alice/sql-lora", "--private")
    assert hub.repos["alice/sql-lora"].private
    assert sent["commit"] in hub.repos["alice/sql-lora"].commits and sent["remote"] == "hf://alice/sql-lora"
    pulled = sync("pull", "fetched", f"hf://alice/sql-lora@{sent['commit']}")
    assert (pulled["name"], pulled["version"], pulled["created"]) == ("fetched", 1, True)
    assert pulled["digest"] == done("show", "sql")["digest"]


# Exit codes.


def test_1_a_check_says_no(stocked):
    done("merge", "--apply", "sql", "--out", "model")
    file = stocked / "model" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    result = run("verify", "model", "--json")
    assert result.exit_code == 1 and result.stderr == ""
    document = json.loads(result.stdout)
    assert not document["ok"] and any(not check["ok"] for check in document["checks"])
    plain = run("verify", "model")
    assert (
        plain.exit_code == 1 and plain.stdout.startswith("not ok: model, probe, ") and "\n- files: " in plain.stdout
    )


def test_1_an_error_that_nobody_foresaw_is_one_sentence(stocked, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "catalog.db")

    monkeypatch.setattr("loreg.registry.core.Registry.list_versions", broken)
    error = refused(1, "ls")
    assert error["type"] == "OSError" and "catalog.db: Input/output error" in error["message"]
    assert "--debug" in error["message"]
    shown = run("--debug", "ls").stderr
    assert "Traceback" in shown and shown.splitlines()[-1] == f"loreg: {error['message']}"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("mrege",), "did you mean 'merge'"),
        (("base", "ad"), "did you mean 'add'"),
        (("frobnicate",), "there are base, push"),
        (("--frobnicate",), "--frobnicate"),
        (("merge",), "--apply"),
        (("merge", "--apply", "sql", "--out", "x", "--verify", "maybe"), "maybe"),
        (("merge", "--apply", "sql humor", "--out", "x"), "expected '+'"),
        (("merge", "--apply", "sql", "--out", "x", "--device", "abacus"), "abacus"),
        (("ls", "--limit", "0"), "0"),
        (("show", "Sql"), "'Sql'"),
        (("tag", "sql", "v7"), "v7"),
        (("compose", "--apply", "sql", "--name", "x", "--method", "svd"), "neither rank nor energy"),
        (("sync", "pull", "sql", "alice/sql"), "hf://owner/name"),
        (("preflight", "sql"), "--engine"),
        (("preflight", "sql", "--engine", "vlm"), "expected one of vllm"),
        (("preflight", "sql", "--engine", "vllm", "--limit", "max_lora_rank"), "no limit such as"),
        (("preflight", "sql", "--engine", "vllm", "--limit", "a=1", "--limit", "a=2"), "second of its name"),
        (("preflight", "sql", "--engine", "peft", "--limit", "a=1"), "has none"),
    ],
)
def test_2_usage(stocked, arguments, says):
    error = refused(2, *arguments)
    assert error["type"] == "UsageError" and says in error["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("show", "sqk"),
        ("log", "sqk"),
        ("tag", "sql:v9", "prod"),
        ("export", "sql:nope", "--out", "x"),
        ("merge", "--apply", "sql+sqk", "--out", "x"),
        ("base", "show", "gpt2"),
        ("base", "add", "./nowhere"),
        ("push", "nowhere", "--base", "tiny"),
        ("unmerge", "nowhere", "--out", "x"),
        ("verify", "sqk"),
    ],
)
def test_3_not_found(stocked, arguments):
    assert refused(3, *arguments)["type"] == "NotFound"
    assert not (stocked / "x").exists()


def test_4_another_base(stocked):
    make_base(stocked / "cousin", seed=9)
    arguments = ("merge", "--apply", "sql", "--out", "model", "--base", "cousin")
    error = refused(4, *arguments)
    assert error["type"] == "BaseMismatch" and f"{paths()[0]}.weight" in error["message"]
    assert not (stocked / "model").exists()
    assert done(*arguments, "--allow-base-mismatch")["verification"]["ok"]


@pytest.mark.parametrize("victim", ["sql/adapter_model.safetensors", "tiny/model.safetensors"])
def test_5_truncated(here, victim):
    whole = (here / victim).read_bytes()
    (here / victim).write_bytes(whole[:-5])
    error = refused(5, "push", "sql", "--base", "tiny")
    assert error["type"] == "BadInput" and victim.partition("/")[2] in error["message"]
    assert done("ls") == {"adapters": []}


def test_5_a_catalog_that_is_none(here):
    (here / "home").mkdir()
    (here / "home" / "catalog.db").write_bytes(b"not a database " * 100)
    assert "catalog.db" in refused(5, "ls")["message"]


def test_6_somebody_was_here_first(stocked):
    (stocked / "model").mkdir()
    (stocked / "model" / "precious").write_text("mine")
    for command in (("merge", "--apply", "sql", "--out", "model"), ("export", "sql", "--out", "model")):
        assert refused(6, *command)["type"] == "Conflict"
    assert [path.name for path in (stocked / "model").iterdir()] == ["precious"]
    make_base(stocked / "cousin", seed=9)
    assert "tiny" in refused(6, "base", "add", "cousin", "--name", "tiny")["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("base", "add", "alice/gpt2"),
        ("sync", "push", "sql", "hf://alice/sql"),
        ("sync", "pull", "x", "hf://alice/sql"),
    ],
)
def test_7_no_network(stocked, hub, monkeypatch, arguments):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # the port of discard: nobody listens
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert refused(7, *arguments)["type"] == "RemoteError"


INTERRUPTED = """
import os, signal, sys, time
from loreg.cli import main
from loreg.cli.progress import ProgressBar
def stage(self, label, total):
    def advance(count):
        if label == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(2)
    return advance
ProgressBar.stage = stage
main(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", ["merging", "verifying"])
def test_130_control_c_leaves_nothing_behind(stocked, moment):
    before = sorted(stocked.rglob("*"))
    result = python(INTERRUPTED, moment, "merge", "--apply", "sql", "--out", "model", "--json")
    assert result.returncode == 130, result.stderr
    error = {"type": "Interrupted", "message": "interrupted", "exit_code": 130}
    assert json.loads(result.stdout) == {"error": error}
    assert result.stderr.strip() == "loreg: interrupted"
    assert sorted(stocked.rglob("*")) == before


# The streams.


def test_people_get_aligned_text_with_short_digests(stocked):
    listed = run("ls").stdout.splitlines()
    assert listed[0].split() == ["NAME", "VERSION", "BASE", "RANK", "TARGETS", "SIZE", "AGE"]
    assert listed[2].split()[:5] == ["sql", "v1", "tiny", "2", "q_proj,v_proj"]
    assert listed[0].index("BASE") == listed[2].index("tiny")
    for arguments in (
        ("base", "ls"),
        ("base", "show", "tiny"),
        ("show", "sql"),
        ("log", "sql"),
        ("merge", "--apply", "sql", "--out", "model"),
        ("unmerge", "model", "--out", "back"),
        ("verify", "model"),
        ("tag", "sql", "best"),
        ("compose", "--apply", "sql", "--name", "same"),
        ("push", "sql", "--base", "tiny"),
    ):
        result = run(*arguments)
        assert result.exit_code == 0 and result.stderr == "", result.output
        assert re.search(r"blake3:[0-9a-f]{12}\b", result.stdout) and not DIGEST.search(result.stdout)
        assert "\x1b" not in result.stdout


def test_a_merge_tells_people_what_was_checked(stocked):
    out = run("merge", "--apply", "sql", "--out", "model").stdout
    for name in ("out", "recipe", "weights_root", "touched", "verified", "took"):
        assert re.search(rf"^{name}  +\S", out, re.MULTILINE), name
    assert "4 of 5 tensors" in out and "+ touched: 4 tensors" in out and "B/s" in out


def test_an_empty_registry_says_so(here):
    assert "No adapter" in run("ls").stdout
    assert "loreg base add" in run("base", "ls").stdout


def test_colour_only_where_it_is_wanted(stocked, monkeypatch):
    assert "\x1b[1mNAME" in run("ls", color=True).stdout
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in run("ls", color=True).stdout
    assert "\x1b" not in run("show", "x", color=True).stderr


def test_control_characters_reach_no_terminal(stocked):
    done("push", "sql", "--base", "tiny", "--name", "evil", "-m", "a\x1b[2J\nb")
    for command in ("show", "log"):
        out = run(command, "evil").stdout
        assert "\x1b" not in out and r"a\x1b[2J" in out
    assert "\x1b" not in run("verify", "no\x1bthing").stderr


PROGRAM = [sys.executable, "-m", "loreg.cli"]
needs_a_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@pytest.mark.parametrize("option", ["--json", "--debug"])
def test_a_closed_pipe_is_no_news(stocked, option):
    command = [*PROGRAM, "ls", option]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@needs_a_full_disk
@pytest.mark.parametrize("arguments", [("ls",), ("show", "sql", "--json"), ("--help",)])
def test_a_full_disk_behind_stdout_is_told(stocked, arguments):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*PROGRAM, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False
        )
    assert result.returncode == 1
    assert result.stderr.startswith("loreg: ") and result.stderr.count("\n") == 1 and "No space" in result.stderr
    assert "free some space" in result.stderr and "unexpected" not in result.stderr


@needs_a_full_disk
def test_the_exit_code_is_right_where_nothing_can_be_said(stocked):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*PROGRAM, "show", "sqk", "--json"], stdout=full, stderr=full, env=environment(), check=False
        )
    assert result.returncode == 3
    command = ["sh", "-c", '"$@" >&- 2>&-', "sh", *PROGRAM]
    codes = [
        subprocess.run([*command, *arguments], env=environment(), check=False).returncode
        for arguments in (["ls"], ["show", "sqk", "--json"])
    ]
    assert codes == [0, 3]


BAR = """
import sys
import loreg.cli.progress as progress
progress.PATIENCE_S = float(sys.argv[1])
from loreg.cli import main
main(sys.argv[2:])
"""


def on_a_terminal(*arguments: str) -> tuple[str, str]:
    """Stdout, and what a terminal at stderr saw."""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", BAR, *arguments]
    seen = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment(), text=True) as process:
        os.close(theirs)
        with suppress(OSError):  # Linux reports the end of a terminal as EIO
            while piece := os.read(ours, 65536):
                seen += piece
        stdout = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, seen
    return stdout, seen.decode()


def test_a_bar_is_for_people_who_wait(stocked):
    merge = ("merge", "--apply", "sql", "--out")
    stdout, seen = on_a_terminal("0", *merge, "a")
    assert "merging" in seen and "verifying" in seen and stdout.startswith("out")
    assert on_a_terminal("60", *merge, "b")[1] == ""
    stdout, seen = on_a_terminal("0", *merge, "c", "--json")
    assert seen == "" and json.loads(stdout)["out"] == "c"


def test_a_bar_that_nobody_sees_is_never_made(monkeypatch):
    monkeypatch.setattr("loreg.cli.progress.PATIENCE_S", 0)
    with ProgressBar(shown=False) as bar:
        bar.stage("hashing", 0)(1 << 40)
    assert bar._bar is None


# Help, and what is imported for it.


@pytest.mark.parametrize("command", [(), *((name,) for name in ("base", "sync", "store")), *LEAVES], ids=" ".join)
def test_help_begins_with_a_sentence(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    paragraphs = [part.strip() for part in result.stdout.split("\n\n")]
    assert paragraphs[0].startswith("Usage: loreg") and re.fullmatch(r"[A-Z].*\.", paragraphs[1], re.DOTALL)
    if command not in (("base",), ("sync",), ("store",)):
        assert "--json" in result.stdout


def test_help_shows_every_command_with_a_whole_sentence(here):
    shown = run("--help").stdout
    for section, commands in SECTIONS.items():
        assert f"\n{section}:\n" in shown
        for name in commands:
            assert re.search(rf"^  {name} +[A-Z].*[^.]\.$", shown, re.MULTILINE), name
    assert run().stdout == shown and not (here / "home").exists()
    for absent in ("compare",):
        assert absent not in COMMANDS


def test_version():
    assert run("--version").stdout == f"loreg {loreg.__version__}\n"


def test_options_of_the_program_may_stand_before_or_after_the_command(stocked, tmp_path):
    assert json.loads(run("--json", "ls").stdout) == done("ls")
    other = str(tmp_path / "other")
    assert done("--home", other, "ls") == done("ls", "--home", other) == {"adapters": []}


IMPORTS = """
import sys
from loreg.cli import main
for line in sys.argv[1:]:
    try:
        main(line.split())
    except SystemExit as end:
        assert not end.code, (line, end.code)
    heavy = {"torch", "sqlalchemy", "rich", "huggingface_hub", "numpy", "alembic"}
    print(line, *sorted(heavy & set(sys.modules)), sep=",", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("commands", "allowed"),
    [
        (["--help", "--version", "base --help", "merge --help", "sync push --help"], set()),
        (["base add tiny", "base ls", "ls", "show sql", "log sql", "tag sql best"], {"sqlalchemy"}),
        (["push sql --base tiny --name other"], {"sqlalchemy", "numpy"}),
        (["export sql --out given", "preflight sql --engine vllm"], {"sqlalchemy", "numpy"}),
    ],
)
def test_nothing_heavy_is_imported_without_need(stocked, commands, allowed):
    result = python(IMPORTS, *commands)
    assert result.returncode == 0, result.stderr
    lines = [line.split(",") for line in result.stderr.splitlines()]
    assert [line[0] for line in lines] == commands
    for command, *loaded in lines:
        assert set(loaded) <= allowed, command


# Values as people read them.


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9949, "9.9 kB"), (9950, "10 kB"), (999_499, "999 kB")),
        *((999_500, "1.0 MB"), (1.2e9, "1.2 GB"), (5e15, "5000 TB")),
    ],
)
def test_sizes(count, shown):
    assert text.size(count) == shown


@pytest.mark.parametrize(
    ("ago", "shown"),
    [
        (timedelta(seconds=-5), "now"),
        (timedelta(seconds=59), "now"),
        (timedelta(minutes=5), "5 min"),
        (timedelta(hours=47), "1 d"),
        (timedelta(days=29), "4 w"),
        (timedelta(days=400), "1 y"),
    ],
)
def test_ages(ago, shown):
    now = datetime(2025, 1, 1, tzinfo=UTC)
    assert text.age(now - ago, now) == shown


@given(st.text())
def test_legible_text_is_printable_and_plain_text_is_left_alone(given):
    assert text.legible(given).isprintable()
    if given.isprintable():
        assert text.legible(given) == given


@pytest.mark.parametrize("columns", [40, 60, 200])
def test_a_table_fits_a_terminal_and_is_whole_elsewhere(monkeypatch, columns):
    rows = [("sql", "q_proj," * 10, "1 kB"), ("a-longer-name", "v_proj", "12 kB")]
    whole = text.table(("NAME", "TARGETS", "SIZE"), rows, right=(2,), give=1)
    assert "q_proj," * 10 in whole and "…" not in whole
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = re.sub(r"\x1b\[\d*m", "", text.table(("NAME", "TARGETS", "SIZE"), rows, right=(2,), give=1)).splitlines()
    assert max(map(len, lines)) <= columns
    assert ("…" in lines[1]) == (columns < 100)
    assert {line.rstrip()[-2:] for line in lines} == {"ZE", "kB"}
    assert len({len(line) for line in lines}) == 1
