"""The command line itself: the options that every command takes, the database, and how a run ends.

    close-engine --database postgresql://user:password@host/name status

The options of `close-engine` itself may stand before the command or behind it. An error is a sentence on standard
error and exit status 1. Run in a pipe or without a terminal, everything is plain text and as wide as it needs to be.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import peewee
import typer
from typer.core import TyperCommand, TyperGroup

from close_engine.database import url as urls
from close_engine.database.binding import current
from close_engine.database.url import DEFAULT_URL, without_password
from close_engine.errors import CloseEngineError, ConfigurationError, SchemaError, first_line, one_line
from close_engine.schema.migrations import pending
from close_engine.version import __version__

__all__ = ["Command", "Group", "app", "command", "in_seconds", "main", "open_database", "open_migrated", "option"]


class _SharesOptions:
    """Takes the options of `close-engine` itself, too."""

    def get_params(self, ctx: Any) -> list[Any]:
        shared = [option for option in ctx.find_root().command.params if not option.expose_value]
        return [*super().get_params(ctx), *shared]  # type: ignore[misc]


class Command(_SharesOptions, TyperCommand):
    """A command."""


class Group(_SharesOptions, TyperGroup):
    """A command that has commands below it."""


app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
command = partial(app.command, cls=Command)


def _note(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> None:
    """Keep a shared option, wherever it stood."""
    noted = context.find_root().ensure_object(dict)
    if value is not None:
        noted[parameter.name] = value


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"close-engine {__version__}")
        raise typer.Exit


def _shared(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, callback=_note, expose_value=False, show_default=False)


@app.callback()
def options(
    database: Annotated[
        str | None,
        _shared(
            "--database",
            "URL",
            "postgresql://user:password@host/name or sqlite:///file.db; without it the environment variable "
            f"CLOSE_ENGINE_DATABASE, and without that {DEFAULT_URL}.",
        ),
    ] = None,
    leads: Annotated[
        str | None, _shared("--leads-table", "NAME", "The CRM's table of leads (CLOSE_ENGINE_LEADS_TABLE, or leads).")
    ] = None,
    users: Annotated[
        str | None, _shared("--users-table", "NAME", "The CRM's table of users (CLOSE_ENGINE_USERS_TABLE, or users).")
    ] = None,
    clients: Annotated[
        str | None,
        _shared("--clients-table", "NAME", "The CRM's table of clients (CLOSE_ENGINE_CLIENTS_TABLE, or clients)."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Close conversations as a state machine whose rules hold in Python and in the database."""


def option(context: typer.Context, name: str) -> str | None:
    """What a shared option was given, wherever it stood."""
    given: str | None = context.find_root().ensure_object(dict).get(name)
    return given


def open_database(context: typer.Context, missing: Literal["refuse", "make", "pretend"] = "refuse") -> None:
    """Bind and open the database that the options name.

    `missing` says what to do where there is no such SQLite file: only who is to fill it makes one.
    """
    url = option(context, "database") or os.environ.get("CLOSE_ENGINE_DATABASE") or DEFAULT_URL
    connect = partial(
        urls.connect,
        leads=option(context, "leads"),
        users=option(context, "users"),
        clients=option(context, "clients"),
    )
    database = connect(url)
    file = _sqlite_file(database)
    if file and not file.exists():
        if missing == "refuse":
            raise ConfigurationError(
                f"There is no database file {file}: name yours with --database or CLOSE_ENGINE_DATABASE, or make one "
                "without a CRM with close-engine migrate --standalone."
            )
        if not file.parent.is_dir():
            raise ConfigurationError(f"There is no directory {file.parent} to make {file.name} in: make it first.")
        if missing == "pretend":
            database = connect("sqlite:///:memory:")
    context.call_on_close(database.close)
    try:
        database.connect()
    except (peewee.DatabaseError, sqlite3.DatabaseError, TypeError) as error:
        needed = (
            "It must be a SQLite file that this user may write, in a directory where he may write"
            if file
            else "Check that the server is up, and that every part of the URL is right"
        )
        raise ConfigurationError(
            f"The database {without_password(url)} cannot be opened: {one_line(error)}. {needed}."
        ) from error


def _sqlite_file(database: peewee.Database) -> Path | None:
    if isinstance(database, peewee.SqliteDatabase) and database.database not in ("", ":memory:"):
        return Path(str(database.database))
    return None


def open_migrated(context: typer.Context) -> None:
    """Connect to a database that must be migrated."""
    open_database(context)
    if missing := pending():
        raise SchemaError(f"The database is not migrated ({', '.join(missing)} pending): run close-engine migrate.")


def in_seconds(text: str, default: float) -> Any:
    return typer.Option(metavar="SECONDS", parser=_seconds, help=f"{text} Default {default:g}.", show_default=False)


def _seconds(given: str | timedelta) -> timedelta:
    try:
        return given if isinstance(given, timedelta) else timedelta(seconds=float(given))
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{given!r} is no number of seconds.") from None


def _without_secrets(sentence: str) -> str:
    """What a driver says may quote what it was given."""
    try:
        database = current().database
    except ConfigurationError:
        return sentence
    shown = (database.database, database.connect_params.get("user"))
    for name, value in database.connect_params.items():
        if "password" in name and value and value not in shown:
            sentence = sentence.replace(str(value), "***")
    return sentence


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: list of str; the default is the process's own.

    Raises:
        SystemExit: always; its code is 0, 1 for an error, 2 for a command line that cannot be understood.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        try:
            app(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except CloseEngineError as error:
        sentence = str(error)
    except peewee.PeeweeException as error:
        sentence = (
            f"The database refuses: {first_line(error)}. close-engine verify says what it lacks; a "
            "right is its owner's to grant, and a SQLite file and its directory must be writable."
        )
    except OSError as error:
        sentence = f"The system refuses: {error}."
    print(_without_secrets(sentence), file=sys.stderr)
    sys.exit(1)
