"""Opting out: by keyword, by call, by the provider; by lead and by phone number, whoever writes, and in again."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import peewee
import phonenumbers
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import close_engine
from close_engine import (
    KEYWORDS,
    ActionDecided,
    ActionStatus,
    ActionType,
    AfterCommitError,
    AutonomyLevel,
    CloseEngineConversation,
    ConfigurationError,
    EntryPoint,
    InvalidValue,
    Keyword,
    LeadNotFound,
    LeadOptedOut,
    MessageStatus,
    OptOut,
    OutboxMessage,
    PendingAction,
    RecipientOptedOut,
    Stage,
    UnreadableRow,
    Worker,
    carriers,
    on_enter,
    open_conversation,
    opt_in,
    opt_out,
    opted_out,
    optouts,
    outbox,
    receive,
    submit,
    subscribe,
)
from close_engine.carriers import e164
from close_engine.testing import FakeSender, bring_to, new_lead
from tests.foreign import REFUSED, ForeignWriter, spoil
from tests.rows import copy_of, triggers

ConversationIn = Callable[..., CloseEngineConversation]

#: One number, as people write it.
NUMBER = "+12125550100"
WRITTEN = ["+12125550100", "(+1) 212 555-0100", "001 212.555.0100", "tel:+1-212-555-0100", "＋1 ２１２ 555 0100"]


@pytest.fixture
def conversation(database: peewee.Database) -> CloseEngineConversation:
    """A conversation of a lead with the number, QUALIFYING."""
    return bring_to(open_conversation(new_lead(NUMBER), EntryPoint.SMS_REPLY), Stage.QUALIFYING)


def texted(conversation: CloseEngineConversation, body: str = "Hello?", **options: Any) -> OutboxMessage:
    return outbox.enqueue(conversation, ActionType.SEND_MESSAGE, body, **options)


def conversation_of_another_lead() -> CloseEngineConversation:
    return open_conversation(new_lead("+12125550111"), EntryPoint.SMS_REPLY)


def outcome(message: OutboxMessage) -> tuple[MessageStatus, str | None]:
    found = copy_of(message)
    return found.status, found.last_error


WITHDRAWN = (MessageStatus.WITHDRAWN, "the lead opted out")


# -- the words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["STOP", "stopall", " Unsubscribe ", "CANCEL", "end.", "Quit!", "revoke", "OPT-OUT"])
def test_words_that_opt_out(conversation: CloseEngineConversation, word: str) -> None:
    received = receive(conversation.lead_id, key="SM1", text=word)

    assert (received.keyword, received.answer) == (Keyword.OPT_OUT, False)
    assert opted_out(conversation.lead_id)


def said(text: str) -> Keyword | None:
    """What the carriers' words say of a text."""
    return carriers.lexicon().get(carriers.spelling(text))


PUNCTUATION = st.text(st.sampled_from(" \t\n.,;:!?-–_'\"“”()*#/\u200b\ufe0f👋🛑"), max_size=4)


@given(word=st.sampled_from(sorted(KEYWORDS)), data=st.data())
def test_case_and_punctuation_do_not_matter(word: str, data: st.DataObject) -> None:
    cased = [data.draw(st.sampled_from([letter.upper(), letter.lower()])) for letter in word]
    text = "".join(data.draw(PUNCTUATION) + letter for letter in cased) + data.draw(PUNCTUATION)
    assert said(text) is KEYWORDS[word]


@given(word=st.sampled_from(sorted(KEYWORDS)), more=st.text(st.characters(categories=["Lu", "Ll", "Nd"]), min_size=1))
def test_a_text_that_says_more_is_no_keyword(word: str, more: str) -> None:
    known = {carriers.spelling(each) for each in KEYWORDS}
    for text in (f"{word} {more}", f"{more} {word}"):
        assert (said(text) is None) is (carriers.spelling(text) not in known)


@pytest.mark.parametrize("text", ["", "👍", "Stop by at five", "Please stop", "the end", "Can you help?", "No"])
def test_other_texts_are_no_keywords(text: str) -> None:
    close_engine.connect("sqlite:///:memory:")
    assert optouts.word(text) is None


