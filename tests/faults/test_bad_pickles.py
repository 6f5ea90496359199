"""Damaged ``.bin`` files: whichever byte is another, they are tensors or bad input, never another error."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
import torch

from loreg.adapters.pickled import load_tensors
from loreg.errors import BadInput

TENSORS = {"q.lora_A.weight": torch.arange(6.0).view(2, 3), "q.lora_B.weight": torch.ones(3, 2).half()[:, 1]}


def _saved(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _outcome(path: Path, data: bytes) -> str:
    """``read``, or the type of the error behind the refusal. Any other error than BadInput passes through."""
    path.write_bytes(data)
    try:
        tensors = load_tensors(path)
    except BadInput as error:
        assert str(path) in str(error) and len(str(error)) < len(str(path)) + 400
        return type(error.__cause__).__name__
    assert all(len(tensor.content()) == tensor.nbytes for tensor in tensors)
    return "read"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_byte_can_be_another(tmp_path: Path, zipped: bool) -> None:
    good, path = _saved(zipped), tmp_path / "adapter_model.bin"
    assert _outcome(path, good) == "read"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says what it thinks of such files
        outcomes = {
            _outcome(path, good[:place] + bytes([good[place] ^ (0x01, 0xFF)[place % 2]]) + good[place + 1 :])
            for place in range(len(good))
        }
    # What an unpickler trips over is of many types: those that nobody would list are among them.
    assert {"read", "UnpicklingError", "RuntimeError", "IndexError", "TypeError"} <= outcomes
    assert "AssertionError" in outcomes or zipped


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_cut_is_refused(tmp_path: Path, zipped: bool) -> None:
    good, path = _saved(zipped), tmp_path / "adapter_model.bin"
    assert all(_outcome(path, good[:length]) != "read" for length in range(0, len(good) - 1, 7))


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a state dict"):
        load_tensors(tmp_path)
