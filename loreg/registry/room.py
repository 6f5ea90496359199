"""A bound on what the threads of one piece of work hold at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition


@dataclass
class Room:
    """A number of elements that may be held at once; who needs more than is left waits."""

    left: int
    _change: Condition = field(default_factory=Condition)

    @contextmanager
    def of(self, count: int) -> Iterator[None]:
        with self._change:
            self._change.wait_for(lambda: self.left >= count)
            self.left -= count
        try:
            yield
        finally:
            with self._change:
                self.left += count
                self._change.notify_all()
