"""The tables: the CRM's three, of which only our columns are mapped, and the history of stage changes.

The tables with a life of their own are models too, each beside what it does: `CloseEngineConversation` in
`conversations`. All of them follow the binding:

>>> from close_engine.database.url import connect
>>> database = connect("sqlite:///:memory:", leads="Lead")
>>> Lead._meta.table_name, StageChange._meta.table_name
('Lead', 'close_engine_history')
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import peewee

from close_engine.database.binding import current, database_proxy
from close_engine.database.fields import EnumField, JsonField, TextField, UtcDateTimeField, create_id
from close_engine.stages import AutonomyLevel, EntryPoint, Stage

if TYPE_CHECKING:
    from close_engine.conversations import CloseEngineConversation

__all__ = ["BaseModel", "Client", "Lead", "StageChange", "User"]


class BaseModel(peewee.Model):
    """Bound to whatever `close_engine.bind` was given; `save()` writes only what was assigned."""

    id: Any = TextField[str](primary_key=True, default=create_id)

    if TYPE_CHECKING:
        _dirty: set[str]
        DoesNotExist: type[peewee.DoesNotExist]

    def __init__(self, **values: Any) -> None:
        # Peewee says so of a row's values. What was checked when it was written need not be when it is read.
        if values.pop("__no_default__", False) and self._meta.fields.keys() >= values.keys():
            self.__data__, self.__rel__, self._dirty = values, {}, set()
        else:
            super().__init__(**values)

    class Meta:
        database = database_proxy
        legacy_table_names = False
        only_save_dirty = True


class User(BaseModel):
    """A user of the CRM: the rep who looks after a conversation."""

    if TYPE_CHECKING:
        close_engine_conversations: peewee.ModelSelect[CloseEngineConversation]

    class Meta:
        table_name = "users"


class Lead(BaseModel):
    """A lead of the CRM. Only these columns are read or written; the CRM's others are never touched.

    Attributes:
        close_conversation: its one conversation, or None.
    """

    phone = TextField["str | None"](null=True)
    autonomy_level = EnumField[AutonomyLevel](
        AutonomyLevel, default=AutonomyLevel.FULL_AUTO, constraints=[peewee.SQL("DEFAULT 'FULL_AUTO'")]
    )
    close_entry_point = EnumField["EntryPoint | None"](EntryPoint, null=True)
    qualification_data = JsonField(null=True)

    if TYPE_CHECKING:
        close_conversation: CloseEngineConversation | None

    class Meta:
        table_name = "leads"


class Client(BaseModel):
    """A paying client of the CRM."""

    autonomy_level = EnumField[AutonomyLevel](
        AutonomyLevel, default=AutonomyLevel.FULL_AUTO, constraints=[peewee.SQL("DEFAULT 'FULL_AUTO'")]
    )

    class Meta:
        table_name = "clients"


class StageChange(BaseModel):
    """One row of the history: the database writes it, for every writer, and it outlives its conversation.

    Attributes:
        id: int, ascending in the order in which the changes of one conversation were made.
        conversation_id: id of the conversation.
        lead_id: id of its lead.
        trigger: a trigger of the table; `open` for the first row, `adopted` for what was there before the history.
        source: the Stage that was left; None for the first row.
        dest: the Stage that was entered.
        actor: who did it, as given; where somebody wrote past this library, `database:<role>`, on SQLite `database`.
        reason: why, as given.
        metadata: what else was given.
        key: the idempotency key it was made under.
        created_at: when, in UTC.
    """

    id: Any = peewee.BigAutoField()
    conversation_id = TextField[str]()
    lead_id = TextField[str]()
    trigger = TextField[str]()
    source = EnumField["Stage | None"](Stage, null=True)
    dest = EnumField[Stage](Stage)
    actor = TextField["str | None"](null=True)
    reason = TextField["str | None"](null=True)
    metadata = JsonField(null=True)
    key = TextField["str | None"](null=True)
    created_at = UtcDateTimeField[datetime]()

    class Meta:
        table_name = "history"
        own_table = "history"

    def __repr__(self) -> str:
        return f"<StageChange {self.id}: {self.source} → {self.dest} by {self.trigger}>"


StageChange.add_index(StageChange.conversation_id, StageChange.id)
StageChange.add_index(StageChange.conversation_id, StageChange.key, unique=True, where=StageChange.key.is_null(False))


def _follow_binding(database: peewee.Database) -> None:
    binding = current()
    Lead._meta.set_table_name(binding.tables.leads)
    User._meta.set_table_name(binding.tables.users)
    Client._meta.set_table_name(binding.tables.clients)
    for model in BaseModel.__subclasses__():
        # `own_table` names a table that Prisma must not see: the dialect says where it lives.
        own_table = getattr(model._meta, "own_table", None)
        if own_table:
            model._meta.schema, name = binding.dialect.own_table(own_table)
            model._meta.set_table_name(name)


database_proxy.attach_callback(_follow_binding)  # type: ignore[no-untyped-call]
