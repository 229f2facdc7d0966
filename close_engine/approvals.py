"""Drafts that the AI wants to send, and the queue in which a human approves some of them first.

    submit(conversation, ActionType.SEND_MESSAGE, "What does your business do?")    # the outbox, or a PendingAction
    for action in pending_actions():
        action.approve(by="dana")                       # or action.reject(by="dana", reason="too pushy")
    approve_all(by="dana", type=ActionType.SEND_PREVIEW)

Submitting writes the conversation: of two replies drafted from the same state, one is submitted and the other is a
conflict. Approving, rejecting or expiring is one guarded write of the action. The database does the rest (it puts the
message into the outbox, or moves the conversation back from PENDING_APPROVAL), even if the CRM's own screen decides.

>>> needs_approval(AutonomyLevel.SEMI_AUTO, ActionType.SEND_PAYMENT_LINK)
True
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import peewee
from peewee import SQL

from close_engine import numbers
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current, is_transient, moment, now
from close_engine.database.fields import (
    CleaningAccessor,
    EnumField,
    JsonField,
    TextField,
    UtcDateTimeField,
    clean_json,
    clean_text,
    clean_words,
    create_id,
    dump_json,
    stored_time,
)
from close_engine.database.provenance import Provenance, Write, own_key
from close_engine.database.reading import Rows
from close_engine.database.transaction import accept_row, atomic
from close_engine.errors import (
    ActionNotFound,
    ActionSuperseded,
    CloseEngineError,
    ConditionNotMet,
    ConversationClosed,
    ConversationNotFound,
    ConversationTakenOver,
    GuardMissing,
    InvalidValue,
    KeyReused,
    MessageCleared,
    StageConflict,
    one_line,
)
from close_engine.firing import facts_of, write_fields
from close_engine.machine import LINK_GIVEN, TRIGGERS, decide, decide_action
from close_engine.models import BaseModel
from close_engine.outbox import (
    IF_LEAD_WRITES,
    OutboxMessage,
    find_by_key,
    priority_of,
    put_in,
    require_order,
    require_words,
    strictest_level,
)
from close_engine.stages import CLOSED_STAGES, ActionStatus, ActionType, AutonomyLevel, IfLeadWrites, Stage

__all__ = [
    "APPROVAL_FIRST",
    "DEFAULT_EXPIRY",
    "Decided",
    "PendingAction",
    "Policy",
    "approve_all",
    "expiring_first",
    "needs_approval",
    "pending_actions",
    "reject_all",
    "submit",
]

#: The types of action that a human must approve first, by autonomy level.
APPROVAL_FIRST: Mapping[AutonomyLevel, frozenset[ActionType]] = {
    AutonomyLevel.FULL_AUTO: frozenset(),
    AutonomyLevel.SEMI_AUTO: frozenset({ActionType.SEND_PAYMENT_LINK}),
    AutonomyLevel.MANUAL: frozenset(ActionType),
}

#: How long a pending action can be approved, unless `submit` is given another time.
DEFAULT_EXPIRY = timedelta(hours=24)

#: The trigger that is fired when a message of each type is sent.
_TRIGGER = {
    ActionType.SEND_MESSAGE: "start_qualifying",
    ActionType.SEND_PREVIEW: "send_preview",
    ActionType.SEND_PAYMENT_LINK: "send_payment_link",
}

Policy = Callable[[AutonomyLevel, ActionType], bool]
"""Decides whether a human must approve an action of this type in a conversation of this level."""


def needs_approval(level: AutonomyLevel, type: ActionType) -> bool:
    """Return whether `APPROVAL_FIRST` has this type at this level. It is the default policy of `submit`."""
    return type in APPROVAL_FIRST[level]


class _StatusAccessor(CleaningAccessor):
    """An action past `expires_at` reads as EXPIRED even before a sweep has marked it.

    This goes by Python's clock. Whether it can be decided is judged by the database's.
    """

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
        metadata: what the sender needs besides the text (`paymentUrl`, `previewUrl`); `sendAfter` if it must wait,
            `notAfter` if it must not leave later, `sendPriority` if it has a priority of its own.
        status: PENDING until somebody decides; reads as EXPIRED from `expires_at` on.
        approved_by: who decided, even if they rejected it.
        approved_at: when it was approved, by the database's clock.
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
        """Approve it, which puts its message into the outbox. Approving it again changes nothing.

        Args:
            by: who approves it.
            message: the text to send instead of the draft.

        Returns:
            the message in the outbox.

        Raises:
            ActionDecided: it was rejected, or it expired.
            ConversationClosed: its conversation has closed in the meantime.
            ActionSuperseded: the lead has written since it was drafted.
            ConversationNotFound, ActionNotFound: it was deleted.
            MessageCleared: it was approved before, and its message was cleared away since.
            ConditionNotMet: it is a payment link without a `paymentUrl` in its metadata.
            GuardMissing: nothing would follow from the approval.
            InvalidValue: an argument cannot be stored, or `sendAfter` or `notAfter` in its metadata is no time.
        """
        values = {"approved_by": by}
        if message is not None:
            values["draft_message"] = require_words("message", message)
        self._decide("approve", ActionStatus.APPROVED, by, values)
        key = own_key("action", self.id)
        sent: OutboxMessage | None = OutboxMessage.get_or_none(
            (OutboxMessage.conversation_id == self.conversation_id) & (OutboxMessage.key == key)
        )
        if sent is None:
            raise MessageCleared(self.id)
        return sent

    def reject(self, by: str, reason: str | None = None) -> None:
        """Reject it. A payment link's conversation goes back to PREVIEW_SENT. Rejecting it again changes nothing.

        Args:
            by: who rejects it.
            reason: why, for the history and the action's metadata.

        Raises:
            ActionDecided: it was approved, or it expired.
            ActionNotFound: it was deleted.
            GuardMissing: nothing would follow from the rejection.
            InvalidValue: an argument cannot be stored.
        """
        values: dict[str, Any] = {"approved_by": by}
        if reason is not None:
            values["metadata"] = _with(rejectionReason=clean_text("reason", reason))
        self._decide("reject", ActionStatus.REJECTED, by, values, reason)

    def _decide(
        self, trigger: str, dest: ActionStatus, by: str, values: dict[str, Any], reason: str | None = None
    ) -> None:
        """Decide in one guarded UPDATE; the database does what follows from it. To approve, it comes out as

        UPDATE "pending_actions" SET "status" = 'APPROVED', "approved_by" = %s
        WHERE "id" = %s AND "status" || '' = 'PENDING' AND ("expires_at" IS NULL OR "expires_at" > %s)
        AND EXISTS (SELECT … FROM "close_engine_conversations" WHERE "stage" NOT IN ('COMPLETED', 'CLOSED_LOST') AND …)
        """
        clean_words("by", by, "it must say who decides")
        at = moment()
        undecided = (
            (PendingAction.id == self.id) & PendingAction.status.is_still(ActionStatus.PENDING) & _not_expired(at)
        )
        if dest is ActionStatus.APPROVED:
            conversation = CloseEngineConversation.id == PendingAction.conversation_id
            undecided &= peewee.fn.EXISTS(CloseEngineConversation.not_in_stages(*CLOSED_STAGES).where(conversation))
        write = Write(trigger, self.id, stored_time(at))
        try:
            with atomic(), current().attributed(Provenance(by, reason), write):
                written = PendingAction.update(status=dest, **values).where(undecided).execute()
        except peewee.IntegrityError as error:
            # The guard refused it: it expired or its conversation closed at that moment, or it lacks something.
            self._refuse_unless_decided(trigger, dest, str(error))
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

    def _refuse_unless_decided(self, trigger: str, dest: ActionStatus, refusal: str = "") -> None:
        """Reload the row, and raise why it cannot be decided; return if the same decision was made before.

        `refusal` is what the database's guard said, if it was asked.
        """
        with atomic():
            # Wait for a concurrent decision: it may have started before the action expired and still commit.
            current().for_update(PendingAction.select(PendingAction.id).where(PendingAction.id == self.id)).execute()
            self._reload()
        status = self.status
        if status is ActionStatus.PENDING and self.expires_at is not None and self.expires_at <= moment():
            status = ActionStatus.EXPIRED  # by the database's clock, which decided; `status` goes by Python's
        if status is dest:
            return
        decide_action(trigger, self.id, status)
        conversation = CloseEngineConversation.get_or_none(CloseEngineConversation.id == self.conversation_id)
        if conversation is None:
            raise ConversationNotFound(self.conversation_id)
        if "has written since" in refusal:
            raise ActionSuperseded(self.id)
        if conversation.stage in CLOSED_STAGES or not refusal:
            raise ConversationClosed(conversation.id, conversation.stage)
        metadata = self.metadata if isinstance(self.metadata, dict) else {}
        for name in ("sendAfter", "notAfter"):
            if f"metadata.{name}" in refusal:
                raise InvalidValue(name, metadata.get(name), "write a time like 2026-01-31T08:00:00.000Z")
        given = {"payment_link_url": metadata.get("paymentUrl")}
        if self.type is ActionType.SEND_PAYMENT_LINK and not LINK_GIVEN.is_met(facts_of(conversation, given)):
            raise ConditionNotMet(conversation.id, "send_payment_link", conversation.stage, LINK_GIVEN.sentence)

    def __repr__(self) -> str:
        return f"<PendingAction {self.id}: {self.type} of {self.conversation_id}, {self.status}>"


def _not_expired(at: Any) -> Any:
    """Match the actions that have not expired at a moment."""
    return PendingAction.expires_at.is_null() | (PendingAction.expires_at > at)


def pending_actions(
    conversation: CloseEngineConversation | str | None = None, type: ActionType | None = None
) -> Rows[PendingAction]:
    """Return a `readable()` query for the approval queue: undecided actions that have not expired, oldest first.

    Args:
        conversation: only the actions of this conversation; the object or its id.
        type: only the actions of this type.

    Returns:
        the query, to iterate over or to narrow down. Afterwards, its `passed_over` has the actions that cannot be read.
    """
    present = SQL(current().dialect.moment)
    waiting = (PendingAction.status == ActionStatus.PENDING) & _not_expired(present)
    query = PendingAction.select().readable().where(waiting).order_by(PendingAction.created_at, PendingAction.id)
    if conversation is not None:
        query = query.where(PendingAction.conversation_id == getattr(conversation, "id", conversation))
    return query if type is None else query.where(PendingAction.type == type)


def expiring_first(type: ActionType | None = None) -> Rows[PendingAction]:
    """Return the query of `pending_actions`, with what expires soonest first and what never expires last."""
    expires_at = PendingAction.expires_at
    order = (expires_at.is_null(), expires_at, PendingAction.created_at, PendingAction.id)
    return pending_actions(type=type).order_by(*order)


@dataclass(frozen=True)
class Decided:
    """What became of many actions that were to be decided alike.

    Attributes:
        done: list of str, ids of those that are decided so, oldest first.
        failed: dict, the id of each other one to a sentence that says why not.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[Any, str] = field(default_factory=dict)


