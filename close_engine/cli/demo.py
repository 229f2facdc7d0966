"""The demo: run it and print its report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.progress import track
from rich.table import Table

from close_engine.cli.app import command, option
from close_engine.cli.terminal import cell, console, duration, table
from close_engine.conversations import CloseEngineConversation
from close_engine.demo.place import temporary_database
from close_engine.demo.play import MIN_LEADS, Demo
from close_engine.demo.report import Report
from close_engine.demo.story import tell
from close_engine.errors import SchemaError
from close_engine.stages import ActionStatus, ActionType, MessageStatus

#: How many leads are simulated, and the most, which take an hour.
LEADS, MAX_LEADS = 200, 100_000


@command()
def demo(
    context: typer.Context,
    leads: Annotated[
        int | None,
        typer.Option(
            metavar="NUMBER",
            min=MIN_LEADS,
            max=MAX_LEADS,
            help=f"How many leads to simulate: {LEADS}, or {MIN_LEADS} with --story.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="NUMBER", help="The same seed tells the same stories.")] = 1,
    story: Annotated[bool, typer.Option("--story", help="Only tell one of the conversations whole.")] = False,
) -> None:
    """Simulate leads and their conversations in a temporary database, report the outcome, and tell one of them whole.

    The database is a SQLite file. With --database, it is created on that
    server, or next to that file. No existing database is touched.
    """
    progress = console(stderr=True)
    with (
        temporary_database(option(context, "database")) as url,
        Demo(url, leads or (MIN_LEADS if story else LEADS), seed) as simulation,
    ):
        steps = track(
            simulation.run(),
            "Running",
            simulation.total,
            console=progress,
            transient=True,
            disable=not progress.is_terminal,
        )
        for _ in steps:
            pass
        report = simulation.report()
        told = _story(simulation.hero.conversation, simulation.hero.story.meaning)
    if not story:
        _print_report(report)
    if report.problems:
        raise SchemaError("The demo found problems:", report.problems)
    if not story:
        console().print(
            "\nThe history replays to every stored stage, every message was sent exactly as often as recorded, and "
            "verify finds nothing wrong.\n",
            style="green",
        )
    console().print(told)


def _print_report(report: Report) -> None:
    pipeline, triggers, levels, approvals, outbox, refused = _tables(report)
    tables = [Columns([pipeline, triggers], padding=(0, 4)), levels, Columns([approvals, outbox], padding=(0, 4))]
    for part in (*tables, refused, _summary(report), str(report.handover)):
        console().print("", part, sep="\n")


def _story(conversation: CloseEngineConversation, meaning: str) -> Table:
    """Lay out one conversation; the day stands where it begins."""
    told = table("when", "who", "what", title=f"One conversation told whole: {meaning}")
    day = None
    for line in tell(conversation):
        is_new, day = line.at.date() != day, line.at.date()
        told.add_row(f"{line.at:%a %d %b %H:%M}" if is_new else f"{line.at:%H:%M}", cell(line.who), cell(line.what))
    told.columns[0].justify = "right"
    return told


def _tables(report: Report) -> Iterator[Table]:
    """Lay out the report as tables."""
    numbers = ("now", "entered", "median stay")
    pipeline = table("stage", *numbers, title="Pipeline", numbers=numbers)
    for line in report.stages:
        pipeline.add_row(line.stage.value, str(line.now), str(line.entered), duration(line.stay))
    yield pipeline
    fired = table("trigger", "fired", title="Triggers", numbers=("fired",))
    for trigger, count in report.triggers.items():
        fired.add_row(trigger, str(count))
    yield fired
    counts = ("conversations", "paid", "sent without approval", "sent after approval")
    levels = table("level", *counts, title="Autonomy", numbers=counts)
    for level in report.levels:
        levels.add_row(
            level.level.value, str(level.conversations), str(level.paid), str(level.unapproved), str(level.approved)
        )
    yield levels
    yield _crossed("Approvals", "draft", report.approvals, ActionStatus)
    yield _crossed("Outbox", "message", report.outbox, MessageStatus)
    refused = table("mistake", "times", "error", title="Refused", numbers=("times",))
    for mistake, count in report.refused.items():
        refused.add_row(mistake.description, str(count), mistake.refusal.__name__)
    yield refused


def _crossed(title: str, rows: str, counts: dict[tuple[Any, Any], int], statuses: Iterable[Any]) -> Table:
    """Lay out counts by type and status."""
    columns = [status.lower() for status in statuses]
    crossed = table(rows, *columns, title=title, numbers=columns)
    for type in ActionType:
        crossed.add_row(type.value, *(str(counts.get((type, status), 0)) for status in statuses))
    return crossed


def _summary(report: Report) -> str:
    """Describe what the tables do not show."""
    repeated = ", ".join(_counted(count, event) for event, count in sorted(report.repeated.items()))
    return (
        f"{report.conversations} conversations with {sum(report.triggers.values())} recorded stage changes. The median "
        f"time from opening to payment is {duration(report.closing)}. {sum(report.refused.values())} mistakes were "
        f"made on purpose and refused. Reported twice but processed once: {repeated}. Humans corrected "
        f"{_counted(report.corrected, 'draft')} while approving. The provider did not answer "
        f"{_counted(report.unanswered, 'time')} and was asked again. Leads wrote while "
        f"{_counted(report.superseded, 'draft')} waited, which {'was' if report.superseded == 1 else 'were'} therefore "
        f"not sent. At the end, {_counted(report.our_turn, 'conversation')} "
        f"{'waits' if report.our_turn == 1 else 'wait'} for us, and {report.their_turn} for the lead."
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
