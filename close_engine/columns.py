"""The two columns that nobody assigns: the stage, which only triggers change, and the version, which every write sets.

Every way that Peewee has to write the stage is refused, with a sentence that names what to use instead. Plain SQL
bypasses Peewee: the database's guard checks it.

>>> from close_engine.conversations import CloseEngineConversation
>>> CloseEngineConversation.insert(stage="BUILDING")
Traceback (most recent call last):
close_engine.StageAssignmentRefused: A conversation starts INITIATED and cannot be created as BUILDING: \
open it with open_conversation(), then fire its triggers.
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
    """Return whether an object was loaded or saved: only in a new one is the stage unsaved."""
    return "stage" not in conversation._dirty


class _StageAccessor(CleaningAccessor):
    """Lets the stage be read and loaded, but not assigned."""

    def __set__(self, instance: Any, value: Any) -> None:
        stage = instance.__data__.get(self.name)
        if stage is None:
            super().__set__(instance, value)
        elif value != stage:
            raise refuse_stage(instance, value)


class StageField(EnumField[Stage]):
    accessor_class = _StageAccessor


class _VersionAccessor(CleaningAccessor):
    """Lets the version be read, loaded and set in a new object. Assigning it would hide a change by somebody else."""

    def __set__(self, instance: Any, value: Any) -> None:
        version = instance.__data__.get(self.name)
        if version is None or not is_row(instance):
            super().__set__(instance, value)
        elif value != version:
            raise InvalidValue(self.field.label, value, "every write sets it; leave it out")


class VersionField(UtcDateTimeField[datetime]):
    accessor_class = _VersionAccessor


def refuse_stage(conversation: Any, wanted: Any) -> StageAssignmentRefused:
    """Return the error that says why the stage cannot be written, and which trigger to call instead."""
    dest = type(conversation).stage.clean(wanted)
    if not is_row(conversation):
        return _refuse_initial_stage(dest)
    stage = conversation.__data__["stage"]
    trigger = trigger_between(stage, dest)
    allowed = ", ".join(triggers_from(stage))
    instead = f"call {trigger}()" if trigger else f"allowed from {stage}: {allowed}" if allowed else f"{stage} is final"
    return StageAssignmentRefused(
        f"The stage of conversation {conversation.id!r} cannot be set to {dest}, "
        f"because only triggers change it; {instead}.",
        dest,
    )


def _refuse_initial_stage(dest: Stage) -> StageAssignmentRefused:
    return StageAssignmentRefused(
        f"A conversation starts INITIATED and cannot be created as {dest}: "
        "open it with open_conversation(), then fire its triggers.",
        dest,
    )


def _refuse_query(what: str, stage: Any = None) -> StageAssignmentRefused:
    return StageAssignmentRefused(
        f"{what} cannot write the stage: load the conversation and fire a trigger, one of {', '.join(TRIGGERS)}.", stage
    )


def _is_stage(model: Any, column: Any) -> bool:
    return (model._meta.combined.get(column) if isinstance(column, str) else column) is model.stage


class _Insert(peewee.ModelInsert):
    """Peewee's INSERT, except that every new row starts INITIATED and an existing row keeps its stage."""

    def __init__(self, model: Any, insert: Any = None, columns: Any = None, **options: Any) -> None:
        if isinstance(insert, peewee.Node):
            if any(_is_stage(model, column) for column in columns):
                raise _refuse_query("insert_from()")
        else:
            one = isinstance(insert, Mapping)
            rows = [insert] if one else list(insert)  # read them once: they may come from a generator
            insert = insert if one else rows
            for stage in _stages(model, rows, columns or model._meta.sorted_fields):
                if model.stage.clean(stage) is not Stage.INITIATED:
                    raise _refuse_initial_stage(model.stage.clean(stage))
        super().__init__(model, insert=insert, columns=columns, **options)

    def on_conflict(self, action: Any = None, update: Any = None, preserve: Any = None, **options: Any) -> Any:
        if isinstance(action, str) and action.upper() == "REPLACE":
            raise _refuse_query("replace()")
        if any(_is_stage(self.model, column) for column in [*(update or ()), *_as_list(preserve)]):
            raise _refuse_query("on_conflict()")
        return super().on_conflict(action, update, preserve, **options)

    def on_conflict_replace(self, replace: bool = True) -> Any:
        return self.on_conflict("REPLACE" if replace else None)


def _stages(model: Any, rows: Iterable[Any], columns: Iterable[Any]) -> Iterable[Any]:
    """Yield the stages that are given for the rows to insert."""
    position = next((place for place, column in enumerate(columns) if _is_stage(model, column)), None)
    for row in rows:
        if isinstance(row, Mapping):
            yield from (value for column, value in row.items() if _is_stage(model, column))
        elif position is not None:
            yield row[position]


def _as_list(columns: Any) -> Iterable[Any]:
    if columns is None:
        return ()
    return cast(Iterable[Any], columns) if isinstance(columns, (list, tuple)) else (columns,)


class WithoutStage:
    """Overrides Peewee's queries so that none of them writes the stage of the model."""

    @classmethod
    def update(cls, data: Any = None, /, **update: Any) -> peewee.ModelUpdate:
        """Build Peewee's UPDATE query, for any column except the stage.

        Raises:
            StageAssignmentRefused: the values include the stage.
        """
        for column, value in {**(data or {}), **update}.items():
            if _is_stage(cls, column):
                raise _refuse_query("update()", value)
        return cast(peewee.ModelUpdate, super().update(data, **update))  # type: ignore[misc]

    @classmethod
    def insert(cls, data: Any = None, /, **insert: Any) -> peewee.ModelInsert:
        """Build Peewee's INSERT query; a new conversation starts INITIATED.

        Raises:
            StageAssignmentRefused: the values include another stage.
        """
        return _Insert(cls, {**(data or {}), **insert})

    @classmethod
    def insert_many(cls, rows: Any, fields: Any = None) -> peewee.ModelInsert:
        """Build Peewee's INSERT query for many rows; see `insert`."""
        return _Insert(cls, rows, fields)

    @classmethod
    def insert_from(cls, query: Any, fields: Any) -> peewee.ModelInsert:
        """Build Peewee's INSERT … SELECT query, for any column except the stage.

        Raises:
            StageAssignmentRefused: the fields include the stage.
        """
        return _Insert(cls, query, [getattr(cls, field) if isinstance(field, str) else field for field in fields])
