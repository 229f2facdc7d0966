"""The transcript: every text in both directions, whoever sent it, whatever became of it; and what a model is told."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import peewee
import pytest
from hypothesis import given
from hypothesis import strategies as st
from playhouse.postgres_ext import Psycopg3Database

import close_engine
from close_engine import (
    ActionType,
    Author,
    AutonomyLevel,
    CloseEngineConversation,
    Direction,
    EntryPoint,
    Imported,
    InvalidValue,
    LeadNotFound,
    OutboxMessage,
    PastText,
    PendingAction,
    Stage,
    StageConflict,
    Text,
    TextEntry,
    TextKind,
    TextOfAnotherLead,
    TextStatus,
    Transcript,
    UnreadableRow,
    import_texts,
    outbox,
    receive,
    record_delivery,
    record_sent,
    submit,
    waiting_for_us,
)
from close_engine.database.binding import current, moment
from close_engine.testing import MovableClock, new_lead
from tests.foreign import ForeignWriter, spoil
from tests.rows import copy_of, left_by_an_error, triggers
from tests.waiting import Running, until_they_wait

ConversationIn = Callable[..., CloseEngineConversation]

PAST = datetime(2025, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def conversation(conversation_in: ConversationIn) -> CloseEngineConversation:
    return conversation_in(Stage.QUALIFYING)


def said(conversation: CloseEngineConversation) -> list[tuple[str, str, str]]:
    """Who wrote what, and what became of it."""
    return [(str(text.author), str(text.status), text.body) for text in conversation.messages()]


def sent(conversation: CloseEngineConversation, body: str, provider_id: str, **options: Any) -> OutboxMessage:
    outbox.enqueue(conversation, ActionType.SEND_MESSAGE, body, **options)
    (message,) = outbox.claim(worker="w")
    return message.sent(provider_id)


def past(lead: Any, key: str, text: str = "long ago", **other: Any) -> PastText:
    given: dict[str, Any] = {"direction": Direction.INBOUND, "at": PAST, **other}
    return PastText(lead, text=text, key=key, **given)


def ours(conversation: CloseEngineConversation) -> bool:
    """Whether it is our turn."""
    return conversation.id in {each.id for each in waiting_for_us()}


# -- what is in it -------------------------------------------------------------------------------------------------


def test_every_text_in_both_directions_in_the_order_of_time(
    database: peewee.Database, close_engine_clock: MovableClock
) -> None:
    lead = new_lead(autonomy_level=AutonomyLevel.SEMI_AUTO)
    minute = timedelta(minutes=1)
    import_texts([past(lead, "CRM1", "Do you do websites?"), past(lead, "CRM2", "We do!", direction="outbound")])
    receive(lead, "SM1", "Hello?", metadata={"media": 1})  # nobody has opened a conversation
    close_engine_clock.move(minute)
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY)
    submit(conversation, ActionType.SEND_MESSAGE, "Hi! What do you do?", actor="writer")
    outbox.claim()[0].sent("SM2")
    close_engine_clock.move(minute)
    receive(lead, "SM3", "We are a bakery.")
    close_engine_clock.move(minute)
    conversation.reload()
    conversation.start_building()
    submit(conversation, ActionType.SEND_MESSAGE, "One moment.", actor="writer").withdraw("no need")
    close_engine_clock.move(minute)
    submit(conversation, ActionType.SEND_PREVIEW, "Look!", metadata={"previewUrl": "https://p.example.com/1"})
    outbox.claim()[0].give_up("the number is unknown")
    close_engine_clock.move(minute)
    record_sent(lead, "SM4", "I called you.", author="dana", metadata={"screen": "CRM"})
    close_engine_clock.move(minute)
    outbox.enqueue(conversation, ActionType.SEND_PREVIEW, "Look again!", send_after=timedelta(hours=1))
    close_engine_clock.move(minute)
    conversation.reload()
    conversation.send_preview()
    waits = submit(
        conversation, ActionType.SEND_PAYMENT_LINK, "Pay!", metadata={"paymentUrl": "https://pay.example.com"}
    )
    assert isinstance(waits, PendingAction)

    found = conversation.messages()
    assert [(text.author, text.by, text.kind, text.status, text.body) for text in found] == [
        (Author.LEAD, None, TextKind.MESSAGE, TextStatus.RECEIVED, "Do you do websites?"),
        (Author.HUMAN, None, TextKind.MESSAGE, TextStatus.SENT, "We do!"),
        (Author.LEAD, None, TextKind.MESSAGE, TextStatus.RECEIVED, "Hello?"),
        (Author.AI, "writer", TextKind.MESSAGE, TextStatus.SENT, "Hi! What do you do?"),
        (Author.LEAD, None, TextKind.MESSAGE, TextStatus.RECEIVED, "We are a bakery."),
        (Author.AI, "writer", TextKind.MESSAGE, TextStatus.WITHDRAWN, "One moment."),
        (Author.AI, None, TextKind.PREVIEW, TextStatus.DEAD, "Look!"),
        (Author.HUMAN, "dana", TextKind.MESSAGE, TextStatus.SENT, "I called you."),
        (Author.AI, None, TextKind.PREVIEW, TextStatus.WAITING, "Look again!"),
        (Author.AI, None, TextKind.LINK, TextStatus.AWAITING_APPROVAL, "Pay!"),
    ]
    assert [text.direction for text in found] == [
        Direction.INBOUND if text.author is Author.LEAD else Direction.OUTBOUND for text in found
    ]
    times = [text.at for text in found]
    assert times == sorted(times, key=str)
    assert times[0] == PAST
    assert [text.provider_id for text in found] == ["CRM1", "CRM2", "SM1", "SM2", "SM3", None, None, "SM4", None, None]
    assert [found[place].reason for place in (5, 6, 8)] == ["no need", "the number is unknown", None]
    assert (found[2].payload, found[7].payload) == ({"media": 1}, {"screen": "CRM"})
    assert found[6].payload == {"previewUrl": "https://p.example.com/1"}
    assert (found[9].payload, found[9].action_id) == ({"paymentUrl": "https://pay.example.com"}, waits.id)
    assert found[6].message_id == OutboxMessage.get(OutboxMessage.body == "Look!").id
    assert found.unreadable == []


def test_it_is_one_query_however_many_there_are(
    conversation: CloseEngineConversation, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_texts(past(conversation.lead_id, f"CRM{number}") for number in range(300))
    statements: list[str] = []
    execute = peewee.Database.execute_sql

    def count(database: peewee.Database, sql: str, params: Any = None) -> Any:
        statements.append(sql)
        return execute(database, sql, params)

    monkeypatch.setattr(peewee.Database, "execute_sql", count)

    assert len(conversation.messages()) == 300
    assert len(statements) == 1


def test_keywords_belong_to_no_conversation_and_are_in_the_transcript(conversation: CloseEngineConversation) -> None:
    receive(conversation.lead_id, "SM1", "STOP")

    assert said(conversation) == [("lead", "received", "STOP")]


def test_another_leads_texts_are_not_in_it(
    conversation_in: ConversationIn, conversation: CloseEngineConversation
) -> None:
    other = conversation_in(Stage.QUALIFYING)
    for each in (conversation, other):
        sent(each, each.id, f"to {each.id}")
        receive(each.lead_id, f"of {each.id}", each.id)
        record_sent(each.lead_id, f"by dana to {each.id}", each.id)
        import_texts([past(each.lead_id, f"long ago {each.id}", each.id)])

    assert {text.body for text in other.messages()} == {other.id}
    assert len(other.messages()) == 4


def test_other_effects_and_payments_are_no_texts(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    outbox.enqueue(conversation, "build_site", "no text")
    close_engine.record_payment(conversation.lead_id, "pi_1")

    assert conversation.messages() == []


def test_of_the_same_moment_the_order_is_stable(conversation: CloseEngineConversation) -> None:
    import_texts(past(conversation.lead_id, key, key) for key in ("CRM2", "CRM1"))
    receive(conversation.lead_id, "SM2", "SM2")
    receive(conversation.lead_id, "SM1", "SM1")
    sent(conversation, "SM0", "SM0")
    record_sent(conversation.lead_id, "SM3", "SM3")
    outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "waits")

    for _ in range(3):
        assert [text.body for text in conversation.messages()] == ["CRM2", "CRM1", "SM2", "SM1", "SM3", "SM0", "waits"]


def test_a_message_that_became_an_action_is_there_once(conversation: CloseEngineConversation) -> None:
    outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "Hello?")
    close_engine.Lead.update(autonomy_level=AutonomyLevel.MANUAL).execute()
    outbox.claim()

    assert said(conversation) == [("AI", "awaiting approval", "Hello?")]
    (action,) = close_engine.pending_actions(conversation)
    action.approve(by="dana")
    outbox.claim()[0].sent("SM1")
    assert said(conversation) == [("AI", "sent", "Hello?")]


def test_a_draft_that_has_expired_does_not_wait(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    submit(conversation, ActionType.SEND_MESSAGE, "Hello?")
    close_engine_clock.move(timedelta(days=2))

    assert conversation.messages() == []


def test_psycopg_3_reads_the_same(postgres_url: str) -> None:
    database = close_engine.bind(Psycopg3Database(postgres_url))
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    assert import_texts([past(conversation.lead_id, "CRM1", metadata={"a": 1}), past("nobody", "CRM2")]).added == 1
    receive(conversation.lead_id, "SM1", "Hello?")
    record_sent(conversation.lead_id, "SM2", "Dana here.", author="dana", metadata={"b": [2]})
    outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "Hi!", payload={"c": 3})
    conversation.reload()
    submit(conversation, ActionType.SEND_MESSAGE, "Hm?", policy=lambda level, type: True, actor="writer")

    assert {(text.body, str(text.author), str(text.payload)) for text in conversation.messages()} == {
        ("long ago", "lead", "{'a': 1}"),
        ("Hello?", "lead", "None"),
        ("Dana here.", "human", "{'b': [2]}"),
        ("Hi!", "AI", "{'c': 3}"),
        ("Hm?", "AI", "{'submittedBy': 'writer'}"),
    }
    assert not ours(conversation)
    database.close()


def test_what_the_provider_says_of_a_text_is_in_it(conversation: CloseEngineConversation) -> None:
    record_delivery("delivered", provider_id="SM1")  # before the message is marked as sent
    for number in range(1, 5):
        sent(conversation, f"{number}", f"SM{number}")
    record_sent(conversation.lead_id, "SM5", "5")
    record_sent(conversation.lead_id, "SM6", "6")
    record_delivery("undelivered", provider_id="SM2", error="30003: unreachable")
    record_delivery("read", provider_id="SM3")
    record_delivery("queued", provider_id="SM4")
    record_delivery("failed", provider_id="SM5")

    found = conversation.messages()
    assert {text.body: (str(text.status), text.reason) for text in found} == {
        "1": ("delivered", None),
        "2": ("undelivered", "30003: unreachable"),
        "3": ("delivered", None),
        "4": ("sent", None),
        "5": ("undelivered", None),
        "6": ("sent", None),
    }
    (turn,) = found.as_prompt(opening=None)
    assert sorted(turn["content"].split()) == ["1", "3", "4", "6"]
    outbox.requeue(OutboxMessage.with_provider_id("SM2"))  # type: ignore[arg-type]
    assert [str(text.status) for text in conversation.messages() if text.body == "2"] == ["waiting"]


# -- whose it is ---------------------------------------------------------------------------------------------------


def test_what_whoever_took_over_submits_is_a_humans(conversation: CloseEngineConversation) -> None:
    conversation.take_over("ana")
    submit(conversation, ActionType.SEND_MESSAGE, "Ana here.", actor="ana")
    outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "Again.", submitted_by="ana")
    conversation.hand_back("ana")
    submit(conversation, ActionType.SEND_MESSAGE, "It is me.", actor="writer")

    assert [(text.author, text.by) for text in conversation.messages()] == [
        (Author.HUMAN, "ana"),
        (Author.HUMAN, "ana"),
        (Author.AI, "writer"),
    ]


def test_what_a_human_only_approved_is_the_ais(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Hello?", actor="writer")
    assert isinstance(action, PendingAction)
    action.approve(by="dana", message="Hello?")

    assert [(text.author, text.by) for text in conversation.messages()] == [(Author.AI, "writer")]


@pytest.mark.parametrize("writer", ["library", "screen"])
def test_whoever_changes_the_words_while_approving_is_their_author(
    conversation_in: ConversationIn, foreign: ForeignWriter, writer: str
) -> None:
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Buy!", actor="writer", metadata={"a": 1})
    assert isinstance(action, PendingAction)
    if writer == "library":
        action.approve(by="dana", message="Hello?")
    else:
        foreign.run(
            "UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana', draft_message = 'Hello?' "
            "WHERE id = %s",
            action.id,
        )

    (text,) = conversation.messages()
    assert (text.author, text.by, text.body) == (Author.HUMAN, "dana", "Hello?")
    assert text.payload == {"a": 1, "submittedBy": "writer", "editedBy": "dana"}


def test_a_screen_may_change_the_words_of_an_action_without_metadata(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) "
        "VALUES ('a', %s, 'l', 'SEND_MESSAGE', 'Buy!')",
        conversation.id,
    )
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', draft_message = 'Hello?' WHERE id = 'a'")

    (text,) = conversation.messages()
    assert (text.author, text.by, text.body) == (Author.HUMAN, None, "Hello?")


def test_the_author_of_a_recorded_text_is_who_is_named(conversation: CloseEngineConversation) -> None:
    lead = conversation.lead_id
    record_sent(lead, "SM1", "By the old bot.", author=Author.AI)
    record_sent(lead, "SM2", "By somebody.")
    record_sent(lead, "SM3", "By Dana.", author="dana")

    assert [(text.author, text.by) for text in conversation.messages()] == [
        (Author.AI, None),
        (Author.HUMAN, None),
        (Author.HUMAN, "dana"),
    ]


# -- texts that others sent ------------------------------------------------------------------------------------------


def test_a_text_that_somebody_else_sent_ends_our_turn_as_one_of_ours_does(
    conversation_in: ConversationIn, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    theirs, mine = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    close_engine_clock.rule()
    for each in (theirs, mine):
        receive(each.lead_id, f"SM {each.id}", "Hello?")
    assert (ours(theirs), ours(mine)) == (True, True)
    close_engine_clock.move(timedelta(minutes=5))

    assert record_sent(theirs.lead_id, "SM1", "Dana here.", author="dana") is True
    sent(mine, "Hi!", "SM2")

    assert (ours(theirs), ours(mine)) == (False, False)
    since = foreign.silent_since()
    assert (
        since[theirs.id]
        == since[mine.id]
        == close_engine_clock.now.replace(tzinfo=None, microsecond=close_engine_clock.now.microsecond // 1000 * 1000)
    )


def test_a_text_that_somebody_else_sent_brings_a_stalled_conversation_back(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.STALLED)
    close_engine_clock.move(timedelta(minutes=5))

    record_sent(conversation.lead_id, "SM1", "Still there?", author="dana")

    conversation.reload()
    assert conversation.stage is Stage.QUALIFYING
    (*_, change) = conversation.history()
    assert (change.trigger, change.actor, change.reason) == ("resume", "dana", "a text was sent")
    close_engine_clock.move(timedelta(hours=73))
    assert close_engine.stall_silent() != []


@pytest.mark.parametrize("writer", ["library", "screen"])
def test_a_first_text_that_somebody_else_sent_to_a_stalled_lead_means_qualifying(
    conversation_in: ConversationIn, foreign: ForeignWriter, writer: str
) -> None:
    conversation = conversation_in(Stage.INITIATED)
    receive(conversation.lead_id, "SM0", "Hello?")  # no text of ours
    conversation.reload()
    conversation.stall()
    if writer == "library":
        record_sent(conversation.lead_id, "SM1", "Still there?", author="dana")
    else:
        with close_engine.atomic():
            TextEntry.insert(
                lead_id=conversation.lead_id, key="SM1", direction="outbound", author="x", body="", at=moment()
            ).execute()
        foreign.update(conversation.id, stage="QUALIFYING")

    assert copy_of(conversation).stage is Stage.QUALIFYING
    assert (copy_of(conversation).history()[-1].trigger, close_engine.verify()) == ("resume", [])


def test_a_text_from_before_the_stall_does_not(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    before = close_engine_clock.now
    close_engine_clock.move(timedelta(minutes=5))
    conversation = conversation_in(Stage.STALLED)

    assert record_sent(conversation.lead_id, "SM1", "Still there?", at=before)
    assert copy_of(conversation).stage is Stage.STALLED


def test_a_text_that_is_older_than_the_leads_last_words_answers_nothing(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    receive(conversation.lead_id, "SM1", "Hello?")
    close_engine_clock.move(timedelta(minutes=1))
    between = close_engine_clock.now
    close_engine_clock.move(timedelta(minutes=1))
    receive(conversation.lead_id, "SM2", "Anybody?")
    version = copy_of(conversation).updated_at

    assert record_sent(conversation.lead_id, "SM3", "Hi!", at=between)
    assert ours(conversation)
    assert copy_of(conversation).updated_at == version
    assert [text.body for text in conversation.messages()] == ["Hello?", "Hi!", "Anybody?"]
    assert record_sent(conversation.lead_id, "SM4", "Here I am.")
    assert not ours(conversation)


def test_a_silence_does_not_begin_earlier_because_an_old_text_is_told_of(
    conversation: CloseEngineConversation, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    sent(conversation, "Hi!", "SM1")
    before = foreign.silent_since()[conversation.id]

    record_sent(conversation.lead_id, "SM2", "Yesterday's.", at=close_engine_clock.now - timedelta(days=1))

    assert foreign.silent_since()[conversation.id] == before


def test_the_same_text_again_changes_nothing(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    record_sent(conversation.lead_id, "SM1", "Dana here.")
    close_engine_clock.move(timedelta(minutes=1))
    receive(conversation.lead_id, "SM2", "Hello?")

    assert record_sent(conversation.lead_id, "SM1", "Dana here.") is False
    assert ours(conversation)
    assert TextEntry.select().count() == 1


def test_a_text_of_the_outbox_is_known(conversation: CloseEngineConversation) -> None:
    sent(conversation, "Hi!", "SM1")
    receive(conversation.lead_id, "SM2", "Hello?")

    assert record_sent(conversation.lead_id, "SM1", "Hi!") is False
    assert ours(conversation)
    assert said(conversation) == [("lead", "received", "Hello?"), ("AI", "sent", "Hi!")]


def test_a_text_that_is_told_of_before_the_outbox_knows_its_id_is_there_once(
    conversation: CloseEngineConversation,
) -> None:
    outbox.enqueue(conversation, ActionType.SEND_MESSAGE, "Hi!")
    (message,) = outbox.claim()

    assert record_sent(conversation.lead_id, "SM1", "Hi!")
    message.sent("SM1")
    assert said(conversation) == [("AI", "sent", "Hi!")]


@pytest.mark.parametrize("first", ["recorded", "sent", "received"])
def test_one_id_for_two_leads_is_an_error(
    conversation_in: ConversationIn, conversation: CloseEngineConversation, first: str
) -> None:
    other = conversation_in(Stage.QUALIFYING)
    if first == "recorded":
        record_sent(other.lead_id, "SM1", "Hi!")
    elif first == "sent":
        sent(other, "Hi!", "SM1")
    else:
        receive(other.lead_id, "SM1", "Hi!")
    receive(conversation.lead_id, "SM2", "Hello?")

    with pytest.raises(TextOfAnotherLead) as caught:
        record_sent(conversation.lead_id, "SM1", "Hi!")
    assert (caught.value.lead_id, caught.value.first) == (conversation.lead_id, other.lead_id)
    assert ours(conversation)
    assert [text.body for text in conversation.messages()] == ["Hello?"]


def test_a_lead_needs_no_conversation(database: peewee.Database) -> None:
    lead = new_lead()

    assert record_sent(lead, "SM1", "Hi!")
    conversation = close_engine.open_conversation(lead, EntryPoint.REP_CLOSE)
    assert said(conversation) == [("human", "sent", "Hi!")]
    with pytest.raises(LeadNotFound):
        record_sent("nobody", "SM2", "Hi!")


@pytest.mark.parametrize("stage", [Stage.COMPLETED, Stage.CLOSED_LOST])
def test_what_was_sent_to_a_closed_conversation_is_recorded_and_changes_nothing_else(
    conversation_in: ConversationIn, stage: Stage
) -> None:
    conversation = conversation_in(stage)
    version = copy_of(conversation).updated_at

    assert record_sent(conversation.lead_id, "SM1", "Thanks!")
    assert (copy_of(conversation).stage, copy_of(conversation).updated_at) == (stage, version)
    assert len(conversation.messages()) == 1


def test_a_draft_that_was_written_before_it_is_a_conflict(conversation: CloseEngineConversation) -> None:
    record_sent(conversation.lead_id, "SM1", "Dana here.")

    with pytest.raises(StageConflict):
        submit(conversation, ActionType.SEND_MESSAGE, "Hello?")


def test_no_text_was_sent_later_than_now(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    record_sent(conversation.lead_id, "SM1", "Hi!", at=close_engine_clock.now + timedelta(hours=1))

    (text,) = conversation.messages()
    assert text.at is not None
    assert text.at <= close_engine_clock.now


def test_what_is_rolled_back_was_not_recorded(conversation: CloseEngineConversation) -> None:
    receive(conversation.lead_id, "SM1", "Hello?")
    with left_by_an_error(close_engine.atomic()):
        assert record_sent(conversation.lead_id, "SM2", "Hi!")

    assert ours(conversation)
    assert said(conversation) == [("lead", "received", "Hello?")]
    assert record_sent(conversation.lead_id, "SM2", "Hi!")


def test_a_text_to_a_lead_whose_conversation_cannot_be_read_is_recorded(
    conversation: CloseEngineConversation, foreign: ForeignWriter
) -> None:
    receive(conversation.lead_id, "SM1", "Hello?")
    spoil(foreign, "close_engine_conversations", "entry_point", "WEB_FORM", conversation.id)

    with pytest.raises(UnreadableRow):
        record_sent(conversation.lead_id, "SM2", "Hi!")
    assert not foreign.deadlines("answer")
    assert [text.body for text in conversation.messages()] == ["Hello?", "Hi!"]
    with pytest.raises(UnreadableRow):
        record_sent(conversation.lead_id, "SM2", "Hi!")
    assert len(conversation.messages()) == 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"key": " "}, "key cannot be ' ': give the provider's id of the text"),
        ({"key": None}, "give the provider's id of the text, or the id that your own table has"),
        ({"key": 7}, "key cannot be 7: it must be text"),
        ({"key": "close_engine:1"}, "are this library's own"),
        ({"text": "\x00"}, "PostgreSQL cannot hold a NUL character"),
        ({"text": None}, "text cannot be None: it must be text"),
        ({"author": ""}, "it must say who wrote the text"),
        ({"author": Author.LEAD}, "the lead writes what is inbound, and nothing else"),
        ({"at": datetime(2026, 1, 1)}, "it must be a time with a timezone, such as 2026-01-31T08:00:00Z"),
        ({"metadata": [1]}, "it must be a mapping"),
        ({"lead": ""}, "it must be a lead or its id"),
    ],
)
def test_what_cannot_be_stored_is_a_sentence(
    conversation: CloseEngineConversation, wrong: dict[str, Any], sentence: str
) -> None:
    given = {"lead": conversation.lead_id, "key": "SM1", "text": "Hi!", **wrong}

    with pytest.raises(InvalidValue) as caught:
        record_sent(**given)
    assert sentence in str(caught.value)
    assert conversation.messages() == []


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_two_who_record_the_same_text_at_once_add_it_once(conversation: CloseEngineConversation, kind: str) -> None:
    start, outcomes = threading.Barrier(4), []

    def record(lead_id: str) -> None:
        start.wait()
        outcomes.append(record_sent(lead_id, "SM1", "Hi!"))
        current().database.close()

    threads = [threading.Thread(target=record, args=(conversation.lead_id,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sorted(outcomes) == [False, False, False, True]
    assert len(conversation.messages()) == 1


# -- the past ------------------------------------------------------------------------------------------------------


def test_the_past_is_taken_over_once(conversation: CloseEngineConversation) -> None:
    rows = [past(conversation.lead_id, f"CRM{number}", f"text {number}") for number in range(7)]

    assert import_texts(iter(rows), batch=3) == Imported(added=7)
    assert import_texts([*rows, past(conversation.lead_id, "CRM7", "text 7")], batch=3) == Imported(added=1, known=7)
    assert [text.body for text in conversation.messages()] == [f"text {number}" for number in range(8)]


def test_what_was_received_or_sent_is_known(conversation: CloseEngineConversation) -> None:
    receive(conversation.lead_id, "SM1", "Hello?")
    sent(conversation, "Hi!", "SM2")
    record_sent(conversation.lead_id, "SM3", "Dana here.")

    done = import_texts(
        [
            past(conversation.lead_id, "SM1", "Hello?"),
            past(conversation.lead_id, "SM2", "Hi!", direction="outbound"),
            past(conversation.lead_id, "SM3", "Dana here.", direction="outbound"),
        ]
    )

    assert done == Imported(known=3)
    assert len(conversation.messages()) == 3


def test_a_text_that_is_received_after_it_was_taken_over_is_there_once(conversation: CloseEngineConversation) -> None:
    import_texts([past(conversation.lead_id, "SM1", "Hello?")])
    receive(conversation.lead_id, "SM1", "Hello?")

    assert ours(conversation)
    assert len(conversation.messages()) == 1


def test_the_past_supersedes_nothing_and_changes_nobodys_turn(conversation: CloseEngineConversation) -> None:
    message = submit(conversation, ActionType.SEND_MESSAGE, "Hi!")
    assert isinstance(message, OutboxMessage)
    version = copy_of(conversation).updated_at
    receives = [past(conversation.lead_id, "CRM1", at=datetime.now(timezone.utc) + timedelta(hours=1))]
    assert import_texts(receives).added == 1

    assert not ours(conversation)
    assert copy_of(conversation).updated_at == version
    (claimed,) = outbox.claim()
    assert claimed.sent("SM1").status is close_engine.MessageStatus.SENT
    receive(conversation.lead_id, "SM2", "Hello?")
    assert import_texts([past(conversation.lead_id, "CRM2", direction="outbound")]).added == 1
    assert ours(conversation)


def test_one_bad_row_holds_up_nobody(conversation_in: ConversationIn, conversation: CloseEngineConversation) -> None:
    lead, other = conversation.lead_id, conversation_in(Stage.QUALIFYING).lead_id
    receive(other, "SM1", "Hello?")
    good = past(lead, "CRM1")
    rows: list[Any] = [
        past(lead, "CRM2", text="\x00"),
        past("nobody", "CRM3"),
        past(lead, "SM1"),
        past(lead, "CRM4", direction="sideways"),
        past(lead, "CRM5", at="yesterday"),
        past(lead, "CRM6", author="dana"),
        past(lead, ""),
        {"lead": lead, "direction": "inbound", "text": "hi", "key": "CRM7"},
        {**vars(good), "sid": "CRM8"},
        "no row",
        None,
        good,
        good,
        past(other, "CRM1"),
    ]

    done = import_texts(rows)

    assert (done.added, done.known) == (1, 1)
    assert done.refused == {
        1: r"text cannot be '\x00': PostgreSQL cannot hold a NUL character.",
        2: str(LeadNotFound("nobody")),
        3: str(TextOfAnotherLead("SM1", lead, other)),
        4: "direction cannot be 'sideways': it must be one of inbound, outbound.",
        5: "at cannot be 'yesterday': it must be a time with a timezone, such as 2026-01-31T08:00:00Z.",
        6: "author cannot be 'dana': the lead writes what is inbound, and nothing else.",
        7: "key cannot be '': give the provider's id of the text, or the id that your own table has.",
        8: done.refused[8],
        9: "row cannot be 'sid': the names are lead, direction, text, key, at, author, metadata.",
        10: "row cannot be 'no row': it must be a PastText, or a mapping such as a JSON object, with "
        "lead, direction, text, key, at, author, metadata.",
        11: "row cannot be None: it must be a PastText, or a mapping such as a JSON object, with "
        "lead, direction, text, key, at, author, metadata.",
        14: str(TextOfAnotherLead("CRM1", other, lead)),
    }
    assert done.refused[8].endswith("it has no at.")


def test_what_only_the_database_refuses_holds_up_nobody(
    conversation: CloseEngineConversation, foreign: ForeignWriter
) -> None:
    unique = "CREATE UNIQUE INDEX said_once ON close_engine.texts (body)"
    foreign.run(unique if foreign.is_postgres else unique.replace("close_engine.texts", "close_engine_texts"))
    rows = [
        past(conversation.lead_id, f"CRM{number}", "hi" if number in (1, 3) else str(number)) for number in range(5)
    ]

    done = import_texts(rows)

    assert (done.added, done.known, list(done.refused)) == (4, 0, [4])
    assert "The database cannot hold this text: " in done.refused[4]


@dataclass
class Row:
    """A row of the CRM's own table, with more columns than are needed."""

    id: int
    lead: str
    direction: str
    text: str
    key: str
    at: str