def approve_all(by: str, actions: Iterable[PendingAction] | None = None, *, type: ActionType | None = None) -> Decided:
    """Approve many actions, each in a transaction of its own. One that cannot be approved holds up no other.

    Args:
        by: who approves them.
        actions: which ones; the default is all that wait.
        type: only those of this type.

    Returns:
        Decided.

    Raises:
        GuardMissing: nothing would follow from the approvals.
        InvalidValue: `by` says nothing.
    """
    return _decide_all(by, actions, type, lambda action: action.approve(by))


def reject_all(
    by: str,
    actions: Iterable[PendingAction] | None = None,
    *,
    type: ActionType | None = None,
    reason: str | None = None,
) -> Decided:
    """Reject many actions, each in a transaction of its own. One that cannot be rejected holds up no other.

    Args:
        by: who rejects them.
        actions: which ones; the default is all that wait.
        type: only those of this type.
        reason: why, for the history and the actions' metadata.

    Returns:
        Decided.

    Raises:
        GuardMissing: nothing would follow from the rejections.
        InvalidValue: `by` says nothing.
    """
    return _decide_all(by, actions, type, lambda action: action.reject(by, reason))


def _decide_all(
    by: str,
    actions: Iterable[PendingAction] | None,
    type: ActionType | None,
    decide: Callable[[PendingAction], object],
) -> Decided:
    clean_words("by", by, "it must say who decides")
    decided, listed = Decided(), pending_actions(type=type) if actions is None else actions
    for action in [action for action in listed if type in (None, action.type)]:
        try:
            decide(action)
        except GuardMissing:
            raise
        except (CloseEngineError, peewee.DatabaseError) as error:
            if is_transient(error):
                raise
            decided.failed[action.id] = one_line(error)
        else:
            decided.done.append(action.id)
    if isinstance(listed, Rows):
        decided.failed.update((row.row_id, one_line(row)) for row in listed.passed_over)
    return decided


