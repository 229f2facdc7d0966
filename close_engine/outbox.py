"""The outbox: messages are stored in the transaction that causes them, and any number of workers send them, in order.

    with close_engine.atomic():
        conversation.start_building(actor="worker-7")
        outbox.enqueue(conversation, "SEND_MESSAGE", "We are building your site now.")

    for message in outbox.claim(limit=10, lease=timedelta(minutes=1), worker="worker-7"):
        message.sent(provider_id=send(message))         # or message.retry(error), or message.give_up(error)

At most one message of a conversation is in flight, the oldest first. Claiming a message leases it. If the worker dies,
another one can claim the message when the lease ends, so after a crash a message may reach the provider twice. Pass
`message.send_key` to the provider as the idempotency key: it is the same every time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import datetime, timedelta
from typing import Any

import peewee

from close_engine.conversations import CloseEngineConversation, locked
from close_engine.database.binding import current, is_transient, now
from close_engine.database.fields import EnumField, JsonField, TextField, UtcDateTimeField, clean_text, stored_time
from close_engine.database.transaction import accept, accept_row, atomic
from close_engine.errors import (
    ConversationClosed,
    ConversationNotFound,
    InvalidValue,
    LeaseLost,
    MessageNotDead,
    MessageNotFound,
    ProviderIdTaken,
    TransitionRefused,
    UnknownTrigger,
)
from close_engine.hooks import Hook, on_enter
from close_engine.machine import TRIGGERS
from close_engine.models import BaseModel, StageChange
from close_engine.stages import CLOSED_STAGES, ActionType, MessageStatus, Stage

__all__ = ["OutboxMessage", "claim", "effect", "enqueue", "requeue"]

#: Topics that are texts to the lead: they are not sent after the conversation has closed. Other effects still are.
TEXTS = tuple(ActionType)

#: The first retry comes after about this long, and each further one after twice as long, …
BACKOFF = timedelta(seconds=15)
#: … up to this.
LONGEST_BACKOFF = timedelta(hours=1)


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
        available_at: datetime before which it cannot be claimed: the end of a delay, of a pause after an error, or of
            its lease.
        attempts: int, how often it was claimed.
        max_attempts: int, how often it may be claimed.
        leased_by: str, the worker that holds it, or sent it.
        sent_at: datetime, when it was marked sent.
        provider_id: str, the provider's id of it.
        last_error: str, what went wrong at the last attempt.
        refusal: str, why its trigger could not be fired when it was marked sent.
    """

    id: Any = peewee.BigAutoField()
    conversation_id = TextField[str]()
    lead_id = TextField[str]()
    topic = TextField[str]()
    body = TextField["str | None"](null=True)
    payload = JsonField(null=True)
    trigger = TextField["str | None"](null=True)
    approved_by = TextField["str | None"](null=True)
    submitted_by = TextField["str | None"](null=True)
    key = TextField["str | None"](null=True)
    status = EnumField[MessageStatus](
        MessageStatus, default=MessageStatus.PENDING, constraints=[peewee.SQL("DEFAULT 'PENDING'")]
    )
    created_at = UtcDateTimeField[datetime](default=now)
    available_at = UtcDateTimeField[datetime](default=now)
    attempts = peewee.IntegerField(default=0, constraints=[peewee.SQL("DEFAULT 0")])
    max_attempts = peewee.IntegerField(default=10, constraints=[peewee.SQL("DEFAULT 10")])
    leased_by = TextField["str | None"](null=True)
    sent_at = UtcDateTimeField["datetime | None"](null=True)
    provider_id = TextField["str | None"](null=True)
    last_error = TextField["str | None"](null=True)
    refusal = TextField["str | None"](null=True)

    class Meta:
        table_name = "outbox"
        own_table = "outbox"

    @property
    def send_key(self) -> str:
        """The idempotency key to pass to the provider: the same at every attempt to send this message."""
        return f"close-engine-{self.id}"

    def sent(self, provider_id: str | None = None) -> OutboxMessage:
        """Record that the message was sent, and fire its trigger, in one transaction.

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
        try:
            with atomic() if self.trigger or current().database.in_transaction() else nullcontext():
                refusal = None
                if self.trigger and self._holds_lease():
                    refusal, failure = self._fire(self.trigger, provider_id)
                done = {"status": MessageStatus.SENT, "sent_at": now(), "provider_id": provider_id, "refusal": refusal}
                self._report(done)
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
        return self._report({"leased_by": None, "available_at": now() + pause, "last_error": _error_text(error)})

    def give_up(self, error: object) -> OutboxMessage:
        """Record that the message cannot be sent: it stays DEAD until somebody requeues it. Later ones are sent.

        Args:
            error: an exception or a text, what went wrong; stored in `last_error`.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
        """
        return self._report({"status": MessageStatus.DEAD, "leased_by": None, "last_error": _error_text(error)})

    def extend(self, lease: timedelta) -> OutboxMessage:
        """Extend the lease.

        Args:
            lease: timedelta, how long to keep the message, counted from now.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
        """
        return self._report({"available_at": now() + lease})

    def release(self) -> OutboxMessage:
        """Put the message back untried. The attempt does not count: `max_attempts` grows by one.

        Returns:
            the message itself.

        Raises:
            LeaseLost: this worker no longer holds the lease.
        """
        return self._report({"leased_by": None, "available_at": now(), "max_attempts": self.max_attempts + 1})

    @classmethod
    def with_provider_id(cls, provider_id: str) -> OutboxMessage | None:
        """Find a message by the provider's id, for example in a delivery callback; None if there is no such message."""
        message: OutboxMessage | None = cls.get_or_none(cls.provider_id == provider_id)
        return message

    def _has_same_lease(self) -> peewee.Expression:
        # The number of attempts tells this lease from a later one of the same worker.
        same_lease: peewee.Expression = (
            (OutboxMessage.id == self.id)
            & OutboxMessage.status.is_still(MessageStatus.PENDING)
            & OutboxMessage.leased_by.is_null(False)
            & (OutboxMessage.leased_by == self.leased_by)
            & (OutboxMessage.attempts == self.attempts)
        )
        return same_lease

    def _holds_lease(self) -> bool:
        return OutboxMessage.select().where(self._has_same_lease()).exists()

    def _report(self, values: dict[str, Any]) -> OutboxMessage:
        """Write the outcome if this worker still holds the lease."""
        condition = self._has_same_lease()
        provider_id = values.get("provider_id")
        if provider_id is not None:
            other = OutboxMessage.alias()
            condition &= ~peewee.fn.EXISTS(other.select(peewee.SQL("1")).where(other.provider_id == provider_id))
        if OutboxMessage.update(values).where(condition).execute():
            fields = self._meta.fields
            accept(self, {name: fields[name].python_value(fields[name].db_value(values[name])) for name in values})
        else:
            self._refuse_unless_reported(provider_id)
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

    def _fire(self, trigger: str, provider_id: str | None) -> tuple[str | None, Exception | None]:
        """Fire the trigger; return the sentence for `refusal` and the error of a hook that failed, or None for each."""
        payload = self.payload if isinstance(self.payload, dict) else {}
        try:
            with locked(self.conversation_id) as conversation:
                if conversation.stage is TRIGGERS[trigger].dest:
                    return None, None
                link = payload.get("paymentUrl")
                metadata = {"message_id": self.id, "provider_id": provider_id}
                if self.submitted_by is not None:
                    metadata["submitted_by"] = self.submitted_by
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
                        conversation.payment_link_url, conversation.payment_link_sent_at = link, now()
                        conversation.save()
                    return str(refusal), None
                return None, None
        except ConversationNotFound as refusal:
            return str(refusal), None
        except Exception as error:
            if is_transient(error):
                raise  # The database may recover: record nothing, so that the worker can report again.
            return _error_text(error), error

    def __repr__(self) -> str:
        return f"<OutboxMessage {self.id}: {self.topic} of {self.conversation_id}, {self.status}>"


