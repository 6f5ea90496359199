"""Engines' HTTP interfaces, as strict as the engines: what is refused, in which words and with which status, follows
their source, which each class names. No model runs behind them; what is loaded is a directory that was looked at.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Reply = tuple[int, Any, dict[str, str]]
BASE = "tiny-base"


class Refused(Exception):
    def __init__(self, status: int, body: Any) -> None:
        self.status, self.body = status, body


class Engine:
    """``asked``: every request that it got. ``faults``: what it does to the next requests instead of answering, or
    beside it: a status, ``drop`` (nothing is done), ``lost`` (it is done, and the answer is lost),
    ``hang``, or ``drip`` (an answer that has no end, a byte at a time)."""

    key: str | None = None
    most = 16

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.faults: list[int | str] = []
        self.held: dict[str, str] = {}
        self.url = ""

    def get(self, path: str) -> Reply:
        if path != "/v1/models":
            return self.nowhere()
        cards = [{"id": BASE, "object": "model", "root": "/models/base", "parent": None}]
        cards += [{"id": name, "object": "model", "root": at, "parent": BASE} for name, at in self.held.items()]
        return 200, {"object": "list", "data": cards}, {}

    def post(self, path: str, body: Any, headers: Any) -> Reply:
        raise NotImplementedError

    def nowhere(self) -> Reply:
        return 404, {"detail": "Not Found"}, {}  # Starlette's

    def require(self, body: dict[str, Any], **types: type) -> None:
        for field, kind in types.items():
            if type(body.get(field)) is not kind:
                raise Refused(422, {"detail": [{"loc": ["body", field], "msg": "Field required", "type": "missing"}]})

    def problem(self, path: str) -> str | None:
        """What an engine says of a directory that is no adapter, or one that is too large for how it was started."""
        file = Path(path) / "adapter_config.json"
        if not file.is_file() or not (Path(path) / "adapter_model.safetensors").is_file():
            return f"No adapter found for {path}"
        rank = json.loads(file.read_text())["r"]
        return f"LoRA rank {rank} is greater than max_lora_rank {self.most}." if rank > self.most else None


class VLLM(Engine):
    """``vllm/entrypoints/serve/lora`` and ``vllm/entrypoints/openai/models/serving.py`` of vLLM 0.32.0."""

    updating = True
    version = "0.32.0"

    def get(self, path: str) -> Reply:
        return (200, {"version": self.version}, {}) if path == "/version" else super().get(path)

    def post(self, path: str, body: dict[str, Any], headers: Any) -> Reply:
        if not self.updating or path not in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            return self.nowhere()
        self.require(body, lora_name=str)
        name = body["lora_name"]
        if path == "/v1/unload_lora_adapter":
            if name not in self.held:
                self.refuse(404, "NotFoundError", f"The lora adapter '{name}' cannot be found.")
            del self.held[name]
            return 200, f"Success: LoRA adapter '{name}' removed successfully.", {}
        self.require(body, lora_path=str)
        if name == BASE:
            self.refuse(400, "InvalidUserInput", f"The lora adapter '{name}' conflicts with a served base model.")
        if name in self.held and body.get("load_inplace") is not True:
            self.refuse(400, "InvalidUserInput", f"The lora adapter '{name}' has already been loaded.")
        if problem := self.problem(body["lora_path"]):
            missing = problem.startswith("No adapter")
            self.refuse(404 if missing else 500, "NotFoundError" if missing else "InternalServerError", problem)
        self.held[name] = body["lora_path"]
        return 200, f"Success: LoRA adapter '{name}' added successfully.", {}

    def refuse(self, status: int, kind: str, message: str) -> None:
        raise Refused(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})


class SGLang(Engine):
    """``entrypoints/http_server.py``, ``managers/tokenizer_control_mixin.py``, ``managers/tokenizer_manager.py``,
    ``lora/lora_manager.py`` and ``lora/lora_registry.py`` in ``sglang/srt`` of SGLang 0.5.23, and what a server of it
    answered (``tests/engines/test_sglang_server.py``).

    ``drain``: seconds for which an unload waits for requests that run.
    """

    enabled = True
    drain = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.remembered: dict[str, str] = {}
        self.line, self.turn, self.moved = 0, 0, threading.Condition()

    @contextmanager
    def in_line(self) -> Iterator[None]:
        """``lora_update_lock``, which is had in the order in which it was asked for."""
        with self.moved:
            mine, self.line = self.line, self.line + 1
            self.moved.wait_for(lambda: self.turn == mine)
        try:
            yield
        finally:
            with self.moved:
                self.turn += 1
                self.moved.notify_all()

    def use(self, name: str) -> str | None:
        """The path by which a request for the adapter is answered: what was unloaded is loaded again."""
        if name not in self.held and name in self.remembered:
            path = self.remembered[name]
            with suppress(Refused):
                self.load(name, path)
        return self.held.get(name)

    def load(self, name: str, path: str) -> None:
        with self.in_line():
            if name in self.held:
                self.refuse(f"Failed to load LoRA adapter {name} because it is already loaded")
            if problem := self.problem(path):
                self.refuse(problem)
            self.held[name] = self.remembered[name] = path

    def post(self, path: str, body: dict[str, Any], headers: Any) -> Reply:
        if path not in ("/load_lora_adapter", "/unload_lora_adapter"):
            return self.nowhere()
        self.require(body, lora_name=str)
        name = body["lora_name"]
        if path == "/load_lora_adapter":
            self.require(body, lora_path=str)
        if not self.enabled:
            self.refuse("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
        if path == "/load_lora_adapter":
            self.load(name, body["lora_path"])
            return self.done()
        with self.in_line():
            if self.held.pop(name, None) is None:
                self.refuse(f"LoRA with name {name} does not exist. Loaded LoRAs: odict_{self.held.keys()}")
            time.sleep(self.drain)
        return self.done()

    def require(self, body: dict[str, Any], **types: type) -> None:
        try:
            super().require(body, **types)
        except Refused as error:
            said = f"1 validation error:\n  {error.body['detail'][0]}"
            raise Refused(400, {"object": "error", "message": said, "type": "Bad Request", "code": 400}) from None

    def done(self) -> Reply:
        return 200, self.result(True, "", dict(self.held)), {}

    def refuse(self, message: str) -> None:
        raise Refused(400, self.result(False, message, None))

    def result(self, success: bool, message: str, loaded: dict[str, str] | None) -> dict[str, Any]:
        fields = {"success": success, "error_message": message, "loaded_adapters": loaded}
        return {"rid": None, "http_worker_ipc": None, **fields}


class LoRAX(Engine):
    """``router/src/server.rs`` and ``server/lorax_server/utils/sources/local.py`` of predibase/lorax."""

    def get(self, path: str) -> Reply:
        return (200, {"model_id": BASE}, {}) if path == "/info" else (404, "", {})

    def post(self, path: str, body: dict[str, Any], headers: Any) -> Reply:
        if path != "/generate":
            return 404, "", {}
        self.require(body, inputs=str, parameters=dict)
        given = body["parameters"]
        if not body["inputs"] or given.get("max_new_tokens", 1) < 1:
            raise Refused(422, {"error": "Input validation error", "error_type": "validation"})
        said = {"x-model-id": BASE}
        if adapter := given.get("adapter_id"):
            if given.get("adapter_source", "hub") != "local":
                raise Refused(
                    424, {"error": f"Request failed during generation: {adapter}", "error_type": "generation"}
                )
            if problem := self.problem(adapter):
                raise Refused(424, {"error": f"Request failed: {problem}", "error_type": "generation"})
            self.held[adapter] = adapter
            said |= {"x-adapter-id": adapter, "x-adapter-source": "local"}
        return 200, {"generated_text": "b", "details": None}, said


class TensorRTLLM(Engine):
    """``CompletionRequest`` in ``tensorrt_llm/serve/openai_protocol.py`` and ``LoRARequest`` in
    ``tensorrt_llm/executor/request.py``. What is loaded stays under its number, as in its ``LoraCache``."""

    def __init__(self) -> None:
        super().__init__()
        self.cached: dict[int, str] = {}

    def get(self, path: str) -> Reply:
        return (
            (200, {"object": "list", "data": [{"id": BASE, "object": "model"}]}, {})
            if path == "/v1/models"
            else self.nowhere()
        )

    def post(self, path: str, body: dict[str, Any], headers: Any) -> Reply:
        if path != "/v1/completions":
            return self.nowhere()
        self.require(body, model=str, prompt=str)
        if (asked := body.get("lora_request")) is not None:
            self.require(asked, lora_name=str, lora_int_id=int, lora_path=str)
            if not 0 <= asked["lora_int_id"] < 2**64 or not Path(asked["lora_path"]).exists():
                raise Refused(
                    400, {"object": "error", "message": f"lora_path ({asked['lora_path']}) does not exist."}
                )
            if problem := self.problem(asked["lora_path"]):
                raise Refused(400, {"object": "error", "message": problem, "type": "BadRequestError", "code": 400})
            self.cached.setdefault(asked["lora_int_id"], asked["lora_path"])
        return 200, {"model": body["model"], "choices": [{"index": 0, "text": "b"}]}, {}


class LlamaCpp(Engine):
    """``server-context.cpp`` and ``server-common.cpp`` in ``tools/server`` of llama.cpp 0.5.0, as
    ``tests/engines/test_llama_cpp.py`` has found the real one to be."""

    reuses = False

    def __init__(self, *files: str) -> None:
        super().__init__()
        self.files, self.scales = files, [0.0] * len(files)
        self.computed: list[str] = []

    def get(self, path: str) -> Reply:
        if path != "/lora-adapters":
            return self.nowhere()
        found = zip(self.files, self.scales, strict=True)
        shown = [{"id": n, "path": at, "scale": scale} for n, (at, scale) in enumerate(found)]
        return 200, [{**each, "task_name": "", "prompt_prefix": ""} for each in shown], {}

    def post(self, path: str, body: Any, headers: Any) -> Reply:
        if path == "/completion":
            self.require(body, prompt=str)
            tokens = len(body["prompt"].split()) + 1
            reused = tokens - 1 if self.reuses and body["prompt"] in self.computed else 0
            self.computed.append(body["prompt"])
            return 200, {"content": "b", "timings": {"cache_n": reused, "prompt_n": tokens - reused}}, {}
        if path != "/lora-adapters":
            return self.nowhere()
        if not isinstance(body, list):
            return self.refuse(400, "Request body must be an array", "invalid_request_error")
        said = {each.get("id", -1): each.get("scale", 0.0) for each in body}
        self.scales = [float(said.get(number, 0.0)) for number in range(len(self.files))]
        return 200, {"success": True}, {}

    def nowhere(self) -> Reply:
        return self.refuse(404, "File Not Found", "not_found_error")

    def refuse(self, status: int, message: str, kind: str) -> Reply:
        return status, {"error": {"code": status, "message": message, "type": kind}}, {}


@contextmanager
def serving(engine: Engine) -> Iterator[Engine]:
    """At ``engine.url``, on a free port of loopback."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.reply(None, lambda: engine.get(self.path))

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Type"] != "application/json":
                self.send(415, {"error": "Unsupported Media Type: Only 'application/json' is allowed"}, {})
                return
            body = json.loads(raw)
            self.reply(body, lambda: engine.post(self.path, body, self.headers))

        def reply(self, body: Any, work: Callable[[], Reply]) -> None:
            engine.asked.append((self.path, body))
            fault = engine.faults.pop(0) if engine.faults else None
            if fault == "drip":
                self.drip()
                return
            if fault in ("drop", "hang"):
                time.sleep(5 if fault == "hang" else 0)
                self.close_connection = True
                return
            try:
                answer = self.answer(fault, work)
            except Refused as error:
                answer = error.status, error.body, {}
            if fault == "lost":
                self.close_connection = True
                return
            self.send(*answer)

        def drip(self) -> None:
            self.close_connection = True
            with suppress(OSError):  # nobody listens any more
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b" " * 50:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)

        def answer(self, fault: int | str | None, work: Callable[[], Reply]) -> Reply:
            said = self.headers["Authorization"]
            if engine.key is not None and said != f"Bearer {engine.key}":
                return 401, {"error": f"Unauthorized: {said}"}, {}
            if isinstance(fault, int):
                moved = {"Location": "http://127.0.0.1:9/"} if fault == 307 else {}
                return fault, {"error": {"message": f"it is {fault}"}}, moved
            return work()

        def send(self, status: int, body: Any, headers: dict[str, str]) -> None:
            raw = body.encode() if isinstance(body, str) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(raw))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    engine.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield engine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
