"""Texts through Twilio's real SDK, against a stand-in on the loopback address that signs as Twilio does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import peewee
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.datastructures import FormData
from twilio.base.exceptions import TwilioRestException
from twilio.request_validator import RequestValidator
from twilio.rest import Client

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    ConfigurationError,
    Delivery,
    DeliveryStatus,
    EntryPoint,
    InboxEntry,
    Lead,
    LeadOptedOut,
    MessageStatus,
    OptOut,
    OutboxMessage,
    Stage,
    Worker,
    after_commit,
    open_conversation,
    opt_in,
    opted_out,
    outbox,
    record_sent,
    submit,
)
from close_engine.database.binding import current, moment
from close_engine.integrations.twilio import TwilioHttp, TwilioSender, TwilioWebhooks, create_lead, words
from close_engine.integrations.webhooks import WebhookResponse
from close_engine.testing import MovableClock, new_lead
from close_engine.testing.stand_ins import Call, Reply, StandIn
from close_engine.testing.twilio import SentText, TwilioStandIn
from tests.foreign import ForeignWriter, spoil
from tests.rows import copy_of
from tests.workers import claimed, messages, race

ConversationIn = Callable[..., CloseEngineConversation]

NUMBER = "+15550100"
TEXTS_URL = "https://crm.example.com/webhooks/twilio/texts"
STATUS_URL = "https://crm.example.com/webhooks/twilio/status"
TWIML = '<?xml version="1.0" encoding="UTF-8"?><Response/>'


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """Both databases. How they are connected to does not matter here."""
    return str(request.param)


#: For what is about Twilio, and the same on every database.
on_one_database = pytest.mark.parametrize("kind", ["sqlite-memory"])


@pytest.fixture
def twilio(close_engine_clock: MovableClock) -> Iterator[TwilioStandIn]:
    with TwilioStandIn(clock=lambda: close_engine_clock.now) as stand_in:
        yield stand_in


@pytest.fixture
def sender(twilio: TwilioStandIn) -> TwilioSender:
    return TwilioSender(twilio.client(), from_=twilio.number, status_callback=STATUS_URL)


@pytest.fixture
def conversation(conversation_in: ConversationIn) -> CloseEngineConversation:
    return conversation_in(Stage.QUALIFYING)


@pytest.fixture
def webhooks(twilio: TwilioStandIn) -> TwilioWebhooks:
    return TwilioWebhooks(twilio.auth_token, unknown=create_lead)


def deliver(sender: TwilioSender) -> int:
    return Worker(sender, name="w", concurrency=1, sweep=None, topics=list(ActionType)).run_until_empty()


def error_of(message: OutboxMessage) -> str:
    return copy_of(message).last_error or ""


def say(conversation: CloseEngineConversation, body: str = "Hello!", **payload: str) -> OutboxMessage:
    return outbox.enqueue(conversation, "SEND_MESSAGE", body, payload=payload or None)


# -- sending -----------------------------------------------------------------------------------------------------------


def test_a_text_leaves_to_the_leads_number_and_its_callback_names_it(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    message = say(conversation, "Hallo, Žofie! 🍞")
    deliver(sender)
    (text,) = twilio.texts
    assert (text.to, text.from_, text.body) == (NUMBER, twilio.number, "Hallo, Žofie! 🍞")
    assert text.status_callback == f"{STATUS_URL}?send_key={message.send_key}"
    sent = copy_of(message)
    assert (sent.status, sent.provider_id) == (MessageStatus.SENT, text.sid)


@on_one_database
def test_a_messaging_service_may_send_and_the_callback_keeps_its_query(
    twilio: TwilioStandIn, conversation: CloseEngineConversation
) -> None:
    message = say(conversation)
    callback = f"{STATUS_URL}?shop=1#rc=3"
    deliver(TwilioSender(twilio.client(), messaging_service_sid="MG1", status_callback=callback))
    (text,) = twilio.texts
    assert (text.from_, text.status_callback) == ("MG1", f"{STATUS_URL}?shop=1&send_key={message.send_key}#rc=3")


@pytest.mark.parametrize(
    ("body", "payload", "said"),
    [
        ("Hi", None, "Hi"),
        (" Hi \n", {"other": 1}, "Hi"),
        ("Look:", {"previewUrl": "https://p.example.com/1"}, "Look:\nhttps://p.example.com/1"),
        ("Look: https://p.example.com/1.", {"previewUrl": "https://p.example.com/1"}, "Look: https://p.example.com/1."),
        ("https://a.de/12", {"paymentUrl": "https://a.de/1"}, "https://a.de/12\nhttps://a.de/1"),
        ("https://a.de.com", {"paymentUrl": "https://a.de"}, "https://a.de.com\nhttps://a.de"),
        ("Pay", {"paymentUrl": " ", "previewUrl": None}, "Pay"),
        (None, {"paymentUrl": "https://a.de/1"}, "https://a.de/1"),
        (None, ["https://a.de/1"], ""),
    ],
)
def test_the_words_have_the_links_that_the_body_lacks(body: str | None, payload: Any, said: str) -> None:
    assert words(OutboxMessage(body=body, payload=payload)) == said


def test_the_number_is_the_one_that_the_lead_has_when_the_text_leaves(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    say(conversation)
    Lead.update(phone="0044 (20) 7946-0958").where(Lead.id == conversation.lead_id).execute()
    deliver(sender)
    assert twilio.delivered_to("+442079460958") == ["Hello!"]


@on_one_database
@pytest.mark.parametrize(
    ("phone", "why"),
    [(None, "no phone number"), ("none", "no phone number"), ("555-0100", "cannot be dialled"), ("+12", "cannot be")],
)
def test_what_cannot_be_dialled_cannot_be_sent(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, phone: str | None, why: str
) -> None:
    message = say(conversation)
    Lead.update(phone=phone).where(Lead.id == conversation.lead_id).execute()
    deliver(sender)
    assert copy_of(message).status is MessageStatus.DEAD
    assert why in error_of(message)
    assert twilio.calls == []


@on_one_database
@pytest.mark.parametrize("code", [21211, 21214, 21408, 21604, 21612, 21614, 30999])
def test_what_twilio_refuses_for_good_is_dead(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, code: int
) -> None:
    twilio.refused[NUMBER] = code
    message = say(conversation)
    deliver(sender)
    assert copy_of(message).status is MessageStatus.DEAD
    assert f"Twilio refused the text (error {code}, HTTP 400): " in error_of(message)


@on_one_database
def test_a_text_that_is_too_long_is_dead(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    message = say(conversation, "a" * 1601)
    deliver(sender)
    assert copy_of(message).status is MessageStatus.DEAD
    assert "21617" in error_of(message)


def test_who_opted_out_at_twilio_is_texted_no_more(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    twilio.refused[NUMBER] = 21610
    message = say(conversation)
    deliver(sender)
    assert copy_of(message).status is MessageStatus.WITHDRAWN
    assert opted_out(conversation.lead_id).source == "provider"
    assert copy_of(conversation).stage is Stage.CLOSED_LOST


@on_one_database
@pytest.mark.parametrize("code", [20003, 21606, 21611, 21703])
def test_no_text_dies_of_what_is_wrong_with_the_account(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, code: int
) -> None:
    twilio.refused[NUMBER] = code
    message = say(conversation)
    deliver(sender)
    assert (copy_of(message).status, copy_of(message).attempts) == (MessageStatus.PENDING, 1)


@on_one_database
def test_wrong_credentials_kill_no_text(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    twilio.is_unknown = True
    message = say(conversation)
    deliver(sender)
    assert copy_of(message).status is MessageStatus.PENDING
    assert "error 20003, HTTP 401" in error_of(message)
    twilio.is_unknown = False
    close_engine_clock.move(timedelta(hours=1))
    deliver(sender)
    assert twilio.delivered_to(NUMBER) == ["Hello!"]


@on_one_database
@pytest.mark.parametrize("reply", [Reply(status) for status in (302, 401, 403, 404, 408, 429, 500, 502, 503)])
def test_a_failure_without_a_code_is_tried_again(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, reply: Reply
) -> None:
    twilio.failures.append(reply)
    message = say(conversation)
    deliver(sender)
    assert (copy_of(message).status, copy_of(message).attempts) == (MessageStatus.PENDING, 1)
    assert copy_of(message).last_error == f"RuntimeError: Twilio failed (HTTP {reply.status}): it did not say why"


@on_one_database
def test_another_refusal_without_a_code_is_dead(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    twilio.failures.append(Reply(422, b"<html>"))
    message = say(conversation)
    deliver(sender)
    assert copy_of(message).status is MessageStatus.DEAD


@on_one_database
@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [("90", 90), ("1.5", 1.5), ("date", 90), ("0", 1), ("past", 1), ("99999999999999999999", 3600), ("century", 3600)],
)
def test_retry_after_is_kept_by_the_databases_clock(
    twilio: TwilioStandIn,
    sender: TwilioSender,
    conversation: CloseEngineConversation,
    close_engine_clock: MovableClock,
    status: int,
    retry_after: str,
    seconds: float,
) -> None:
    # The database's clock is far from this machine's.
    close_engine_clock.now = datetime(2031, 5, 6, 7, 8, 9, tzinfo=timezone.utc)
    message = say(conversation)
    dates = {"date": timedelta(seconds=90), "past": -timedelta(days=1), "century": timedelta(days=36500)}
    header = retry_after
    if retry_after in dates:
        header = format_datetime(moment() + dates[retry_after], usegmt=True)
    twilio.failures.append(Reply(status, b"{}", {"Retry-After": header}))
    deliver(sender)
    waiting = copy_of(message)
    assert (waiting.status, waiting.attempts) == (MessageStatus.PENDING, 0)
    assert waiting.available_at - moment() == timedelta(seconds=seconds)


@on_one_database
@pytest.mark.parametrize("retry_after", ["soon", "", "-5", "nan", "1e9", "Thu, 99 Foo 2031 00:00:00 GMT", "１x"])
def test_a_retry_after_that_says_nothing_is_a_failure_like_any_other(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, retry_after: str
) -> None:
    header = retry_after.encode().decode("latin-1")
    twilio.failures.append(Reply(429, b'{"code": 20429, "message": "Too many requests"}', {"Retry-After": header}))
    message = say(conversation)
    deliver(sender)
    assert copy_of(message).attempts == 1


@on_one_database
def test_an_answer_without_a_sid_is_no_success(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    twilio.failures.append(Reply(201, b"[]"))
    message = say(conversation)
    deliver(sender)
    assert copy_of(message).status is MessageStatus.PENDING


class Silent(TwilioStandIn):
    """Takes every text, and does not answer for some time."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = threading.Event()

    def answer(self, call: Call) -> Reply:
        reply = super().answer(call)
        self.answers.wait(30)
        return reply


