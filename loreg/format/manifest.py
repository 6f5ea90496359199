"""The manifest of an adapter version: frozen values, canonical JSON in and out.

The digest of the manifest is the identity of the version, so nothing that changes between two pushes of the
same content (a time, a path, a note, a user) has a place in it: those live in the catalog.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loreg.digest import Digest
from loreg.errors import BadInput
from loreg.format import canonical_json
from loreg.format.base import BaseReference
from loreg.format.fields import Fields
from loreg.format.module import FullTensor, Module
from loreg.format.recipe import FORMAT, Recipe
from loreg.format.safetensors import check_name
from loreg.format.terms import TensorRef


@dataclass(frozen=True, slots=True)
class BlobRef:
    """A blob the version needs. ``role``: ``factors``, ``full`` or ``source``."""

    digest: Digest
    sha256: str
    size: int
    role: str

    def to_json(self) -> dict[str, Any]:
        return {"digest": str(self.digest), "sha256": self.sha256, "size": self.size, "role": self.role}

    @classmethod
    def from_fields(cls, fields: Fields) -> BlobRef:
        with fields as f:
            role = f.choice("role", "factors", "full", "source")
            return cls(f.digest("digest"), f.sha256("sha256"), f.natural("size"), role)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file as it was pushed [M8]: the bytes of ``blob``, then those of ``tensors`` in this order.

    A small file is all blob. A safetensors file is its original header, then tensors: ``factors:NAME`` names
    one in the factors blob, ``full:NAME`` a replaced tensor.
    """

    name: str
    size: int
    sha256: str
    blob: Digest
    tensors: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "sha256": self.sha256,
            "blob": str(self.blob),
            "tensors": list(self.tensors),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> SourceFile:
        with fields as f:
            file = cls(f.text("name"), f.natural("size"), f.sha256("sha256"), f.digest("blob"), f.texts("tensors"))
        check_file_name(file.name, fields.path)
        return file


_FILE_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff/\\]+")


def is_file_name(name: str) -> bool:
    """Whether ``name`` is a bare file name that a manifest can hold [M8]."""
    return bool(_FILE_NAME.fullmatch(name)) and name not in (".", "..") and len(name.encode()) <= 255


def check_file_name(name: str, where: str) -> str:
    """A bare file name, or BadInput [M8]: a manifest must not write outside the directory of an export."""
    if not is_file_name(name):
        raise BadInput(f"{where}: expected a bare file name, found {name!r}.")
    return name


@dataclass(frozen=True, slots=True)
class Source:
    """What was pushed: its format, and every file of it."""

    format: str
    files: tuple[SourceFile, ...]

    def to_json(self) -> dict[str, Any]:
        return {"format": self.format, "files": [file.to_json() for file in self.files]}

    @classmethod
    def from_fields(cls, fields: Fields) -> Source:
        with fields as f:
            return cls(f.text("format"), tuple(SourceFile.from_fields(item) for item in f.items("files")))


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where the version came from. ``recipe``: how it was composed; ``training``: the trainer's own notes."""

    parents: tuple[Digest, ...] = ()
    recipe: Recipe | None = None
    creator: str | None = None
    license: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "parents": [str(parent) for parent in self.parents],
            "recipe": self.recipe.to_json() if self.recipe else None,
            "creator": self.creator,
            "license": self.license,
            "training": dict(self.training),
        }

    @classmethod
    def from_fields(cls, fields: Fields) -> Provenance:
        with fields as f:
            recipe = f.optional_object("recipe")
            return cls(
                parents=tuple(Digest.parse(text) for text in f.texts("parents")),
                recipe=Recipe.from_fields(recipe) if recipe else None,
                creator=f.optional_text("creator"),
                license=f.optional_text("license"),
                training=f.raw_object("training"),
            )


@dataclass(frozen=True, slots=True)
class Tie:
    """A tensor that is the same as ``to`` in the model; ``untied``: the adapter changes one of the two alone, so that
    a merge stores both."""

    to: str
    untied: bool

    def to_json(self) -> dict[str, Any]:
        return {"to": self.to, "untied": self.untied}

    @classmethod
    def from_fields(cls, fields: Fields) -> Tie:
        with fields as f:
            return cls(f.text("to"), f.flag("untied"))


