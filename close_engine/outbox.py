"""The outbox: messages are stored in the transaction that causes them, and any number of workers send them, in order.

    with close_engine.atomic():
        conversation.start_building(actor="worker-7")
        outbox.enqueue(conversation, "SEND_MESSAGE", "We are building your site now.")

    for message in outbox.claim(worker="worker-7"):
        message.sent(provider_id=send(message))         # or message.retry(error), or message.give_up(error)

The texts of a conversation are one lane, and each other topic of it is a lane of its own. At most one message of a lane
is in flight, and the oldest that is due comes first. Claiming a message leases it, to be sent now. If the worker dies,
another one can claim the message when the lease ends, so after a crash a message may reach the provider twice. Pass
`message.send_key` to the provider as the idempotency key: it is the same every time, and no other message has it.
"""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal

import peewee

from close_engine import deliveries, numbers, pauses
from close_engine.conversations import CloseEngineConversation, locked
from close_engine.database.binding import current, is_transient, moment, now
from close_engine.database.dialect import Dialect
from close_engine.database.fields import (
    LONGEST_SPAN,
    EnumField,
    JsonField,
    TextField,
    UtcDateTimeField,
    clean_text,
    clean_words,
    storable_text,
)
from close_engine.database.provenance import Provenance
from close_engine.database.reading import Rows
from close_engine.database.transaction import accept, accept_row, atomic
from close_engine.errors import (
    ConversationClosed,
    ConversationNotFound,
    ConversationTakenOver,
    InvalidValue,
    KeyReused,
    LeadNotFound,
    LeadOptedOut,
    LeaseLost,
    MessageNotDead,
    MessageNotFound,
    ProviderIdTaken,
    TransitionRefused,
    UnknownTrigger,
    UnreadableRow,
)
from close_engine.firing import change_stage
from close_engine.machine import TRIGGERS
from close_engine.models import BaseModel, Lead, StageChange
from close_engine.stages import (
    CLOSED_STAGES,
    ActionType,
    AutonomyLevel,
    DeliveryStatus,
    IfLeadWrites,
    MessageStatus,
    Stage,
)

__all__ = [
    "PRIORITIES",
    "DeadLine",
    "OutboxMessage",
    "claim",
    "claimable",
    "dead_lines",
    "due_in",
    "enqueue",
    "requeue",
    "requeue_all",
    "undelivered_lines",
    "waiting",
]

#: Topics that are texts to the lead: one lane, and not sent after the conversation has closed. Other effects still are.
TEXTS = tuple(ActionType)

#: The same in SQL, to stand in IN (…).
TEXT_TOPICS = ", ".join(f"'{topic.value}'" for topic in TEXTS)

#: The first retry comes after about this long, and each further one after twice as long, …
BACKOFF = timedelta(seconds=15)
#: … up to this.
LONGEST_BACKOFF = timedelta(hours=1)

#: How often a message may be claimed. With these pauses, that is more than a day even if each is as short as it can be.
MAX_ATTEMPTS = 36

#: How many leases in a row may end without a report: such a message probably kills its workers.
MAX_UNREPORTED = 5