def test_the_words_can_be_replaced() -> None:
    close_engine.connect("sqlite:///:memory:", words={"Arrêt": Keyword.OPT_OUT, "ＰＡＲＥ": Keyword.OPT_OUT})
    assert [optouts.word(text) for text in ("ARRE\u0302T !", "pare", "STOP")] == [
        Keyword.OPT_OUT,
        Keyword.OPT_OUT,
        None,
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"…": Keyword.OPT_OUT}, "'…' cannot be a keyword: a word must have letters."),
        ({"BYE": "OPT_OUT"}, "The word 'BYE' must stand for a Keyword, such as Keyword.OPT_OUT."),
    ],
)
def test_words_that_mean_nothing_are_refused(words: Any, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        close_engine.connect("sqlite:///:memory:", words=words)
    assert str(caught.value) == sentence


# -- the numbers ---------------------------------------------------------------------------------------------------

#: Numbers of several countries, and the forms in which people write them.
EXAMPLES: list[Any] = [phonenumbers.example_number(region) for region in ("US", "GB", "DE", "IT", "BR", "IN", "NG")]
FORMS = [phonenumbers.PhoneNumberFormat.E164, phonenumbers.PhoneNumberFormat.INTERNATIONAL]
SEPARATORS = st.text(st.sampled_from(" .-/()"), max_size=2)


@given(number=st.sampled_from(EXAMPLES), form=st.sampled_from(FORMS), region=st.sampled_from([None, "US", "DE"]))
def test_an_international_number_is_the_same_however_it_is_written(number: Any, form: int, region: str | None) -> None:
    expected = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    written = phonenumbers.format_number(number, form)
    assert e164(written, region) == expected
    assert e164(e164(written, region), region) == expected
    assert e164(written.replace("+", "00"), None) == expected


@pytest.mark.parametrize("region", ["US", "GB", "DE", "IT", "BR", "IN", "NG"])
def test_a_national_number_is_one_of_the_region(region: str) -> None:
    number: Any = phonenumbers.example_number(region)
    national = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.NATIONAL)
    assert e164(national, region) == phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)


@given(digits=st.from_regex(r"[1-9][0-9]{5,14}", fullmatch=True), data=st.data())
def test_without_the_library_the_digits_are_compared_as_given(digits: str, data: st.DataObject) -> None:
    spaced = "".join(digit + data.draw(SEPARATORS) for digit in digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(carriers, "phonenumbers", None)
        assert e164(f"+{spaced}") == e164(f"(00{spaced}") == e164(f" (+){spaced}") == f"+{digits}"
        assert e164(spaced) == digits


@given(
    phone=st.one_of(st.none(), st.text(), st.text("0123456789+ ", max_size=300)), region=st.sampled_from([None, "US"])
)
def test_whatever_stands_in_the_crm_is_a_number_or_none(phone: str | None, region: str | None) -> None:
    number = e164(phone, region)
    assert number is None or (len(number) <= 41 and number.lstrip("+").isdecimal() and number.isascii())


def test_the_region_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_REGION", "US")
    close_engine.connect("sqlite:///:memory:")
    assert close_engine.numbers.number_of("(212) 555-0100") == NUMBER
    close_engine.connect("sqlite:///:memory:", region="DE")
    assert close_engine.numbers.number_of("030 123456") == "+4930123456"


@pytest.mark.parametrize("region", ["USA", "us", "XX"])
def test_a_region_that_is_none_is_refused(region: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        close_engine.connect("sqlite:///:memory:", region=region)
    assert str(caught.value) == f"There is no region {region!r}: give two letters, such as US."


def test_a_region_without_the_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carriers, "phonenumbers", None)
    with pytest.raises(ConfigurationError) as caught:
        close_engine.connect("sqlite:///:memory:", region="US")
    assert str(caught.value) == (
        "The region 'US' is of no use without the library phonenumbers: pip install close-engine[phone]."
    )


# -- what an opt-out does ------------------------------------------------------------------------------------------


def test_stop_closes_the_conversation_and_withdraws_what_waits(
    conversation: CloseEngineConversation, fake_sender: FakeSender
) -> None:
    waiting = [texted(conversation, "one"), texted(conversation, "two", send_after=timedelta(hours=1))]
    effect = outbox.enqueue(conversation, "notify_rep", "they left")

    received = receive(conversation.lead_id, key="SM1", text="Stop.")

    closed = received.conversation
    assert closed is not None
    assert (closed.stage, closed.closed_lost_reason) == (Stage.CLOSED_LOST, "opted out")
    last = closed.history()[-1]
    assert (last.trigger, last.actor, last.reason) == ("close_lost", f"lead:{closed.lead_id}", "opted out")
    assert list(map(outcome, waiting)) == [WITHDRAWN, WITHDRAWN]
    assert fake_sender.deliver() == 1
    assert [message.id for message in fake_sender.sent] == [effect.id]


@pytest.mark.parametrize("is_stale", [False, True])
def test_whatever_is_tried_afterwards_is_refused(conversation: CloseEngineConversation, is_stale: bool) -> None:
    lead_id = conversation.lead_id
    opt_out(lead_id, source="phone call")
    if not is_stale:
        conversation.reload()
    for attempt in (
        lambda: open_conversation(lead_id, EntryPoint.SMS_REPLY),
        lambda: submit(conversation, ActionType.SEND_MESSAGE, "Hello?"),
        lambda: texted(conversation),
    ):
        with pytest.raises(LeadOptedOut) as caught:
            attempt()
        assert caught.value.lead_id == lead_id
    assert outbox.enqueue(conversation, "notify_rep", "they left").status is MessageStatus.PENDING
    assert triggers(conversation) == ["open", "start_qualifying", "close_lost"]


def test_what_is_in_flight_is_recorded_and_not_tried_again(conversation: CloseEngineConversation) -> None:
    """A text that a worker holds may have left: it is not taken away from the worker."""
    sent = texted(conversation)
    (in_flight,) = outbox.claim()
    receive(conversation.lead_id, key="SM1", text="STOP")
    assert in_flight.sent("SM2").status is MessageStatus.SENT
    opt_in(conversation.lead_id, source="web form")

    again = open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY)
    message = texted(again)
    (in_flight,) = outbox.claim()
    receive(conversation.lead_id, key="SM3", text="STOP")
    in_flight.retry("timeout", after=timedelta(0))
    assert outbox.claim() == []
    assert outcome(message) == WITHDRAWN
    assert outcome(sent)[0] is MessageStatus.SENT


