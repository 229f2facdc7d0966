"""What is subscribed to an event goes into the outbox, once, whoever causes the event."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    Event,
    InvalidValue,
    MessageStatus,
    PendingAction,
    Stage,
    Subscription,
    expire_actions,
    outbox,
    release_leases,
    stall_silent,
    submit,
    subscribe,
    unsubscribe,
)
from close_engine.subscriptions import publish, subscriptions
from close_engine.testing import MovableClock, new_lead
from tests.command_line import refused, run
from tests.foreign import ForeignWriter
from tests.servers import execute, new_name
from tests.waiting import Running, until_they_wait
from tests.workers import LINK, claimed, messages, sql

ConversationIn = Callable[..., CloseEngineConversation]

MINUTE = timedelta(minutes=1)
WEEK = timedelta(days=7)


def waiting_link(conversation: CloseEngineConversation, **options: Any) -> PendingAction:
    """Submit a payment link that waits for a human."""
    action = submit(
        conversation,
        ActionType.SEND_PAYMENT_LINK,
        "Pay here",
        metadata={"paymentUrl": LINK},
        policy=lambda level, type: True,
        **options,
    )
    assert isinstance(action, PendingAction)
    return action


def iso(at: datetime | None) -> str:
    """A time as a payload has it."""
    assert at is not None
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def effects(topic: str) -> list[Any]:
    """What was put in under a topic: the payloads, oldest first."""
    return [message.payload for message in messages() if message.topic == topic]


# -- entering a stage --------------------------------------------------------------------------------------------------


def test_it_is_put_in_with_every_entry_of_its_stage_and_rolled_back_with_it(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    subscribe("build_site", stages=[Stage.BUILDING], payload={"theme": "dark", "logo": None}, send_after=MINUTE)
    subscribe("tell", stages=[Stage.BUILDING, Stage.STALLED])
    with close_engine.atomic() as transaction:
        conversation.start_building()
        assert len(messages()) == 2
        transaction.rollback()
    assert messages() == []

    change = conversation.start_building()
    stalled = conversation.stall()
    conversation.resume()
    assert sorted(message.topic for message in messages()) == ["build_site", "build_site", "tell", "tell", "tell"]
    first = messages(conversation)[0 if messages()[0].topic == "build_site" else 1]
    facts = {"change_id": change.id, "from": "QUALIFYING", "to": "BUILDING", "trigger": "start_building"}
    assert first.payload == {"theme": "dark", "logo": None, "event": "stage:entered", **facts}
    assert (first.body, first.status, first.available_at - first.created_at) == (None, MessageStatus.PENDING, MINUTE)
    assert effects("tell")[1] == {
        "event": "stage:entered",
        **{"change_id": stalled.id, "from": "BUILDING", "to": "STALLED", "trigger": "stall"},
    }


@pytest.mark.parametrize("writer", ["python", "foreign", "sweep", "approval"])
def test_whoever_enters_the_stage(
    writer: str, conversation_in: ConversationIn, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    subscribe("tell", stages=[Stage.STALLED, Stage.PREVIEW_SENT])
    conversation = conversation_in(Stage.EDIT_LOOP)
    before = len(effects("tell"))
    if writer == "python":
        conversation.stall()
    elif writer == "foreign":
        foreign.update(conversation.id, stage="STALLED")
    elif writer == "sweep":
        close_engine_clock.move(WEEK)
        assert stall_silent() == [conversation.id]
    else:
        action = waiting_link(conversation)
        foreign.run("UPDATE pending_actions SET status = 'REJECTED' WHERE id = %s", action.id)
    (payload,) = effects("tell")[before:]
    assert payload["change_id"] == conversation.history()[-1].id
    assert payload["to"] == conversation.history()[-1].dest


def test_opening_is_an_entry_and_adoption_is_none(database: peewee.Database, foreign: ForeignWriter) -> None:
    subscribe("greet", stages=[Stage.INITIATED, Stage.BUILDING])
    opened = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    inserted = foreign.insert("BUILDING")
    assert [(message.conversation_id, message.payload) for message in messages()] == [
        (found, {"event": "stage:entered", "change_id": change, "to": stage, "trigger": "open"})
        for found, stage, change in (
            (opened.id, "INITIATED", opened.history()[0].id),
            (inserted, "BUILDING", CloseEngineConversation.get_by_id(inserted).history()[0].id),
        )
    ]
    close_engine.schema.downgrade("0003_guard")
    foreign.insert("BUILDING")
    close_engine.migrate()
    assert messages() == []


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_f8_an_edge_that_the_library_or_its_command_walks_is_not_skipped(
    kind: str, database_url: str, conversation_in: ConversationIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hook runs in another process, and none ran at PENDING_APPROVAL → PREVIEW_SENT."""
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    rejected, expired, built = (
        conversation_in(stage) for stage in (Stage.EDIT_LOOP, Stage.EDIT_LOOP, Stage.QUALIFYING)
    )
    subscribe("look_again", stages=[Stage.PREVIEW_SENT])
    waiting_link(rejected).reject(by="dana")
    waiting_link(expired, expires_after=timedelta(0))
    expire_actions()
    looks = [message for message in messages() if message.topic == "look_again"]
    assert [message.conversation_id for message in looks] == [rejected.id, expired.id]
    assert {message.payload["from"] for message in looks} == {"PENDING_APPROVAL"}

    assert run("subscriptions", "add", "build_site", "--stage", "BUILDING", "--payload", '{"theme": "dark"}').code == 0
    assert run("fire", built.id, "start_building").code == 0
    (payload,) = effects("build_site")
    assert (payload["theme"], payload["to"]) == ("dark", "BUILDING")