#: A clock that no setting moves, and that goes on while the machine is suspended where the system has such a clock.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class OutboxMessage(BaseModel):
    """A row of the outbox: one message, or one other effect outside the database.

    Attributes:
        id: int, ascending in the order of a conversation's messages.
        topic: str, an ActionType's value, or your own name for another effect.
        body: str, the text to send; None if the payload is all there is.
        payload: JSON, what else the sender needs, for example `paymentUrl`.
        trigger: str, the trigger to fire when it is marked sent; None if there is none.
        approved_by: str, who approved it; None if it needed no approval.
        submitted_by: str, who drafted it, as given to `submit`.
        status: MessageStatus.
        send_key: str, the idempotency key to pass to the provider: the same at every attempt to send this message, and
            no other message of any database has it.
        action_id: str, id of the PendingAction that it was, and that somebody approved; of a WITHDRAWN message, of the
            one that it became, because a human must see it first. None if no human has seen it.
        level: AutonomyLevel at which it was judged that no human need see it.
        if_lead_writes: IfLeadWrites, what becomes of it if the lead writes before it leaves; None of other effects.
        after_text: int, id of the lead's last text in the inbox when the message was drafted; 0 if there was none.
        after_change: int, id of the conversation's newest history row when the message was put in.
        available_at: datetime before which it cannot be claimed: the end of a delay, of a pause after an error, or of
            its lease. Of a DEAD message, when it was given up.
        not_after: datetime after which it does not leave, but is WITHDRAWN; None if it may leave at any time.
        priority: int, how urgent it is: what is due with a higher one leaves first.
        debounced_until: datetime, of an effect that carries the events of a burst: until when further ones move it on.
        attempts: int, how often sending it began, without those attempts that were taken back.
        max_attempts: int, how often it may be tried.
        claims: int, how often it was ever claimed. More than one: it may have been sent before.
        unreported: int, how many leases in a row ended without a report.
        leased_by: str, the worker that holds it, or sent it.
        leased_at: datetime, when that worker claimed it.
        sent_at: datetime, when it was marked sent.
        provider_id: str, the provider's id of it.
        last_error: str, what went wrong at the last attempt.
        refusal: str, why its trigger could not be fired when it was marked sent.
    """

    id: Any = peewee.BigAutoField()
    conversation_id = TextField[str]()
    topic = TextField[str]()
    body = TextField["str | None"](null=True)
    payload = JsonField(null=True)
    trigger = TextField["str | None"](null=True)
    approved_by = TextField["str | None"](null=True)
    submitted_by = TextField["str | None"](null=True)
    key = TextField["str | None"](null=True)
    send_key = TextField[str](constraints=[peewee.SQL("DEFAULT (gen_random_uuid())::text")])
    action_id = TextField["str | None"](null=True)
    level = EnumField["AutonomyLevel | None"](AutonomyLevel, null=True)
    if_lead_writes = EnumField["IfLeadWrites | None"](IfLeadWrites, null=True)
    after_text: Any = peewee.BigIntegerField(null=True)
    after_change: Any = peewee.BigIntegerField(null=True)
    status = EnumField[MessageStatus](
        MessageStatus, default=MessageStatus.PENDING, constraints=[peewee.SQL("DEFAULT 'PENDING'")]
    )
    created_at = UtcDateTimeField[datetime](default=now)
    available_at = UtcDateTimeField[datetime](default=now)
    not_after = UtcDateTimeField["datetime | None"](null=True)
    priority = peewee.IntegerField(default=0, constraints=[peewee.SQL("DEFAULT 0")])
    debounced_until = UtcDateTimeField["datetime | None"](null=True)
    attempts = peewee.IntegerField(default=0, constraints=[peewee.SQL("DEFAULT 0")])
    max_attempts = peewee.IntegerField(default=MAX_ATTEMPTS, constraints=[peewee.SQL(f"DEFAULT {MAX_ATTEMPTS}")])
    claims = peewee.IntegerField(default=0, constraints=[peewee.SQL("DEFAULT 0")])
    unreported = peewee.IntegerField(default=0, constraints=[peewee.SQL("DEFAULT 0")])
    leased_by = TextField["str | None"](null=True)
    leased_at = UtcDateTimeField["datetime | None"](null=True)
    sent_at = UtcDateTimeField["datetime | None"](null=True)
    provider_id = TextField["str | None"](null=True)
    last_error = TextField["str | None"](null=True)
    refusal = TextField["str | None"](null=True)

    class Meta:
        table_name = "outbox"
        own_table = "outbox"

    #: Until when this process holds the lease, by the steady clock.
    _held_until: float | None = None
    _lead_id: str | None = None
    #: Whether the CRM had another phone number for the lead, when the message was claimed, than the one that is kept.
    _has_other_number = False

    @property
    def lead_id(self) -> str | None:
        """The lead of its conversation: as it was when the message was claimed, or else now; None if it was deleted."""
        if self._lead_id is not None:
            return self._lead_id
        model = CloseEngineConversation
        found: str | None = model.select(model.lead).where(model.id == self.conversation_id).scalar()
        return found

    @property
    def delivery(self) -> deliveries.Delivery | None:
        """What the provider said of it, as it was sent last; None if it said nothing. It is read now."""
        return deliveries.of_sending(self.send_key, self.provider_id)

    @property
    def is_leased(self) -> bool:
        """Whether the lease that this process was given still lasts, by a clock that no setting moves.

        Ask it just before sending: a process that was suspended in between may have lost the message to another one.
        """
        return self._held_until is not None and _steady() < self._held_until

    def sent(self, provider_id: str | None = None) -> OutboxMessage:
        """Record that the message was sent, and fire its trigger, in one transaction.

        A text to the lead of a stalled conversation brings it back: it is resumed, in the same transaction.

        If the trigger is no longer allowed (for example, because the lead has paid in the meantime), the message is
        still recorded as sent, and `refusal` says why. The same happens if a hook of the trigger fails; its error is
        raised after the commit. If the database fails (it is down, or there was a deadlock), nothing is recorded: call
        this again.

        Args:
            provider_id: str, the provider's id of the message; reporting the same id again changes nothing.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
            ProviderIdTaken: another message has this provider's id.
            MessageNotFound: the message was deleted.
        """
        failure: Exception | None = None
        done: dict[str, Any] = {"status": MessageStatus.SENT, "provider_id": provider_id, "refusal": None}
        done |= {"sent_at": _moment(), "unreported": 0}
        try:
            with atomic() if self.trigger or current().database.in_transaction() else nullcontext():
                if self.trigger or not self._is_marked_sent(provider_id):
                    failure = self._sent_with_effects(done)
        except peewee.IntegrityError:
            # Another message got this provider's id at the same moment.
            self._refuse_unless_reported(provider_id)
            raise
        if failure is not None:
            raise failure
        return self

    def retry(self, error: object, after: timedelta | None = None) -> OutboxMessage:
        """Put the message back, to be tried again later. After `max_attempts`, it is DEAD instead.

        Args:
            error: an exception or a text, what went wrong; stored in `last_error`.
            after: timedelta, how long to wait. The default doubles with every attempt, plus or minus half of it.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
        """
        if self.attempts >= self.max_attempts:
            return self.give_up(error)
        pause = after if after is not None else _backoff(self.attempts)
        return self._report({**_REPORTED, "available_at": self._again(pause), "last_error": _error_text(error)})

    def give_up(self, error: object) -> OutboxMessage:
        """Record that the message cannot be sent: it stays DEAD until somebody requeues it. Later ones are sent.

        Args:
            error: an exception or a text, what went wrong; stored in `last_error`.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
        """
        dead = {**_REPORTED, "status": MessageStatus.DEAD}
        return self._report({**dead, "available_at": _moment(), "last_error": _error_text(error)})

    def extend(self, lease: timedelta) -> OutboxMessage:
        """Extend the lease.

        Args:
            lease: timedelta, how long to keep the message, counted from now.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
        """
        before = _steady()
        self._report({"available_at": _moment_after(lease)})
        self._held_until = before + lease.total_seconds()
        return self

    def release(self) -> OutboxMessage:
        """Put the message back, because sending it never began. The attempt does not count.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
        """
        return self._report({**_FREE, **_not_tried(), "available_at": _moment()})

    def snooze(self, until: timedelta | datetime) -> OutboxMessage:
        """Put the message back for later. The attempt does not count, and the message keeps its place in its lane.

        Args:
            until: timedelta, how long to wait, or datetime with a timezone, until when.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
            InvalidValue: the datetime has no timezone.
        """
        return self._report({**_REPORTED, **_not_tried(), "available_at": self._again(until)})

    def _again(self, wait: timedelta | datetime) -> Any:
        """Return when it can be claimed again. One that is too late by then must not hold up its lane until then."""
        at = _moment_after(wait)
        if self.not_after is None:
            return at
        too_late = self.not_after + timedelta(milliseconds=1)
        if isinstance(at, datetime):
            return min(at, too_late)
        earlier = "(SELECT CASE WHEN again.at < %s THEN again.at ELSE %s END FROM (SELECT {at} AS at) again)"
        late = _FIELDS["not_after"].db_value(too_late)
        return peewee.SQL(earlier.replace("{at}", at.sql), [late, late, *(at.params or ())])

    def withdraw(self, reason: str) -> OutboxMessage:
        """Decide that the message is not sent at all. It can be in flight with this worker, or wait.

        Args:
            reason: str, why; stored in `last_error`.

        Returns:
            the message itself.

        Raises:
            LeaseLost: another worker holds it, or it was sent, is DEAD or was withdrawn before.
            MessageNotFound: the message was deleted.
            InvalidValue: the reason is empty.
        """
        clean_words("reason", reason, "a reason must be given")
        gone = {**_REPORTED, "status": MessageStatus.WITHDRAWN, "last_error": reason}
        if self.leased_by is not None:
            return self._report({**gone, **_not_tried()})
        return self._write(gone, _STILL_WAITING, [self.id])

    def ask(self, reason: str) -> OutboxMessage:
        """Let a human decide whether a text that is in flight with this worker is sent: it becomes a pending action.

        Args:
            reason: str, why; stored in `last_error`.

        Returns:
            the message itself, which is withdrawn; its `action_id` is the action's.

        Raises:
            LeaseLost: this worker no longer holds the lease.
            MessageNotFound: the message was deleted.
            InvalidValue: it is no text to the lead, a human has seen it already, or the reason is empty.
        """
        clean_words("reason", reason, "a reason must be given")
        if self.topic not in TEXTS:
            raise InvalidValue("topic", self.topic, "only texts to the lead are approved by a human")
        if self.action_id is not None:
            raise InvalidValue("action_id", self.action_id, "a human has seen this text already")
        action = {"action_id": f"message:{self.send_key}", "available_at": _moment()}
        withdrawn = {**_REPORTED, "status": MessageStatus.WITHDRAWN, "last_error": reason}
        return self._report({**withdrawn, **_not_tried(), **action})

    @classmethod
    def with_provider_id(cls, provider_id: str) -> OutboxMessage | None:
        """Find a message by the provider's id, for example in a delivery callback; None if there is no such message."""
        message: OutboxMessage | None = cls.get_or_none(cls.provider_id == provider_id)
        return message

    def _holds_lease(self) -> bool:
        query = f"SELECT 1 FROM {{outbox}} WHERE {_SAME_LEASE}"
        return current().execute(query, self._lease()).fetchone() is not None

    def _lease(self) -> list[Any]:
        return [self.id, self.leased_by, self.claims]

    def _report(self, values: dict[str, Any]) -> OutboxMessage:
        """Write the outcome if this worker still holds the lease."""
        return self._write(values, _SAME_LEASE, self._lease())

    def _write(self, values: dict[str, Any], condition: str, parameters: list[Any]) -> OutboxMessage:
        if not self._is_written(values, condition, parameters):
            self._refuse_unless_reported(values.get("provider_id"))
        return self

    def _is_marked_sent(self, provider_id: str | None) -> bool:
        """Mark the message as sent if nothing else follows from that."""
        lease, provider = self._lease(), _FIELDS["provider_id"].db_value(provider_id)
        if current().dialect.keeps_plans:
            statement, values = _CALL_MARK_SENT, [*lease, provider]
        else:
            statement, values = _MARK_SENT, [provider, *lease, provider]
        row = current().execute(statement, values).fetchone()
        if row is None or row[0] is None:
            return False
        done = {"status": MessageStatus.SENT, "provider_id": provider_id, "refusal": None, "unreported": 0}
        accept(self, {**done, "sent_at": _FIELDS["sent_at"].python_value(row[0])})
        return True

    def _is_written(self, values: dict[str, Any], condition: str, parameters: list[Any]) -> bool:
        # As text: building Peewee's query would take as long as all the rest of sending.
        assignments: list[str] = []
        written: list[Any] = []
        for name, value in values.items():
            value = value if isinstance(value, peewee.SQL) else peewee.SQL("%s", [_FIELDS[name].db_value(value)])
            assignments.append(f'"{name}" = {value.sql}')
            written += value.params or ()
        provider_id = values.get("provider_id")
        if provider_id is not None:
            condition += " AND NOT EXISTS (SELECT 1 FROM {outbox} other WHERE other.provider_id = %s)"
            parameters = [*parameters, provider_id]
        returning = ", ".join(f'"{name}"' for name in values)
        statement = f"UPDATE {{outbox}} SET {', '.join(assignments)} WHERE {condition} RETURNING {returning}"
        row = current().execute(statement, written + parameters).fetchone()
        if row is not None:
            read = {name: _FIELDS[name].python_value(value) for name, value in zip(values, row, strict=True)}
            accept(self, read)
        return row is not None

    def drop(self) -> OutboxMessage:
        """Take back the claim, because the lease was lost before sending began, whoever holds the message now.

        Returns:
            the message itself.
        """
        try:
            return self.release()
        except LeaseLost:
            uncounted = {
                "attempts": OutboxMessage.attempts - 1,
                "unreported": peewee.Case(None, [(OutboxMessage.unreported > 0, OutboxMessage.unreported - 1)], 0),
            }
            claimed_since = (OutboxMessage.id == self.id) & (OutboxMessage.claims >= self.claims)
            claimed_since &= OutboxMessage.status.is_still(MessageStatus.PENDING) & (OutboxMessage.attempts > 0)
            OutboxMessage.update(uncounted).where(claimed_since).execute()
            return self

    def _refuse_unless_reported(self, provider_id: str | None) -> None:
        """Raise the reason why the outcome could not be written. If it was written before, copy the row instead."""
        found = OutboxMessage.get_or_none(OutboxMessage.id == self.id)
        if found is None:
            raise MessageNotFound(self.id)
        first = None if provider_id is None else OutboxMessage.with_provider_id(provider_id)
        if provider_id is None or first is None:
            raise LeaseLost(self.id, self.leased_by, found.status, found.leased_by)
        if first.id != self.id:
            raise ProviderIdTaken(provider_id, self.id, first.id)
        accept_row(self, found)

    def _sent_with_effects(self, done: dict[str, Any]) -> Exception | None:
        """Record what was done, and what follows from it. Return the error of a hook that failed, or None."""
        refusal, failure = None, None
        with nullcontext() if current().database.in_transaction() else atomic():
            if self._holds_lease():
                refusal, failure = self._fire(self.trigger, done)
            if self.status is not MessageStatus.SENT:
                self._report({**done, "refusal": refusal})
            elif refusal is not None:
                self._write({"refusal": refusal}, '"id" = %s', [self.id])
        return failure

    def _fire(self, trigger: str | None, done: dict[str, Any]) -> tuple[str | None, Exception | None]:
        """Fire the trigger; return the sentence for `refusal` and the error of a hook that failed, or None for each.

        If the conversation is stalled, first mark a text as sent, as `done` says it, and resume the conversation.
        """
        payload = self.payload if isinstance(self.payload, dict) else {}
        try:
            with locked(self.conversation_id) as conversation:
                link = payload.get("paymentUrl")
                metadata = {"message_id": self.id, "provider_id": done["provider_id"]}
                if self.submitted_by is not None:
                    metadata["submitted_by"] = self.submitted_by
                if conversation.stage is Stage.STALLED and self.topic in TEXTS:
                    self._bring_back(conversation, done, link, metadata)
                if trigger is None or conversation.stage is TRIGGERS[trigger].dest:
                    return None, None
                try:
                    conversation.fire(
                        trigger,
                        actor=self.leased_by,
                        metadata=metadata,
                        key=self.send_key,
                        payment_link_url=link,
                        approved_by=self.approved_by,
                    )
                except TransitionRefused as refusal:
                    if trigger == "send_payment_link" and conversation.payment_link_sent_at is None:
                        # The lead has the link and can pay, whatever the stage is: record that.
                        conversation.payment_link_url, conversation.payment_link_sent_at = link, moment()
                        conversation.save()
                    return str(refusal), None
                return None, None
        except ConversationNotFound as refusal:
            return str(refusal), None
        except Exception as error:
            if is_transient(error):
                raise  # The database may recover: record nothing, so that the worker can report again.
            return _error_text(error), error

    def _bring_back(
        self, conversation: CloseEngineConversation, done: dict[str, Any], link: str | None, metadata: dict[str, Any]
    ) -> None:
        """Mark the text as sent, then resume the conversation to where things stand after it."""
        # The text was sent after it stalled, even if the clock shows the same millisecond.
        of_conversation = StageChange.select().where(StageChange.conversation_id == conversation.id)
        newest = of_conversation.order_by(StageChange.id.desc()).get()
        at = max(moment(), newest.created_at + timedelta(milliseconds=1))
        self._report({**done, "sent_at": at})
        stamps = {"payment_link_url": link, "payment_link_sent_at": at}
        provenance = Provenance(self.leased_by, "a text was sent", metadata)
        also = stamps if self.topic == ActionType.SEND_PAYMENT_LINK else None
        change_stage(conversation, "resume", {}, provenance, also)

    def __repr__(self) -> str:
        return f"<OutboxMessage {self.id}: {self.topic} of {self.conversation_id}, {self.status}>"


