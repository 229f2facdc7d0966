"""Every error of this library: a sentence that says what to do, and its data as attributes.

    CloseEngineError
        ConfigurationError
        SchemaError
            GuardMissing
        InvalidValue, also a ValueError
        UnreadableRow
        UnknownTrigger, also a LookupError
        TransitionRefused
            TransitionNotAllowed
            ConditionNotMet
        StageAssignmentRefused, also an AttributeError
        StageConflict
        KeyReused
        PartlyLoaded
        NotFound, also a LookupError
            ConversationNotFound
            LeadNotFound
            UserNotFound
            ActionNotFound
            MessageNotFound
            MessageCleared
            PaymentNotFound
        LeadHasNoPhone
        LeadOptedOut
        ConversationCompleted
        ConversationClosed
        ConversationTakenOver
        ActionSuperseded
        ActionDecided
        DraftFailed
        CannotBeSent
        RecipientOptedOut
        Snooze
        LeaseLost
        MessageNotDead
        ProviderIdTaken
        TextOfAnotherLead
        PaymentUnmatched
        TransactionFailed
        TransactionOfAnotherTask
        AfterCommitError

>>> try:
...     raise LeadHasNoPhone("lead_1")
... except CloseEngineError as error:
...     print(error, error.lead_id)
Lead 'lead_1' has no phone number, so no conversation by text message can be opened: add one first. lead_1
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from close_engine.printable import printable
from close_engine.stages import ActionStatus, MessageStatus, Stage

__all__ = [
    "ActionDecided",
    "ActionNotFound",
    "ActionSuperseded",
    "AfterCommitError",
    "CannotBeSent",
    "CloseEngineError",
    "ConditionNotMet",
    "ConfigurationError",
    "ConversationClosed",
    "ConversationCompleted",
    "ConversationNotFound",
    "ConversationTakenOver",
    "DraftFailed",
    "GuardMissing",
    "InvalidValue",
    "KeyReused",
    "LeadHasNoPhone",
    "LeadNotFound",
    "LeadOptedOut",
    "LeaseLost",
    "MessageCleared",
    "MessageNotDead",
    "MessageNotFound",
    "NotFound",
    "PartlyLoaded",
    "PaymentNotFound",
    "PaymentUnmatched",
    "ProviderIdTaken",
    "RecipientOptedOut",
    "SchemaError",
    "Snooze",
    "StageAssignmentRefused",
    "StageConflict",
    "TextOfAnotherLead",
    "TransactionFailed",
    "TransactionOfAnotherTask",
    "TransitionNotAllowed",
    "TransitionRefused",
    "UnknownTrigger",
    "UnreadableRow",
    "UserNotFound",
]


class CloseEngineError(Exception):
    """Base class of every error that this library raises.

    An error can be pickled, so it crosses process pools and task queues, with its text and its attributes. Text takes
    the place of whatever it holds that cannot be pickled itself.
    """

    # Python would call `__init__` with `args`, which hold the finished sentence and not what the sentence is made of.
    def __reduce__(self) -> tuple[Any, ...]:
        args = self.args if _can_be_pickled(self.args) else (str(self),)
        return _without_init, (type(self), args), {name: _portable(value) for name, value in vars(self).items()}

    def __copy__(self) -> CloseEngineError:
        copied = _without_init(type(self), self.args)
        vars(copied).update(vars(self))
        return copied


class ConfigurationError(CloseEngineError):
    """A setting is missing or wrong: the database, the clock or the sender.

    Attributes:
        problems: list of str, one sentence each, if there may be several.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([message, *map(printable, self.problems)]))


