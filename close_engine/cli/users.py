"""Users: the accounts of the console."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from close_engine.cli.app import Command, Group, app
from close_engine.errors import CloseEngineError, ConfigurationError

commands = typer.Typer(no_args_is_help=True)

app.add_typer(commands, name="user", cls=Group)


@commands.callback()
def user() -> None:
    """Manage who may use the console. It needs the extra console."""


@commands.command(cls=Command)
def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Their name: it is the actor in the history.")],
    role: Annotated[
        Literal["viewer", "approver", "admin"],
        typer.Option(help="A viewer looks, an approver also decides and writes to leads, an admin does everything."),
    ] = "approver",
    file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The file to add the account to. Without it, the account's line is printed."),
    ] = None,
) -> None:
    """Add an account to the console, or give one a new password. The password is asked for, or the first line read."""
    try:
        from close_engine.web.console.accounts import account_line, add_account
    except ImportError:
        raise ConfigurationError(
            "The console needs packages that are missing: pip install 'close-engine[console]'."
        ) from None
    password = _password()
    if file is None:
        print(account_line(name, role, password))
    else:
        add_account(file, name, role, password)
        print(f"{name!r} may sign in as {role}. Serve the console with CLOSE_ENGINE_ACCOUNTS_FILE={file}.")


def _password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Again: ") != password:
        raise CloseEngineError("The two passwords are not the same: nothing was added.")
    return password