def test_a_dead_text_cannot_be_put_back(conversation: CloseEngineConversation) -> None:
    message, other = texted(conversation), texted(conversation_of_another_lead())
    for claimed in outbox.claim(limit=5):
        claimed.give_up("no such number")
    opt_out(conversation.lead_id, source="phone call")
    with pytest.raises(LeadOptedOut):
        outbox.requeue(message)
    assert outbox.requeue_all() == [other.id]


def test_drafts_that_wait_for_approval_expire(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING, AutonomyLevel.MANUAL)
    waits = submit(conversation, ActionType.SEND_MESSAGE, "Shall we?")
    approved = submit(copy_of(conversation), ActionType.SEND_MESSAGE, "Hello?")
    assert isinstance(waits, PendingAction)
    assert isinstance(approved, PendingAction)
    message = approved.approve(by="dana")

    receive(conversation.lead_id, key="SM1", text="STOP")

    assert copy_of(waits).status is ActionStatus.EXPIRED
    assert outcome(message) == WITHDRAWN
    with pytest.raises(ActionDecided):
        waits.approve(by="dana")
    with pytest.raises(LeadOptedOut):
        submit(copy_of(conversation), ActionType.SEND_MESSAGE, "Please?")


@pytest.mark.parametrize("stage", [Stage.INITIATED, Stage.PENDING_APPROVAL, Stage.PAYMENT_SENT, Stage.STALLED])
def test_a_conversation_of_any_stage_is_closed(conversation_in: ConversationIn, stage: Stage) -> None:
    conversation = conversation_in(stage)
    receive(conversation.lead_id, key="SM1", text="STOP")
    assert copy_of(conversation).stage is Stage.CLOSED_LOST
    assert "resume" not in triggers(conversation)


@pytest.mark.parametrize("stage", [Stage.COMPLETED, Stage.CLOSED_LOST])
def test_a_closed_conversation_stays_as_it_is(conversation_in: ConversationIn, stage: Stage) -> None:
    conversation = conversation_in(stage)
    before = triggers(conversation), copy_of(conversation).closed_lost_reason
    receive(conversation.lead_id, key="SM1", text="STOP")
    assert (triggers(conversation), copy_of(conversation).closed_lost_reason) == before
    assert opted_out(conversation.lead_id)


def test_a_lead_without_a_conversation_can_opt_out(database: peewee.Database) -> None:
    lead = new_lead(NUMBER)
    received = receive(lead, key="SM1", text="STOP", open=EntryPoint.SMS_REPLY)
    assert (received.conversation, received.opened, received.keyword) == (None, None, Keyword.OPT_OUT)
    with pytest.raises(LeadOptedOut):
        open_conversation(lead, EntryPoint.SMS_REPLY)


