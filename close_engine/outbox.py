"""The outbox: messages that commit with what causes them, and are sent from here, in order, by any number of workers.

    with close_engine.atomic():
        conversation.start_building(actor="worker-7")
        outbox.enqueue(conversation, "SEND_MESSAGE", "We are building your site now.")

    for message in outbox.claim(limit=10, lease=timedelta(minutes=1), worker="worker-7"):
        message.sent(provider_id=send(message))         # or message.retry(error), or message.give_up(error)

At most one message of a conversation is in flight, oldest first. A claimed message is leased: if its worker dies, it
can be claimed again when the lease ends, so a message may reach the provider twice in a crash. `message.send_key` is
the same each time: hand it to the provider as its idempotency key.
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

#: What says something to the lead, and so is not sent once the conversation has closed; other effects are.
TEXTS = tuple(ActionType)

#: The first retry comes after about this long, each further one after twice as long as the one before …
BACKOFF = timedelta(seconds=15)
#: … but never after more than this.
LONGEST_BACKOFF = timedelta(hours=1)


class OutboxMessage(BaseModel):
    """One message, or one other effect, that is to leave the system: a row of the outbox.

    Attributes:
        id: int, ascending in the order of a conversation's messages.
        topic: what it is: an ActionType's value, or a name of your own for another effect.
        body: the text to send; None where the payload says it all.
        payload: what else the sender needs, for example `paymentUrl`.
        trigger: the trigger that is fired when it is marked sent; None where there is none.
        approved_by: who approved it; None where nobody had to.
        submitted_by: who drafted it, as given to `submit`.
        available_at: it cannot be claimed before: the delay, the pause after an error, or the end of its lease.
        attempts: how often it was claimed.
        leased_by: the worker that has it, or sent it.
        provider_id: the provider's own id of it.
        last_error: what went wrong at the last attempt.
        refusal: why its trigger could not be fired when it was marked sent.
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
        """The idempotency key to hand to the provider: the same at every attempt to send this message."""
        return f"close-engine-{self.id}"

    def sent(self, provider_id: str | None = None) -> OutboxMessage:
        """Record that it is sent, and fire the trigger behind it, in one transaction.

        A trigger that is no longer allowed (the lead has paid meanwhile, say) leaves the message sent all the same,
        with the sentence in `refusal`. So does one whose hooks fail; that error is raised once the record is committed.
        Where it is the database that fails (it is away, there is a deadlock), nothing is recorded: report again.

        Args:
            provider_id: the provider's id of the message; the same again changes nothing.

        Raises:
            LeaseLost: it is no longer this worker's.
            ProviderIdTaken: another message has this provider's id.
        """
        failure: Exception | None = None
        try:
            with atomic() if self.trigger or current().database.in_transaction() else nullcontext():
                refusal = None
                if self.trigger and self._is_held():
                    refusal, failure = self._fire(self.trigger, provider_id)
                done = {"status": MessageStatus.SENT, "sent_at": now(), "provider_id": provider_id, "refusal": refusal}
                self._report(done)
        except peewee.IntegrityError:
            # Another message was given this provider's id at this very moment.
            self._refuse_unless_reported(provider_id)
            raise
        if failure is not None:
            raise failure
        return self

    def retry(self, error: object, after: timedelta | None = None) -> OutboxMessage:
        """Give it back to be tried again; after `max_attempts` it is dead instead.

        Args:
            error: what went wrong; its text is kept.
            after: how long to wait; the default doubles from attempt to attempt, give or take a half.

        Raises:
            LeaseLost: it is no longer this worker's.
        """
        if self.attempts >= self.max_attempts:
            return self.give_up(error)
        pause = after if after is not None else _backoff(self.attempts)
        return self._report({"leased_by": None, "available_at": now() + pause, "last_error": _told(error)})

    def give_up(self, error: object) -> OutboxMessage:
        """Record that it cannot be sent: it is dead until somebody requeues it, and those behind it go on.

        Raises:
            LeaseLost: it is no longer this worker's.
        """
        return self._report({"status": MessageStatus.DEAD, "leased_by": None, "last_error": _told(error)})

    def extend(self, lease: timedelta) -> OutboxMessage:
        """Keep it for longer, counted from now.

        Raises:
            LeaseLost: it is no longer this worker's.
        """
        return self._report({"available_at": now() + lease})

    def release(self) -> OutboxMessage:
        """Give it back untried: it may be tried as often as before.

        Raises:
            LeaseLost: it is no longer this worker's.
        """
        return self._report({"leased_by": None, "available_at": now(), "max_attempts": self.max_attempts + 1})

    @classmethod
    def with_provider_id(cls, provider_id: str) -> OutboxMessage | None:
        """The message that the provider knows by this id, as for its delivery callbacks; None where there is none."""
        message: OutboxMessage | None = cls.get_or_none(cls.provider_id == provider_id)
        return message

    def _held(self) -> peewee.Expression:
        # The number of attempts tells this lease from a later one of the same worker.
        held: peewee.Expression = (
            (OutboxMessage.id == self.id)
            & OutboxMessage.status.is_still(MessageStatus.PENDING)
            & OutboxMessage.leased_by.is_null(False)
            & (OutboxMessage.leased_by == self.leased_by)
            & (OutboxMessage.attempts == self.attempts)
        )
        return held

    def _is_held(self) -> bool:
        return OutboxMessage.select().where(self._held()).exists()

    def _report(self, values: dict[str, Any]) -> OutboxMessage:
        """Write what came of it, if it is still this worker's."""
        condition = self._held()
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
        """Raise why it cannot be reported on; if this very report was made before, take over the row."""
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
        """Fire the trigger behind it: the sentence that says why not, and the error of a hook that failed."""
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
                        # The lead has the link, whatever the stage, and can pay.
                        conversation.payment_link_url, conversation.payment_link_sent_at = link, now()
                        conversation.save()
                    return str(refusal), None
                return None, None
        except ConversationNotFound as refusal:
            return str(refusal), None
        except Exception as error:
            if is_transient(error):
                raise  # The database's own trouble passes: nothing is recorded, so that it can be reported again.
            return _told(error), error

    def __repr__(self) -> str:
        return f"<OutboxMessage {self.id}: {self.topic} of {self.conversation_id}, {self.status}>"


