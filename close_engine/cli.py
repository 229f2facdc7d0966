"""The command line: one short function per command, over what the library offers. Nobody imports it.

    close-engine --database postgresql://user:password@host/name status

The options of `close-engine` itself may stand before the command or behind it. An error is a sentence on standard
error and exit status 1. Run in a pipe or without a terminal, everything is plain text and as wide as it needs to be.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import peewee
import typer
from rich.columns import Columns
from rich.progress import track
from typer.core import TyperCommand, TyperGroup

from close_engine import backend, outbox, schema, sweeps
from close_engine import board as boards
from close_engine.approvals import PendingAction, pending_actions
from close_engine.backend import DEFAULT_URL, current, now, without_password
from close_engine.conversations import CloseEngineConversation
from close_engine.demo import LEAST_LEADS, Demo, temporary_database
from close_engine.errors import (
    ActionNotFound,
    CloseEngineError,
    ConfigurationError,
    ConversationNotFound,
    InvalidValue,
    SchemaError,
    first_line,
    one_line,
)
from close_engine.machine import TRIGGERS, mermaid
from close_engine.models import StageChange
from close_engine.outbox import OutboxMessage
from close_engine.stages import ActionStatus, ActionType, MessageStatus
from close_engine.terminal import cell, console, table
from close_engine.verify import checks
from close_engine.version import __version__
from close_engine.worker import Worker, load_sender

# -- the options of every command ------------------------------------------------------------------------------------


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
            f"The database {without_password(url)} cannot be opened: {one_line(error)}. {needed}."
        ) from error


def _sqlite_file(database: peewee.Database) -> Path | None:
    if isinstance(database, peewee.SqliteDatabase) and database.database not in ("", ":memory:"):
        return Path(str(database.database))
    return None


def _open(context: typer.Context) -> None:
    """Connect to a database that must be migrated."""
    _connect(context)
    if pending := schema.pending():
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
    lost = {} if yes else schema.rows_at_stake(target)
    if lost and not _confirmed(
        "This drops the rows of " + ", ".join(f"{name} ({count})" for name, count in lost.items())
    ):
        raise CloseEngineError("Nothing was taken back; with --yes it is, without asking.")
    reverted = schema.rollback(target)
    print("\n".join(f"Took back {name}." for name in reverted) or "Nothing to do: no migration is applied.")


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
    listed = table("migration", "applied")
    for migration in schema.status():
        applied = f"{migration.applied_at:%Y-%m-%d %H:%M:%S}" if migration.applied_at else "pending"
        listed.add_row(
            migration.name, applied if migration.known else f"{applied}, not known here: upgrade close-engine"
        )
    console().print(listed)


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
    _open(context)
    found = _find(conversation)
    mine = StageChange.conversation_id == (found.id if found else conversation)
    changes = list(StageChange.select().where(mine).order_by(StageChange.id))
    if not changes and not found:
        raise ConversationNotFound(conversation)
    if found:
        row = table("column", "value")
        for field in found._meta.sorted_fields:
            row.add_row(field.column_name, cell(found.__data__[field.name]))
        console().print(row, "")
    else:
        print(f"Conversation {conversation!r} was deleted; its history is kept.")
    columns = ("created_at", "source", "dest", "trigger", "actor", "reason", "key", "metadata")
    timeline = table("when", "from", "to", *columns[3:])
    for change in changes:
        timeline.add_row(*(cell(getattr(change, column)) for column in columns))
    console().print(timeline)


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
    _open(context)
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


# -- approvals -------------------------------------------------------------------------------------------------------


@command()
def actions(
    context: typer.Context,
    type: Annotated[ActionType | None, typer.Option(help="Only those of this type.")] = None,
) -> None:
    """List what waits for a human's approval, the oldest first."""
    _open(context)
    waiting = table("id", "type", "lead", "waits for", "expires in", "draft")
    for action in pending_actions(type=type):
        left = action.expires_at and action.expires_at - now()
        waited = now() - action.created_at
        waiting.add_row(*map(cell, (action.id, action.type, action.lead_id, waited, left, action.draft_message)))
    if waiting.row_count:
        console().print(waiting)
    else:
        print("Nothing waits for approval.")


_Action = Annotated[str, typer.Argument(metavar="ACTION", help="Its id, as close-engine actions shows it.")]
_By = Annotated[str, typer.Option(metavar="WHO", help="Who decides.")]


@command()
def approve(
    context: typer.Context,
    action: _Action,
    by: _By,
    message: Annotated[str | None, typer.Option(help="The text to send instead of the draft.")] = None,
) -> None:
    """Approve what waits, so that it is sent."""
    _open(context)
    found = _action(action)
    before = found.status
    sent = found.approve(by, message)
    print(f"{_decided(found, before)}: message {sent.id} of the outbox.")


@command()
def reject(
    context: typer.Context,
    action: _Action,
    by: _By,
    reason: Annotated[str | None, typer.Option(help="Why, for the history.")] = None,
) -> None:
    """Reject what waits; it is not sent."""
    _open(context)
    found = _action(action)
    before = found.status
    found.reject(by, reason)
    print(f"{_decided(found, before)}.")


def _decided(action: PendingAction, before: ActionStatus) -> str:
    decision = action.status.lower()
    if action.status is before:
        return f"Action {action.id!r} was {decision} by {cell(action.approved_by)} already"
    return f"Action {action.id!r} is {decision}"


def _action(name: str) -> PendingAction:
    found: PendingAction | None = PendingAction.get_or_none(PendingAction.id == name)
    if found is None:
        raise ActionNotFound(name)
    return found


# -- messages --------------------------------------------------------------------------------------------------------

outbox_commands = typer.Typer(invoke_without_command=True)
app.add_typer(outbox_commands, name="outbox", cls=Group)


