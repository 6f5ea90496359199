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
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from loreg.algebra.gpu import kernels

assert kernels.COMPILED
POINTERS = dict.fromkeys(("table", "counters"), "*i64") | dict.fromkeys(("reals", "sums"), "*fp64")
POINTERS |= dict.fromkeys(("jobs", "doubt_at", "undo_at"), "*i32") | {"doubt_were": "*i16"}
KIND = {"IN": 0, "OUT": 0, "SINGLE": True, "CONVERTS": True, "RESIDUAL": True, "RANK": 16}
MERGE = {"ALIGNED": True, "ROWS": 64, "COLUMNS": 128}

def ptx(kernel, warps, registers, **constants):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else POINTERS.get(name, "*i8") for name in names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature, {(names.index(k),): v for k, v in constants.items()}, attributes)
    options = {"num_warps": warps} | ({"maxnreg": registers} if registers else {})
    built = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert len(built.asm["cubin"]) > 1000
    return built.asm["ptx"]

for text in (
    ptx(kernels.merge, 8, 96, **KIND | MERGE | {"RESIDUAL": False}),
    ptx(kernels.merge, 8, 128, **KIND | MERGE),
    ptx(kernels.merge, 8, 96, **KIND | MERGE | {"IN": 1, "OUT": 1, "SINGLE": False, "ROWS": 32, "RESIDUAL": False}),
    ptx(kernels.settle, 4, 0, **KIND, PANEL=128, BLOCK=16),
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
    first, second, third, last = ([int(x) for x in text.split(",")] for text in done.stdout.split())
    assert all(text[0] == 0 for text in (first, second, third, last))
    assert all(text[1] >= 4 and text[2] >= 4 for text in (first, second))
    assert all(text[1] >= 2 and text[2] >= 2 for text in (third,))
