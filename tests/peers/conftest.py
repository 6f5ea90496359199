"""Bases and adapters for the tests against PEFT and transformers: each is made once in a session."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT asks the Hub for the config of a base that it cannot find

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from peer_models import BaseOf, save_base


@pytest.fixture
def seeded() -> Iterator[None]:
    """The same random numbers in every run, and in what runs next those that it had before."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        yield


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> BaseOf:
    """(family, dtype) → the directory of a tiny model."""
    root = tmp_path_factory.mktemp("bases")

    @cache
    def make(family: str, dtype: str) -> Path:
        return save_base(family, dtype, root / f"{family}-{dtype}")

    return make
