"""``loreg base``: the models that adapters are bound to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from loreg.cli import text
from loreg.cli.console import Console
from loreg.cli.program import Group

if TYPE_CHECKING:
    from loreg.registry.bases import Base


@click.group(cls=Group)
def base() -> None:
    """Register base models, and look at them."""


@base.command()
@click.argument("source", metavar="PATH|HUB_ID")
@click.option("--name", metavar="N", help="What to call it. [default: after its directory or repository]")
@click.option("--revision", metavar="R", help="Branch, tag or commit on the Hub.")
@click.option(
    "--dequantize",
    metavar="DIR",
    help="Write the 16-bit model of a quantised one to this new directory; register that.",
)
@click.option("--dtype", metavar="D", help="With --dequantize: bfloat16 or float16. [default: as config.json says]")
@click.pass_obj
def add(console: Console, /, source: str, **options: Any) -> None:
    """Hash a model, and register it: loreg knows a base by its bytes.

    \b
      loreg base add ./models/gpt2
      loreg base add openai-community/gpt2 --revision main --name gpt2
      loreg base add ./models/llama-nf4 --dequantize ./models/llama-bf16
    """
    with console.open() as registry, console.progress() as bar:
        added = registry.add_base(source, **options, advance=bar.stage("hashing", 0))
    console.emit(_document(added), _text(added))


@base.command("ls")
@click.pass_obj
def list_bases(console: Console) -> None:
    """List the bases that are registered."""
    with console.open() as registry:
        rows = registry.list_bases()
    document = [
        {
            "name": row.name,
            "weights_root": str(row.weights_root),
            "structure_root": str(row.structure_root),
            "tensors": row.tensors,
            "bytes": row.bytes,
            "path": row.path,
            "hub": f"{row.hub_repo}@{row.hub_commit}" if row.hub_repo else None,
            "created_at": row.created_at.isoformat(),
        }
        for row in rows
    ]
    cells = [
        (
            row.name,
            str(row.weights_root),
            f"{row.tensors:,}",
            text.size(row.bytes),
            text.age(row.created_at),
            row.path,
        )
        for row in rows
    ]
    header = ("NAME", "WEIGHTS ROOT", "TENSORS", "SIZE", "AGE", "PATH")
    shown = [tuple(cell or "" for cell in row) for row in cells]
    empty = "No base is registered yet: add one with 'loreg base add PATH'."
    console.emit({"bases": document}, text.table(header, shown, right=(2, 3, 4), give=5) if rows else empty)


@base.command()
@click.argument("name", metavar="N")
@click.pass_obj
def show(console: Console, name: str) -> None:
    """Show a base: its digests, where it is, and how it was merged, if it was."""
    with console.open() as registry:
        found = registry.show_base(name)
    console.emit({**_document(found), "manifest": json.loads(found.manifest.dump())}, _text(found))


def _document(base: Base) -> dict[str, Any]:
    identity = base.manifest.identity
    return {
        "name": base.name,
        "weights_root": str(identity.weights_root),
        "structure_root": str(identity.structure_root),
        "content_set": str(identity.content_set),
        "tensors": len(base.manifest.tensors),
        "bytes": base.manifest.nbytes,
        "path": str(base.path) if base.path else None,
        "hub": base.hub.to_json() if base.hub else None,
        "recipe": base.recipe.to_json() if base.recipe else None,
    }


def _text(base: Base) -> str:
    identity = base.manifest.identity
    return text.fields(
        [
            ("base", base.name),
            ("weights_root", identity.weights_root),
            ("structure_root", identity.structure_root),
            ("tensors", f"{len(base.manifest.tensors):,}, {text.size(base.manifest.nbytes)}"),
            ("path", base.path),
            ("hub", f"{base.hub.repo} at {base.hub.commit}" if base.hub else None),
            ("recipe", f"{base.recipe.digest} on {base.recipe.base}" if base.recipe else None),
        ]
    )