def test_rows_may_be_mappings_or_dataclasses_of_ones_own(conversation: CloseEngineConversation) -> None:
    lead = conversation.lead_id
    mapping = {"lead": conversation.lead, "direction": "OUTBOUND", "text": "Hi!", "key": "CRM1", "author": "ai"}

    done = import_texts(
        [
            {**mapping, "at": "2025-01-01T09:00:00+01:00"},
            Row(7, lead, "inbound", "Hello?", "CRM2", "2025-01-01T07:00:00Z"),
        ]
    )

    assert done == Imported(added=2)
    assert [(text.at, text.author, text.body) for text in conversation.messages()] == [
        (PAST + timedelta(hours=7), Author.LEAD, "Hello?"),
        (PAST + timedelta(hours=8), Author.AI, "Hi!"),
    ]


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_two_imports_at_once_add_each_text_once(conversation: CloseEngineConversation, kind: str) -> None:
    rows = [past(conversation.lead_id, f"CRM{number:03}", str(number)) for number in range(120)]
    start, outcomes = threading.Barrier(3), []

    def take_over() -> None:
        start.wait()
        outcomes.append(import_texts(rows, batch=20))
        current().database.close()

    threads = [threading.Thread(target=take_over) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert sum(done.added for done in outcomes) == 120
    assert [done.added + done.known for done in outcomes] == [120] * 3
    assert [text.body for text in conversation.messages()] == [str(number) for number in range(120)]


def test_what_was_stored_before_the_source_failed_stays(conversation: CloseEngineConversation) -> None:
    def rows() -> Iterator[PastText]:
        yield past(conversation.lead_id, "CRM1")
        yield past(conversation.lead_id, "CRM2")
        raise OSError("the file ends here")

    with pytest.raises(OSError, match="the file ends here"):
        import_texts(rows(), batch=1)
    assert len(conversation.messages()) == 2
    for wrong in (0, 1001):
        with pytest.raises(InvalidValue, match="it must be from 1 to 1000"):
            import_texts([], batch=wrong)


def test_the_largest_batch_can_be_stored(conversation: CloseEngineConversation) -> None:
    rows = [past(conversation.lead_id, f"CRM{number}", author="lead", metadata={}) for number in range(1000)]

    assert import_texts(rows, batch=1000) == Imported(added=1000)


@pytest.mark.parametrize("fraction", ["", ".5", ".12", ".123", ".1234567"])
def test_a_time_may_have_as_many_digits_as_there_are(conversation: CloseEngineConversation, fraction: str) -> None:
    assert import_texts([past(conversation.lead_id, "CRM1", at=f"2025-01-01T09:00:00{fraction}Z")]) == Imported(added=1)

    (text,) = conversation.messages()
    assert text.at is not None
    assert text.at.microsecond == int(f"{fraction[1:4]:0<3}") * 1000


def test_what_is_refused_is_in_the_order_of_the_rows(conversation: CloseEngineConversation) -> None:
    rows = [past("nobody", "CRM1"), past(conversation.lead_id, "CRM2", direction="up"), past("nobody", "CRM0")]

    assert list(import_texts(rows).refused) == [1, 2, 3]


@pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
def test_two_imports_of_the_same_texts_in_another_order_wait_one_way(
    conversation: CloseEngineConversation, foreign: ForeignWriter, kind: str
) -> None:
    lead = conversation.lead_id
    foreign.run("BEGIN")
    foreign.run(
        "INSERT INTO close_engine.texts (lead_id, key, direction, author, body, at) "
        "VALUES (%s, 'CRM0', 'inbound', 'lead', 'hi', localtimestamp)",
        lead,
    )
    holder = foreign.connection.get_backend_pid()
    first = Running(lambda: import_texts([past(lead, "CRM1"), past(lead, "CRM0"), past(lead, "CRM2")]))
    until_they_wait([first], holder)
    second = Running(lambda: import_texts([past(lead, "CRM2"), past(lead, "CRM1")]))
    until_they_wait([first, second], holder)
    foreign.run("COMMIT")

    assert (first.result(), second.result()) == (Imported(added=2, known=1), Imported(known=2))


# -- leads that are gone -------------------------------------------------------------------------------------------


def test_after_a_merge_the_texts_of_the_lead_that_is_gone_are_in_it(
    conversation: CloseEngineConversation, foreign: ForeignWriter
) -> None:
    gone, kept = conversation.lead_id, foreign.lead()
    import_texts([past(gone, "CRM1", "of the one"), past(kept, "CRM2", "of the other")])
    receive(gone, "SM1", "Hello?")
    foreign.run("UPDATE close_engine_conversations SET lead_id = %s WHERE id = %s", kept, conversation.id)
    assert "of the one" not in [text.body for text in conversation.messages()]  # that lead still is there
    foreign.run("DELETE FROM leads WHERE id = %s", gone)

    assert [text.body for text in conversation.messages()] == ["of the one", "of the other", "Hello?"]
    assert import_texts([past(kept, "CRM1")]) == Imported(known=1)
    assert record_sent(kept, "CRM1", "again") is False


def test_the_texts_of_a_deleted_lead_are_nobody_elses(
    conversation: CloseEngineConversation, foreign: ForeignWriter
) -> None:
    lead = conversation.lead_id
    record_sent(lead, "SM1", "Hi!")
    foreign.run("DELETE FROM leads WHERE id = %s", lead)

    assert [text.body for text in conversation.messages()] == ["Hi!"]
    with pytest.raises(TextOfAnotherLead):
        record_sent(new_lead(), "SM1", "Hi!")
    with pytest.raises(LeadNotFound):
        record_sent(lead, "SM2", "Hi!")


def test_what_is_old_is_pruned_and_what_is_said_forgotten(
    conversation: CloseEngineConversation, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    gone, kept = conversation.lead_id, foreign.lead()
    import_texts([past(gone, "CRM1", "old"), past(kept, "CRM2", "old", metadata={"a": 1})])
    record_sent(gone, "SM1", "new", author="dana")
    foreign.run("UPDATE close_engine_conversations SET lead_id = %s WHERE id = %s", kept, conversation.id)
    foreign.run("DELETE FROM leads WHERE id = %s", gone)

    close_engine_clock.rule()
    assert close_engine.prune(timedelta(days=30)).recorded == 2
    assert close_engine.prune(timedelta(days=30)).recorded == 0
    assert [text.body for text in conversation.messages()] == ["", "", "new"]
    assert close_engine.forget(kept).recorded == 1
    assert close_engine.forget(kept).recorded == 0
    assert {(text.body, text.payload) for text in conversation.messages()} == {("", None)}
    assert conversation.messages().as_prompt() == []
    assert import_texts([past(kept, "CRM2", "old"), past(kept, "CRM1", "old")]) == Imported(known=2)


def test_a_lead_of_whom_only_texts_are_left_can_be_forgotten(
    conversation: CloseEngineConversation, foreign: ForeignWriter
) -> None:
    lead = foreign.lead()
    record_sent(lead, "SM1", "Hi!")
    foreign.run("DELETE FROM leads WHERE id = %s", lead)

    assert close_engine.forget(lead).recorded == 1
    assert TextEntry.get().body == ""


# -- rows that cannot be read ----------------------------------------------------------------------------------------

DEEP = "[" * 11000 + "]" * 11000


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("texts", "at", "0001-01-01 00:00:00 BC"),
        ("texts", "metadata", DEEP),
        ("inbox", "received_at", "infinity"),
        ("inbox", "metadata", '{"n": 1' + "0" * 5000 + "}"),
        ("outbox", "payload", DEEP),
        ("texts", "direction", "sideways"),
        ("outbox", "status", "LOST"),
    ],
)
def test_one_bad_row_does_not_fail_the_list(
    conversation: CloseEngineConversation, foreign: ForeignWriter, table: str, column: str, value: str
) -> None:
    record_sent(conversation.lead_id, "SM1", "texts")
    receive(conversation.lead_id, "SM2", "inbox")
    sent(conversation, "outbox", "SM3")
    spoil(foreign, f"close_engine.{table}", column, value, 1)

    found = conversation.messages()

    is_strange = column in ("direction", "status")
    assert {text.body for text in found} == {"texts", "inbox", "outbox"} - ({table} if is_strange else set())
    (bad,) = found.unreadable
    assert bad.table in (f"close_engine.{table}", f"close_engine_{table}")
    assert (bad.row_id, bad.column) == (1, None if is_strange else column)
    if column in ("at", "received_at"):
        assert (found[0].body, found[0].at) == (table, None)


