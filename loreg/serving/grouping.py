"""Which modules of adapters an engine holds as one layer, and how large those are that no adapter has."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loreg.errors import BadInput, NotFound, Unsupported
from loreg.format.fingerprint import BaseTensor
from loreg.format.module import IN_OUT, Module
from loreg.registry import Registry, Version

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
"""The number of a layer: the first part of a path that is one."""


@dataclass(frozen=True, slots=True)
class Member:
    """A module by its path in the model, and the features that it has."""

    path: str
    inputs: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that an engine holds as one layer. ``slices``: of how many that layer is made, more than there are
    modules where it is one in the checkpoint too."""

    name: str
    members: tuple[Member, ...]
    slices: int
    embeds: bool

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(member.path for member in self.members)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(member.outputs for member in self.members)


def groups(
    registry: Registry, versions: Sequence[Version], packed: Mapping[str, Sequence[str]] | None
) -> list[Group]:
    """The groups of all modules that ``versions`` have: those that ``packed`` names side by side; without it all
    layers of one kind. Raises BadInput for modules that differ between versions, Unsupported and NotFound for a
    member whose size is not known."""
    known = _Known(registry, versions)
    return _stacks(known) if packed is None else _slices(known, packed)


class _Known:
    """The modules that any version has, and those of their base."""

    def __init__(self, registry: Registry, versions: Sequence[Version]) -> None:
        self._registry, self._first = registry, versions[0]
        self._base: dict[str, BaseTensor] | None = None
        self.modules: dict[str, Module] = {}
        for version in versions:
            for path, module in version.manifest.modules.items():
                if ".experts." in path:
                    raise Unsupported(
                        f"{version} adapts {path!r}, a layer of one expert, which engines stack in ways of their "
                        "own: have the engine load the adapter (serving.resolve)."
                    )
                other = self.modules.setdefault(path, module)
                if _shape(other) != _shape(module):
                    raise BadInput(
                        f"{version} has {path!r} as {_described(module)}, and an adapter before it as "
                        f"{_described(other)}: expected the same, as they are packed into one tensor."
                    )

    @property
    def base(self) -> Mapping[str, BaseTensor]:
        """The tensors of the base. Raises NotFound if it is not registered."""
        if self._base is None:
            reference = self._first.manifest.base
            base = self._registry.bases.of_root(reference.identity.weights_root, reference.name)
            if base is None:
                raise NotFound(
                    f"The base {reference.name!r} is not registered, and its layers are needed to pack adapters that "
                    "do not have all of them: add it with 'loreg base add'."
                )
            self._base = base.manifest.by_name()
        return self._base

    def member(self, path: str) -> Member:
        module = self.modules[path]
        return Member(path, module.in_features, module.out_features)

    def sibling(self, path: str, of: str) -> Member:
        """A module that no version has: one of the base, called as the module at ``of`` is, but for what differs
        between the paths."""
        module = self.modules[of]
        old, new = _difference(of, path)
        if (tensor := self.base.get(_replaced(module.tensor, old, new))) is None or len(tensor.shape) != 2:
            raise Unsupported(
                f"An engine holds {of!r} in one layer with {path!r}, which the base "
                f"{self._first.manifest.base.name!r} does not have: say what is one layer in this model (packed=…)."
            )
        out, into = tensor.shape[::-1] if module.orientation == IN_OUT else tensor.shape
        return Member(path, into, out)


def _slices(known: _Known, packed: Mapping[str, Sequence[str]]) -> list[Group]:
    of = {name: whole for whole, names in packed.items() for name in names}
    found: dict[str, Group] = {}
    for path, module in known.modules.items():
        parent, dot, last = path.rpartition(".")
        name = f"{parent}{dot}{of.get(last, last)}"
        embeds = module.kind == "embedding"
        if last not in of:
            if name in found:
                raise _twice(name, path)
            found[name] = Group(name, (known.member(path),), len(packed.get(last, (last,))), embeds)
        elif name not in found:
            paths = [f"{parent}{dot}{slice_}" for slice_ in packed[of[last]]]
            members = tuple(known.member(p) if p in known.modules else known.sibling(p, path) for p in paths)
            found[name] = Group(name, members, len(members), embeds)
        elif path not in found[name].paths:
            raise _twice(name, path)
    return list(found.values())


def _stacks(known: _Known) -> list[Group]:
    kinds: dict[str, dict[int, str]] = {}
    for path in known.modules:
        number = _LAYER.search(path)
        kind = _LAYER.sub("*", path, count=1)
        kinds.setdefault(kind, {})[int(number[0]) if number else 0] = path
    found = []
    for kind, paths in kinds.items():
        some = next(iter(paths.values()))
        count = _layers(known, some)
        numbered = [paths.get(n) or kind.replace("*", str(n), 1) for n in range(count)]
        members = tuple(known.member(p) if p in known.modules else known.sibling(p, some) for p in numbered)
        if len({(member.inputs, member.outputs) for member in members}) > 1:
            raise Unsupported(f"The layers {kind!r} differ in size, and sgmv stacks equal ones: use another layout.")
        found.append(Group(kind, members, len(members), known.modules[some].kind == "embedding"))
    return found


def _layers(known: _Known, path: str) -> int:
    """How many layers like the one at ``path`` the base has."""
    if _LAYER.search(path) is None:
        return 1
    tensor = known.modules[path].tensor
    like = re.compile(r"(\d+)".join(map(re.escape, _LAYER.split(tensor, maxsplit=1))))
    return 1 + max(int(match[1]) for name in known.base if (match := like.fullmatch(name)))


def _difference(one: str, other: str) -> tuple[str, str]:
    """The part in which two paths of as many parts differ."""
    return next((a, b) for a, b in zip(one.split("."), other.split("."), strict=True) if a != b)


def _replaced(tensor: str, old: str, new: str) -> str:
    """The name with its first part ``old``, if that is a number, or else its last, replaced by ``new``."""
    parts = tensor.split(".")
    if old in parts:
        place = parts.index(old) if old.isdigit() else len(parts) - 1 - parts[::-1].index(old)
        parts[place] = new
    return ".".join(parts)


def _twice(name: str, path: str) -> Unsupported:
    return Unsupported(
        f"One adapter has {path!r} as a layer of its own, and another as a part of {name!r}, of which an engine "
        "holds one: pack them apart."
    )


def _shape(module: Module) -> tuple[object, ...]:
    return module.kind, module.in_features, module.out_features


def _described(module: Module) -> str:
    return f"{module.kind} from {module.in_features} to {module.out_features}"