def test_a_lead_without_a_number_can_opt_out(database: peewee.Database) -> None:
    lead = new_lead(None)
    assert opt_out(lead, source="letter").number is None
    lead.phone = NUMBER
    lead.save()
    with pytest.raises(LeadOptedOut):
        open_conversation(lead, EntryPoint.SMS_REPLY)
    open_conversation(new_lead(NUMBER), EntryPoint.SMS_REPLY)


def test_what_the_lead_writes_later_opens_nothing(conversation: CloseEngineConversation) -> None:
    lead_id = conversation.lead_id
    receive(lead_id, key="SM1", text="STOP")
    received = receive(lead_id, key="SM2", text="How much is it, though?", open=EntryPoint.SMS_REPLY)
    assert (received.answer, received.opened, received.keyword) == (False, None, None)
    assert copy_of(conversation).stage is Stage.CLOSED_LOST


# -- the number ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", WRITTEN[1:3])
def test_another_lead_with_the_number_cannot_be_texted_either(database: peewee.Database, written: str) -> None:
    first, second = new_lead(NUMBER), new_lead(written)
    theirs = open_conversation(second, EntryPoint.SMS_REPLY)
    message = texted(theirs)

    receive(first, key="SM1", text="STOP")

    assert (copy_of(theirs).stage, copy_of(theirs).closed_lost_reason) == (Stage.CLOSED_LOST, "opted out")
    assert outcome(message) == WITHDRAWN
    found = opted_out(second)
    assert found is not None
    assert (found.number, found.source) == (NUMBER, "text")
    with pytest.raises(LeadOptedOut):
        open_conversation(new_lead(written), EntryPoint.SMS_REPLY)
    open_conversation(new_lead("+12125550101"), EntryPoint.SMS_REPLY)


def test_a_number_that_changed_since_is_read_again_at_the_claim(conversation: CloseEngineConversation) -> None:
    receive(conversation.lead_id, key="SM1", text="STOP")
    for written in WRITTEN:
        lead = new_lead("+12125550199")
        theirs = open_conversation(lead, EntryPoint.SMS_REPLY)
        message, effect = texted(theirs), outbox.enqueue(theirs, "notify_rep", "look")
        lead.phone = written
        lead.save()

        assert [each.id for each in outbox.claim(limit=5)] == [effect.id]
        assert outcome(message) == WITHDRAWN
        assert copy_of(message).attempts == 0
        with pytest.raises(LeadOptedOut):
            texted(theirs)


def test_a_lead_that_nobody_opened_through_the_library_is_read_at_the_claim(
    foreign: ForeignWriter, fake_sender: FakeSender
) -> None:
    """The CRM inserts lead and conversation, and no number is kept yet."""
    opt_out(new_lead("+15550100"), source="phone call")
    conversation_id = foreign.insert("QUALIFYING")
    (message,) = [outbox.enqueue(conversation_id, ActionType.SEND_MESSAGE, "Hello?")]
    fake_sender.deliver()
    assert (fake_sender.sent, outcome(message)) == ([], WITHDRAWN)


def test_a_lead_whose_number_changed_since_is_closed_with_those_of_its_old_one(
    database: peewee.Database, fake_sender: FakeSender
) -> None:
    """It was opened under the number that opts out. Under its new one, it can be opened again."""
    lead = new_lead(NUMBER)
    message = texted(open_conversation(lead, EntryPoint.SMS_REPLY))
    lead.phone = "+12125550101"
    lead.save()
    opt_out(new_lead(NUMBER), source="phone call")
    assert outcome(message) == WITHDRAWN
    texted(open_conversation(lead, EntryPoint.SMS_REPLY), "Hello again.")
    fake_sender.deliver()
    assert [each.body for each in fake_sender.sent] == ["Hello again."]


def test_the_number_that_was_texted_opts_out_with_the_one_of_now(database: peewee.Database) -> None:
    """The CRM changed the number after the text; whose STOP it is, nobody knows."""
    lead = new_lead(NUMBER)
    open_conversation(lead, EntryPoint.SMS_REPLY)
    lead.phone = "+12125550101"
    lead.save()
    receive(lead, key="SM1", text="STOP")
    for number in (NUMBER, "+12125550101"):
        with pytest.raises(LeadOptedOut):
            open_conversation(new_lead(number), EntryPoint.SMS_REPLY)


