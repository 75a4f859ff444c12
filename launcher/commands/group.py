"""A click group that imports a command's module only when the command is used.

So `flexunet --help` answers at once, and a command does not load the libraries of another.
"""

import importlib
from collections.abc import Mapping
from typing import Any

import click

from flexunet.cli.options import MAX_WIDTH
from flexunet.errors import EXIT_CODES
from flexunet.settings import suggestion


class LazyGroup(click.Group):
    """A group over `members`: name -> (module with `command`, line for the list of commands)."""

    def __init__(
        self, *arguments: Any, members: Mapping[str, tuple[str, str]], **attributes: Any
    ) -> None:
        super().__init__(*arguments, **attributes)
        self.context_settings = {"max_content_width": MAX_WIDTH}
        self._members = members

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the command names in the order of use."""
        return list(self._members)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Returns the command `name`, None if it does not exist."""
        if name not in self._members:
            return None
        command: click.Command = importlib.import_module(self._members[name][0]).command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """See `click.Group.resolve_command`; suggests the nearest name for an unknown one."""
        name = args[0]
        if name not in self._members and not name.startswith("-"):
            problem = f"no command {name!r}; {suggestion(name, list(self._members))}"
            raise click.UsageError(problem, ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the commands and the exit codes to `formatter`."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in self._members.items()])
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])
