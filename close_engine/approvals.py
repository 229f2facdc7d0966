"""Drafts: what the AI wants to send, and the queue in which a human sees some of it first.

    submit(conversation, ActionType.SEND_MESSAGE, "What does your business do?")    # the outbox, or a PendingAction
    for action in pending_actions():
        action.approve(by="dana")                       # or action.reject(by="dana", reason="too pushy")

Submitting is a write of the conversation: of two replies made from the same state, one is submitted, the other is a
conflict. Approving, rejecting and expiring are one guarded write of the action, and what follows from it (the message
in the outbox, the way back from PENDING_APPROVAL) is done in the database, also where the CRM's own screen decides.

>>> needs_approval(AutonomyLevel.SEMI_AUTO, ActionType.SEND_PAYMENT_LINK)
True
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

import peewee
from peewee import SQL

from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current, now
from close_engine.database.fields import (
    CleaningAccessor,
    EnumField,
    JsonField,
    TextField,
    UtcDateTimeField,
    clean_json,
    clean_text,
    create_id,
    dump_json,
    stored_time,
)
from close_engine.database.provenance import Provenance, Write
from close_engine.database.transaction import accept_row, atomic
from close_engine.errors import (
    ActionNotFound,
    ConversationClosed,
    ConversationNotFound,
    InvalidValue,
    StageConflict,
)
from close_engine.firing import facts_of, write_fields
from close_engine.machine import TRIGGERS, decide, decide_action
from close_engine.models import BaseModel
from close_engine.outbox import OutboxMessage, enqueue, moment_after
from close_engine.stages import CLOSED_STAGES, ActionStatus, ActionType, AutonomyLevel, Stage

__all__ = ["APPROVAL_FIRST", "DEFAULT_EXPIRY", "PendingAction", "Policy", "needs_approval", "pending_actions", "submit"]

#: What a human sees first, by autonomy level.
APPROVAL_FIRST: Mapping[AutonomyLevel, frozenset[ActionType]] = {
    AutonomyLevel.FULL_AUTO: frozenset(),
    AutonomyLevel.SEMI_AUTO: frozenset({ActionType.SEND_PAYMENT_LINK}),
    AutonomyLevel.MANUAL: frozenset(ActionType),
}

#: How long a pending action can be approved.
DEFAULT_EXPIRY = timedelta(hours=24)

#: The trigger that a sent message of each type is behind.
_TRIGGER = {
    ActionType.SEND_MESSAGE: "start_qualifying",
    ActionType.SEND_PREVIEW: "send_preview",
    ActionType.SEND_PAYMENT_LINK: "send_payment_link",
}

Policy = Callable[[AutonomyLevel, ActionType], bool]
"""Whether a human must approve an action of this type, in a conversation of this level."""


def needs_approval(level: AutonomyLevel, type: ActionType) -> bool:
    """The policy of the table above; give `submit` another one for an agency that wants it otherwise."""
    return type in APPROVAL_FIRST[level]


class _StatusAccessor(CleaningAccessor):
    """What is past its time is EXPIRED at the moment anyone looks, whether or not a sweep has been by."""

    def __get__(self, instance: Any, instance_type: type | None = None) -> Any:
        status = super().__get__(instance, instance_type)  # type: ignore[no-untyped-call]
        if instance is None or status is not ActionStatus.PENDING or instance.expires_at is None:
            return status
        return ActionStatus.EXPIRED if instance.expires_at <= now() else status


class _StatusField(EnumField[ActionStatus]):
    accessor_class = _StatusAccessor


class PendingAction(BaseModel):
    """A draft that waits for a human: a row of `pending_actions`.

    Attributes:
        metadata: what the sender needs besides the text (`paymentUrl`, `previewUrl`); `sendAfter` where it is to wait.
        status: PENDING until it is decided, and EXPIRED from `expires_at` on.
        approved_by: who decided.
        approved_at: when it was approved.
    """

    conversation_id = TextField[str](index=True)
    lead_id = TextField[str](index=True)
    type = EnumField[ActionType](ActionType)
    draft_message = TextField[str]()
    metadata = JsonField(null=True)
    status = _StatusField(
        ActionStatus, default=ActionStatus.PENDING, index=True, constraints=[SQL("DEFAULT 'PENDING'")]
    )
    approved_by = TextField["str | None"](null=True)
    approved_at = UtcDateTimeField["datetime | None"](null=True)
    expires_at = UtcDateTimeField["datetime | None"](null=True)
    created_at = UtcDateTimeField[datetime](default=now, constraints=[SQL("DEFAULT CURRENT_TIMESTAMP")])

    class Meta:
        table_name = "pending_actions"

    def approve(self, by: str, message: str | None = None) -> OutboxMessage:
        """Let it be sent; the second time changes nothing.

        Args:
            by: who approves it.
            message: the text to send instead of the draft.

        Returns:
            the message in the outbox.

        Raises:
            ActionDecided: it was rejected, or has expired.
            ConversationClosed: its conversation has closed meanwhile.
            ConversationNotFound, ActionNotFound: there is none any more.
        """
        values = {"approved_by": by}
        if message is not None:
            values["draft_message"] = clean_text("message", message)
        self._decide("approve", ActionStatus.APPROVED, by, values)
        sent: OutboxMessage = OutboxMessage.get(
            (OutboxMessage.conversation_id == self.conversation_id) & (OutboxMessage.key == f"action:{self.id}")
        )
        return sent

    def reject(self, by: str, reason: str | None = None) -> None:
        """Refuse it; a payment link's conversation goes back to PREVIEW_SENT. The second time changes nothing.

        Args:
            by: who rejects it.
            reason: why, for the history and the action's metadata.

        Raises:
            ActionDecided: it was approved, or has expired.
            ActionNotFound: there is none any more.
        """
        values: dict[str, Any] = {"approved_by": by}
        if reason is not None:
            added = dump_json({"rejectionReason": clean_text("reason", reason)})
            values["metadata"] = SQL(current().dialect.merged_mapping("metadata"), [added])
        self._decide("reject", ActionStatus.REJECTED, by, values, reason)

    def _decide(
        self, trigger: str, dest: ActionStatus, by: str, values: dict[str, Any], reason: str | None = None
    ) -> None:
        """One guarded write of the status; what follows from it the database does."""
        if not clean_text("by", by).strip():
            raise InvalidValue("by", by, "it must name somebody")
        moment = now()
        undecided = (
            (PendingAction.id == self.id) & PendingAction.status.is_still(ActionStatus.PENDING) & _in_time(moment)
        )
        if dest is ActionStatus.APPROVED:
            values["approved_at"] = moment
            conversation = CloseEngineConversation.id == PendingAction.conversation_id
            undecided &= peewee.fn.EXISTS(CloseEngineConversation.not_in_stages(*CLOSED_STAGES).where(conversation))
        write = Write(trigger, self.id, stored_time(moment))
        try:
            with atomic(), current().attributed(Provenance(by, reason), write):
                written = PendingAction.update(status=dest, **values).where(undecided).execute()
        except peewee.IntegrityError:
            # The database's guard: the conversation closed at this very moment.
            self._refuse_unless_decided(trigger, dest)
            raise
        if written:
            self._reload()
        else:
            self._refuse_unless_decided(trigger, dest)

    def _reload(self) -> None:
        found = PendingAction.get_or_none(PendingAction.id == self.id)
        if found is None:
            raise ActionNotFound(self.id)
        accept_row(self, found)

    def _refuse_unless_decided(self, trigger: str, dest: ActionStatus) -> None:
        """Take over the row as it is now, and raise why the decision came too late; return if it was made before."""
        with atomic():
            # Wait for a concurrent decision: it may have started before the action expired and still commit.
            current().for_update(PendingAction.select(PendingAction.id).where(PendingAction.id == self.id)).execute()
            self._reload()
        if self.status is dest:
            return
        decide_action(trigger, self.id, self.status)
        conversation = CloseEngineConversation.get_or_none(CloseEngineConversation.id == self.conversation_id)
        if conversation is None:
            raise ConversationNotFound(self.conversation_id)
        raise ConversationClosed(conversation.id, conversation.stage)

    def __repr__(self) -> str:
        return f"<PendingAction {self.id}: {self.type} of {self.conversation_id}, {self.status}>"


def _in_time(moment: datetime) -> Any:
    """That an action has not expired."""
    return PendingAction.expires_at.is_null() | (PendingAction.expires_at > moment)


def pending_actions(
    conversation: CloseEngineConversation | str | None = None, type: ActionType | None = None
) -> peewee.ModelSelect[PendingAction]:
    """The approval queue: what waits for a human and has not expired, oldest first.

    Args:
        conversation: only its own, or those of this id.
        type: only those of this type.

    Returns:
        a query, to iterate over or to narrow down.
    """
    waiting = (PendingAction.status == ActionStatus.PENDING) & _in_time(now())
    query = PendingAction.select().where(waiting).order_by(PendingAction.created_at, PendingAction.id)
    if conversation is not None:
        query = query.where(PendingAction.conversation_id == getattr(conversation, "id", conversation))
    return query if type is None else query.where(PendingAction.type == type)


def submit(
    conversation: CloseEngineConversation,
    type: ActionType,
    draft: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    send_after: timedelta | datetime | None = None,
    key: str | None = None,
    actor: str | None = None,
    policy: Policy = needs_approval,
    expires_after: timedelta | None = DEFAULT_EXPIRY,
) -> OutboxMessage | PendingAction:
    """Send a draft, or have a human see it first, as the conversation's autonomy level asks.

    A payment link that waits for approval takes the conversation to PENDING_APPROVAL. Of two drafts made from the same
    state of a conversation, one is submitted and the other is a conflict.

    Args:
        conversation: as it was when the draft was made.
        type: what the message is for.
        draft: its text.
        metadata: what the sender needs besides: `paymentUrl` for a payment link, `previewUrl` for a preview, ….
        send_after: how long it waits in the outbox, or until when (timezone-aware).
        key: idempotency key, unique within the conversation: the same key again returns the first result.
        actor: who made the draft, for the history.
        policy: whether a human sees it first.
        expires_after: how long it can be approved; None is for ever.

    Returns:
        the message in the outbox, or the PendingAction.

    Raises:
        ConversationClosed: it is COMPLETED or CLOSED_LOST.
        TransitionNotAllowed: the stage does not allow to send a preview or a payment link.
        ConditionNotMet: the payment link has no URL.
        StageConflict: somebody changed the conversation since it was loaded.
        InvalidValue: an argument cannot be stored.
    """
    type = PendingAction.type.clean(type)
    draft = clean_text("draft", draft)
    provenance = Provenance(actor, key=key)
    details = clean_json("metadata", dict(metadata or {}))
    with atomic():
        if first := _submitted(conversation, key):
            return first
        waits = policy(conversation.autonomy_level, type)
        trigger = _trigger_behind(conversation, type, details)
        # Elsewhere it can wait as well: beside another one, or to be sent again.
        asks_for_approval = (
            waits and type is ActionType.SEND_PAYMENT_LINK and conversation.may("request_approval").allowed
        )
        action_id = _action_id(conversation, key)
        try:
            if asks_for_approval:
                conversation.request_approval(actor=provenance.actor, metadata={"action_id": action_id})
            else:
                write_fields(conversation, {}, "submit()")
        except StageConflict:
            if first := _submitted(conversation, key):
                return first
            raise
        if not waits:
            # What the level would have a human see, a policy of the caller's own has let through.
            approved_by = "policy" if needs_approval(conversation.autonomy_level, type) else None
            return enqueue(
                conversation,
                type,
                draft,
                payload=details,
                send_after=send_after,
                key=key,
                trigger=trigger,
                approved_by=approved_by,
                submitted_by=provenance.actor,
            )
        if provenance.actor is not None:
            details["submittedBy"] = provenance.actor
        if send_after is not None:
            details["sendAfter"] = stored_time(moment_after(send_after))
        return PendingAction.create(
            id=action_id,
            conversation_id=conversation.id,
            lead_id=conversation.lead_id,
            type=type,
            draft_message=draft,
            metadata=details,
            expires_at=None if expires_after is None else now() + expires_after,
        )


def _trigger_behind(conversation: CloseEngineConversation, type: ActionType, details: Mapping[str, Any]) -> str | None:
    """The trigger that a message of this type fires when it is sent, if it may be sent at all."""
    if conversation.stage in CLOSED_STAGES:
        raise ConversationClosed(conversation.id, conversation.stage)
    if type is ActionType.SEND_MESSAGE and conversation.stage is not Stage.INITIATED:
        return None
    given = {"payment_link_url": details.get("paymentUrl"), "approved_by": "whoever will"}
    trigger, facts = _TRIGGER[type], facts_of(conversation, given)
    if facts.stage is TRIGGERS[trigger].dest:
        # To be sent again, which needs what it needed the first time.
        facts = facts._replace(stage=TRIGGERS[trigger].sources[0])
    decide(trigger, facts)
    return trigger


def _submitted(conversation: CloseEngineConversation, key: str | None) -> OutboxMessage | PendingAction | None:
    """What this key made already."""
    if key is None:
        return None
    sent = (OutboxMessage.conversation_id == conversation.id) & (OutboxMessage.key == key)
    return OutboxMessage.get_or_none(sent) or PendingAction.get_or_none(
        PendingAction.id == _action_id(conversation, key)
    )


def _action_id(conversation: CloseEngineConversation, key: str | None) -> str:
    """A new id; the same one again for the same key, which the primary key then keeps from being used twice."""
    if key is None:
        return create_id()
    return "k" + hashlib.sha256(f"{conversation.id}\n{key}".encode()).hexdigest()[:24]