@dataclass(frozen=True, slots=True)
class AdapterManifest:
    """One version of an adapter. ``modules`` by path in the model, ``full`` by name in the checkpoint.

    ``ties``: a tensor that the model has in common with another, as a head with its embedding → that other [M10].
    """

    base: BaseReference
    modules: Mapping[str, Module]
    full: Mapping[str, FullTensor]
    blobs: tuple[BlobRef, ...]
    source: Source | None = None
    provenance: Provenance = field(default_factory=Provenance)
    annotations: Mapping[str, Any] = field(default_factory=dict)
    ties: Mapping[str, Tie] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """The largest rank of a module; 0 for an adapter that only replaces tensors."""
        return max((module.rank for module in self.modules.values()), default=0)

    @property
    def targets(self) -> tuple[str, ...]:
        """The last parts of the modules' paths: ``q_proj``, ``v_proj``, …"""
        return tuple(sorted({path.rpartition(".")[2] for path in self.modules}))

    @property
    def nbytes(self) -> int:
        """The sum over its blobs."""
        return sum(blob.size for blob in self.blobs)

    @property
    def untied(self) -> dict[str, str]:
        """Every tensor that the adapter unties → the one that it was tied to."""
        return {name: tie.to for name, tie in self.ties.items() if tie.untied}

    def replaced(self) -> dict[str, FullTensor]:
        """What of ``full`` differs from the base's own tensor: PEFT saves an adapted embedding with its base."""
        return {name: full for name, full in self.full.items() if self.base.touched.get(name) != full.leaf(name)}

    def factor_tensors(self) -> dict[str, TensorRef]:
        """Everything in the factors blob, by name [M7]."""
        return dict(itertools.chain.from_iterable(module.tensors(path) for path, module in self.modules.items()))

    def blob(self, role: str) -> BlobRef | None:
        return next((blob for blob in self.blobs if blob.role == role), None)

    def dump(self) -> bytes:
        return canonical_json.dumps(
            {
                "format": FORMAT,
                "kind": "adapter",
                "base": self.base.to_json(),
                "modules": {path: module.to_json() for path, module in self.modules.items()},
                "full": {name: tensor.to_json() for name, tensor in self.full.items()},
                "blobs": [blob.to_json() for blob in self.blobs],
                "source": self.source.to_json() if self.source else None,
                "provenance": self.provenance.to_json(),
                "annotations": dict(self.annotations),
                **({"ties": {name: tie.to_json() for name, tie in self.ties.items()}} if self.ties else {}),
            }
        )

    @property
    def digest(self) -> Digest:
        return Digest.of(self.dump())

    @classmethod
    def parse(cls, data: bytes) -> AdapterManifest:
        """From canonical bytes [J6, M1–M8]. Raises BadInput."""
        with Fields(canonical_json.loads_canonical(data, what="manifest"), "manifest") as f:
            f.choice("format", FORMAT)  # [M1]
            f.choice("kind", "adapter")
            source = f.optional_object("source")
            manifest = cls(
                base=BaseReference.from_fields(f.object("base")),
                modules={path: Module.from_fields(entry) for path, entry in f.mapping("modules")},
                full={name: FullTensor.from_fields(entry) for name, entry in f.mapping("full")},
                blobs=tuple(BlobRef.from_fields(entry) for entry in f.items("blobs")),
                source=Source.from_fields(source) if source else None,
                provenance=Provenance.from_fields(f.object("provenance")),
                annotations=f.raw_object("annotations"),
                ties=_ties(f),
            )
        manifest.check()
        return manifest

    def check(self) -> None:
        """The rules that span several fields [M3, M6, M8]. Raises BadInput."""
        if not self.modules and not self.full:
            raise BadInput("manifest: it adapts no module and replaces no tensor.")
        digests = [blob.digest for blob in self.blobs]
        if digests != sorted(set(digests)):  # [M6]
            raise BadInput("manifest.blobs: expected each digest once, in order.")
        if sum(blob.role == "factors" for blob in self.blobs) != bool(self.modules):  # [M6]
            raise BadInput("manifest.blobs: expected one blob of factors if there are modules, and none if not.")
        edited = [module.tensor for module in self.modules.values()]
        edited += [module.bias_tensor for module in self.modules.values() if module.bias_tensor]
        if len(set(edited)) != len(edited):  # [M4]
            raise BadInput("manifest.modules: two modules adapt the same tensor of the checkpoint.")
        known = {*self.base.touched, *(name for name, tie in self.ties.items() if tie.untied)}
        if missing := sorted({*edited, *(tie.to for tie in self.ties.values())} - known):  # [M3, M10]
            raise BadInput(f"manifest.base.touched: the adapted tensor {missing[0]!r} is missing.")
        needed = {("full", tensor.blob) for tensor in self.full.values()}
        needed |= {("source", file.blob) for file in (self.source.files if self.source else ())}
        if lost := sorted(needed - {(blob.role, blob.digest) for blob in self.blobs}):  # [M6]
            raise BadInput(f"manifest.blobs: the {lost[0][0]} blob {lost[0][1]} is missing.")
        names = [file.name for file in self.source.files] if self.source else []
        if len(set(names)) != len(names):  # [M8]
            raise BadInput("manifest.source.files: two files have one name.")
        known = {f"factors:{name}" for name in self.factor_tensors()} | {f"full:{name}" for name in self.full}
        for file in self.source.files if self.source else ():
            if strangers := sorted(set(file.tensors) - known):  # [M8]
                raise BadInput(f"manifest.source: {file.name} holds {strangers[0]!r}, which is not a tensor of it.")


def _ties(fields: Fields) -> dict[str, Tie]:
    """The field is left out where there is none, as in all manifests before it [M10]."""
    if not fields.has("ties"):
        return {}
    ties = {name: Tie.from_fields(entry) for name, entry in fields.mapping("ties")}
    for name, tie in ties.items():
        check_name(name, "manifest.ties")
        if tie.to in ties:
            raise BadInput(f"manifest.ties: {name!r} is tied to {tie.to!r}, which is itself tied to another.")
    if not ties:
        raise BadInput("manifest.ties: expected at least one, or no such field.")
    return ties
