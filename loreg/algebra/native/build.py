"""Compiles the C sources when loreg is installed, if there is a C compiler; without, torch does the same, slower."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from sysconfig import get_platform
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path(__file__).parent
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    "-fno-tree-loop-distribute-patterns",  # short copies stay loops
)
_BY_LEVEL = ("merge.c", "probe.c")
_LEVELS = {
    16: (),
    32: ("-mavx2", "-mfma"),
    64: ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
}
"""Bytes of a vector, and what a compiler has to be told for that: what levels.c asks the processor for. All from the
first that it does not take are left out, as on other machines than x86."""


class NativeBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """What hatchling calls for a wheel, and for an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        library = compiled(_FOLDER / "libloreg.so")
        if library is None:
            self.app.display_warning("No C compiler: loreg will merge by torch's operations, at half the speed.")
            return
        build_data["artifacts"].append(f"/{library.relative_to(self.root)}")
        build_data["pure_python"] = False
        build_data["tag"] = (
            f"py3-none-{get_platform().replace('-', '_').replace('.', '_')}"  # it has nothing of Python's
        )


def compiled(library: Path) -> Path | None:
    """``library``, newly made from the sources; None where that cannot be done."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.name != "posix":
        return None
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        folder, objects, widest = Path(scratch), list[Path](), 0
        for width, machine in _LEVELS.items():
            made = [folder / f"{Path(name).stem}{width}.o" for name in _BY_LEVEL]
            given = compiler, *_FLAGS, *machine, f"-DLOREG_BYTES={width}", "-c"
            if not all(_run(*given, _FOLDER / name, "-o", to) for name, to in zip(_BY_LEVEL, made, strict=True)):
                break
            objects, widest = objects + made, width
        named = f'-DLOREG_SOURCE="{source_digest(_FOLDER)}"', f"-DLOREG_WIDEST={widest}"
        fresh = folder / library.name
        if not objects or not _run(
            compiler, *_FLAGS, *named, "-shared", _FOLDER / "levels.c", *objects, "-o", fresh, "-lm"
        ):
            return None
        fresh.replace(library)  # at once: a process may have the old one loaded
    return library


def source_digest(folder: Path) -> str:
    """Of the C sources in ``folder``, by name: native/__init__.py has the same."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.c")))).hexdigest()


def _run(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
