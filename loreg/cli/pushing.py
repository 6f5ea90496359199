"""``loreg serve-push``: versions into running engines, and out of them. ``loreg held``: what stays for them."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from loreg.cli import text
from loreg.cli.console import Console
from loreg.cli.program import Command
from loreg.cli.serving import limits

if TYPE_CHECKING:
    from loreg.serving.beside import Hold

_KEY = "LOREG_ENGINE_KEY"
_DONE = {
    "loaded": "{} is loaded, as {}",
    "replaced": "{} is loaded, in place of what was {}",
    "present": "{} was loaded already, as {}",
    "unloaded": "{} is unloaded: nothing is {} any more",
    "absent": "{} was not loaded: nothing is {}",
    "released": "{} is held no more; the engine was not told: it has ended, or lets go of {} by itself",
}


@click.command("serve-push", cls=Command)
@click.argument("reference", metavar="REF")
@click.option("--engine", metavar="E", required=True, help="vllm, sglang, lorax, tensorrt-llm or llama.cpp.")
@click.option("--url", metavar="URL", required=True, help="Where it serves, such as http://gpu1:8000.")
@click.option("--name", metavar="N", help="What requests are to call it. [default: the name in REF]")
@click.option("--base", metavar="B", help="What it serves, a name, path or Hub id: a version of another is refused.")
@click.option("--unload", is_flag=True, help="Take out what the engine has under that name.")
@click.option(
    "--limit",
    "given",
    metavar="NAME=VALUE",
    multiple=True,
    callback=limits,
    help="How the engine was started, by its own names; may be repeated.",
)
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), metavar="S", help="Seconds. [default: 120]")
@click.pass_obj
def serve_push(
    console: Console,
    reference: str,
    engine: str,
    url: str,
    name: str | None,
    base: str | None,
    unload: bool,
    given: dict[str, Any],
    timeout: float | None,
) -> None:
    """Load a version into a running engine, or unload it.

    It takes the place of what the engine has under that name. What the engine would refuse or misread is refused
    before it is told. It has to see the same directory as this machine; that stays until --unload, which ends it also
    where the engine is gone. A key that the engine asks for is read from $LOREG_ENGINE_KEY.

    \b
      loreg serve-push sql:prod --engine vllm --url http://localhost:8000 --limit max_lora_rank=64
      loreg serve-push sql --engine sglang --url http://gpu1:30000 --unload
    """
    from loreg.serving import pushing
    from loreg.serving.preflight import limits_of

    with console.open() as registry:
        done = pushing.push(
            reference,
            engine,
            url,
            registry,
            name=name,
            base=base,
            unload=unload,
            key=os.environ.get(_KEY) or None,
            timeout=pushing.TIMEOUT if timeout is None else timeout,
            **(limits_of(engine, given) if given else {}),
        )
    document: dict[str, Any] = {
        "engine": done.engine,
        "url": done.url,
        "name": done.name,
        "action": done.action,
        "digest": str(done.digest) if done.digest else None,
        "path": done.path,
        "request": dict(done.request),
    }
    said = _DONE[done.action].format(text.legible(reference), text.legible(done.name))
    asked = json.dumps(document["request"]) if done.request else None
    shown = [("at", f"{done.engine}, {done.url}"), ("digest", done.digest), ("path", done.path), ("ask with", asked)]
    console.emit(document, f"{said}\n{text.fields(shown)}")


@click.command(cls=Command)
@click.pass_obj
def held(console: Console) -> None:
    """List the directories that stay for engines.

    Each was pushed into an engine by serve-push, and the engine may read there again. It is deleted by no cache until
    `loreg serve-push NAME --engine E --url URL --unload`, or until the file that is shown is removed.
    """
    from loreg.serving import pushing

    with console.open() as registry:
        found = pushing.held(registry)
    console.emit({"held": [_document(hold) for hold in found]}, "\n".join(map(_line, found)) or "nothing is held")


def _document(hold: Hold) -> dict[str, Any]:
    by = hold.holder
    return {
        "engine": by.engine if by else None,
        "url": by.url if by else None,
        "name": by.name if by else None,
        "directory": str(hold.path),
        "there": hold.path.is_dir(),
        "since": datetime.fromtimestamp(hold.since, UTC).isoformat(),
        "file": str(hold.file),
    }


def _line(hold: Hold) -> str:
    by = hold.holder
    who = f"{by.name}  in {by.engine}, {by.url}" if by else "?  in an engine that its file does not name"
    since = text.moment(datetime.fromtimestamp(hold.since, UTC))
    gone = "" if hold.path.is_dir() else "; the directory is gone"
    return text.legible(f"{who}, since {since}{gone}") + f"\n    {text.legible(str(hold.file))}"
