"""What each engine can be told over HTTP, from its own source.

| engine | loads by name | swaps | unloads | read in |
| --- | --- | --- | --- | --- |
| vLLM 0.32.0 | yes | in place | yes | ``vllm/entrypoints/serve/lora`` |
| SGLang 0.5.23 | yes | out and in | yes | ``sglang/srt/entrypoints/http_server.py`` |
| LoRAX | with a request, by path | another path | no | ``router/src/server.rs``, ``loader.rs`` |
| TensorRT-LLM | with a request, by number | another number | no | ``tensorrt_llm/serve/openai_protocol.py`` |
| llama.cpp 0.5.0 (2026) | files of its start, by their digests | scales | scales | ``tools/server`` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal

from loreg.digest import Digest
from loreg.errors import NotFound, RemoteError, Unsupported
from loreg.serving.calling import Again
from loreg.serving.telling import Adapter, Named, Speaker

_DIGITS = 12
"""Of a digest, at least, that a file's name has to have: as many as people are shown."""
_SHOWN = 8
"""Files that a message names."""
_WORD = "a"
"""A prompt: of one token or two, whatever the tokeniser."""


class VLLM(Named):
    """``vllm/entrypoints/openai/models/serving.py``: an engine that refuses a load keeps what it had.

    Before 0.31 the KV cache tells adapters apart by their names alone: of what is swapped it would go on with blocks
    that were computed with the old weights.
    """

    engine = "vllm"
    _SWAPS = (0, 31)
    _WITHOUT = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"

    def bring(self, adapter: Adapter, before: str | None) -> None:
        if before is not None:
            self._require_swaps(adapter)
        body = {"lora_name": adapter.name, "lora_path": adapter.path, "load_inplace": before is not None}
        if adapter.stacked:
            body["is_3d_lora_weight"] = True
        self.tell("/v1/load_lora_adapter", body, self._WITHOUT)

    def _require_swaps(self, adapter: Adapter) -> None:
        found = self.server.call("/version").json()
        said = str(found.get("version")) if isinstance(found, dict) else ""
        number = re.match(r"(\d+)\.(\d+)\.\d+", said)  # not of a build from source
        if number is not None and (int(number[1]), int(number[2])) < self._SWAPS:
            raise Unsupported(
                f"{self.server.shown} runs vLLM {said}, which would answer from what its KV cache holds for the old "
                f"{adapter.name!r}: expected 0.31 or later; load it under another name, as with --name."
            )

    def drop(self, adapter: Adapter) -> None:
        self.tell("/v1/unload_lora_adapter", {"lora_name": adapter.name}, self._WITHOUT)


