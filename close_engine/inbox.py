"""Inbound texts and payments, each processed once, no matter how often its webhook is retried.

    received = receive(lead, key="SM123", text="Yes, let's go!")
    if received.answer:
        draft_a_reply(received.conversation)

    record_payment(lead, key="evt_1")                   # completes the conversation; the second time changes nothing

Both lock the conversation's row, so neither fails with a conflict. Both write the row, so a reply that was drafted
before is a conflict when it is submitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import peewee

from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current, now
from close_engine.database.fields import TextField, UtcDateTimeField, clean_text, stored_time
from close_engine.database.provenance import Provenance
from close_engine.database.transaction import atomic
from close_engine.errors import LeadNotFound, PaymentUnmatched, UnreadableRow
from close_engine.firing import change_stage, write_fields
from close_engine.models import BaseModel, Lead, StageChange
from close_engine.stages import ACTIVE_STAGES, Stage

__all__ = ["InboxEntry", "Received", "receive", "record_payment"]


class InboxEntry(BaseModel):
    """A text or payment that was processed: a row of the inbox.

    Attributes:
        kind: `text` or `payment`; keys are unique within a kind.
        key: the provider's id of the text or payment.
        conversation_id: the lead's conversation; None if there was none.
        body: the text; None for a payment.
    """

    id: Any = peewee.BigAutoField()
    kind = TextField[str]()
    key = TextField[str]()
    lead_id = TextField[str]()
    conversation_id = TextField["str | None"](null=True)
    body = TextField["str | None"](null=True)
    received_at = UtcDateTimeField[datetime](default=now)

    class Meta:
        table_name = "inbox"
        own_table = "inbox"


InboxEntry.add_index(InboxEntry.kind, InboxEntry.key, unique=True)
InboxEntry.add_index(InboxEntry.conversation_id, unique=True, where=InboxEntry.kind == "payment")


@dataclass(frozen=True)
class Received:
    """The result of `receive()`.

    Attributes:
        conversation: the lead's conversation as it is now; None if the lead has none.
        duplicate: whether this key was processed before, so that nothing was changed.
        resumed: the StageChange that resumed a stalled conversation; None if it was not stalled.
    """

    conversation: CloseEngineConversation | None
    duplicate: bool = False
    resumed: StageChange | None = None

    @property
    def answer(self) -> bool:
        """Whether the text needs an answer: it is new, and the lead's conversation is active."""
        return not self.duplicate and self.conversation is not None and self.conversation.stage in ACTIVE_STAGES


def receive(lead: Lead | str, key: str, text: str, *, actor: str | None = None) -> Received:
    """Process an inbound text once: the lead no longer counts as silent, and a stalled conversation is resumed.

    Args:
        lead: the lead who wrote it, or its id.
        key: the provider's id of the text. The same id again changes nothing.
        text: what it says; stored in the inbox.
        actor: for the history, if the conversation is resumed; `lead:<id>` by default.

    Returns:
        the conversation, and whether to answer in it.

    Raises:
        LeadNotFound: there is no such lead.
        UnreadableRow: Python cannot read the lead's conversation. The text is in the inbox all the same, and the lead
            no longer counts as silent. Correct the row, then answer by hand: the same key again is a duplicate.
        InvalidValue: the key or the text cannot be stored.
    """
    lead_id = lead.id if isinstance(lead, Lead) else lead
    provenance = Provenance(actor or f"lead:{lead_id}", "the lead wrote", key=key)
    clean_text("text", text)
    try:
        with atomic():
            return _receive(lead_id, key, text, provenance)
    except UnreadableRow:
        model = CloseEngineConversation
        with atomic():
            conversation_id = model.select(model.id).where(model.lead == lead_id).scalar()
            _add_entry("text", key, lead_id, conversation_id, text)
            _no_longer_silent(conversation_id)
        raise