_FIELDS = OutboxMessage._meta.fields

# No index serves this form of comparing the status: see EnumField.is_still.
_STILL_PENDING = """"id" = %s AND status || '' = 'PENDING'"""
_STILL_WAITING = f"{_STILL_PENDING} AND leased_by IS NULL"
#: The number of claims tells this lease from a later one of the same worker.
_SAME_LEASE = f"{_STILL_PENDING} AND leased_by = %s AND claims = %s"
#: Whether a text goes to a lead whose conversation is stalled, and so brings it back. It is a subquery of one value:
#: PostgreSQL would turn EXISTS into a hash of all that are stalled.
_BRINGS_BACK = f"""topic IN ({TEXT_TOPICS}) AND COALESCE(
    (SELECT c.stage FROM close_engine_conversations c WHERE c.id = conversation_id), '') = 'STALLED'"""


def marking_sent(message: str, worker: str, claim: str, provider: str) -> str:
    """Return the statement that marks a message as sent, if that brings no stalled conversation back.

    SQLite runs it as it is. PostgreSQL has it in the function `close_engine.mark_sent`, and keeps its plan, because to
    plan it takes longer than to run it. A test compares the two.

    Args:
        message, worker, claim: how the message's id, the lease's worker and the number of claims are written.
        provider: how the provider's id is written, or NULL.
    """
    return f"""UPDATE {{outbox}} SET status = 'SENT', provider_id = {provider}, refusal = NULL,
    sent_at = {{moment}}, unreported = 0
WHERE id = {message} AND status || '' = 'PENDING' AND leased_by = {worker} AND claims = {claim}
    AND NOT ({_BRINGS_BACK})
    AND NOT EXISTS (SELECT 1 FROM {{outbox}} other WHERE other.provider_id = {provider})
RETURNING sent_at"""


