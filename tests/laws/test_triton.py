"""The kernels of ``algebra/gpu`` without a GPU: what they give, in Triton's interpreter, and that they compile."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed: pip install '.[test]'")

COMPILE = """
import sys
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loreg.algebra.gpu import kernels

assert kernels.COMPILED
POINTERS = dict.fromkeys(("table", "counters"), "*i64") | dict.fromkeys(("reals", "sums"), "*fp64") | {"count": "i32"}
POINTERS |= dict.fromkeys(("jobs", "numbers", "starts", "entries", "doubt_at", "doubt_missed", "doubt_entry"), "*i32")
STORED = ("doubt_was", "given", "values")

def ptx(kernel, warps, registers, **constants):
    names = kernel.arg_names
    word = "*i32" if constants.get("IN") == 2 else "*i16"
    known = POINTERS | dict.fromkeys(STORED, word) | {"marks": "*i16"}
    signature = {name: "constexpr" if name in constants else known.get(name, "*i8") for name in names}
    pointers = [i for i, name in enumerate(names) if name not in constants and name != "count"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in pointers}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(built.asm["cubin"]) > 1000
    return built.asm["ptx"]

def change(dtype, back, forth, residual):
    single = dtype == 0
    rows = 64 if single and not back and not residual else 32
    kind = {"IN": dtype, "OUT": dtype, "SINGLE": single, "CONVERTS": True, "ALIGNED": True}
    return ptx(kernels.change, 8, 128, **kind, BACK=back, FORTH=forth, RESIDUAL=residual, ROWS=rows, COLUMNS=128)

def settle(dtype, back, residual):
    kind = {"IN": dtype, "OUT": dtype, "SINGLE": dtype == 0, "CONVERTS": True, "RANK": 16, "PANEL": 128, "BLOCK": 16}
    return ptx(kernels.settle, 4, 0, **kind, BACK=back, RESIDUAL=residual)

for text in (
    change(0, 0, 16, False), change(0, 0, 16, True), change(0, 16, 0, False), change(0, 16, 64, True),
    change(1, 0, 16, False), change(1, 16, 16, True), change(2, 8, 8, True),
    settle(0, False, True), settle(0, True, False), settle(1, False, True), settle(2, True, False),
    ptx(kernels.put, 4, 0, OUT=0, BLOCK=64), ptx(kernels.put, 4, 0, OUT=2, BLOCK=64),
):
    print(text.count("ftz"), text.count("ld.global.v4.b32"), text.count("st.global.v4.b32"), sep=",", end=" ")
"""


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as Triton asks once, when it is imported, whether it is to interpret."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    given = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env=given | {"PYTHONPATH": path} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("file", ["triton_cases.py", "swap_cases.py", "live_cases.py"])
def test_they_give_the_bytes_of_torchs_passes(file: str) -> None:
    """And live merges by them are all or nothing."""
    cases = str(Path(__file__).with_name(file))
    done = _run("-m", "pytest", "-q", "-p", "no:cacheprovider", cases, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_they_compile_for_an_h100(tmp_path: Path) -> None:
    """Without a GPU at hand: Triton brings ptxas. Subnormals are kept, and W is read and written by 16 bytes."""
    done = _run("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    if done.returncode and "Cannot find ptxas" in done.stderr:
        pytest.skip("this build of triton has no ptxas")
    assert done.returncode == 0, done.stderr[-6000:]
    found = [[int(x) for x in text.split(",")] for text in done.stdout.split()]
    assert len(found) == 13 and all(text[0] == 0 for text in found)
    assert all(text[1] >= 2 and text[2] >= 2 for text in found[:7])
