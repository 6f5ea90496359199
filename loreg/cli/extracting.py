"""Commands that make factors: extract, from two models, and resize, from a version."""

from __future__ import annotations

from typing import Any

import click

from loreg.cli import text
from loreg.cli.adapters import version_document, version_text
from loreg.cli.console import Console
from loreg.cli.program import Command

_RANK = click.option("--rank", type=int, metavar="R", help="The greatest rank of a module.")
_ENERGY = click.option("--energy", type=float, metavar="E", help="The share of the square norm to keep, in (0, 1].")
_DEVICE = click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
_TAG = click.option("--tag", "tags", metavar="T", multiple=True, help="Point this tag at it too; may be repeated.")
_NOTE = click.option("--note", "-m", metavar="NOTE", help="A line for the log.")


@click.command(cls=Command)
@click.option("--base", metavar="NAME|PATH|HUB_ID", required=True, help="The model that was fine-tuned.")
@click.option("--tuned", metavar="PATH|HUB_ID", required=True, help="What became of it.")
@click.option("--name", metavar="N", required=True, help="What to call the result.")
@_RANK
@_ENERGY
@click.option("--target", "targets", metavar="PATTERN", multiple=True, help="Only these, such as q_proj; repeatable.")
@click.option("--exclude", metavar="PATTERN", multiple=True, help="Not these, such as 'layers.0.*'; repeatable.")
@_DEVICE
@_TAG
@_NOTE
@click.pass_obj
def extract(console: Console, /, base: str, tuned: str, name: str, **options: Any) -> None:
    """Store what tells a fine-tuned model from its base as an adapter.

    Differences of matrices are truncated to a rank, or to a share of their square norm; other tensors that differ are
    replaced, exactly.

    \b
      loreg extract --base gpt2 --tuned ./gpt2-sql --name sql --rank 32
      loreg extract --base gpt2 --tuned ./gpt2-sql --name sql --energy 0.9 --target c_attn --target 'mlp.*'
    """
    with console.open() as registry, console.progress() as bar:
        result = registry.extract(base, tuned, name, progress=bar.stage, **options)
    tensors = [
        {"name": tensor.name, "rank": tensor.rank, "relative_error": tensor.relative_error}
        for tensor in result.tensors
    ]
    replaced = [tensor.name for tensor in result.tensors if tensor.rank is None]
    document = {
        **version_document(result.version),
        "relative_error": result.relative_error,
        "tensors": tensors,
        "left_out": list(result.left_out),
    }
    told = version_text(
        result.version,
        ("relative error", f"{result.relative_error:.3g}"),
        ("replaced", text.plural(len(replaced), "tensor") if replaced else None),
        ("left out", text.plural(len(result.left_out), "tensor") if result.left_out else None),
    )
    console.emit(document, told)


@click.command(cls=Command)
@click.argument("reference", metavar="REF")
@_RANK
@_ENERGY
@click.option("--name", metavar="N", help="What to call the result. [default: as REF, of which it is a new version]")
@_DEVICE
@_TAG
@_NOTE
@click.pass_obj
def resize(console: Console, /, reference: str, **options: Any) -> None:
    """Store a version at another rank, or with a share of its energy.

    \b
      loreg resize sql:prod --rank 8
      loreg resize sql --energy 0.99 --name sql-small
    """
    with console.open() as registry:
        result = registry.resize(reference, **options)
    modules = [
        {"path": module.path, "from": module.before, "rank": module.after, "relative_error": module.relative_error}
        for module in result.modules
    ]
    document = {**version_document(result.version), "relative_error": result.relative_error, "resized": modules}
    rows = [(m.path, str(m.before), str(m.after), f"{m.relative_error:.3g}") for m in result.modules]
    table = text.table(("MODULE", "FROM", "TO", "ERROR"), rows, right=(1, 2, 3), give=0)
    told = version_text(result.version, ("relative error", f"{result.relative_error:.3g}"))
    console.emit(document, f"{told}\n\n{table}")
