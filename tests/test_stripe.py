"""Stripe: the real SDK makes links, its own signer signs what the webhook gets, and no money is lost."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import peewee
import pytest
import requests
import stripe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConfigurationError,
    ConversationNotFound,
    EntryPoint,
    InboxEntry,
    Lead,
    Stage,
    open_conversation,
    outbox,
    payment_issues,
    submit,
)
from close_engine.integrations.stripe import StripePayments, StripeWebhook, is_live
from close_engine.integrations.webhooks import WebhookResponse
from close_engine.testing import bring_to, new_lead
from close_engine.testing.stand_ins import Call, Reply, StandIn
from close_engine.testing.stripe import PAID, StripeStandIn
from tests.rows import copy_of, triggers
from tests.workers import assert_consistent, held, race, sql

ConversationIn = Callable[..., CloseEngineConversation]

SESSION, INTENT = "checkout.session.completed", "payment_intent.succeeded"


@pytest.fixture
def stand_in() -> Iterator[StripeStandIn]:
    with StripeStandIn() as running:
        yield running


@pytest.fixture
def payments(stand_in: StripeStandIn) -> StripePayments:
    return StripePayments(stand_in.client(), amount=90000, currency="USD", product="A website", live=False)


@pytest.fixture
def webhook(stand_in: StripeStandIn) -> StripeWebhook:
    return StripeWebhook(stand_in.secret, live=False)


def offered(payments: StripePayments, conversation: CloseEngineConversation) -> str:
    """Send the conversation's link, and return it."""
    link = payments.link(conversation)
    submit(copy_of(conversation), ActionType.SEND_PAYMENT_LINK, f"Pay here: {link}", metadata={"paymentUrl": link})
    (message,) = outbox.claim()
    message.sent(f"SM {conversation.id}")
    return link


def shown() -> list[tuple[Any, ...]]:
    return [(entry.issue, entry.amount, entry.conversation_id) for entry in payment_issues()]


def another_link(stand_in: StripeStandIn) -> str:
    """Make a link that names no conversation, as somebody does on Stripe's screen."""
    item: Any = {"price_data": {"currency": "usd", "unit_amount": 5}, "quantity": 1}
    return stand_in.client().v1.payment_links.create({"line_items": [item]}).url


def said(answers: Any) -> list[tuple[int, str]]:
    return [(answer.status, answer.text) for answer in answers]


# -- the link ----------------------------------------------------------------------------------------------------------


