"""What stands before the C library of a process: see shim.c. Loaded by LD_PRELOAD, and spoken to from inside."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

CALLS = (
    "open,read,write,pread,pwrite,preadv,copy_file_range,sendfile,fsync,fdatasync,ftruncate,rename,mkdir,rmdir,"
    "unlink,mmap"
)
MODES = {"count": 0, "fail": 1, "half": 2, "kill before": 3, "kill after": 4}


def compiled(folder: Path) -> Path | None:
    """The library in ``folder``; None without a C compiler, or where nothing can stand before the C library."""
    compiler, library = shutil.which("cc"), folder / "shim.so"
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    source = Path(__file__).parent / "shim.c"
    made = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"])
    return library if made.returncode == 0 else None


class Shim:
    """What counts, and spoils, the calls of this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        for name in ("shim_name", "shim_path"):
            getattr(self._library, name).restype = ctypes.c_char_p

    def arm(self, folders: list[str], calls: str = CALLS, at: int = 0, code: int = 0, mode: str = "count") -> None:
        where, what = ":".join(folders).encode(), f",{calls},".encode()
        self._library.shim_arm(where, what, ctypes.c_long(at), code, MODES[mode])

    def seen(self) -> list[tuple[str, str]]:
        count = self._library.shim_count()
        return [(self._library.shim_name(ctypes.c_long(place)).decode(),
                 self._library.shim_path(ctypes.c_long(place)).decode())
                for place in range(1, count + 1)]  # fmt: skip

    def determine(self, second: int) -> None:
        """From now on this process does the same each time: its clock, its random numbers and its id."""
        self._library.shim_determine(ctypes.c_long(second))

    def record(self, descriptor: int) -> None:
        """Write down what changes the directories of ``arm``; -1 for no more."""
        self._library.shim_record(descriptor)

    def mark(self, said: str) -> None:
        self._library.shim_mark(said.encode())
