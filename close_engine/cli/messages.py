"""Messages: show the outbox, requeue a dead message, sweep, run a worker."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import typer

from close_engine import outbox, pauses, sweeps
from close_engine.agency import Agency, AgencySender, load_agency, read_environment
from close_engine.board import HANGING_AFTER, outbox_line
from close_engine.cli.app import (
    Command,
    Group,
    app,
    command,
    importing,
    in_seconds,
    open_migrated,
    require_migrated,
    time_or_ago,
)
from close_engine.cli.board import HangingAfter, render_outbox
from close_engine.cli.terminal import cell, console, log_to_standard_error, table
from close_engine.database.binding import current, is_transient, moment
from close_engine.database.fields import clean_text
from close_engine.errors import first_line
from close_engine.policies import DailyCap, QuietHours
from close_engine.printable import get_logger
from close_engine.worker import MOST_SENDERS, Worker, load_module, load_sender

__all__ = ["subscribed"]

logger = get_logger(__name__)

outbox_commands = typer.Typer(invoke_without_command=True)


app.add_typer(outbox_commands, name="outbox", cls=Group)


@outbox_commands.callback()
def outbox_(context: typer.Context, hanging_after: HangingAfter = HANGING_AFTER) -> None:
    """Show the outbox: how many messages are pending, and with which errors the dead and undelivered ones ended."""
    if context.invoked_subcommand:
        return
    open_migrated(context)
    console().print(render_outbox(outbox_line(hanging_after)))
    for title, lines in {"Dead": outbox.dead_lines(), "Undelivered": outbox.undelivered_lines()}.items():
        ended = table("error", "messages", "last one", "for example", title=title, numbers=("messages",))
        for line in lines:
            ended.add_row(
                cell(line.error), f"{line.count:,}", cell(line.last), cell(f"{line.example}: {line.sentence}")
            )
        if lines:
            console().print("", ended)


@outbox_commands.command(cls=Command)
def requeue(
    context: typer.Context,
    message: Annotated[
        int | None,
        typer.Argument(
            metavar="MESSAGE", help="The message's id; close-engine outbox shows examples.", min=1, max=2**63 - 1
        ),
    ] = None,
    error: Annotated[
        str | None,
        typer.Option(metavar="ERROR", help="All that ended with this error, as close-engine outbox lists it."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="All that died at this time or later: ISO 8601 with a timezone, or so long ago, such as 30m or 3h.",
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All dead messages.")] = False,
    body: Annotated[str | None, typer.Option(metavar="TEXT", help="Send this text instead: for one message.")] = None,
) -> None:
    """Put dead messages, or one that was not delivered, back into the outbox with a fresh set of attempts."""
    many = everything or error is not None or since is not None
    if (message is None) is not many or (body is not None and many):
        raise typer.BadParameter("Name one message by its id, or several by --error, --since or --all.")
    after = None if since is None else time_or_ago(since)
    open_migrated(context)
    if isinstance(after, timedelta):
        after = moment() - after
    if message is not None:
        print(f"Message {outbox.requeue(message, body).id} will be sent again.")
    else:
        print(f"Messages that will be sent again: {len(outbox.requeue_all(error=error, since=after))}.")


_Topics = Annotated[
    list[str] | None, typer.Option("--topic", metavar="TOPIC", help="Only this topic. It can be given several times.")
]


@command()
def pause(
    context: typer.Context,
    reason: Annotated[str, typer.Argument(metavar="REASON", help="Why: it is shown with the outbox.")],
    topic: _Topics = None,
    by: Annotated[str, typer.Option(metavar="WHO", help="Who pauses it.")] = "command line",
) -> None:
    """Send nothing more until close-engine resume-sending. What is in flight leaves."""
    open_migrated(context)
    for each in pauses.pause_sending(reason, topic, by):
        print(cell(f"PAUSED: {each}"))


@command()
def resume_sending(
    context: typer.Context,
    topic: _Topics = None,
    by: Annotated[str, typer.Option(metavar="WHO", help="Who resumes it.")] = "command line",
) -> None:
    """Send again what close-engine pause has paused, or only some topics of it."""
    open_migrated(context)
    print(f"Pauses ended: {len(pauses.resume_sending(topic, by))}.")
    for each in pauses.paused():
        print(cell(f"PAUSED: {each}"))


StallAfter = Annotated[timedelta, in_seconds("How long a lead is silent before its conversation stalls.", 72, "hours")]
LoseAfter = Annotated[timedelta, in_seconds("How long a conversation is stalled before it is lost.", 7, "days")]
LoseUnansweredAfter = Annotated[
    timedelta | None,
    in_seconds(
        "How long a lead waits for our answer before the conversation is lost: never, unless given.", None, "days"
    ),
]


@command()
def sweep(
    context: typer.Context,
    stall_after: StallAfter = sweeps.STALL_AFTER,
    lose_after: LoseAfter = sweeps.LOSE_AFTER,
    lose_unanswered_after: LoseUnansweredAfter = None,
) -> None:
    """Stall conversations of silent leads, close stalled ones as lost, expire drafts, release messages of dead workers.

    A worker does this on its timer. This command does it once, for example
    from a cron job.
    """
    open_migrated(context)
    swept = sweeps.sweep(stall_after=stall_after, lose_after=lose_after, lose_unanswered_after=lose_unanswered_after)
    print(
        f"Conversations stalled: {len(swept.stalled)}, lost: {len(swept.lost)}. "
        f"Actions expired: {len(swept.expired)}. Approvals withdrawn: {len(swept.withdrawn)}. "
        f"Messages released from dead workers: {len(swept.released)}."
    )
    for row_id, sentence in swept.failed.items():
        print(cell(f"Passed over {row_id}: {sentence}"))
    if swept.failed:
        raise typer.Exit(1)


@command()
def worker(
    context: typer.Context,
    sender: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:NAME", help="The sender: a function of one message, or an object with send and find."
        ),
    ] = None,
    agency: Annotated[
        bool,
        typer.Option("--agency", help="Run the agency that CLOSE_ENGINE_AGENCY names: draft, build and send for it."),
    ] = False,
    show: Annotated[
        bool, typer.Option("--print", help="Print what could be sent now, send nothing, mark nothing, and exit.")
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option("--import", metavar="MODULE", help="Import this first: it registers hooks. Can be given often."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The worker's name, for leases and the history. No two workers may share one; the default is unique.",
        ),
    ] = None,
    concurrency: Annotated[
        int,
        typer.Option(
            metavar="NUMBER", max=MOST_SENDERS, help=f"How many messages to send at once, at most {MOST_SENDERS}."
        ),
    ] = 4,
    topic: Annotated[
        list[str] | None,
        typer.Option(metavar="TOPIC", help="Send only messages with this topic. It can be given several times."),
    ] = None,
    lease: Annotated[timedelta, in_seconds("How long this worker's messages stay leased if it dies.", 60)] = timedelta(
        seconds=60
    ),
    idle: Annotated[
        timedelta, in_seconds("The longest to wait before looking for messages again, or for the database.", 1)
    ] = timedelta(seconds=1),
    sweep_every: Annotated[timedelta, in_seconds("How often to sweep, starting right away.", 60)] = timedelta(
        seconds=60
    ),
    stall_after: StallAfter = sweeps.STALL_AFTER,
    lose_after: LoseAfter = sweeps.LOSE_AFTER,
    lose_unanswered_after: LoseUnansweredAfter = None,
    quiet_from: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="When leads are not texted any more, such as 20:00, where they are."),
    ] = None,
    quiet_until: Annotated[
        str | None, typer.Option(metavar="TIME", help="When they are texted again, such as 08:00.")
    ] = None,
    daily_cap: Annotated[
        int | None, typer.Option(metavar="NUMBER", help="How many texts a lead gets from the AI in a day.")
    ] = None,
    timezone_column: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="The column of the leads that has their timezone.")
    ] = None,
    timezone: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The timezone of leads without a known one, such as America/New_York."),
    ] = None,
    no_sweep: Annotated[bool, typer.Option("--no-sweep", help="Do not sweep; other workers do.")] = False,
    metrics_port: Annotated[
        int | None,
        typer.Option(metavar="PORT", min=0, max=65535, help="Serve metrics for Prometheus at this port; 0 for any."),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="The address to serve them at; 0.0.0.0 for other machines, too.")
    ] = "127.0.0.1",
    until_empty: Annotated[bool, typer.Option("--until-empty", help="Stop when nothing can be sent now.")] = False,
) -> None:
    """Send the messages in the outbox, and sweep, until SIGTERM or Ctrl-C.

    On the first signal, the worker finishes the messages it is sending. On a
    second signal, it stops at once. If the database is away, it waits. It
    logs one line per event to standard error, unless the sender's module sets
    up `logging` itself.
    """
    if [sender is not None, agency, show].count(True) != 1:
        raise typer.BadParameter(
            "Name your sender with --sender MODULE:NAME, run your agency with --agency, or show what there is with "
            "--print."
        )
    if show and modules:
        raise typer.BadParameter("With --print, nothing is imported: leave out --import.")
    topics = None if topic is None else [clean_text("topic", name) for name in topic]
    quiet_hours, cap = _policies(quiet_from, quiet_until, daily_cap, timezone_column, timezone)
    if agency:
        read_environment("worker")  # before the database: one error names all that is missing
    patient = not (show or until_empty)
    open_migrated(context, wait=patient)
    if show:
        for pause in pauses.paused():
            print(cell(f"PAUSED: {pause}"))
        for message in outbox.claimable(topics):
            print(cell(f"{message.topic} to lead {message.lead_id}: {message.body or message.payload}"))
        return
    with importing(context, "agency" if agency else "sender"):
        for module in modules or ():
            load_module(module)
        send, running = _loaded_agency(topics) if agency else (load_sender(str(sender)), None)
    log_to_standard_error()
    if running is not None:
        topics = topics or running.topics
        subscribed(running, idle, patient=patient)
    swept = partial(
        sweeps.sweep, stall_after=stall_after, lose_after=lose_after, lose_unanswered_after=lose_unanswered_after
    )
    sending_worker = Worker(
        send,
        name=name,
        concurrency=concurrency,
        topics=topics,
        lease=lease,
        idle=idle,
        sweep=None if no_sweep else swept,
        sweep_every=sweep_every,
        quiet_hours=quiet_hours,
        daily_cap=cap,
    )
    with _metrics_served(metrics_host, metrics_port), _stopped_by_signals(sending_worker):
        if until_empty:
            sending_worker.run_until_empty()
        else:
            sending_worker.run()


def _loaded_agency(topics: list[str] | None) -> tuple[AgencySender, Agency]:
    """Return the agency that the environment names, and its sender."""
    agency, settings = load_agency("worker")
    if unknown := [topic for topic in topics or () if topic not in agency.topics]:
        raise typer.BadParameter(f"The agency has no topic {unknown[0]!r}; it has {', '.join(agency.topics)}.")
    return agency.sender(settings), agency


def subscribed(agency: Agency, idle: timedelta = timedelta(seconds=1), *, patient: bool = True) -> None:
    """Say in the database what follows for an agency. If the database is away, wait for it, unless nobody is to wait.

    Raises:
        SchemaError: the database is not migrated.
        peewee.PeeweeException: the database cannot be used.
    """
    while True:
        try:
            with current().database.connection_context():
                require_migrated()
                agency.subscribe()
        except Exception as error:
            if not (patient and is_transient(error)):
                raise
            logger.warning("database unreachable: %s", first_line(error))
            time.sleep(idle.total_seconds())
        else:
            return


def _policies(
    start: str | None, end: str | None, most: int | None, column: str | None, timezone: str | None
) -> tuple[QuietHours | None, DailyCap | None]:
    if (start is None) is not (end is None):
        raise typer.BadParameter("Give both --quiet-from and --quiet-until, or neither.")
    if (start is None and most is None) is not (timezone is None and column is None):
        raise typer.BadParameter("--quiet-from and --daily-cap need --timezone, and --timezone needs one of them.")
    if column is not None and timezone is None:
        raise typer.BadParameter("Say with --timezone where leads are whose timezone nobody knows.")
    zones: dict[str, Any] = {"timezone": column, "default": timezone}
    quiet_hours = None if start is None or end is None else QuietHours(start, end, **zones)
    return quiet_hours, None if most is None else DailyCap(most, **zones)


@contextmanager
def _metrics_served(host: str, port: int | None) -> Iterator[None]:
    """Serve the metrics of this process meanwhile, unless there is no port."""
    if port is None:
        yield
        return
    from close_engine import metrics  # it needs a package that not everybody has

    with metrics.serving(port, host) as chosen:
        logger.info("metrics at http://%s:%s/metrics", host, chosen)
        yield


@contextmanager
def _stopped_by_signals(worker: Worker) -> Iterator[None]:
    """Stop the worker on the first SIGTERM or SIGINT, and restore the previous handlers for the second one."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        worker.stop()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
