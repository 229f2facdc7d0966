"""The board: what it counts, what times it shows, and that it never shows an estimate as exact."""

from __future__ import annotations

import io
from dataclasses import replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from close_engine import ActionType, AutonomyLevel, InvalidValue, Stage, board, outbox, submit
from close_engine.board import ApprovalLine, OutboxLine, StageLine, pipeline
from close_engine.cli.board import render, watch

HOUR = timedelta(hours=1)


def line(stage: Stage) -> StageLine:
    (found,) = (line for line in pipeline().stages if line.stage is stage)
    return replace(found, median=to_minutes(found.median), longest=to_minutes(found.longest))


def to_minutes(time: timedelta | None) -> timedelta | None:
    """Round to minutes: even on a clock that stands still, each write is a millisecond after the last."""
    return time and timedelta(minutes=round(time / timedelta(minutes=1)))


def shown(width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(pipeline()))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_board_without_conversations_has_every_stage_and_nothing_in_it(database: Any) -> None:
    assert pipeline().stages == [StageLine(stage, 0) for stage in Stage]
    assert pipeline().approvals == []
    assert pipeline().outbox == OutboxLine(0, 0, 0, 0, None)
    assert "nothing" in shown()


def test_conversations_are_counted_by_stage_with_the_time_since_they_entered_it(
    conversation_in: Any, close_engine_clock: Any
) -> None:
    for _ in range(3):
        conversation_in(Stage.BUILDING)
        close_engine_clock.move(HOUR)
    conversation_in(Stage.EDIT_LOOP)
    close_engine_clock.move(5 * HOUR)

    assert line(Stage.BUILDING) == StageLine(Stage.BUILDING, 3, 7 * HOUR, 8 * HOUR)
    assert line(Stage.EDIT_LOOP) == StageLine(Stage.EDIT_LOOP, 1, 5 * HOUR, 5 * HOUR)
    assert sum(one.count for one in pipeline().stages) == 4