_MARK_SENT = marking_sent("%s", "%s", "%s", "%s")
_CALL_MARK_SENT = "SELECT {mark_sent}(%s::bigint, %s::text, %s::integer, %s::text)"

_IN_FLIGHT = (OutboxMessage.status == MessageStatus.PENDING) & OutboxMessage.leased_by.is_null(False)
_WAITING = OutboxMessage.status == MessageStatus.PENDING
_IS_SETTLED = OutboxMessage.status != MessageStatus.PENDING
_URGENT = _WAITING & (OutboxMessage.priority > 0)
_IS_TEXT = OutboxMessage.topic.in_([topic.value for topic in TEXTS])

for fields, unique, where in (
    ((OutboxMessage.available_at, OutboxMessage.id), False, _WAITING),
    ((OutboxMessage.available_at,), False, _URGENT),
    ((OutboxMessage.priority, OutboxMessage.available_at, OutboxMessage.id), False, _URGENT),
    ((OutboxMessage.conversation_id, OutboxMessage.id), False, _WAITING),
    ((OutboxMessage.conversation_id,), True, _IN_FLIGHT & _IS_TEXT),
    ((OutboxMessage.conversation_id, OutboxMessage.topic), True, _IN_FLIGHT & ~_IS_TEXT),
    ((OutboxMessage.available_at,), False, _IN_FLIGHT),
    ((OutboxMessage.conversation_id, OutboxMessage.sent_at), False, _IS_SETTLED & _IS_TEXT),
    ((OutboxMessage.id,), False, OutboxMessage.status == MessageStatus.DEAD),
    ((OutboxMessage.conversation_id, OutboxMessage.key), True, OutboxMessage.key.is_null(False)),
    ((OutboxMessage.provider_id,), True, OutboxMessage.provider_id.is_null(False)),
):
    OutboxMessage.add_index(*fields, unique=unique, where=where)

#: What a message is that no worker holds, …
_FREE = {"leased_by": None, "leased_at": None}
#: … and what it is once a worker has reported on it.
_REPORTED = {**_FREE, "unreported": 0}


def _not_tried() -> dict[str, Any]:
    return {"attempts": peewee.SQL("attempts - 1")}


def enqueue(
    conversation: CloseEngineConversation | str,
    topic: ActionType | str,
    body: str | None = None,
    *,
    payload: Mapping[str, Any] | None = None,
    send_after: timedelta | datetime | None = None,
    not_after: timedelta | datetime | None = None,
    priority: int | None = None,
    key: str | None = None,
    trigger: str | None = None,
    approved_by: str | None = None,
    submitted_by: str | None = None,
    if_lead_writes: IfLeadWrites | Literal["withdraw", "send"] | None = None,
    max_attempts: int = MAX_ATTEMPTS,
) -> OutboxMessage:
    """Put a message into the outbox, in the caller's transaction if one is open.

    Args:
        conversation: CloseEngineConversation, or its id. The messages of a lane are sent in the order of their ids.
        topic: ActionType, or your own name for another effect.
        body: str, the text to send.
        payload: mapping that JSON can hold, what else the sender needs.
        send_after: timedelta, how long to wait, or datetime with a timezone, until when. Until then it holds up nobody.
        not_after: timedelta, how long it may wait, or datetime with a timezone, until when it may leave. If it could
            not leave by then, it is withdrawn.
        priority: int from 0 to 9: what is due with a higher one leaves first, within the order of its lane. The default
            is the one of its topic in `PRIORITIES`, or else 0.
        key: str, idempotency key, unique within the conversation. Using it again returns the first message.
        trigger: str, the trigger to fire when the message is marked sent.
        approved_by: str, who approved it.
        submitted_by: str, who drafted it.
        if_lead_writes: IfLeadWrites, of a text: see `submit`.
        max_attempts: int, how often it may be tried.

    Returns:
        OutboxMessage.

    Raises:
        ConversationNotFound: there is no such conversation.
        LeadOptedOut: it is a text, and the lead opted out of texts.
        ConversationClosed: it is a text, and the conversation is COMPLETED or CLOSED_LOST.
        ConversationTakenOver: it is a text, and a human other than `submitted_by` has taken the conversation over.
        KeyReused: the key was used for a message of another topic.
        UnknownTrigger: there is no such trigger.
        InvalidValue: an argument makes no sense or cannot be stored.
    """
    if trigger is not None and trigger not in TRIGGERS:
        raise UnknownTrigger(trigger, list(TRIGGERS))
    if max_attempts < 1:
        raise InvalidValue("max_attempts", max_attempts, "it must be at least 1")
    if body is not None and topic in TEXTS:
        require_words("body", body)
    require_order(send_after, not_after)
    return put_in(
        conversation if isinstance(conversation, str) else conversation.id,
        send_after,
        not_after,
        topic=str(topic),
        priority=priority_of(topic, priority),
        body=body,
        payload=payload,
        trigger=trigger,
        approved_by=approved_by,
        submitted_by=submitted_by,
        if_lead_writes=if_lead_writes or IF_LEAD_WRITES.get(topic),
        key=Provenance(key=key).key,
        max_attempts=max_attempts,
    )


#: What becomes of a text by default if the lead writes.
IF_LEAD_WRITES: Mapping[str, IfLeadWrites] = {
    ActionType.SEND_MESSAGE: IfLeadWrites.WITHDRAW,
    ActionType.SEND_PREVIEW: IfLeadWrites.SEND,
    ActionType.SEND_PAYMENT_LINK: IfLeadWrites.SEND,
}


#: How urgent a message is by default, by its topic; any other's priority is 0. A payment link is money.
PRIORITIES: Mapping[str, int] = {ActionType.SEND_PAYMENT_LINK: 5}

#: The most urgent. There are few, because a claim asks for one priority after the other while something urgent is due.
MOST_URGENT = 9


def priority_of(topic: str, given: int | None) -> int:
    """Return the priority of a message: the one that is given, or the one of its topic.

    Raises:
        InvalidValue: it is no int from 0 to 9.
    """
    if given is None:
        return PRIORITIES.get(topic, 0)
    if isinstance(given, bool) or not isinstance(given, int) or not 0 <= given <= MOST_URGENT:
        raise InvalidValue("priority", given, f"it must be a whole number from 0 to {MOST_URGENT}")
    return given


def strictest_level(conversation: CloseEngineConversation) -> AutonomyLevel:
    """Return the stricter level of a conversation's and its lead's. A word that is no level is the strictest."""
    of_lead = Lead.select(Lead.autonomy_level.cast("TEXT").alias("word")).where(Lead.id == conversation.lead_id)
    known = list(AutonomyLevel)
    word = of_lead.scalar()
    return max(conversation.autonomy_level, AutonomyLevel(word) if word in known else known[-1], key=known.index)


