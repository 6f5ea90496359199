"""Reading a copy piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from loreg.errors import BadInput
from loreg.store.base import BlobKey, Store

_PIECE = 1 << 20


def pieces(store: Store, key: BlobKey, advance: Callable[[int], object] = lambda _: None) -> Iterator[bytes]:
    """The bytes of a copy, not verified; ``advance`` is told how many were read. Raises NotFound, and BadInput for
    what cannot be read."""
    with store.open(key) as file:
        while True:
            try:
                piece = file.read(_PIECE)
            except OSError as error:
                raise BadInput(f"{error.strerror or error}.") from error
            if not piece:
                return
            advance(len(piece))
            yield piece
