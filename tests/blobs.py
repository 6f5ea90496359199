"""A blob for the tests of stores, in pieces of several kinds."""

from __future__ import annotations

from loreg.digest import Digest

DATA = b"a blob of some length, written in several pieces" * 50
CHUNKS = [DATA[:100], memoryview(DATA)[100:1500], b"", DATA[1500:]]
DIGEST = Digest.of(DATA)