def test_f8_also_from_another_connection_and_at_the_last_draft_that_is_deleted(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    conversation = conversation_in(Stage.EDIT_LOOP)
    action = waiting_link(conversation)
    subscribe("look_again", stages=[Stage.PREVIEW_SENT])
    foreign.run("DELETE FROM pending_actions WHERE id = %s", action.id)
    (payload,) = effects("look_again")
    assert payload["from"] == "PENDING_APPROVAL"


# -- other events ------------------------------------------------------------------------------------------------------


def test_what_happens_to_an_action(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    actions = [event for event in Event if event.startswith("action:")]
    subscribe("note", events=actions, payload={"channel": "phone"})
    made: dict[str, PendingAction] = {}
    for name in ("approved", "rejected", "expired", "by the sweep", "superseded", "deleted", "closed"):
        made[name] = waiting_link(conversation_in(Stage.PREVIEW_SENT))
    assert [payload["event"] for payload in effects("note")] == ["action:pending"] * 7
    assert effects("note")[0] == {
        **{"channel": "phone", "event": "action:pending"},
        **{"action_id": made["approved"].id, "type": "SEND_PAYMENT_LINK", "draft": "Pay here"},
        "expires_at": iso(made["approved"].expires_at),
    }

    made["approved"].approve(by="dana")
    made["approved"].approve(by="ana")
    made["rejected"].reject(by="dana", reason="too pushy")
    foreign.run("UPDATE pending_actions SET status = 'EXPIRED' WHERE id = %s", made["expired"].id)
    foreign.run("UPDATE pending_actions SET expires_at = '2026-01-01' WHERE id = %s", made["by the sweep"].id)
    assert expire_actions() == [made["by the sweep"].id]
    foreign.run(
        "UPDATE pending_actions SET status = 'EXPIRED', metadata = %s WHERE id = %s",
        *('{"supersededBy": 7}', made["superseded"].id),
    )
    foreign.run("DELETE FROM pending_actions WHERE id = %s", made["deleted"].id)
    CloseEngineConversation.get_by_id(made["closed"].conversation_id).close_lost("no budget", actor="ana")
    ended = [(payload["event"], payload["action_id"], payload.get("by")) for payload in effects("note")[7:]]
    assert ended == [
        ("action:approved", made["approved"].id, "dana"),
        ("action:rejected", made["rejected"].id, "dana"),
        ("action:expired", made["expired"].id, None),
        ("action:expired", made["by the sweep"].id, "sweep"),
        ("action:superseded", made["superseded"].id, None),
        ("action:rejected", made["deleted"].id, None),
        ("action:expired", made["closed"].id, None),
    ]


@pytest.mark.parametrize("how", ["given up", "claimed too often", "swept"])
def test_a_message_that_dies(how: str, conversation_in: ConversationIn, close_engine_clock: MovableClock) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    message = outbox.enqueue(conversation, "SEND_MESSAGE", "hello", max_attempts=1)
    subscribe("tell_owner", events=[Event.MESSAGE_DEAD])
    held = claimed()
    assert effects("tell_owner") == []
    if how == "given up":
        held.give_up("no such number")
    else:
        close_engine_clock.move(2 * MINUTE)
        assert release_leases() == [message.id] if how == "swept" else len(outbox.claim(topics=["SEND_MESSAGE"])) == 0
    error = "no such number" if how == "given up" else "the lease of w ran out"
    facts = {"event": "message:dead", "message_id": message.id, "topic": "SEND_MESSAGE", "error": error}
    assert effects("tell_owner") == [facts]

    outbox.requeue(message.id)
    (again,) = outbox.claim(topics=["SEND_MESSAGE"])
    again.give_up("no")
    assert [payload["error"] for payload in effects("tell_owner")] == [error, "no"]


def test_a_message_that_tells_of_a_death_and_dies_itself_tells_nobody(conversation_in: ConversationIn) -> None:
    """Each death would make another message that dies the same way, for ever."""
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "hello")
    subscribe("tell_owner", events=["message:dead"])
    claimed().give_up("no")
    claimed().give_up("the owner's number is wrong, too")
    assert len(messages()) == 2
    assert outbox.claim() == []


@pytest.mark.parametrize("event", Event)
def test_what_no_trigger_sees_is_published_once(event: Event, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    stages = [Stage.BUILDING] if event is Event.STAGE_ENTERED else []
    subscribe("note", stages=stages, events=[] if stages else [event], payload={"by": "default", "n": 1})
    for fact in ("1", "2", "1"):
        publish(event, conversation.id, fact, {"by": fact, "amount": 4900, "nothing": None})
    with close_engine.atomic() as transaction:
        publish(event, conversation.id, "3", {})
        transaction.rollback()
    said = {"event": str(event), "n": 1, "amount": 4900}
    assert effects("note") == ([] if stages else [{**said, "by": "1"}, {**said, "by": "2"}])


# -- declaring it ------------------------------------------------------------------------------------------------------


def test_it_is_listed_changed_and_ended(database: peewee.Database, conversation_in: ConversationIn) -> None:
    subscribe("b", stages=[Stage.BUILDING, Stage.BUILDING], events=["action:pending"], payload={"a": [1, {"b": None}]})
    subscribe("a", stages=["STALLED"], send_after=timedelta(seconds=1.0015))
    later, nothing = timedelta(seconds=1.001), timedelta(0)
    assert subscriptions() == [
        Subscription("a", "stage:entered", "STALLED", {}, later),
        Subscription("b", "action:pending", None, {"a": [1, {"b": None}]}, nothing),
        Subscription("b", "stage:entered", "BUILDING", {"a": [1, {"b": None}]}, nothing),
    ]
    subscribe("b", stages=["BUILDING"], payload={"a": 2})
    assert subscriptions()[2] == Subscription("b", "stage:entered", "BUILDING", {"a": 2}, nothing)

    conversation = conversation_in(Stage.BUILDING)
    assert [payload["a"] for payload in effects("b")] == [2]
    assert (unsubscribe("b"), unsubscribe("b"), unsubscribe("nobody")) == (2, 0, 0)
    conversation.stall()
    conversation.resume()
    assert (len(effects("b")), len(effects("a"))) == (1, 1)
    assert [each.topic for each in subscriptions()] == ["a"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"stages": ["BUILT"]}, "stages cannot be 'BUILT': it must be one of INITIATED, "),
        (
            {"events": ["lead:loved"]},
            "events cannot be 'lead:loved': it must be one of stage:entered, action:pending, ",
        ),
        ({"events": "lead:loved"}, "events cannot be 'lead:loved'"),
        ({"events": ["stage:entered"]}, "name the stages instead"),
        ({}, "name at least one stage or one event"),
        ({"stages": ["BUILDING"], "send_after": -MINUTE}, "it must be from 0 to 36500 days"),
        ({"stages": ["BUILDING"], "send_after": timedelta.max}, "it must be from 0 to 36500 days"),
        ({"stages": ["BUILDING"], "payload": {"a": object()}}, "payload"),
        (
            {"events": ["lead:wrote"], "debounce": timedelta(0)},
            "debounce .* it must be from a millisecond to 36500 days",
        ),
        (
            {"events": ["lead:wrote"], "debounce": MINUTE, "at_most": MINUTE / 2},
            "at_most .* from the debounce to 36500",
        ),
        ({"events": ["lead:wrote"], "at_most": MINUTE}, "at_most .* it bounds a debounce; give that, too"),
        ({"events": ["lead:wrote"], "debounce": MINUTE, "send_after": MINUTE}, "send_after .* give one of the two"),
        ({"events": ["action:pending"], "before": MINUTE}, "before .* it is for the event action:expiring"),
        ({"events": ["action:expiring"], "before": timedelta(0)}, "before .* from a millisecond to 36500 days"),
        ({"stages": ["BUILDING"], "topic": "SEND_MESSAGE"}, "texts to the lead are submitted"),
        ({"stages": ["BUILDING"], "topic": ActionType.SEND_PREVIEW}, "texts to the lead are submitted"),
        ({"stages": ["BUILDING"], "topic": " "}, "it must say what is to be done"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: dict[str, Any], sentence: str, database: peewee.Database, conversation_in: ConversationIn
) -> None:
    with pytest.raises(InvalidValue, match=sentence):
        subscribe(**{"topic": "build_site", **arguments})
    assert subscriptions() == []


def test_of_an_action_that_expires_soon_it_is_said_once(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    link = waiting_link(conversation, expires_after=timedelta(hours=3))
    waiting_link(conversation_in(Stage.PREVIEW_SENT), expires_after=None)
    close_engine_clock.move(timedelta(hours=2))
    close_engine.sweep()
    subscribe("ask_owner", events=["action:expiring"])
    close_engine_clock.move(-MINUTE)
    close_engine.sweep()
    assert effects("ask_owner") == []
    close_engine_clock.move(MINUTE)
    for _ in range(2):
        close_engine.sweep()
        (told,) = effects("ask_owner")
    assert (told["action_id"], told["type"], told["event"]) == (link.id, "SEND_PAYMENT_LINK", "action:expiring")
    PendingAction.update(expires_at=close_engine_clock.now + timedelta(hours=3)).execute()
    close_engine_clock.move(timedelta(hours=2))
    close_engine.sweep()
    assert len(effects("ask_owner")) == 2 + 1, "the time of both is another one now"


def test_without_a_subscription_nothing_is_put_in(conversation_in: ConversationIn) -> None:
    subscribe("tell", stages=[Stage.CLOSED_LOST], events=["lead:wrote"])
    conversation = conversation_in(Stage.PREVIEW_SENT)
    waiting_link(conversation).reject(by="dana")
    assert messages() == []


def test_two_who_subscribe_and_unsubscribe_at_once_leave_no_stage_unmarked(postgres: peewee.Database) -> None:
    """Whoever ends the last subscription that he sees must wait for one that is not committed yet."""
    subscribe("old", stages=[Stage.STALLED])
    with close_engine.atomic():
        subscribe("new", stages=[Stage.STALLED])
        ending = Running(lambda: unsubscribe("old"))
        until_they_wait([ending])
    assert ending.result() == 1
    close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY).stall()
    assert len(effects("new")) == 1


def test_a_downgrade_ends_them_and_what_was_subscribed_to_is_marked_again(
    database: peewee.Database, foreign: ForeignWriter
) -> None:
    subscribe("tell", stages=[Stage.STALLED])
    close_engine.schema.downgrade("0004_outbox")
    conversation = foreign.insert("BUILDING")
    foreign.update(conversation, stage="STALLED")
    close_engine.migrate()
    assert [each.topic for each in subscriptions()] == ["tell"]
    foreign.update(conversation, stage="BUILDING")
    foreign.update(conversation, stage="STALLED")
    assert len(effects("tell")) == 1
    assert close_engine.verify() == []


def test_what_is_gone_is_made_again(database: peewee.Database, foreign: ForeignWriter) -> None:
    """The files of the migrations write, too: what they write to must be there by then."""
    subscribe("tell", stages=[Stage.STALLED])
    conversation = foreign.insert("BUILDING")
    if foreign.is_postgres:
        foreign.run("DROP FUNCTION close_engine.publish; UPDATE close_engine.transitions SET subscribed = false")
    else:
        foreign.run("DROP VIEW close_engine_events")
        foreign.run("UPDATE close_engine_transitions SET subscribed = 0")
    assert any("is missing" in problem for problem in close_engine.verify())
    close_engine.migrate()
    assert close_engine.verify() == []
    assert foreign.stage(conversation) == "BUILDING"  # a connection of SQLite learns of a new schema when it reads
    foreign.update(conversation, stage="STALLED")
    assert len(effects("tell")) == 1


# -- roles -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def role(server: str) -> Iterator[str]:
    """A role that the foreign writer can take on, dropped after the databases in which it has rights."""
    name = new_name()
    execute(server, f"CREATE ROLE {name} NOLOGIN")
    yield name
    execute(server, f"DROP ROLE {name}")


def test_it_follows_what_a_role_without_rights_on_our_schema_does(role: str, foreign_postgres: ForeignWriter) -> None:
    subscribe("tell", stages=[Stage.STALLED, Stage.BUILDING], events=["action:pending"])
    foreign_postgres.run(f"GRANT SELECT, INSERT, UPDATE ON ALL TABLES IN SCHEMA public TO {role}")
    foreign_postgres.run(f"SET ROLE {role}")
    conversation = foreign_postgres.insert("BUILDING")
    foreign_postgres.update(conversation, stage="STALLED")
    foreign_postgres.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) "
        "VALUES ('a1', %s, 'l', 'SEND_MESSAGE', 'hello')",
        conversation,
    )
    with pytest.raises(psycopg2.errors.InsufficientPrivilege):
        foreign_postgres.run("DELETE FROM close_engine.subscriptions")
    assert [payload["event"] for payload in effects("tell")] == ["stage:entered", "stage:entered", "action:pending"]


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_the_commands_list_add_and_end_them(
    kind: str, database_url: str, database: peewee.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    assert run("subscriptions").out == "Nothing is subscribed to.\n"
    assert run("subscriptions", "add", "tell\x1b[2J", "--event", "message:dead", "--send-after", "90").code == 0
    assert run("subscriptions", "add", "build_site", "--stage", "BUILDING", "--stage", "STALLED").code == 0
    assert [line[:3] for line in run("subscriptions").lines[2:]] == [
        ["build_site", "stage:entered", "BUILDING"],
        ["build_site", "stage:entered", "STALLED"],
        ["tell\\x1b[2J", "message:dead", "-"],
    ]
    assert run("subscriptions", "remove", "build_site").out == "Subscriptions ended: 2.\n"
    assert "lead:loved" in refused("subscriptions", "add", "tell", "--event", "lead:loved")
    assert "it must be a JSON object" in refused(
        "subscriptions", "add", "tell", "--event", "lead:wrote", "--payload", "["
    )
    assert "name at least one stage or one event" in refused("subscriptions", "add", "tell")
    assert len(sql("SELECT topic FROM {subscriptions}")) == 1


def test_what_comes_in_and_who_leads_are_events(conversation_in: ConversationIn) -> None:
    subscribe("see", events=["lead:wrote", "payment:recorded", "payment:surplus", "action:superseded"])
    subscribe("lead", events=["conversation:taken_over", "conversation:handed_back"])
    conversation = conversation_in(Stage.PAYMENT_SENT)
    waits = submit(conversation, ActionType.SEND_MESSAGE, "Hello", policy=lambda level, type: True)
    close_engine.receive(conversation.lead_id, "SM1", "Paid!")
    close_engine.receive(conversation.lead_id, "SM1", "Paid!")
    conversation.take_over(by="dana", reason="they ask for a human")
    conversation.take_over(by="dana", until=MINUTE)
    conversation.hand_back(by="lee")
    conversation.hand_back(by="lee")
    close_engine.record_payment(conversation.lead_id, "pi_1", amount=1, currency="USD")
    close_engine.record_payment(conversation.lead_id, "pi_1")
    close_engine.record_payment(conversation.lead_id, "pi_2")
    text, first, second = (entry.id for entry in close_engine.InboxEntry.select().order_by(close_engine.InboxEntry.id))
    assert effects("see") == [
        {"event": "lead:wrote", "text_id": text, "key": "SM1", "text": "Paid!"},
        {
            **{"event": "action:superseded", "action_id": waits.id, "type": "SEND_MESSAGE", "by": "close_engine"},
            **{"draft": "Hello", "expires_at": iso(waits.expires_at)},
        },
        {"event": "payment:recorded", "payment_id": first, "key": "pi_1", "amount": 1, "currency": "USD"},
        {"event": "payment:surplus", "payment_id": second, "key": "pi_2"},
    ]
    assert effects("lead") == [
        {"event": "conversation:taken_over", "by": "dana", "reason": "they ask for a human"},
        {"event": "conversation:handed_back", "by": "lee"},
    ]