def _receive(lead_id: str, key: str, text: str, provenance: Provenance) -> Received:
    conversation = _lock_conversation(lead_id)
    if conversation is None and not Lead.select().where(Lead.id == lead_id).exists():
        raise LeadNotFound(lead_id)
    if not _add_entry("text", key, lead_id, None if conversation is None else conversation.id, text):
        return Received(conversation, duplicate=True)
    if conversation is None or conversation.stage not in (*ACTIVE_STAGES, Stage.STALLED):
        return Received(conversation)
    if conversation.stage is Stage.STALLED:
        resumed = change_stage(conversation, "resume", {}, provenance.under("text"))
        return Received(conversation, resumed=resumed)
    write_fields(conversation, {}, "receive()")
    _no_longer_silent(conversation.id)
    return Received(conversation)


def _no_longer_silent(conversation_id: str) -> None:
    moved_on = "UPDATE {deadlines} SET at = %s WHERE \"trigger\" = 'stall' AND subject_id = %s"
    current().execute(moved_on, (stored_time(now()), conversation_id))


def record_payment(
    lead: Lead | str, key: str, *, actor: str | None = None, metadata: Mapping[str, Any] | None = None
) -> StageChange:
    """Complete the lead's conversation, from any stage, because the lead paid.

    Args:
        lead: the lead who paid, or its id.
        key: the provider's id of the payment. The same id again returns the first result and changes nothing.
        actor, metadata: for the history.

    Returns:
        the StageChange that completed it.

    Raises:
        PaymentUnmatched: the lead does not exist, has no conversation, was never sent a payment link, or has already
            paid under another key; or the key was used for another lead's payment. Nothing is recorded: look at the
            payment, then try again or refund it.
        UnreadableRow: Python cannot read the lead's conversation. Nothing is recorded: correct the row, then try again.
        InvalidValue: an argument cannot be stored.
    """
    lead_id = lead.id if isinstance(lead, Lead) else lead
    provenance = Provenance(actor, None, metadata, key)
    with atomic():
        conversation = _lock_conversation(lead_id)
        if conversation is None:
            raise PaymentUnmatched(lead_id, key, "the lead has no close conversation")
        first: InboxEntry | None = InboxEntry.get_or_none(
            (InboxEntry.kind == "payment") & (InboxEntry.conversation_id == conversation.id)
        )
        if first is not None and first.key != key:
            raise PaymentUnmatched(lead_id, key, f"its conversation was already paid with payment {first.key!r}")
        if not _add_entry("payment", key, lead_id, conversation.id) and first is None:
            raise PaymentUnmatched(lead_id, key, "this key was already used for the payment of another conversation")
        if conversation.stage is Stage.COMPLETED:
            return _completion(conversation)
        if conversation.payment_link_sent_at is None:
            raise PaymentUnmatched(lead_id, key, "no payment link was sent to the lead")
        return change_stage(conversation, "complete", {}, provenance.under("payment"))


def _lock_conversation(lead_id: str) -> CloseEngineConversation | None:
    """Load the lead's conversation, and lock it against every other writer."""
    query = CloseEngineConversation.select().where(CloseEngineConversation.lead == lead_id)
    conversation: CloseEngineConversation | None = current().for_update(query).first()
    return conversation


def _add_entry(kind: str, key: str, lead_id: str, conversation_id: str | None, body: str | None = None) -> bool:
    """Add an entry to the inbox. Return False if its key is already there."""
    entry = {
        "kind": kind,
        "key": key,
        "lead_id": lead_id,
        "conversation_id": conversation_id,
        "body": body,
    }
    insert = InboxEntry.insert(entry).on_conflict(action="nothing", conflict_target=[InboxEntry.kind, InboxEntry.key])
    return bool(insert.as_rowcount().execute())


def _completion(conversation: CloseEngineConversation) -> StageChange:
    change: StageChange = (
        StageChange.select()
        .where((StageChange.conversation_id == conversation.id) & (StageChange.dest == Stage.COMPLETED))
        .get()
    )
    return change
