"""The inbox: what came in, each once, no matter how often its webhook is retried. This file is about texts.

    received = receive(lead, key="SM123", text="Yes, let's go!", open=EntryPoint.SMS_REPLY)
    if received.answer:
        draft_a_reply(received.conversation)

It locks the conversation's row, so it never fails with a conflict. A text supersedes the replies that were drafted
before it and still wait. It writes the row, so a reply that is being drafted is a conflict when it is submitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import peewee

from close_engine import optouts
from close_engine.approvals import PendingAction, supersede
from close_engine.carriers import Keyword
from close_engine.conversations import CloseEngineConversation, open_under
from close_engine.database.binding import current, now
from close_engine.database.fields import EnumField, JsonField, TextField, UtcDateTimeField, clean_json, clean_text
from close_engine.database.provenance import Provenance
from close_engine.database.transaction import atomic
from close_engine.errors import LeadNotFound, TextOfAnotherLead, UnreadableRow
from close_engine.firing import change_stage, write_fields
from close_engine.models import BaseModel, Lead, StageChange
from close_engine.outbox import OutboxMessage
from close_engine.stages import ACTIVE_STAGES, CLOSED_STAGES, ActionType, EntryPoint, Event, PaymentIssue, Stage
from close_engine.subscriptions import publish

__all__ = ["Entry", "InboxEntry", "Received", "lock_conversation", "receive"]


class InboxEntry(BaseModel):
    """What came in: a row of the inbox.

    Attributes:
        kind: `text`, `payment` or `refund`; keys are unique within a kind.
        key: the provider's id of the text or payment; of a refund, the payment's.
        lead_id: the lead; None only of a payment that matches no lead.
        conversation_id: the lead's conversation; None if there was none.
        body: the text; None for a payment.
        amount: int, what was paid or paid back, in the smallest unit of the currency; None if it was not said.
        currency: str, the currency's code of three letters.
        issue: PaymentIssue, why somebody should look at the payment; None if nobody need.
        sentence: str, the same in a sentence.
        resolved_by, resolved_at, resolution: who has looked at it, when, and what came of it; None if nobody has.
        metadata: what else was given with it.
        result: what `receive()` did: the ids of what it wrote.
        no_reply_reason, no_reply_by: why a text needed no reply, and who said so; None if nobody did.
    """

    id: Any = peewee.BigAutoField()
    kind = TextField[str]()
    key = TextField[str]()
    lead_id = TextField["str | None"](null=True)
    conversation_id = TextField["str | None"](null=True)
    body = TextField["str | None"](null=True)
    amount: Any = peewee.BigIntegerField(null=True)
    currency = TextField["str | None"](null=True)
    issue = EnumField["PaymentIssue | None"](PaymentIssue, null=True)
    sentence = TextField["str | None"](null=True)
    resolved_by = TextField["str | None"](null=True)
    resolved_at = UtcDateTimeField["datetime | None"](null=True)
    resolution = TextField["str | None"](null=True)
    metadata = JsonField(null=True)
    result = JsonField(null=True)
    no_reply_reason = TextField["str | None"](null=True)
    no_reply_by = TextField["str | None"](null=True)
    received_at = UtcDateTimeField[datetime](default=now)

    class Meta:
        table_name = "inbox"
        own_table = "inbox"


InboxEntry.add_index(InboxEntry.kind, InboxEntry.key, unique=True)
InboxEntry.add_index(InboxEntry.conversation_id, InboxEntry.id, where=InboxEntry.kind == "text")
InboxEntry.add_index(
    InboxEntry.lead_id,
    InboxEntry.id,
    where=(InboxEntry.kind == "text") & InboxEntry.conversation_id.is_null(),
)
InboxEntry.add_index(
    InboxEntry.conversation_id, unique=True, where=(InboxEntry.kind == "payment") & InboxEntry.issue.is_null()
)
InboxEntry.add_index(InboxEntry.conversation_id, where=InboxEntry.kind != "text")
InboxEntry.add_index(InboxEntry.id, where=InboxEntry.issue.is_null(False) & InboxEntry.resolved_at.is_null())


@dataclass(frozen=True)
class Received:
    """The result of `receive()`. The same text again has the same result.

    Attributes:
        conversation: the lead's conversation as it is now; None if the lead has none.
        duplicate: whether this key was processed before, so that nothing was changed.
        opened: the StageChange that opened or reopened the conversation; None if it was open.
        resumed: the StageChange that resumed a stalled conversation; None if it was not stalled.
        superseded: tuple of the OutboxMessages and PendingActions that were drafted before the text and will not leave.
        taken_over_by: who leads the conversation instead of the AI; None if nobody does.
        keyword: what the text asked for instead of an answer: to opt out, to opt in, or for help; None of other texts.
    """

    conversation: CloseEngineConversation | None
    duplicate: bool = False
    opened: StageChange | None = None
    resumed: StageChange | None = None
    superseded: tuple[OutboxMessage | PendingAction, ...] = ()
    taken_over_by: str | None = None
    keyword: Keyword | None = None

    @property
    def answer(self) -> bool:
        """Whether you are to answer the text: it is new and no keyword, and the conversation is active and the AI's."""
        is_active = self.conversation is not None and self.conversation.stage in ACTIVE_STAGES
        return is_active and not self.duplicate and self.taken_over_by is None and self.keyword is None


