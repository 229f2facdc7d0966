"""Who approves is told: that a draft waits, that it is about to expire, and what became of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import ActionType, CloseEngineConversation, PendingAction, Stage, submit, subscribe
from close_engine.testing import MovableClock
from tests.foreign import ForeignWriter
from tests.workers import messages, sql

ConversationIn = Callable[..., CloseEngineConversation]

HOUR = timedelta(hours=1)


def waiting(conversation: CloseEngineConversation, draft: str = "Hello!", **options: Any) -> PendingAction:
    """A reply that waits for a human."""
    ask = {"policy": lambda level, type: True, "actor": "ai-7", **options}
    action = submit(conversation, ActionType.SEND_MESSAGE, draft, **ask)
    assert isinstance(action, PendingAction)
    return action


def told(topic: str) -> list[dict[str, Any]]:
    return [message.payload for message in messages() if message.topic == topic]


@pytest.mark.parametrize("writer", ["library", "foreign"])
def test_of_each_draft_it_is_said_who_wrote_what_and_until_when(
    writer: str, conversation_in: ConversationIn, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    subscribe("tell", events=["action:pending", "action:rejected", "action:expired"])
    rejected, expired = (waiting(conversation_in(Stage.QUALIFYING), expires_after=2 * HOUR) for _ in range(2))
    expires_at = (close_engine_clock.now + 2 * HOUR).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    facts = {"type": "SEND_MESSAGE", "draft": "Hello!", "submitted_by": "ai-7", "expires_at": expires_at}
    assert told("tell") == [
        {"event": "action:pending", "action_id": action.id, **facts} for action in (rejected, expired)
    ]
    if writer == "library":
        rejected.reject("dana", "too pushy")
    else:
        said = {"submittedBy": "ai-7", "rejectionReason": "too pushy"}
        change = "UPDATE pending_actions SET status = 'REJECTED', approved_by = 'dana', metadata = %s WHERE id = %s"
        foreign.run(change, json.dumps(said), rejected.id)
    close_engine_clock.move(2 * HOUR)
    assert close_engine.expire_actions() == [expired.id]
    assert told("tell")[2:] == [
        {"event": "action:rejected", "action_id": rejected.id, **facts, "by": "dana", "reason": "too pushy"},
        {"event": "action:expired", "action_id": expired.id, **facts, "by": "sweep"},
    ]


def test_each_is_reminded_in_its_own_time_and_once(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    subscribe("early", events=["action:expiring"], before=6 * HOUR)
    subscribe("late", events=["action:expiring", "action:pending"], before=2 * HOUR)
    subscribe("default", events=["action:expiring"])
    subscribe("gathered", events=["action:expiring"], before=4 * HOUR, debounce=HOUR)
    action = waiting(conversation_in(Stage.QUALIFYING), expires_after=8 * HOUR)
    waiting(conversation_in(Stage.QUALIFYING), expires_after=None)
    counts = []
    for _ in range(9):
        for _ in range(2):
            close_engine.sweep()
        counts.append("".join(str(len(told(topic))) for topic in ("early", "gathered", "late", "default")))
        close_engine_clock.move(HOUR)
    # The late one is told of both drafts at once, when they are put in.
    assert counts == ["0020", "0020", "1020", "1020", "1120", "1120", "1130", "1131", "1131"]
    (reminder,) = told("early")
    assert {**reminder, "expires_at": None} == {
        **{"event": "action:expiring", "action_id": action.id, "type": "SEND_MESSAGE", "submitted_by": "ai-7"},
        **{"draft": "Hello!", "expires_at": None},
    }
    assert reminder["expires_at"] == told("late")[-1]["expires_at"]


def test_a_new_time_is_told_again_and_a_decision_not(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, foreign: ForeignWriter
) -> None:
    close_engine_clock.rule()
    subscribe("remind", events=["action:expiring"], before=2 * HOUR)
    action, approved = (waiting(conversation_in(Stage.QUALIFYING), expires_after=HOUR) for _ in range(2))
    approved.approve("dana")
    close_engine.sweep()
    assert [each["action_id"] for each in told("remind")] == [action.id]
    foreign.run("UPDATE pending_actions SET expires_at = created_at WHERE id = %s", approved.id)
    PendingAction.update(expires_at=close_engine_clock.now + 2 * HOUR).where(PendingAction.id == action.id).execute()
    close_engine.sweep()
    assert [each["action_id"] for each in told("remind")] == [action.id] * 2


def test_a_subscription_that_was_written_by_hand_is_told_an_hour_before(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    sql("INSERT INTO {subscriptions} (topic, event) VALUES ('remind', 'action:expiring')")
    waiting(conversation_in(Stage.QUALIFYING), expires_after=2 * HOUR)
    close_engine.sweep()
    assert told("remind") == []
    close_engine_clock.move(HOUR)
    close_engine.sweep()
    assert len(told("remind")) == 1


def test_one_of_which_nobody_can_be_told_hinders_no_other(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    subscribe("remind", events=["action:expiring"])
    bad, good = (waiting(conversation_in(Stage.QUALIFYING), expires_after=HOUR / 2) for _ in range(2))
    if foreign.is_postgres:  # somebody else's trigger
        foreign.run("""CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE 'not this one'; END $$""")
        foreign.run(f"""CREATE TRIGGER refuse BEFORE INSERT ON close_engine.outbox FOR EACH ROW
            WHEN (NEW.conversation_id = '{bad.conversation_id}') EXECUTE FUNCTION refuse()""")
    else:
        foreign.run("UPDATE pending_actions SET draft_message = CAST(X'ff' AS TEXT) WHERE id = %s", bad.id)
    swept = close_engine.sweep()
    assert [each["action_id"] for each in told("remind")] == [good.id]
    assert ("not this one" if foreign.is_postgres else "UTF-8") in swept.failed[bad.id]


@pytest.mark.parametrize("kind", ["sqlite-file"], indirect=True)
def test_metadata_that_is_no_json_hinders_no_event(
    kind: str, database: peewee.Database, conversation_in: ConversationIn
) -> None:
    subscribe("tell", events=["action:expired"])
    action = waiting(conversation_in(Stage.QUALIFYING), expires_after=timedelta(0))
    database.execute_sql("DROP TRIGGER close_engine_action_update_readable")
    database.execute_sql("UPDATE pending_actions SET metadata = '{'")
    close_engine.migrate()
    assert close_engine.expire_actions() == [action.id]
    assert [each["draft"] for each in told("tell")] == ["Hello!"]