class SGLang(Named):
    """``sglang/srt/managers/tokenizer_control_mixin.py`` and ``tokenizer_manager.py``: a name is loaded once, and
    unloaded when no request uses it any more.

    It remembers the path of each name that was ever loaded: a request for one that is unloaded loads that again
    (``_resolve_lora_path``). Those that come while an unload waits for others stand in line behind it, as does a
    load: so the load is sent while the unload waits, to be before them. They are answered by the new version then.
    """

    engine = "sglang"
    RETURNED = "a request that names it loads it again: have none name it any more"
    _AHEAD = 0.1
    """Seconds for which an unload is waited for until the load is sent after it."""
    _BACK = "because it is already loaded"
    """By these words SGLang itself knows that refusal."""

    def request(self, adapter: Adapter) -> Mapping[str, Any]:
        """By the name alone, in ``model``, a request would be answered by the base (``_parse_model_parameter``)."""
        return {"lora_path": adapter.name}

    def bring(self, adapter: Adapter, before: str | None) -> None:
        while before != adapter.path and not self._replace(adapter, before):
            before = self.held(adapter)

    def _replace(self, adapter: Adapter, before: str | None) -> bool:
        """Out with what is there, and in with the new one; False if a request has the old one loaded again."""
        with ThreadPoolExecutor(1) as beside:
            gone = beside.submit(self.drop, adapter) if before is not None else None
            if gone is not None and wait([gone], self._AHEAD).done:
                gone.result()
            try:
                self._bring(adapter.name, adapter.path)
            except RemoteError as refusal:
                if gone is not None:
                    gone.result()
                if self._BACK in str(refusal):
                    return False
                self._return(adapter, refusal)
                raise
        return True

    def _return(self, adapter: Adapter, refusal: RemoteError) -> None:
        """What was there before, if anything was, and no request had it loaded already."""
        if self.former is None:
            return
        try:
            self._bring(adapter.name, self.former)
        except (RemoteError, Again) as error:
            if self._BACK not in str(error):
                raise RemoteError(f"{refusal} Nor is what it had there again: {error}") from refusal

    def _bring(self, name: str, path: str) -> None:
        self._succeed("/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def drop(self, adapter: Adapter) -> None:
        self._succeed("/unload_lora_adapter", {"lora_name": adapter.name})

    def _succeed(self, path: str, body: Mapping[str, Any]) -> None:
        answer = self.tell(path, body, "start it with --enable-lora, in a version that loads adapters while it runs")
        found = answer.json()
        if not isinstance(found, dict) or found.get("success") is not True:
            raise self.server.refusal(path, answer, "expected success")


class _ByRequest(Speaker):
    """Engines that know no names: each request says where the adapter is, and the first one loads it."""

    replaces = False

    def unload(self, adapter: Adapter) -> Literal["unloaded", "absent"]:
        raise Unsupported(
            f"{self.engine} cannot be told to unload an adapter: it lets go of those that no request names, when "
            "it needs the room. Have no request name it any more."
        )


class LoRAX(_ByRequest):
    """``router/src/server.rs``, ``loader.rs`` and ``server/lorax_server/utils/sources/local.py`` of predibase/lorax:
    an absolute path is an adapter's id if the source is ``local``. A load that failed is an error of its request."""

    engine = "lorax"

    def require(self, *, unload: bool, named: bool) -> None:
        if named:
            raise Unsupported("LoRAX knows an adapter by its path, and by no name: leave --name out.")

    def load(self, adapter: Adapter) -> Literal["loaded", "replaced", "present"]:
        path, parameters = "/generate", self.request(adapter)["parameters"]
        answer = self.tell(path, {"inputs": _WORD, "parameters": {**parameters, "max_new_tokens": 1}})
        if (said := answer.headers.get("x-adapter-id")) != adapter.path:
            raise RemoteError(
                f"{self.server.shown} generated without the adapter: expected it to name {adapter.path}, found "
                f"{said or 'none'}; see whether LoRAX runs there."
            )
        return "loaded"

    def request(self, adapter: Adapter) -> Mapping[str, Any]:
        return {"parameters": {"adapter_id": adapter.path, "adapter_source": "local"}}


class TensorRTLLM(_ByRequest):
    """``LoRARequest`` in ``tensorrt_llm/executor/request.py``, a field of the requests to ``trtllm-serve``. What is
    loaded is cached by its number, an unsigned integer of 64 bits (``LoraTaskIdType``), whatever the path: two
    versions under one number would be one. So the number is taken from the digest."""

    engine = "tensorrt-llm"

    def load(self, adapter: Adapter) -> Literal["loaded", "replaced", "present"]:
        model = next(iter(self.models()), None)
        if model is None:
            raise RemoteError(f"{self.server.shown} serves no model: expected the one that it was started with.")
        body = {"model": model, "prompt": _WORD, "max_tokens": 1, **self.request(adapter)}
        answer = self.tell("/v1/completions", body)
        found = answer.json()
        if not isinstance(found, dict) or not found.get("choices"):
            raise self.server.refusal("/v1/completions", answer, "expected a completion")
        return "loaded"

    def request(self, adapter: Adapter) -> Mapping[str, Any]:
        number = int(Digest.parse(adapter.digest).hex[:13], 16)  # 52 bits: JSON's integers are doubles to many
        return {"lora_request": {"lora_name": adapter.name, "lora_int_id": number, "lora_path": adapter.path}}


@dataclass(frozen=True, slots=True)
class _Listed:
    """A LoRA of llama.cpp's: a GGUF file of its start, and the scale that it has where a request says none."""

    id: int
    path: str
    scale: float

    def is_of(self, digest: Digest, *, folded: bool = False) -> bool:
        """Whether the file is of this version, by its name: the name of the file, without ``.gguf``, or of a
        directory of its path, has among its parts, between ``-``, ``_``, ``.``, ``@`` or ``:``, the digest's 64 hex
        digits, or the first of them, twelve at least. ``folded``: and, after them, ``folded``."""
        for name in re.split(r"[/\\]", self.path):
            parts = re.split(r"[-_.@:]", name)
            for place, part in enumerate(parts):
                if len(part) >= _DIGITS and digest.hex.startswith(part):
                    return not folded or "folded" in parts[place:]
        return False


class LlamaCpp(Speaker):
    """``tools/server`` of ggml-org/llama.cpp. It loads GGUF files when it starts, and no others: ``/lora-adapters``
    lists them and sets their scales. Which is of which version, the digest in its name says, and only that.

    What is found of the server itself, and not of its README (``tests/engines/test_llama_cpp.py``): a POST sets the
    scale of each that it does not name to 0, and says nothing of an id that there is not. Scales that were set this
    way throw away nothing of what was computed under others: a prompt that begins as an earlier one did goes on from
    that (``launch_slot_with_task``), so a server that reuses prompts is refused. ``--lora-init-without-apply`` leaves
    all scales at 1; ``--lora-scaled FILE:0`` is what begins with 0.
    """

    engine = "llama.cpp"
    reads = False
    _PATH = "/lora-adapters"
    _PROMPT = "a b c d e f"
    _begun = _replaces = False
    _found: _Listed | None = None

    def require(self, *, unload: bool, named: bool) -> None:
        if named:
            raise Unsupported("llama.cpp knows an adapter by its file, and by no name: leave --name out.")

    def load(self, adapter: Adapter) -> Literal["loaded", "replaced", "present"]:
        listed = self._listed()
        digest = Digest.parse(adapter.digest)
        self._found = found = next((x for x in listed if x.is_of(digest, folded=adapter.form == "folded")), None)
        if found is None:
            raise NotFound(self._how(adapter, digest, listed))
        others = {x.id for x in listed if x.scale and any(map(x.is_of, adapter.versions))} - {found.id}
        if not self._begun:
            self._replaces = bool(others)
        if found.scale == 1 and not others:
            if not self._begun:
                return "present"
        else:
            self._set(listed, dict.fromkeys(others, 0.0) | {found.id: 1.0})
        return "replaced" if self._replaces else "loaded"

    def unload(self, adapter: Adapter) -> Literal["unloaded", "absent"]:
        listed = self._listed()
        there = {x.id: 0.0 for x in listed if x.scale and any(map(x.is_of, adapter.versions))}
        if there:
            self._set(listed, there)
        return "unloaded" if there or self._begun else "absent"

    def request(self, adapter: Adapter) -> Mapping[str, Any]:
        return {"lora": [{"id": self._found.id, "scale": 1.0}]} if self._found else {}

    def place(self, adapter: Adapter) -> str:
        return self._found.path if self._found else ""

    def _set(self, listed: list[_Listed], changed: dict[int, float]) -> None:
        """These scales, and all others as they are."""
        self._require_fresh()
        self._begun = True
        wanted = {x.id: x.scale for x in listed} | changed
        self.tell(self._PATH, [{"id": number, "scale": scale} for number, scale in wanted.items()])
        now = {x.id: x.scale for x in self._listed()}
        if now != wanted:
            raise RemoteError(
                f"{self.server.shown} said that it has set its scales: expected {wanted}, found {now}; somebody else "
                "may set them too."
            )

    def _require_fresh(self) -> None:
        """That it begins each prompt anew. Asked twice, in the same slot, it says how much it had of it the second
        time; ``/props`` does not tell."""
        body = {"prompt": self._PROMPT, "n_predict": 0, "id_slot": 0}
        for _ in range(2):
            answer = self.server.call("/completion", body)
            found = answer.json()
            reused = found["timings"].get("cache_n") if isinstance(found, dict) and "timings" in found else None
            if answer.status != 200 or type(reused) is not int:
                raise self.server.refusal(
                    "/completion", answer, "expected it to say in timings.cache_n what it reuses"
                )
        if reused:
            raise Unsupported(
                f"{self.server.shown} reuses what it has computed of a prompt also when scales change: expected one "
                "that does not, or it answers from the adapter that it had; start it with --no-cache-prompt."
            )

    def _listed(self) -> list[_Listed]:
        answer = self.server.call(self._PATH)
        found = answer.json()
        if answer.status == 200 and isinstance(found, list):
            try:
                return [_Listed(int(each["id"]), str(each["path"]), float(each["scale"])) for each in found]
            except (TypeError, KeyError, ValueError):
                pass
        raise self.server.refusal(self._PATH, answer, "expected the LoRA files that llama.cpp was started with")

    def _how(self, adapter: Adapter, digest: Digest, listed: list[_Listed]) -> str:
        folded = "-folded" if adapter.form == "folded" else ""
        name = f"{adapter.name.replace('/', '-')}-{digest.short}{folded}"
        shown = ", ".join(x.path for x in listed[:_SHOWN]) + (" and more" if len(listed) > _SHOWN else "")
        return (
            f"{self.server.shown} was started without {adapter.name}: expected a LoRA file with "
            f"{digest.short}{folded} in its name, found {shown or 'none'}; make it with `loreg export "
            f"blake3:{digest.short} --format {adapter.form} --out {name}` and `python convert_lora_to_gguf.py {name} "
            f"--base BASE --outfile {name}.gguf`, and start the server with `--lora-scaled {name}.gguf:0 "
            "--no-cache-prompt`."
        )


SPEAKERS: dict[str, type[Speaker]] = {
    speaker.engine: speaker for speaker in (VLLM, SGLang, LoRAX, TensorRTLLM, LlamaCpp)
}
