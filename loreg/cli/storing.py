"""Commands on what is kept: rm, trash, restore, gc, fsck."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from loreg.cli import text
from loreg.cli.adapters import row_document
from loreg.cli.console import Console
from loreg.cli.program import Command

if TYPE_CHECKING:
    from loreg.registry.problem import Problem

_LONGEST = timedelta(days=36_500)
_UNITS = {"s": "seconds", "min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def duration(_: click.Context, __: click.Parameter, value: str) -> timedelta:
    """``14d``, ``12h`` or ``0``, of a century at most: dates have a beginning."""
    found = re.fullmatch(r"(\d{1,6})(s|min|h|d|w)|0", value)
    if found is None:
        raise click.BadParameter(f"{value!r} is no time such as 14d, 12h or 0; units are {', '.join(_UNITS)}.")
    given = timedelta(**{_UNITS[found[2]]: int(found[1])}) if found[1] else timedelta()
    if given > _LONGEST:
        raise click.BadParameter(f"{value!r} is too long: expected at most a century, {_LONGEST.days}d.")
    return given


@click.command(cls=Command)
@click.argument("reference", metavar="REF")
@click.option("--tags-to", metavar="REF", help="Move the tags that point to it to this version.")
@click.pass_obj
def rm(console: Console, reference: str, tags_to: str | None) -> None:
    """Put a version into the trash.

    Its number is never given again. `loreg restore` takes it back; `loreg gc` deletes what was in the trash for long.

    \b
      loreg rm sql:v2
      loreg rm sql:v3 --tags-to sql:v4
    """
    with console.open() as registry:
        row = registry.remove(reference, tags_to=tags_to)
    name = f"{row.name}:v{row.number}"
    document = {"name": row.name, "version": row.number, "digest": str(row.digest)}
    console.emit(document, f"{name} is in the trash; take it back with `loreg restore {name}`")


@click.command(cls=Command)
@click.pass_obj
def trash(console: Console) -> None:
    """List the versions that were removed and can be taken back."""
    with console.open() as registry:
        rows = registry.trash()
    cells = [
        (row.name, f"v{row.number}", str(row.digest), text.size(row.bytes), text.age(row.removed_at), row.note or "")
        for row in rows
        if row.removed_at is not None
    ]
    header = ("NAME", "VERSION", "DIGEST", "SIZE", "REMOVED", "NOTE")
    shown = text.table(header, cells, right=(3, 4), give=5) if rows else "The trash is empty."
    document = [
        {**row_document(row), "removed_at": row.removed_at.isoformat() if row.removed_at else None} for row in rows
    ]
    console.emit({"adapters": document}, shown)


@click.command(cls=Command)
@click.argument("reference", metavar="REF")
@click.pass_obj
def restore(console: Console, reference: str) -> None:
    """Take a version out of the trash, by its number.

    \b
      loreg restore sql:v2
    """
    with console.open() as registry:
        row = registry.restore(reference)
    console.emit(row_document(row), f"{row.name}:v{row.number} is back ({row.digest})")


@click.command(cls=Command)
@click.option("--dry-run", is_flag=True, help="Say what would be deleted, and delete nothing.")
@click.option(
    "--grace",
    callback=duration,
    default="14d",
    show_default=True,
    metavar="TIME",
    help="Keep what was put into the trash since; 0 empties it.",
)
@click.pass_obj
def gc(console: Console, dry_run: bool, grace: timedelta) -> None:
    """Delete what nothing needs: it is safe beside pushes, on any machine.

    \b
      loreg gc --dry-run
      loreg gc --grace 0
    """
    with console.open() as registry:
        found = registry.collect(grace=grace, dry_run=dry_run)
    names = [f"{row.name}:v{row.number}" for row in found.versions]
    document = {
        "deleted": len(found.copies),
        "bytes": found.nbytes,
        "versions": names,
        "unfinished": len(found.unfinished),
        "dry_run": dry_run,
    }
    deleted, left = ("would delete", "would leave") if dry_run else ("deleted", "left")
    lines = [f"{deleted} {text.plural(len(found.copies), 'blob')}, {text.size(found.nbytes)}"]
    if names:
        lines.append(f"{left} the trash for good: {', '.join(names)}")
    if found.unfinished:
        lines.append(f"{text.plural(len(found.unfinished), 'write')} that did not end among it")
    console.emit(document, "\n".join(lines))


@click.command(cls=Command)
@click.option("--repair", is_flag=True, help="Mend what can be mended, and put aside what is damaged.")
@click.option(
    "--from",
    "sources",
    metavar="PLACE",
    multiple=True,
    help="Where good copies are: a registry's home, a store's address, hf://OWNER/NAME.",
)
@click.option("--rebuild-catalog", is_flag=True, help="Make a catalog that was lost again, from the store alone.")
@click.pass_obj
def fsck(console: Console, repair: bool, sources: tuple[str, ...], rebuild_catalog: bool) -> None:
    """Read everything that is stored, and compare it with the catalog.

    \b
      loreg fsck
      loreg fsck --repair --from /backup/loreg
      loreg fsck --repair --from s3://bucket/prefix
      loreg fsck --rebuild-catalog
    """
    if rebuild_catalog:
        if repair or sources:
            raise click.UsageError("--rebuild-catalog goes alone: repair what is missing afterwards.")
        _rebuild(console)
        return
    if sources and not repair:
        raise click.UsageError("--from says where to mend from: give it with --repair.")
    with console.open() as registry, console.progress() as bar:
        found = registry.fsck(repair=repair, sources=sources, advance=bar.stage("checking", 0))
    lines = [str(problem) for problem in found.problems]
    orphans = f", {text.plural(found.orphans, 'copy', 'copies')} that `loreg gc` deletes" if found.orphans else ""
    verdict = "all is well" if found.ok else "not all is well"
    lines.append(f"{text.plural(found.blobs, 'blob')} read{orphans}: {verdict}")
    document = {"ok": found.ok, "blobs": found.blobs, "orphans": found.orphans}
    console.emit({**document, "problems": _documents(found.problems)}, "\n".join(lines))
    if not found.ok:
        click.get_current_context().exit(1)


def _rebuild(console: Console) -> None:
    from loreg.registry import rebuild_catalog

    with console.progress() as bar:
        found = rebuild_catalog(console.home, advance=bar.stage("reading", 0))
    lines = [str(problem) for problem in found.problems]
    lines += [f"{name} had no name in the ledger" for name in found.lost_found]
    there = f"{text.plural(found.versions, 'version')}, {text.plural(found.bases, 'base')}"
    lines.append(f"the catalog is there again: {there} and {text.plural(found.tags, 'tag')}")
    document = {**asdict(found), "ok": found.ok, "lost_found": list(found.lost_found)}
    console.emit({**document, "problems": _documents(found.problems)}, "\n".join(lines))
    if not found.ok:
        click.get_current_context().exit(1)


def _documents(problems: Iterable[Problem]) -> list[dict[str, Any]]:
    return [{**asdict(problem), "touches": list(problem.touches)} for problem in problems]