_WAITING = "SELECT a.id, {rule} FROM pending_actions a WHERE a.conversation_id = %s AND a.status = 'PENDING' {lock}"


def supersede(conversation_id: str, text_id: int) -> list[str]:
    """Expire the drafts that wait, because the lead has written; mark those that stay.

    What somebody decides at this moment is passed over: the trigger that approves looks again, once it holds the
    conversation. Whoever calls this holds the conversation.

    Args:
        conversation_id: str, the conversation.
        text_id: int, id of the text in the inbox.

    Returns:
        list of str, ids of those that expired.
    """
    binding = current()
    rule = if_lead_writes("a.type", "a.metadata")
    query = _WAITING.replace("{rule}", rule).replace("{lock}", binding.dialect.skip_locked("a"))
    waiting = dict(binding.execute(query, (conversation_id,)).fetchall())
    expired = sorted(action_id for action_id, rule in waiting.items() if rule == IfLeadWrites.WITHDRAW)
    expire_superseded(expired, text_id)
    _mark(sorted(waiting.keys() - set(expired)), {}, leadWroteSince=text_id)
    return expired


def expire_superseded(action_ids: list[str], text_id: int) -> None:
    """Expire drafts that a text of the lead has superseded. Whoever calls this holds them."""
    if not action_ids:
        return
    provenance = Provenance("close_engine", "the lead has written since")
    with current().attributed(provenance, Write("expire", None, stored_time(moment()))):
        _mark(action_ids, {"status": ActionStatus.EXPIRED}, supersededBy=text_id)


