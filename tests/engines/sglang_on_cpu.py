"""A program: ``sglang.launch_server`` on a CPU without AMX, where SGLang has operations in torch for all that a Llama
and LoRA need, but asks for three things that are not there. Each process that the server starts runs this file first.

``sgl_kernel``, whose wheels are CUDA's, is imported for kernels for CPUs: one of them is called, and written here in
torch; the others are those of speculation. ``torchvision``, whose wheels are CUDA's too, is imported for pictures.
And memory is pinned for LoRA, which is for copies to a device: here it is left as it is.
"""

from __future__ import annotations

import importlib.machinery
import runpy
import sys
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from transformers.utils import is_torchvision_available


def assign_req_to_token_pool_cpu(
    rows: torch.Tensor, table: torch.Tensor, start: torch.Tensor, end: torch.Tensor, places: torch.Tensor, width: int
) -> None:
    """Of each request, ``table[row, start:end]``, from what comes next in ``places``: as ``assign_req_to_token_pool``
    in ``sglang/srt/mem_cache/allocation.py``, in Triton, does."""
    done = 0
    for row, first, last in zip(rows.tolist(), start.tolist(), end.tolist(), strict=True):
        table[row, first:last] = places[done : done + last - first].to(table.dtype)
        done += last - first


class _Absent(types.ModuleType):
    """A module of which anything can be imported, and nothing called."""

    __path__: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")

    def __call__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"{self.__name__}: this test has no use for it")


def _unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def made(*given: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return make(*given, **more)

    return made


def _stand_in() -> None:
    is_torchvision_available()  # which remembers that it is not
    for name in ("sgl_kernel", "torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name] = _Absent(name)
    sys.modules["sgl_kernel"].assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu
    torch.Tensor.pin_memory = lambda self, *_: self
    for name in ("tensor", "zeros"):
        setattr(torch, name, _unpinned(getattr(torch, name)))


_stand_in()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
