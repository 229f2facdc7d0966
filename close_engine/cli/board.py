"""The board in a terminal, printed once or redrawn live."""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import timedelta
from typing import Annotated

import typer
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from close_engine.board import HANGING_AFTER, OutboxLine, Pipeline, pipeline
from close_engine.cli.app import command, in_seconds, open_migrated
from close_engine.cli.terminal import cell, console, duration, table
from close_engine.errors import InvalidValue

HangingAfter = Annotated[timedelta, in_seconds("How long a message is in flight before it counts as hanging.", 300)]


def render(board: Pipeline) -> RenderableType:
    """Lay out the board for a console.

    Args:
        board: Pipeline.

    Returns:
        a rich renderable.
    """
    approvals = table("waiting for approval", "count", "oldest", title="Approvals", numbers=("count", "oldest"))
    for waiting in board.approvals:
        approvals.add_row(waiting.type.value, f"{waiting.waiting:,}", duration(waiting.oldest))
    if not board.approvals:
        approvals.add_row("nothing", "-", "-")
    ours = table("our turn", "count", "longest", title="Waiting for us", numbers=("count", "longest"))
    ours.add_row("leads who wrote", f"{board.waiting_for_us.count:,}", duration(board.waiting_for_us.longest))
    right_side = Group(ours, "", approvals, "", render_outbox(board.outbox))
    parts: list[RenderableType] = [Columns([_render_stages(board), right_side], padding=(0, 4))]
    parts += ["", *_render_workers(board)]
    if any(line.sampled for line in board.stages):
        parts += ["", "~ approximate, >= at least: estimated from a sample"]
    if board.unreadable:
        parts += ["", f"Left out, because they cannot be read: {board.unreadable:,}. close-engine verify lists them."]
    if board.taken_over:
        parts += ["", f"Taken over by humans: {board.taken_over:,}."]
    if board.payment_issues:
        parts += ["", f"Payments to look at: {board.payment_issues:,}. close-engine payments lists them."]
    return Group(*parts)


#: The board names so many lost workers at most.
_MOST_LOST = 5


def _render_workers(board: Pipeline) -> list[str]:
    """Say which workers run and which were lost, and whether messages wait for one."""
    running, lost = ([line for line in board.workers if line.lost is is_lost] for is_lost in (False, True))
    said = []
    if running:
        many, seen = "worker" if len(running) == 1 else "workers", duration(running[0].seen)
        sending, most = sum(line.sending for line in running), sum(line.concurrency for line in running)
        said.append(
            f"{len(running):,} {many}, seen {seen} ago: sending {sending:,} of at most {most:,} messages at once."
        )
    elif board.outbox.lag is not None:
        said.append(f"No worker runs, and messages wait, the next one for {duration(board.outbox.lag)}.")
    else:
        said.append("No worker runs.")
    for line in lost[:_MOST_LOST]:
        said.append(
            f"Lost: {cell(line.name)} on {cell(line.host)}, process {line.pid}, seen {duration(line.seen)} ago."
        )
    if len(lost) > _MOST_LOST:
        said.append(f"Lost, too: {len(lost) - _MOST_LOST:,} more.")
    return said


def _render_stages(board: Pipeline) -> Table:
    numbers = ("conversations", "median time in stage", "longest")
    stages = table("stage", *numbers, title=f"Pipeline at {cell(board.at)}", numbers=numbers)
    for line in board.stages:
        approximately, at_least = ("~ ", ">= ") if line.sampled else ("", "")
        stages.add_row(
            line.stage.value,
            f"{line.count:,}",
            approximately + duration(line.median),
            at_least + duration(line.longest),
        )
    stages.add_section()
    stages.add_row("total", f"{sum(line.count for line in board.stages):,}", "", "")
    return stages


def render_outbox(line: OutboxLine) -> RenderableType:
    """Lay out the state of the outbox: a table, and under it what is paused.

    Args:
        line: OutboxLine.

    Returns:
        a rich renderable.
    """
    counts = table("messages", "count", title="Outbox", numbers=("count",))
    counts.add_row("pending", f"{line.pending:,}")
    counts.add_row("of which in flight", f"{line.in_flight:,}")
    counts.add_row("of which hanging", f"{line.hanging:,}")
    counts.add_row("dead", f"{line.dead:,}")
    counts.add_row("undelivered", f"{line.undelivered:,}")
    counts.add_section()
    counts.add_row("next one waiting for", duration(line.lag))
    if not line.paused:
        return counts
    return Group(counts, "", *(cell(f"PAUSED: {pause}") for pause in line.paused))


def watch(console: Console, every: timedelta, hanging_after: timedelta = HANGING_AFTER) -> None:
    """Show the board and redraw it in place until KeyboardInterrupt.

    Args:
        console: the terminal.
        every: timedelta between redraws.
        hanging_after: timedelta, as for `pipeline`.

    Raises:
        InvalidValue: `every` is not greater than zero, or more than a day.
    """
    if not timedelta(0) < every <= timedelta(days=1):
        raise InvalidValue("every", str(every), "it must be greater than zero and at most a day")
    with Live(render(pipeline(hanging_after)), console=console, auto_refresh=False, transient=False) as live:
        while True:
            time.sleep(every.total_seconds())
            live.update(render(pipeline(hanging_after)), refresh=True)


@command()
def board(
    context: typer.Context,
    every: Annotated[timedelta, in_seconds("How often to redraw.", 2)] = timedelta(seconds=2),
    once: Annotated[
        bool, typer.Option("--once", help="Show it once and exit; the default when the output is not a terminal.")
    ] = False,
    hanging_after: HangingAfter = HANGING_AFTER,
) -> None:
    """Watch the pipeline until Ctrl-C: conversations per stage, what waits for approval, the outbox, workers."""
    open_migrated(context)
    if once or not console().is_terminal:
        console().print(render(pipeline(hanging_after)))
        return
    with suppress(KeyboardInterrupt):
        watch(console(), every, hanging_after)