def test_a_draft_of_an_unknown_type_does_not_fail_the_list(
    conversation: CloseEngineConversation, foreign: ForeignWriter
) -> None:
    submit(conversation, ActionType.SEND_MESSAGE, "Hello?", policy=lambda level, type: True)
    (action,) = close_engine.pending_actions()
    spoil(foreign, "pending_actions", "type", "SEND_SMS", action.id)

    found = conversation.messages()
    assert found == []
    (bad,) = found.unreadable
    assert (bad.table, bad.row_id) == ("pending_actions", action.id)
    assert "SEND_SMS" in str(bad)


def test_a_bad_time_of_sending_has_the_time_at_which_it_was_put_in(
    conversation: CloseEngineConversation, foreign: ForeignWriter
) -> None:
    message = sent(conversation, "Hi!", "SM1")
    spoil(foreign, "close_engine.outbox", "sent_at", "infinity", message.id)

    (text,) = conversation.messages()
    assert text.at == message.created_at


# -- what a model is told --------------------------------------------------------------------------------------------


def text(direction: str, body: str, status: TextStatus | None = None) -> Text:
    inbound = direction == "in"
    return Text(
        PAST,
        Direction.INBOUND if inbound else Direction.OUTBOUND,
        Author.LEAD if inbound else Author.AI,
        None,
        TextKind.MESSAGE,
        status or (TextStatus.RECEIVED if inbound else TextStatus.SENT),
        body,
    )


