"""What a check finds, and what checks of several engines have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from loreg.serving.engines.described import Described, Layer
from loreg.serving.engines.limits import Limit

Effect: TypeAlias = Literal["refuses", "misreads", "ignores"]

MERGE = "merge it into its base and serve that model"
FOLD = "serve its folded form ('loreg export --format folded')"
RESIZE = "truncate it to plain LoRA with 'loreg resize'"
_EXPERT = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d{1,9})\.(?P<part>[^.]+)")
GATED: tuple[Set[str], ...] = ({"gate_proj", "up_proj", "down_proj"}, {"w1", "w2", "w3"})
_UNGATED = {"up_proj", "down_proj"}


@dataclass(frozen=True, slots=True)
class Finding:
    """What an engine would do with the adapter as PEFT saves it, and why it should not be given to it so.

    ``effect``: ``refuses`` it, ``misreads`` it (serves another model without a word), or ``ignores`` a part of it.
    ``subject``: the setting or part, in PEFT's words. ``reason``: one sentence with names and numbers. ``remedy``:
    what to do. ``folded``: whether the folded form is free of it.
    """

    effect: Effect
    subject: str
    reason: str
    remedy: str
    folded: bool = False


Rules: TypeAlias = Callable[[Described, Mapping[str, Any]], Iterator[Finding]]
"""(what the directory says, the limits that were given) → findings, from the most to the least of the adapter."""


@dataclass(frozen=True, slots=True)
class EngineRules:
    """``version``: of the engine that was read. ``limits``: its settings that decide about an adapter, by its names.
    ``reads``: the rules. ``lora_only``: whether another method of PEFT than LoRA is refused at once."""

    title: str
    version: str
    reads: Rules
    limits: Mapping[str, Limit] = field(default_factory=dict)
    lora_only: bool = True

    def findings(self, described: Described, given: Mapping[str, Any]) -> tuple[Finding, ...]:
        """All of them; where there is no PEFT directory, or not of a LoRA, that alone."""
        if described.unsayable is not None:
            return (Finding("refuses", "form", f"There is no PEFT directory to load: {described.unsayable}.", MERGE),)
        if self.lora_only and described.words.method != "LORA":
            what = f"peft_type is {described.words.method}, and {self.title} loads LORA alone"
            return (Finding("refuses", "peft_type", f"{what}.", f"{MERGE}, or {RESIZE}"),)
        return tuple(self.reads(described, given))


def mended(described: Described, finding: Finding) -> Finding:
    """The finding as one that the folded form is free of, if the version can be folded."""
    if not described.foldable:
        return finding
    return replace(finding, folded=True, remedy=FOLD)


def some(names: Iterable[str]) -> str:
    """Up to three names, and how many more."""
    found = sorted(set(names))
    shown = ", ".join(repr(name) for name in found[:3])
    return shown if len(found) <= 3 else f"{shown} and {len(found) - 3} more"


def over(
    described: Described, given: Mapping[str, Any], default: int | None, claimed: int, remedy: str
) -> Iterator[Finding]:
    """A rank above ``max_lora_rank``. ``claimed``: the largest by the config, where the engine goes by that."""
    limit = given.get("max_lora_rank", default)
    if limit is None:
        return
    setting = "max_lora_rank" if "max_lora_rank" in given else "max_lora_rank's default of"
    if described.rank > limit:
        reason = f"Its largest rank is {described.rank}, above {setting} {limit}."
        yield Finding("refuses", "rank", reason, f"{remedy}, or make one of a smaller rank with 'loreg resize'")
    elif claimed > limit:
        reason = (
            f"Its config speaks of rank {claimed}, above {setting} {limit}, though none is above {described.rank}."
        )
        yield mended(described, Finding("refuses", "rank", reason, remedy))


def scales(described: Described, *, root: bool, own_rank: bool, layers: Sequence[Layer]) -> Iterator[Finding]:
    """Scales that an engine gets wrong which takes one α for all modules.

    ``root``: whether it knows ``use_rslora``. ``own_rank``: whether it divides by the rank of each module's tensors,
    or by the config's r.
    """

    def taken(layer: Layer) -> float:
        rank = layer.rank if own_rank else described.words.r
        return described.words.alpha / (math.sqrt(rank) if root and described.words.root else rank)

    wrong = [layer for layer in layers if not math.isclose(layer.scale, taken(layer))]
    if not wrong:
        return
    causes = {
        "use_rslora": described.words.root and not root,
        "alpha_pattern": any(not math.isclose(described.alpha_of(layer), described.words.alpha) for layer in wrong),
        "rank_pattern": not own_rank and any(layer.rank != described.words.r for layer in wrong),
    }
    first = wrong[0]
    for subject in [cause for cause, is_so in causes.items() if is_so] or ["lora_alpha"]:
        reason = (
            f"{first.path!r} has scale {first.scale:g} and would get {taken(first):g}, as {subject} is not read "
            f"({len(wrong)} of {len(described.layers)} modules)."
        )
        yield mended(described, Finding("misreads", subject, reason, MERGE))


def no_place(
    described: Described, effect: Effect, subjects: Mapping[str, Sequence[str]], why: str
) -> Iterator[Finding]:
    """A finding for each of ``subjects`` that names something of the version."""
    for subject, found in subjects.items():
        if found:
            yield Finding(effect, subject, f"{some(found)}: {why}.", MERGE)


def incomplete_experts(described: Described) -> dict[str, str]:
    """Stacks of experts that are adapted one by one, and not all alike → what is missing, or differs.

    An engine that stacks their factors needs each projection of each, at one rank. Whether experts after the last
    adapted one are missing, the manifest does not tell.
    """
    stacks: dict[str, dict[int, dict[str, int]]] = {}
    for layer in described.layers:
        if match := _EXPERT.fullmatch(layer.path):
            parts = stacks.setdefault(match["stack"], {}).setdefault(int(match["expert"]), {})
            parts[match["part"]] = layer.rank
    found = {}
    for stack, experts in stacks.items():
        names = {part for each in experts.values() for part in each}
        whole = next((gated for gated in GATED if names <= gated and names != _UNGATED), names)
        lacking = [f"{n}.{part}" for n in range(len(experts)) for part in whole if part not in experts.get(n, {})]
        ranks = {part: {each[part] for each in experts.values() if part in each} for part in names}
        if lacking:
            found[stack] = f"has no factors for {some(lacking)}"
        elif uneven := [part for part in sorted(names) if len(ranks[part]) > 1]:
            found[stack] = f"has {uneven[0]} at ranks {', '.join(map(str, sorted(ranks[uneven[0]])))}"
    return found


def strangers(described: Described, effect: Effect) -> Iterator[Finding]:
    """Tensors of the file that are no part of the adapter, to an engine that takes every tensor for one."""
    if described.strangers:
        reason = f"{described.strangers} holds tensors beside those of the adapter, which are not expected there."
        yield mended(described, Finding(effect, "tensors", reason, "save it again without them"))
