"""Which tensor of a checkpoint a module path of an adapter means.

An adapter names modules of the live model; a checkpoint names tensors of whatever was saved. They differ by a
prefix: GPT-2's file has ``h.0.attn.c_attn.weight`` where the model has ``transformer.h.0.attn.c_attn``, and an
adapter of a headless model has none where the file has one. So the names of one adapter are resolved together:
each as it stands, or all others under the one shift of prefix that fits them all. Two shifts that fit are an
ambiguity, and are refused: a guess that is wrong merges into the wrong layers without an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from loreg.errors import BadInput

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


def resolve(wanted: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """Map each wanted tensor name to a name of the checkpoint. Names that fit nowhere are left out.

    Raises BadInput where two different shifts of prefix fit equally well.
    """
    wanted, known = list(wanted), set(names)
    resolved = {name: name for name in wanted if name in known}
    rest = [name for name in wanted if name not in known]
    fits = {name: found for name in rest if (found := _shifts(name, known))}
    if not fits:
        return resolved
    common = set.intersection(*(set(found) for found in fits.values()))
    if len(common) != 1:
        name = min(fits)
        places = sorted(found for shifts in fits.values() for found in shifts.values() if found)
        raise BadInput(
            f"{name!r} is not in the checkpoint, and no single prefix fits all such names: it could be one of "
            f"{', '.join(sorted(set(fits[name].values())))[:200] or ', '.join(places)[:200]}."
        )
    (shift,) = common
    resolved.update((name, found[shift]) for name, found in fits.items())
    return resolved


def _shifts(name: str, known: Collection[str]) -> Mapping[Shift, str]:
    """Every shift that turns ``name`` into a known name, with that name."""
    found: dict[Shift, str] = {}
    parts = name.split(".")
    # At least "module.weight" stays: "weight" alone would fit anything.
    for cut in range(1, len(parts) - 1):
        rest = ".".join(parts[cut:])
        if rest in known:
            found[".".join(parts[:cut]) + ".", ""] = rest
    for candidate in known:
        if candidate.endswith("." + name):
            found["", candidate.removesuffix(name)] = candidate
    for taken, put in _RENAMED:
        renamed = put + name.removeprefix(taken)
        if name.startswith(taken) and renamed in known:
            found[taken, put] = renamed
    return found
