"""The command line: one short function per command, over what the library offers. Nobody imports it.

    close-engine --database postgresql://user:password@host/name status

The options of `close-engine` itself may stand before the command or behind it. An error is a sentence on standard
error and exit status 1. Run in a pipe or without a terminal, everything is plain text and as wide as it needs to be.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import peewee
import typer
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typer.core import TyperCommand

from close_engine import backend, schema
from close_engine.backend import DEFAULT_URL, current, without_password
from close_engine.conversations import CloseEngineConversation
from close_engine.demo import LEAST_LEADS, Demo, temporary_database
from close_engine.errors import CloseEngineError, ConfigurationError, ConversationNotFound, InvalidValue, SchemaError
from close_engine.machine import TRIGGERS, mermaid
from close_engine.models import StageChange
from close_engine.transaction import atomic
from close_engine.verify import checks
from close_engine.version import __version__

# -- the options of every command ------------------------------------------------------------------------------------


class Command(TyperCommand):
    """A command that takes the options of `close-engine` itself, too."""

    def get_params(self, ctx: Any) -> list[Any]:
        shared = [option for option in ctx.find_root().command.params if not option.expose_value]
        return [*super().get_params(ctx), *shared]


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


def _connect(context: typer.Context, missing: Literal["refuse", "make", "pretend"] = "refuse") -> None:
    """Bind and open the database that the options name.

    `missing` says what to do where there is no such SQLite file: only who is to fill it makes one.
    """
    noted = context.find_root().ensure_object(dict)
    url = noted.get("database") or os.environ.get("CLOSE_ENGINE_DATABASE") or DEFAULT_URL
    connect = partial(backend.connect, leads=noted.get("leads"), users=noted.get("users"), clients=noted.get("clients"))
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
            f"The database {without_password(url)} cannot be opened: {_one_line(error)}. {needed}."
        ) from error


def _sqlite_file(database: peewee.Database) -> Path | None:
    if isinstance(database, peewee.SqliteDatabase) and database.database not in ("", ":memory:"):
        return Path(str(database.database))
    return None


def _require_migrated() -> None:
    pending = [migration.name for migration in schema.status() if migration.applied_at is None]
    if pending:
        raise SchemaError(f"The database is not migrated ({', '.join(pending)} pending): run close-engine migrate.")


# -- the schema ------------------------------------------------------------------------------------------------------


@command()
def migrate(
    context: typer.Context,
    standalone: Annotated[
        bool,
        typer.Option("--standalone", help="First make minimal leads, users and clients tables, where there is no CRM."),
    ] = False,
    sql: Annotated[bool, typer.Option("--sql", help="Only print the statements, as a script; change nothing.")] = False,
) -> None:
    """Apply the pending migrations, all of them or none. Many machines may do so at once."""
    if sql:
        _connect(context, missing="pretend" if standalone else "refuse")
        statements = schema.migration_sql(standalone=standalone)
        print(";\n\n".join(["BEGIN", *statements, "COMMIT"]) + ";" if statements else "-- Nothing is pending.")
        return
    _connect(context, missing="make" if standalone else "refuse")
    applied = schema.migrate(standalone=standalone)
    print("\n".join(f"Applied {name}." for name in applied) or "Nothing to do: every migration is applied.")


@command()
def down(
    context: typer.Context,
    target: Annotated[
        str | None, typer.Argument(help="Go back through this migration; without it, take back the newest alone.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, even where data would be lost.")] = False,
) -> None:
    """Take migrations back. Asks first where that drops data."""
    _connect(context)
    lost = {} if yes else _lost_by(target)
    if lost and not _confirmed(
        "This drops the rows of " + ", ".join(f"{name} ({count})" for name, count in lost.items())
    ):
        raise CloseEngineError("Nothing was taken back; with --yes it is, without asking.")
    reverted = schema.rollback(target)
    print("\n".join(f"Took back {name}." for name in reverted) or "Nothing to do: no migration is applied.")


def _lost_by(target: str | None) -> dict[str, int]:
    """What taking back would drop: tried, and rolled back."""
    at_stake = schema.rows_at_stake()
    with atomic() as transaction:
        schema.rollback(target)
        left = schema.rows_at_stake()
        transaction.rollback()
    return {name: count for name, count in at_stake.items() if name not in left}


def _confirmed(what: str) -> bool:
    print(f"{what}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # nobody is there to answer, or to end the line
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")


@command()
def status(context: typer.Context) -> None:
    """List the migrations: when each was applied, or that it is pending."""
    _connect(context)
    table = _table("migration", "applied")
    for migration in schema.status():
        applied = f"{migration.applied_at:%Y-%m-%d %H:%M:%S}" if migration.applied_at else "pending"
        table.add_row(
            migration.name, applied if migration.known else f"{applied}, not known here: upgrade close-engine"
        )
    _console().print(table)


@command()
def verify(context: typer.Context) -> None:
    """Check everything that the database must be: exit status 0, or a list of what is wrong and 1."""
    _connect(context)
    made = checks()
    for check in made:
        print(f"{'WRONG' if check.problems else 'ok':5}  {check.subject}")
        for problem in check.problems:
            print(f"       - {problem}")
    count = sum(len(check.problems) for check in made)
    if count:
        raise SchemaError(f"{count} problem{'s' if count > 1 else ''} found; what to do about each is listed.")


# -- conversations ---------------------------------------------------------------------------------------------------


@app.command()
def graph() -> None:
    """Print the state diagram, in Mermaid's language."""
    print(mermaid())