def turns(transcript: Transcript, *arguments: Any, **options: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in transcript.as_prompt(*arguments, **options)]


TALK = Transcript([text("in", "one"), text("in", "two"), text("out", "three"), text("in", "four")])


def test_a_prompt_has_alternating_turns_oldest_first() -> None:
    assert turns(TALK) == [("user", "one\ntwo"), ("assistant", "three"), ("user", "four")]


def test_only_what_was_really_said_is_in_a_prompt() -> None:
    unsaid = [text("out", str(status), status) for status in TextStatus if status is not TextStatus.RECEIVED]

    assert turns(Transcript([text("in", "hi"), *unsaid, text("in", " ")])) == [
        ("user", "hi"),
        ("assistant", "sent\ndelivered"),
    ]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (100, [("user", "one\ntwo"), ("assistant", "three"), ("user", "four")]),
        (16, [("user", "one\ntwo"), ("assistant", "three"), ("user", "four")]),
        (15, [("user", "two"), ("assistant", "three"), ("user", "four")]),
        (11, [("user", "(We wrote first.)"), ("assistant", "three"), ("user", "four")]),
        (8, [("user", "four")]),
        (3, [("user", "our")]),
    ],
)
def test_a_prompt_is_cut_from_the_front(budget: int, expected: list[tuple[str, str]]) -> None:
    assert turns(TALK, budget) == expected


