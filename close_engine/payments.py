"""Payments: each recorded once, none refused, and those that somebody should look at.

    record_payment(lead, key="pi_1", amount=90000, currency="USD")      # completes the conversation, once

    for entry in payment_issues():                                      # surplus, partial, refunded, unmatched, test
        print(entry.id, entry.sentence)
    resolve_payment(entry, by="dana", resolution="paid back by hand")

A payment is one row of the inbox, whatever becomes of it. `issue` says why somebody should look at it. One that matches
nothing is kept with `note_payment()`; if it can be recorded later, it is the same row.

>>> str(Money(90000, "USD")), str(Money(900, "JPY"))
('900.00 USD', '900 JPY')
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import moment
from close_engine.database.fields import clean_json, clean_text, clean_words
from close_engine.database.provenance import Provenance
from close_engine.database.reading import Rows
from close_engine.database.transaction import atomic
from close_engine.errors import InvalidValue, PaymentNotFound, PaymentUnmatched
from close_engine.firing import change_stage, write_fields
from close_engine.inbox import Entry, InboxEntry, lock_conversation
from close_engine.models import Lead, StageChange
from close_engine.outbox import OutboxMessage
from close_engine.stages import ActionType, Event, MessageStatus, PaymentIssue, Stage
from close_engine.subscriptions import publish

__all__ = [
    "Money",
    "Payment",
    "clean_money",
    "note_payment",
    "payment_issues",
    "record_payment",
    "record_refund",
    "resolve_payment",
]

#: Such payments belong to no conversation: they pay for nothing.
_UNCOUNTED = (PaymentIssue.UNMATCHED, PaymentIssue.TEST)

#: How many decimals a currency has that does not have two (ISO 4217).
_DECIMALS = {
    **dict.fromkeys(re.findall("...", "BIFCLPDJFGNFISKJPYKMFKRWPYGRWFUGXVNDVUVXAFXOFXPF"), 0),
    **dict.fromkeys(re.findall("...", "BHDIQDJODKWDLYDOMRTND"), 3),
}


class Money(NamedTuple):
    """An amount of money. As text, it is in the currency's main unit, such as `900.00 USD`.

    Attributes:
        amount: int, in the smallest unit of the currency.
        currency: str, the currency's code of three letters.
    """

    amount: int
    currency: str

    def __str__(self) -> str:
        decimals = _DECIMALS.get(self.currency.upper(), 2)
        return f"{self.amount / 10**decimals:.{decimals}f} {self.currency.upper()}"


@dataclass(frozen=True)
class Payment:
    """The result of `record_payment()`. The same payment again has the same result.

    Attributes:
        conversation: CloseEngineConversation, as it is now: COMPLETED, unless only a part was paid.
        completed: the StageChange that completed it, whether this payment did or something before it; None if the
            conversation is not COMPLETED, because only a part was paid.
        surplus: whether it had been paid for already: somebody should look at this payment.
        partial: whether less than the price was paid: somebody should look at this payment.
        duplicate: whether this key was processed before, so that nothing was changed.
    """

    conversation: CloseEngineConversation
    completed: StageChange | None
    surplus: bool = False
    partial: bool = False
    duplicate: bool = False


def record_payment(
    lead: Lead | str,
    key: str,
    *,
    amount: int | None = None,
    currency: str | None = None,
    price: tuple[int, str] | None = None,
    partial_completes: bool = False,
    actor: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Payment:
    """Complete the lead's conversation, from any stage, because the lead paid.

    Money is never refused. A further payment is recorded as surplus, and less than the price as partial; both are
    among the `payment_issues()`. A partial payment completes nothing: COMPLETED is final, and a human can still
    complete. If the rest is paid, that completes.

    A payment proves that the payment link was sent, if a worker has ever claimed it to be sent: the worker may only not
    have recorded that yet.

    Args:
        lead: the lead who paid, or its id.
        key: what the provider calls the payment, and not one of its events: with Stripe, the payment intent. The same
            key again returns the first result and changes nothing. A payment that was kept with `note_payment()`, and
            that nobody has resolved, is recorded now.
        amount: int, what was paid, in the smallest unit of the currency.
        currency: str, the currency's code of three letters.
        price: what was to be paid, as amount and currency; None to let any payment complete.
        partial_completes: whether a partial payment completes the conversation all the same.
        actor, metadata: for the history.

    Returns:
        the Payment.

    Raises:
        PaymentUnmatched: the lead does not exist, has no conversation, or was never sent a payment link; the key was
            used for another lead's payment; or somebody has looked at this payment and resolved it otherwise. Nothing
            is recorded: keep it with `note_payment()`.
        UnreadableRow: Python cannot read the lead's conversation. Nothing is recorded: correct the row, then try again.
        InvalidValue: an argument makes no sense or cannot be stored.
    """
    lead_id = lead.id if isinstance(lead, Lead) else lead
    provenance = Provenance(actor, None, metadata, key)
    amount, currency = clean_money(amount, currency)
    to_pay = None if price is None else Money(*clean_money(*price))  # type: ignore[arg-type]
    with atomic():
        conversation = lock_conversation(lead_id)
        if conversation is None:
            raise PaymentUnmatched(lead_id, key, "the lead has no close conversation")
        known = InboxEntry.get_or_none((InboxEntry.kind == "payment") & (InboxEntry.key == key))
        if known is not None and known.issue not in _UNCOUNTED:
            return _repeated(known, conversation, lead_id)
        if known is not None and known.resolved_at is not None:
            raise PaymentUnmatched(lead_id, key, f"{known.resolved_by} has looked at it and resolved it")
        if known is not None and amount is None:
            amount, currency = known.amount, known.currency
        issue, sentence = _judged(conversation, key, amount, currency, to_pay)
        entry = Entry("payment", key, lead_id, None, amount, currency, issue, sentence, provenance.metadata)
        entry_id = entry.add(conversation.id) if known is None else _taken_up(known, entry, conversation.id)
        if entry_id is None:  # it was recorded or noted at the same moment
            return record_payment(
                lead_id,
                key,
                amount=amount,
                currency=currency,
                price=price,
                partial_completes=partial_completes,
                actor=actor,
                metadata=metadata,
            )
        is_completed = conversation.stage is Stage.COMPLETED
        is_surplus, is_partial = issue is PaymentIssue.SURPLUS, issue is PaymentIssue.PARTIAL
        completes = not is_completed and (partial_completes or not is_partial)
        paid = {"payment_id": entry_id, "key": key, "amount": amount, "currency": currency}
        if is_partial:
            publish(Event.PAYMENT_PARTIAL, conversation.id, str(entry_id), paid)
        if completes or not is_partial:
            event = Event.PAYMENT_SURPLUS if is_surplus else Event.PAYMENT_RECORDED
            publish(event, conversation.id, str(entry_id), paid)
        if not is_completed:
            _require_link(conversation, lead_id, key)
        if issue is None:
            _settle_parts(conversation, to_pay, f"the rest was paid: {key}", actor)
        change = _completion(conversation)
        if completes:
            change = change_stage(conversation, "complete", {}, provenance.under("payment"))
        return Payment(conversation, change, is_surplus, is_partial)


def note_payment(
    issue: PaymentIssue | Literal["unmatched", "test"],
    key: str,
    sentence: str,
    *,
    lead: Lead | str | None = None,
    amount: int | None = None,
    currency: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> InboxEntry:
    """Keep a payment that cannot be recorded, for somebody to look at. It pays for nothing.

    What is recorded or kept already stays as it is, so a provider's retries change nothing.

    Args:
        issue: `unmatched`: it belongs to no conversation. `test`: it was made in test mode, or should have been.
        key: what the provider calls the payment, as for `record_payment()`.
        sentence: why it cannot be recorded.
        lead: the lead who paid, or its id; None if nobody knows. It need not exist.
        amount, currency: as for `record_payment()`.
        metadata: whatever else helps to find out whose it is.

    Returns:
        InboxEntry, the row of the payment.

    Raises:
        InvalidValue: an argument makes no sense or cannot be stored.
    """
    noted = InboxEntry.issue.clean(issue)
    if noted not in _UNCOUNTED:
        raise InvalidValue("issue", issue, "it must be unmatched or test: the others come from what is recorded")
    lead_id = lead.id if isinstance(lead, Lead) else lead
    details = None if metadata is None else clean_json("metadata", dict(metadata))
    amount, currency = clean_money(amount, currency)
    clean_words("key", key, "give the provider's id of the payment")
    clean_words("sentence", sentence, "it must say why the payment cannot be recorded")
    entry = Entry("payment", key, lead_id, None, amount, currency, noted, sentence, details)
    with atomic():
        entry.add(_conversation_id(lead_id))
        return entry.first()


def record_refund(
    key: str,
    amount: int,
    currency: str,
    *,
    lead: Lead | str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> InboxEntry:
    """Record that a payment was paid back, all of it or a part, and show it. The conversation stays in its stage.

    Args:
        key: the payment, as for `record_payment()`.
        amount: int, how much of it was paid back so far, in the smallest unit of the currency. Less than what is known
            changes nothing, so a provider's events may come in any order.
        currency: str, the currency's code of three letters.
        lead: whose payment it is, or the lead's id; needed only if the payment is not recorded.
        metadata: whatever else is to be stored.

    Returns:
        InboxEntry, the row of the refund: one for each payment.

    Raises:
        InvalidValue: an argument makes no sense or cannot be stored.
    """
    amount, currency = clean_money(amount, currency)  # type: ignore[assignment]
    clean_words("key", key, "give the provider's id of the payment")
    details = None if metadata is None else clean_json("metadata", dict(metadata))
    lead_id = lead.id if isinstance(lead, Lead) else lead
    with atomic():
        payment = InboxEntry.get_or_none((InboxEntry.kind == "payment") & (InboxEntry.key == key))
        conversation_id = _conversation_id(lead_id) if payment is None else payment.conversation_id
        if payment is not None:
            lead_id = payment.lead_id
        said = f"{Money(amount, currency)} was paid back"
        if payment is not None and payment.amount is not None:
            said += f" of {Money(payment.amount, str(payment.currency))}"
        refunded = PaymentIssue.REFUNDED
        entry = Entry("refund", key, lead_id, None, amount, currency, refunded, f"{said}.", details)
        entry_id = entry.add(conversation_id)
        if entry_id is None:
            grown = {
                **{"amount": amount, "currency": currency, "sentence": entry.sentence},
                **{"resolved_by": None, "resolved_at": None, "resolution": None},
            }
            is_less = (InboxEntry.kind == "refund") & (InboxEntry.key == key) & (InboxEntry.amount < amount)
            update = InboxEntry.update(grown).where(is_less).returning(InboxEntry.id)
            entry_id = next((row[0] for row in update.tuples().execute()), None)
        if entry_id is not None and conversation_id is not None:
            paid_back = {"payment_id": entry_id, "key": key, "amount": amount, "currency": currency}
            publish(Event.PAYMENT_REFUNDED, conversation_id, f"{entry_id}:{amount}", paid_back)
        return entry.first()


def payment_issues() -> Rows[InboxEntry]:
    """Return a `readable()` query for what somebody should look at and nobody has resolved, oldest first."""
    is_open = InboxEntry.issue.is_null(False) & InboxEntry.resolved_at.is_null()
    return InboxEntry.select().readable().where(is_open).order_by(InboxEntry.id)


def resolve_payment(entry: InboxEntry | int, *, by: str, resolution: str | None = None) -> InboxEntry:
    """Say that somebody has looked at a payment: it is no longer among the `payment_issues()`.

    Args:
        entry: the row of `payment_issues()`, or its id. If it was resolved before, that stays.
        by: who has looked at it.
        resolution: what came of it.

    Returns:
        InboxEntry, as it is now.

    Raises:
        PaymentNotFound: there is no such payment, or nobody need look at it.
        InvalidValue: an argument cannot be stored, or `by` says nothing.
    """
    entry_id = entry if isinstance(entry, int) else entry.id
    clean_words("by", by, "it must say who has looked at the payment")
    if resolution is not None:
        clean_text("resolution", resolution)
    is_it = (InboxEntry.id == entry_id) & InboxEntry.issue.is_null(False)
    resolved = {"resolved_by": by, "resolved_at": moment(), "resolution": resolution}
    InboxEntry.update(resolved).where(is_it & InboxEntry.resolved_at.is_null()).execute()
    found: InboxEntry | None = InboxEntry.get_or_none(is_it)
    if found is None:
        raise PaymentNotFound(entry_id)
    return found


def _repeated(known: InboxEntry, conversation: CloseEngineConversation, lead_id: str) -> Payment:
    """Return what the first recording of a payment returned."""
    if known.conversation_id != conversation.id:
        why = "this key was already used for the payment of another conversation"
        raise PaymentUnmatched(lead_id, known.key, why)
    is_surplus, is_partial = known.issue is PaymentIssue.SURPLUS, known.issue is PaymentIssue.PARTIAL
    return Payment(conversation, _completion(conversation), is_surplus, is_partial, duplicate=True)


def _judged(
    conversation: CloseEngineConversation, key: str, amount: int | None, currency: str | None, price: Money | None
) -> tuple[PaymentIssue | None, str | None]:
    """Say whether somebody should look at a new payment of a conversation that the caller holds, and why."""
    others = [entry for entry in _counted(conversation) if entry.key != key]
    payments = [entry for entry in others if entry.kind == "payment"]
    before = 0 if price is None else _balance(others, price.currency)
    if conversation.stage is Stage.COMPLETED and payments:
        is_settled = price is None or before >= price.amount or any(entry.issue is None for entry in payments)
        if is_settled:
            return PaymentIssue.SURPLUS, "The conversation had been paid for already."
    if price is None or amount is None or currency is None:
        return None, None
    if currency == price.currency and before + amount >= price.amount:
        return None, None
    earlier = f", after {Money(before, price.currency)} before" if before else ""
    return PaymentIssue.PARTIAL, f"{Money(amount, currency)} was paid{earlier}, and the price is {price}."


def _taken_up(known: InboxEntry, entry: Entry, conversation_id: str) -> int | None:
    """Make a payment that was only kept one of this conversation; None if somebody else has at the same moment."""
    values: dict[str, Any] = {
        **{"lead_id": entry.lead_id, "conversation_id": conversation_id, "amount": entry.amount},
        **{"currency": entry.currency, "issue": entry.issue, "sentence": entry.sentence},
    }
    if entry.metadata is not None:
        values["metadata"] = entry.metadata
    is_kept = (InboxEntry.id == known.id) & InboxEntry.issue.in_(_UNCOUNTED) & InboxEntry.resolved_at.is_null()
    update = InboxEntry.update(values).where(is_kept).returning(InboxEntry.id)
    return next((row[0] for row in update.tuples().execute()), None)


def _counted(conversation: CloseEngineConversation) -> list[InboxEntry]:
    """Load the payments of a conversation that count, and what was paid back of them."""
    needed = (InboxEntry.kind, InboxEntry.key, InboxEntry.amount, InboxEntry.currency, InboxEntry.issue)
    mine = (InboxEntry.conversation_id == conversation.id) & (InboxEntry.kind != "text")
    counted = [entry for entry in InboxEntry.select(*needed).where(mine) if entry.issue not in _UNCOUNTED]
    # What was paid back of any other payment takes nothing away: that payment never added anything.
    paid = {entry.key for entry in counted if entry.kind == "payment"}
    return [entry for entry in counted if entry.key in paid]


def _balance(entries: list[InboxEntry], currency: str) -> int:
    """Return how much was paid in a currency, without what was paid back."""
    same = [entry for entry in entries if entry.amount is not None and entry.currency == currency]
    return sum(entry.amount if entry.kind == "payment" else -entry.amount for entry in same)


def _settle_parts(conversation: CloseEngineConversation, price: Money | None, resolution: str, by: str | None) -> None:
    """Resolve the partial payments of a conversation, because the rest was paid. What was not needed stays shown."""
    is_part = (InboxEntry.conversation_id == conversation.id) & (InboxEntry.kind != "text")
    is_part &= (InboxEntry.issue == PaymentIssue.PARTIAL) & InboxEntry.resolved_at.is_null()
    if price is not None:
        if _balance(_counted(conversation), price.currency) > price.amount:
            return
        is_part &= InboxEntry.currency == price.currency
    resolved = {"resolved_by": by or "close_engine", "resolved_at": moment(), "resolution": resolution}
    InboxEntry.update(resolved).where(is_part).execute()


def _require_link(conversation: CloseEngineConversation, lead_id: str, key: str) -> None:
    """Require that a payment link was sent. If a worker has only not recorded that yet, record it.

    Whoever has paid has the link. A message that was ever claimed may have left, whatever became of it since: its
    worker is still sending it, or died. The worker's own report finds the conversation COMPLETED then, and says so.

    Raises:
        PaymentUnmatched: no payment link was sent.
    """
    if conversation.payment_link_sent_at is not None:
        return
    message: OutboxMessage | None = links_of(conversation.id).where(OutboxMessage.claims > 0).first()
    if message is None:
        raise PaymentUnmatched(lead_id, key, "no payment link was sent to the lead")
    payload = message.payload if isinstance(message.payload, dict) else {}
    link = payload.get("paymentUrl") or conversation.payment_link_url
    write_fields(conversation, {"payment_link_url": link, "payment_link_sent_at": moment()}, "record_payment()")


def links_of(conversation_id: str) -> Rows[OutboxMessage]:
    """Return a `readable()` query for the messages of a conversation that carry a payment link, newest first."""
    mine = OutboxMessage.conversation_id == conversation_id
    # Two indexes serve this: one has what waits, the other the texts that do not.
    waits, texts = OutboxMessage.status == MessageStatus.PENDING, [each.value for each in ActionType]
    settled = (OutboxMessage.status != MessageStatus.PENDING) & OutboxMessage.topic.in_(texts)
    links = ((mine & waits) | (mine & settled)) & (OutboxMessage.topic == ActionType.SEND_PAYMENT_LINK.value)
    return OutboxMessage.select().readable().where(links).order_by(OutboxMessage.id.desc())


def _completion(conversation: CloseEngineConversation) -> StageChange | None:
    completed = (StageChange.conversation_id == conversation.id) & (StageChange.dest == Stage.COMPLETED)
    change: StageChange | None = StageChange.get_or_none(completed)
    return change


def _conversation_id(lead_id: str | None) -> str | None:
    model = CloseEngineConversation
    found: str | None = model.select(model.id).where(model.lead == lead_id).scalar() if lead_id else None
    return found


def clean_money(amount: int | None, currency: str | None) -> tuple[int | None, str | None]:
    """Check what was paid.

    Raises:
        InvalidValue: it is no amount of money.
    """
    if amount is None and currency is None:
        return None, None
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 <= amount < 2**63:
        raise InvalidValue("amount", amount, "it must be a whole number of the currency's smallest unit, such as cents")
    if not (isinstance(currency, str) and len(currency) == 3 and currency.isascii() and currency.isalpha()):
        raise InvalidValue("currency", currency, "it must be a code of three letters, such as USD")
    return amount, currency.upper()