def _index_pending(*fields: Any, leased: bool = False, unique: bool = False) -> None:
    """Declare an index that covers only waiting messages, so that it stays small."""
    pending = OutboxMessage.status == MessageStatus.PENDING
    where = pending & OutboxMessage.leased_by.is_null(False) if leased else pending
    OutboxMessage.add_index(*fields, unique=unique, where=where)


_index_pending(OutboxMessage.available_at, OutboxMessage.id)
_index_pending(OutboxMessage.conversation_id, OutboxMessage.id)
_index_pending(OutboxMessage.conversation_id, leased=True, unique=True)
_index_pending(OutboxMessage.available_at, leased=True)
OutboxMessage.add_index(OutboxMessage.id, where=OutboxMessage.status == MessageStatus.DEAD)
for fields in ((OutboxMessage.conversation_id, OutboxMessage.key), (OutboxMessage.provider_id,)):
    OutboxMessage.add_index(*fields, unique=True, where=fields[-1].is_null(False))


def enqueue(
    conversation: CloseEngineConversation | str,
    topic: ActionType | str,
    body: str | None = None,
    *,
    payload: Mapping[str, Any] | None = None,
    send_after: timedelta | datetime | None = None,
    key: str | None = None,
    trigger: str | None = None,
    approved_by: str | None = None,
    submitted_by: str | None = None,
    max_attempts: int = 10,
) -> OutboxMessage:
    """Put a message into the outbox, in the caller's transaction if one is open.

    Args:
        conversation: CloseEngineConversation, or its id. Its messages are sent in the order of their ids.
        topic: ActionType, or your own name for another effect.
        body: str, the text to send.
        payload: mapping that JSON can hold, what else the sender needs.
        send_after: timedelta, how long to wait, or datetime with a timezone, until when. Later messages wait too.
        key: str, idempotency key, unique within the conversation. Using it again returns the first message.
        trigger: str, the trigger to fire when the message is marked sent.
        approved_by: str, who approved it.
        submitted_by: str, who drafted it.
        max_attempts: int, how often it may be claimed.

    Returns:
        OutboxMessage.

    Raises:
        ConversationNotFound: there is no such conversation.
        UnknownTrigger: there is no such trigger.
        InvalidValue: an argument makes no sense or cannot be stored.
    """
    conversation_id = conversation if isinstance(conversation, str) else conversation.id
    if trigger is not None and trigger not in TRIGGERS:
        raise UnknownTrigger(trigger, list(TRIGGERS))
    if key is not None and not clean_text("key", key).strip():
        raise InvalidValue("key", key, "an idempotency key must not be empty")
    if max_attempts < 1:
        raise InvalidValue("max_attempts", max_attempts, "it must be at least 1")
    message = OutboxMessage(
        conversation_id=conversation_id,
        topic=str(topic),
        body=body,
        payload=payload,
        trigger=trigger,
        approved_by=approved_by,
        submitted_by=submitted_by,
        key=key,
        available_at=moment_after(send_after),
        max_attempts=max_attempts,
    )
    # Lock the conversation, so that its messages commit in the order of their ids.
    with locked(conversation_id) as held:
        same = (OutboxMessage.conversation_id == conversation_id) & (OutboxMessage.key == key)
        if key is not None and (first := OutboxMessage.get_or_none(same)) is not None:
            return first
        message.lead_id = held.lead_id
        message.save(force_insert=True)
    return message


