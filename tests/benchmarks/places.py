"""Where the inputs of the merges are made and their outputs written: on the disk, and in memory-backed files.

A place has a base, adapters and a registry of its own, made when they are first asked for. The outputs of a run are
removed when it is over, and the file system is left to settle, so that the next does not pay for that.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from safetensors import safe_open

import loreg
from loreg.errors import LoregError
from tests.benchmarks.models import Shape, make_adapter, make_base
from tests.benchmarks.pairs import Run, Unmeasured, process

ADAPTERS = ("one", "two", "three", "four")
_OVER = 1 << 30
"""Bytes that are left free."""
_ALLOWED = 8 << 30
"""Memory that PEFT may need, where files are memory as well."""

PEFT_MERGE = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import torch, peft, transformers
began = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - began}))
"""
# The command says no seconds: what it calls, with its imports left out.
UNMERGE = """
import json, sys, time
import torch, loreg, loreg.registry.merging
with loreg.open() as registry:
    began = time.perf_counter()
    result = registry.unmerge(sys.argv[1], sys.argv[2], base=sys.argv[3] or None, journal=not sys.argv[3])
    seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "matches_base": result.matches_base}))
"""
_LOREG = (sys.executable, "-m", "loreg.cli")


class Place:
    """A folder with a model of ``shape`` and adapters for it, as many of ``ADAPTERS`` as that. ``name``: what the
    tables call it."""

    def __init__(self, name: str, folder: Path, shape: Shape, *, adapters: int = 4, sparse: bool = False) -> None:
        self.name, self.shape = name, shape
        self._folder, self._adapters, self._sparse = folder, ADAPTERS[:adapters], sparse

    @cached_property
    def system(self) -> str:
        """The kind of file system."""
        best = ("", "an unknown file system")
        mounts = Path("/proc/self/mounts")
        for line in mounts.read_text().splitlines() if mounts.is_file() else ():
            _, point, kind, *_ = line.split()
            if self._folder.resolve().is_relative_to(point) and len(point) >= len(best[0]):
                best = (point, kind)
        return best[1]

    @property
    def base(self) -> Path:
        return self._folder / "base"

    @cached_property
    def size(self) -> int:
        """Makes the base, the adapters and the registry; the bytes of the base's weights. Raises Unmeasured."""
        try:
            self._folder.mkdir()
            self.require(0 if self._sparse else 1)
            return self._made()
        except (OSError, LoregError, Unmeasured) as error:
            self.remove()
            raise Unmeasured(f"no inputs in {self.name} files: {error}") from error

    def _made(self) -> int:
        size = make_base(self.base, self.shape, sparse=self._sparse)
        with loreg.open(self.home) as registry:
            registry.add_base(self.base, "base")
            for seed, name in enumerate(self._adapters):
                make_adapter(self._folder / name, self.shape, seed)
                registry.push(self._folder / name, base="base", name=name)
            time.sleep(2.1)  # a file that was just written is not cached by its stamp; the next hashing is
            registry.add_base(self.base, "base")
        os.sync()
        return size

    @cached_property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W‖ (Frobenius) of the first adapter over the linear layers of the first block."""
        self.size
        weights = json.loads((self.base / "model.safetensors.index.json").read_text())["weight_map"]
        delta, whole = 0.0, 0.0
        with safe_open(self._folder / ADAPTERS[0] / "adapter_model.safetensors", "pt") as factors:
            for name in self.shape.linears:
                path = f"model.layers.0.{name}"
                B, A = (
                    factors.get_tensor(f"base_model.model.{path}.lora_{end}.weight").double() for end in ("B", "A")
                )
                delta += 4 * float(torch.sum((B.T @ B) * (A @ A.T)))  # the scale is 2
                with safe_open(self.base / weights[f"{path}.weight"], "pt") as base:
                    whole += float(base.get_tensor(f"{path}.weight").double().square().sum())
        return math.sqrt(delta / whole)

    def require(self, outputs: float) -> None:
        """Raises Unmeasured if there is no room for as many models as that."""
        needed = int(outputs * 2 * self.shape.parameters) + _OVER
        found = shutil.disk_usage(self._folder).free
        if self.system in ("tmpfs", "ramfs"):
            needed, found = needed + _ALLOWED, min(found + _ALLOWED, _available_memory())
        if found < needed:
            raise Unmeasured(f"{needed / 1e9:.1f} GB are needed in {self.name} files, and {found / 1e9:.1f} are free")

    def merge(self, *expressions: str, options: Sequence[str] = ()) -> Callable[[], Run]:
        """A merge, without verification if ``options`` has none; of several expressions, all in one pass."""
        return self._work(len(expressions), lambda out: self._merge(expressions, out, options))

    def passes(self, *expressions: str) -> Callable[[], Run]:
        """A merge of each, one after the other."""

        def work(out: Path) -> Run:
            runs = [self._merge([each], out.with_name(f"model{n}")) for n, each in enumerate(expressions)]
            return Run(sum(run.seconds for run in runs), sum(run.whole for run in runs))

        return self._work(len(expressions), work)

    def copy(self, *, sync: bool) -> Callable[[], Run]:
        """``cp -r`` of the base, and if ``sync`` its flush to the disk."""

        def work(out: Path) -> Run:
            text = f"cp -r '{self.base}' '{out}'" + (f" && sync '{out}'/* '{out}'" if sync else "")
            taken, _ = process(["sh", "-c", text])
            return Run(taken, taken)

        return self._work(1, work)

    def peft(self) -> Callable[[], Run]:
        """Load, merge_and_unload, save_pretrained."""
        adapter = self._folder / ADAPTERS[0]
        return self._work(1, lambda out: self._script(PEFT_MERGE, self.base, adapter, out))

    def unmerge(self, *, journal: bool) -> Callable[[], Run]:
        """From the journal, or else from the base."""

        def work(out: Path) -> Run:
            merged = out.with_name("merged")
            self._merge([ADAPTERS[0]], merged, ["--undo"])
            os.sync()
            return self._script(UNMERGE, merged, out, "" if journal else self.base)

        return self._work(2, work)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _work(self, outputs: int, work: Callable[[Path], Run]) -> Callable[[], Run]:
        """``work``, given a path that does not exist, and what it wrote there removed."""
        folder = self._folder / "out"

        def alone() -> Run:
            self.size
            self.require(outputs)
            folder.mkdir()
            try:
                return work(folder / "model")
            finally:
                shutil.rmtree(folder)
                os.sync()

        return alone

    def _merge(self, expressions: Sequence[str], out: Path, options: Sequence[str] = ()) -> Run:
        """Several outputs are numbered beside ``out``."""
        arguments = ["--base", str(self.base), *options, *([] if "--verify" in options else ["--verify", "none"])]
        for number, expression in enumerate(expressions):
            to = out if len(expressions) == 1 else out.with_name(f"{out.name}{number}")
            arguments += ["--apply", expression, "--out", str(to)]
        whole, said = process([*_LOREG, "merge", *arguments, "--json"], env=self._environment)
        told = json.loads(said)
        return Run(told["seconds"], whole, told)

    def _script(self, script: str, *words: str | Path) -> Run:
        whole, said = process([sys.executable, "-c", script, *map(str, words)], env=self._environment)
        told = json.loads(said.splitlines()[-1])
        if not told.get("matches_base", True):
            raise Unmeasured("what came out is not the base")
        return Run(told["seconds"], whole, told)

    def adapter(self, name: str) -> Path:
        """One of the adapters, as PEFT saves it."""
        return self._folder / name

    @property
    def home(self) -> Path:
        """Of the registry."""
        return self._folder / "home"

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "LOREG_HOME": str(self.home)}


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 0
