"""Bases that are stored quantised: which scheme it is, and the same numbers as a plain 16-bit checkpoint.

A merge edits stored numbers, and here what is stored are codes. ``of`` says how they are to be read, from headers and
config.json alone; ``loreg.quantised.writing.dequantise`` writes the model that they stand for, a base of its own.
"""

from __future__ import annotations

from loreg.quantised.scheme import Packed, Scheme, of, quantisation

__all__ = ["Packed", "Scheme", "of", "quantisation"]
