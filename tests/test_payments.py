"""Payments: none is refused, each is one row, and those that somebody should look at are shown."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    InboxEntry,
    InvalidValue,
    Money,
    PaymentIssue,
    PaymentNotFound,
    PaymentUnmatched,
    Stage,
    note_payment,
    outbox,
    payment_issues,
    record_payment,
    record_refund,
    resolve_payment,
    submit,
    subscribe,
)
from close_engine.board import pipeline
from close_engine.testing import bring_to, new_lead
from tests.command_line import refused, run
from tests.rows import copy_of, triggers
from tests.waiting import Running, until_they_wait
from tests.workers import assert_consistent, held, race

ConversationIn = Callable[..., CloseEngineConversation]

PRICE = (90000, "USD")
LINK = {"paymentUrl": "https://pay.example.com/7"}


def shown() -> list[tuple[Any, ...]]:
    """Return the payments to look at: issue, key, amount, conversation."""
    return [(entry.issue, entry.key, entry.amount, entry.conversation_id) for entry in payment_issues()]


def told(topic: str) -> list[tuple[Any, ...]]:
    """Return the events that were put into the outbox, with the payment's key and amount."""
    mine = outbox.OutboxMessage.select().where(outbox.OutboxMessage.topic == topic).order_by(outbox.OutboxMessage.id)
    return [(message.payload["event"], message.payload["key"], message.payload.get("amount")) for message in mine]


def link_in_flight(conversation: CloseEngineConversation) -> outbox.OutboxMessage:
    submit(conversation, ActionType.SEND_PAYMENT_LINK, "Here is the link.", metadata=LINK)
    (message,) = outbox.claim(worker="worker-7")
    return message


# -- paid before the worker has said that the link was sent ------------------------------------------------------------


@pytest.mark.parametrize("meanwhile", [None, "stall", "close_lost"])
def test_who_pays_before_the_link_is_marked_sent_has_paid(
    conversation_in: ConversationIn, meanwhile: str | None
) -> None:
    """The text has left, the lead pays at once, and the worker has not come to record the sending."""
    conversation = conversation_in(Stage.PREVIEW_SENT)
    message = link_in_flight(conversation)
    before = copy_of(conversation)
    if meanwhile is not None:
        before.fire(meanwhile, reason="no answer")
    payment = record_payment(conversation.lead_id, "pi_1", amount=90000, currency="USD", price=PRICE)
    assert (payment.completed.dest, payment.completed.source) == (Stage.COMPLETED, before.stage)
    row = copy_of(conversation)
    assert (row.stage, row.payment_link_url) == (Stage.COMPLETED, LINK["paymentUrl"])
    assert row.payment_link_sent_at is not None
    message.sent("SM1")
    assert (message.status, message.provider_id) == ("SENT", "SM1")
    assert "COMPLETED" in (message.refusal or "")
    assert copy_of(conversation).payment_link_sent_at == row.payment_link_sent_at
    assert shown() == []
    assert_consistent()


@pytest.mark.parametrize("end", ["its worker died", "it was given up"])
def test_who_pays_has_the_link_whatever_became_of_its_message(conversation_in: ConversationIn, end: str) -> None:
    conversation = conversation_in(Stage.EDIT_LOOP)
    message = link_in_flight(conversation)
    if end == "it was given up":
        message.give_up("the provider said nothing")
    assert record_payment(conversation.lead_id, "pi_1").completed.source is Stage.EDIT_LOOP
    assert outbox.claim(worker="worker-8") == []


