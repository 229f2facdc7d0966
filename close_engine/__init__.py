"""Close Engine: close conversations as a state machine whose rules hold in Python and in the database."""

from close_engine.backend import Tables, bind, connect
from close_engine.conversations import Answer, CloseEngineConversation, locked, open_conversation
from close_engine.errors import (
    AfterCommitError,
    CloseEngineError,
    ConfigurationError,
    ConversationCompleted,
    ConversationNotFound,
    GuardRefused,
    InvalidValue,
    KeyReused,
    LeadHasNoPhone,
    LeadNotFound,
    SchemaError,
    StageAssignmentRefused,
    StageConflict,
    TransitionNotAllowed,
    TransitionRefused,
    UnknownTrigger,
)
from close_engine.hooks import after_commit, on_enter, on_exit
from close_engine.machine import TRANSITIONS
from close_engine.models import Client, Lead, StageChange, User
from close_engine.schema import migrate, rollback, status
from close_engine.stages import ACTIVE_STAGES, ActionStatus, ActionType, AutonomyLevel, EntryPoint, Stage
from close_engine.transaction import atomic
from close_engine.verify import verify
from close_engine.version import __version__

__all__ = [
    "__version__",
    "ActionStatus",
    "ActionType",
    "ACTIVE_STAGES",
    "after_commit",
    "AfterCommitError",
    "Answer",
    "atomic",
    "AutonomyLevel",
    "bind",
    "Client",
    "CloseEngineConversation",
    "CloseEngineError",
    "ConfigurationError",
    "connect",
    "ConversationCompleted",
    "ConversationNotFound",
    "EntryPoint",
    "GuardRefused",
    "InvalidValue",
    "KeyReused",
    "Lead",
    "LeadHasNoPhone",
    "LeadNotFound",
    "locked",
    "migrate",
    "on_enter",
    "on_exit",
    "open_conversation",
    "rollback",
    "SchemaError",
    "Stage",
    "StageAssignmentRefused",
    "StageChange",
    "StageConflict",
    "status",
    "Tables",
    "TransitionNotAllowed",
    "TransitionRefused",
    "TRANSITIONS",
    "UnknownTrigger",
    "User",
    "verify",
]
