"""The program: which commands there are, where each lives, and what becomes of an error."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NoReturn

import click

from loreg import __version__
from loreg.cli.boundary import Boundary
from loreg.cli.console import Console

SECTIONS: Mapping[str, Mapping[str, str]] = {
    "Bases": {"base": "loreg.cli.bases:base"},
    "Adapters": {
        "push": "loreg.cli.adapters:push",
        "ls": "loreg.cli.adapters:ls",
        "show": "loreg.cli.adapters:show",
        "log": "loreg.cli.adapters:log",
        "tag": "loreg.cli.adapters:tag",
        "export": "loreg.cli.adapters:export",
    },
    "Merging": {
        "merge": "loreg.cli.merging:merge",
        "unmerge": "loreg.cli.merging:unmerge",
        "compose": "loreg.cli.merging:compose",
        "extract": "loreg.cli.extracting:extract",
        "resize": "loreg.cli.extracting:resize",
        "methods": "loreg.cli.merging:list_methods",
        "verify": "loreg.cli.merging:verify",
    },
    "Serving": {
        "preflight": "loreg.cli.serving:preflight",
        "serve-push": "loreg.cli.pushing:serve_push",
        "held": "loreg.cli.pushing:held",
    },
    "Sharing": {"sync": "loreg.cli.sharing:sync"},
    "Store": {
        "rm": "loreg.cli.storing:rm",
        "trash": "loreg.cli.storing:trash",
        "restore": "loreg.cli.storing:restore",
        "gc": "loreg.cli.storing:gc",
        "fsck": "loreg.cli.storing:fsck",
        "store": "loreg.cli.copying:store",
    },
}


def _remember(ctx: click.Context, option: click.Parameter, value: Any) -> None:
    if value:
        setattr(ctx.obj, str(option.name), value)


def shared_options() -> list[click.Parameter]:
    """What every command takes, and the program itself. Eager: an error in a later option obeys them already."""
    common: dict[str, Any] = {"expose_value": False, "is_eager": True, "callback": _remember}
    return [
        click.Option(["--json"], is_flag=True, help="Print one JSON object on stdout, and nothing else.", **common),
        click.Option(["--debug"], is_flag=True, help="Show the traceback of an error.", **common),
        click.Option(["--home"], metavar="DIR", help="The registry, instead of $LOREG_HOME or ~/.loreg.", **common),
    ]


class Command(click.Command):
    """A command of loreg."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += shared_options()


class Group(click.Group):
    """Commands under one name. Alone it prints its help; to a name that is nearly right it suggests the right one."""

    command_class = Command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = self.list_commands(ctx)
        if args[0] not in known and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
            raise click.UsageError(f"{args[0]!r} is not a command of {ctx.command_path}: {hint}", ctx)
        return super().resolve_command(ctx, args)


class Program(Group):
    """The group of all commands: each is imported when it is asked for, and every error ends here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in SECTIONS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for section in SECTIONS.values():
            if cmd_name in section:
                module, _, attribute = section[cmd_name].partition(":")
                command: click.Command = getattr(import_module(module), attribute)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in SECTIONS.items():
            commands = ((name, self.get_command(ctx, name)) for name in section)
            with formatter.section(title):
                formatter.write_dl([(name, c.get_short_help_str(70)) for name, c in commands if c])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run a command line and exit with its code. ``standalone_mode`` is click's, and makes no difference."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra["obj"] = Console()
        with Boundary(extra["obj"], arguments) as boundary:
            boundary.code = super().main(arguments, "loreg", complete_var, standalone_mode=False, **extra) or 0
        sys.exit(boundary.code)


main = Program(
    name="loreg",
    help="A registry and a versioned checkpoint format for LoRA adapters.\n\n"
    "\b\n"
    "  loreg base add ./gpt2                           know the base by its bytes\n"
    "  loreg push ./sql-lora --base gpt2 --name sql    store an adapter, bound to it\n"
    "  loreg merge --apply sql+humor --out ./model     merge, exactly, and prove it\n"
    "  loreg unmerge ./model --out ./base              the base again, bit for bit",
    params=shared_options(),
)
click.version_option(__version__, prog_name="loreg", message="%(prog)s %(version)s")(main)
