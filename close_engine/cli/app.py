"""The parts that all commands share: common options, opening the database, error handling and exit status.

    close-engine --database postgresql://user:password@host/name status

The options of `close-engine` itself can be given before or after the command. An error prints one sentence to standard
error and exits with status 1. Without a terminal, for example in a pipe, output is plain text, as wide as it needs to
be.
"""

from __future__ import annotations

import os
import re
import sqlite3
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import peewee
import typer
from typer.core import TyperCommand, TyperGroup

from close_engine.database import url as urls
from close_engine.database.binding import current, is_transient
from close_engine.database.url import DEFAULT_URL, without_password
from close_engine.errors import CloseEngineError, ConfigurationError, SchemaError, first_line, one_line
from close_engine.printable import printable
from close_engine.schema.scripts import pending
from close_engine.version import __version__

__all__ = [
    "Command",
    "Group",
    "PlainCommand",
    "app",
    "command",
    "importing",
    "in_seconds",
    "main",
    "open_database",
    "open_migrated",
    "option",
    "require_migrated",
    "time_or_ago",
]


#: Typer has its own copy of click, and does not export this.
_UsageError: Any = typer.BadParameter.__base__


class _HidesFlagTypes:
    """Hide the type of flags in the help. `<bool>` would suggest that a flag takes a value."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _AcceptsSharedOptions(_HidesFlagTypes):
    """Also accept the options of `close-engine` itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        shared = [option for option in ctx.find_root().command.params if not option.expose_value]
        return [*super().get_params(ctx), *shared]


class PlainCommand(_HidesFlagTypes, TyperCommand):
    """A command that needs no database and takes no shared options."""


class Command(_AcceptsSharedOptions, TyperCommand):
    """A command that also takes the shared options."""


class Group(_AcceptsSharedOptions, TyperGroup):
    """A command with subcommands."""


class _Root(_HidesFlagTypes, TyperGroup):
    """The command `close-engine` itself."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        with _printable_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with _printable_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _printable_usage_errors() -> Iterator[None]:
    """Escape what an error repeats of the command line, line by line."""
    try:
        yield
    except _UsageError as error:
        sentence = "\n".join(map(printable, error.format_message().split("\n")))
        error.format_message = lambda: sentence
        raise


app = typer.Typer(cls=_Root, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
command = partial(app.command, cls=Command)


def _store(context: typer.Context, parameter: typer.CallbackParam, value: str | None) -> None:
    """Store a shared option in the root context, no matter where on the command line it was given."""
    stored = context.find_root().ensure_object(dict)
    if value is not None:
        stored[parameter.name] = value


def _print_version(requested: bool) -> None:
    if requested:
        print(f"close-engine {__version__}")
        raise typer.Exit


def _shared(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, callback=_store, expose_value=False, show_default=False)


@app.callback()
def options(
    database: Annotated[
        str | None,
        _shared(
            "--database",
            "URL",
            "postgresql://user:password@host/name or sqlite:///file.db. The default is the environment variable "
            f"CLOSE_ENGINE_DATABASE; if that is not set, {DEFAULT_URL}.",
        ),
    ] = None,
    leads: Annotated[
        str | None,
        _shared("--leads-table", "NAME", "The CRM's leads table; default CLOSE_ENGINE_LEADS_TABLE, or leads."),
    ] = None,
    users: Annotated[
        str | None,
        _shared("--users-table", "NAME", "The CRM's users table; default CLOSE_ENGINE_USERS_TABLE, or users."),
    ] = None,
    clients: Annotated[
        str | None,
        _shared("--clients-table", "NAME", "The CRM's clients table; default CLOSE_ENGINE_CLIENTS_TABLE, or clients."),
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Manage close conversations: a state machine enforced in Python and in the database."""


def option(context: typer.Context, name: str) -> str | None:
    """Return the value of a shared option.

    Args:
        context: the context of any command.
        name: str, the parameter's name: database, leads, users or clients.

    Returns:
        str, or None if the option was not given.
    """
    value: str | None = context.find_root().ensure_object(dict).get(name)
    return value


