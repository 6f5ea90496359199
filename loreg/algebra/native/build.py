"""Compiles the C sources when loreg is installed, if there is a C compiler; without, torch does the same, slower."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from sysconfig import get_platform
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = Path(__file__).parent
_FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-strict-aliasing"),
)
_OPTIONAL = ("-fno-tree-loop-distribute-patterns",)  # of GCC: short copies stay loops
_BY_LEVEL = ("merge.c", "probe.c")
_LEVELS: dict[int, tuple[str, ...]] = {
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
            self.app.display_warning(
                "No C compiler that works here: loreg will merge by torch's operations, several times slower."
            )
            return
        build_data["artifacts"].append(f"/{library.relative_to(self.root)}")
        build_data["pure_python"] = False
        build_data["tag"] = (
            f"py3-none-{get_platform().replace('-', '_').replace('.', '_')}"  # it has nothing of Python's
        )


def compiled(library: Path) -> Path | None:
    """``library``, newly made from the sources; None where that cannot be done."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if os.name != "posix" or not compiler or shutil.which(compiler[0]) is None:
        return None
    try:
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            fresh = _made(compiler, Path(scratch))
            if fresh is not None:
                fresh.replace(library)  # at once: a process may have the old one loaded
    except OSError:  # a tree that cannot be written
        return None
    return library if fresh is not None else None


def _made(compiler: Sequence[str], folder: Path) -> Path | None:
    known = [flag for flag in _OPTIONAL if _run(*compiler, *_FLAGS, flag, *_level(16), "-o", folder / "known.o")]
    flags, objects, widest = (*_FLAGS, *known), list[Path](), 0
    for width in _LEVELS:
        made = [folder / f"{Path(name).stem}{width}.o" for name in _BY_LEVEL]
        given = zip(_BY_LEVEL, made, strict=True)
        if not all(_run(*compiler, *flags, *_level(width, name), "-o", to) for name, to in given):
            break
        objects, widest = objects + made, width
    named = f'-DLOREG_SOURCE="{source_digest(_FOLDER)}"', f"-DLOREG_WIDEST={widest}"
    fresh = folder / "libloreg.so"
    linked: list[str | Path] = ["-shared", _FOLDER / "levels.c", *objects, "-o", fresh, "-lm"]
    return fresh if objects and _run(*compiler, *flags, *named, *linked) else None


def _level(width: int, name: str = _BY_LEVEL[0]) -> tuple[str | Path, ...]:
    """To compile a source for vectors of this width."""
    return (*_LEVELS[width], f"-DLOREG_BYTES={width}", "-c", _FOLDER / name)


def source_digest(folder: Path) -> str:
    """Of the C sources in ``folder``, by name: native/__init__.py has the same."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.c")))).hexdigest()


def _run(*command: str | Path) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
