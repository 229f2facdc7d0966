"""The board in a terminal: once, or live."""

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

from close_engine.board import OutboxLine, Pipeline, pipeline
from close_engine.cli.app import command, in_seconds, open_migrated
from close_engine.cli.terminal import cell, console, duration, table
from close_engine.errors import InvalidValue


def render(board: Pipeline) -> RenderableType:
    """The board as it is printed."""
    approvals = table("waits for approval", "count", "oldest", title="Approvals", numbers=("count", "oldest"))
    for waiting in board.approvals:
        approvals.add_row(waiting.type.value, f"{waiting.waiting:,}", duration(waiting.oldest))
    if not board.approvals:
        approvals.add_row("nothing", "-", "-")
    beside = Group(approvals, "", render_outbox(board.outbox))
    parts: list[RenderableType] = [Columns([_render_stages(board), beside], padding=(0, 4))]
    if any(line.sampled for line in board.stages):
        parts += ["", "~ approximated, >= at least: from a sample"]
    return Group(*parts)


def _render_stages(board: Pipeline) -> Table:
    numbers = ("conversations", "median time in it", "longest")
    stages = table("stage", *numbers, title=f"Pipeline at {cell(board.at)}", numbers=numbers)
    for line in board.stages:
        about, least = ("~ ", ">= ") if line.sampled else ("", "")
        stages.add_row(
            line.stage.value, f"{line.count:,}", about + duration(line.median), least + duration(line.longest)
        )
    stages.add_section()
    stages.add_row("all", f"{sum(line.count for line in board.stages):,}", "", "")
    return stages


def render_outbox(line: OutboxLine) -> Table:
    """What the outbox holds, as it is printed."""
    shown = table("messages", "count", title="Outbox", numbers=("count",))
    shown.add_row("to be sent", f"{line.pending:,}")
    shown.add_row("of them in flight", f"{line.in_flight:,}")
    shown.add_row("dead", f"{line.dead:,}")
    shown.add_section()
    shown.add_row("the next one waits for", duration(line.lag))
    return shown


def watch(console: Console, every: timedelta) -> None:
    """Show the board, again and again in the same place, until KeyboardInterrupt.

    Args:
        every: the time from one to the next.

    Raises:
        InvalidValue: it would never rest.
    """
    if every <= timedelta(0):
        raise InvalidValue("every", str(every), "it must be longer than nothing")
    with Live(render(pipeline()), console=console, auto_refresh=False, transient=False) as live:
        while True:
            time.sleep(every.total_seconds())
            live.update(render(pipeline()), refresh=True)


@command()
def board(
    context: typer.Context,
    every: Annotated[timedelta, in_seconds("How long each picture stands.", 2)] = timedelta(seconds=2),
    once: Annotated[bool, typer.Option("--once", help="Show it once; so it is where there is no terminal.")] = False,
) -> None:
    """Watch the pipeline: conversations and time in each stage, what waits for approval, the outbox. Ctrl-C ends it."""
    open_migrated(context)
    if once or not console().is_terminal:
        console().print(render(pipeline()))
        return
    with suppress(KeyboardInterrupt):
        watch(console(), every)