class SchemaError(CloseEngineError):
    """The database's tables are not what the library needs.

    Attributes:
        problems: list of str, one sentence each.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([message, *map(printable, self.problems)]))


class GuardMissing(SchemaError):
    """The triggers that check and record every change are not there, or do not fire; nothing was written.

    Attributes:
        table: the table that they guard.
    """

    def __init__(self, table: str) -> None:
        self.table = table
        super().__init__(
            f"Nothing was written: the guard on {table} is missing, disabled, or turned off in this session by "
            "session_replication_role. Run close-engine migrate, then close-engine verify."
        )


class InvalidValue(CloseEngineError, ValueError):
    """An argument makes no sense, or a column cannot store it unchanged. The database never saw it.

    Attributes:
        field: name of the field or the argument.
        value: the refused value.
    """

    def __init__(self, field: str, value: Any, why: str) -> None:
        self.field = field
        self.value = value
        super().__init__(f"{field} cannot be {_shown(value)}: {why}.")


class UnreadableRow(CloseEngineError):
    """A row holds a value that Python cannot read: it was there before the guards, or they were off.

    Attributes:
        table: the row's table.
        row_id: the row's id.
        column: the column of the value; None if the query does not tell.
        why: why it cannot be read.
    """

    def __init__(self, table: str, row_id: Any, column: str | None, why: str) -> None:
        self.table = table
        self.row_id = row_id
        self.column = column
        self.why = why
        reason = f"because of its {column} ({why})" if column else f"because {why}"
        super().__init__(
            f"Row {row_id!r} of {table} cannot be read, {reason}: correct it with an UPDATE. "
            "close-engine verify lists every such row."
        )


class UnknownTrigger(CloseEngineError, LookupError):
    """The transition table has no trigger of this name.

    Attributes:
        trigger: the name.
        known: list of the names that exist.
    """

    def __init__(self, trigger: str, known: Sequence[str]) -> None:
        self.trigger = trigger
        self.known = list(known)
        super().__init__(f"There is no trigger {trigger!r}; the triggers are {', '.join(known)}.")


class TransitionRefused(CloseEngineError):
    """The conversation cannot take this trigger now; nothing was written.

    Attributes:
        conversation_id: the conversation; None if the transition table was asked without one.
        trigger: the refused trigger.
        stage: the Stage that refused it.
    """

    def __init__(self, message: str, conversation_id: str | None, trigger: str, stage: Stage) -> None:
        self.conversation_id = conversation_id
        self.trigger = trigger
        self.stage = stage
        super().__init__(message)


class TransitionNotAllowed(TransitionRefused):
    """The transition table does not allow the trigger from this stage.

    Attributes:
        allowed: list of the triggers that it allows from this stage.
    """

    def __init__(self, conversation_id: str | None, trigger: str, stage: Stage, allowed: Sequence[str]) -> None:
        self.allowed = list(allowed)
        instead = f"allowed: {', '.join(allowed)}" if allowed else f"{stage} is final"
        super().__init__(
            f"{_conversation(conversation_id)} is {stage}, and {trigger} is not allowed from there; {instead}.",
            conversation_id,
            trigger,
            stage,
        )


class ConditionNotMet(TransitionRefused):
    """The transition table allows the trigger from this stage, but one of its conditions is not met.

    Attributes:
        condition: a sentence that says what is missing.
    """

    def __init__(self, conversation_id: str | None, trigger: str, stage: Stage, condition: str) -> None:
        self.condition = condition
        super().__init__(
            f"{_conversation(conversation_id)} is {stage}, and {trigger} is refused: {condition}.",
            conversation_id,
            trigger,
            stage,
        )


class StageAssignmentRefused(CloseEngineError, AttributeError):
    """Code tried to write the stage without a trigger.

    Attributes:
        stage: the Stage that it tried to write.
    """

    def __init__(self, message: str, stage: Any) -> None:
        self.stage = stage
        super().__init__(message)


class StageConflict(CloseEngineError):
    """Another writer changed the conversation after it was loaded; nothing was written.

    In a transaction that is stricter than READ COMMITTED, nobody can see what the other writer wrote: then `found` is
    None, and the transaction must be rolled back and begun again.

    Attributes:
        conversation_id: the conversation; None if the statement was not about one alone.
        operation: the trigger, or the method that wrote: `save()`, `submit()`, `receive()`; None as above.
        expected: the Stage that the object in memory has; None as above.
        found: the Stage that the row has now; None if this transaction cannot see it.
    """

    def __init__(
        self, conversation_id: str | None, operation: str | None, expected: Stage | None, found: Stage | None
    ) -> None:
        self.conversation_id = conversation_id
        self.operation = operation
        self.expected = expected
        self.found = found
        if found is None:
            super().__init__(
                f"{_conversation(conversation_id)} was changed by somebody else after this transaction began"
                f"{f', which {operation} cannot see' if operation else ''}: roll the transaction back, and begin again."
            )
            return
        moved = f"expected {expected} and found {found}"
        if expected is found:
            moved = f"expected {expected} and found {found} again, but changed since it was loaded"
        super().__init__(
            f"Conversation {conversation_id!r} was changed by somebody else: {operation} {moved}; "
            "reload it and decide again, or lock it with locked()."
        )


class KeyReused(CloseEngineError):
    """An idempotency key came back with another trigger than the one it was first used for.

    Attributes:
        conversation_id: the conversation.
        key: the key.
        first: the trigger it was first used for.
        trigger: the trigger it came back with.
    """

    def __init__(self, conversation_id: str, key: str, first: str, trigger: str) -> None:
        self.conversation_id = conversation_id
        self.key = key
        self.first = first
        self.trigger = trigger
        super().__init__(
            f"Key {key!r} was used for {first} of conversation {conversation_id!r} and cannot be used "
            f"for {trigger}: give every event a key of its own."
        )


class PartlyLoaded(CloseEngineError):
    """The query that loaded the conversation left out columns that a decision needs.

    Attributes:
        conversation_id: the conversation.
        missing: list of the fields' names.
    """

    def __init__(self, conversation_id: str, missing: Sequence[str]) -> None:
        self.conversation_id = conversation_id
        self.missing = list(missing)
        super().__init__(
            f"Conversation {conversation_id!r} was loaded without {', '.join(missing)}: "
            "select all its columns, or reload() it."
        )


class NotFound(CloseEngineError, LookupError):
    """The database has no such row: it never had it, or the row was deleted."""


class ConversationNotFound(NotFound):
    """There is no such conversation.

    Attributes:
        conversation_id: the id that was looked for.
    """

    def __init__(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        super().__init__(
            f"There is no conversation {conversation_id!r}: it was deleted with its lead, or never opened with "
            "open_conversation()."
        )


class LeadNotFound(NotFound):
    """There is no such lead.

    Attributes:
        lead_id: the id that was looked for.
    """

    def __init__(self, lead_id: str) -> None:
        self.lead_id = lead_id
        super().__init__(f"There is no lead {lead_id!r}.")


class UserNotFound(NotFound):
    """There is no such user; the rep of a conversation must be one.

    Attributes:
        user_id: the id that was looked for.
    """

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        super().__init__(f"There is no user {user_id!r}.")


class ActionNotFound(NotFound):
    """There is no such pending action.

    Attributes:
        action_id: the id that was looked for.
    """

    def __init__(self, action_id: str) -> None:
        self.action_id = action_id
        super().__init__(f"There is no action {action_id!r}.")


class MessageNotFound(NotFound):
    """There is no such message in the outbox.

    Attributes:
        message_id: the id that was looked for.
    """

    def __init__(self, message_id: int | str) -> None:
        self.message_id = message_id
        super().__init__(f"There is no message {message_id!r} in the outbox.")


class MessageCleared(NotFound):
    """The action was approved before, and its message is no longer in the outbox: somebody has cleared it away.

    Attributes:
        action_id: the action.
    """

    def __init__(self, action_id: str) -> None:
        self.action_id = action_id
        super().__init__(
            f"Action {action_id!r} was approved before, and its message has been cleared away from the outbox since: "
            "there is nothing more to do."
        )


class PaymentNotFound(NotFound):
    """No payment that somebody should look at has this id.

    Attributes:
        entry_id: the id that was looked for.
    """

    def __init__(self, entry_id: int) -> None:
        self.entry_id = entry_id
        super().__init__(f"There is no payment {entry_id} to look at: close-engine payments lists them.")


class LeadHasNoPhone(CloseEngineError):
    """The lead has no phone number, so nobody can text it.

    Attributes:
        lead_id: the lead.
    """

    def __init__(self, lead_id: str) -> None:
        self.lead_id = lead_id
        super().__init__(
            f"Lead {lead_id!r} has no phone number, so no conversation by text message can be opened: add one first."
        )


class LeadOptedOut(CloseEngineError):
    """The lead, or its phone number, opted out of texts, so nothing more is sent to it.

    Attributes:
        lead_id: the lead.
    """

    def __init__(self, lead_id: str) -> None:
        self.lead_id = lead_id
        super().__init__(
            f"Lead {lead_id!r} opted out of texts, so nothing can be sent to it until it opts in again: by the text "
            "START, or with opt_in()."
        )


class ConversationCompleted(CloseEngineError):
    """The lead has paid: its conversation is COMPLETED and cannot be opened again.

    Attributes:
        conversation_id: the completed conversation.
        lead_id: its lead.
    """

    def __init__(self, conversation_id: str, lead_id: str) -> None:
        self.conversation_id = conversation_id
        self.lead_id = lead_id
        super().__init__(
            f"Conversation {conversation_id!r} of lead {lead_id!r} is COMPLETED, which is final; "
            "it cannot be opened again."
        )


class ConversationClosed(CloseEngineError):
    """The conversation is COMPLETED or CLOSED_LOST, so nothing more is sent to its lead.

    Attributes:
        conversation_id: the conversation.
        stage: the Stage that it is in.
    """

    def __init__(self, conversation_id: str, stage: Stage) -> None:
        self.conversation_id = conversation_id
        self.stage = stage
        super().__init__(
            f"Conversation {conversation_id!r} is {stage}, so nothing can be submitted or approved for it any more."
        )


class ConversationTakenOver(CloseEngineError):
    """A human leads the conversation, so nobody else's drafts are let in.

    Attributes:
        conversation_id: the conversation.
        taken_by: who leads it.
    """

    def __init__(self, conversation_id: str, taken_by: str) -> None:
        self.conversation_id = conversation_id
        self.taken_by = taken_by
        super().__init__(
            f"Conversation {conversation_id!r} was taken over by {taken_by!r}: only they can submit or take it over, "
            "until it is handed back (hand_back())."
        )


class ActionSuperseded(CloseEngineError):
    """The lead has written since the pending action was drafted, so it cannot be approved.

    Attributes:
        action_id: the action.
    """

    def __init__(self, action_id: str) -> None:
        self.action_id = action_id
        super().__init__(
            f"Action {action_id!r} was drafted before the lead's last text and cannot be approved: read what the lead "
            "wrote, and submit a new draft."
        )


class ActionDecided(CloseEngineError):
    """Somebody already decided otherwise on the pending action, or it expired.

    Attributes:
        action_id: the action.
        trigger: the decision that came too late: `approve`, `reject` or `expire`.
        status: the ActionStatus that it has.
    """

    def __init__(self, action_id: str, trigger: str, status: ActionStatus) -> None:
        self.action_id = action_id
        self.trigger = trigger
        self.status = status
        again = "submit a new draft" if status is ActionStatus.EXPIRED else "that decision stands"
        super().__init__(f"Action {action_id!r} is {status}, so it is too late to {trigger} it: {again}.")


class DraftFailed(CloseEngineError):
    """A language model was asked what to do in a conversation, and came to no end. Nothing was written.

    Attributes:
        conversation_id: the conversation.
        why: what went wrong.
    """

    def __init__(self, conversation_id: str, why: str) -> None:
        self.conversation_id = conversation_id
        self.why = why
        super().__init__(f"Nothing was drafted for conversation {conversation_id!r}: {why}.")


class CannotBeSent(CloseEngineError):
    """Raise it in your sender if a message can never be delivered: the worker will not try it again."""


class RecipientOptedOut(CloseEngineError):
    """Raise it in your sender if the provider says that the recipient opted out: the lead is texted no more.

    With Twilio, that is the error 21610.
    """


class Snooze(CloseEngineError):
    """Raise it in your sender if the message should be sent later: the attempt does not count.

    Attributes:
        until: timedelta, how long to wait, or datetime with a timezone, until when.
    """

    def __init__(self, until: timedelta | datetime) -> None:
        self.until = until
        super().__init__(f"The message is to be sent later ({until}).")


class LeaseLost(CloseEngineError):
    """This worker no longer holds the message and cannot report on it; nothing was changed.

    Attributes:
        message_id: the message.
        worker: the worker that tried to report.
        status: the MessageStatus that the message has now.
        leased_by: the worker that holds it now, or sent it; None if nobody does.
    """

    def __init__(self, message_id: int, worker: str | None, status: MessageStatus, leased_by: str | None) -> None:
        self.message_id = message_id
        self.worker = worker
        self.status = status
        self.leased_by = leased_by
        super().__init__(
            f"Message {message_id} is not leased by {worker!r} any more: it is {status}, held by "
            f"{repr(leased_by) if leased_by else 'nobody'}; make the lease longer or extend it in time."
        )


class MessageNotDead(CloseEngineError):
    """Only a message that is DEAD, or was sent and not delivered, can be put back into the outbox.

    Attributes:
        message_id: the message.
        status: the MessageStatus that it has.
    """

    def __init__(self, message_id: int, status: MessageStatus) -> None:
        self.message_id = message_id
        self.status = status
        super().__init__(
            f"Message {message_id} is {status}; only a DEAD one, or one that was not delivered, can be put back into "
            "the outbox."
        )


class ProviderIdTaken(CloseEngineError):
    """Another message already has this id of the provider.

    Attributes:
        provider_id: the provider's id.
        message_id: the message that was to get it.
        first: the id of the message that has it.
    """

    def __init__(self, provider_id: str, message_id: int, first: int) -> None:
        self.provider_id = provider_id
        self.message_id = message_id
        self.first = first
        super().__init__(
            f"The provider's id {provider_id!r} belongs to message {first} and cannot be given to message "
            f"{message_id}: pass on the id that the provider returned for this very message."
        )


class TextOfAnotherLead(CloseEngineError):
    """The key of a text was used for a text of another lead; nothing is recorded.

    Attributes:
        key: the key.
        lead_id: the lead whose text it was to be.
        first: id of the lead whose text has it.
    """

    def __init__(self, key: str, lead_id: str, first: str) -> None:
        self.key = key
        self.lead_id = lead_id
        self.first = first
        super().__init__(
            f"The key {key!r} belongs to a text of lead {first!r} and cannot be used for one of lead {lead_id!r}: pass "
            "the provider's own id of each text."
        )


class PaymentUnmatched(CloseEngineError):
    """A payment belongs to no open conversation, so nothing was recorded: keep it with `note_payment()`.

    Attributes:
        lead_id: the lead that paid.
        key: the payment's key.
        why: why it matches no conversation.
    """

    def __init__(self, lead_id: str, key: str, why: str) -> None:
        self.lead_id = lead_id
        self.key = key
        self.why = why
        super().__init__(f"Payment {key!r} of lead {lead_id!r} matches no open conversation: {why}.")


class TransactionFailed(CloseEngineError):
    """A statement in the transaction failed, the block caught its error and went on to its end.

    PostgreSQL then rolls the transaction back, even if it is told to commit, so nothing is written.
    """

    def __init__(self) -> None:
        super().__init__(
            "A statement in this transaction failed, so PostgreSQL undoes all of it: nothing is written. "
            "Put what may fail into an inner atomic(), and catch its error around that."
        )


class TransactionOfAnotherTask(CloseEngineError):
    """Another task or greenlet of this thread has opened the transaction, and this one would write into it.

    Both would be committed or rolled back together. Nothing was written.

    Attributes:
        opened_by: who opened the transaction, such as `task 'Task-1'`.
        task: who wanted to write.
    """

    def __init__(self, opened_by: str, task: str) -> None:
        self.opened_by = opened_by
        self.task = task
        super().__init__(
            f"Nothing was written: {task} would write in the transaction that {opened_by} opened, because they share "
            "this thread's connection. Run such a function in a thread of its own: await asyncio.to_thread(function). "
            "With gevent, call gevent.monkey.patch_all() before anything else is imported."
        )


class AfterCommitError(CloseEngineError):
    """Functions that ran after the commit failed. The change itself IS committed.

    Attributes:
        errors: list of the exceptions, in the order in which they were raised.
    """

    def __init__(self, errors: Sequence[Exception]) -> None:
        self.errors = list(errors)
        failures = "; ".join(f"{type(error).__name__}: {error}" for error in errors)
        super().__init__(f"The change is committed, but functions that ran after it failed: {failures}")


def sqlstate(error: BaseException) -> str | None:
    """PostgreSQL's code of a database error; None if it has none."""
    driver_error = getattr(error, "orig", None)
    # psycopg 2 calls it pgcode, psycopg 3 sqlstate.
    return getattr(driver_error, "pgcode", None) or getattr(driver_error, "sqlstate", None)