@outbox_commands.callback()
def outbox_(context: typer.Context) -> None:
    """Show what the outbox holds: how much is to be sent, since when, and what was given up."""
    if context.invoked_subcommand:
        return
    _open(context)
    console().print(boards.render_outbox(boards.outbox_line()))
    dead = table("id", "topic", "lead", "attempts", "last error", title="Dead")
    for message in OutboxMessage.select().where(OutboxMessage.status == MessageStatus.DEAD).order_by(OutboxMessage.id):
        dead.add_row(*map(cell, (message.id, message.topic, message.lead_id, message.attempts, message.last_error)))
    if dead.row_count:
        console().print("", dead)


@outbox_commands.command(cls=Command)
def requeue(
    context: typer.Context,
    message: Annotated[int, typer.Argument(metavar="MESSAGE", help="Its id, as close-engine outbox shows it.")],
) -> None:
    """Put a dead message back, to be tried again."""
    _open(context)
    print(f"Message {outbox.requeue(message).id} is to be sent again.")


@command()
def sweep(context: typer.Context) -> None:
    """Do what is due by time alone: stall, lose, expire, take back; as from a cron job."""
    _open(context)
    swept = sweeps.sweep()
    print(
        f"Conversations stalled: {len(swept.stalled)}, lost: {len(swept.lost)}. "
        f"Actions expired: {len(swept.expired)}. Messages taken back from dead workers: {len(swept.released)}."
    )


def _in_seconds(text: str, default: float) -> Any:
    return typer.Option(metavar="SECONDS", parser=_seconds, help=f"{text} Default {default:g}.", show_default=False)


def _seconds(given: str | timedelta) -> timedelta:
    try:
        return given if isinstance(given, timedelta) else timedelta(seconds=float(given))
    except (ValueError, OverflowError):
        raise typer.BadParameter(f"{given!r} is no number of seconds.") from None


@command()
def worker(
    context: typer.Context,
    sender: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="What sends a message; the default prints it.")
    ] = "close_engine.worker:print_sender",
    name: Annotated[str | None, typer.Option(help="Its name, which no other worker may have.")] = None,
    limit: Annotated[int, typer.Option(help="How many messages it claims at once.")] = 10,
    lease: Annotated[timedelta, _in_seconds("How long they are its own if it dies.", 60)] = timedelta(seconds=60),
    idle: Annotated[timedelta, _in_seconds("How long it waits when there is nothing.", 1)] = timedelta(seconds=1),
    sweep_every: Annotated[timedelta, _in_seconds("How often it sweeps.", 60)] = timedelta(seconds=60),
    no_sweep: Annotated[bool, typer.Option("--no-sweep", help="Leave sweeping to others.")] = False,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="Stop when nothing can be sent now.")] = False,
) -> None:
    """Send what the outbox holds, and sweep, until SIGTERM or Ctrl-C; the second of them does not wait.

    One line for each event goes to standard error, unless the module of the sender sets up `logging` itself.
    """
    _open(context)
    swept = None if no_sweep else sweeps.sweep
    send = load_sender(sender)
    made = Worker(send, name=name, limit=limit, lease=lease, idle=idle, sweep=swept, sweep_every=sweep_every)
    _log_to_standard_error()
    with _stopped_by_signals(made):
        if until_empty:
            made.run_until_empty()
        else:
            made.run()


class _OneLine(logging.Formatter):
    """One line for each event, also where a traceback belongs to it."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return cell(super().format(record).replace("\n", "\\n"))


def _log_to_standard_error() -> None:
    if logging.root.handlers:  # the sender's module has its own way
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logging.root.addHandler(handler)
    logging.getLogger("close_engine").setLevel(logging.INFO)


@contextmanager
def _stopped_by_signals(stopped: Worker) -> Iterator[None]:
    """SIGTERM or SIGINT lets it finish what it is sending; the next does what it did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        restore()
        stopped.stop()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()


@command()
def board(
    context: typer.Context,
    every: Annotated[timedelta, _in_seconds("How long each picture stands.", 2)] = timedelta(seconds=2),
    once: Annotated[bool, typer.Option("--once", help="Show it once; so it is where there is no terminal.")] = False,
) -> None:
    """Watch the pipeline: conversations and time in each stage, what waits for approval, the outbox. Ctrl-C ends it."""
    _open(context)
    if once or not console().is_terminal:
        console().print(boards.render(boards.pipeline()))
        return
    with suppress(KeyboardInterrupt):
        boards.watch(console(), every)


# -- the demonstration -----------------------------------------------------------------------------------------------


@command()
def demo(
    context: typer.Context,
    leads: Annotated[int, typer.Option(min=LEAST_LEADS, help="How many leads to take through it.")] = 200,
    seed: Annotated[int, typer.Option(help="The same seed tells the same stories.")] = 1,
) -> None:
    """Take leads through conversations as they happen, in a temporary database, and show what came out.

    The database is a SQLite file; --database has it made on another server, or in another directory, instead. No
    database that is there already is touched.
    """
    progress = console(stderr=True)
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
    pipeline, triggers, levels, approvals, outbox_, refused = report.tables()
    beside = [Columns([pipeline, triggers], padding=(0, 4)), levels, Columns([approvals, outbox_], padding=(0, 4))]
    for part in (*beside, refused, report.summary(), str(report.handover)):
        console().print("", part, sep="\n")
    if report.problems:
        raise SchemaError("The demo found what must not be:", report.problems)
    console().print(
        "\nThe history replays to every stored stage, every message was sent as often as is recorded, and verify finds "
        "nothing wrong.",
        style="green",
    )


# -- what is printed, and how it ends --------------------------------------------------------------------------------


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