@command()
def show(
    context: typer.Context,
    conversation: Annotated[str, typer.Argument(metavar="CONVERSATION", help="Its id, or the id of its lead.")],
) -> None:
    """Show a conversation and its timeline; of a deleted one, the timeline that it left."""
    _connect(context)
    _require_migrated()
    found = _find(conversation)
    mine = StageChange.conversation_id == (found.id if found else conversation)
    changes = list(StageChange.select().where(mine).order_by(StageChange.id))
    if not changes and not found:
        raise ConversationNotFound(conversation)
    console = _console()
    if found:
        row = _table("column", "value")
        for field in found._meta.sorted_fields:
            row.add_row(field.column_name, _cell(found.__data__[field.name]))
        console.print(row, "")
    else:
        print(f"Conversation {conversation!r} was deleted; its history is kept.")
    columns = ("created_at", "source", "dest", "trigger", "actor", "reason", "key", "metadata")
    timeline = _table("when", "from", "to", *columns[3:])
    for change in changes:
        timeline.add_row(*(_cell(getattr(change, column)) for column in columns))
    console.print(timeline)


@command()
def fire(
    context: typer.Context,
    conversation: Annotated[str, typer.Argument(metavar="CONVERSATION", help="Its id, or the id of its lead.")],
    trigger: Annotated[str, typer.Argument(metavar="TRIGGER", help=f"One of {', '.join(TRIGGERS)}.")],
    actor: Annotated[str, typer.Option(help="Who does it, for the history.")] = "command line",
    reason: Annotated[str | None, typer.Option(help="Why, for the history; close_lost asks for it.")] = None,
    key: Annotated[str | None, typer.Option(help="Idempotency key: the same again changes nothing.")] = None,
    payment_link_url: Annotated[str | None, typer.Option(help="What send_payment_link asks for.")] = None,
    approved_by: Annotated[str | None, typer.Option(help="Who approved the payment link.")] = None,
    metadata: Annotated[str | None, typer.Option(metavar="JSON", help="A JSON object, for the history.")] = None,
) -> None:
    """Fire a trigger of a conversation."""
    given = {"payment_link_url": payment_link_url, "approved_by": approved_by, "metadata": _json_object(metadata)}
    _connect(context)
    _require_migrated()
    found = _find(conversation)
    if found is None:
        raise ConversationNotFound(conversation)
    before = found.updated_at
    change = found.fire(trigger, actor=actor, reason=reason, key=key, **given)
    if found.updated_at == before:
        print(f"Nothing changed: the key {key!r} was used at {change.created_at:%Y-%m-%d %H:%M:%S} UTC already.")
    else:
        print(f"Conversation {found.id!r} went from {change.source} to {change.dest}.")


def _find(name: str) -> CloseEngineConversation | None:
    model = CloseEngineConversation
    found: CloseEngineConversation | None = model.get_or_none(model.id == name) or model.get_or_none(model.lead == name)
    return found


def _json_object(text: str | None) -> Any:
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise InvalidValue("metadata", text, f"it must be a JSON object ({error})") from None


# -- the demonstration -----------------------------------------------------------------------------------------------


@command()
def demo(
    context: typer.Context,
    leads: Annotated[int, typer.Option(min=LEAST_LEADS, help="How many leads to take through it.")] = 300,
    seed: Annotated[int, typer.Option(help="The same seed tells the same stories.")] = 1,
) -> None:
    """Take leads through conversations as they happen, in a temporary database, and show what came out.

    The database is a SQLite file; --database has it made on another server, or in another directory, instead. No
    database that is there already is touched.
    """
    console, progress = _console(), _console(stderr=True)
    with (
        temporary_database(context.find_root().ensure_object(dict).get("database")) as url,
        Demo(url, leads, seed) as play,
    ):
        steps = track(
            play.run(), "Playing", play.total, console=progress, transient=True, disable=not progress.is_terminal
        )
        for _ in steps:
            pass
        report = play.report()
    pipeline, triggers, refused = report.tables()
    for part in (Columns([pipeline, triggers], padding=(0, 4)), refused, report.summary()):
        console.print("", part, sep="\n")
    if report.problems:
        raise SchemaError("The demo found what must not be:", report.problems)
    console.print("The history replays to every stored stage, and verify finds nothing wrong.", style="green")


# -- what is printed, and how it ends --------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    """The terminal at its width; without one, as wide as the widest table."""
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 1000, highlight=False, emoji=False, markup=False)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _cell(value: Any) -> str:
    """A value as it may stand in a terminal: whatever a lead has written, it moves no cursor."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S} UTC"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()).rstrip(".")


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
            f"The database refuses: {str(error).partition(chr(10))[0]}. close-engine verify says what it lacks; a "
            "right is its owner's to grant, and a SQLite file and its directory must be writable."
        )
    except OSError as error:
        sentence = f"The system refuses: {error}."
    print(_without_secrets(sentence), file=sys.stderr)
    sys.exit(1)