def receive(
    lead: Lead | str,
    key: str,
    text: str,
    *,
    open: EntryPoint | None = None,
    metadata: Mapping[str, Any] | None = None,
    actor: str | None = None,
) -> Received:
    """Process an inbound text once: it is our turn now, and a stalled conversation is resumed.

    It stays our turn until a text of ours is sent, or `no_reply()` says that none is needed.

    Replies that were drafted before the text and still wait are superseded, unless they were submitted with
    `if_lead_writes="send"`: messages are withdrawn, pending actions expire. Other drafts that wait for approval stay;
    their metadata says `leadWroteSince`.

    A text that is one of the carriers' words opts the lead out, like STOP, or in, like START, and does nothing else.

    Args:
        lead: the lead who wrote it, or its id.
        key: the provider's id of the text. The same id again changes nothing.
        text: what it says; stored in the inbox.
        open: EntryPoint, to open the lead's conversation if there is none, or to reopen it if it is CLOSED_LOST.
        metadata: whatever else is to be stored in the inbox.
        actor: for the history, if the conversation is opened or resumed; `lead:<id>` by default.

    Returns:
        the conversation, what has changed in it, and whether to answer.

    Raises:
        LeadNotFound: there is no such lead.
        LeadHasNoPhone: the conversation was to be opened, and the lead has no phone number. Nothing is recorded.
        TextOfAnotherLead: the key was used for a text of another lead. Nothing is recorded.
        UnreadableRow: Python cannot read the lead's conversation. The text is in the inbox all the same, and it is
            our turn. Correct the row, then answer by hand: the same key again is a duplicate.
        InvalidValue: an argument cannot be stored.
    """
    lead_id = lead.id if isinstance(lead, Lead) else lead
    provenance = Provenance(actor or f"lead:{lead_id}", "the lead wrote", key=key)
    details = None if metadata is None else clean_json("metadata", dict(metadata))
    entry = Entry("text", key, lead_id, clean_text("text", text), metadata=details)
    try:
        with atomic():
            return _receive(entry, open, provenance)
    except UnreadableRow:
        model = CloseEngineConversation
        with atomic():
            conversation_id = model.select(model.id).where(model.lead == lead_id).scalar()
            entry_id = entry.add(conversation_id)
            heard = entry_id is not None and _heard(entry, entry_id, provenance) is not None
            if entry_id is not None and conversation_id is not None and not heard:
                _our_turn(conversation_id)
                _supersede(conversation_id, entry_id)
        raise


