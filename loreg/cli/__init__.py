"""The command line. A command parses, makes one call on the Python API, and prints.

Nothing here is imported before it is needed: ``loreg --help`` loads click alone, ``loreg ls`` no torch.
"""

from __future__ import annotations

from loreg.cli.program import main

__all__ = ["main"]