def put_in(
    conversation_id: str,
    send_after: timedelta | datetime | None,
    not_after: timedelta | datetime | None = None,
    *,
    level: AutonomyLevel | None = None,
    **values: Any,
) -> OutboxMessage:
    """Put a message in, whose values were checked.

    Args:
        conversation_id: str.
        send_after, not_after: as for `enqueue`.
        level: AutonomyLevel at which the caller, who holds the conversation, has judged a text; None to judge it here.
        values: the other fields of the message, by name.
    """
    topic, key = values["topic"], values["key"]
    fresh = OutboxMessage(conversation_id=conversation_id, **values).__data__
    del fresh["created_at"], fresh["available_at"]
    due = _moment_after(send_after)
    if not_after is not None:
        fresh["not_after"] = _moment_after(not_after)
    # Lock the conversation, so that its messages commit in the order of their ids.
    with locked(conversation_id) as conversation:
        if key is not None and (first := find_by_key(conversation_id, key, topic)) is not None:
            return first
        if topic in TEXTS:
            if level is None:
                _refuse_text(conversation, values["submitted_by"])
                level = strictest_level(conversation)
            fresh["level"] = level
            fresh["after_text"] = peewee.SQL(current().dialect.sql(_LAST_TEXT), [conversation_id])
        newest = StageChange.select(current().dialect.function("max", StageChange.id))
        newest = newest.where(StageChange.conversation_id == conversation_id)
        insert = OutboxMessage.insert({**fresh, "after_change": newest, "created_at": _moment(), "available_at": due})
        (message,) = insert.returning(OutboxMessage).execute()
    made: OutboxMessage = message
    return made


def require_order(send_after: timedelta | datetime | None, not_after: timedelta | datetime | None) -> None:
    """Refuse a message that could never leave, as far as its two times can be compared without a clock.

    Raises:
        InvalidValue: it could not, a datetime has no timezone, or a timedelta is too long.
    """
    for name, given in {"send_after": send_after, "not_after": not_after}.items():
        if isinstance(given, timedelta) and abs(given) > LONGEST_SPAN:
            raise InvalidValue(name, str(given), f"it can be at most {LONGEST_SPAN.days} days")
    if isinstance(not_after, timedelta):
        is_before = isinstance(send_after, timedelta) and not_after < send_after
    elif not_after is not None:
        until = OutboxMessage.not_after.clean(not_after)
        is_before = isinstance(send_after, datetime) and until < OutboxMessage.available_at.clean(send_after)
    else:
        return
    if is_before:
        raise InvalidValue("not_after", str(not_after), "it is before send_after, so the message could never leave")


#: The id of the lead's last text.
_LAST_TEXT = (
    "COALESCE((SELECT i.id FROM {inbox} i WHERE i.kind = 'text' AND i.conversation_id = %s "
    "ORDER BY i.id DESC LIMIT 1), 0)"
)


def _refuse_text(conversation: CloseEngineConversation, submitted_by: str | None) -> None:
    numbers.refuse(conversation.lead_id)
    if conversation.stage in CLOSED_STAGES:
        raise ConversationClosed(conversation.id, conversation.stage)
    takeover = conversation.takeover()
    if takeover is not None and takeover.taken_by != submitted_by:
        raise ConversationTakenOver(conversation.id, takeover.taken_by)


def find_by_key(conversation_id: str, key: str, topic: str) -> OutboxMessage | None:
    """Find the message that this key has already made.

    Raises:
        KeyReused: the key was used for a message of another topic.
    """
    same = (OutboxMessage.conversation_id == conversation_id) & (OutboxMessage.key == key)
    first: OutboxMessage | None = OutboxMessage.get_or_none(same)
    if first is not None and first.topic != topic:
        raise KeyReused(conversation_id, key, first.topic, topic)
    return first


def require_words(label: str, text: str) -> str:
    """Return a text that can be sent to a lead.

    Raises:
        InvalidValue: it is empty, or a column cannot store it.
    """
    return clean_words(label, text, "a text must have words")


def _is_text(message: str) -> str:
    return f"{message}.topic IN ({TEXT_TOPICS})"


#: The reason of a text that does not leave, but becomes an action.
ASK = "a human must approve it first"


def _asks(level: str, message: str) -> str:
    """Return the SQL that says whether a level asks for a human, and is stricter than the one a text was judged at."""
    return (
        f"({level} = 'SEMI_AUTO' AND {message}.topic = 'SEND_PAYMENT_LINK' AND {message}.level = 'FULL_AUTO'\n"
        f"                        OR {level} NOT IN ('FULL_AUTO', 'SEMI_AUTO') AND {message}.level <> 'MANUAL')"
    )


def may_leave(message: str = "o") -> str:
    """Return the SQL that says why a message may not leave any more, or NULL if it may.

    Every claim asks it. It looks at the conversation and its lead as they are now, and at what the history and the
    inbox have had since the message was put in.

    Args:
        message: alias of the outbox in the statement.
    """
    # Subqueries of one value: PostgreSQL may turn EXISTS into a hash of the whole table.
    return f"""CASE WHEN {message}.not_after < {{moment}} THEN 'it could not leave in time'
        WHEN {_is_text(message)} THEN NULLIF(COALESCE((
            SELECT CASE
                WHEN {numbers.has_opted_out("c.lead_id")} THEN 'the lead opted out'
                WHEN c.stage IN ('COMPLETED', 'CLOSED_LOST') THEN 'the conversation is closed'
                WHEN (SELECT h.id FROM {{history}} h
                    WHERE h.conversation_id = {message}.conversation_id AND h.id > {message}.after_change
                        AND h.dest IN ('COMPLETED', 'CLOSED_LOST') LIMIT 1) IS NOT NULL
                    THEN 'the conversation closed, and was opened again, after this was put in'
                WHEN {message}.if_lead_writes = 'withdraw' AND (SELECT i.id FROM {{inbox}} i
                    WHERE i.kind = 'text' AND i.conversation_id = {message}.conversation_id
                        AND i.id > {message}.after_text LIMIT 1) IS NOT NULL
                    THEN 'the lead has written since'
                WHEN (SELECT t.id FROM {{takeovers}} t
                    WHERE t.conversation_id = {message}.conversation_id AND t.handed_back_at IS NULL
                        AND (t.until IS NULL OR t.until > {{moment}})
                        AND t.taken_by <> COALESCE({message}.submitted_by, '')
                        AND t.taken_by <> COALESCE({message}.approved_by, '')
                    LIMIT 1) IS NOT NULL
                    THEN 'a human has taken over'
                WHEN {message}.action_id IS NULL
                    AND ({_asks("l.autonomy_level", message)}
                    OR {_asks("c.autonomy_level", message)})
                    THEN '{ASK}'
                ELSE '' END
            FROM close_engine_conversations c LEFT JOIN {{leads}} l ON l.id = c.lead_id
            WHERE c.id = {message}.conversation_id
        ), 'the conversation is deleted'), '') END"""


def one_lane(this: str, other: str) -> str:
    """Return the SQL that says whether two messages of one conversation are in one lane."""
    return f"({this}.topic = {other}.topic OR {_is_text(this)} AND {_is_text(other)})"


