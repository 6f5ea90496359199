"""``python -m loreg.cli``: the program, where its script is not on the path."""

from __future__ import annotations

from loreg.cli import main

main()
