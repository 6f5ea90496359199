"""``Registry``: the Python API. Every command of the command line is one call on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from loreg.catalog import Database
from loreg.catalog.models import BaseRow
from loreg.checkpoint import Advance
from loreg.errors import UsageError
from loreg.format.reference import check_name, check_tag
from loreg.registry.bases import Base, Bases
from loreg.registry.storage import Storage
from loreg.registry.versions import Version, Versions
from loreg.store import BlobCache, Store
from loreg.store.cache import limit_from_environment

if TYPE_CHECKING:
    from loreg.algebra.delta import LowRank
    from loreg.merge.output import MergeResult
    from loreg.merge.verify import Verification
    from loreg.registry.composing import Composed
    from loreg.registry.extracting import Extracted
    from loreg.registry.merging import Unmerged
    from loreg.registry.resizing import Resized

__all__ = ["Registry", "Version", "silent"]


def silent(done: int) -> None:
    """The progress callback that tells nobody."""


class Registry(Versions):
    """Adapters, bases and blobs, under one roof. Use as a context manager, or call ``close``.

    Where a method takes ``advance``, it is told the number of bytes that were just read or written.
    """

    def __init__(self, home: Path, database: Database, store: Store, strict: bool = False) -> None:
        cache = BlobCache(home / "cache" / "blobs", limit_from_environment())
        super().__init__(database, Storage(database, store, cache, strict))
        self.home = home
        self.served: dict[Path, Any] = {}  # who serves from it, by place: theirs, and gone when this is
        self.bases = Bases(self.storage)

    def close(self) -> None:
        self.database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Bases

    def add_base(
        self,
        source: str | Path,
        name: str | None = None,
        *,
        revision: str | None = None,
        dequantize: str | Path | None = None,
        dtype: str | None = None,
        advance: Advance = silent,
    ) -> Base:
        """Hash a model and register it under ``name`` (default: of its directory or repository).

        ``source`` is a directory, a safetensors file or a Hub id (``revision``: branch, tag or commit).
        ``dequantize``: write the 16-bit model of a quantised one to this new directory, as ``dtype`` (``bfloat16`` or
        ``float16``), and register that. Raises NotFound, BadInput, RemoteError; Conflict if the name stands for
        other weights.
        """
        if dequantize is None:
            return self.bases.add(source, name, revision, advance)
        return self.bases.add_dequantised(source, name, revision, Path(dequantize), dtype, advance)

    def list_bases(self) -> list[BaseRow]:
        return self.bases.all()

    def show_base(self, name: str) -> Base:
        """A registered base. Raises NotFound."""
        return self.bases.show(name)

    # Versions

    def push(
        self,
        path: str | Path,
        *,
        base: str | Path,
        name: str | None = None,
        tags: Iterable[str] = (),
        format: str | None = None,  # noqa: A002 - the option's name
        initial: str | Path | None = None,
        alpha: float | None = None,
        enable_lora: Sequence[bool] | None = None,
        note: str | None = None,
        advance: Advance = silent,
    ) -> Version:
        """Store the adapter at ``path``, a directory or a file, bound to ``base`` (a name, a path or a Hub id).

        The same content under the same name is the same version. ``name`` defaults to that of ``path``. ``initial``:
        the directory of the same adapter as it was saved before training, for PiSSA, OLoRA, CorDA and LoRA-GA.
        ``alpha``, ``enable_lora``: lora_alpha of loralib's layers, and which blocks of its MergedLinear have LoRA.
        Raises UsageError for an option that the format has not, or lacks; BadInput or Unsupported for an adapter that
        is damaged, does not fit the base, or is of a kind that is not handled; nothing is stored then.
        """
        from loreg import adapters
        from loreg.adapters.binding import bind
        from loreg.checkpoint import Checkpoint, reading
        from loreg.registry import packing
        from loreg.registry.dequantising import require_plain

        path = Path(path)
        chosen = check_name(name) if name is not None else _name_of(path)
        wanted = [check_tag(tag) for tag in tags]
        before = Path(initial) if initial is not None else None
        with reading(path):
            draft = adapters.read(path, format, initial=before, alpha=alpha, enable_lora=enable_lora)
        known = self.bases.find(base, advance)
        config: dict[str, Any] = {}
        if known.path is not None and known.path.exists():
            checkpoint = Checkpoint.open(known.path)
            require_plain(checkpoint)
            config = checkpoint.config()
        binding = bind(draft, known.manifest.by_name(), config)
        leaves = packing.touched(known.manifest, packing.bound_tensors(binding))
        with reading(path):
            manifest, blobs = packing.pack(draft, binding, replace(known.reference(), touched=leaves))
        self.bases.register(known)
        with reading(path):  # what the disk of the store says is an error of loreg by then
            version = self.commit_version(chosen, manifest, blobs, wanted, note)
        return replace(version, left_out=draft.left_out)

    def export(
        self,
        reference: str,
        out: str | Path,
        *,
        format: str = "original",  # noqa: A002 - the option's name
    ) -> Path:
        """Write a version to the new directory ``out``: ``original`` (the pushed bytes), ``peft``, or ``folded``, of
        which engines that read no more than r and lora_alpha get the right sum (see ``adapters.peft_export``)."""
        from loreg.registry.exporting import export

        return export(self.storage, self.resolve(reference), Path(out), format)

    def load(self, reference: str, device: str = "cpu") -> dict[str, LowRank]:
        """Module path → its delta on ``device``, in the orientation in which the checkpoint stores the weight.

        The stored factors and scale as they are, on a CPU as views of a private mapping of the verified blob; a
        composed module's several terms are stacked into float64 factors of scale 1, each element off by at most 2⁻⁵³
        of itself. Replaced tensors and biases are not in it (``resolve(reference).manifest`` lists them).
        """
        from loreg.registry.inputs import load

        return load(self, self.resolve(reference), device)

    # Merging

    def merge(
        self,
        expression: str,
        out: str | Path,
        *,
        base: str | Path | None = None,
        method: str = "linear",
        parameters: Mapping[str, Any] | None = None,
        dtype: str | None = None,
        device: str = "cpu",
        verify: str = "probe",
        allow_base_mismatch: bool = False,
        dequantize: bool = False,
        undo: bool = False,
        threads: int | None = None,
        memory: int | None = None,
        progress: Callable[[str, int], Advance] | None = None,
    ) -> MergeResult:
        """W' = round(W + Σ wᵢΔWᵢ) for every tensor of the base, written to the new directory ``out``.

        Each element is the value of the storage dtype nearest to the exact sum (``loreg-exact-1``), whatever
        the device; for adapters with norms or roots, such as DoRA, and other methods, nearest to a float64 value
        that is itself the same everywhere (``loreg-f64-1``). ``base``: default is where the adapters' own base is
        registered. ``method`` and ``parameters``: see ``loreg.format.methods``; one that works on factors composes
        a version first, and merges that. ``dtype``: ``bfloat16``, ``float16`` or ``float32``, for every tensor that
        is one of these or float8. ``verify``: ``probe``, ``exact``, ``forward`` or ``none``. ``dequantize``: merge
        into the 16-bit model of a quantised base; the result says so. ``undo``: write a journal, with which
        ``unmerge`` needs no base. ``threads``: default is as many as torch
        uses; ``memory``: bytes that this process may be resident with, for which it takes fewer threads and smaller
        tiles. ``progress(label, total bytes)`` gives the callback of one stage. Raises BaseMismatch, Conflict,
        CheckFailed, BadInput, UsageError; nothing is left at ``out`` then. A merge that was killed goes on from the
        shards that it had finished, if it is the same.
        """
        (result,) = self.merge_many(
            [(expression, out)],
            base=base,
            method=method,
            parameters=parameters,
            dtype=dtype,
            device=device,
            verify=verify,
            allow_base_mismatch=allow_base_mismatch,
            dequantize=dequantize,
            undo=undo,
            threads=threads,
            memory=memory,
            progress=progress,
        )
        return result

    def merge_many(self, wanted: Iterable[tuple[str, str | Path]], **options: Any) -> list[MergeResult]:
        """Several merges into one base: each an expression and its new directory, with the options of ``merge`` for
        all. The base is read once. All of them are there in the end, or none."""
        from loreg.registry.merging import MergeOptions, merge_many

        options["parameters"] = options.get("parameters") or {}
        return merge_many(self, [(expression, Path(out)) for expression, out in wanted], MergeOptions(**options))

    def unmerge(
        self,
        merged: str | Path,
        out: str | Path,
        *,
        base: str | Path | None = None,
        journal: bool | None = None,
        advance: Advance = silent,
    ) -> Unmerged:
        """The base of a merged model, bit for bit, in the new directory ``out``; checked against its digests.

        From the base's own files, or where they are not at hand from the ``journal`` that the merge left, if there is
        one; True or False says which of the two.
        """
        from loreg.registry.merging import unmerge

        return unmerge(self, Path(merged), Path(out), base, journal, advance)

    def compose(
        self,
        expression: str,
        name: str,
        *,
        method: str = "linear",
        rank: int | None = None,
        parameters: Mapping[str, Any] | None = None,
        device: str = "cpu",
        tags: Iterable[str] = (),
        note: str | None = None,
    ) -> Composed:
        """Store what a method makes of adapters as a version of ``name``.

        ``linear`` keeps every term of the weighted sum and is exact. The others, listed with their ``parameters`` in
        ``loreg.format.methods``, give one pair of float32 factors per module, of at most ``rank`` or holding
        ``energy`` of the square norm, and report the relative Frobenius error of what is stored. Raises
        BaseMismatch for adapters of different bases, Unsupported for what the method does not define, UsageError.
        """
        from loreg.registry.composing import compose

        given = dict(parameters or {})
        if rank is not None and given.setdefault("rank", rank) != rank:
            raise UsageError(f"rank is given twice, as {rank} and as {given['rank']} in parameters: give it once.")
        return compose(self, expression, name, method=method, parameters=given, device=device, tags=tags, note=note)

    def resize(
        self,
        reference: str,
        name: str | None = None,
        *,
        rank: int | None = None,
        energy: float | None = None,
        device: str = "cpu",
        tags: Iterable[str] = (),
        note: str | None = None,
    ) -> Resized:
        """Store a version truncated to ``rank`` or ``energy``, as ``svd`` composes it, under ``name`` or its own.

        ``rank`` bounds the rank of every module; ``energy`` in (0, 1] asks for the least that keeps that share of its
        square norm; with both, the smaller rank holds. A rank above a module's own changes the factors, not the
        product. Raises UsageError without either, or for a version without modules; Unsupported for a module that is
        no product of factors, such as DoRA; NotFound.
        """
        from loreg.registry.resizing import resize

        return resize(self, reference, name, rank=rank, energy=energy, device=device, tags=tags, note=note)

    def extract(
        self,
        base: str | Path,
        tuned: str | Path,
        name: str,
        *,
        rank: int | None = None,
        energy: float | None = None,
        targets: Iterable[str] = (),
        exclude: Iterable[str] = (),
        device: str = "cpu",
        tags: Iterable[str] = (),
        note: str | None = None,
        progress: Callable[[str, int], Advance] | None = None,
    ) -> Extracted:
        """Store what tells a fine-tuned model from its base as a version of ``name``: the inverse of a merge.

        ``base``, ``tuned``: names, paths or Hub ids. ``rank`` bounds that of every tensor, ``energy`` in (0, 1] asks
        for the least that keeps that share of its square norm; with both, the smaller rank holds. ``targets``,
        ``exclude``: patterns of the tensors that are meant, and are not. ``progress(label, total bytes)`` gives the
        callback of one stage. ``loreg.registry.extracting.extract`` says what is stored, and what it raises.
        """
        from loreg.registry.extracting import extract

        return extract(
            self,
            base,
            tuned,
            name,
            rank=rank,
            energy=energy,
            targets=targets,
            exclude=exclude,
            device=device,
            tags=tags,
            note=note,
            progress=progress,
        )

    def verify(
        self, subject: str | Path, *, kind: str = "probe", base: str | Path | None = None, advance: Advance = silent
    ) -> Verification:
        """Verify a merged directory (``probe``, ``exact``, ``forward``), or the blobs of a stored version."""
        from loreg.registry.merging import verify

        return verify(self, subject, kind, base, advance)

    # Hub

    def sync_push(self, reference: str, remote: str, *, private: bool = False) -> str:
        """Send a version to ``hf://owner/name`` in one commit; returns the commit. Raises RemoteError."""
        from loreg.registry.syncing import sync_push

        return sync_push(self, reference, remote, private)

    def sync_pull(self, remote: str, name: str, tags: Iterable[str] = ()) -> Version:
        """Fetch ``hf://owner/name[@rev]`` as a version of ``name``, every digest verified. Raises RemoteError."""
        from loreg.registry.syncing import sync_pull

        return sync_pull(self, remote, name, tags)


def _name_of(path: Path) -> str:
    last = path.resolve().stem if path.is_file() else path.resolve().name
    name = re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")
    if not name:
        raise UsageError(f"{path} gives no name for the adapter: give --name.")
    return check_name(name[:128])