def effect(
    *stages: Stage,
    topic: str,
    payload: Mapping[str, Any] | Callable[[CloseEngineConversation, StageChange], Mapping[str, Any]] | None = None,
    send_after: timedelta | None = None,
) -> Hook:
    """Enqueue an effect whenever a conversation enters one of these stages, in the transaction of the stage change.

    Args:
        stages: Stage, one or more.
        topic: str, what your sender should do, for example `build_site`.
        payload: mapping with what the sender needs, or a function that gets the conversation and the StageChange and
            returns one.
        send_after: timedelta, how long to wait.

    Returns:
        Hook; call its `remove()` to stop.
    """

    @on_enter(*stages)
    def enqueue_effect(conversation: CloseEngineConversation, change: StageChange) -> None:
        made = payload(conversation, change) if callable(payload) else payload
        enqueue(conversation, topic, payload=made, send_after=send_after, key=f"{topic}:{change.id}")

    return enqueue_effect


# On PostgreSQL, the statement ends like this:
#
#     ORDER BY o.available_at, o.id LIMIT %s FOR NO KEY UPDATE OF o SKIP LOCKED
#     )
#     UPDATE close_engine.outbox SET leased_by = %s, available_at = %s, attempts = attempts + 1
#     WHERE id = ANY (ARRAY(SELECT id FROM next)) RETURNING *
_CLAIM = """
WITH next AS (
    SELECT o.id FROM {outbox} o
    WHERE o.status = 'PENDING' AND o.available_at <= %s AND (
        o.leased_by IS NOT NULL AND o.attempts < o.max_attempts
        OR o.leased_by IS NULL
            AND NOT EXISTS (SELECT 1 FROM {outbox} older WHERE older.conversation_id = o.conversation_id
                AND older.status = 'PENDING' AND older.id < o.id)
            AND NOT EXISTS (SELECT 1 FROM {outbox} flying WHERE flying.conversation_id = o.conversation_id
                AND flying.status = 'PENDING' AND flying.leased_by IS NOT NULL))
    ORDER BY o.available_at, o.id LIMIT %s {skip_locked}
)
UPDATE {outbox} SET leased_by = %s, available_at = %s, attempts = attempts + 1
WHERE id {next} RETURNING *
"""


