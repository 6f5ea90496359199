"""PEFT 0.21.2, which defines what the directory means. ``tuners/tuners_utils.py`` has the one thing it refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loreg.serving.engines.described import Described
from loreg.serving.engines.rules import MERGE, EngineRules, Finding, some


def _findings(described: Described, given: Mapping[str, Any]) -> Iterator[Finding]:
    if not (described.layers or described.rows or described.stacks) and described.words.method == "LORA":
        reason = f"It only replaces {some((*described.saved, *described.biases))}, and PEFT wants a module to adapt."
        yield Finding("refuses", "target_modules", reason, MERGE)


RULES = EngineRules("PEFT", "0.21.2", _findings, lora_only=False)
