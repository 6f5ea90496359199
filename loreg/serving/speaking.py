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
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from loreg.digest import Digest
from loreg.errors import Conflict, NotFound, RemoteError, Unsupported
from loreg.serving.calling import Again, Answer, Server

_DIGITS = 12
"""Of a digest, at least, that a file's name has to have: as many as people are shown."""
_SHOWN = 8
"""Files that a message names."""
_WORD = "a"
"""A prompt: of one token or two, whatever the tokeniser."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an engine is told: a name, and the path of a directory. ``digest``: of the version. ``stacked``, ``form``:
    as of ``Preflight``. ``versions``: the digests of all that have the name."""

    name: str
    path: str
    digest: str
    stacked: bool = False
    form: str = "peft"
    versions: Collection[Digest] = ()


class Speaker:
    """One engine at one address. ``load`` and ``unload`` begin by looking what it has: they can be called again."""

    engine: ClassVar[str]
    reads: ClassVar[bool] = True
    """Whether it is told of a directory, where it may read at any time."""
    replaces: ClassVar[bool] = True
    """Whether what is loaded under a name takes the place of what was under it: so no request uses that any more."""

    def __init__(self, server: Server) -> None:
        self.server = server

    def require(self, *, unload: bool, named: bool) -> None:
        """Raises Unsupported for what the engine cannot be told at all."""

    def load(self, adapter: Adapter) -> Literal["loaded", "replaced", "present"]:
        raise NotImplementedError

    def unload(self, adapter: Adapter) -> Literal["unloaded", "absent"]:
        raise NotImplementedError

    def request(self, adapter: Adapter) -> Mapping[str, Any]:
        """The fields of a request by which it uses the adapter."""
        return {"model": adapter.name}

    def place(self, adapter: Adapter) -> str:
        """The path of what it has of the adapter."""
        return adapter.path

    def may_have(self, adapter: Adapter) -> bool:
        """After an error: whether the engine may have been given the directory all the same."""
        return self.server.lost

    def models(self) -> dict[str, dict[str, Any]]:
        """What ``/v1/models`` lists, by id."""
        path = "/v1/models"
        answer = self.server.call(path)
        found = answer.json()
        listed = found.get("data") if isinstance(found, dict) else None
        if answer.status != 200 or not isinstance(listed, list):
            raise self.server.refusal(path, answer, f"expected the models that {self.engine} serves")
        return {str(model["id"]): model for model in listed if isinstance(model, dict) and "id" in model}

    def tell(self, path: str, body: Mapping[str, Any] | list[Any], without: str = "") -> Answer:
        """``without``: what to do about an engine that has no such path."""
        answer = self.server.call(path, body)
        if answer.status == 200:
            return answer
        # FastAPI's answer to a path that is none; one of the engine's own has more to say.
        nowhere = answer.status == 405 or (answer.status == 404 and answer.said in ("Not Found", ""))
        raise self.server.refusal(path, answer, without if nowhere else "")


class _Named(Speaker):
    """Engines that hold adapters under names. ``former``: the path that was under the name when it was first looked
    at; ``begun``: whether anything was asked for since, the answer to which may have been lost."""

    former: str | None = None
    begun = False

    def held(self, adapter: Adapter) -> str | None:
        """The path that the engine has under that name."""
        model = self.models().get(adapter.name)
        if model is None:
            return None
        if model.get("parent") is None:
            raise Conflict(
                f"{self.server.shown} serves its base model as {adapter.name!r}: give the adapter another name, as "
                "with --name."
            )
        return str(model.get("root"))

    def load(self, adapter: Adapter) -> Literal["loaded", "replaced", "present"]:
        before = self.held(adapter)
        if not self.begun:
            self.former = before
            if before == adapter.path:
                return "present"
        self.begun = True
        if before != adapter.path:
            self.bring(adapter, before)
        if (now := self.held(adapter)) != adapter.path:
            raise RemoteError(
                f"{self.server.shown} said that it has loaded {adapter.name!r}: expected it to list {adapter.path}, "
                f"found {now or 'no such model'}; somebody else may load another version under this name."
            )
        return "loaded" if self.former is None else "replaced"

    def unload(self, adapter: Adapter) -> Literal["unloaded", "absent"]:
        there = self.held(adapter) is not None
        if not there and not self.begun:
            return "absent"
        self.begun = True
        if there:
            self.drop(adapter)
        if self.held(adapter) is not None:
            raise RemoteError(
                f"{self.server.shown} said that it has unloaded {adapter.name!r}, and still lists it; somebody else "
                "may have loaded it again."
            )
        return "unloaded"

    def may_have(self, adapter: Adapter) -> bool:
        if not self.begun:
            return False
        try:
            return self.held(adapter) == adapter.path
        except Conflict:
            return False
        except (Again, RemoteError):
            return self.server.lost

    def bring(self, adapter: Adapter, before: str | None) -> None:
        raise NotImplementedError

    def drop(self, adapter: Adapter) -> None:
        raise NotImplementedError


class VLLM(_Named):
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


class SGLang(_Named):
    """``sglang/srt/managers/tokenizer_control_mixin.py``: a name is loaded once, and unloaded when no request uses
    it any more; requests that come for it meanwhile are refused."""

    engine = "sglang"

    def bring(self, adapter: Adapter, before: str | None) -> None:
        if before is not None:
            self.drop(adapter)
        try:
            self._bring(adapter.name, adapter.path)
        except RemoteError as refusal:
            if self.former is not None:
                try:
                    self._bring(adapter.name, self.former)
                except (RemoteError, Again) as error:
                    raise RemoteError(f"{refusal} Nor is what it had there again: {error}") from refusal
            raise

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