def _index_pending(*fields: Any, leased: bool = False, unique: bool = False) -> None:
    """An index of what waits only, so that it stays as small as that is."""
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
    """Put a message into the outbox, in the caller's transaction where one is open.

    Args:
        conversation: whose it is, or the id; its messages leave in the order in which they were put in.
        topic: an ActionType, or a name of your own for another effect.
        body: the text to send.
        payload: what else the sender needs; anything JSON can hold.
        send_after: how long it waits, or until when (timezone-aware); those behind it wait with it.
        key: idempotency key, unique within the conversation: the same key again returns the first message.
        trigger: the trigger to fire when it is marked sent.
        approved_by: who approved it.
        submitted_by: who drafted it.
        max_attempts: how often it may be tried.

    Returns:
        the message.

    Raises:
        ConversationNotFound: there is no such conversation.
        UnknownTrigger: there is no such trigger.
        InvalidValue: an argument cannot be stored.
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
    # The row's lock makes the order of a conversation's ids the order in which they are committed.
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
    """Whenever one of these stages is entered, enqueue this, committed with the stage change.

    Args:
        stages: the stages.
        topic: what your sender does, for example `build_site`.
        payload: what it needs: a mapping, or a function of the conversation and the StageChange that returns one.
        send_after: how long it waits.

    Returns:
        the hook; `remove()` it to stop.
    """

    @on_enter(*stages)
    def enqueue_effect(conversation: CloseEngineConversation, change: StageChange) -> None:
        made = payload(conversation, change) if callable(payload) else payload
        enqueue(conversation, topic, payload=made, send_after=send_after, key=f"{topic}:{change.id}")

    return enqueue_effect


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
    """Lease the messages that are next, for this worker alone: at most one of a conversation, the oldest first.

    Args:
        limit: at most so many.
        lease: how long they are its own; then they can be claimed again.
        worker: its name.

    Returns:
        the messages, oldest first.
    """
    if not clean_text("worker", worker).strip():
        raise InvalidValue("worker", worker, "a worker must have a name")
    if limit < 1:
        raise InvalidValue("limit", limit, "it must be at least 1")
    if lease <= timedelta(0):
        raise InvalidValue("lease", lease, "it must last for a while")
    binding, moment = current(), now()
    text = _CLAIM.replace("{skip_locked}", binding.dialect.skip_locked("o"))
    text = binding.dialect.sql(text.replace("{next}", binding.dialect.in_subquery("SELECT id FROM next")))
    values = (stored_time(moment), limit, worker, stored_time(moment + lease))
    try:
        with atomic() if binding.database.in_transaction() else nullcontext():
            claimed = list(OutboxMessage.raw(text, *values))
    except peewee.IntegrityError:
        # Another one took a message of the same conversation (that was requeued) at this very moment: look again.
        return claim(limit, lease, worker)
    wanted = _without_late(claimed)
    if claimed and not wanted:
        return claim(limit, lease, worker)
    return sorted(wanted, key=lambda message: int(message.id))


def _without_late(claimed: list[OutboxMessage]) -> list[OutboxMessage]:
    """Withdraw the texts that were in flight when their conversation closed, and came back from there unsent."""
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
    """Put a dead message back, to be tried as often again.

    Args:
        message: the message, or its id.

    Raises:
        MessageNotFound: there is none.
        MessageNotDead: it is not dead.
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
    """The moment that is meant: after this duration, at this moment, or now."""
    if isinstance(wait, timedelta):
        return now() + wait
    moment: datetime = OutboxMessage.available_at.clean(wait) if wait is not None else now()
    return moment


def _backoff(attempts: int) -> timedelta:
    doubled: timedelta = BACKOFF * 2 ** min(attempts - 1, 20)
    return min(doubled * random.uniform(0.5, 1.5), LONGEST_BACKOFF)


def _told(error: object) -> str:
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return text.replace("\x00", "").encode(errors="replace").decode()
