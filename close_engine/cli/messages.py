"""Messages: what the outbox holds, sweeping, and the worker."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated

import typer

from close_engine import outbox, sweeps
from close_engine.board import outbox_line
from close_engine.cli.app import Command, Group, app, command, in_seconds, open_migrated
from close_engine.cli.board import render_outbox
from close_engine.cli.terminal import cell, console, table
from close_engine.outbox import OutboxMessage
from close_engine.stages import MessageStatus
from close_engine.worker import Worker, load_sender

outbox_commands = typer.Typer(invoke_without_command=True)


app.add_typer(outbox_commands, name="outbox", cls=Group)


@outbox_commands.callback()
def outbox_(context: typer.Context) -> None:
    """Show what the outbox holds: how much is to be sent, since when, and what was given up."""
    if context.invoked_subcommand:
        return
    open_migrated(context)
    console().print(render_outbox(outbox_line()))
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
    open_migrated(context)
    print(f"Message {outbox.requeue(message).id} is to be sent again.")


@command()
def sweep(context: typer.Context) -> None:
    """Do what is due by time alone: stall, lose, expire, take back; as from a cron job."""
    open_migrated(context)
    swept = sweeps.sweep()
    print(
        f"Conversations stalled: {len(swept.stalled)}, lost: {len(swept.lost)}. "
        f"Actions expired: {len(swept.expired)}. Messages taken back from dead workers: {len(swept.released)}."
    )


@command()
def worker(
    context: typer.Context,
    sender: Annotated[
        str, typer.Option(metavar="MODULE:FUNCTION", help="What sends a message; the default prints it.")
    ] = "close_engine.worker:print_sender",
    name: Annotated[str | None, typer.Option(help="Its name, which no other worker may have.")] = None,
    limit: Annotated[int, typer.Option(help="How many messages it claims at once.")] = 10,
    lease: Annotated[timedelta, in_seconds("How long they are its own if it dies.", 60)] = timedelta(seconds=60),
    idle: Annotated[timedelta, in_seconds("How long it waits when there is nothing.", 1)] = timedelta(seconds=1),
    sweep_every: Annotated[timedelta, in_seconds("How often it sweeps.", 60)] = timedelta(seconds=60),
    no_sweep: Annotated[bool, typer.Option("--no-sweep", help="Leave sweeping to others.")] = False,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="Stop when nothing can be sent now.")] = False,
) -> None:
    """Send what the outbox holds, and sweep, until SIGTERM or Ctrl-C; the second of them does not wait.

    One line for each event goes to standard error, unless the module of the sender sets up `logging` itself.
    """
    open_migrated(context)
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
