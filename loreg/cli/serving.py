"""Commands for who serves adapters: preflight."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from loreg.cli import text
from loreg.cli.console import Console
from loreg.cli.program import Command

if TYPE_CHECKING:
    from loreg.serving.preflight import Preflight

_FORMS = {"peft": "can serve {} as it is", "folded": "can serve {} in its folded form", None: "cannot serve {}"}
_COLORS = {"refuses": "red", "misreads": "magenta", "ignores": "yellow"}


def limits(_: click.Context, __: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    """``NAME=VALUE``, each name once."""
    found: dict[str, str] = {}
    for item in value:
        name, equals, said = item.partition("=")
        if not name or not equals or name in found:
            raise click.BadParameter(f"{item!r} is no limit such as max_lora_rank=64, or the second of its name.")
        found[name] = said
    return found


@click.command(cls=Command)
@click.argument("reference", metavar="REF")
@click.option("--engine", metavar="E", required=True, help="vllm, sglang, tensorrt-llm, llama.cpp, lorax or peft.")
@click.option(
    "--limit",
    "given",
    metavar="NAME=VALUE",
    multiple=True,
    callback=limits,
    help="How the engine is started, by its own names; may be repeated.",
)
@click.pass_obj
def preflight(console: Console, reference: str, engine: str, given: dict[str, str]) -> None:
    """Say what an engine would refuse of a version, misread, or ignore.

    Nothing is loaded: the manifest tells. The exit code is 1 if anything is found.

    \b
      loreg preflight sql:prod --engine vllm --limit max_lora_rank=64
      loreg preflight sql --engine sglang --limit lora_target_modules=q_proj,v_proj
    """
    from loreg.serving.preflight import limits_of
    from loreg.serving.preflight import preflight as check

    with console.open() as registry:
        found = check(reference, engine, registry, **limits_of(engine, given))
    document = {
        "engine": found.engine,
        "digest": str(found.digest),
        "ok": found.ok,
        "form": found.form,
        "findings": [asdict(finding) for finding in found.findings],
    }
    console.emit(document, _shown(found, reference))
    if not found.ok:
        click.get_current_context().exit(1)


def _shown(found: Preflight, reference: str) -> str:
    verdict = click.style("ok", fg="green") if found.ok else click.style("not ok", fg="red")
    lines = [f"{verdict}: {found.engine} {_FORMS[found.form].format(text.legible(reference))}"]
    for finding in found.findings:
        effect = click.style(finding.effect, fg=_COLORS[finding.effect])
        lines += [f"- {effect} {finding.subject}: {text.legible(finding.reason)}", f"    {finding.remedy}"]
    return "\n".join(lines)