@on_one_database
def test_a_text_whose_answer_does_not_come_is_found_and_not_sent_again(
    conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    with Silent() as silent:
        sender = TwilioSender(silent.client(timeout=0.2), from_=silent.number)
        message = say(conversation)
        deliver(sender)
        assert (copy_of(message).status, copy_of(message).attempts) == (MessageStatus.PENDING, 1)
        silent.answers.set()
        close_engine_clock.move(timedelta(hours=1))
        deliver(sender)
        assert [text.sid for text in silent.texts] == [copy_of(message).provider_id]


@on_one_database
def test_only_texts_are_sent(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    outbox.enqueue(conversation, "draft_reply", "what the lead wrote")
    Worker(sender, sweep=None, concurrency=1).run_until_empty()
    assert "topics=list(ActionType)" in error_of(messages()[-1])
    assert twilio.calls == []


def test_a_sender_that_could_not_work_is_refused(twilio: TwilioStandIn) -> None:
    client = twilio.client()
    for options in ({}, {"from_": "+1", "messaging_service_sid": "MG1"}, {"from_": ""}):
        with pytest.raises(ConfigurationError, match="either from_"):
            TwilioSender(client, **options)
    with pytest.raises(ConfigurationError, match="TwilioHttp"):
        TwilioSender(Client("AC1", "token"), from_="+15550199")
    for url in ("crm.example.com/status", "ftp://crm", "https://[", ""):
        with pytest.raises(ConfigurationError, match="status_callback must be a URL"):
            TwilioSender(client, from_="+15550199", status_callback=url)
    for options in ({"auth_token": ""}, {"public_url": "crm.example.com"}, {"unknown": "make"}):
        given: dict[str, Any] = {"auth_token": "t", **options}
        with pytest.raises(ConfigurationError):
            TwilioWebhooks(**given)


@on_one_database
def test_no_secret_is_shown(
    twilio: TwilioStandIn,
    sender: TwilioSender,
    webhooks: TwilioWebhooks,
    conversation: CloseEngineConversation,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    twilio.is_unknown = True
    message = say(conversation)
    deliver(sender)
    ask(twilio, webhooks.text, NUMBER, "hi", signature="forged")
    shown = f"{caplog.text} {sender!r} {webhooks!r} {error_of(message)}"
    assert twilio.auth_token not in shown
    assert "forged" not in shown


# -- finding -----------------------------------------------------------------------------------------------------------


def test_a_text_whose_answer_was_lost_is_found(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    twilio.lost_answers = 1
    message = say(conversation)
    deliver(sender)
    assert copy_of(message).status is MessageStatus.PENDING
    close_engine_clock.move(timedelta(hours=1))
    deliver(sender)
    assert [text.sid for text in twilio.texts] == [copy_of(message).provider_id]


@pytest.mark.parametrize("said_before", [False, True])
def test_a_text_of_a_worker_that_died_before_it_recorded_it_is_found(
    twilio: TwilioStandIn,
    sender: TwilioSender,
    conversation: CloseEngineConversation,
    close_engine_clock: MovableClock,
    said_before: bool,
) -> None:
    if said_before:
        say(conversation, "Still there?")
        deliver(sender)
    message = say(conversation, "Still there?")
    sender.send(claimed("the one that dies"))
    close_engine_clock.move(timedelta(minutes=10))
    deliver(sender)
    assert len(twilio.texts) == 1 + said_before
    assert copy_of(message).provider_id == twilio.texts[-1].sid


def test_the_same_words_said_before_are_not_this_text(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    say(conversation, "Still there?")
    deliver(sender)
    message = say(conversation, "Still there?")
    claimed("one that dies before it sends")
    close_engine_clock.move(timedelta(minutes=10))
    deliver(sender)
    assert len(twilio.texts) == 2
    assert copy_of(message).provider_id == twilio.texts[-1].sid


def test_a_newer_text_that_is_recorded_does_not_hide_the_right_one(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    message = claimed() if say(conversation, "Hi") else None
    assert message is not None
    sid = sender.send(message)
    other = open_conversation(new_lead(NUMBER), EntryPoint.SMS_REPLY)
    say(other, "Hi")
    deliver(sender)
    by_a_human = twilio.client().messages.create(to=NUMBER, from_=twilio.number, body="Hi")
    record_sent(conversation.lead_id, by_a_human.sid, "Hi", author="dana")
    assert len(twilio.texts) == 3
    assert sender.find(message) == sid


def test_what_a_status_callback_has_told_needs_no_question(
    twilio: TwilioStandIn, sender: TwilioSender, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    say(conversation)
    message = claimed()
    sid = sender.send(message)
    assert tell(twilio, webhooks, twilio.texts[0], "sent").status == 200
    asked = len(twilio.calls)
    assert sender.find(message) == sid
    assert len(twilio.calls) == asked


@on_one_database
@pytest.mark.parametrize("status", ["failed", "undelivered", "canceled"])
@pytest.mark.parametrize("is_told", [False, True])
def test_what_reached_nobody_has_not_left(
    twilio: TwilioStandIn,
    sender: TwilioSender,
    webhooks: TwilioWebhooks,
    conversation: CloseEngineConversation,
    status: str,
    is_told: bool,
) -> None:
    say(conversation)
    message = claimed()
    sender.send(message)
    if is_told:  # before Twilio's list says so
        tell(twilio, webhooks, twilio.texts[0], status)
    else:
        twilio.texts[0].status = status
    assert sender.find(message) is None


@on_one_database
@pytest.mark.parametrize("status", ["accepted", "queued", "sending", "sent", "delivered", "something new"])
def test_what_is_on_its_way_has_left(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, status: str
) -> None:
    say(conversation)
    message = claimed()
    sid = sender.send(message)
    twilio.texts[0].status = status
    assert sender.find(message) == sid


def test_an_undelivered_text_that_was_put_back_is_sent_anew(
    twilio: TwilioStandIn,
    sender: TwilioSender,
    webhooks: TwilioWebhooks,
    conversation: CloseEngineConversation,
    close_engine_clock: MovableClock,
) -> None:
    message = say(conversation)
    deliver(sender)
    tell(twilio, webhooks, twilio.texts[0], "undelivered", 30003)
    assert [line.error for line in outbox.undelivered_lines()] == ["30003"]
    outbox.requeue(message)
    twilio.texts[0].status = "sent"  # what Twilio's list says does not matter: it is another sending's
    deliver(sender)
    assert len(twilio.texts) == 2
    assert copy_of(message).provider_id == twilio.texts[1].sid


@on_one_database
def test_other_numbers_senders_words_and_times_are_not_this_text(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    client = twilio.client()
    client.messages.create(to=NUMBER, from_=twilio.number, body="Hello!")
    close_engine_clock.move(timedelta(minutes=10))
    say(conversation)
    message = claimed()
    client.messages.create(to="+15550101", from_=twilio.number, body="Hello!")
    client.messages.create(to=NUMBER, from_="+15550198", body="Hello!")
    client.messages.create(to=NUMBER, from_=twilio.number, body="Hello")
    assert sender.find(message) is None
    sid = client.messages.create(to=NUMBER, from_=twilio.number, body=" Hello! \n").sid
    assert sender.find(message) == sid


def test_it_is_found_at_the_number_that_the_lead_had(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    say(conversation)
    message = claimed()
    sid = sender.send(message)
    Lead.update(phone="+15550177").where(Lead.id == conversation.lead_id).execute()
    assert sender.find(message) == sid


@on_one_database
def test_a_text_is_found_on_a_later_page(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    say(conversation)
    message = claimed()
    sid = sender.send(message)
    for number in range(450):
        twilio.texts.append(SentText(f"SM{number}", NUMBER, twilio.number, "more", None, close_engine_clock.now))
    assert sender.find(message) == sid
    asked = len(twilio.calls)
    for number in range(2000):
        twilio.texts.append(SentText(f"SN{number}", NUMBER, twilio.number, "more", None, close_engine_clock.now))
    assert sender.find(message) is None
    assert len(twilio.calls) == asked + 5


@on_one_database
@pytest.mark.parametrize("status", [400, 401, 422, 429, 500])
def test_an_error_is_no_answer_and_nothing_is_sent(
    twilio: TwilioStandIn,
    sender: TwilioSender,
    conversation: CloseEngineConversation,
    close_engine_clock: MovableClock,
    status: int,
) -> None:
    message = say(conversation)
    sender.send(claimed())
    close_engine_clock.move(timedelta(minutes=10))
    twilio.failures.append(Reply(status, b'{"code": 21211, "message": "no"}'))
    deliver(sender)
    assert len(twilio.texts) == 1
    assert copy_of(message).status is MessageStatus.PENDING
    close_engine_clock.move(timedelta(hours=1))
    deliver(sender)
    assert [text.sid for text in twilio.texts] == [copy_of(message).provider_id]


def test_a_lead_that_is_gone_was_never_found(
    twilio: TwilioStandIn, sender: TwilioSender, conversation: CloseEngineConversation
) -> None:
    say(conversation)
    message = claimed()
    Lead.delete().where(Lead.id == conversation.lead_id).execute()
    assert sender.find(message) is None
    with pytest.raises(close_engine.CannotBeSent):
        sender.send(message)


# -- texts that come in ------------------------------------------------------------------------------------------------


def ask(
    twilio: TwilioStandIn,
    function: Callable[..., WebhookResponse],
    number: str,
    body: str,
    *,
    url: str = TEXTS_URL,
    signature: str | None = "",
    **options: Any,
) -> WebhookResponse:
    """Make the request of a text, signed as Twilio signs it."""
    form = twilio.inbound(number, body, **options)
    return function(url, form, twilio.signature(url, form) if signature == "" else signature)


def tell(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, text: SentText, status: str, code: int | None = None
) -> WebhookResponse:
    """Make the request of a status callback to a URL that nobody serves."""
    form = {"MessageSid": text.sid, "MessageStatus": status, **({} if code is None else {"ErrorCode": str(code)})}
    url = text.status_callback or STATUS_URL
    return webhooks.status(url, form, twilio.signature(url, form))


def entries() -> list[InboxEntry]:
    return list(InboxEntry.select().order_by(InboxEntry.id))


def test_a_leads_text_is_received_and_answered_with_no_words(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database
) -> None:
    lead = new_lead("+1 (555) 0100")
    response = ask(twilio, webhooks.text, NUMBER, "Yes, let's go! 🍞", sid="SM1")
    assert response == WebhookResponse(200, TWIML, "text/xml")
    (entry,) = entries()
    assert (entry.key, entry.lead_id, entry.body) == ("SM1", lead.id, "Yes, let's go! 🍞")
    assert entry.metadata == {"provider": "twilio", "from": NUMBER, "to": twilio.number}
    assert copy_of(lead).close_conversation.entry_point is EntryPoint.SMS_REPLY
    assert Lead.select().count() == 1


def test_the_same_request_again_changes_nothing(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    close_engine.subscribe("draft_reply", events=["lead:wrote"])
    for _ in range(3):
        assert ask(twilio, webhooks.text, NUMBER, "hi", sid="SM1").status == 200
    assert (len(entries()), len(messages())) == (1, 1)


@on_one_database
def test_a_request_that_is_not_signed_by_twilio_does_nothing(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    form = twilio.inbound(NUMBER, "STOP")
    signature = twilio.signature(TEXTS_URL, form)
    assert webhooks.text(TEXTS_URL, form, None).status == 403
    assert webhooks.text(TEXTS_URL, form, "").status == 403
    assert webhooks.text(TEXTS_URL, form, signature[:-4]).status == 403
    assert webhooks.text(TEXTS_URL, form, "é" * 28).status == 403
    assert webhooks.text(f"{TEXTS_URL}?a=1", form, signature).status == 403
    assert webhooks.text(STATUS_URL, form, signature).status == 403
    assert webhooks.text(TEXTS_URL, {**form, "Body": "START"}, signature).status == 403
    assert webhooks.text(TEXTS_URL, {**form, "More": "x"}, signature).status == 403
    assert webhooks.status(STATUS_URL, {"MessageSid": "SM1", "MessageStatus": "sent"}, signature).status == 403
    assert TwilioWebhooks("another").text(TEXTS_URL, form, signature).status == 403
    assert entries() == []
    assert Delivery.select().count() == 0
    assert opted_out(conversation.lead_id) is None


@on_one_database
def test_a_frameworks_own_form_is_a_form(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    fields: list[Any] = [*twilio.inbound(NUMBER, "hi").items(), ("Twice", "b"), ("Twice", "a")]
    form: Any = FormData(fields)
    cut: Any = FormData(fields[:-1])
    signature = RequestValidator(twilio.auth_token).compute_signature(TEXTS_URL, form)
    assert webhooks.text(TEXTS_URL, form, signature).status == 200
    assert webhooks.text(TEXTS_URL, cut, signature).status == 403
    assert [entry.body for entry in entries()] == ["hi"]


@on_one_database
def test_a_truncated_request_does_nothing(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    form = twilio.inbound(NUMBER, "Not now, but stop by tomorrow", sid="SM1")
    signature, body = twilio.signature(TEXTS_URL, form), urlencode(form)
    for length in range(0, len(body), 7):
        cut = dict(parse_qsl(body[:length], keep_blank_values=True))
        assert webhooks.text(TEXTS_URL, cut, signature).status == 403
    assert entries() == []
    assert webhooks.text(TEXTS_URL, form, signature).status == 200


@on_one_database
@pytest.mark.parametrize(
    ("public_url", "requested", "signed"),
    [
        (None, "https://crm.example.com/texts?a=%20b&c", "https://crm.example.com/texts?a=%20b&c"),
        (None, "https://crm.example.com:8443/texts", "https://crm.example.com:8443/texts"),
        ("https://crm.example.com", "http://127.0.0.1:8000/texts?a=%20b", "https://crm.example.com/texts?a=%20b"),
        ("https://crm.example.com/", "http://app/texts", "https://crm.example.com/texts"),
        ("https://crm.example.com/engine/", "http://app:80/texts?x", "https://crm.example.com/engine/texts?x"),
        ("https://crm.example.com/engine", "http://app/engine/texts", "https://crm.example.com/engine/texts"),
        ("https://crm.example.com/te", "http://app/texts", "https://crm.example.com/te/texts"),
    ],
)
def test_behind_a_proxy_the_signature_is_of_the_public_url(
    twilio: TwilioStandIn, database: peewee.Database, public_url: str | None, requested: str, signed: str
) -> None:
    webhooks = TwilioWebhooks(twilio.auth_token, public_url=public_url)
    form = twilio.inbound(NUMBER, "hi")
    assert webhooks.text(requested, form, twilio.signature(signed, form)).status == 200
    assert webhooks.text(requested, form, twilio.signature("http://app/other", form)).status == 403


@on_one_database
@pytest.mark.parametrize("field", ["MessageSid", "From"])
@pytest.mark.parametrize("value", [None, "", " ", "a\x00b", "\x00", "1" * 10000])
def test_a_text_without_an_id_or_a_sender_is_malformed(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database, field: str, value: str | None
) -> None:
    form: dict[str, Any] = {**twilio.inbound(NUMBER, "hi"), field: value}
    if value is None:
        del form[field]
    assert webhooks.text(TEXTS_URL, form, twilio.signature(TEXTS_URL, form)).status == 400
    assert entries() == []


@pytest.mark.parametrize(
    ("url", "form"),
    [
        (TEXTS_URL, {"From": "\udce9"}),
        (TEXTS_URL, {"From": b"+15550100"}),
        (TEXTS_URL, {"From": 7}),
        (TEXTS_URL, {"From": None}),
        (TEXTS_URL, None),
        ("https://crm:port/texts", {"From": NUMBER}),
        ("https://[/texts", {"From": NUMBER}),
    ],
)
def test_what_cannot_have_been_signed_is_malformed(webhooks: TwilioWebhooks, url: str, form: Any) -> None:
    assert webhooks.text(url, form, "x" * 28).status in (400, 403)
    assert webhooks.status(url, form, "x" * 28).status in (400, 403)


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
FORMS = st.fixed_dictionaries(
    {},
    optional={
        "MessageSid": ANY_TEXT,
        "From": st.one_of(ANY_TEXT, st.just(NUMBER), st.just("+999999999999999999")),
        "Body": ANY_TEXT,
        "To": ANY_TEXT,
        "NumMedia": ANY_TEXT,
        "MediaUrl0": ANY_TEXT,
        "MediaContentType0": ANY_TEXT,
        "OptOutType": st.sampled_from(["STOP", "START", "HELP", "?"]),
        "MessageStatus": st.one_of(ANY_TEXT, st.sampled_from(["sent", "Failed "])),
        "ErrorCode": st.one_of(ANY_TEXT, st.just("21610")),
    },
)


@on_one_database
def test_no_signed_request_is_an_error(twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: object) -> None:
    @settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(FORMS, ANY_TEXT)
    def try_it(form: dict[str, str], send_key: str) -> None:
        url = f"{STATUS_URL}?{urlencode({'send_key': send_key})}"
        assert webhooks.text(TEXTS_URL, form, twilio.signature(TEXTS_URL, form)).status in (200, 400)
        assert webhooks.status(url, form, twilio.signature(url, form)).status in (200, 400)

    try_it()


def test_a_body_with_a_character_that_no_database_keeps_is_received(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    assert ask(twilio, webhooks.text, NUMBER, "yes\x00!").status == 200
    assert entries()[0].body == "yes!"


@on_one_database
def test_an_unknown_sender_is_ignored_and_that_is_logged(
    twilio: TwilioStandIn, database: peewee.Database, caplog: pytest.LogCaptureFixture
) -> None:
    for webhooks in (TwilioWebhooks(twilio.auth_token), TwilioWebhooks(twilio.auth_token, unknown=lambda _: None)):
        assert ask(twilio, webhooks.text, NUMBER, "hi there", sid="SM1").status == 200
    assert (entries(), Lead.select().count()) == ([], 0)
    assert caplog.messages == ["ignored text=SM1 from=+15550100: no lead has this number"] * 2


@pytest.mark.parametrize(("body", "kind_of"), [("Stop.", ""), ("ARRET", "STOP")])
def test_a_stop_of_a_number_that_no_lead_has_is_kept_for_the_lead_that_gets_it(
    twilio: TwilioStandIn, database: peewee.Database, body: str, kind_of: str
) -> None:
    """The CRM makes the lead a minute later, and would text it."""
    webhooks = TwilioWebhooks(twilio.auth_token)
    for _ in range(2):  # Twilio's retry
        ask(twilio, webhooks.text, NUMBER, body, sid="SM1", OptOutType=kind_of)
    lead = new_lead(NUMBER)
    with pytest.raises(LeadOptedOut):
        open_conversation(lead, EntryPoint.REP_CLOSE)
    assert (opted_out(lead).number, OptOut.select().count()) == (NUMBER, 1)


def test_a_start_of_a_number_that_no_lead_has_lifts_its_stop_once(
    twilio: TwilioStandIn, database: peewee.Database
) -> None:
    webhooks = TwilioWebhooks(twilio.auth_token)
    ask(twilio, webhooks.text, NUMBER, "STOP", sid="SM1")
    for body, sid in (("START", "SM2"), ("STOP", "SM1"), ("hello", "SM3")):
        ask(twilio, webhooks.text, NUMBER, body, sid=sid)
    assert OptOut.get().lifted_at is not None
    ask(twilio, webhooks.text, NUMBER, "STOP", sid="SM4")
    ask(twilio, webhooks.text, NUMBER, "START", sid="SM2")
    assert opted_out(new_lead(NUMBER)).key == "twilio:SM4"


@on_one_database
def test_a_start_that_comes_again_after_a_stop_lifts_nothing(twilio: TwilioStandIn, database: peewee.Database) -> None:
    webhooks = TwilioWebhooks(twilio.auth_token)
    for body, sid in (("START", "SM1"), ("STOP", "SM2"), ("START", "SM1")):
        ask(twilio, webhooks.text, NUMBER, body, sid=sid)
    assert opted_out(new_lead(NUMBER)) is not None


@on_one_database
def test_a_second_stop_that_comes_again_after_a_start_opts_nobody_out(
    twilio: TwilioStandIn, database: peewee.Database
) -> None:
    webhooks = TwilioWebhooks(twilio.auth_token)
    for body, sid in (("STOP", "SM1"), ("STOP", "SM2"), ("START", "SM3"), ("STOP", "SM2")):
        ask(twilio, webhooks.text, NUMBER, body, sid=sid)
    assert opted_out(new_lead(NUMBER)) is None


@on_one_database
@pytest.mark.parametrize("sender", ["24273", "AMAZON", "whatsapp:+15550100", "messenger:7", "15550100", "+", "Анна"])
def test_who_cannot_be_texted_back_makes_no_lead(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database, sender: str
) -> None:
    assert ask(twilio, webhooks.text, sender, "Your code is 1234").status == 200
    assert (entries(), Lead.select().count()) == ([], 0)


def test_an_unknown_sender_may_become_a_lead(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database
) -> None:
    ask(twilio, webhooks.text, NUMBER, "I need a site", sid="SM1")
    ask(twilio, webhooks.text, NUMBER, "for my bakery", sid="SM2")
    lead = Lead.get()
    assert (lead.phone, lead.close_conversation.stage) == (NUMBER, Stage.INITIATED)
    assert [(entry.lead_id, entry.body) for entry in entries()] == [
        (lead.id, "I need a site"),
        (lead.id, "for my bakery"),
    ]


def test_a_lead_that_cannot_be_made_leaves_nothing_behind(twilio: TwilioStandIn, database: peewee.Database) -> None:
    def make(number: str) -> Lead:
        Lead.create(phone=number)
        raise OSError("the CRM is away")

    with pytest.raises(OSError, match="the CRM is away"):
        ask(twilio, TwilioWebhooks(twilio.auth_token, unknown=make).text, NUMBER, "hi")
    assert (entries(), Lead.select().count()) == ([], 0)


def test_a_lead_without_a_number_gets_no_conversation_but_its_text_is_kept(
    twilio: TwilioStandIn, database: peewee.Database, caplog: pytest.LogCaptureFixture
) -> None:
    webhooks = TwilioWebhooks(twilio.auth_token, unknown=lambda _: new_lead(None, id="nobody").id)
    assert ask(twilio, webhooks.text, NUMBER, "hi").status == 200
    assert [(entry.lead_id, entry.body) for entry in entries()] == [("nobody", "hi")]
    assert "not opened" in caplog.text


@pytest.mark.parametrize("phone", ["+1 555 010 0100", "001-555-010-0100", "tel:+1(555)010-0100 ", "+१५५५०१००१००"])
def test_a_lead_of_the_crm_without_a_conversation_is_found(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database, phone: str
) -> None:
    lead = new_lead(phone)
    for number in range(20):
        new_lead(f"+1555010{number:04}1")
    ask(twilio, webhooks.text, "+15550100100", "hi")
    assert [entry.lead_id for entry in entries()] == [lead.id]


def test_six_first_texts_at_once_make_one_lead_and_one_conversation(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database
) -> None:
    def first(number: int) -> Callable[[], WebhookResponse]:
        return lambda: ask(twilio, webhooks.text, NUMBER, f"text {number}", sid=f"SM{number % 5}")

    for response in race([first(number) for number in range(6)]):
        assert response == WebhookResponse(200, TWIML, "text/xml")
    assert (Lead.select().count(), CloseEngineConversation.select().count(), len(entries())) == (1, 1, 5)
    assert {entry.conversation_id for entry in entries()} == {CloseEngineConversation.get().id}


def test_texts_of_two_new_numbers_do_not_wait_for_each_other(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, postgres: peewee.Database
) -> None:
    with postgres.atomic():
        ask(twilio, webhooks.text, NUMBER, "hi")
        assert race([lambda: ask(twilio, webhooks.text, "+15550101", "hi").status]) == [200]


# -- shared numbers ----------------------------------------------------------------------------------------------------


@on_one_database
@pytest.mark.parametrize(
    ("stages", "whose"),
    [
        ([Stage.QUALIFYING, Stage.CLOSED_LOST], 0),
        ([Stage.CLOSED_LOST, Stage.QUALIFYING], 1),
        ([Stage.BUILDING, Stage.COMPLETED, Stage.STALLED], 0),
        ([Stage.STALLED, Stage.CLOSED_LOST], 0),
        ([Stage.CLOSED_LOST, Stage.COMPLETED], 1),
        ([Stage.COMPLETED, Stage.CLOSED_LOST], 1),
        ([Stage.QUALIFYING, Stage.BUILDING], 1),
        ([Stage.QUALIFYING, None], 0),
        ([Stage.CLOSED_LOST, None], 1),
        ([None, Stage.COMPLETED], 0),
    ],
)
def test_a_shared_number_is_the_leads_whose_conversation_is_open_or_else_the_newest_leads(
    twilio: TwilioStandIn,
    webhooks: TwilioWebhooks,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    caplog: pytest.LogCaptureFixture,
    stages: list[Stage | None],
    whose: int,
) -> None:
    ids = []
    for number, stage in enumerate(stages):
        close_engine_clock.move(timedelta(minutes=1))
        lead = f"lead-{9 - number}"
        ids.append(new_lead(id=lead).id if stage is None else conversation_in(stage, id=lead).lead_id)
    assert ask(twilio, webhooks.text, NUMBER, "hi").status == 200
    (entry,) = entries()
    assert entry.lead_id == ids[whose]
    others = [lead for lead in ids if lead != entry.lead_id]
    if None not in stages or stages[0] is not Stage.QUALIFYING:
        assert sorted(entry.metadata["sharedWith"]) == sorted(others)
        assert "shared number" in caplog.text


# -- whoever wrote -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.BUILDING, Stage.PENDING_APPROVAL, *list(Stage)[-3:]])
def test_a_text_is_kept_in_every_stage(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation_in: ConversationIn, stage: Stage
) -> None:
    conversation = conversation_in(stage)
    assert ask(twilio, webhooks.text, NUMBER, "hi").status == 200
    assert [entry.conversation_id for entry in entries()] == [conversation.id]
    after = {Stage.CLOSED_LOST: Stage.INITIATED, Stage.STALLED: Stage.QUALIFYING}.get(stage, stage)
    assert copy_of(conversation).stage is after


def test_who_opted_out_is_heard_and_not_answered(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    for body in ("Stop.", "hello?"):
        assert ask(twilio, webhooks.text, NUMBER, body).status == 200
    assert opted_out(conversation.lead_id) is not None
    assert copy_of(conversation).stage is Stage.CLOSED_LOST
    assert [entry.body for entry in entries()] == ["Stop.", "hello?"]
    ask(twilio, webhooks.text, NUMBER, "START")
    assert opted_out(conversation.lead_id) is None


def test_a_word_of_ones_own_that_only_twilio_knows_opts_out_and_in(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    ask(twilio, webhooks.text, NUMBER, "ARRET", OptOutType="STOP", sid="SM1")
    assert opted_out(conversation.lead_id).source == "provider"
    ask(twilio, webhooks.text, NUMBER, "OUI", OptOutType="START", sid="SM2")
    assert opted_out(conversation.lead_id) is None
    ask(twilio, webhooks.text, NUMBER, "ARRET", OptOutType="STOP", sid="SM1")
    assert opted_out(conversation.lead_id) is None


def test_a_stop_that_comes_again_after_a_start_changes_nothing(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    for body, sid in (("STOP", "SM1"), ("START", "SM2"), ("STOP", "SM1")):
        ask(twilio, webhooks.text, NUMBER, body, OptOutType=body, sid=sid)
    assert opted_out(conversation.lead_id) is None
    assert len(entries()) == 2


def test_a_stop_that_comes_first_makes_a_lead_that_is_never_texted(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database
) -> None:
    ask(twilio, webhooks.text, NUMBER, "STOP", OptOutType="STOP")
    assert opted_out(Lead.get()) is not None
    assert CloseEngineConversation.select().count() == 0


def test_a_conversation_that_cannot_be_read_is_no_endless_retry(
    twilio: TwilioStandIn,
    webhooks: TwilioWebhooks,
    conversation: CloseEngineConversation,
    foreign: ForeignWriter,
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil(foreign, "close_engine_conversations", "entry_point", "WEB_FORM", conversation.id)
    assert ask(twilio, webhooks.text, NUMBER, "hi", sid="SM1").status == 200
    assert [(entry.key, entry.body) for entry in entries()] == [("SM1", "hi")]
    assert "must be answered by hand" in caplog.text
    assert ask(twilio, webhooks.text, NUMBER, "hi", sid="SM1").status == 200


def test_a_text_that_was_another_leads_when_it_came_first_is_not_moved(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    ask(twilio, webhooks.text, NUMBER, "hi", sid="SM1")
    Lead.update(phone="+15550177").where(Lead.id == conversation.lead_id).execute()
    new_lead(NUMBER)
    assert ask(twilio, webhooks.text, NUMBER, "hi", sid="SM1").status == 200
    assert [entry.lead_id for entry in entries()] == [conversation.lead_id]


def test_a_hook_that_fails_after_the_commit_is_no_reason_to_try_again(
    twilio: TwilioStandIn,
    webhooks: TwilioWebhooks,
    conversation_in: ConversationIn,
    caplog: pytest.LogCaptureFixture,
) -> None:
    conversation = conversation_in(Stage.STALLED)

    @after_commit(Stage.QUALIFYING)
    def hook(*_: object) -> None:
        raise OSError("no disk")

    try:
        assert ask(twilio, webhooks.text, NUMBER, "hi").status == 200
    finally:
        hook.remove()
    assert len(entries()) == 1
    assert copy_of(conversation).stage is Stage.QUALIFYING
    assert "no disk" in caplog.text


# -- pictures ----------------------------------------------------------------------------------------------------------


@on_one_database
@pytest.mark.parametrize(
    ("body", "media", "shown"),
    [
        ("", ["image/jpeg"], "(a picture)"),
        (" ", ["image/jpeg", "image/png"], "(2 pictures)"),
        ("", ["audio/amr", "video/mp4", "text/x-vcard", ""], "(a recording, a video, 2 files)"),
        ("My logo", ["image/png"], "My logo"),
        ("", [], "(an empty text)"),
    ],
)
def test_what_came_with_a_text_is_kept_and_shown(
    twilio: TwilioStandIn,
    webhooks: TwilioWebhooks,
    conversation: CloseEngineConversation,
    body: str,
    media: list[str],
    shown: str,
) -> None:
    ask(twilio, webhooks.text, NUMBER, body, media=media, sid="MM1")
    (text,) = copy_of(conversation).messages()
    assert text.body == shown
    assert copy_of(conversation).messages().as_prompt() == [{"role": "user", "content": shown}]
    kept = text.payload.get("media", [])
    assert [each["type"] for each in kept] == [kind or "application/octet-stream" for kind in media]
    assert all(each["url"].startswith(twilio.url) for each in kept)


def test_a_stop_with_a_picture_is_a_stop(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    ask(twilio, webhooks.text, NUMBER, "STOP", media=["image/gif"])
    assert opted_out(conversation.lead_id) is not None


# -- what became of texts ----------------------------------------------------------------------------------------------


@on_one_database
@pytest.mark.parametrize("order", [("queued", "sent", "delivered"), ("delivered", "sent", "queued", "sent")])
@pytest.mark.parametrize("is_early", [False, True])
def test_a_delivery_is_recorded_in_any_order(
    twilio: TwilioStandIn,
    sender: TwilioSender,
    webhooks: TwilioWebhooks,
    conversation: CloseEngineConversation,
    order: tuple[str, ...],
    is_early: bool,
) -> None:
    message = say(conversation)
    in_flight = claimed()
    sid = sender.send(in_flight)
    if not is_early:
        in_flight.sent(sid)
    for status in order:
        assert tell(twilio, webhooks, twilio.texts[0], status) == WebhookResponse(200, TWIML, "text/xml")
    if is_early:
        in_flight.sent(sid)
    assert copy_of(message).delivery.status is DeliveryStatus.DELIVERED
    assert Delivery.select().count() == 1


def test_why_a_text_was_not_delivered_is_recorded(
    twilio: TwilioStandIn, sender: TwilioSender, webhooks: TwilioWebhooks, conversation: CloseEngineConversation
) -> None:
    message = say(conversation)
    deliver(sender)
    tell(twilio, webhooks, twilio.texts[0], "undelivered", 30005)
    assert (copy_of(message).delivery.status, copy_of(message).delivery.error) == (DeliveryStatus.UNDELIVERED, "30005")


@on_one_database
def test_a_word_that_nobody_knows_is_logged(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database, caplog: pytest.LogCaptureFixture
) -> None:
    text = SentText("SM1", NUMBER, twilio.number, "hi", f"{STATUS_URL}?send_key=k", moment())
    assert tell(twilio, webhooks, text, "partially_delivered").status == 200
    assert Delivery.select().count() == 0
    assert "nobody knows the word 'partially_delivered'" in caplog.text


@on_one_database
@pytest.mark.parametrize(
    ("query", "form"),
    [
        ("", {"MessageStatus": "sent"}),
        ("", {"MessageSid": " ", "MessageStatus": "sent"}),
        ("", {"MessageSid": "SM1"}),
        ("", {"MessageSid": "SM\x00", "MessageStatus": "sent"}),
        ("?send_key=%00", {"MessageSid": "SM1", "MessageStatus": "sent"}),
    ],
)
def test_a_status_that_says_nothing_is_malformed(
    twilio: TwilioStandIn, webhooks: TwilioWebhooks, database: peewee.Database, query: str, form: dict[str, str]
) -> None:
    url = f"{STATUS_URL}{query}"
    assert webhooks.status(url, form, twilio.signature(url, form)).status == 400


@pytest.mark.parametrize("is_recorded", [False, True])
def test_an_opt_out_that_twilio_learns_of_later_is_kept(
    twilio: TwilioStandIn,
    sender: TwilioSender,
    webhooks: TwilioWebhooks,
    conversation: CloseEngineConversation,
    is_recorded: bool,
) -> None:
    say(conversation)
    message = claimed()
    sid = sender.send(message)
    if is_recorded:
        message.sent(sid)
    tell(twilio, webhooks, twilio.texts[0], "failed", 21610)
    assert opted_out(conversation.lead_id).source == "provider"
    opt_in(conversation.lead_id, source="dana")
    tell(twilio, webhooks, twilio.texts[0], "failed", 21610)
    assert opted_out(conversation.lead_id) is None


# -- over HTTP ---------------------------------------------------------------------------------------------------------


class Crm(StandIn):
    """Serves the webhooks on the loopback address, behind no proxy."""

    webhooks: TwilioWebhooks

    def answer(self, call: Call) -> Reply:
        url = f"{self.url}{call.path}" + (f"?{urlencode(call.query)}" if call.query else "")
        function = self.webhooks.text if call.path == "/texts" else self.webhooks.status
        with current().database.connection_context():
            response = function(url, call.form, call.headers.get("x-twilio-signature"))
        return Reply(response.status, response.text.encode(), media_type=response.media_type)


@pytest.fixture
def crm() -> Iterator[Crm]:
    with Crm() as served:
        yield served


def test_a_text_and_what_became_of_it_over_http(crm: Crm, database: peewee.Database) -> None:
    with TwilioStandIn(reports=("sent", "delivered")) as twilio:
        crm.webhooks = TwilioWebhooks(twilio.auth_token, unknown=create_lead)
        assert twilio.text_from(NUMBER, "I need a site", f"{crm.url}/texts") == (200, TWIML)
        assert twilio.text_from(NUMBER, "x", f"{crm.url}/texts", signed_as=TEXTS_URL).status == 403
        message = submit(CloseEngineConversation.get(), ActionType.SEND_MESSAGE, "What do you bake?")
        deliver(TwilioSender(twilio.client(), from_=twilio.number, status_callback=f"{crm.url}/status"))
    assert [answered.status for answered in twilio.reported] == [200, 200]
    assert twilio.delivered_to(NUMBER) == ["What do you bake?"]
    assert copy_of(message).delivery.status is DeliveryStatus.DELIVERED


# -- the stand-in itself, as the SDK sees it ---------------------------------------------------------------------------


def test_the_stand_in_answers_the_sdk_as_twilio_does(close_engine_clock: MovableClock) -> None:
    with TwilioStandIn(clock=lambda: close_engine_clock.now) as twilio:
        client = twilio.client()
        first = client.messages.create(to=NUMBER, from_=twilio.number, body="one")
        close_engine_clock.move(timedelta(days=2))
        for number in range(5):
            client.messages.create(to=NUMBER, messaging_service_sid="MG1", body=str(number))
        assert (first.status, first.direction, first.date_sent) == ("queued", "outbound-api", None)
        assert client.messages(first.sid).fetch().body == "one"
        assert [text.body for text in client.messages.list(to=NUMBER, page_size=2)] == ["4", "3", "2", "1", "0", "one"]
        assert [text.body for text in client.messages.list(from_=twilio.number)] == ["one"]
        since = close_engine_clock.now - timedelta(days=1)
        assert len(client.messages.list(date_sent_after=since, limit=3)) == 3
        assert len(client.messages.list(date_sent_after=since)) == 5
        assert client.messages.list(to="+15550101") == []
        twilio.refused["+15550101"] = 21610
        for options, code in (
            ({"to": "+15550101", "body": "x"}, 21610),
            ({"to": "1", "body": "x"}, 21211),
            ({"to": NUMBER, "body": ""}, 21602),
        ):
            with pytest.raises(TwilioRestException) as refusal:
                client.messages.create(from_=twilio.number, **options)
            assert refusal.value.code == code
        with pytest.raises(TwilioRestException) as refusal:
            Client(twilio.account_sid, "wrong", http_client=TwilioHttp(base_url=twilio.url)).messages(first.sid).fetch()
        assert (refusal.value.status, refusal.value.code) == (401, 20003)


def test_the_http_client_speaks_to_another_server_with_its_query_and_a_timeout() -> None:
    class Echo(StandIn):
        def answer(self, call: Call) -> Reply:
            return Reply(200)

    with Echo() as echo:
        http = TwilioHttp(base_url=f"{echo.url}/proxy/")
        http.request("GET", "https://api.twilio.com/2010-04-01/Accounts.json?Page=1", params={"PageSize": 2})
        assert (echo.calls[0].path, echo.calls[0].query) == (
            "/proxy/2010-04-01/Accounts.json",
            {"Page": "1", "PageSize": "2"},
        )
    assert (http.timeout, TwilioHttp(timeout=3).timeout) == (10.0, 3)
    assert urlsplit(echo.url).hostname == "127.0.0.1"
