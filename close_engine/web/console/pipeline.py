"""The pipeline, drawn: stages with counts and medians, who is waited for, and what happened on each day."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response

from close_engine import board
from close_engine.board import DayLine, StageLine
from close_engine.stages import Stage
from close_engine.web.console.page import Ask, endpoint
from close_engine.web.console.rendering import human, span

__all__ = ["ROUTES"]

#: The drawing's measures.
ROW, LEFT, WIDTH, RIGHT = 28, 150, 300, 170
DAY, TALL = 18, 44


@dataclass(frozen=True)
class Bar:
    """A stage as it is drawn.

    Attributes:
        stage, count: as on the board.
        y, width: where its bar begins and how long it is.
        times: what is said of the times in it.
    """

    stage: Stage
    count: int
    y: int
    width: float
    times: str


@dataclass(frozen=True)
class Column:
    """One day of one stage as it is drawn."""

    x: int
    height: float
    title: str


def pipeline(ask: Ask) -> Response:
    """Show it."""
    shown, (theirs, ours) = board.pipeline(), board.turns()
    lines, is_whole = board.days()
    return ask.show(
        "pipeline.html",
        board=shown,
        bars=_bars(shown.stages),
        size=(LEFT + WIDTH + RIGHT, ROW * len(shown.stages)),
        measures={"row": ROW, "left": LEFT, "day": DAY, "tall": TALL},
        sampled=any(line.sampled for line in shown.stages),
        total=sum(line.count for line in shown.stages),
        waits={
            "for us, because they wrote": theirs,
            "for the lead": ours,
            "for a human to approve": sum(line.waiting for line in shown.approvals),
            "for the human who took over": shown.taken_over,
        },
        days=lines,
        charts=[chart for chart in (_columns(stage, lines) for stage in Stage) if chart[1]],
        is_whole=is_whole,
    )


def _bars(lines: list[StageLine]) -> list[Bar]:
    most = max([line.count for line in lines] + [1])
    return [
        Bar(line.stage, line.count, place * ROW, round(WIDTH * line.count / most, 1), _times(line))
        for place, line in enumerate(lines)
    ]


def _times(line: StageLine) -> str:
    if line.median is None:
        return ""
    about, least = ("~", "≥ ") if line.sampled else ("", "")
    return f"median {about}{span(line.median)}, longest {least}{span(line.longest)}"


def _columns(stage: Stage, days: list[DayLine]) -> tuple[Stage, list[Column], int]:
    """Draw one stage over time; nothing if no conversation entered it."""
    counts = [line.entered.get(stage, 0) for line in days]
    if not any(counts):
        return stage, [], 0
    most = max(counts)
    columns = [
        Column(place * DAY, round(TALL * count / most, 1), f"{line.day:%d %b}: {count:,} entered {human(stage)}")
        for place, (line, count) in enumerate(zip(days, counts, strict=True))
    ]
    return stage, columns, sum(counts)


ROUTES = [endpoint("/pipeline", pipeline)]