def _receive(entry: Entry, open: EntryPoint | None, provenance: Provenance) -> Received:
    if optouts.word(entry.body or "") is Keyword.OPT_OUT:
        optouts.hold(entry.lead_id)
    conversation = lock_conversation(entry.lead_id)
    if conversation is None and not Lead.select().where(Lead.id == entry.lead_id).exists():
        raise LeadNotFound(entry.lead_id)
    entry_id = entry.add(None if conversation is None else conversation.id)
    if entry_id is None:
        return _repeated(entry, conversation)
    if (keyword := _heard(entry, entry_id, provenance)) is not None:
        return Received(lock_conversation(entry.lead_id), keyword=keyword)
    is_first, change = conversation is None, None
    is_open = conversation is not None and conversation.stage is not Stage.CLOSED_LOST
    if open is not None and not is_open and optouts.opted_out(entry.lead_id) is None:
        under = provenance.under("text")
        conversation = open_under(entry.lead_id, open, None, under)
        mine = (StageChange.conversation_id == conversation.id) & (StageChange.key == under.key)
        change = StageChange.get_or_none(mine)
        if change is None:  # another text has opened it at the same moment
            conversation = lock_conversation(entry.lead_id)
    if conversation is None:
        return Received(None)
    wrote = {"text_id": entry_id, "key": entry.key, "text": entry.body}
    publish(Event.LEAD_WROTE, conversation.id, str(entry_id), wrote)
    if conversation.stage in CLOSED_STAGES:
        return Received(conversation)
    if conversation.stage is Stage.STALLED:
        change = change_stage(conversation, "resume", {}, provenance.under("text"))
    elif change is None:
        write_fields(conversation, {}, "receive()")
    _our_turn(conversation.id)
    superseded = _supersede(conversation.id, entry_id)
    if any(each.type is ActionType.SEND_PAYMENT_LINK for each in superseded if isinstance(each, PendingAction)):
        conversation.reload()  # nothing may be left that it waits for in PENDING_APPROVAL
    done = _ids(change, superseded)
    if done or is_first:
        kept = {"conversation_id": conversation.id, "result": done or None}
        InboxEntry.update(kept).where(InboxEntry.id == entry_id).execute()
    return _result(conversation, change, superseded)


def _heard(entry: Entry, entry_id: int, provenance: Provenance) -> Keyword | None:
    """Do what a keyword asks for, and return it; None if the text is none.

    It is no word in the conversation: it supersedes no draft, and nobody is to answer it.
    """
    keyword = optouts.word(entry.body or "")
    if keyword is None or not optouts.heard(keyword, entry.lead_id, provenance.under("text")):
        return None
    kept = {"conversation_id": None, "result": {"keyword": keyword.value}}
    InboxEntry.update(kept).where(InboxEntry.id == entry_id).execute()
    return keyword


def _result(
    conversation: CloseEngineConversation,
    change: StageChange | None,
    superseded: tuple[OutboxMessage | PendingAction, ...],
    duplicate: bool = False,
) -> Received:
    resumed = change is not None and change.trigger == "resume"
    takeover = conversation.takeover()
    return Received(
        conversation,
        duplicate,
        opened=None if resumed else change,
        resumed=change if resumed else None,
        superseded=superseded,
        taken_over_by=None if takeover is None else takeover.taken_by,
    )


def _ids(change: StageChange | None, superseded: tuple[OutboxMessage | PendingAction, ...]) -> dict[str, Any]:
    """Say what was done, so that a repetition returns it."""
    done: dict[str, Any] = {}
    if change is not None:
        done["change"] = change.id
    if superseded:
        done["messages"] = [each.id for each in superseded if isinstance(each, OutboxMessage)]
        done["actions"] = [each.id for each in superseded if isinstance(each, PendingAction)]
    return done


