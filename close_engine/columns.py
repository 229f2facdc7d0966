"""The two columns that nobody assigns: the stage, which triggers change, and the version, which every write moves.

Whatever Peewee offers to write the stage with is refused by a sentence that names what to use instead; what plain SQL
does past Peewee, the database's guard judges.

>>> from close_engine.conversations import CloseEngineConversation
>>> CloseEngineConversation.insert(stage="BUILDING")
Traceback (most recent call last):
close_engine.StageAssignmentRefused: A conversation begins INITIATED and cannot be made BUILDING: \
use open_conversation(), and then its triggers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, cast

import peewee

from close_engine.database.fields import CleaningAccessor, EnumField, UtcDateTimeField
from close_engine.errors import InvalidValue, StageAssignmentRefused
from close_engine.machine import TRIGGERS, trigger_between, triggers_from
from close_engine.stages import Stage

__all__ = ["StageField", "VersionField", "WithoutStage", "is_row", "refuse_stage"]


def is_row(conversation: Any) -> bool:
    """Whether an object was loaded or saved; in a new one the stage is unsaved, which it never is again."""
    return "stage" not in conversation._dirty


class _StageAccessor(CleaningAccessor):
    """Lets a stage be read, loaded and begun, but not assigned."""

    def __set__(self, instance: Any, value: Any) -> None:
        stage = instance.__data__.get(self.name)
        if stage is None:
            super().__set__(instance, value)
        elif value != stage:
            raise refuse_stage(instance, value)


class StageField(EnumField[Stage]):
    accessor_class = _StageAccessor


class _VersionAccessor(CleaningAccessor):
    """Lets a version be read, loaded and begun: assigned, it would no longer tell whether somebody changed the row."""

    def __set__(self, instance: Any, value: Any) -> None:
        version = instance.__data__.get(self.name)
        if version is None or not is_row(instance):
            super().__set__(instance, value)
        elif value != version:
            raise InvalidValue(self.field.label, value, "every write moves it by itself; leave it out")


class VersionField(UtcDateTimeField[datetime]):
    accessor_class = _VersionAccessor


def refuse_stage(conversation: Any, wanted: Any) -> StageAssignmentRefused:
    """Why an object cannot be given this stage, and which trigger leads there."""
    dest = type(conversation).stage.clean(wanted)
    if not is_row(conversation):
        return _refuse_beginning(dest)
    stage = conversation.__data__["stage"]
    trigger = trigger_between(stage, dest)
    instead = f"call {trigger}()" if trigger else f"allowed from {stage}: {', '.join(triggers_from(stage)) or 'none'}"
    return StageAssignmentRefused(
        f"The stage of conversation {conversation.id!r} cannot be written as {dest}, "
        f"only triggers change it: {instead}.",
        dest,
    )


def _refuse_beginning(dest: Stage) -> StageAssignmentRefused:
    return StageAssignmentRefused(
        f"A conversation begins INITIATED and cannot be made {dest}: use open_conversation(), and then its triggers.",
        dest,
    )


def _refuse_query(what: str, stage: Any = None) -> StageAssignmentRefused:
    return StageAssignmentRefused(
        f"{what} cannot write the stage: load the conversation and fire a trigger, one of {', '.join(TRIGGERS)}.", stage
    )


def _is_stage(model: Any, column: Any) -> bool:
    return (model._meta.combined.get(column) if isinstance(column, str) else column) is model.stage


class _Insert(peewee.ModelInsert):
    """Peewee's INSERT, in which every row begins INITIATED and a row that is there keeps its stage."""

    def __init__(self, model: Any, insert: Any = None, columns: Any = None, **options: Any) -> None:
        if isinstance(insert, peewee.Node):
            if any(_is_stage(model, column) for column in columns):
                raise _refuse_query("insert_from()")
        else:
            one = isinstance(insert, Mapping)
            rows = [insert] if one else list(insert)  # read once, should they come from a generator
            insert = insert if one else rows
            for stage in _stages(model, rows, columns or model._meta.sorted_fields):
                if model.stage.clean(stage) is not Stage.INITIATED:
                    raise _refuse_beginning(model.stage.clean(stage))
        super().__init__(model, insert=insert, columns=columns, **options)

    def on_conflict(self, action: Any = None, update: Any = None, preserve: Any = None, **options: Any) -> Any:
        if isinstance(action, str) and action.upper() == "REPLACE":
            raise _refuse_query("replace()")
        if any(_is_stage(self.model, column) for column in [*(update or ()), *_listed(preserve)]):
            raise _refuse_query("on_conflict()")
        return super().on_conflict(action, update, preserve, **options)

    def on_conflict_replace(self, replace: bool = True) -> Any:
        return self.on_conflict("REPLACE" if replace else None)


def _stages(model: Any, rows: Iterable[Any], columns: Iterable[Any]) -> Iterable[Any]:
    """The stages that are given for rows to insert."""
    position = next((place for place, column in enumerate(columns) if _is_stage(model, column)), None)
    for row in rows:
        if isinstance(row, Mapping):
            yield from (value for column, value in row.items() if _is_stage(model, column))
        elif position is not None:
            yield row[position]


def _listed(columns: Any) -> Iterable[Any]:
    if columns is None:
        return ()
    return cast(Iterable[Any], columns) if isinstance(columns, (list, tuple)) else (columns,)


class WithoutStage:
    """What a model overrides of Peewee's queries so that none of them writes its stage."""

    @classmethod
    def update(cls, data: Any = None, /, **update: Any) -> peewee.ModelUpdate:
        """Peewee's `update`, which does not take the stage.

        Raises:
            StageAssignmentRefused: the stage is among the values.
        """
        for column, value in {**(data or {}), **update}.items():
            if _is_stage(cls, column):
                raise _refuse_query("update()", value)
        return cast(peewee.ModelUpdate, super().update(data, **update))  # type: ignore[misc]

    @classmethod
    def insert(cls, data: Any = None, /, **insert: Any) -> peewee.ModelInsert:
        """Peewee's `insert`, in which a conversation begins INITIATED.

        Raises:
            StageAssignmentRefused: another stage is among the values.
        """
        return _Insert(cls, {**(data or {}), **insert})

    @classmethod
    def insert_many(cls, rows: Any, fields: Any = None) -> peewee.ModelInsert:
        """Peewee's `insert_many`; see `insert`."""
        return _Insert(cls, rows, fields)

    @classmethod
    def insert_from(cls, query: Any, fields: Any) -> peewee.ModelInsert:
        """Peewee's `insert_from`, which does not take the stage.

        Raises:
            StageAssignmentRefused: the stage is among the fields.
        """
        return _Insert(cls, query, [getattr(cls, field) if isinstance(field, str) else field for field in fields])