def test_the_time_in_a_stage_does_not_begin_anew_with_every_write(
    conversation_in: Any, close_engine_clock: Any
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    close_engine_clock.move(HOUR)
    conversation.record(questions=["budget"])
    close_engine_clock.move(HOUR)

    assert line(Stage.QUALIFYING).longest == 2 * HOUR


def test_stalled_conversations_have_their_time_too(conversation_in: Any, close_engine_clock: Any) -> None:
    for _ in range(3):
        conversation_in(Stage.STALLED)
        close_engine_clock.move(HOUR)

    assert line(Stage.STALLED) == StageLine(Stage.STALLED, 3, 2 * HOUR, 3 * HOUR)


@pytest.mark.parametrize("stage", [Stage.COMPLETED, Stage.CLOSED_LOST])
def test_what_has_ended_is_counted_and_has_no_time(stage: Stage, conversation_in: Any) -> None:
    conversation_in(stage)

    assert line(stage) == StageLine(stage, 1)


def test_what_was_sampled_is_labelled(
    conversation_in: Any, close_engine_clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(board, "EXACT", 10)
    monkeypatch.setattr(board, "SAMPLE", 20)
    for _ in range(60):
        conversation_in(Stage.QUALIFYING)
        close_engine_clock.move(HOUR)
    conversation_in(Stage.BUILDING)
    close_engine_clock.move(HOUR)

    many, few = line(Stage.QUALIFYING), line(Stage.BUILDING)

    assert (many.count, many.sampled) == (60, True)
    assert many.median is not None
    assert many.longest is not None
    assert HOUR < many.median < many.longest <= 61 * HOUR
    assert line(Stage.QUALIFYING) == many, "the same rows each time"
    assert few == StageLine(Stage.BUILDING, 1, HOUR, HOUR)
    (printed,) = (text for text in shown().splitlines() if text.startswith("QUALIFYING"))
    assert f"~ {many.median / HOUR:.1f} h" in printed
    assert ">= " in printed
    assert "~ approximate, >= at least: estimated from a sample" in shown()


def test_what_was_not_sampled_is_not_labelled(conversation_in: Any) -> None:
    conversation_in(Stage.QUALIFYING)

    assert "~" not in shown()
    assert ">=" not in shown()


def test_approvals_are_counted_by_type_with_the_age_of_the_oldest(
    conversation_in: Any, close_engine_clock: Any
) -> None:
    def wait_for(type: ActionType, **metadata: str) -> None:
        conversation = conversation_in(Stage.PREVIEW_SENT, AutonomyLevel.MANUAL)
        submit(conversation, type, "Hello", metadata=metadata, expires_after=6 * HOUR)
        close_engine_clock.move(HOUR)

    wait_for(ActionType.SEND_MESSAGE)
    close_engine_clock.move(3 * HOUR)
    wait_for(ActionType.SEND_MESSAGE)
    wait_for(ActionType.SEND_PAYMENT_LINK, paymentUrl="https://pay.example.com/1")

    assert pipeline().approvals == [
        ApprovalLine(ActionType.SEND_MESSAGE, 1, 2 * HOUR),  # the first has expired, unswept
        ApprovalLine(ActionType.SEND_PAYMENT_LINK, 1, HOUR),
    ]
    assert "SEND_PAYMENT_LINK" in shown()


def test_the_lag_of_the_outbox_is_that_of_the_next_message_that_can_be_claimed(
    conversation_in: Any, close_engine_clock: Any
) -> None:
    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    outbox.enqueue(first, "SEND_MESSAGE", "later", send_after=4 * HOUR)
    outbox.enqueue(first, "SEND_MESSAGE", "behind it")
    close_engine_clock.move(HOUR)
    assert board.outbox_line() == OutboxLine(2, 0, 0, 0, HOUR)
    outbox.claim()[0].sent()
    assert board.outbox_line() == OutboxLine(1, 0, 0, 0, None)

    outbox.enqueue(second, "SEND_MESSAGE", "now")
    close_engine_clock.move(HOUR)
    assert board.outbox_line() == OutboxLine(2, 0, 0, 0, HOUR)

    (claimed,) = outbox.claim(lease=HOUR)
    outbox.enqueue(second, "SEND_MESSAGE", "after that")
    assert board.outbox_line() == OutboxLine(3, 1, 0, 0, None)
    assert board.outbox_line(hanging_after=timedelta(0)).hanging == 1

    close_engine_clock.move(HOUR + timedelta(minutes=20))
    assert board.outbox_line() == OutboxLine(3, 0, 0, 0, timedelta(minutes=20)), "its lease has run out"

    (again,) = outbox.claim(lease=HOUR)
    assert again.id == claimed.id
    again.give_up("no such number")
    assert board.outbox_line() == OutboxLine(2, 0, 0, 1, HOUR + timedelta(minutes=20))


def test_a_live_board_is_drawn_again_and_again(conversation_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def next_moment(seconds: float) -> None:
        assert seconds == 7
        if sum(one.count for one in pipeline().stages) == 2:
            raise KeyboardInterrupt
        conversation_in(Stage.BUILDING)

    monkeypatch.setattr("close_engine.cli.board.time", SimpleNamespace(sleep=next_moment))  # and nobody else's
    console = Console(file=io.StringIO(), width=120, force_terminal=True)

    with pytest.raises(KeyboardInterrupt):
        watch(console, every=timedelta(seconds=7))

    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    counts = [words[1] for words in map(str.split, drawn.splitlines()) if words[:1] == ["BUILDING"]]
    assert list(dict.fromkeys(counts)) == ["0", "1", "2"]


def test_a_live_board_that_would_never_rest_is_refused(database: Any) -> None:
    with pytest.raises(InvalidValue, match="every cannot be '0:00:00': it must be greater than zero"):
        watch(Console(file=io.StringIO()), every=timedelta(0))