def test_a_phone_that_is_no_number_hinders_nobody(database: peewee.Database) -> None:
    for phone in ("", "none", None, "+", "9" * 5000):
        lead = new_lead(NUMBER)
        message = texted(open_conversation(lead, EntryPoint.SMS_REPLY))
        lead.phone = phone
        lead.save()
        assert [each.id for each in outbox.claim()] == [message.id]
        assert opted_out(lead) is None


@pytest.mark.parametrize("kind", ["sqlite-file", "sqlite-memory"])
def test_a_phone_that_is_no_text_hinders_nobody(kind: str, database: peewee.Database) -> None:
    """SQLite keeps what it is given, also bytes that are no text."""
    lead = new_lead(NUMBER)
    message = texted(open_conversation(lead, EntryPoint.SMS_REPLY))
    for value in ("x'ff'", "12125550100.5", "CAST(x'ff2b31' AS TEXT)"):
        database.execute_sql(f"UPDATE leads SET phone = {value}")
        (claimed,) = outbox.claim()
        assert claimed.id == message.id
        claimed.release()
        assert opted_out(lead.id) is None
    opt_out(lead.id, source="phone call")
    assert outcome(message) == WITHDRAWN


# -- opting in -----------------------------------------------------------------------------------------------------


def test_start_lifts_the_ban_and_opens_nothing(conversation: CloseEngineConversation) -> None:
    lead_id = conversation.lead_id
    receive(lead_id, key="SM1", text="STOP")

    received = receive(lead_id, key="SM2", text="start", open=EntryPoint.SMS_REPLY)

    assert (received.keyword, received.answer, received.opened) == (Keyword.OPT_IN, False, None)
    assert copy_of(conversation).stage is Stage.CLOSED_LOST
    assert opted_out(lead_id) is None
    (lifted, of_number) = OptOut.select().order_by(OptOut.id)
    assert (lifted.lead_id, lifted.source, lifted.lifted_by) == (lead_id, "text", "text")
    assert (of_number.number, of_number.lifted_at) == (NUMBER, lifted.lifted_at)
    assert open_conversation(lead_id, EntryPoint.SMS_REPLY).stage is Stage.INITIATED


def test_start_of_a_lead_that_has_not_opted_out_is_a_text(conversation: CloseEngineConversation) -> None:
    received = receive(conversation.lead_id, key="SM1", text="START")
    assert (received.keyword, received.answer) == (None, True)


def test_start_at_one_lead_lifts_the_ban_of_all_leads_with_the_number(database: peewee.Database) -> None:
    first, second = new_lead(NUMBER), new_lead(WRITTEN[1])
    open_conversation(second, EntryPoint.SMS_REPLY)
    opt_out(first, source="phone call")
    assert opt_in(second, source="web form") is True
    assert (opted_out(first), opted_out(second)) == (None, None)


def test_a_lead_that_moved_away_from_a_number_stays_opted_out(database: peewee.Database) -> None:
    """The number was given to somebody else, who may be texted. The lead who opted out may not."""
    moved = new_lead(NUMBER)
    opt_out(moved, source="phone call")
    moved.phone = "+12125550101"
    moved.save()
    opt_out(moved, source="phone call")
    successor = new_lead(NUMBER)
    assert opt_in(successor, source="web form") is True
    assert opted_out(successor) is None
    assert opted_out(moved)


def test_help_asks_for_no_answer_of_ours(conversation: CloseEngineConversation) -> None:
    message = texted(conversation)
    received = receive(conversation.lead_id, key="SM1", text="Help!")
    assert (received.keyword, received.answer, received.superseded) == (Keyword.HELP, False, ())
    assert copy_of(conversation).updated_at == conversation.updated_at
    assert [each.id for each in outbox.claim()] == [message.id]
    conversation.stall()
    assert receive(conversation.lead_id, key="SM2", text="HELP").resumed is None


@pytest.mark.parametrize("text", ["STOP", "START", "HELP"])
def test_the_same_text_again_has_the_same_result(conversation: CloseEngineConversation, text: str) -> None:
    lead_id = conversation.lead_id
    if text == "START":
        opt_out(lead_id, source="phone call")
    first = receive(lead_id, key="SM1", text=text)
    if text == "STOP":
        opt_in(lead_id, source="web form")
    elif text == "START":
        opt_out(lead_id, source="phone call")
    before = bool(opted_out(lead_id))

    again = receive(lead_id, key="SM1", text=text)

    assert (again.duplicate, again.keyword, again.answer) == (True, first.keyword, False)
    assert bool(opted_out(lead_id)) is before


