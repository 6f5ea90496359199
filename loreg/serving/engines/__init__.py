"""What engines do with a PEFT directory: one file for each, over one description of what the directory says.

The facts are from the engines' own sources, whose version and files each room names; ``spec/engines.md`` is the same
as a table. Nothing of an engine is imported.
"""

from __future__ import annotations

from collections.abc import Mapping

from loreg.serving.engines import llama_cpp, lorax, peft, sglang, tensorrt_llm, vllm
from loreg.serving.engines.rules import EngineRules

ENGINES: Mapping[str, EngineRules] = {
    "vllm": vllm.RULES,
    "sglang": sglang.RULES,
    "tensorrt-llm": tensorrt_llm.RULES,
    "llama.cpp": llama_cpp.RULES,
    "lorax": lorax.RULES,
    "peft": peft.RULES,
}
"""Name → what it reads, and how it is limited."""

__all__ = ["ENGINES", "EngineRules"]
