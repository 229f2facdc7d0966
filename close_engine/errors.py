"""Every refusal of this library: one base class, a sentence to act on, its data as attributes.

>>> try:
...     raise LeadHasNoPhone("lead_1")
... except CloseEngineError as error:
...     print(error, error.lead_id)
Lead 'lead_1' has no phone number, so no conversation by text message can be opened: add one first. lead_1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from close_engine.stages import ActionStatus, MessageStatus, Stage

__all__ = [
    "ActionDecided",
    "ActionNotFound",
    "AfterCommitError",
    "CannotBeSent",
    "CloseEngineError",
    "ConfigurationError",
    "ConversationClosed",
    "ConversationCompleted",
    "ConversationNotFound",
    "ConditionNotMet",
    "InvalidValue",
    "KeyReused",
    "LeadHasNoPhone",
    "LeadNotFound",
    "LeaseLost",
    "MessageNotDead",
    "MessageNotFound",
    "PartlyLoaded",
    "PaymentUnmatched",
    "ProviderIdTaken",
    "SchemaError",
    "StageAssignmentRefused",
    "StageConflict",
    "TransactionFailed",
    "TransitionNotAllowed",
    "TransitionRefused",
    "UnknownTrigger",
    "UserNotFound",
]


class CloseEngineError(Exception):
    """Base class of every error that this library raises."""


class ConfigurationError(CloseEngineError):
    """The library is not told, or told wrongly, which database and tables to use."""


class SchemaError(CloseEngineError):
    """The database's tables are not what the library needs.

    Attributes:
        problems: list of str, one sentence each.
    """

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        self.problems = list(problems)
        super().__init__("\n  - ".join([message, *self.problems]))


class InvalidValue(CloseEngineError, ValueError):
    """A value that a column cannot hold faithfully, refused before the database sees it.

    Attributes:
        field: name of the field.
        value: the refused value.
    """

    def __init__(self, field: str, value: Any, why: str) -> None:
        self.field = field
        self.value = value
        super().__init__(f"{field} cannot be {_shown(value)}: {why}.")


class UnknownTrigger(CloseEngineError, LookupError):
    """A trigger that the transition table does not have.

    Attributes:
        trigger: the name that was asked for.
        known: list of the names that exist.
    """

    def __init__(self, trigger: str, known: Sequence[str]) -> None:
        self.trigger = trigger
        self.known = list(known)
        super().__init__(f"There is no trigger {trigger!r}; the triggers are {', '.join(known)}.")


class TransitionRefused(CloseEngineError):
    """The machine refuses this trigger now; nothing was written.

    Attributes:
        conversation_id: the conversation, or None where the question was asked of the bare machine.
        trigger: the refused trigger.
        stage: the stage it was refused in.
    """

    def __init__(self, message: str, conversation_id: str | None, trigger: str, stage: Stage) -> None:
        self.conversation_id = conversation_id
        self.trigger = trigger
        self.stage = stage
        super().__init__(message)


class TransitionNotAllowed(TransitionRefused):
    """The transition table has no such trigger from this stage.

    Attributes:
        allowed: list of the triggers that the table has from this stage.
    """

    def __init__(self, conversation_id: str | None, trigger: str, stage: Stage, allowed: Sequence[str]) -> None:
        self.allowed = list(allowed)
        instead = f"allowed from here: {', '.join(allowed)}" if allowed else f"{stage} is final"
        super().__init__(
            f"{_conversation(conversation_id)} is {stage}, from where {trigger} is not allowed; {instead}.",
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


class StageConflict(CloseEngineError):
    """Somebody else changed the conversation since it was loaded; nothing was written.

    Attributes:
        conversation_id: the conversation.
        operation: the trigger, or the method that wrote: `save()`, `submit()`, `receive()`.
        expected: the Stage that the object in memory has.
        found: the Stage that the row has now.
    """

    def __init__(self, conversation_id: str, operation: str, expected: Stage, found: Stage) -> None:
        self.conversation_id = conversation_id
        self.operation = operation
        self.expected = expected
        self.found = found
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


class StageAssignmentRefused(CloseEngineError, AttributeError):
    """The stage was to be written past the machine.

    Attributes:
        stage: the Stage that was to be written.
    """

    def __init__(self, message: str, stage: Any) -> None:
        self.stage = stage
        super().__init__(message)


class ConversationNotFound(CloseEngineError, LookupError):
    """There is no such conversation (any more).

    Attributes:
        conversation_id: what was looked for.
    """

    def __init__(self, conversation_id: str) -> None:
        self.conversation_id = conversation_id
        super().__init__(
            f"There is no conversation {conversation_id!r}: it was deleted with its lead, or never opened with "
            "open_conversation()."
        )


class PartlyLoaded(CloseEngineError):
    """The object lacks columns on which a decision rests, as its query did not select them.

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


