"""Commands on stored adapters: push, ls, show, log, tag, export."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from loreg.cli import text
from loreg.cli.console import Console
from loreg.cli.program import Command

if TYPE_CHECKING:
    from loreg.catalog.queries import VersionRow
    from loreg.registry import Version


def flags(_: click.Context, __: click.Parameter, value: str | None) -> list[bool] | None:
    """``1,0,1`` as booleans."""
    if value is None:
        return None
    if not set(value.split(",")) <= {"0", "1"}:
        raise click.BadParameter(f"{value!r} is no list such as 1,0,1.")
    return [flag == "1" for flag in value.split(",")]


@click.command(cls=Command)
@click.argument("path")
@click.option("--base", metavar="NAME|PATH|HUB_ID", required=True, help="The model that it was trained on.")
@click.option("--name", metavar="N", help="What to call it. [default: after PATH]")
@click.option("--tag", "tags", metavar="T", multiple=True, help="Point this tag at it too; may be repeated.")
@click.option("--format", metavar="F", help="The format of PATH. [default: recognised]")
@click.option("--initial", metavar="DIR", help="The adapter as saved before training (PiSSA, OLoRA, CorDA, LoRA-GA).")
@click.option("--alpha", type=float, metavar="A", help="lora_alpha of loralib's layers, which its files do not say.")
@click.option(
    "--enable-lora", callback=flags, metavar="1,0,1", help="The blocks with LoRA of loralib's MergedLinear layers."
)
@click.option("--note", "-m", metavar="NOTE", help="A line for the log.")
@click.pass_obj
def push(
    console: Console,
    path: str,
    base: str,
    name: str | None,
    tags: tuple[str, ...],
    format: str | None,  # noqa: A002 - the option's name
    initial: str | None,
    alpha: float | None,
    enable_lora: list[bool] | None,
    note: str | None,
) -> None:
    """Store an adapter as a new version, bound to its base.

    \b
      loreg push ./sql-lora --base gpt2 --name sql --tag prod -m "3 epochs"
      loreg push ./sql.pt --base gpt2 --alpha 128 --enable-lora 1,0,1
    """
    with console.open() as registry, console.progress() as bar:
        version = registry.push(
            path,
            base=base,
            name=name,
            tags=tags,
            format=format,
            initial=initial,
            alpha=alpha,
            enable_lora=enable_lora,
            note=note,
            advance=bar.stage("hashing the base", 0),
        )
    console.emit(
        {**version_document(version), "left_out": list(version.left_out)},
        version_text(version, ("not stored", ", ".join(version.left_out))),
    )


@click.command(cls=Command)
@click.argument("query", required=False)
@click.option("--base", metavar="B", help="Only adapters of this base: its name, or its weights_root.")
@click.option("--rank", type=int, metavar="R", help="Only adapters of this rank.")
@click.option("--target", metavar="T", help="Only adapters of this kind of module, such as q_proj.")
@click.option("--all", "all_versions", is_flag=True, help="Every version, not the newest of each name.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most N of them.")
@click.pass_obj
def ls(
    console: Console,
    query: str | None,
    base: str | None,
    rank: int | None,
    target: str | None,
    all_versions: bool,
    limit: int | None,
) -> None:
    """List adapters by base, rank, target or text.

    QUERY is words: each stands somewhere in the name, the note or a target, as sql does in mysql.

    \b
      loreg ls
      loreg ls --base gpt2 --rank 16 sql
    """
    with console.open() as registry:
        rows = registry.list_versions(
            query=query, base=base, rank=rank, target=target, all_versions=all_versions, limit=limit
        )
    cells = [
        (
            row.name,
            f"v{row.number}",
            row.base_name,
            str(row.rank),
            ",".join(row.targets),
            text.size(row.bytes),
            text.age(row.created_at),
        )
        for row in rows
    ]
    header = ("NAME", "VERSION", "BASE", "RANK", "TARGETS", "SIZE", "AGE")
    shown = text.table(header, cells, right=(3, 5, 6), give=4) if rows else "No adapter is stored here that fits."
    console.emit({"adapters": [row_document(row) for row in rows]}, shown)


@click.command(cls=Command)
@click.argument("reference", metavar="REF")
@click.pass_obj
def show(console: Console, reference: str) -> None:
    """Show a version: what it adapts, and where it came from.

    REF is a name, or one with a tag, a number or a digest: sql, sql:prod, sql:v2, sql@blake3:9f2c81d0.
    """
    with console.open() as registry:
        row, version = registry.find(reference), registry.resolve(reference)
        tags = sorted(tag for tag, number in registry.tags(row.name).items() if number == row.number)
    manifest = version.manifest
    source, provenance = manifest.source, manifest.provenance
    console.emit(
        {**row_document(row), "tags": tags, "manifest": json.loads(manifest.dump())},
        text.fields(
            [
                ("version", version),
                ("digest", version.digest),
                ("base", f"{manifest.base.name} ({manifest.base.identity.weights_root})"),
                ("rank", manifest.rank),
                ("targets", f"{', '.join(manifest.targets)} in {text.plural(len(manifest.modules), 'module')}"),
                ("replaces", ", ".join(sorted(manifest.full))),
                ("size", text.size(manifest.nbytes)),
                ("source", f"{source.format}, {text.plural(len(source.files), 'file')}" if source else None),
                ("parents", "\n".join(map(str, provenance.parents))),
                ("license", provenance.license),
                ("tags", ", ".join(tags)),
                ("pushed", text.moment(row.created_at)),
                ("note", row.note),
            ]
        ),
    )


@click.command(cls=Command)
@click.argument("name")
@click.pass_obj
def log(console: Console, name: str) -> None:
    """Show every version of a name, and how its tags moved."""
    with console.open() as registry:
        rows, moves = registry.log(name)
        tags = registry.tags(name)
    pointing = {row.number: sorted(tag for tag, at in tags.items() if at == row.number) for row in rows}
    versions = [
        (
            f"v{row.number}",
            str(row.digest),
            row.base_name,
            str(row.rank),
            text.size(row.bytes),
            text.age(row.created_at),
            ",".join(pointing[row.number]),
            row.note or "",
        )
        for row in reversed(rows)
    ]
    moved = [
        (move.name, f"v{move.number}" if move.number else "removed", text.age(move.moved_at))
        for move in reversed(moves)
    ]
    header = ("VERSION", "DIGEST", "BASE", "RANK", "SIZE", "AGE", "TAGS", "NOTE")
    tables = [text.table(header, versions, right=(3, 4, 5), give=7)]
    tables += [text.table(("TAG", "MOVED TO", "AGE"), moved, right=(2,), give=0)] if moved else []
    document = {
        "name": name,
        "versions": [{**row_document(row), "tags": pointing[row.number]} for row in rows],
        "tags": tags,
        "moves": [
            {
                "tag": move.name,
                "version": move.number,
                "digest": str(move.digest) if move.digest else None,
                "moved_at": move.moved_at.isoformat(),
            }
            for move in moves
        ],
    }
    console.emit(document, "\n\n".join(tables))


@click.command(cls=Command)
@click.argument("reference", metavar="REF")
@click.argument("tag", metavar="TAG")
@click.pass_obj
def tag(console: Console, reference: str, tag: str) -> None:
    """Point a tag at a version.

    \b
      loreg tag sql:v3 prod
    """
    with console.open() as registry:
        version = registry.tag(reference, tag)
    document = {"name": version.name, "version": version.number, "digest": str(version.digest), "tag": tag}
    console.emit(document, f"{version.name}:{tag} is {version} ({version.digest})")


@click.command(cls=Command)
@click.argument("reference", metavar="REF")
@click.option("--out", metavar="DIR", required=True, help="A directory that does not exist, or is empty.")
@click.option(
    "--format",
    type=click.Choice(["original", "peft", "folded"]),
    default="original",
    show_default=True,
    help="The bytes that were pushed, a directory that PEFT loads, or one with all scales folded into B, for engines "
    "that read of the config no more than r and lora_alpha.",
)
@click.pass_obj
def export(console: Console, reference: str, out: str, format: str) -> None:  # noqa: A002 - the option's name
    """Write a version to a directory.

    \b
      loreg export sql:prod --out ./sql-lora
    """
    with console.open() as registry:
        written = registry.export(reference, out, format=format)
    document = {"out": str(written), "reference": reference, "format": format}
    console.emit(document, f"{reference} is in {text.legible(str(written))}, as {format}")


def version_document(version: Version) -> dict[str, Any]:
    """What programs are told of a version that was just stored."""
    manifest = version.manifest
    return {
        "name": version.name,
        "version": version.number,
        "digest": str(version.digest),
        "created": version.created,
        "rank": manifest.rank,
        "modules": len(manifest.modules),
        "base": manifest.base.name,
        "base_root": str(manifest.base.identity.weights_root),
        "targets": list(manifest.targets),
        "bytes": manifest.nbytes,
    }


def version_text(version: Version, *more: tuple[str, object]) -> str:
    """What people are told of it, and what the command has to say beside."""
    manifest = version.manifest
    told = [
        ("version", f"{version}" if version.created else f"{version} (the same content was there already)"),
        ("digest", version.digest),
        ("base", manifest.base.name),
        (
            "holds",
            f"rank {manifest.rank}, {text.plural(len(manifest.modules), 'module')}, {text.size(manifest.nbytes)}",
        ),
    ]
    return text.fields([*told, *more])


def row_document(row: VersionRow) -> dict[str, Any]:
    """What programs are told of a version in a list."""
    return {
        "name": row.name,
        "version": row.number,
        "digest": str(row.digest),
        "base": row.base_name,
        "base_root": str(row.base_root),
        "rank": row.rank,
        "modules": row.modules,
        "targets": list(row.targets),
        "bytes": row.bytes,
        "note": row.note,
        "created_at": row.created_at.isoformat(),
    }
