"""``loreg store``: what is done to a store as a whole."""

from __future__ import annotations

import click

from loreg.cli import text
from loreg.cli.console import Console
from loreg.cli.program import Group


@click.group(cls=Group)
def store() -> None:
    """Move a registry to another place."""


@store.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--catalog-from", metavar="URL", help="The catalog of FROM, if that is not the home of a registry.")
@click.option("--catalog-to", metavar="URL", help="The catalog of TO, if that is not the home of a registry.")
@click.option("--no-catalog", is_flag=True, help="Copy the store alone: TO becomes the same store in another place.")
@click.pass_obj
def copy(
    console: Console,
    source: str,
    target: str,
    catalog_from: str | None,
    catalog_to: str | None,
    no_catalog: bool,
) -> None:
    """Copy a registry: every blob, verified, and its catalog. Run again, it goes on where it stopped.

    FROM and TO are homes of registries, or addresses of stores. TO has to be empty, or what an earlier run has left.

    \b
      loreg store copy ~/.loreg /mnt/backup/loreg
      loreg store copy ~/.loreg s3://bucket/team --catalog-to postgresql://user@host/team
      loreg store copy s3://bucket/team ~/.loreg --catalog-from postgresql://user@host/team
    """
    from loreg.registry import copy_store

    with console.progress() as bar:
        found = copy_store(
            source,
            target,
            source_catalog=catalog_from,
            target_catalog=catalog_to,
            catalog=not no_catalog,
            advance=bar.stage("copying", 0),
        )
    document = {"copies": found.copies, "bytes": found.nbytes, "there": found.there, "rows": found.rows}
    lines = [f"copied {text.plural(found.copies, 'blob')}, {text.size(found.nbytes)}"]
    if found.there:
        lines.append(f"{text.plural(found.there, 'blob')} that were there already")
    if not no_catalog:
        lines.append(f"{text.plural(found.rows, 'row')} of the catalog")
    console.emit(document, "\n".join(lines))
