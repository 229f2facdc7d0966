"""The events of a burst make one effect, which carries each of them once, and of which none is lost."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import peewee
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    OutboxMessage,
    Stage,
    outbox,
    receive,
    submit,
    subscribe,
)
from close_engine.subscriptions import publish, subscriptions
from close_engine.testing import MovableClock, new_lead
from tests.command_line import run
from tests.foreign import ForeignWriter
from tests.waiting import Running
from tests.workers import messages, race, sql

ConversationIn = Callable[..., CloseEngineConversation]

SECOND = timedelta(seconds=1)


@pytest.fixture
def draft(database: peewee.Database) -> str:
    """A topic that drafts a reply to all that the lead writes within seconds."""
    subscribe("draft", events=["lead:wrote"], payload={"tone": "kind"}, debounce=8 * SECOND, at_most=20 * SECOND)
    return "draft"


def said(message: OutboxMessage) -> list[str]:
    """The texts, or other facts, that a message carries."""
    return [each.get("text") or each["n"] for each in message.payload["events"]]


def drafts() -> list[OutboxMessage]:
    return [message for message in messages() if message.topic == "draft"]


def test_texts_within_seconds_make_one_draft(
    draft: str, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for n, text in enumerate(("Hi", "one more thing", "how much is it?")):
        receive(conversation.lead_id, f"SM{n}", text)
        receive(conversation.lead_id, f"SM{n}", text)
        close_engine_clock.move(5 * SECOND)
        assert outbox.claim(topics=[draft]) == []
    (waiting,) = drafts()
    assert said(waiting) == ["Hi", "one more thing", "how much is it?"]
    # As without debounce, it begins with the facts of the first event.
    (first, *_) = waiting.payload["events"]
    assert waiting.payload == {"tone": "kind", **first, "events": waiting.payload["events"]}
    assert first == {"event": "lead:wrote", "text_id": first["text_id"], "key": "SM0", "text": "Hi"}

    close_engine_clock.move(3 * SECOND)
    (claimed,) = outbox.claim(topics=[draft])
    assert claimed.id == waiting.id


def test_it_is_moved_on_up_to_a_ceiling(
    draft: str, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for n in range(4):
        receive(conversation.lead_id, f"SM{n}", str(n))
        close_engine_clock.move(6 * SECOND)
    (waiting,) = drafts()
    assert waiting.available_at - waiting.created_at == 20 * SECOND
    assert waiting.debounced_until == waiting.available_at
    # What nobody has claimed yet goes on gathering: one draft is better than two.
    receive(conversation.lead_id, "SM4", "4")
    (claimed,) = outbox.claim(topics=[draft])
    assert said(claimed) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("outcome", ["in flight", "sent", "retry", "release", "snooze", "give_up", "withdraw"])
def test_what_was_claimed_is_complete_and_the_next_event_begins_another(
    outcome: str, draft: str, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "Hi")
    close_engine_clock.move(8 * SECOND)
    (claimed,) = outbox.claim(topics=[draft])
    arguments: dict[str, list[Any]] = {"retry": ["503"], "snooze": [SECOND], "give_up": ["no"], "withdraw": ["no"]}
    if outcome != "in flight":
        getattr(claimed, outcome)(*arguments.get(outcome, []))
    receive(conversation.lead_id, "SM2", "Hello?")
    assert [said(message) for message in drafts()] == [["Hi"], ["Hello?"]]


def test_each_event_is_carried_once_for_ever(
    draft: str, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for fact in ("1", "2", "2", "1"):
        publish(close_engine.Event.LEAD_WROTE, conversation.id, fact, {"n": fact})
    close_engine_clock.move(8 * SECOND)
    (claimed,) = outbox.claim(topics=[draft])
    claimed.sent()
    for fact in ("1", "2", "3", "3"):
        publish(close_engine.Event.LEAD_WROTE, conversation.id, fact, {"n": fact})
    assert [said(message) for message in drafts()] == [["1", "2"], ["3"]]
    # Nor is anything refused once the subscription has changed, in either direction.
    for debounce in (None, SECOND):
        subscribe("draft", events=["lead:wrote"], debounce=debounce)
        for fact in ("3", "4", "5"):
            publish(close_engine.Event.LEAD_WROTE, conversation.id, fact, {"n": fact})


def test_it_is_a_lane_s_own(draft: str, conversation_in: ConversationIn) -> None:
    """Other conversations, other topics, what was enqueued by hand: none of them is joined."""
    one, other = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    subscribe("log", events=["lead:wrote"], debounce=SECOND)
    subscribe("tell", events=["lead:wrote"])
    outbox.enqueue(one, draft, payload={"events": []}, send_after=SECOND)
    for n, conversation in enumerate((one, other, one)):
        receive(conversation.lead_id, f"SM{n}", str(n))
    carried = [(m.conversation_id, said(m)) for m in messages() if m.debounced_until and m.topic == draft]
    assert carried == [(one.id, ["0", "2"]), (other.id, ["1"])]
    assert [said(m) for m in messages() if m.topic == "log"] == [["0", "2"], ["1"]]
    assert len([m for m in messages() if m.topic == "tell"]) == 3


def test_different_events_of_a_topic_make_one_effect(draft: str, conversation_in: ConversationIn) -> None:
    subscribe("draft", stages=[Stage.STALLED, Stage.QUALIFYING], debounce=60 * SECOND)
    conversation = conversation_in(Stage.QUALIFYING)
    (begun,) = drafts()
    conversation.stall()
    receive(conversation.lead_id, "SM1", "Sorry, I was away")
    (waiting,) = drafts()
    assert [each["event"] for each in waiting.payload["events"]] == ["stage:entered"] * 2 + [
        "lead:wrote",
        "stage:entered",
    ]
    assert waiting.available_at >= begun.available_at, "a shorter debounce does not bring it forward"


def test_it_is_rolled_back_with_its_event(draft: str, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    with close_engine.atomic() as transaction:
        receive(conversation.lead_id, "SM1", "Hi")
        transaction.rollback()
    receive(conversation.lead_id, "SM1", "Hi")
    with close_engine.atomic() as transaction:
        receive(conversation.lead_id, "SM2", "Hello?")
        transaction.rollback()
    (waiting,) = drafts()
    assert said(waiting) == ["Hi"]
    receive(conversation.lead_id, "SM2", "Hello?")
    (waiting,) = drafts()
    assert said(waiting) == ["Hi", "Hello?"]


@pytest.mark.parametrize("payload", ["null", "[]", '{"events": 7}', "{}", None])
def test_a_waiting_effect_that_somebody_spoiled_stops_nobody(
    payload: str | None, draft: str, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "Hi")
    table = "close_engine.outbox" if foreign.is_postgres else "close_engine_outbox"
    foreign.run(f"UPDATE {table} SET payload = %s", payload)
    assert receive(conversation.lead_id, "SM2", "Hello?").answer
    assert said(drafts()[1]) == ["Hello?"]


def test_a_foreign_writer_s_events_are_gathered(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    subscribe("draft", stages=[Stage.STALLED, Stage.BUILDING], debounce=SECOND)
    conversation = conversation_in(Stage.BUILDING)
    for stage in ("STALLED", "BUILDING", "STALLED"):
        foreign.update(conversation.id, stage=stage)
    (waiting,) = drafts()
    assert [each["to"] for each in waiting.payload["events"]] == ["BUILDING", "STALLED", "BUILDING", "STALLED"]


def test_one_that_tells_of_deaths_and_dies_tells_nobody(conversation_in: ConversationIn) -> None:
    subscribe("tell", events=["message:dead"], debounce=SECOND / 1000)
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "hello")
    (text,) = outbox.claim(topics=["SEND_MESSAGE"])
    text.give_up("no")
    sql("UPDATE {outbox} SET available_at = created_at WHERE topic = 'tell'")
    (notice,) = outbox.claim(topics=["tell"])
    notice.give_up("no")
    assert len(messages()) == 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.one_of(st.integers(0, 5).map(str), st.timedeltas(SECOND, 12 * SECOND), st.none()), max_size=25)
)
def test_whatever_happens_when(
    steps: list[Any], draft: str, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    """The model: a fact joins what waits, or begins anew. A time passes, or (None) a worker sends all that is due."""
    close_engine_clock.rule()
    close_engine_clock.now = close_engine_clock.now.replace(microsecond=0)
    conversation = conversation_in(Stage.QUALIFYING)
    told: list[tuple[list[str], bool]] = []
    due, until, now = timedelta(0), timedelta(0), timedelta(0)
    for step in steps:
        if isinstance(step, timedelta):
            passed = timedelta(milliseconds=step // timedelta(milliseconds=1))
            close_engine_clock.move(passed)
            now += passed
        elif step is None:
            for message in outbox.claim(9, topics=[draft]):
                message.sent()
            if told and now >= due:
                told[-1] = (told[-1][0], True)
        else:
            publish(close_engine.Event.LEAD_WROTE, conversation.id, step, {"n": step})
            if step in [fact for facts, _ in told for fact in facts]:
                continue
            if not told or told[-1][1]:
                told.append(([], False))
                due, until = now, now + 20 * SECOND
            told[-1][0].append(step)
            due = min(until, max(due, now + 8 * SECOND))
    carried = messages(conversation)
    assert [(said(message), message.status == "SENT") for message in carried] == told
    if carried and not told[-1][1]:
        assert carried[-1].available_at - close_engine_clock.now == due - now
        carried[-1].withdraw("the next example must not send it")


def test_what_an_effect_has_carried_is_pruned_and_a_draft_that_waits_is_not_told_of_again(
    draft: str, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    year = timedelta(days=365)
    subscribe("remind", events=["action:expiring"], before=9 * year, debounce=SECOND)
    over, waits = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    for n, conversation in enumerate((over, waits)):
        receive(conversation.lead_id, f"SM{n}", "Hi")
    waits.reload()
    submit(waits, ActionType.SEND_MESSAGE, "Hello", policy=lambda level, type: True, expires_after=5 * year)
    close_engine.sweep()

    def carried() -> set[str]:
        return {row[0] for row in sql("SELECT conversation_id FROM {carried}")}

    def reminders() -> int:
        return len([message for message in messages() if message.topic == "remind"])

    for message in outbox.claim(9):
        message.sent()
    close_engine_clock.move(year)
    close_engine.prune(year)
    assert (carried(), reminders()) == ({over.id, waits.id}, 1)
    close_engine_clock.move(SECOND)
    close_engine.prune(year)
    close_engine.sweep()
    assert (carried(), reminders()) == ({waits.id}, 1)


def test_a_subscription_that_was_written_by_hand_waits_up_to_ten_times_as_long(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    sql("INSERT INTO {subscriptions} (topic, event, debounce) VALUES ('draft', 'lead:wrote', 8000)")
    conversation = conversation_in(Stage.QUALIFYING)
    for n in range(2):
        receive(conversation.lead_id, f"SM{n}", str(n))
        close_engine_clock.move(5 * SECOND)
    assert outbox.claim(topics=["draft"]) == []
    (waiting,) = drafts()
    assert said(waiting) == ["0", "1"]
    assert waiting.debounced_until is not None
    assert waiting.debounced_until - waiting.created_at == 80 * SECOND
    assert {(each.debounce, each.at_most) for each in subscriptions()} == {(8 * SECOND, 80 * SECOND)}


# -- at once -----------------------------------------------------------------------------------------------------------


def test_an_event_waits_for_no_claim_and_a_claim_that_is_taken_back_loses_nothing(
    postgres: peewee.Database, close_engine_clock: MovableClock
) -> None:
    """Whoever publishes holds locks. If it waited for the claim, the two could deadlock."""
    close_engine_clock.rule()
    subscribe("draft", events=["lead:wrote"], debounce=SECOND)
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    receive(conversation.lead_id, "SM1", "Hi")
    close_engine_clock.move(SECOND)
    with close_engine.atomic() as transaction:
        assert len(outbox.claim(topics=["draft"])) == 1
        answered = Running(lambda: receive(conversation.lead_id, "SM2", "Hello?"))
        assert answered.result().answer
        transaction.rollback()
    assert [said(message) for message in drafts()] == [["Hi"], ["Hello?"]]
    assert {message.claims for message in drafts()} == {0}
    # The next one joins the older of the two.
    receive(conversation.lead_id, "SM3", "Are you there?")
    assert [said(message) for message in drafts()] == [["Hi", "Are you there?"], ["Hello?"]]


def test_two_events_wait_for_each_other_no_more_than_without_debounce(postgres: peewee.Database) -> None:
    subscribe("draft", events=["lead:wrote", "action:expired"], debounce=SECOND)
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    publish(close_engine.Event.LEAD_WROTE, conversation.id, "1", {"n": "1"})
    with close_engine.atomic():
        publish(close_engine.Event.LEAD_WROTE, conversation.id, "2", {"n": "2"})
        beside = Running(lambda: publish(close_engine.Event.ACTION_EXPIRED, conversation.id, "3", {"n": "3"}))
        assert beside.result() is None
    assert [said(message) for message in drafts()] == [["1", "2"], ["3"]]


def test_of_events_and_claims_at_once_none_is_lost_and_none_comes_twice(postgres: peewee.Database) -> None:
    subscribe("draft", events=["lead:wrote"], debounce=SECOND / 1000)
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    count = 60

    def write(first: int) -> Callable[[], None]:
        def texts() -> None:
            for n in range(first, count, 2):
                receive(conversation.lead_id, f"SM{n}", str(n))

        return texts

    def claim() -> list[str]:
        taken: list[str] = []
        for _ in range(count):
            for message in outbox.claim(topics=["draft"]):
                taken += said(message)
                message.sent()
        return taken

    taken, *others = race([claim, write(0), write(1)])
    assert others == [None, None]
    left = [each for message in drafts() if message.status == "PENDING" for each in said(message)]
    assert sorted(taken + left, key=int) == [str(n) for n in range(count)]
    assert sorted((each for message in drafts() for each in said(message)), key=int) == [str(n) for n in range(count)]


# -- declaring it ------------------------------------------------------------------------------------------------------


def test_it_is_listed_and_ended(draft: str, conversation_in: ConversationIn) -> None:
    subscribe("log", events=["lead:wrote"], debounce=SECOND)
    listed = {each.topic: (each.debounce, each.at_most, each.before) for each in subscriptions()}
    assert listed == {"draft": (8 * SECOND, 20 * SECOND, None), "log": (SECOND, 10 * SECOND, None)}
    subscribe("draft", events=["lead:wrote"])
    conversation = conversation_in(Stage.QUALIFYING)
    for key in ("SM1", "SM2"):
        receive(conversation.lead_id, key, "Hi")
    assert [("events" in message.payload, message.debounced_until) for message in drafts()] == [(False, None)] * 2


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_the_command_says_it(
    kind: str, database_url: str, database: peewee.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    monkeypatch.setenv("COLUMNS", "200")
    options: list[Any] = ["--event", "lead:wrote", "--debounce", "8", "--at-most", "60"]
    assert run("subscriptions", "add", "draft", *options).code == 0
    reminder: list[Any] = ["--event", "action:expiring", "--before", "7200"]
    assert run("subscriptions", "add", "remind", *reminder, "--debounce", "5").code == 0
    out = run("subscriptions").out
    assert "after 8 s of quiet, at most 1 min" in out
    assert "2.0 h before, after 5 s of quiet, at most 50 s" in out
