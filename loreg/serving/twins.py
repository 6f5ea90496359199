"""The async twin of what waits."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_thread(work: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """``work`` for an event loop, which goes on while a thread waits. If the task is cancelled, that goes on too."""

    @functools.wraps(work, updated=())
    async def twin(*given: P.args, **named: P.kwargs) -> T:
        return await asyncio.to_thread(work, *given, **named)

    twin.__name__ = f"{work.__name__}_async"
    twin.__qualname__ = f"{work.__qualname__}_async"
    twin.__doc__ = f"``{work.__name__}`` in a thread, for an event loop, which goes on meanwhile. See there."
    return twin