def test_a_key_is_used_once(conversation: CloseEngineConversation) -> None:
    lead_id = conversation.lead_id
    made = opt_out(lead_id, source="provider", key="evt_1")
    assert opt_out(lead_id, source="provider", key="evt_1") == made
    assert opt_in(lead_id, source="web form", key="evt_2") is True
    assert opt_out(lead_id, source="provider", key="evt_1").lifted_at is not None
    assert opted_out(lead_id) is None
    opt_out(lead_id, source="provider", key="evt_3")
    assert opt_in(lead_id, source="web form", key="evt_2") is False
    assert opted_out(lead_id)


def test_the_key_of_an_opt_in_that_had_nothing_to_lift_is_used_too(conversation: CloseEngineConversation) -> None:
    lead_id = conversation.lead_id
    assert opt_in(lead_id, source="web form", key="evt_1") is False
    opt_out(lead_id, source="phone call")
    assert opt_in(lead_id, source="web form", key="evt_1") is False
    assert opted_out(lead_id)


def test_opting_out_twice_keeps_the_first(conversation: CloseEngineConversation) -> None:
    first = opt_out(conversation.lead_id, source="phone call")
    assert opt_out(conversation.lead_id, source="web form") == first
    assert OptOut.select().count() == 2


def test_arguments_that_make_no_sense_are_refused(conversation: CloseEngineConversation) -> None:
    for call in (opt_out, opt_in):
        with pytest.raises(LeadNotFound):
            call("nobody", source="phone call")
        with pytest.raises(InvalidValue, match="it must say where it was said"):
            call(conversation.lead_id, source=" ")
    with pytest.raises(LeadNotFound):
        opted_out("nobody")
    assert OptOut.select().count() == 0


def test_opting_out_and_in_are_events(conversation: CloseEngineConversation) -> None:
    """Each is published once, and also while nothing may be sent to the lead."""
    subscribe("tell_rep", events=["lead:opted_out", "lead:opted_in"])
    lead_id = conversation.lead_id
    for key in ("SM1", "SM2"):
        receive(lead_id, key=key, text="STOP")
    opt_in(lead_id, source="web form")
    opt_in(lead_id, source="web form")
    opt_out(lead_id, source="provider")
    opt_out(new_lead("+12125550199"), source="phone call")

    told = [message.payload for message in OutboxMessage.select().order_by(OutboxMessage.id)]
    assert [(each["event"], each["lead_id"], each["source"]) for each in told] == [
        ("lead:opted_out", lead_id, "text"),
        ("lead:opted_in", lead_id, "web form"),
        ("lead:opted_out", lead_id, "provider"),
    ]
    assert [message.topic for message in outbox.claim(limit=5)] == ["tell_rep"]


# -- the provider --------------------------------------------------------------------------------------------------


def test_the_providers_word_opts_out(conversation: CloseEngineConversation, fake_sender: FakeSender) -> None:
    first, second = texted(conversation, "one"), texted(conversation, "two")
    fake_sender.failures.append(RecipientOptedOut("21610"))
    fake_sender.deliver()
    assert fake_sender.sent == []
    assert outcome(first) == (MessageStatus.WITHDRAWN, "the recipient opted out: 21610")
    assert outcome(second) == WITHDRAWN
    found = opted_out(conversation.lead_id)
    assert found is not None
    assert found.source == "provider"
    assert copy_of(conversation).closed_lost_reason == "opted out"


def test_the_providers_word_holds_though_the_lease_was_lost(
    conversation: CloseEngineConversation, close_engine_clock: Any
) -> None:
    message = texted(conversation)

    def send(sent: OutboxMessage) -> str:
        close_engine_clock.move(timedelta(minutes=2))
        outbox.claim(worker="another")
        raise RecipientOptedOut

    Worker(send, concurrency=1, sweep=None).run_until_empty()
    assert opted_out(conversation.lead_id)
    assert outcome(message)[0] is MessageStatus.PENDING


# -- other writers, and what fails ---------------------------------------------------------------------------------