def _mark(action_ids: list[str], values: Mapping[str, Any], **added: Any) -> None:
    """Write values to actions, and a mark into their metadata. Metadata that nobody can read gets no mark."""
    if not action_ids:
        return
    these = PendingAction.id.in_(action_ids)
    try:
        with atomic():
            PendingAction.update({**values, "metadata": _with(**added)}).where(these).execute()
    except (peewee.IntegrityError, peewee.OperationalError) as error:
        if is_transient(error):
            raise
        if len(action_ids) > 1:
            for action_id in action_ids:
                _mark([action_id], values, **added)
        elif values:
            PendingAction.update(values).where(these).execute()


def if_lead_writes(type: str, metadata: str) -> str:
    """Return the SQL that says what becomes of an action if the lead writes, from its columns of these names."""
    said = current().dialect.json_text(metadata, "ifLeadWrites")
    return f"COALESCE({said}, CASE {type} WHEN 'SEND_MESSAGE' THEN 'withdraw' ELSE 'send' END)"


def _with(**added: Any) -> SQL:
    """Return an expression for the metadata with something added."""
    return SQL(current().dialect.merged_mapping("metadata"), [dump_json(added)])


def submit(
    conversation: CloseEngineConversation,
    type: ActionType,
    draft: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    send_after: timedelta | datetime | None = None,
    not_after: timedelta | datetime | None = None,
    priority: int | None = None,
    key: str | None = None,
    actor: str | None = None,
    policy: Policy = needs_approval,
    expires_after: timedelta | None = DEFAULT_EXPIRY,
    if_lead_writes: IfLeadWrites | Literal["withdraw", "send"] | None = None,
) -> OutboxMessage | PendingAction:
    """Submit a draft: to the outbox, or to a human for approval first, depending on the autonomy level.

    The level is the stricter one of the conversation's and of its lead's. A payment link that waits for approval moves
    the conversation to PENDING_APPROVAL. Of two drafts written from the same state of a conversation, one is submitted
    and the other is a conflict. In a conversation that a human has taken over, only that human's drafts are let in, and
    each is approved at once.

    Args:
        conversation: as it was when the draft was written.
        type: what the message is for.
        draft: its text.
        metadata: what else the sender needs: `paymentUrl` for a payment link, `previewUrl` for a preview, ….
        send_after: a delay, or a point in time with a timezone, before which it is not sent.
        not_after: how long it may wait, or until when, as a point in time with a timezone. If it could not leave by
            then, it is withdrawn. A draft that waits for approval expires then at the latest.
        priority: from 0 to 9: what is due with a higher one leaves first, within the order of its lane. The default is
            the one of its type in `outbox.PRIORITIES`, or else 0.
        key: idempotency key, unique within the conversation. Using it again returns the first result.
        actor: who wrote the draft, for the history.
        policy: decides whether a human must approve it first.
        expires_after: how long it can be approved; None means for ever.
        if_lead_writes: whether to `withdraw` or to `send` it if the lead writes before it leaves. The default is to
            withdraw a SEND_MESSAGE, and to send the others.

    Returns:
        the message in the outbox, or the PendingAction.

    Raises:
        LeadOptedOut: the lead opted out of texts.
        ConversationClosed: it is COMPLETED or CLOSED_LOST.
        ConversationTakenOver: a human has taken it over, and `actor` is somebody else.
        TransitionNotAllowed: a preview or a payment link cannot be sent from this stage.
        ConditionNotMet: the payment link has no URL.
        KeyReused: the key was used for something of another type.
        StageConflict: somebody changed the conversation since it was loaded.
        InvalidValue: the draft is empty, or an argument cannot be stored.
    """
    type = PendingAction.type.clean(type)
    require_words("draft", draft)
    require_order(send_after, not_after)
    urgency = priority_of(type, priority)
    provenance = Provenance(actor, key=key)
    details = clean_json("metadata", dict(metadata or {}))
    if if_lead_writes is not None:
        details["ifLeadWrites"] = str(OutboxMessage.if_lead_writes.clean(if_lead_writes))
    with atomic():
        if first := _find_submitted(conversation, key, type):
            return first
        numbers.refuse(conversation.lead_id)
        takeover = conversation.takeover()
        if takeover is not None and provenance.actor != takeover.taken_by:
            raise ConversationTakenOver(conversation.id, takeover.taken_by)
        level = strictest_level(conversation)
        waits = policy(level, type)
        trigger = _trigger_behind(conversation, type, details)
        # In the other stages the link waits too, but moves nothing: another one is waiting, or it is sent again.
        asks_for_approval = (
            waits
            and takeover is None
            and type is ActionType.SEND_PAYMENT_LINK
            and conversation.may("request_approval").allowed
        )
        action_id = _action_id(conversation, key)
        try:
            if asks_for_approval:
                conversation.request_approval(actor=provenance.actor, metadata={"action_id": action_id})
            else:
                write_fields(conversation, {}, "submit()")
        except StageConflict as conflict:
            # A strict transaction that lost a race can do nothing more.
            if conflict.found is not None and (first := _find_submitted(conversation, key, type)):
                return first
            raise
        if not waits and takeover is None:
            # If the level requires approval, then the caller's own policy let it through.
            approved_by = "policy" if needs_approval(level, type) else None
            return put_in(
                conversation.id,
                send_after,
                not_after,
                level=level,
                topic=str(type),
                priority=urgency,
                body=draft,
                payload=details,
                key=key,
                trigger=trigger,
                approved_by=approved_by,
                submitted_by=provenance.actor,
                if_lead_writes=if_lead_writes or IF_LEAD_WRITES[type],
            )
        if provenance.actor is not None:
            details["submittedBy"] = provenance.actor
        if priority is not None:
            details["sendPriority"] = urgency
        expires_at = None if expires_after is None else moment() + expires_after
        if send_after is not None:
            details["sendAfter"] = stored_time(_point(send_after))
        if not_after is not None:
            until = _point(not_after)
            details["notAfter"] = stored_time(until)
            if takeover is None:  # what they submit themselves is approved at once
                expires_at = until if expires_at is None else min(expires_at, until)
        action = PendingAction.create(
            id=action_id,
            conversation_id=conversation.id,
            lead_id=conversation.lead_id,
            type=type,
            draft_message=draft,
            metadata=details,
            expires_at=expires_at,
        )
        return action if takeover is None else action.approve(by=takeover.taken_by)


