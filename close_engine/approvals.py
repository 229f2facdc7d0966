"""The approval queue: messages that a human sees first."""

from __future__ import annotations

from datetime import datetime

from peewee import SQL

from close_engine.backend import now
from close_engine.fields import EnumField, JsonField, TextField, UtcDateTimeField
from close_engine.models import BaseModel
from close_engine.stages import ActionStatus, ActionType

__all__ = ["PendingAction"]


class PendingAction(BaseModel):
    """A message that waits for a human: a row of `pending_actions`."""

    conversation_id = TextField[str](index=True)
    lead_id = TextField[str](index=True)
    type = EnumField[ActionType](ActionType)
    draft_message = TextField[str]()
    metadata = JsonField(null=True)
    status = EnumField[ActionStatus](
        ActionStatus, default=ActionStatus.PENDING, index=True, constraints=[SQL("DEFAULT 'PENDING'")]
    )
    approved_by = TextField["str | None"](null=True)
    approved_at = UtcDateTimeField["datetime | None"](null=True)
    expires_at = UtcDateTimeField["datetime | None"](null=True)
    created_at = UtcDateTimeField[datetime](default=now, constraints=[SQL("DEFAULT CURRENT_TIMESTAMP")])

    class Meta:
        table_name = "pending_actions"
