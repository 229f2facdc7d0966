"""The demonstration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.progress import track
from rich.table import Table

from close_engine.cli.app import command, option
from close_engine.cli.terminal import console, duration, table
from close_engine.demo.place import temporary_database
from close_engine.demo.play import LEAST_LEADS, Demo
from close_engine.demo.report import Report
from close_engine.errors import SchemaError
from close_engine.stages import ActionStatus, ActionType, MessageStatus


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
        temporary_database(option(context, "database")) as url,
        Demo(url, leads, seed) as play,
    ):
        steps = track(
            play.run(), "Playing", play.total, console=progress, transient=True, disable=not progress.is_terminal
        )
        for _ in steps:
            pass
        report = play.report()
    pipeline, triggers, levels, approvals, outbox, refused = _tables(report)
    beside = [Columns([pipeline, triggers], padding=(0, 4)), levels, Columns([approvals, outbox], padding=(0, 4))]
    for part in (*beside, refused, _summary(report), str(report.handover)):
        console().print("", part, sep="\n")
    if report.problems:
        raise SchemaError("The demo found what must not be:", report.problems)
    console().print(
        "\nThe history replays to every stored stage, every message was sent as often as is recorded, and verify finds "
        "nothing wrong.",
        style="green",
    )


def _tables(report: Report) -> Iterator[Table]:
    """The report as tables for a console."""
    numbers = ("now", "entered", "median stay")
    pipeline = table("stage", *numbers, title="Pipeline", numbers=numbers)
    for line in report.stages:
        pipeline.add_row(line.stage.value, str(line.now), str(line.entered), duration(line.stay))
    yield pipeline
    fired = table("trigger", "fired", title="Triggers", numbers=("fired",))
    for trigger, count in report.triggers.items():
        fired.add_row(trigger, str(count))
    yield fired
    counts = ("conversations", "paid", "sent at once", "sent when approved")
    levels = table("level", *counts, title="Autonomy", numbers=counts)
    for level in report.levels:
        levels.add_row(
            level.level.value, str(level.conversations), str(level.paid), str(level.at_once), str(level.approved)
        )
    yield levels
    yield _crossed("Approvals", "draft", report.approvals, ActionStatus)
    yield _crossed("Outbox", "message", report.outbox, MessageStatus)
    refused = table("a worker", "times", "error", title="Refused", numbers=("times",))
    for mistake, count in report.refused.items():
        refused.add_row(mistake.what, str(count), mistake.refusal.__name__)
    yield refused


def _crossed(title: str, rows: str, counts: dict[tuple[Any, Any], int], statuses: Iterable[Any]) -> Table:
    """Counts by type and status."""
    columns = [status.lower() for status in statuses]
    crossed = table(rows, *columns, title=title, numbers=columns)
    for type in ActionType:
        crossed.add_row(type.value, *(str(counts.get((type, status), 0)) for status in statuses))
    return crossed


def _summary(report: Report) -> str:
    """What the tables do not say."""
    again = ", ".join(f"{count} {what}s" for what, count in sorted(report.repeated.items()))
    return (
        f"{report.conversations} conversations with {sum(report.triggers.values())} recorded changes; from the opening "
        f"to the payment, it took {duration(report.closing)} (median). {sum(report.refused.values())} mistakes were "
        f"made and refused. Reported twice and processed once: {again}. {report.corrected} drafts were corrected by "
        f"the human who approved them; {report.unanswered} times the provider did not answer, and was asked again."
    )
