"""Compiles ``merge.c`` when loreg is installed, if there is a C compiler; without one torch does the same, slower."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from sysconfig import get_platform
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path(__file__).parent
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
    "-fno-tree-loop-distribute-patterns",  # short copies stay loops
)
# One copy of each function for each kind of processor, of which the loader takes the best: not every compiler and C
# library can.
_ATTEMPTS = (("-DLOREG_CLONES", "-Wno-psabi"), ("-Wno-psabi",), ())


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
    """``library``, newly made from the source; None where that cannot be done."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or os.name != "posix":
        return None
    source = _FOLDER / "merge.c"
    named = f'-DLOREG_SOURCE="{hashlib.sha256(source.read_bytes()).hexdigest()}"'
    fresh = library.with_suffix(f".{os.getpid()}")
    for extra in _ATTEMPTS:
        command = [compiler, *_FLAGS, named, *extra, str(source), "-o", str(fresh), "-lm"]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            fresh.replace(library)  # at once: a process may have the old one loaded
            return library
    fresh.unlink(missing_ok=True)
    return None