def claimable_now(dialect: Dialect) -> str:
    """Return the SQL that says whether a message `o` can be claimed now.

    It is the next of its lane: one whose lease is over, or the oldest that is due. One that was never begun and is not
    due yet holds up nobody; one that was begun keeps its place, and so does one that is paused.
    """
    return f"""o.status = 'PENDING' AND o.available_at <= {{moment}}
        AND {pauses.is_sent("o.topic", dialect)}
        AND (o.leased_by IS NOT NULL OR NOT EXISTS (
        SELECT 1 FROM {{outbox}} ahead
        WHERE ahead.conversation_id = o.conversation_id AND ahead.status = 'PENDING' AND ahead.id <> o.id
            AND {one_lane("ahead", "o")}
            AND (ahead.leased_by IS NOT NULL
                OR ahead.id < o.id AND (ahead.claims > 0 OR ahead.available_at <= {{moment}}))))"""


#: Whether nothing urgent is due. The order says which index to use.
NOTHING_URGENT = """(SELECT u.id FROM {outbox} u
        WHERE u.status = 'PENDING' AND u.priority > 0 AND u.available_at <= {moment}
        ORDER BY u.available_at LIMIT 1) IS NULL"""


def claiming(
    dialect: Dialect, limit: str, worker: str, only: str, columns: str, *, anyway: str = "", urgency: str = ""
) -> str:
    """Return a statement that claims. A lease that is over is counted: after too many, the message is dead.

    SQLite runs it as it is. PostgreSQL has it in the function `close_engine.claim`, and keeps its plan, because to plan
    it takes longer than to run it. A test compares the two.

    Something urgent lifts its lane: what is claimed is the next of the lane, so that what is urgent can follow.

    Args:
        limit, worker: how the most messages to claim and the worker's name are written.
        only: more conditions for a message `o`, or nothing.
        columns: what to return; after it the lead, and whether the CRM has another phone number for it by now.
        anyway: the condition under which to claim although something urgent is due.
        urgency: how a priority is written, to claim only the lanes in which a message of that priority is due.
    """
    claimable, first = f"{claimable_now(dialect)}{only}", ""
    if urgency:
        source = f"""{{outbox}} u JOIN {{outbox}} o ON o.conversation_id = u.conversation_id AND {one_lane("u", "o")}
    WHERE u.status = 'PENDING' AND u.priority > 0 AND u.priority = {urgency} AND u.available_at <= {{moment}}
        AND {claimable}
    ORDER BY u.available_at, u.id"""
        first = " LIMIT 1"  # of those in one lane
    else:
        source = f"""{{outbox}} o
    WHERE {claimable}
        AND ({anyway} OR {NOTHING_URGENT})
    ORDER BY o.available_at, o.id"""
    is_leased, found = "reason IS NULL AND over = 0", dialect.in_subquery("SELECT message_id FROM next")
    # The cast gives what is returned the affinity of text, without which SQLite does not use the index.
    conversation = "CAST(conversation_id AS TEXT)"
    return f"""WITH next AS (
    SELECT o.id AS message_id, {may_leave()} AS reason,
        CASE WHEN o.leased_by IS NOT NULL
            AND (o.unreported >= {MAX_UNREPORTED - 1} OR o.attempts >= o.max_attempts) THEN 1 ELSE 0 END AS over
    FROM {source} LIMIT {limit} {dialect.skip_locked("o")}
)
UPDATE {{outbox}} AS message SET
    (status, action_id, last_error, unreported, leased_by, leased_at, available_at, attempts, claims) = (SELECT
        CASE WHEN reason IS NOT NULL THEN 'WITHDRAWN' WHEN over = 1 THEN 'DEAD' ELSE status END,
        CASE WHEN reason = '{ASK}' THEN 'message:' || send_key ELSE action_id END,
        CASE WHEN reason IS NOT NULL THEN reason
            WHEN leased_by IS NOT NULL THEN 'the lease of ' || leased_by || ' ran out' ELSE last_error END,
        CASE WHEN leased_by IS NOT NULL THEN unreported + 1 ELSE unreported END,
        CASE WHEN {is_leased} THEN {worker} END,
        CASE WHEN {is_leased} THEN {{moment}} END,
        CASE WHEN {is_leased} THEN {{later}} ELSE {{moment}} END,
        CASE WHEN {is_leased} THEN attempts + 1 ELSE attempts END,
        CASE WHEN {is_leased} THEN claims + 1 ELSE claims END
    FROM next WHERE message_id = id{first})
WHERE id {found}
RETURNING {columns}, (SELECT c.lead_id FROM close_engine_conversations c WHERE c.id = {conversation}),
    (SELECT CASE WHEN COALESCE(CAST(l.phone AS TEXT), '') <> COALESCE(n.phone, '') THEN 1 ELSE 0 END
    FROM close_engine_conversations c JOIN {{leads}} l ON l.id = c.lead_id
    LEFT JOIN {{numbers}} n ON n.lead_id = c.lead_id WHERE c.id = {conversation})"""


#: A message whose lease ended without a report may have killed its worker.
SUSPECT = "(o.unreported > 0 OR o.leased_by IS NOT NULL)"


def claim(
    limit: int = 1,
    lease: timedelta = timedelta(minutes=1),
    worker: str = "worker",
    *,
    topics: Sequence[str] | None = None,
    suspects: bool = True,
) -> list[OutboxMessage]:
    """Lease the next messages to a worker, to be sent now: at most one of each lane.

    Messages that may not leave any more are withdrawn instead. What is paused waits.

    Args:
        limit: int, the most messages to claim: as many as can be sent at once.
        lease: timedelta, how long no other worker can claim them.
        worker: str, the worker's name.
        topics: sequence of str, claim only messages with these topics.
        suspects: bool, whether to claim messages, too, whose last lease ended without a report: they may have killed
            their worker. Such a message is claimed alone, and its worker should send nothing else meanwhile.

    Returns:
        list of OutboxMessage, the most urgent first, and then the oldest.

    Raises:
        InvalidValue: the worker has no name, the limit is less than 1, or the lease is not greater than zero.
    """
    clean_words("worker", worker, "a worker must have a name")
    if limit < 1:
        raise InvalidValue("limit", limit, "it must be at least 1")
    if lease <= timedelta(0):
        raise InvalidValue("lease", lease, "it must be greater than zero")
    seconds, names = lease.total_seconds(), None if topics is None else [str(name) for name in topics]
    while True:
        before = _steady()
        rows = _claim(limit, seconds, worker, names, suspects)
        loaded = [message for row in rows if (message := _loaded(row, worker, before + seconds)) is not None]
        claimed = [message for message in loaded if _may_be_texted(message)]
        if claimed or not rows:
            return _suspect_alone(sorted(claimed, key=lambda message: (-message.priority, message.id)))


def _of_topics(topics: Sequence[str] | None) -> tuple[str, list[str]]:
    names = [] if topics is None else [str(name) for name in topics]
    return "" if topics is None else f" AND o.topic IN ({', '.join(['%s'] * len(names))})", names


def suspect_is_next(topics: Sequence[str] | None = None) -> bool:
    """Return whether the message that would be claimed next may have killed its worker."""
    only, names = _of_topics(topics)
    claimable = f"SELECT {SUSPECT} FROM {{outbox}} o WHERE {claimable_now(current().dialect)}{only}"
    urgent, rest = "AND o.priority > 0 ORDER BY o.priority DESC, o.available_at, o.id", "ORDER BY o.available_at, o.id"
    for order in (urgent, rest):
        row = current().execute(f"{claimable} {order} LIMIT 1", names).fetchone()
        if row is not None:
            return bool(row[0])
    return False


