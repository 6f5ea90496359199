"""``loreg serve-push`` and a real vLLM server without loreg in it: what it serves is what ``loreg merge`` makes of a
version, also after a swap, whatever its KV cache held."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm.entrypoints.openai.models.serving", reason="vLLM is not installed: make test-vllm")

import vllm_server

import loreg
from loreg import serving
from loreg.errors import Conflict, RemoteError, Unsupported

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

BOUND = 1e-4
"""Between logarithms of probabilities, in nats: see ``test_vllm_server.py``."""


def test_a_server_is_told_what_to_serve(tmp_path: Path) -> None:
    base = vllm_server.write_base(tmp_path / "base")
    with loreg.open(tmp_path / "home") as registry:
        registry.add_base(base, "tiny")
        for seed in (1, 2):
            registry.push(vllm_server.write_adapter(tmp_path / f"a{seed}", seed, alpha=8), base="tiny", name="sql")
            registry.merge(f"sql:v{seed}", tmp_path / f"merged{seed}")
        wide = dict.fromkeys(("q_proj", "v_proj", "gate_proj", "down_proj"), 16)
        registry.push(vllm_server.write_adapter(tmp_path / "w", 5, ranks=wide, r=16), base="tiny", name="wide")
        one, two = vllm_server.answers([tmp_path / "merged1", tmp_path / "merged2"])
        assert one.distance(two) > BOUND
        options = ("--enable-lora", "--max-lora-rank", "8", "--enable-prefix-caching")
        given = {"VLLM_PLUGINS": "", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
        with vllm_server.serving(base, tmp_path, *options, **given) as server:
            url = f"http://127.0.0.1:{server.port}"

            def push(reference: str, **more: object) -> serving.Pushed:
                return serving.push(reference, "vllm", url, registry, max_lora_rank=8, **more)

            assert push("sql:v1").action == "loaded"
            assert push("sql:v1").action == "present"
            assert server.ask("sql").distance(one) <= BOUND
            assert push("sql:v2").action == "replaced"
            assert server.ask("sql").distance(two) <= BOUND  # the same prompt, of which the cache holds the old one
            assert push("sql:v1", name="team/old").action == "loaded"
            assert server.ask("team/old").distance(one) <= BOUND
            assert server.ask("sql").distance(two) <= BOUND
            with pytest.raises(Unsupported, match="rank"):
                push("wide")
            with pytest.raises(RemoteError, match=r"answered \d+: .*rank"):  # in vLLM's words
                serving.push("wide", "vllm", url, registry, max_lora_rank=16, name="sql")
            assert server.ask("sql").distance(two) <= BOUND
            with pytest.raises(Conflict, match="base model"):
                push("sql:v1", name=str(base))
            assert push("sql", unload=True).action == "unloaded"
            assert push("sql", unload=True).action == "absent"
            assert server.complete("sql")[0] == 404
            assert server.ask("team/old").distance(one) <= BOUND
