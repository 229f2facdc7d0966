"""The models of the CRM's three tables, with only the columns that the library uses, and of the history.

The model of every other table is in the file that works on it: `CloseEngineConversation` is in `conversations`. All
models follow the binding:

>>> from close_engine.database.url import connect
>>> database = connect("sqlite:///:memory:", leads="Lead")
>>> Lead._meta.table_name, StageChange._meta.table_name
('Lead', 'close_engine_history')
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any

import peewee

from close_engine.database.binding import current, database_proxy, require_bound
from close_engine.database.fields import EnumField, JsonField, TextField, UtcDateTimeField, create_id
from close_engine.database.reading import Rows
from close_engine.stages import AutonomyLevel, EntryPoint, Stage

if TYPE_CHECKING:
    from typing_extensions import Self

    from close_engine.conversations import CloseEngineConversation

__all__ = ["BaseModel", "Client", "Lead", "StageChange", "User"]


class _Metadata(peewee.Metadata):
    """Escapes a table's name in queries: Peewee does not, and psycopg takes a % for the start of a placeholder.

    It also keeps the models on the database that `bind` was given.
    """

    _table: peewee.Table | None
    escape: Callable[[str], str] = str

    @property
    def entity(self) -> peewee.Entity:
        return peewee.Entity(*filter(None, (self.schema, self.escape(self.table_name))))

    @property
    def table(self) -> peewee.Table:
        if self._table is None:
            columns = [field.column_name for field in self.sorted_fields]
            name = self.escape(self.table_name)
            self._table = peewee.Table(name, columns, schema=self.schema, _model=self.model, _database=self.database)
        return self._table

    @table.deleter
    def table(self) -> None:
        self._table = None

    def set_database(self, database: Any) -> None:
        require_bound(database)
        super().set_database(database_proxy)


class BaseModel(peewee.Model):
    """Base of every model, bound to what `close_engine.bind` was given. `save()` writes only assigned fields."""

    id: Any = TextField[str](primary_key=True, default=create_id)

    if TYPE_CHECKING:
        _dirty: set[str]
        DoesNotExist: type[peewee.DoesNotExist]

    def __init__(self, **values: Any) -> None:
        # Peewee passes `__no_default__` with the values of a loaded row. They were checked when they were written.
        if values.pop("__no_default__", False) and self._meta.fields.keys() >= values.keys():
            self.__data__, self.__rel__, self._dirty = values, {}, set()
        else:
            super().__init__(**values)

    @classmethod
    def select(cls, *fields: Any) -> Rows[Self]:
        """Build Peewee's SELECT query. It raises UnreadableRow for a row that Python cannot read."""
        return Rows(cls, fields or cls._meta.sorted_fields, is_default=not fields)

    class Meta:
        database = database_proxy
        legacy_table_names = False
        model_metadata_class = _Metadata
        only_save_dirty = True


class User(BaseModel):
    """A user of the CRM: the rep who looks after a conversation."""

    if TYPE_CHECKING:
        close_engine_conversations: peewee.ModelSelect[CloseEngineConversation]

    class Meta:
        table_name = "users"


class Lead(BaseModel):
    """A lead of the CRM. Only these columns are read or written; its other columns are never touched.

    Attributes:
        close_conversation: its one conversation, or None: what `prefetch()` or a join has loaded, or else read now.
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
    """A row of the history. The database writes it, for every writer, and it stays if the conversation is deleted.

    Attributes:
        id: int, ascending in the order in which the changes of one conversation were made.
        conversation_id: id of the conversation.
        lead_id: id of its lead.
        trigger: the trigger that was fired; `open` in the first row, `adopted` if the conversation is older than the
            history.
        source: the Stage that was left; None in the first row.
        dest: the Stage that was entered.
        actor: who did it, as given. If the write bypassed this library, `database:<role>`, with
            ` (login <role>)` if another role had logged in; on SQLite, `database`.
        reason: why, as given.
        metadata: the metadata that was given, as a dict.
        key: the idempotency key that was given.
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
    tables = binding.tables
    renamed: list[tuple[Any, str]] = [(Lead, tables.leads), (User, tables.users), (Client, tables.clients)]
    for crm, name in renamed:
        crm._meta.escape = binding.dialect.escaped
        crm._meta.set_table_name(name)
    for model in BaseModel.__subclasses__():
        # `own_table` names a table that Prisma must not see: the dialect knows its schema and its full name.
        own_table = getattr(model._meta, "own_table", None)
        if own_table:
            model._meta.schema, name = binding.dialect.own_table(own_table)
            model._meta.set_table_name(name)


database_proxy.attach_callback(_follow_binding)  # type: ignore[no-untyped-call]