def _claim(limit: int, seconds: float, worker: str, topics: list[str] | None, suspects: bool) -> list[tuple[Any, ...]]:
    dialect = current().dialect
    if dialect.keeps_plans:
        return _claimed(_CALL_CLAIM, [limit, seconds, worker, topics, suspects])
    # As the function does it.
    only, names = _of_topics(topics)
    if not suspects:
        only += f" AND NOT {SUSPECT}"
    write = partial(claiming, dialect, "%s", "%s", only, _COLUMNS)
    rows = _claimed(write(anyway="0"), [*names, limit, worker, seconds])
    urgency = None if rows else _next_urgency()
    is_urgent = urgency is not None
    while urgency is not None and len(rows) < limit:
        rows += _claimed(write(urgency="%s"), [urgency, *names, limit - len(rows), worker, seconds])
        urgency = _next_urgency(urgency)
    if is_urgent and len(rows) < limit:
        rows += _claimed(write(anyway="1"), [*names, limit - len(rows), worker, seconds])
    return rows


def _next_urgency(*below: Any) -> Any:
    """Return the highest priority above 0 that waits, and is below another one if that is given; None if there is none.

    Another writer's may be any number, or no number at all.
    """
    waits = "SELECT u.priority FROM {outbox} u WHERE u.status = 'PENDING' AND u.priority > 0"
    waits += " AND u.priority < %s" * len(below)
    row = current().execute(f"{waits} ORDER BY u.priority DESC LIMIT 1", below).fetchone()
    return None if row is None else row[0]


def _claimed(statement: str, values: list[Any]) -> list[tuple[Any, ...]]:
    binding = current()
    while True:
        try:
            with atomic() if binding.database.in_transaction() else nullcontext():
                return list(binding.execute(statement, values).fetchall())
        except peewee.IntegrityError:
            # Another worker claimed a requeued message of the same lane at the same moment: try again.
            continue


_READ = OutboxMessage._meta.sorted_fields
#: The times that the claim writes, so that Python can read them.
_CLAIM_TIMES = ("available_at", "leased_at")


def _as_read(field: Any) -> str:
    """Return the SQL of a column in such a form that one bad value does not fail with all the others that are fetched.

    A payload is text until it is read by itself. A time that Python cannot read is none: nobody needs it to send.
    """
    column = f'"{field.column_name}"'
    if isinstance(field, JsonField):
        return f"CAST({column} AS TEXT)"
    if isinstance(field, UtcDateTimeField) and field.name not in _CLAIM_TIMES:
        return f"CASE WHEN {column} >= '0001-01-01' AND {column} < '9999-01-01' THEN {column} END"
    return column


_COLUMNS = f"id, status, claims, {', '.join(map(_as_read, _READ))}"
#: The same of the function: the message is one text, because to plan and to describe so many columns takes too long.
COLUMNS_OF_FUNCTION = "id, status, claims, pg_catalog.row_to_json(message)::text"
_CALL_CLAIM = "SELECT * FROM {claim}(%s::integer, %s::double precision, %s::text, %s::text[], %s::boolean)"


def _loaded(row: tuple[Any, ...], worker: str, held_until: float) -> OutboxMessage | None:
    """Make the object of a row that was claimed; None if the row was withdrawn, is dead, or cannot be read."""
    message_id, status, claims, *cells, lead_id, has_other_number = row
    if status != MessageStatus.PENDING.value:
        return None
    try:
        read = _read_text(*cells) if len(cells) == 1 else _read_columns(cells)
    except (ValueError, RecursionError) as error:
        unread = OutboxMessage(__no_default__=True, id=message_id, claims=claims, leased_by=worker)
        unread.give_up(f"the message cannot be read: {_error_text(error)}")
        return None
    message = OutboxMessage(__no_default__=True, **read)
    message._held_until = held_until
    message._lead_id, message._has_other_number = lead_id, bool(has_other_number)
    return message


def _read_columns(cells: Sequence[Any]) -> dict[str, Any]:
    values = dict(zip([field.name for field in _READ], cells, strict=True))
    values["payload"] = values["payload"] and json.loads(values["payload"])
    values["priority"] = int(values["priority"])  # on SQLite it may be any word, and what is claimed is sorted by it
    return {name: value if name == "payload" else _FIELDS[name].python_value(value) for name, value in values.items()}


def _read_text(text: str) -> dict[str, Any]:
    values = json.loads(text)
    for field in _READ:
        if field.name != "payload" and values[field.name] is not None:
            try:
                values[field.name] = field.python_value(values[field.name])
            except ValueError:
                if not isinstance(field, UtcDateTimeField) or field.name in _CLAIM_TIMES:
                    raise
                values[field.name] = None  # as in `_as_read`
    read: dict[str, Any] = values
    return read


def _may_be_texted(message: OutboxMessage) -> bool:
    """If the CRM has another number for the lead by now, read it, and withdraw a text if that number opted out."""
    if message.topic not in TEXTS or not message._has_other_number or message._lead_id is None:
        return True
    try:
        opted_out = numbers.find(message._lead_id, numbers.renew(message._lead_id))
    except LeadNotFound:
        return True  # deleted at this moment: whoever sends it will see
    if opted_out is not None:
        message.withdraw("the lead opted out")
    return opted_out is None


def claimable(topics: Sequence[str] | None = None) -> list[OutboxMessage]:
    """List the messages that can be claimed now, without claiming them: the most urgent first, and then the oldest.

    One that cannot be read is passed over: whoever claims it gives it up.

    Args:
        topics: sequence of str, only messages with these topics.
    """
    only, names = _of_topics(topics)
    claimable = f"{claimable_now(current().dialect)}{only}"
    found = peewee.SQL(current().sql(f"(SELECT o.id FROM {{outbox}} o WHERE {claimable})"), names)
    query = OutboxMessage.select().readable().where(OutboxMessage.id.in_(found))
    return list(query.order_by(OutboxMessage.priority.desc(), OutboxMessage.available_at, OutboxMessage.id))


def waiting(*, failed: bool = False, texts: bool = True) -> Rows[OutboxMessage]:
    """Return a `readable()` query for what is still to be sent, now or later: what is due first comes first.

    Args:
        failed: only what is to be tried again, because sending it failed.
        texts: also texts to the lead, and not only other effects.
    """
    query = OutboxMessage.select().readable().where(OutboxMessage.status == MessageStatus.PENDING)
    if failed:
        query = query.where(OutboxMessage.last_error.is_null(False))
    if not texts:
        query = query.where(OutboxMessage.topic.not_in([str(topic) for topic in TEXTS]))
    return query.order_by(OutboxMessage.available_at, OutboxMessage.id)


def due_in(within: timedelta = timedelta(days=1)) -> timedelta | None:
    """Return how long it takes, by the database's clock, until one more message becomes due or a lease ends.

    Args:
        within: timedelta, how far to look ahead.

    Returns:
        timedelta, greater than zero; None if there is nothing to wait for, or if sending is paused.
    """
    waiting = "SELECT o.available_at FROM {outbox} o WHERE o.status = 'PENDING' AND o.available_at > {moment}"
    waiting = f"{waiting} AND {pauses.is_sent('o.topic', current().dialect)}"
    query = f"SELECT {{moment}}, ({waiting} AND o.available_at <= {{later}} ORDER BY o.available_at LIMIT 1)"
    found = current().execute(query, [within.total_seconds()]).fetchone()
    at, due = map(OutboxMessage.available_at.python_value, found)
    return None if due is None else max(due - at, timedelta(milliseconds=1))