def claim(limit: int = 10, lease: timedelta = timedelta(minutes=1), worker: str = "worker") -> list[OutboxMessage]:
    """Lease the next messages to a worker: at most one per conversation, its oldest.

    Args:
        limit: int, the most messages to claim.
        lease: timedelta, how long no other worker can claim them.
        worker: str, the worker's name.

    Returns:
        list of OutboxMessage, oldest first.

    Raises:
        InvalidValue: the worker has no name, the limit is less than 1, or the lease is not greater than zero.
    """
    if not clean_text("worker", worker).strip():
        raise InvalidValue("worker", worker, "a worker must have a name")
    if limit < 1:
        raise InvalidValue("limit", limit, "it must be at least 1")
    if lease <= timedelta(0):
        raise InvalidValue("lease", lease, "it must be greater than zero")
    binding, moment = current(), now()
    text = _CLAIM.replace("{skip_locked}", binding.dialect.skip_locked("o"))
    text = binding.dialect.sql(text.replace("{next}", binding.dialect.in_subquery("SELECT id FROM next")))
    values = (stored_time(moment), limit, worker, stored_time(moment + lease))
    try:
        with atomic() if binding.database.in_transaction() else nullcontext():
            claimed = list(OutboxMessage.raw(text, *values))
    except peewee.IntegrityError:
        # Another worker claimed a requeued message of the same conversation at the same moment: try again.
        return claim(limit, lease, worker)
    wanted = _withdraw_late(claimed)
    if claimed and not wanted:
        return claim(limit, lease, worker)
    return sorted(wanted, key=lambda message: int(message.id))


def _withdraw_late(claimed: list[OutboxMessage]) -> list[OutboxMessage]:
    """Withdraw texts that were in flight when their conversation closed, and return the other messages."""
    again = [message.id for message in claimed if message.attempts > 1 and message.topic in TEXTS]
    if not again:
        return claimed
    conversation, put_in = CloseEngineConversation, OutboxMessage.created_at
    closed = (conversation.stage == Stage.COMPLETED) & (put_in <= conversation.completed_at)
    closed |= (conversation.stage == Stage.CLOSED_LOST) & (put_in <= conversation.closed_lost_at)
    late = conversation.select(peewee.SQL("1")).where((conversation.id == OutboxMessage.conversation_id) & closed)
    why = "its conversation closed while it was in flight"
    withdraw = OutboxMessage.update(status=MessageStatus.WITHDRAWN, leased_by=None, last_error=why)
    withdraw = withdraw.where(OutboxMessage.id.in_(again) & peewee.fn.EXISTS(late)).returning(OutboxMessage.id)
    withdrawn = {message.id for message in withdraw.execute()}
    return [message for message in claimed if message.id not in withdrawn]


def requeue(message: OutboxMessage | int) -> OutboxMessage:
    """Put a DEAD message back into the outbox, with all its attempts.

    Args:
        message: OutboxMessage, or its id.

    Returns:
        OutboxMessage, as it is now.

    Raises:
        MessageNotFound: there is no such message.
        MessageNotDead: the message is not DEAD.
        ConversationClosed, ConversationNotFound: it is a text, and its conversation has closed or was deleted.
    """
    message_id = message if isinstance(message, int) else message.id
    found: OutboxMessage | None = OutboxMessage.get_or_none(OutboxMessage.id == message_id)
    if found is None:
        raise MessageNotFound(message_id)
    if found.status is not MessageStatus.DEAD:
        raise MessageNotDead(message_id, found.status)
    fresh = {"status": MessageStatus.PENDING, "attempts": 0, "available_at": now()}
    dead = (OutboxMessage.id == message_id) & OutboxMessage.status.is_still(MessageStatus.DEAD)
    with locked(found.conversation_id) if found.topic in TEXTS else nullcontext() as conversation:
        if conversation is not None and conversation.stage in CLOSED_STAGES:
            raise ConversationClosed(conversation.id, conversation.stage)
        written = OutboxMessage.update(fresh).where(dead).execute()
    again: OutboxMessage = OutboxMessage.get_by_id(message_id)
    if not written:
        raise MessageNotDead(message_id, again.status)
    return again


def moment_after(wait: timedelta | datetime | None) -> datetime:
    """Convert a duration from now, a moment or None (for now) to a moment."""
    if isinstance(wait, timedelta):
        return now() + wait
    moment: datetime = OutboxMessage.available_at.clean(wait) if wait is not None else now()
    return moment


def _backoff(attempts: int) -> timedelta:
    doubled: timedelta = BACKOFF * 2 ** min(attempts - 1, 20)
    return min(doubled * random.uniform(0.5, 1.5), LONGEST_BACKOFF)


def _error_text(error: object) -> str:
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return text.replace("\x00", "").encode(errors="replace").decode()
