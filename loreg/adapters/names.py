"""Which tensor of a checkpoint a module path of an adapter means.

An adapter names modules of the live model; a checkpoint names tensors of whatever was saved. They differ by a
prefix: GPT-2's file has ``h.0.attn.c_attn.weight`` where the model has ``transformer.h.0.attn.c_attn``, and an
adapter of a headless model has none where the file has one. So the names of one adapter are resolved together:
each as it stands, or all others under the one shift of prefix that fits them all. Two shifts that fit are an
ambiguity, and are refused: a guess that is wrong merges into the wrong layers without an error.

Where a model consists of others, such as a vision tower and a language model, libraries have moved each by itself:
then there is one shift for the names of each. Names that differ by more than a prefix are in ``renames``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from loreg.errors import BadInput

PATH_LENGTH = 512
"""Characters of a module's path, or of a tensor's name, that an adapter may have: the longest in transformers have 90
or so, and a name of very many parts is looked for under each of its ends."""

Shift = tuple[str, str]
"""A prefix that the adapter's name has, and the one that the checkpoint's name has instead."""

# Prefixes that libraries have renamed between two versions; nothing else is both taken off and put on, as
# "encoder." for "decoder." would also fit.
_RENAMED: tuple[Shift, ...] = (
    ("model.language_model.", "language_model.model."),
    ("language_model.model.", "model.language_model."),
    ("model.", "model.language_model."),
    ("base_model.", "model."),
)
# What the models within a model, and its head, are called at the beginning of a name.
_WITHIN = re.compile(
    r"(?:model\.)?(?:\w+\.(?=lm_head\.))?(language_model|text_model|vision_tower|vision_model|visual|vqmodel|image_tower|video_tower|"
    r"audio_tower|multi_modal_projector|projector|lm_head)\."
)


def check_length(name: str) -> None:
    """Raises BadInput for a name that is too long to be one."""
    if len(name) > PATH_LENGTH:
        raise BadInput(
            f"The adapter has a name of {len(name):,} characters, {name[:60]!r}…: expected at most {PATH_LENGTH}, as "
            "no model has longer ones; is the file damaged?"
        )


def resolve(wanted: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Map each wanted tensor name to a name of the checkpoint. Names that fit nowhere are left out.

    Raises BadInput where two different shifts of prefix fit equally well, and for a name over ``PATH_LENGTH``.
    """
    wanted, known = list(wanted), set(names)
    resolved = {name: name for name in wanted if name in known}
    rest = [name for name in wanted if name not in known]
    for name in rest:
        check_length(name)
    ends: dict[str, list[str]] = {}
    for candidate in known if rest else ():
        ends.setdefault(_end(candidate), []).append(candidate)
    fits = {name: found for name in rest if (found := _shifts(name, known, ends.get(_end(name), ())))}
    if not fits:
        return resolved
    common = set.intersection(*(set(found) for found in fits.values()))
    shifts = dict.fromkeys(fits, common) if common else _within(fits)
    if any(len(fitting) != 1 for fitting in shifts.values()):
        name = min(fits)
        places = sorted(found for shifts in fits.values() for found in shifts.values() if found)
        raise BadInput(
            f"{name!r} is not in the checkpoint, and no single prefix fits all such names: it could be one of "
            f"{', '.join(sorted(set(fits[name].values())))[:200] or ', '.join(places)[:200]}."
        )
    resolved.update((name, found[next(iter(shifts[name]))]) for name, found in fits.items())
    return resolved


def _within(fits: Mapping[str, Mapping[Shift, str]]) -> dict[str, set[Shift]]:
    """The shifts that fit all names of one model within the model, and leave them in one of that name. Of a name that
    is in none, there are none."""
    common: dict[str, set[Shift]] = {}
    for name, found in fits.items():
        part = match[1] if (match := _WITHIN.match(name)) else ""
        fitting = {shift for shift, there in found.items() if f".{part}." in f".{there}"}
        common[part] = common.get(part, fitting) & fitting
    return {name: common[match[1] if (match := _WITHIN.match(name)) else ""] for name in fits}


def _end(name: str) -> str:
    """The last two parts, which no shift changes: "weight" alone would fit anything."""
    return ".".join(name.split(".")[-2:])


def _shifts(name: str, known: Collection[str], alike: Iterable[str]) -> Mapping[Shift, str]:
    """Every shift that turns ``name`` into a known name, with that name. ``alike``: the known ones of its end."""
    found: dict[Shift, str] = {}
    parts = name.split(".")
    for cut in range(1, len(parts) - 1):
        rest = ".".join(parts[cut:])
        if rest in known:
            found[".".join(parts[:cut]) + ".", ""] = rest
    for candidate in alike:
        if candidate.endswith("." + name):
            found["", candidate.removesuffix(name)] = candidate
    for taken, put in _RENAMED:
        renamed = put + name.removeprefix(taken)
        if name.startswith(taken) and renamed in known:
            found[taken, put] = renamed
    return found
