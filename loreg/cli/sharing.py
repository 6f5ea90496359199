"""``loreg sync``: versions to and from the Hugging Face Hub."""

from __future__ import annotations

import click

from loreg.cli.adapters import version_document, version_text
from loreg.cli.console import Console
from loreg.cli.program import Group


@click.group(cls=Group)
def sync() -> None:
    """Send versions to the Hugging Face Hub, and fetch them."""


@sync.command()
@click.argument("reference", metavar="REF")
@click.argument("remote", metavar="hf://OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it has to be made.")
@click.pass_obj
def push(console: Console, reference: str, remote: str, private: bool) -> None:
    """Send a version to the Hub in one commit.

    \b
      loreg sync push sql:prod hf://alice/sql-lora
    """
    with console.open() as registry:
        commit = registry.sync_push(reference, remote, private=private)
    document = {"reference": reference, "remote": remote, "commit": commit}
    console.emit(document, f"{reference} is at {remote}@{commit}")


@sync.command()
@click.argument("name", metavar="REF")
@click.argument("remote", metavar="hf://OWNER/NAME[@REV]")
@click.pass_obj
def pull(console: Console, name: str, remote: str) -> None:
    """Fetch a version from the Hub as a version of REF.

    \b
      loreg sync pull sql hf://alice/sql-lora@main
    """
    with console.open() as registry:
        version = registry.sync_pull(remote, name)
    console.emit({**version_document(version), "remote": remote}, version_text(version))
