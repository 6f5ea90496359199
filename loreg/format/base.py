"""What is recorded of a base: its tensors, where it came from, and what an adapter remembers of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loreg.digest import Digest
from loreg.format import canonical_json
from loreg.format.fields import Fields
from loreg.format.fingerprint import BaseIdentity, BaseTensor, identify
from loreg.format.recipe import FORMAT, Recipe, tensors_from, tensors_to_json

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class BaseManifest:
    """A base as its tensors [B6]: what an unmerge checks against when the base itself is gone."""

    tensors: tuple[BaseTensor, ...]

    @cached_property
    def identity(self) -> BaseIdentity:
        return identify(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def by_name(self) -> dict[str, BaseTensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    def dump(self) -> bytes:
        return self._dumped

    @cached_property
    def _dumped(self) -> bytes:
        return canonical_json.dumps({"format": FORMAT, "kind": "base", "tensors": tensors_to_json(self.tensors)})

    @classmethod
    def parse(cls, data: bytes) -> BaseManifest:
        """From canonical bytes [J6, B6]. Raises BadInput."""
        with Fields(canonical_json.loads_canonical(data, what="base manifest"), "base") as f:
            f.choice("format", FORMAT)
            f.choice("kind", "base")
            return cls(tensors_from(f))


@dataclass(frozen=True, slots=True)
class HubPin:
    """A repository at one commit, with the sha256 of its weight files: an identity that needs no download."""

    repo: str
    commit: str
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {"repo": self.repo, "commit": self.commit, "files": dict(self.files)}

    @classmethod
    def from_fields(cls, fields: Fields) -> HubPin:
        with fields as f:
            repo, commit, files = f.text("repo"), f.text("commit"), f.raw_object("files")
        if not _COMMIT.fullmatch(commit):
            fields.refuse("commit", "40 lower-case hex digits", commit)
        checked = Fields(files, f"{fields.path}.files")
        return cls(repo, commit, {name: checked.sha256(name) for name in files})


@dataclass(frozen=True, slots=True)
class BaseReference:
    """The base an adapter was trained on [M3]. ``touched``: checkpoint tensor → leaf, for what it adapts.

    ``recipe``: how that base was itself merged, if it was.
    """

    name: str
    hub: HubPin | None
    identity: BaseIdentity
    touched: Mapping[str, Digest]
    recipe: Recipe | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "hub": self.hub.to_json() if self.hub else None,
            "weights_root": str(self.identity.weights_root),
            "structure_root": str(self.identity.structure_root),
            "content_set": str(self.identity.content_set),
            "touched": {name: str(leaf) for name, leaf in self.touched.items()},
            "recipe": self.recipe.to_json() if self.recipe else None,
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> BaseReference:
        with fields as f:
            hub, recipe = f.optional_object("hub"), f.optional_object("recipe")
            merged = Recipe.from_fields(recipe) if recipe else None
            if merged:
                merged.require_merge(f"{fields.path}.recipe")
            return cls(
                name=f.text("name"),
                hub=HubPin.from_fields(hub) if hub else None,
                identity=BaseIdentity(f.digest("weights_root"), f.digest("structure_root"), f.digest("content_set")),
                touched=f.digests("touched"),
                recipe=merged,
            )
