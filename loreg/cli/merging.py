"""Commands that do arithmetic, and those that check it: merge, unmerge, compose, verify."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import click

from loreg.cli import text
from loreg.cli.adapters import version_document, version_text
from loreg.cli.console import Console
from loreg.cli.program import Command
from loreg.errors import UsageError
from loreg.format.methods import METHODS, REQUIRED, Method, Parameter

if TYPE_CHECKING:
    from loreg.merge.output import MergeResult
    from loreg.merge.verify import Verification

_APPLY = click.option("--apply", "expression", metavar="EXPR", required=True, help="Such as 'sql + 0.5*humor'.")
_OUT = click.option("--out", metavar="DIR", required=True, help="A directory that does not exist, or is empty.")
_DEVICE = click.option("--device", metavar="D", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")


_Callback = TypeVar("_Callback", bound=Callable[..., Any])


def _method(command: _Callback) -> _Callback:
    """The options of a method: three that many have, and any other as KEY=VALUE; together they are its parameters."""
    for option in (
        click.option("--param", "rest", metavar="K=V", multiple=True, help="Another parameter; see 'loreg methods'."),
        click.option("--seed", type=int, metavar="S", help="The seed of random masks."),
        click.option("--density", type=float, metavar="D", help="The share of elements that is kept, in (0, 1]."),
        click.option("--energy", type=float, metavar="E", help="Truncate to this share of the square norm."),
        click.option("--rank", type=int, metavar="R", help="Truncate to this rank."),
        click.option(
            "--method", metavar="M", default="linear", show_default=True, help="How; 'loreg methods' lists them."
        ),
    ):
        command = option(command)
    return command


def _parameters(options: dict[str, Any]) -> dict[str, Any]:
    """Take the method's parameters out of a command's options. Raises UsageError for what is no K=V."""
    found = {name: options.pop(name) for name in ("rank", "energy", "density", "seed")}
    given = {name: value for name, value in found.items() if value is not None}
    for text_ in options.pop("rest"):
        key, equals, value = text_.partition("=")
        if not equals or not key:
            raise UsageError(f"{text_!r} is no parameter: expected --param NAME=VALUE, such as --param lambda=0.5.")
        if key in given:
            raise UsageError(f"{key} is given twice, as {given[key]} and as {value}: give it once.")
        try:
            given[key] = json.loads(value)
        except ValueError:
            given[key] = value
    return given


class _Size(click.ParamType[int]):
    """A number of bytes, such as 900MB or 2GiB."""

    name = "size"
    _UNITS: ClassVar = {unit + end: 1000**power if end != "ib" else 1024**power
              for power, unit in enumerate(("", "k", "m", "g", "t")) for end in ("", "b", "ib")}  # fmt: skip

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(value))
        unit = self._UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            self.fail(f"{value!r} is no size: expected bytes, such as 900MB or 2GiB.", param, ctx)
        return int(float(match[1]) * unit)


@click.command(cls=Command)
@click.option(
    "--apply", "expressions", metavar="EXPR", required=True, multiple=True, help="Such as 'sql + 0.5*humor'."
)
@click.option("--out", "outs", metavar="DIR", required=True, multiple=True, help="Of each --apply, a new directory.")
@_method
@click.option("--base", metavar="PATH", help="The model to merge into. [default: the one the adapters name]")
@click.option("--dtype", metavar="D", help="bfloat16, float16 or float32. [default: as the base has it]")
@_DEVICE
@click.option(
    "--verify",
    type=click.Choice(["probe", "exact", "forward", "none"]),
    default="probe",
    show_default=True,
    help="How to check what was written.",
)
@click.option("--allow-base-mismatch", is_flag=True, help="Merge into another base than the adapters name.")
@click.option("--dequantize", is_flag=True, help="Merge into the 16-bit model of a quantised --base.")
@click.option("--undo", is_flag=True, help="Write a journal, with which unmerge needs no base.")
@click.option(
    "--memory", metavar="SIZE", type=_Size(), help="What it may take, such as 900MB. [default: as it needs]"
)
@click.option("--threads", metavar="N", type=click.IntRange(1), help="[default: the number of cores]")
@click.pass_obj
def merge(console: Console, /, expressions: tuple[str, ...], outs: tuple[str, ...], **options: Any) -> None:
    """Merge a weighted sum of adapters into their base, exactly.

    Several pairs of --apply and --out are merged in one pass over the base. What was killed goes on, when it is given
    again, from the shards that it had finished.

    \b
      loreg merge --apply sql+humor --out ./model
      loreg merge --apply "0.7*sql:prod - 0.3*humor" --out ./model --dtype bfloat16
      loreg merge --apply "sql + humor" --out ./model --method ties --density 0.5
      loreg merge --apply sql --out ./sql --apply humor --out ./humor
    """
    if len(expressions) != len(outs):
        raise UsageError(f"{len(expressions)} times --apply, {len(outs)} times --out: expected one --out for each.")
    parameters = _parameters(options)
    wanted = list(zip(expressions, outs, strict=True))
    with console.open() as registry, console.progress() as bar:
        results = registry.merge_many(wanted, progress=bar.stage, parameters=parameters, **options)
    documents = [_merge_document(result) for result in results]
    several = {"merges": documents, "seconds": results[0].seconds}
    console.emit(documents[0] if len(results) == 1 else several, "\n\n".join(map(_merge_text, results)))


def _merge_document(result: MergeResult) -> dict[str, Any]:
    composition = result.composition
    return {
        "out": str(result.out),
        "recipe": str(result.recipe),
        "method": result.method,
        "arithmetic": result.record.recipe.arithmetic,
        "version": composition.version if composition else None,
        "relative_error": composition.relative_error if composition else None,
        "weights_root": str(result.weights_root),
        "base_match": result.base_match.label,
        "touched": list(result.touched),
        "verification": verification_document(result.verification),
        "seconds": result.seconds,
        "peak_rss_bytes": result.peak_rss_bytes,
        "undo_bytes": result.undo_bytes,
        "left_out": list(result.left_out),
        "bytes": _written(result),
    }


def _merge_text(result: MergeResult) -> str:
    written, seconds = _written(result), max(result.seconds, 1e-9)
    return text.fields(
        [
            ("out", result.out),
            ("recipe", result.recipe),
            ("method", _method_text(result)),
            ("weights_root", result.weights_root),
            ("base", f"matches by {result.base_match.label}"),
            ("touched", f"{len(result.touched):,} of {text.plural(len(result.record.tensors), 'tensor')}"),
            ("verified", verification_text(result.verification)),
            *([("journal", text.size(result.undo_bytes))] if result.undo_bytes is not None else []),
            *([("not copied", ", ".join(result.left_out))] if result.left_out else []),
            (
                "took",
                f"{seconds:.2f} s for {text.size(written)}, {text.size(written / seconds)}/s; "
                f"at most {text.size(result.peak_rss_bytes)} of memory",
            ),
        ]
    )


def _written(result: MergeResult) -> int:
    return sum(tensor.nbytes for tensor in result.record.tensors)


def _method_text(result: MergeResult) -> str:
    """The method that was asked for; of one on factors, what it lost, and which version is what was merged."""
    recipe, made = result.record.recipe, result.composition
    if made is None:
        return f"{recipe.method}, {recipe.arithmetic}"
    lost = f"{made.method}, relative error {made.relative_error:.3g}"
    return f"{lost}; stored as {made.version}, merged by {recipe.method}, {recipe.arithmetic}"


@click.command(cls=Command)
@click.argument("merged", metavar="DIR")
@_OUT
@click.option("--base", metavar="PATH", help="The model that it was merged from. [default: the registered one]")
@click.option(
    "--journal/--no-journal", default=None, help="Whether from the journal. [default: if the base is not at hand]"
)
@click.pass_obj
def unmerge(console: Console, merged: str, out: str, base: str | None, journal: bool | None) -> None:
    """Give back the base of a merged model, bit for bit.

    Without the base at hand this takes the journal that 'loreg merge --undo' wrote, and the adapters.

    \b
      loreg unmerge ./model --out ./base
    """
    if base is not None and journal:
        raise UsageError("--base and --journal exclude each other: the journal is for when the base is not at hand.")
    with console.open() as registry, console.progress() as bar:
        result = registry.unmerge(merged, out, base=base, journal=journal, advance=bar.stage("unmerging", 0))
    document = {
        "out": str(result.out),
        "weights_root": str(result.weights_root),
        "matches_base": result.matches_base,
        "method": result.method,
    }
    told = [
        ("out", result.out),
        ("weights_root", result.weights_root),
        ("is the base", "yes, bit for bit" if result.matches_base else "no"),
        ("method", result.method),
    ]
    console.emit(document, text.fields(told))
    _exit_unless(result.matches_base)


@click.command(cls=Command)
@_APPLY
@click.option("--name", metavar="N", required=True, help="What to call the result.")
@_method
@_DEVICE
@click.option("--tag", "tags", metavar="T", multiple=True, help="Point this tag at it too; may be repeated.")
@click.option("--note", "-m", metavar="NOTE", help="A line for the log.")
@click.pass_obj
def compose(console: Console, /, expression: str, name: str, **options: Any) -> None:
    """Store a sum of adapters, or what another method makes of them.

    \b
      loreg compose --apply "0.7*sql + 0.3*humor" --name both --method svd --rank 16
      loreg compose --apply "sql + humor" --name both --method ties --density 0.5 --rank 16
    """
    parameters = _parameters(options)
    with console.open() as registry:
        composed = registry.compose(expression, name, parameters=parameters, **options)
    console.emit(
        {**version_document(composed.version), "method": composed.method, "relative_error": composed.relative_error},
        version_text(
            composed.version, ("method", composed.method), ("relative error", f"{composed.relative_error:.3g}")
        ),
    )


@click.command(cls=Command, name="methods")
@click.pass_obj
def list_methods(console: Console) -> None:
    """List the ways to combine adapters, with their parameters.

    SPACE is what a method works on: exact, the terms of the sum; dense, the delta of each adapter; factors, its A and
    B. What a dense one gives, compose truncates: it takes rank and energy as well, and needs one of them. A family
    alone, such as ties, means its mergekit definition.
    """
    told: list[Sequence[str]] = []
    for name, row in METHODS.items():
        told.append((name, _count(row), row.space, row.summary))
        told += [(f"  {_default(key, one)}", "", "", one.help) for key, one in row.parameters.items()]
    document = {"methods": [_document(name, row) for name, row in METHODS.items()]}
    header = ("METHOD", "ADAPTERS", "SPACE", "HELP")
    console.emit(document, text.table(header, _wrapped(header, told), give=3))


def _wrapped(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    """On a terminal, rows whose last cell fits what the others leave of a line, and goes on in rows below: a sentence
    that is cut helps nobody."""
    if not text.is_terminal(sys.stdout):
        yield from rows
        return
    taken = sum(max(map(len, cells)) + 2 for cells in list(zip(header, *rows, strict=True))[:-1])
    room = max(12, shutil.get_terminal_size().columns - taken)
    for *first, help_ in rows:
        line, *others = textwrap.wrap(help_, room)
        yield [*first, line]
        yield from ([*("" for _ in first), other] for other in others)


def _document(name: str, row: Method) -> dict[str, Any]:
    least, most = row.adapters
    parameters = [
        {
            "name": key,
            "required": parameter.default is REQUIRED,
            "default": None if parameter.default is REQUIRED else parameter.default,
            "help": parameter.help,
        }
        for key, parameter in row.parameters.items()
    ]
    return {
        "name": name,
        "summary": row.summary,
        "source": row.source,
        "arithmetic": row.arithmetic,
        "space": row.space,
        "adapters": {"least": least, "most": most},
        "parameters": parameters,
    }


def _count(row: Method) -> str:
    """The number of adapters that a method takes."""
    least, most = row.adapters
    if most is None:
        return "any" if least == 1 else f"{least}+"
    return str(least) if least == most else f"{least}-{most}"


def _default(key: str, parameter: Parameter) -> str:
    """A parameter and its default in the way of --param."""
    default = parameter.default
    if default is REQUIRED:
        return f"{key} (required)"
    return f"{key}={default if isinstance(default, str) else json.dumps(default)}"


@click.command(cls=Command)
@click.argument("subject", metavar="REF|DIR")
@click.option(
    "--kind",
    type=click.Choice(["probe", "exact", "forward"]),
    default="probe",
    show_default=True,
    help="How to check a merged model.",
)
@click.option("--base", metavar="PATH", help="The model that it was merged from. [default: the registered one]")
@click.pass_obj
def verify(console: Console, subject: str, kind: str, base: str | None) -> None:
    """Check a merged model, or a stored version.

    \b
      loreg verify ./model --kind exact
      loreg verify sql:prod
    """
    with console.open() as registry, console.progress() as bar:
        result = registry.verify(subject, kind=kind, base=base, advance=bar.stage("verifying", 0))
    outcome = click.style("ok", fg="green") if result.ok else click.style("not ok", fg="red")
    console.emit(verification_document(result), f"{outcome}: {text.legible(subject)}, {verification_text(result)}")
    _exit_unless(result.ok)


def verification_document(result: Verification) -> dict[str, Any]:
    checks = [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in result.checks]
    return {"ok": result.ok, "kind": result.kind, "checks": checks}


def verification_text(result: Verification) -> str:
    """The kind, and a line for each check: what was found."""
    if not result.checks:
        return "nothing, as asked"
    lines = [f"{'+' if check.ok else '-'} {check.name}: {check.detail}" for check in result.checks]
    return "\n".join([f"{result.kind}, {text.plural(len(lines), 'check')}", *map(text.legible, lines)])


def _exit_unless(ok: bool) -> None:
    """Exit code 1 for a check that says no; what it found is printed already."""
    if not ok:
        click.get_current_context().exit(1)