def test_a_link_that_nobody_has_begun_to_send_was_not_sent(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    submit(conversation, ActionType.SEND_PAYMENT_LINK, "Here is the link.", metadata=LINK)
    with pytest.raises(PaymentUnmatched, match="no payment link was sent"):
        record_payment(conversation.lead_id, "pi_1")
    assert copy_of(conversation).stage is Stage.PREVIEW_SENT
    assert shown() == []


# -- less than the price -----------------------------------------------------------------------------------------------


def test_a_part_is_recorded_and_shown_and_completes_nothing_until_the_rest_is_paid(
    conversation_in: ConversationIn,
) -> None:
    subscribe("see", events=["payment:partial", "payment:recorded", "payment:surplus"])
    conversation = conversation_in(Stage.PAYMENT_SENT)
    for is_again in (False, True):
        part = record_payment(conversation.lead_id, "pi_1", amount=50000, currency="usd", price=PRICE)
        assert (part.completed, part.partial, part.surplus, part.duplicate) == (None, True, False, is_again)
    (entry,) = payment_issues()
    assert (entry.issue, entry.sentence) == (
        PaymentIssue.PARTIAL,
        "500.00 USD was paid, and the price is 900.00 USD.",
    )
    assert copy_of(conversation).stage is Stage.PAYMENT_SENT
    less = record_payment(conversation.lead_id, "pi_2", amount=100, currency="USD", price=PRICE)
    assert (less.completed, [each.sentence for each in payment_issues()][1:]) == (
        None,
        ["1.00 USD was paid, after 500.00 USD before, and the price is 900.00 USD."],
    )
    rest = record_payment(conversation.lead_id, "pi_3", amount=39900, currency="USD", price=PRICE, actor="stripe")
    assert (rest.completed.dest, rest.partial, rest.surplus) == (Stage.COMPLETED, False, False)
    assert shown() == []
    entry = InboxEntry.get_by_id(entry.id)
    assert (entry.issue, entry.resolved_by, entry.resolution) == ("partial", "stripe", "the rest was paid: pi_3")
    assert record_payment(conversation.lead_id, "pi_4", amount=1, currency="USD", price=PRICE).surplus
    assert told("see") == [
        ("payment:partial", "pi_1", 50000),
        ("payment:partial", "pi_2", 100),
        ("payment:recorded", "pi_3", 39900),
        ("payment:surplus", "pi_4", 1),
    ]


def test_what_was_paid_back_does_not_pay_the_rest(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    record_payment(conversation.lead_id, "pi_1", amount=50000, currency="USD", price=PRICE)
    record_refund("pi_1", 50000, "USD")
    assert record_payment(conversation.lead_id, "pi_2", amount=50000, currency="USD", price=PRICE).partial
    assert record_payment(conversation.lead_id, "pi_3", amount=40000, currency="USD", price=PRICE).completed


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_was_paid_back_of_a_payment_that_never_counted_takes_nothing_away(
    conversation_in: ConversationIn, is_kept: bool
) -> None:
    """It was kept as unmatched and paid back by hand, or its own event is still to come."""
    conversation = conversation_in(Stage.PAYMENT_SENT)
    if is_kept:
        note_payment("unmatched", "pi_1", "No link.", lead=conversation.lead, amount=90000, currency="USD")
    record_refund("pi_1", 90000, "USD", lead=conversation.lead)
    paid = record_payment(conversation.lead_id, "pi_2", amount=90000, currency="USD", price=PRICE)
    assert (paid.partial, copy_of(conversation).stage) == (False, Stage.COMPLETED)


def test_another_currency_is_not_the_price(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    assert record_payment(conversation.lead_id, "pi_1", amount=90000, currency="JPY", price=PRICE).partial
    assert payment_issues().get().sentence == "90000 JPY was paid, and the price is 900.00 USD."


@pytest.mark.parametrize("first", [(80000, "EUR"), (50000, "USD")])
def test_a_part_that_was_not_needed_is_still_shown(conversation_in: ConversationIn, first: tuple[int, str]) -> None:
    """The whole price was paid after it: somebody must pay the part back."""
    conversation = conversation_in(Stage.PAYMENT_SENT)
    amount, currency = first
    record_payment(conversation.lead_id, "pi_1", amount=amount, currency=currency, price=(90000, "USD"))
    record_payment(conversation.lead_id, "pi_2", amount=90000, currency="USD", price=(90000, "USD"))
    assert copy_of(conversation).stage is Stage.COMPLETED
    assert [(entry.key, entry.issue) for entry in payment_issues()] == [("pi_1", "partial")]


def test_a_part_completes_if_that_is_asked_for(conversation_in: ConversationIn) -> None:
    subscribe("see", events=["payment:partial", "payment:recorded"])
    conversation = conversation_in(Stage.PAYMENT_SENT)
    part = record_payment(conversation.lead_id, "pi_1", amount=1, currency="USD", price=PRICE, partial_completes=True)
    assert (part.completed.dest, part.partial) == (Stage.COMPLETED, True)
    assert shown() == [("partial", "pi_1", 1, conversation.id)]
    assert told("see") == [("payment:partial", "pi_1", 1), ("payment:recorded", "pi_1", 1)]
    rest = record_payment(conversation.lead_id, "pi_2", amount=89999, currency="USD", price=PRICE)
    assert (rest.surplus, rest.partial, shown()) == (False, False, [])


def test_a_human_may_complete_after_a_part(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    record_payment(conversation.lead_id, "pi_1", amount=1, currency="USD", price=PRICE)
    copy_of(conversation).complete(actor="dana")
    assert record_payment(conversation.lead_id, "pi_1").completed.actor == "dana"


# -- what matches nothing ----------------------------------------------------------------------------------------------


def test_what_matches_nothing_is_kept_once_and_shown(database: peewee.Database) -> None:
    for sentence in ("It names no conversation.", "Said again."):
        entry = note_payment("unmatched", "pi_1", sentence, amount=100, currency="eur", metadata={"name": "Jo"})
        assert (entry.sentence, entry.lead_id, entry.currency) == ("It names no conversation.", None, "EUR")
    assert shown() == [("unmatched", "pi_1", 100, None)]
    assert pipeline().payment_issues == 1


def test_a_payment_that_was_kept_and_now_matches_is_the_same_row(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT)
    kept = note_payment("unmatched", "pi_1", "No link.", lead=conversation.lead, amount=90000, currency="USD")
    assert kept.conversation_id == conversation.id
    copy_of(conversation).send_payment_link(LINK["paymentUrl"])
    payment = record_payment(conversation.lead_id, "pi_1", price=PRICE)
    assert (payment.completed.dest, payment.duplicate) == (Stage.COMPLETED, False)
    entry = InboxEntry.get()
    assert (entry.id, entry.amount, entry.issue, entry.sentence) == (kept.id, 90000, None, None)
    assert note_payment("unmatched", "pi_1", "Too late.").issue is None
    assert shown() == []


def test_what_somebody_has_resolved_otherwise_is_not_recorded_afterwards(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    resolve_payment(note_payment("unmatched", "pi_1", "No link."), by="dana", resolution="paid back")
    with pytest.raises(PaymentUnmatched, match="dana has looked at it"):
        record_payment(conversation.lead_id, "pi_1")
    assert copy_of(conversation).stage is Stage.PAYMENT_SENT


@pytest.mark.parametrize("issue", ["unmatched", "test"])
def test_what_is_only_kept_pays_for_nothing(conversation_in: ConversationIn, issue: Any) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    note_payment(issue, "pi_1", "Not real.", lead=conversation.lead, amount=90000, currency="USD")
    part = record_payment(conversation.lead_id, "pi_2", amount=1, currency="USD", price=PRICE)
    assert (part.partial, part.completed) == (True, None)
    assert not record_payment(conversation.lead_id, "pi_3", amount=89999, currency="USD", price=PRICE).surplus


def test_what_cannot_be_noted_is_refused(database: peewee.Database) -> None:
    for issue, key, sentence in (("surplus", "pi_1", "x"), ("odd", "pi_1", "x"), ("test", "", "x"), ("test", "p", " ")):
        with pytest.raises(InvalidValue):
            note_payment(issue, key, sentence)  # type: ignore[arg-type]
    assert InboxEntry.select().count() == 0


# -- paid back ---------------------------------------------------------------------------------------------------------


def test_what_is_paid_back_is_shown_and_grows_and_comes_in_any_order(conversation_in: ConversationIn) -> None:
    subscribe("see", events=["payment:refunded"])
    conversation = conversation_in(Stage.PAYMENT_SENT)
    record_payment(conversation.lead_id, "pi_1", amount=90000, currency="USD")
    for amount in (30000, 30000):
        entry = record_refund("pi_1", amount, "usd")
        assert entry.sentence == "300.00 USD was paid back of 900.00 USD."
    resolve_payment(entry, by="dana")
    assert shown() == []
    assert record_refund("pi_1", 20000, "USD").amount == 30000
    assert shown() == []
    record_refund("pi_1", 90000, "USD")
    assert shown() == [("refunded", "pi_1", 90000, conversation.id)]
    assert payment_issues().get().sentence == "900.00 USD was paid back of 900.00 USD."
    assert copy_of(conversation).stage is Stage.COMPLETED
    assert told("see") == [("payment:refunded", "pi_1", 30000), ("payment:refunded", "pi_1", 90000)]


def test_a_refund_of_an_unknown_payment_is_shown(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    record_refund("pi_1", 100, "USD")
    record_refund("pi_2", 100, "USD", lead=conversation.lead)
    assert shown() == [("refunded", "pi_1", 100, None), ("refunded", "pi_2", 100, conversation.id)]


# -- looked at ---------------------------------------------------------------------------------------------------------


def test_who_has_looked_at_a_payment_first_stays(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.COMPLETED)
    entry = note_payment("unmatched", "pi_1", "Whose?")
    done = resolve_payment(entry.id, by="dana", resolution="paid back")
    assert done.resolved_at is not None
    again = resolve_payment(entry, by="lee")
    assert (again.resolved_by, again.resolution, again.resolved_at) == ("dana", "paid back", done.resolved_at)
    record_payment(conversation.lead_id, "pi_2")
    for missing in (InboxEntry.get(InboxEntry.key == "pi_2").id, 99):
        with pytest.raises(PaymentNotFound, match=f"no payment {missing} to look at"):
            resolve_payment(missing, by="dana")
    with pytest.raises(InvalidValue, match="who has looked"):
        resolve_payment(entry, by=" ")


def test_what_a_human_wrote_about_a_payment_is_forgotten_with_the_lead(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PAYMENT_SENT)
    entry = note_payment("unmatched", "pi_1", "No link.", lead=conversation.lead, metadata={"name": "Jo"})
    resolve_payment(entry, by="dana", resolution="Jo called")
    close_engine.forget(conversation.lead)
    row = InboxEntry.get_by_id(entry.id)
    assert (row.metadata, row.resolution, row.resolved_by, row.sentence) == (None, None, "dana", "No link.")


def test_what_a_human_wrote_about_an_old_payment_is_pruned(
    conversation_in: ConversationIn, close_engine_clock: Any
) -> None:
    entry, waits = (note_payment("unmatched", key, "Whose?", metadata={"name": "Jo"}) for key in ("pi_1", "pi_2"))
    resolve_payment(entry, by="dana", resolution="Jo called")
    close_engine_clock.move(timedelta(days=2))
    assert close_engine.prune(timedelta(days=1)).received == 1
    rows = [InboxEntry.get_by_id(each.id) for each in (entry, waits)]
    assert [(row.metadata, row.resolution) for row in rows] == [(None, None), ({"name": "Jo"}, None)]


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_the_command_line_lists_and_resolves(
    conversation_in: ConversationIn, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    conversation = conversation_in(Stage.COMPLETED)
    record_payment(conversation.lead_id, "pi_1", amount=100, currency="USD")
    record_payment(conversation.lead_id, "pi_2", amount=90000, currency="USD")
    note_payment("unmatched", "pi_3", "It names \x1b[2Jno conversation.")
    ids = [str(entry.id) for entry in payment_issues()]
    listed = run("payments").out
    assert [row[:4] for row in run("payments").lines if row and row[0] in ids] == [
        [ids[0], "surplus", "900.00", "USD"],
        [ids[1], "unmatched", "-", "-"],
    ]
    assert "\x1b" not in listed
    assert "Payments to look at: 2. close-engine payments lists them." in run("board", "--once").out
    done = run("payments", "resolve", *ids, "--by", "dana", "--resolution", "paid back")
    assert done.out.splitlines() == ["Payment pi_2 was looked at by dana.", "Payment pi_3 was looked at by dana."]
    assert run("payments").out == "There is no payment to look at.\n"
    assert "no payment 99 to look at" in refused("payments", "resolve", "99")


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_the_command_line_says_whose_a_payment_is(
    conversation_in: ConversationIn, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    unsent, sent = conversation_in(Stage.QUALIFYING), conversation_in(Stage.PAYMENT_SENT)
    kept = note_payment("unmatched", "pi_1", "Whose?", amount=90000, currency="USD")
    assert "no payment link was sent" in refused("payments", "record", str(kept.id), unsent.lead_id)
    done = run("payments", "record", str(kept.id), sent.lead_id, "--by", "dana")
    assert done.out == f"Payment pi_1 is recorded. Conversation {sent.id} is COMPLETED.\n"
    assert copy_of(sent).history()[-1].actor == "dana"
    assert f"no payment {kept.id} to look at" in refused("payments", "record", str(kept.id), sent.lead_id)


# -- at once -----------------------------------------------------------------------------------------------------------


def test_a_payment_that_is_recorded_and_kept_at_once_is_one_row(postgres: peewee.Database) -> None:
    lead = new_lead()
    conversation = bring_to(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY), Stage.PAYMENT_SENT)
    with close_engine.atomic():
        note_payment("unmatched", "pi_1", "No link.", lead=lead)
        recording = Running(lambda: record_payment(lead.id, "pi_1", amount=1, currency="USD"))
        until_they_wait([recording])
    assert not recording.result().duplicate
    (entry,) = InboxEntry.select()
    assert (entry.issue, entry.amount) == (None, 1)
    assert triggers(conversation).count("complete") == 1


def test_of_two_parts_at_once_the_second_is_the_rest(postgres: peewee.Database) -> None:
    lead = new_lead()
    conversation = bring_to(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY), Stage.PAYMENT_SENT)

    def pay(key: str) -> Any:
        return record_payment(lead.id, key, amount=45000, currency="USD", price=PRICE)

    parts = race([partial(pay, "pi_1"), partial(pay, "pi_2")], behind=held(conversation))
    assert sorted(payment.partial for payment in parts) == [False, True]
    assert copy_of(conversation).stage is Stage.COMPLETED
    assert shown() == []


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [(90000, "USD", "900.00 USD"), (5, "usd", "0.05 USD"), (900, "JPY", "900 JPY"), (1500, "KWD", "1.500 KWD")],
)
def test_money_reads_as_people_write_it(amount: int, currency: str, text: str) -> None:
    assert str(Money(amount, currency)) == text
