"""Every trigger on a real row, on every database: what it changes, and that a refusal changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    AutonomyLevel,
    CloseEngineConversation,
    ConditionNotMet,
    Stage,
    StageChange,
    TransitionNotAllowed,
    UnknownTrigger,
)
from close_engine.testing import MovableClock, bring_to
from tests.design import ACTIVE, GIVEN, NOW, PLUS_ONE, STAGES, TABLE, URL, triggers_from
from tests.foreign import Change, ForeignWriter

Factory = Callable[..., CloseEngineConversation]


def tick(clock: MovableClock) -> datetime:
    """Move the clock by a second, and return the time as the database stores it."""
    now = clock.move(timedelta(seconds=1))
    return now.replace(microsecond=now.microsecond // 1000 * 1000, tzinfo=None)


def assert_equals_its_row(conversation: CloseEngineConversation) -> None:
    assert conversation.__data__ == CloseEngineConversation.get_by_id(conversation.id).__data__
    assert conversation.dirty_fields == []


@pytest.mark.parametrize("trigger", TABLE)
def test_a_trigger_does_what_the_table_says_and_from_no_other_stage(
    trigger: str, conversation_in: Factory, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    for stage in STAGES:
        conversation = conversation_in(Stage[stage])
        if trigger == "complete":  # as if a link had been sent before, in every stage
            conversation.payment_link_sent_at = close_engine_clock()
            conversation.save()
        before, past = foreign.row(conversation.id), foreign.history(conversation.id)
        moment = tick(close_engine_clock)
        if stage in TABLE[trigger].sources:
            expected = fired(conversation, trigger, before, moment)
            reason = GIVEN.get(trigger, {}).get("reason")
            past = [*past, Change(trigger, stage, expected["stage"], None, reason)]
        else:
            expected = refused(conversation, trigger, before)
        assert (trigger, stage, foreign.row(conversation.id)) == (trigger, stage, expected)
        assert (trigger, stage, foreign.history(conversation.id)) == (trigger, stage, past)
        assert_equals_its_row(conversation)


def fired(
    conversation: CloseEngineConversation, trigger: str, before: dict[str, Any], moment: datetime
) -> dict[str, Any]:
    """Fire a trigger that the table allows, and return what the row must be then."""
    change = conversation.fire(trigger, **GIVEN.get(trigger, {}))
    assert change.__data__ == StageChange.get_by_id(change.id).__data__
    assert change.created_at.replace(tzinfo=None) == moment
    (dest,) = ["QUALIFYING"] if trigger == "resume" else TABLE[trigger].dests
    stamps = {
        column: {NOW: moment, PLUS_ONE: before["edit_rounds"] + 1}.get(what, what)
        for column, what in TABLE[trigger].stamps.items()
    }
    return {**before, **stamps, "stage": dest, "updated_at": moment}


def refused(conversation: CloseEngineConversation, trigger: str, before: dict[str, Any]) -> dict[str, Any]:
    """Fire a trigger that the table does not allow; the row must not change."""
    stage, allowed = before["stage"], triggers_from(before["stage"])
    with pytest.raises(TransitionNotAllowed) as refusal:
        conversation.fire(trigger, **GIVEN.get(trigger, {}))
    error = refusal.value
    assert (error.conversation_id, error.trigger, error.stage) == (conversation.id, trigger, stage)
    assert error.allowed == allowed
    instead = f"allowed: {', '.join(allowed)}" if allowed else f"{stage} is final"
    assert str(error) == (
        f"Conversation {conversation.id!r} is {stage}, and {trigger} is not allowed from there; {instead}."
    )
    return before


@pytest.mark.parametrize(
    ("stage", "level", "trigger", "given", "missing"),
    [
        (Stage.PREVIEW_SENT, "FULL_AUTO", "send_payment_link", {}, "a payment link URL must be given"),
        (Stage.EDIT_LOOP, "MANUAL", "send_payment_link", {"payment_link_url": URL}, "its autonomy level requires"),
        (
            Stage.PENDING_APPROVAL,
            "SEMI_AUTO",
            "send_payment_link",
            {"payment_link_url": URL},
            "its autonomy level requires",
        ),
        (Stage.PREVIEW_SENT, "FULL_AUTO", "complete", {}, "no payment link was sent"),
        (Stage.BUILDING, "FULL_AUTO", "close_lost", {}, "a reason must be given"),
        (Stage.BUILDING, "FULL_AUTO", "close_lost", {"reason": " "}, "a reason must be given"),
    ],
)
def test_a_condition_that_is_not_met_changes_nothing(
    conversation_in: Factory,
    foreign: ForeignWriter,
    stage: Stage,
    level: str,
    trigger: str,
    given: dict[str, Any],
    missing: str,
) -> None:
    conversation = conversation_in(stage, autonomy_level=AutonomyLevel(level))
    before, past = foreign.row(conversation.id), foreign.history(conversation.id)
    with pytest.raises(ConditionNotMet, match=missing) as refusal:
        conversation.fire(trigger, **given)
    assert (refusal.value.conversation_id, refusal.value.stage) == (conversation.id, stage)
    assert (foreign.row(conversation.id), foreign.history(conversation.id)) == (before, past)
    assert_equals_its_row(conversation)
    answer = conversation.may(trigger, **given)
    assert not answer
    assert answer.reason == str(refusal.value)


@pytest.mark.parametrize("level", ["SEMI_AUTO", "MANUAL"])
def test_an_approval_lets_the_payment_link_out_and_is_remembered(
    conversation_in: Factory, foreign: ForeignWriter, level: str
) -> None:
    conversation = conversation_in(Stage.PENDING_APPROVAL, autonomy_level=AutonomyLevel(level))
    assert conversation.may("send_payment_link", payment_link_url=URL, approved_by="Ann")
    conversation.send_payment_link(URL, approved_by="Ann", metadata={"round": 2})
    assert foreign.history(conversation.id)[-1].metadata == {"round": 2, "approved_by": "Ann"}
    assert foreign.stage(conversation.id) == "PAYMENT_SENT"


def test_a_stalled_conversation_resumes_where_it_stalled(conversation_in: Factory, foreign: ForeignWriter) -> None:
    for stage in ACTIVE:
        conversation = conversation_in(Stage.INITIATED)
        conversation.stall()  # it stalled once before, elsewhere
        conversation.resume()
        bring_to(conversation, Stage(stage))
        conversation.stall()
        assert conversation.stalled_at is not None

        change = conversation.resume()

        expected = "PREVIEW_SENT" if stage == "PENDING_APPROVAL" else stage  # nothing waits for approval
        assert (change.source, change.dest) == ("STALLED", expected)
        assert (conversation.stage, conversation.stalled_at) == (expected, None)  # type: ignore[comparison-overlap]
        assert foreign.history(conversation.id)[-1][:3] == ("resume", "STALLED", expected)
        assert_equals_its_row(conversation)


def test_a_conversation_of_which_nobody_knows_where_it_stalled_resumes_qualifying(foreign: ForeignWriter) -> None:
    conversation = CloseEngineConversation.get_by_id(foreign.insert("STALLED"))
    assert conversation.resume().dest is Stage.QUALIFYING
    assert foreign.stage(conversation.id) == "QUALIFYING"
    assert_equals_its_row(conversation)


def test_may_and_allowed_triggers_answer_what_firing_does(conversation_in: Factory) -> None:
    for stage in STAGES:
        conversation = conversation_in(Stage[stage])
        allowed = [trigger for trigger in TABLE if conversation.may(trigger, **GIVEN.get(trigger, {}))]
        linkless = [trigger for trigger in triggers_from(stage) if trigger != "complete"]
        assert (stage, allowed) == (stage, triggers_from(stage) if stage == "PAYMENT_SENT" else linkless)
        assert conversation.allowed_triggers() == allowed
        for trigger in set(TABLE) - set(allowed):
            with pytest.raises(close_engine.TransitionRefused) as refusal:
                conversation.fire(trigger, **GIVEN.get(trigger, {}))
            assert conversation.may(trigger, **GIVEN.get(trigger, {})).reason == str(refusal.value)
        assert [conversation.may(trigger, **GIVEN.get(trigger, {})).reason for trigger in allowed] == [""] * len(
            allowed
        )
        assert_equals_its_row(conversation)


def test_a_question_reads_and_writes_nothing(conversation_in: Factory, database: peewee.Database) -> None:
    conversation = conversation_in(Stage.BUILDING)
    statements: list[Any] = []
    database.query_hooks.append(statements.append)
    assert conversation.may("send_preview")
    assert conversation.allowed_triggers() == ["send_preview", "stall", "close_lost"]
    assert statements == []


def test_an_unknown_trigger_is_neither_fired_nor_answered(conversation_in: Factory, foreign: ForeignWriter) -> None:
    conversation = conversation_in(Stage.BUILDING)
    before = foreign.row(conversation.id)
    for ask in (conversation.fire, conversation.may):
        with pytest.raises(UnknownTrigger, match="There is no trigger 'publish'; the triggers are start_qualifying"):
            ask("publish")
    assert foreign.row(conversation.id) == before


def ids(query: peewee.ModelSelect[CloseEngineConversation]) -> list[str]:
    return sorted(conversation.id for conversation in query)


def test_conversations_are_found_by_the_stages_they_are_in_or_not(conversation_in: Factory) -> None:
    made = {stage: conversation_in(stage).id for stage in Stage}
    for stage in Stage:
        assert ids(CloseEngineConversation.in_stages(stage)) == [made[stage]]
    some = [Stage.STALLED, Stage.BUILDING]
    assert ids(CloseEngineConversation.in_stages(*some)) == sorted(made[stage] for stage in some)
    others = sorted(made[stage] for stage in Stage if stage not in some)
    assert ids(CloseEngineConversation.not_in_stages(*some)) == others
    assert ids(CloseEngineConversation.in_stages()) == []
    assert ids(CloseEngineConversation.not_in_stages()) == sorted(made.values())


def test_conversations_are_found_by_how_long_they_are_in_their_stage(
    conversation_in: Factory, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    building = CloseEngineConversation.in_stage_longer_than
    hour, moment = timedelta(hours=1), timedelta(seconds=1)
    old, returned, elsewhere = (conversation_in(Stage.BUILDING) for _ in range(3))
    assert ids(building(Stage.BUILDING, timedelta(0))) == []
    close_engine_clock.move(hour)
    assert ids(building(Stage.BUILDING, hour)) == []
    close_engine_clock.move(moment)
    returned.stall()
    returned.resume()
    elsewhere.send_preview()
    foreign.update(old.id, edit_rounds=3)  # a write within the stage does not change the stage
    assert ids(building(Stage.BUILDING, hour)) == [old.id]
    close_engine_clock.move(hour + moment)
    assert ids(building(Stage.BUILDING, hour)) == sorted([old.id, returned.id])
    assert ids(building(Stage.PREVIEW_SENT, hour)) == [elsewhere.id]
    assert ids(building(Stage.BUILDING, 3 * hour)) == []