def test_a_link_asks_for_the_price_once_and_names_the_conversation(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    url = payments.link(conversation)
    assert payments.link(conversation) == url
    (made,) = stand_in.links.values()
    assert (made["url"], made["amount"], made["currency"]) == (url, 90000, "usd")
    assert made["restrictions"] == {"completed_sessions": {"limit": 1}}
    assert made["metadata"] == made["payment_intent_data"]["metadata"]
    assert made["metadata"] == {
        "close_engine_conversation": conversation.id,
        "close_engine_lead": conversation.lead_id,
        "close_engine_amount": "90000",
        "close_engine_currency": "USD",
    }


def test_each_conversation_and_each_price_has_a_link_of_its_own(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    other = StripePayments(stand_in.client(), amount=1, currency="EUR", product="prod_1")
    links = [payments.link(conversation), payments.link(conversation_in(Stage.QUALIFYING)), other.link(conversation)]
    assert len(set(links)) == 3
    assert stand_in.calls[-1].form["line_items[0][price_data][product]"] == "prod_1"


def test_a_price_of_stripe_says_what_is_to_be_paid(conversation_in: ConversationIn, stand_in: StripeStandIn) -> None:
    price = stand_in.client().v1.prices.create({"currency": "usd", "unit_amount": 7, "product_data": {"name": "Site"}})
    payments = StripePayments(stand_in.client(), price=price.id)
    for stage in (Stage.PREVIEW_SENT, Stage.EDIT_LOOP):
        payments.link(conversation_in(stage))
    assert [link["metadata"]["close_engine_amount"] for link in stand_in.links.values()] == ["7", "7"]
    assert [call.method for call in stand_in.calls if call.path == f"/v1/prices/{price.id}"] == ["GET"]


@pytest.mark.parametrize("where", ["in the outbox", "waiting for approval", "sent", "sent, lost and open again"])
def test_a_link_that_is_stored_is_that_link_when_stripe_has_forgotten_the_key(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, where: str
) -> None:
    level = AutonomyLevel.SEMI_AUTO if where == "waiting for approval" else AutonomyLevel.FULL_AUTO
    conversation = conversation_in(Stage.PREVIEW_SENT, level)
    link = payments.link(conversation)
    submit(conversation, ActionType.SEND_PAYMENT_LINK, "Pay here.", metadata={"paymentUrl": link})
    if where.startswith("sent"):
        outbox.claim()[0].sent("SM1")
    if where.endswith("open again"):
        copy_of(conversation).close_lost("no answer")
        open_conversation(conversation.lead, EntryPoint.REP_CLOSE)
    stand_in.forget_keys()
    assert payments.link(conversation) == link
    assert len(stand_in.links) == 1


def test_a_link_whose_worker_died_is_that_link_and_a_withdrawn_one_is_not(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments
) -> None:
    conversation, other = conversation_in(Stage.PREVIEW_SENT), conversation_in(Stage.PREVIEW_SENT)
    links = {}
    for each in (conversation, other):
        links[each.id] = payments.link(each)
        metadata = {"paymentUrl": links[each.id]}
        message = submit(each, ActionType.SEND_PAYMENT_LINK, "Pay here.", metadata=metadata)
        if each is conversation:
            (message,) = outbox.claim()
        assert isinstance(message, outbox.OutboxMessage)
        message.withdraw("an example")
    stand_in.forget_keys()
    assert payments.link(conversation) == links[conversation.id]
    assert payments.link(other) != links[other.id]


def test_calls_at_once_make_one_link(
    postgres: peewee.Database, stand_in: StripeStandIn, payments: StripePayments
) -> None:
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    found = race([lambda: payments.link(conversation)] * 4)
    assert len(set(found)) == len(stand_in.links) == 1


def test_errors_of_stripe_are_raised_as_they_are(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    stand_in.failures.append(Reply(503, b'{"error": {"message": "Away."}}'))
    with pytest.raises(stripe.APIError, match="Away"):
        payments.link(conversation)
    payments.link(conversation)
    stand_in.failures.append(Reply(503, b'{"error": {"message": "Away."}}'))
    patient = StripePayments(stand_in.client(max_network_retries=1), amount=2, currency="usd", product="Site")
    patient.link(conversation)
    conversation.delete_instance()
    with pytest.raises(ConversationNotFound):
        payments.link(conversation)


def test_what_cannot_be_made_is_refused_in_a_sentence(conversation_in: ConversationIn, stand_in: StripeStandIn) -> None:
    client = stand_in.client()
    for wrong in ({}, {"amount": 1}, {"amount": 1, "currency": "USD", "product": "x", "price": "price_1"}):
        with pytest.raises(ConfigurationError, match="needs the amount"):
            StripePayments(client, **wrong)
    live = StripePayments(client, amount=1, currency="USD", product="x", live=True)
    with pytest.raises(ConfigurationError, match="key is of test mode, and live mode is expected"):
        live.link(conversation_in(Stage.PREVIEW_SENT))
    for secret, tolerance in ((" ", 300), ("whsec_1", 0)):
        with pytest.raises(ConfigurationError):
            StripeWebhook(secret, live=True, tolerance=tolerance)
    with pytest.raises(ConfigurationError, match="sk_live_") as error:
        is_live("pk_live_Xyzzy")
    assert "Xyzzy" not in str(error.value)
    assert "whsec_1" not in repr(StripeWebhook("whsec_1", live=True))


# -- what is paid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [PAID, PAID[::-1], PAID[:1] * 3, PAID[1:], (*PAID, *PAID[::-1])])
def test_a_payment_counts_once_whatever_is_told_of_it_and_in_whatever_order(
    conversation_in: ConversationIn,
    stand_in: StripeStandIn,
    payments: StripePayments,
    webhook: StripeWebhook,
    events: tuple[str, ...],
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    answers = stand_in.pay(offered(payments, conversation), webhook, events=events)
    assert said(answers) == [(200, "recorded"), *[(200, "duplicate")] * (len(events) - 1)]
    (entry,) = InboxEntry.select()
    (intent,) = stand_in.paid_with(payments.link(conversation))
    assert (entry.key, entry.amount, entry.currency, entry.issue) == (intent, 90000, "USD", None)
    change = copy_of(conversation).history()[-1]
    assert (change.trigger, change.actor, change.metadata["event"]) == ("complete", "stripe", stand_in.events[0]["id"])
    assert_consistent()


def test_a_payment_by_bank_counts_when_it_arrives(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    events = (SESSION, "checkout.session.async_payment_succeeded", INTENT)
    answers = stand_in.pay(offered(payments, conversation), webhook, events=events)
    assert said(answers) == [(200, "ignored"), (200, "recorded"), (200, "duplicate")]


@pytest.mark.parametrize("meanwhile", ["stall", "close_lost"])
def test_who_pays_late_has_paid(
    conversation_in: ConversationIn,
    stand_in: StripeStandIn,
    payments: StripePayments,
    webhook: StripeWebhook,
    meanwhile: str,
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    link = offered(payments, conversation)
    copy_of(conversation).fire(meanwhile, reason="no answer")
    stand_in.pay(link, webhook)
    assert triggers(conversation)[-2:] == [meanwhile, "complete"]


def test_who_pays_before_the_worker_has_recorded_the_sending_has_paid(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    link = payments.link(conversation)
    submit(conversation, ActionType.SEND_PAYMENT_LINK, "Pay here.", metadata={"paymentUrl": link})
    (message,) = outbox.claim()
    assert said(stand_in.pay(link, webhook)) == [(200, "recorded"), (200, "duplicate")]
    message.sent("SM1")
    assert (copy_of(conversation).stage, copy_of(conversation).payment_link_url) == (Stage.COMPLETED, link)
    assert shown() == []


def test_what_is_paid_too_little_too_often_and_back_is_shown(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    link = offered(payments, conversation)
    stand_in.links[link.rpartition("/")[2]]["restrictions"] = None
    assert stand_in.pay(link, webhook, amount=50000)[0].text == "partial"
    assert copy_of(conversation).stage is Stage.PAYMENT_SENT
    assert shown() == [("partial", 50000, conversation.id)]
    assert stand_in.pay(link, webhook, amount=40000)[0].text == "recorded"
    assert stand_in.pay(link, webhook)[0].text == "surplus"
    surplus = stand_in.paid_with(link)[-1]
    for amount in (30000, 10000, 30000):
        assert stand_in.refund(surplus, webhook, amount=amount).text == "refunded"
    assert shown() == [("surplus", 90000, conversation.id), ("refunded", 30000, conversation.id)]
    assert copy_of(conversation).stage is Stage.COMPLETED


def test_what_costs_nothing_is_known_by_its_session(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    """A code of 100 % off: no payment intent, and less than the price, so that somebody looks at it."""
    conversation = conversation_in(Stage.PREVIEW_SENT)
    answers = stand_in.pay(offered(payments, conversation), webhook, amount=0, events=(SESSION, SESSION))
    assert said(answers) == [(200, "partial"), (200, "duplicate")]
    assert InboxEntry.get().key.startswith("cs_")


def test_a_part_completes_if_the_webhook_is_told_so(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    webhook = StripeWebhook(stand_in.secret, live=False, partial_completes=True)
    assert stand_in.pay(offered(payments, conversation), webhook, amount=1)[0].text == "partial"
    assert copy_of(conversation).stage is Stage.COMPLETED


@pytest.mark.parametrize("kind", ["sqlite-memory"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.lists(st.sampled_from(["intent", "session", "refund", "more"]), max_size=8))
def test_in_whatever_order_and_how_often_events_come_they_end_alike(
    order: list[str], conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    link, webhook = offered(payments, conversation), StripeWebhook(stand_in.secret, live=False)
    stand_in.pay(link, heard := Ear())
    (intent,) = stand_in.paid_with(link)
    for amount in (100, 300):
        stand_in.refund(intent, heard, amount=amount)
    requests_of = dict(zip(("intent", "session", "refund", "more"), heard.requests, strict=True))
    for name in [*order, *requests_of]:
        assert webhook(*requests_of[name]).status == 200
    kept = [(each.kind, each.amount, each.issue) for each in InboxEntry.select().where(InboxEntry.key == intent)]
    assert sorted(kept) == [("payment", 90000, None), ("refund", 300, "refunded")]
    assert triggers(conversation)[-2:] == ["send_payment_link", "complete"]


class Ear:
    """A webhook that only remembers what it was told."""

    def __init__(self) -> None:
        self.requests: list[tuple[bytes, str | None]] = []

    def __call__(self, body: bytes, signature: str | None) -> WebhookResponse:
        self.requests.append((body, signature))
        return WebhookResponse(200)


@pytest.mark.parametrize("is_matched", [True, False])
def test_two_servers_that_are_told_at_once_keep_one_payment(
    postgres: peewee.Database,
    stand_in: StripeStandIn,
    payments: StripePayments,
    webhook: StripeWebhook,
    is_matched: bool,
) -> None:
    conversation = bring_to(open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.PREVIEW_SENT)
    heard = Ear()
    stand_in.pay(offered(payments, conversation) if is_matched else another_link(stand_in), heard)
    told = [partial(webhook, *request) for request in heard.requests * 2]
    answers = race(told, behind=held(conversation) if is_matched else None)
    words = ["duplicate"] * 3 + ["recorded"] if is_matched else ["kept"] * 4
    assert sorted(said(answers)) == [(200, word) for word in words]
    assert InboxEntry.select().count() == 1


# -- what matches nothing ----------------------------------------------------------------------------------------------


def test_what_matches_nothing_is_kept_and_shown_and_not_asked_for_again(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    unsent, deleted = conversation_in(Stage.QUALIFYING), conversation_in(Stage.PREVIEW_SENT)
    links = [payments.link(unsent), offered(payments, deleted)]
    links.append(another_link(stand_in))
    Lead.delete().where(Lead.id == deleted.lead_id).execute()  # its conversation goes with it
    for link in links:
        assert said(stand_in.pay(link, webhook, events=(*PAID, *PAID))) == [(200, "kept")] * 4
    assert shown() == [("unmatched", 90000, unsent.id), ("unmatched", 90000, None), ("unmatched", 5, None)]
    sentences = [entry.sentence for entry in payment_issues()]
    assert sentences[0].endswith("no payment link was sent to the lead.")
    assert sentences[1:] == [f"There is no conversation {deleted.id!r}.", "It names no conversation."]


def test_what_is_told_first_without_its_conversation_is_recorded_when_that_is_told(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    link = offered(payments, conversation)
    stand_in.links[link.rpartition("/")[2]]["payment_intent_data"]["metadata"] = {}
    assert said(stand_in.pay(link, webhook)) == [(200, "kept"), (200, "recorded")]
    assert shown() == []


def test_a_payment_of_a_lead_that_was_merged_is_the_conversations(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    conversation, kept = conversation_in(Stage.PREVIEW_SENT), new_lead()
    link = offered(payments, conversation)
    old = conversation.lead_id
    sql("UPDATE close_engine_conversations SET lead_id = %s WHERE id = %s", kept.id, conversation.id)
    Lead.delete().where(Lead.id == old).execute()
    stand_in.pay(link, webhook)
    assert (InboxEntry.get().lead_id, copy_of(conversation).stage) == (kept.id, Stage.COMPLETED)


@pytest.mark.parametrize("is_live", [False, True])
def test_a_payment_of_the_other_mode_closes_nothing_and_is_shown(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, is_live: bool
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    webhook = StripeWebhook(stand_in.secret, live=not is_live)
    link = offered(payments, conversation)
    assert said(stand_in.pay(link, webhook, live=is_live)) == [(200, "kept"), (200, "kept")]
    assert copy_of(conversation).stage is Stage.PAYMENT_SENT
    (entry,) = payment_issues()
    modes = ("live", "test") if is_live else ("test", "live")
    assert entry.sentence == f"It was made in {modes[0]} mode, and {modes[1]} mode is expected."
    assert entry.issue == "test"
    assert stand_in.refund(stand_in.paid_with(link)[0], webhook, live=is_live).text == "ignored"
    stand_in.links[link.rpartition("/")[2]]["restrictions"] = None
    assert stand_in.pay(link, webhook, live=not is_live)[0].text == "recorded"


def test_a_row_that_cannot_be_read_is_shown_and_stripe_tries_again(
    postgres: peewee.Database, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    conversation = bring_to(open_conversation(new_lead(), EntryPoint.SMS_REPLY), Stage.PREVIEW_SENT)
    link = offered(payments, conversation)
    sql("ALTER TABLE close_engine_conversations DISABLE TRIGGER USER")
    sql("UPDATE close_engine_conversations SET created_at = 'infinity' WHERE id = %s", conversation.id)
    sql("ALTER TABLE close_engine_conversations ENABLE TRIGGER USER")
    (answer,) = stand_in.pay(link, webhook, events=[INTENT])
    assert (answer.status, shown()) == (500, [("unmatched", 90000, conversation.id)])
    sql("UPDATE close_engine_conversations SET created_at = now() WHERE id = %s", conversation.id)
    assert stand_in.tell(stand_in.events[-1], webhook).text == "recorded"
    assert shown() == []


def test_what_is_said_of_payments_is_logged_without_secrets(
    conversation_in: ConversationIn,
    stand_in: StripeStandIn,
    payments: StripePayments,
    webhook: StripeWebhook,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "close_engine.integrations.stripe")
    stand_in.pay(offered(payments, conversation_in(Stage.PREVIEW_SENT)), webhook)
    lines = [line.getMessage() for line in caplog.records if line.name == "close_engine.integrations.stripe"]
    assert [re.sub("pi_[0-9a-f]+", "pi", line) for line in lines] == ["payment pi: recorded", "payment pi: duplicate"]
    assert stand_in.secret not in caplog.text
    assert stand_in.api_key not in caplog.text


# -- what is not Stripe's ----------------------------------------------------------------------------------------------


def test_a_forged_truncated_or_old_request_changes_nothing(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    stand_in.pay(offered(payments, conversation), lambda body, signature: webhook(body[:-1], signature))
    event = stand_in.events[0]
    body, signature = stand_in.signed(event)
    stamp = int(time.time())
    forger = stripe.WebhookSignature.generate_signature_header(body.decode(), "whsec_forged", stamp)
    wrong: list[tuple[bytes, str | None]] = [
        (body, None),
        (body, ""),
        (body, "t=now,v1=abc"),
        (body, signature.replace("v1=", "v0=")),
        (body, forger),
        (body[:-1], signature),
        (body.replace(b"90000", b"99999"), signature),
        (b"\xff" + body, signature),
        (body, stand_in.signed(event, at=stamp - 301)[1]),
    ]
    assert {webhook(*request).status for request in wrong} == {400}
    assert (InboxEntry.select().count(), copy_of(conversation).stage) == (0, Stage.PAYMENT_SENT)
    assert webhook(body, stand_in.signed(event, at=stamp - 200)[1]).text == "recorded"


@pytest.mark.parametrize("body", ["", "[]", "7", '"event"', "{", "{}", '{"type": 7, "data": null}', "[" * 50000])
def test_what_is_signed_and_no_event_is_refused(
    database: peewee.Database,
    stand_in: StripeStandIn,
    webhook: StripeWebhook,
    body: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    signature = stripe.WebhookSignature.generate_signature_header(body, stand_in.secret, int(time.time()))
    refusal = webhook(body.encode(), signature)
    assert refusal.status == 400
    assert caplog.messages == [f"refused a request to Stripe's webhook: {refusal.text}"]


def test_a_payment_that_makes_no_sense_is_refused(
    database: peewee.Database, stand_in: StripeStandIn, webhook: StripeWebhook
) -> None:
    found = {"id": "pi_1", "amount_received": 5, "currency": "usd", "metadata": {}}
    changes = [
        ("id", None),
        ("amount_received", None),
        ("amount_received", 2**70),
        ("currency", "?"),
        ("metadata", [1]),
    ]
    for name, wrong in changes:
        (answer,) = said([stand_in.tell(stand_in.event(INTENT, {**found, name: wrong}), webhook)])
        assert answer == (400, "The event lacks something that every event of its type has.")
    assert shown() == []


def test_no_money_is_lost_because_of_what_its_metadata_say(
    database: peewee.Database, stand_in: StripeStandIn, webhook: StripeWebhook
) -> None:
    """The account sells other things, too, and somebody else wrote their metadata."""
    metadata = {"note": "a\x00b\ud800", "close_engine_conversation": "\x00"}
    found = {"id": "pi_1", "amount_received": 5, "currency": "usd", "metadata": metadata}
    assert said([stand_in.tell(stand_in.event(INTENT, found), webhook)]) == [(200, "kept")]
    (entry,) = payment_issues()
    assert (entry.amount, entry.metadata["note"]) == (5, "ab?")


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=80), signature=st.none() | st.text(max_size=80))
def test_no_request_makes_the_webhook_fail(body: bytes, signature: str | None) -> None:
    assert StripeWebhook("whsec_1", live=True)(body, signature).status == 400


def test_other_events_are_ignored(database: peewee.Database, stand_in: StripeStandIn, webhook: StripeWebhook) -> None:
    for kind in ("payment_link.created", "payment_intent.created", "checkout.session.expired"):
        event = stand_in.event(kind, {"id": "x", "object": "payment_link"})
        assert said([stand_in.tell(event, webhook)]) == [(200, "ignored")]


# -- the stand-in ------------------------------------------------------------------------------------------------------


def test_the_page_of_a_link_pays_and_tells(stand_in: StripeStandIn) -> None:
    told: list[str] = []

    def webhook(body: bytes, signature: str | None) -> WebhookResponse:
        told.append(stripe.Webhook.construct_event(body, signature, stand_in.secret).type)
        return WebhookResponse(200, "thank you")

    link = another_link(stand_in)
    with requests.Session() as browser:
        browser.trust_env = False
        assert "5 USD" in browser.get(link).text
        assert "knows no webhook" in browser.post(link).text
        stand_in.webhook = webhook
        assert "it is paid" in browser.post(link).text
        assert browser.get(f"{link}0").status_code == 404
    assert tuple(told) == PAID
    assert said(stand_in.answers) == [(200, "thank you")] * 2


class Endpoint(StandIn):
    """A webhook behind a URL, which refuses everything."""

    def answer(self, call: Call) -> Reply:
        return Reply(400, b"no", media_type="text/plain")


def test_a_webhook_is_told_at_its_url(stand_in: StripeStandIn) -> None:
    with Endpoint() as endpoint:
        answers = stand_in.pay(another_link(stand_in), f"{endpoint.url}/webhooks/stripe")
    assert said(answers) == [(400, "no")] * 2
    for call in endpoint.calls:
        stripe.Webhook.construct_event(call.body, call.headers["stripe-signature"], stand_in.secret)


def test_a_link_is_paid_as_often_as_it_may_be(
    conversation_in: ConversationIn, stand_in: StripeStandIn, payments: StripePayments, webhook: StripeWebhook
) -> None:
    link = offered(payments, conversation_in(Stage.PREVIEW_SENT))
    stand_in.pay(link, webhook)
    with pytest.raises(ValueError, match="was paid already"):
        stand_in.pay(link, webhook)


def test_the_stand_in_refuses_as_stripe_does(stand_in: StripeStandIn) -> None:
    with pytest.raises(stripe.AuthenticationError):
        stripe.StripeClient("sk_test_other", base_addresses={"api": stand_in.url}).v1.prices.retrieve("price_1")
    with pytest.raises(stripe.InvalidRequestError, match="No such object"):
        stand_in.client().v1.prices.retrieve("price_1")
    prices = stand_in.client().v1.prices
    prices.create({"currency": "usd", "unit_amount": 1}, {"idempotency_key": "key"})
    with pytest.raises(stripe.IdempotencyError):
        prices.create({"currency": "usd", "unit_amount": 2}, {"idempotency_key": "key"})
