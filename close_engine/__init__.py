"""Close Engine: a state machine for close conversations, enforced in Python and in the database."""

from types import FunctionType

from close_engine import outbox, schema
from close_engine.approvals import (
    APPROVAL_FIRST,
    DEFAULT_EXPIRY,
    PendingAction,
    Policy,
    needs_approval,
    pending_actions,
    submit,
)
from close_engine.conversations import Answer, CloseEngineConversation, locked, open_conversation
from close_engine.database.binding import Tables, bind
from close_engine.database.provenance import ProvenanceArguments
from close_engine.database.transaction import atomic
from close_engine.database.url import connect
from close_engine.errors import (
    ActionDecided,
    ActionNotFound,
    AfterCommitError,
    CannotBeSent,
    CloseEngineError,
    ConditionNotMet,
    ConfigurationError,
    ConversationClosed,
    ConversationCompleted,
    ConversationNotFound,
    GuardMissing,
    InvalidValue,
    KeyReused,
    LeadHasNoPhone,
    LeadNotFound,
    LeaseLost,
    MessageNotDead,
    MessageNotFound,
    NotFound,
    PartlyLoaded,
    PaymentUnmatched,
    ProviderIdTaken,
    SchemaError,
    Snooze,
    StageAssignmentRefused,
    StageConflict,
    TransactionFailed,
    TransitionNotAllowed,
    TransitionRefused,
    UnknownTrigger,
    UnreadableRow,
    UserNotFound,
)
from close_engine.hooks import Hook, after_commit, on_enter, on_exit
from close_engine.inbox import InboxEntry, Received, receive, record_payment
from close_engine.machine import ACTION_TRANSITIONS, TRANSITIONS, Condition, Facts, Stamp, Transition
from close_engine.models import Client, Lead, StageChange, User
from close_engine.outbox import OutboxMessage
from close_engine.schema import migrate, verify
from close_engine.stages import (
    ACTIVE_STAGES,
    CLOSED_STAGES,
    ActionStatus,
    ActionType,
    AutonomyLevel,
    EntryPoint,
    MessageStatus,
    Stage,
)
from close_engine.sweeps import Swept, expire_actions, lose_stalled, release_leases, stall_silent, sweep
from close_engine.version import __version__
from close_engine.worker import FindingSender, Sender, Worker

__all__ = [
    "__version__",
    "ACTION_TRANSITIONS",
    "ActionDecided",
    "ActionNotFound",
    "ActionStatus",
    "ActionType",
    "ACTIVE_STAGES",
    "after_commit",
    "AfterCommitError",
    "Answer",
    "APPROVAL_FIRST",
    "atomic",
    "AutonomyLevel",
    "bind",
    "CannotBeSent",
    "Client",
    "CLOSED_STAGES",
    "CloseEngineConversation",
    "CloseEngineError",
    "Condition",
    "ConditionNotMet",
    "ConfigurationError",
    "connect",
    "ConversationClosed",
    "ConversationCompleted",
    "ConversationNotFound",
    "GuardMissing",
    "DEFAULT_EXPIRY",
    "EntryPoint",
    "expire_actions",
    "Facts",
    "FindingSender",
    "Hook",
    "InboxEntry",
    "InvalidValue",
    "KeyReused",
    "Lead",
    "LeadHasNoPhone",
    "LeadNotFound",
    "LeaseLost",
    "locked",
    "lose_stalled",
    "MessageNotDead",
    "MessageNotFound",
    "MessageStatus",
    "migrate",
    "needs_approval",
    "NotFound",
    "on_enter",
    "on_exit",
    "open_conversation",
    "outbox",
    "OutboxMessage",
    "PartlyLoaded",
    "PaymentUnmatched",
    "pending_actions",
    "PendingAction",
    "Policy",
    "ProvenanceArguments",
    "ProviderIdTaken",
    "receive",
    "Received",
    "record_payment",
    "release_leases",
    "schema",
    "SchemaError",
    "Snooze",
    "Sender",
    "Stage",
    "StageAssignmentRefused",
    "StageChange",
    "StageConflict",
    "stall_silent",
    "Stamp",
    "submit",
    "sweep",
    "Swept",
    "Tables",
    "TransactionFailed",
    "Transition",
    "TransitionNotAllowed",
    "TransitionRefused",
    "TRANSITIONS",
    "UnknownTrigger",
    "UnreadableRow",
    "User",
    "UserNotFound",
    "verify",
    "Worker",
]

# So that tracebacks and reprs show the name to import, `close_engine.StageConflict`, not the file that defines it.
for _name in __all__:
    _public = globals()[_name]
    if isinstance(_public, (type, FunctionType)):
        _public.__module__ = __name__
