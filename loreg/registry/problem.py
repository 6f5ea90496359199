"""What a check found, in words and in fields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """``kind``: ``missing``, ``corrupt``, ``unreadable``, ``row``, ``manifest``, ``edges``, ``columns``, ``state``,
    ``catalog``, ``ledger`` or ``name``. ``what``: a digest, or what else is wrong. ``touches``: versions and bases
    that need it. ``repaired``: how it was mended, None if it is there still."""

    kind: str
    what: str
    found: str
    touches: tuple[str, ...] = ()
    repaired: str | None = None

    def __str__(self) -> str:
        touches = f", which {', '.join(self.touches)} need" if self.touches else ""
        return f"{self.what}{touches}: {self.found}" + (f"; {self.repaired}" if self.repaired else "")