@dataclass(frozen=True)
class DeadLine:
    """The messages that are DEAD, or undelivered, with one kind of error.

    Attributes:
        error: str, the kind: what the error says before its first colon.
        count: int, how many there are.
        last: datetime, when the last of them died, or was said to be undelivered.
        example: int, the id of one of them.
        sentence: str, its error.
    """

    error: str
    count: int
    last: datetime
    example: int
    sentence: str


def dead_lines() -> list[DeadLine]:
    """Read the DEAD messages by kind of error, the most frequent first."""
    read = OutboxMessage.select(OutboxMessage.id, OutboxMessage.last_error, OutboxMessage.available_at)
    dead = read.where(OutboxMessage.status == MessageStatus.DEAD).order_by(OutboxMessage.id)
    return _by_error((message.last_error or "", message.available_at, message.id) for message in dead.readable())


def undelivered_lines() -> list[DeadLine]:
    """Read the messages that were sent and not delivered, and not put back since, by kind of error, as `dead_lines`."""
    found = deliveries.undelivered().readable()
    return _by_error((delivery.error or "", delivery.at, delivery.message_id) for delivery in found)


def _by_error(ends: Iterable[tuple[str, datetime, int]]) -> list[DeadLine]:
    kinds: dict[str, list[tuple[str, datetime, int]]] = {}
    for end in ends:
        kinds.setdefault(end[0].partition(":")[0], []).append(end)
    lines = [
        DeadLine(kind, len(those), max(at for _, at, _ in those), those[-1][2], those[-1][0])
        for kind, those in kinds.items()
    ]
    return sorted(lines, key=lambda line: (-line.count, line.error))


def _suspect_alone(claimed: list[OutboxMessage]) -> list[OutboxMessage]:
    """If a suspect is among them, release all the others."""
    suspect = next((message for message in claimed if message.unreported), None)
    if suspect is None:
        return claimed
    for message in claimed:
        if message is not suspect:
            message.release()
    return [suspect]


def extend(messages: Sequence[OutboxMessage], lease: timedelta) -> None:
    """Extend the leases of messages, as far as their workers still hold them.

    Args:
        messages: sequence of OutboxMessage, claimed by this process.
        lease: timedelta, how long to keep them, counted from now.
    """
    before, by_id = _steady(), {message.id: message for message in messages}
    held = _WAITING & OutboxMessage.id.in_(list(by_id)) & OutboxMessage.leased_by.in_({m.leased_by for m in messages})
    update = OutboxMessage.update(available_at=_moment_after(lease)).where(held)
    for message_id, claims in update.returning(OutboxMessage.id, OutboxMessage.claims).tuples().execute():
        if by_id[message_id].claims == claims:
            by_id[message_id]._held_until = before + lease.total_seconds()


def requeue(message: OutboxMessage | int, body: str | None = None) -> OutboxMessage:
    """Put a message that is DEAD, or was sent and not delivered, back into the outbox, with all its attempts.

    One that was not delivered is sent anew: it gets a new `send_key`, and its delivery keeps the provider's old id.

    Args:
        message: OutboxMessage, or its id.
        body: str, another text to send instead. It gets a new `send_key`, since the provider may know the old one.

    Returns:
        OutboxMessage, as it is now.

    Raises:
        MessageNotFound: there is no such message.
        MessageNotDead: the message is not DEAD, and not one that was sent and not delivered.
        LeadOptedOut: it is a text, and the lead opted out of texts.
        ConversationClosed, ConversationNotFound: it is a text, and its conversation has closed or was deleted.
        InvalidValue: the body is empty, or none is given for a text that was emptied.
    """
    message_id = message if isinstance(message, int) else message.id
    found: OutboxMessage | None = OutboxMessage.get_or_none(OutboxMessage.id == message_id)
    if found is None:
        raise MessageNotFound(message_id)
    fresh: dict[str, Any] = {"status": MessageStatus.PENDING, "attempts": 0, "unreported": 0, "available_at": _moment()}
    if found.status is MessageStatus.SENT and _is_undelivered(found):
        fresh |= {**_FREE, "send_key": str(uuid.uuid4()), "provider_id": None, "sent_at": None, "refusal": None}
    elif found.status is not MessageStatus.DEAD:
        raise MessageNotDead(message_id, found.status)
    if found.topic in TEXTS and (found.body, found.payload, body) == (None, None, None):
        raise InvalidValue("body", None, "the text of this message was emptied since: give another one")
    if body is not None and require_words("body", body) != found.body:
        fresh.update(body=body, send_key=str(uuid.uuid4()))
    dead = (OutboxMessage.id == message_id) & OutboxMessage.status.is_still(found.status)
    dead &= OutboxMessage.send_key == found.send_key
    with locked(found.conversation_id) if found.topic in TEXTS else nullcontext() as conversation:
        if conversation is not None:
            numbers.refuse(conversation.lead_id)
        if conversation is not None and conversation.stage in CLOSED_STAGES:
            raise ConversationClosed(conversation.id, conversation.stage)
        written = OutboxMessage.update(fresh).where(dead).execute()
    again: OutboxMessage = OutboxMessage.get_by_id(message_id)
    if not written:
        raise MessageNotDead(message_id, again.status)
    return again


def _is_undelivered(message: OutboxMessage) -> bool:
    delivery = message.delivery
    return delivery is not None and delivery.status is DeliveryStatus.UNDELIVERED


#: Why a message stays dead if many are put back.
_STAYS_DEAD = (
    MessageNotDead,
    MessageNotFound,
    LeadOptedOut,
    ConversationClosed,
    ConversationNotFound,
    UnreadableRow,
)


def requeue_all(*, error: str | None = None, since: datetime | None = None) -> list[int]:
    """Put many DEAD messages back into the outbox, in their old order.

    Texts of conversations that have closed or were deleted, or whose lead opted out, stay dead, and so does what cannot
    be read.

    Args:
        error: str, only those whose error is of this kind: what `last_error` says before its first colon.
        since: datetime with a timezone, only those that died at that time or later.

    Returns:
        list of int, their ids.
    """
    dead = OutboxMessage.status == MessageStatus.DEAD
    if error is not None:
        kind = clean_text("error", error)
        dead &= (OutboxMessage.last_error == kind) | OutboxMessage.last_error.startswith(f"{kind}:")
    if since is not None:
        dead &= OutboxMessage.available_at >= since
    ids = [message.id for message in OutboxMessage.select(OutboxMessage.id).where(dead).order_by(OutboxMessage.id)]
    requeued = []
    for message_id in ids:
        with suppress(*_STAYS_DEAD):
            requeued.append(int(requeue(message_id).id))
    return requeued


def _steady() -> float:
    return time.clock_gettime(_STEADY)


def _moment() -> peewee.SQL:
    return peewee.SQL(current().sql("{moment}"))


def _moment_after(wait: timedelta | datetime | None) -> Any:
    """Return the moment after a duration by the database's clock, a moment that is given, or the moment now."""
    if isinstance(wait, timedelta):
        return peewee.SQL(current().sql("{later}"), [wait.total_seconds()])
    return _moment() if wait is None else OutboxMessage.available_at.clean(wait)


def _backoff(attempts: int) -> timedelta:
    doubled: timedelta = BACKOFF * 2 ** min(attempts - 1, 20)
    return min(doubled * random.uniform(0.5, 1.5), LONGEST_BACKOFF)


def _error_text(error: object) -> str:
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return storable_text(text)