def test_a_prompt_has_no_spaces_around_a_text() -> None:
    talk = Transcript([text("in", " one\n"), text("out", "two"), text("in", "\n"), text("out", "three     x ")])

    assert turns(talk) == [("user", "one"), ("assistant", "two\nthree     x")]
    assert turns(talk, 4, opening=None) == [("assistant", "x")]


def test_a_first_turn_of_ours_gets_one_of_the_users_before_it() -> None:
    first = Transcript([text("out", "hello"), text("in", "hi")])

    assert turns(first) == [("user", "(We wrote first.)"), ("assistant", "hello"), ("user", "hi")]
    assert turns(first, opening="…") == [("user", "…"), ("assistant", "hello"), ("user", "hi")]
    assert turns(first, opening=None) == [("assistant", "hello"), ("user", "hi")]
    assert Transcript().as_prompt() == []
    with pytest.raises(InvalidValue, match="it must be at least 1"):
        first.as_prompt(0)


@given(
    talk=st.lists(st.tuples(st.sampled_from(["in", "out"]), st.text(min_size=1, max_size=5)), max_size=12),
    budget=st.integers(1, 40),
)
def test_a_prompt_alternates_and_keeps_to_its_budget(talk: list[tuple[str, str]], budget: int) -> None:
    transcript = Transcript([text(direction, body) for direction, body in talk])
    full, found = turns(transcript, opening=None), turns(transcript, budget, opening=None)

    assert sum(len(content) for _, content in found) <= budget
    for prompt in (full, found):
        assert all(role != after for (role, _), (after, _) in itertools.pairwise(prompt))
    # What is there is the end of what was said.
    assert found[1:] == (full[-len(found) + 1 :] if len(found) > 1 else [])
    if found:
        assert full[-len(found)][0] == found[0][0]
        assert full[-len(found)][1].endswith(found[0][1])
    assert [role for role, _ in turns(transcript, budget)[:1]] in ([], ["user"])


# -- how a conversation is shown -------------------------------------------------------------------------------------


def test_its_repr_shows_the_stage(conversation: CloseEngineConversation) -> None:
    assert repr(conversation) == (
        f"<CloseEngineConversation {conversation.id}: QUALIFYING, of lead {conversation.lead_id}>"
    )
    only_its_id = CloseEngineConversation.select(CloseEngineConversation.id).get()
    assert repr(only_its_id) == f"<CloseEngineConversation {conversation.id}: None, of lead None>"
    assert triggers(conversation) == ["open", "start_qualifying"]