def _repeated(entry: Entry, conversation: CloseEngineConversation | None) -> Received:
    """Return what the first processing of a text returned."""
    first = entry.first()
    is_of_this_lead = first.lead_id == entry.lead_id
    # After a merge, the texts of the lead that is gone belong to the one that was kept.
    if not is_of_this_lead and (conversation is None or first.conversation_id != conversation.id):
        raise TextOfAnotherLead(entry.key, entry.lead_id, str(first.lead_id))
    done = first.result or {}
    if conversation is None or "keyword" in done:
        return Received(conversation, duplicate=True, keyword=Keyword(done["keyword"]) if "keyword" in done else None)
    change = StageChange.get_or_none(StageChange.id == done["change"]) if "change" in done else None
    superseded = _superseded(done.get("messages", []), done.get("actions", []))
    return _result(conversation, change, superseded, duplicate=True)


def _our_turn(conversation_id: str) -> None:
    """Note that the lead waits for our answer. If the lead waited before, it is since then."""
    noted = (
        "UPDATE {deadlines} SET \"trigger\" = 'answer', at = CASE \"trigger\" WHEN 'answer' THEN at ELSE {moment} END "
        "WHERE \"trigger\" IN ('stall', 'answer') AND subject_id = %s"
    )
    current().execute(noted, (conversation_id,))


_MESSAGES = """UPDATE {outbox} SET status = 'WITHDRAWN', last_error = 'the lead has written since'
    WHERE conversation_id = %s AND status = 'PENDING' AND leased_by IS NULL AND if_lead_writes = 'withdraw'
    RETURNING id"""


def _supersede(conversation_id: str, entry_id: int) -> tuple[OutboxMessage | PendingAction, ...]:
    """Withdraw what was drafted before a text, and waits; return it. Whoever calls this holds the conversation."""
    withdrawn = [row[0] for row in current().execute(_MESSAGES, (conversation_id,)).fetchall()]
    expired = supersede(conversation_id, entry_id)
    return _superseded(withdrawn, expired)


def _superseded(message_ids: list[int], action_ids: list[str]) -> tuple[OutboxMessage | PendingAction, ...]:
    """Load what a text has superseded. What cannot be read is passed over."""
    if not message_ids and not action_ids:
        return ()
    messages = OutboxMessage.select().readable().where(OutboxMessage.id.in_(message_ids)).order_by(OutboxMessage.id)
    actions = PendingAction.select().readable().where(PendingAction.id.in_(action_ids)).order_by(PendingAction.id)
    return (*messages, *actions)


def lock_conversation(lead_id: str) -> CloseEngineConversation | None:
    """Load the lead's conversation, and lock it against every other writer."""
    query = CloseEngineConversation.select().where(CloseEngineConversation.lead == lead_id)
    conversation: CloseEngineConversation | None = current().for_update(query).first()
    return conversation


@dataclass(frozen=True)
class Entry:
    """What came in, before it is stored."""

    kind: str
    key: str
    #: A str; None only of a payment.
    lead_id: Any
    body: str | None = None
    amount: int | None = None
    currency: str | None = None
    issue: PaymentIssue | None = None
    sentence: str | None = None
    metadata: Mapping[str, Any] | None = None

    def add(self, conversation_id: str | None) -> int | None:
        """Store it, and return the id of its entry; None if its key is already there."""
        values = {
            **vars(self),
            "conversation_id": conversation_id,
            "received_at": peewee.SQL(current().dialect.sql("{moment}")),
        }
        insert = InboxEntry.insert(values)
        insert = insert.on_conflict(action="nothing", conflict_target=[InboxEntry.kind, InboxEntry.key])
        rows = list(insert.returning(InboxEntry.id).tuples().execute())
        return rows[0][0] if rows else None

    def first(self) -> InboxEntry:
        """Return the entry that has its key."""
        found: InboxEntry = InboxEntry.get((InboxEntry.kind == self.kind) & (InboxEntry.key == self.key))
        return found