class ConversationCompleted(CloseEngineError):
    """The lead has paid already: its conversation is final and cannot be opened again.

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


class LeadNotFound(CloseEngineError, LookupError):
    """There is no such lead.

    Attributes:
        lead_id: what was looked for.
    """

    def __init__(self, lead_id: str) -> None:
        self.lead_id = lead_id
        super().__init__(f"There is no lead {lead_id!r}.")


class UserNotFound(CloseEngineError, LookupError):
    """There is no such user to be the rep.

    Attributes:
        user_id: what was looked for.
    """

    def __init__(self, user_id: str) -> None:
        self.user_id = user_id
        super().__init__(f"There is no user {user_id!r}.")


class LeadHasNoPhone(CloseEngineError):
    """A lead without a phone number cannot be texted.

    Attributes:
        lead_id: the lead.
    """

    def __init__(self, lead_id: str) -> None:
        self.lead_id = lead_id
        super().__init__(
            f"Lead {lead_id!r} has no phone number, so no conversation by text message can be opened: add one first."
        )


class ConversationClosed(CloseEngineError):
    """The conversation is COMPLETED or CLOSED_LOST, so no draft of it is sent any more.

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


class ActionDecided(CloseEngineError):
    """The pending action is decided already, the other way.

    Attributes:
        action_id: the action.
        trigger: what was to be done to it: `approve`, `reject` or `expire`.
        status: the ActionStatus that it has.
    """

    def __init__(self, action_id: str, trigger: str, status: ActionStatus) -> None:
        self.action_id = action_id
        self.trigger = trigger
        self.status = status
        again = "submit a new draft" if status is ActionStatus.EXPIRED else "that decision stands"
        super().__init__(f"Action {action_id!r} is {status}, so it is too late to {trigger} it: {again}.")


class ActionNotFound(CloseEngineError, LookupError):
    """There is no such pending action.

    Attributes:
        action_id: what was looked for.
    """

    def __init__(self, action_id: str) -> None:
        self.action_id = action_id
        super().__init__(f"There is no action {action_id!r}.")


class CannotBeSent(CloseEngineError):
    """For a sender to raise: this message will never be delivered, so it is not to be tried again."""


class LeaseLost(CloseEngineError):
    """The message is no longer this worker's to report on; nothing was changed.

    Attributes:
        message_id: the message.
        worker: who wanted to report.
        status: the MessageStatus that it has now.
        leased_by: who holds it now, or sent it; None where nobody does.
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


class MessageNotFound(CloseEngineError, LookupError):
    """There is no such message in the outbox.

    Attributes:
        message_id: what was looked for.
    """

    def __init__(self, message_id: int | str) -> None:
        self.message_id = message_id
        super().__init__(f"There is no message {message_id!r} in the outbox.")


class MessageNotDead(CloseEngineError):
    """Only a dead message can be put back into the outbox.

    Attributes:
        message_id: the message.
        status: the MessageStatus that it has.
    """

    def __init__(self, message_id: int, status: MessageStatus) -> None:
        self.message_id = message_id
        self.status = status
        super().__init__(f"Message {message_id} is {status}; only a DEAD one can be put back into the outbox.")


class ProviderIdTaken(CloseEngineError):
    """The provider's id stands for another message already.

    Attributes:
        provider_id: the id.
        message_id: the message that it was to be given to.
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


class PaymentUnmatched(CloseEngineError):
    """A payment came in that belongs to no conversation: look at it, and record or refund it by hand.

    Attributes:
        lead_id: who paid.
        key: the payment's key.
        why: what it cannot be matched with.
    """

    def __init__(self, lead_id: str, key: str, why: str) -> None:
        self.lead_id = lead_id
        self.key = key
        self.why = why
        super().__init__(f"Payment {key!r} of lead {lead_id!r} matches no open conversation: {why}.")


class TransactionFailed(CloseEngineError):
    """A statement in the transaction failed, its error was caught in the block, and the block went on to its end.

    PostgreSQL then undoes the transaction although it is told to commit it; so nothing of it is written.
    """

    def __init__(self) -> None:
        super().__init__(
            "A statement in this transaction failed, so PostgreSQL undoes all of it: nothing is written. "
            "Put what may fail into an atomic() of its own inside this one."
        )


class AfterCommitError(CloseEngineError):
    """Functions that were to run after the commit failed. The change itself IS committed.

    Attributes:
        errors: list of the exceptions, in the order in which they were raised.
    """

    def __init__(self, errors: Sequence[Exception]) -> None:
        self.errors = list(errors)
        told = "; ".join(f"{type(error).__name__}: {error}" for error in errors)
        super().__init__(f"The change is committed, but what was to run after it failed: {told}")


def first_line(error: BaseException) -> str:
    """What a driver says, without the statement and the hints that it adds."""
    return str(error).partition("\n")[0]


def one_line(error: BaseException) -> str:
    """All that a driver says, for the inside of a sentence."""
    return " ".join(str(error).split()).rstrip(".")


def _conversation(conversation_id: str | None) -> str:
    return "The conversation" if conversation_id is None else f"Conversation {conversation_id!r}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