def unhidden(error: BaseException) -> BaseException:
    """The error that a failed rollback hides: SQLite ends a transaction by itself, for example if the disk is full."""
    while error.__context__ and re.search("no transaction is active|no such savepoint", str(error)):
        error = error.__context__
    return error


def first_line(error: BaseException) -> str:
    """What a driver says, without the statement and the hints that it adds."""
    return str(unhidden(error)).partition("\n")[0]


def one_line(error: BaseException) -> str:
    """All that a driver says, on one line, to be part of a sentence."""
    return " ".join(str(error).split()).rstrip(".?")


def _without_init(kind: type[CloseEngineError], args: tuple[Any, ...]) -> CloseEngineError:
    return kind.__new__(kind, *args)


def _can_be_pickled(value: Any) -> bool:
    # Other people's classes may raise anything here, and some fail only on the way back.
    try:
        pickle.loads(pickle.dumps(value))
    except Exception:
        return False
    return True


def _portable(value: Any) -> Any:
    """The value itself if it can be pickled, or else text in its place."""
    if _can_be_pickled(value):
        return value
    if isinstance(value, BaseException):
        return RuntimeError(f"{type(value).__name__}: {value}")
    if isinstance(value, list) and all(isinstance(item, BaseException) for item in value):
        return [_portable(item) for item in value]
    return repr(value)


def _conversation(conversation_id: str | None) -> str:
    return "The conversation" if conversation_id is None else f"Conversation {conversation_id!r}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