def open_database(
    context: typer.Context, missing: Literal["refuse", "make", "pretend"] = "refuse", *, wait: bool = False
) -> None:
    """Bind and open the database that the options name.

    Args:
        context: the context of the command.
        missing: what to do if the SQLite file does not exist: `refuse` raises an error, `make` creates the file, and
            `pretend` opens an empty database in memory instead.
        wait: bool, whether the command itself waits for a database that is away.

    Raises:
        ConfigurationError: the database cannot be opened, or its file or directory does not exist.
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
                f"There is no database file {file}: name yours with --database or CLOSE_ENGINE_DATABASE, or create one "
                "without a CRM with close-engine migrate --standalone."
            )
        if not file.parent.is_dir():
            raise ConfigurationError(f"There is no directory {file.parent} for {file.name}: create it first.")
        if missing == "pretend":
            database = connect("sqlite:///:memory:")
    context.call_on_close(database.close)
    try:
        database.connect()
    except (peewee.DatabaseError, sqlite3.DatabaseError, TypeError) as error:
        if wait and is_transient(error):
            return
        hint = (
            "It must be a SQLite file, and you need write permission on the file and its directory"
            if file
            else "Check that the server is up and that every part of the URL is right"
        )
        raise ConfigurationError(
            f"The database {without_password(url)} cannot be opened: {one_line(error)}. {hint}."
        ) from error


def _sqlite_file(database: peewee.Database) -> Path | None:
    if isinstance(database, peewee.SqliteDatabase) and database.database not in ("", ":memory:"):
        return Path(str(database.database))
    return None


def open_migrated(context: typer.Context, *, wait: bool = False) -> None:
    """Bind and open a database, and require that it is migrated.

    Args:
        context: the context of the command.
        wait: bool, whether the command itself waits for a database that is away.

    Raises:
        ConfigurationError: the database cannot be opened.
        SchemaError: migrations are pending.
    """
    open_database(context, wait=wait)
    if wait and current().database.is_closed():
        return
    require_migrated()


def require_migrated() -> None:
    """Require that the bound database is migrated.

    Raises:
        SchemaError: migrations are pending.
    """
    if missing := pending():
        raise SchemaError(f"The database is not migrated ({', '.join(missing)} pending): run close-engine migrate.")


@contextmanager
def importing(context: typer.Context, what: str) -> Iterator[None]:
    """Import modules of the user's in this block, which may connect to a database themselves.

    Args:
        context: the context of the command.
        what: str, what they are imported for.

    Raises:
        ConfigurationError: they connect to another database than `--database` names.
    """
    bound = current().database
    yield
    if current().database is not bound:
        if option(context, "database") is not None and _place(current().database) != _place(bound):
            raise ConfigurationError(
                f"--database names one database, and the {what}'s module connects to another when it is imported: "
                "leave out one of the two."
            )
        context.call_on_close(current().database.close)


def _place(database: peewee.Database) -> tuple[Any, ...]:
    return database.database, database.connect_params


def in_seconds(text: str, default: float | None, unit: Literal["seconds", "hours", "days"] = "seconds") -> Any:
    """Declare an option whose value is a number of seconds, or of another unit.

    Args:
        text: str, the help text: one sentence.
        default: the default in that unit, for the help only; None if there is none.
        unit: the unit.

    Returns:
        the annotation of a timedelta parameter.
    """

    def parse(given: str | timedelta) -> timedelta:
        try:
            length = given if isinstance(given, timedelta) else timedelta(**{unit: float(given)})
        except (ValueError, OverflowError):
            raise typer.BadParameter(f"{given!r} is not a number of {unit}.") from None
        if length < timedelta(0):
            raise typer.BadParameter(f"{given!r} is less than zero.")
        return length

    shown = text if default is None else f"{text} Default {default:g}."
    return typer.Option(metavar=unit.upper(), parser=parse, help=shown, show_default=False)


_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def time_or_ago(text: str) -> datetime | timedelta:
    """Read a moment, or how long ago it is."""
    if ago := re.fullmatch("([0-9]{1,5})([mhd])", text):
        return timedelta(**{_UNITS[ago[2]]: int(ago[1])})
    try:
        at = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        at = None
    if at is None or at.utcoffset() is None:
        raise typer.BadParameter(
            f"{text!r} is neither a time with a timezone, such as 2026-01-31T08:00Z, nor so long ago, such as 3h."
        )
    return at


def _without_secrets(sentence: str) -> str:
    """Blank out passwords, because a driver's message may quote its connection parameters."""
    try:
        database = current().database
    except ConfigurationError:
        return sentence
    shown = (database.database, database.connect_params.get("user"))
    for name, value in database.connect_params.items():
        if "password" in name and value and value not in shown:
            sentence = sentence.replace(str(value), "***")
    return sentence


def _sentences(error: Exception) -> list[str]:
    """Say what is wrong, without a traceback: that is for people who write Python."""
    if isinstance(error, CloseEngineError):
        # A sentence, and below it perhaps a line for each problem.
        return str(error).split("\n") if getattr(error, "problems", ()) else [str(error)]
    if isinstance(error, (peewee.PeeweeException, sqlite3.Error)):
        return [
            f"Database error: {first_line(error)}. If a table or column is missing, run close-engine verify. If a "
            "permission is missing, ask the owner of the tables to grant it. A SQLite file and its directory must be "
            "writable."
        ]
    if isinstance(error, OSError):
        return [f"System error: {error}."]
    *_, place = traceback.extract_tb(error.__traceback__)
    return [
        f"This is a bug in close-engine: {type(error).__name__}: {one_line(error)} ({Path(place.filename).name}, line "
        f"{place.lineno}). Please report it, with the command line."
    ]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line.

    Args:
        arguments: list of str; the default is the arguments of this process.

    Raises:
        SystemExit: always. Its code is 0 on success, 1 for an error, 2 for an invalid command line.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        try:
            app(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, for example head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        for sentence in _sentences(error):
            print(printable(_without_secrets(sentence)), file=sys.stderr)
    sys.exit(1)