def _point(time: timedelta | datetime) -> datetime:
    """Return the moment after a delay by the database's clock, or the moment that is given."""
    point: datetime = OutboxMessage.available_at.clean(moment() + time if isinstance(time, timedelta) else time)
    return point


def _trigger_behind(conversation: CloseEngineConversation, type: ActionType, details: Mapping[str, Any]) -> str | None:
    """Return the trigger that is fired when a message of this type is sent; raise if it may not be sent."""
    if conversation.stage in CLOSED_STAGES:
        raise ConversationClosed(conversation.id, conversation.stage)
    if type is ActionType.SEND_MESSAGE and conversation.stage is not Stage.INITIATED:
        return None
    given = {"payment_link_url": details.get("paymentUrl"), "approved_by": "to be decided"}
    trigger, facts = _TRIGGER[type], facts_of(conversation, given)
    if facts.stage is TRIGGERS[trigger].dest:
        # It is sent again: check what was required the first time.
        facts = facts._replace(stage=TRIGGERS[trigger].sources[0])
    decide(trigger, facts)
    return trigger


def _find_submitted(
    conversation: CloseEngineConversation, key: str | None, type: ActionType
) -> OutboxMessage | PendingAction | None:
    """Find what was already submitted under this key: the action, or the message, or the action that it has become.

    Raises:
        KeyReused: the key was used for something of another type.
    """
    if key is None:
        return None
    action: PendingAction | None = PendingAction.get_or_none(PendingAction.id == _action_id(conversation, key))
    if action is not None and action.type is not type:
        raise KeyReused(conversation.id, key, action.type, type)
    if action is not None:
        return action
    message = find_by_key(conversation.id, key, type)
    if message is None or message.action_id is None:
        return message
    became: PendingAction | None = PendingAction.get_or_none(PendingAction.id == message.action_id)
    return became or message


def _action_id(conversation: CloseEngineConversation, key: str | None) -> str:
    """Make an id. The same key makes the same id, so that the primary key keeps it from being used twice."""
    if key is None:
        return create_id()
    return "k" + hashlib.sha256(f"{conversation.id}\n{key}".encode()).hexdigest()[:24]