def test_a_foreign_approval_after_the_opt_out_sends_nothing(
    foreign: ForeignWriter, conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    conversation = conversation_in(Stage.QUALIFYING, AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Shall we?")
    receive(conversation.lead_id, key="SM1", text="STOP")
    with pytest.raises(REFUSED):
        foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = %s", action.id)
    fake_sender.deliver()
    assert fake_sender.sent == []


def test_a_foreign_approval_of_a_conversation_that_was_opened_again_sends_nothing(
    foreign: ForeignWriter, conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    """The CRM reopens the conversation, drafts and approves; the message reaches the outbox and no further."""
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, key="SM1", text="STOP")
    foreign.update(conversation.id, stage="INITIATED")
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, status) "
        "VALUES ('a1', %s, %s, 'SEND_MESSAGE', 'Please?', 'PENDING')",
        conversation.id,
        conversation.lead_id,
    )
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = 'a1'")
    (message,) = OutboxMessage.select()
    fake_sender.deliver()
    assert (fake_sender.sent, outcome(message)) == ([], WITHDRAWN)


def test_a_hook_that_fails_does_not_keep_a_lead_from_opting_out(conversation: CloseEngineConversation) -> None:
    message = texted(conversation)

    @on_enter(Stage.CLOSED_LOST)
    def fail(*_: object) -> None:
        raise RuntimeError("the CRM is away")

    try:
        with pytest.raises(AfterCommitError, match="the CRM is away"):
            receive(conversation.lead_id, key="SM1", text="STOP")
    finally:
        fail.remove()
    assert opted_out(conversation.lead_id)
    assert copy_of(conversation).stage is Stage.QUALIFYING
    assert outcome(message) == WITHDRAWN
    opt_out(conversation.lead_id, source="phone call")
    assert copy_of(conversation).stage is Stage.CLOSED_LOST


def test_a_conversation_that_cannot_be_read_does_not_either(
    foreign: ForeignWriter, conversation_in: ConversationIn
) -> None:
    conversation, other = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    message = texted(conversation)
    spoil(foreign, "close_engine_conversations", "stage", "NONSENSE", conversation.id)
    with pytest.raises(UnreadableRow):
        receive(conversation.lead_id, key="SM1", text="STOP")
    assert opted_out(conversation.lead_id)
    assert copy_of(other).stage is Stage.CLOSED_LOST
    assert outbox.claim() == []
    assert outcome(message) == WITHDRAWN


