"""Messages: show the outbox, requeue a dead message, sweep, run a worker."""

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
    """Show the outbox: how many messages are pending, and which ones are dead and why."""
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
    message: Annotated[
        int, typer.Argument(metavar="MESSAGE", help="The message's id, as listed by close-engine outbox.")
    ],
) -> None:
    """Put a dead message back into the outbox with a fresh set of attempts."""
    open_migrated(context)
    print(f"Message {outbox.requeue(message).id} will be sent again.")


@command()
def sweep(context: typer.Context) -> None:
    """Stall silent conversations, close stalled ones as lost, expire drafts, release messages of dead workers.

    A worker does this on its timer. This command does it once, for example
    from a cron job.
    """
    open_migrated(context)
    swept = sweeps.sweep()
    print(
        f"Conversations stalled: {len(swept.stalled)}, lost: {len(swept.lost)}. "
        f"Actions expired: {len(swept.expired)}. Messages released from dead workers: {len(swept.released)}."
    )


@command()
def worker(
    context: typer.Context,
    sender: Annotated[
        str,
        typer.Option(
            metavar="MODULE:FUNCTION", help="The function that sends a message. The default prints what it would send."
        ),
    ] = "close_engine.worker:print_sender",
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The worker's name, for leases and the history. No two workers may share one; the default is unique.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="NUMBER", help="How many messages to claim at once.")] = 10,
    lease: Annotated[timedelta, in_seconds("How long this worker's messages stay leased if it dies.", 60)] = timedelta(
        seconds=60
    ),
    idle: Annotated[
        timedelta, in_seconds("How long to wait when there is nothing to send or the database is down.", 1)
    ] = timedelta(seconds=1),
    sweep_every: Annotated[timedelta, in_seconds("How often to sweep, starting right away.", 60)] = timedelta(
        seconds=60
    ),
    no_sweep: Annotated[bool, typer.Option("--no-sweep", help="Do not sweep; other workers do.")] = False,
    until_empty: Annotated[bool, typer.Option("--until-empty", help="Stop when nothing can be sent now.")] = False,
) -> None:
    """Send the messages in the outbox, and sweep, until SIGTERM or Ctrl-C.

    On the first signal, the worker finishes the message it is sending and
    gives the others back. On a second signal, it stops at once. It logs one
    line per event to standard error, unless the sender's module sets up
    `logging` itself.
    """
    open_migrated(context)
    swept = None if no_sweep else sweeps.sweep
    send = load_sender(sender)
    sending_worker = Worker(send, name=name, limit=limit, lease=lease, idle=idle, sweep=swept, sweep_every=sweep_every)
    _log_to_standard_error()
    with _stopped_by_signals(sending_worker):
        if until_empty:
            sending_worker.run_until_empty()
        else:
            sending_worker.run()


class _OneLine(logging.Formatter):
    """Format each event as one line, even if it has a traceback."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return cell(super().format(record).replace("\n", "\\n"))


def _log_to_standard_error() -> None:
    if logging.root.handlers:  # the sender's module has set up logging
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logging.root.addHandler(handler)
    logging.getLogger("close_engine").setLevel(logging.INFO)


@contextmanager
def _stopped_by_signals(worker: Worker) -> Iterator[None]:
    """Stop the worker on the first SIGTERM or SIGINT, and restore the previous handlers for the second one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        restore()
        worker.stop()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
