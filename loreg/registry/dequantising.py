"""Bases that are stored quantised: refused, or made plain first, when the user says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loreg import quantised
from loreg.checkpoint import Advance, Checkpoint
from loreg.errors import BadInput, Unsupported, UsageError
from loreg.format.base import BaseManifest
from loreg.format.recipe import DTYPE_NAMES


def require_plain(checkpoint: Checkpoint) -> None:
    """Raises Unsupported, saying how to go on, if what is stored are codes and not the numbers of the model."""
    try:
        scheme = quantised.of(checkpoint)
    except BadInput:  # a broken config.json tells nothing; the tensors do
        scheme = quantised.quantisation({}, {name: stored.info for name, stored in checkpoint.tensors.items()})
    if scheme is None:
        return
    scheme.require()
    raise Unsupported(
        f"{checkpoint.root} is quantised ({scheme.name}): it holds codes, to which nothing can be added. Make the "
        "16-bit model that they stand for with 'loreg base add PATH --dequantize DIR', or merge with --dequantize."
    )


def dequantise(
    checkpoint: Checkpoint,
    out: Path,
    advance: Advance,
    *,
    source: BaseManifest | None = None,
    dtype: str | None = None,
) -> BaseManifest:
    """Write the plain model of ``checkpoint`` to ``out``; its manifest.

    ``dtype``: ``bfloat16`` or ``float16``; by default what config.json says the model was, else bfloat16. Raises
    BadInput if it is not quantised, Unsupported if its scheme is not known, UsageError for another dtype.
    """
    from loreg.quantised.writing import DTYPES
    from loreg.quantised.writing import dequantise as write

    names = {name: key for key, name in DTYPES.items()}
    if dtype is not None and dtype not in names:
        raise UsageError(f"{dtype!r} is no dtype to dequantise to: expected {' or '.join(names)}.")
    return write(checkpoint, out, names[dtype or _stated(checkpoint.config())], advance, source=source).manifest


def _stated(config: dict[str, Any]) -> str:
    stated = config.get("torch_dtype") or config.get("dtype")
    return DTYPE_NAMES["F16"] if stated == "float16" else DTYPE_NAMES["BF16"]