def test_two_leads_with_one_number_opt_out_at_once(postgres: peewee.Database) -> None:
    """Each closes the conversations of both, always in one order."""
    errors: list[Exception] = []

    def stop(conversation: CloseEngineConversation, key: str) -> None:
        try:
            receive(conversation.lead_id, key=key, text="STOP")
        except Exception as error:
            errors.append(error)
        finally:
            postgres.close()

    for round_ in range(10):
        number = f"+1212555{round_:04}"
        pair = [open_conversation(new_lead(number), EntryPoint.SMS_REPLY) for _ in range(2)]
        threads = [threading.Thread(target=stop, args=(each, f"SM{round_}-{place}")) for place, each in enumerate(pair)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert [copy_of(each).stage for each in pair] == [Stage.CLOSED_LOST] * 2
        assert [triggers(each) for each in pair] == [["open", "close_lost"]] * 2


# -- in any order --------------------------------------------------------------------------------------------------

NUMBERS = ["+12125550100", "+12125550101", "+12125550102"]
SPELLINGS = st.sampled_from(["{}", " {} ", "({})"])
LEADS = st.integers(0, 3)
# A provider never gives an id twice, not even to two runs of the model on one database.
KEYS = itertools.count(1)


class People(RuleBasedStateMachine):
    """Leads who share numbers, change them, opt out and in, while texts are drafted and sent.

    The model knows who said what, and nothing of rows: a lead is banned, or its number is.
    """

    database: peewee.Database

    @initialize(phones=st.lists(st.sampled_from(NUMBERS), min_size=4, max_size=4))
    def begin(self, phones: list[str]) -> None:
        for table in (OptOut, close_engine.LeadNumber, OutboxMessage):
            table.delete().execute()
        self.leads = [new_lead(phone) for phone in phones]
        self.phone = dict(enumerate(phones))
        self.read: dict[int, str] = {}
        self.banned_leads: set[int] = set()
        self.banned_numbers: set[str] = set()

    def is_banned(self, place: int) -> bool:
        return place in self.banned_leads or self.phone[place] in self.banned_numbers

    def sharing(self, place: int, numbers: set[str]) -> set[int]:
        return {place, *(other for other, number in self.read.items() if number in numbers)}

    def place_of(self, message: OutboxMessage) -> int:
        return [lead.id for lead in self.leads].index(message.lead_id)

    @rule(place=LEADS)
    def open(self, place: int) -> None:
        conversation = self.conversation_of(place)
        if conversation is not None and conversation.stage in close_engine.ACTIVE_STAGES:
            return
        if self.is_banned(place):
            with pytest.raises(LeadOptedOut):
                open_conversation(self.leads[place].id, EntryPoint.SMS_REPLY)
        else:
            open_conversation(self.leads[place].id, EntryPoint.SMS_REPLY)
            self.read[place] = self.phone[place]

    @rule(place=LEADS)
    def draft(self, place: int) -> None:
        """A lead that is banned by its number of now only may be found out as late as at the claim."""
        conversation = self.conversation_of(place)
        if conversation is None:
            return
        try:
            submit(conversation, ActionType.SEND_MESSAGE, "Hello?")
        except LeadOptedOut:
            assert place in self.banned_leads or self.read[place] in self.banned_numbers
        except close_engine.ConversationClosed:
            assert conversation.stage is Stage.CLOSED_LOST

    @rule()
    def deliver(self) -> None:
        def send(message: OutboxMessage) -> str:
            assert not self.is_banned(self.place_of(message))
            return f"SM-{message.send_key}"

        waiting = OutboxMessage.select().where(OutboxMessage.status == MessageStatus.PENDING)
        places = {self.place_of(message) for message in waiting}
        Worker(send, concurrency=1, sweep=None).run_until_empty()
        assert waiting.clone().count() == 0
        assert OutboxMessage.select().where(OutboxMessage.status == MessageStatus.DEAD).count() == 0
        for place in places - self.banned_leads:
            if self.read[place] not in self.banned_numbers:
                self.read[place] = self.phone[place]

    @rule(place=LEADS, number=st.sampled_from(NUMBERS), spelling=SPELLINGS)
    def change_the_number(self, place: int, number: str, spelling: str) -> None:
        close_engine.Lead.update(phone=spelling.format(number)).where(
            close_engine.Lead.id == self.leads[place].id
        ).execute()
        self.phone[place] = number

    @rule(place=LEADS, data=st.data())
    def draft_and_change_the_number_before_it_is_sent(self, place: int, data: st.DataObject) -> None:
        """Preferably to a number that opted out."""
        self.open(place)
        self.draft(place)
        number = data.draw(st.sampled_from(sorted(self.banned_numbers) or NUMBERS))
        self.change_the_number(place, number, data.draw(SPELLINGS))
        self.deliver()

    @rule(place=LEADS, by_text=st.booleans())
    def out(self, place: int, by_text: bool) -> None:
        numbers = {self.phone[place], *filter(None, [self.read.get(place)])}
        concerned = self.sharing(place, numbers)
        self.say(place, "STOP") if by_text else opt_out(self.leads[place], source="phone call")
        self.banned_leads.add(place)
        self.banned_numbers |= numbers
        self.read[place] = self.phone[place]
        for other in concerned:
            conversation = self.conversation_of(other)
            assert conversation is None or conversation.stage in close_engine.CLOSED_STAGES

    @rule(place=LEADS, by_text=st.booleans())
    def back_in(self, place: int, by_text: bool) -> None:
        before = self.stage_of(place)
        lifted = self.banned_leads & self.sharing(place, {self.phone[place]})
        was_any = bool(lifted) or self.phone[place] in self.banned_numbers
        if by_text and was_any:
            self.say(place, "Start!")
        elif not by_text:
            assert opt_in(self.leads[place], source="web form") is was_any
        self.banned_leads -= lifted
        self.banned_numbers.discard(self.phone[place])
        assert self.stage_of(place) is before

    def say(self, place: int, text: str) -> None:
        assert not receive(self.leads[place], key=f"SM{next(KEYS)}", text=text).answer

    def conversation_of(self, place: int) -> CloseEngineConversation | None:
        found: CloseEngineConversation | None = CloseEngineConversation.get_or_none(
            CloseEngineConversation.lead == self.leads[place]
        )
        return found

    def stage_of(self, place: int) -> Stage | None:
        conversation = self.conversation_of(place)
        return None if conversation is None else conversation.stage

    @invariant()
    def the_library_knows_who_opted_out(self) -> None:
        for place, lead in enumerate(self.leads):
            assert bool(opted_out(lead)) is self.is_banned(place)


@pytest.mark.parametrize("kind", ["sqlite-memory", "postgresql"])  # in a file, SQLite only waits for the disk
def test_nobody_who_opted_out_is_texted_whatever_happens(database: peewee.Database) -> None:
    People.database = database
    run_state_machine_as_test(
        People,
        settings=settings(
            max_examples=25 if isinstance(database, peewee.PostgresqlDatabase) else 60,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
