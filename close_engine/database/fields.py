"""Column types that Peewee lacks. They check a value when it is assigned, not when the database refuses it.

An object always holds what a reload would give: times are timezone-aware UTC with milliseconds (stored as
naive UTC, as Prisma stores them), words are enum members, JSON is plain lists, dicts and scalars.

>>> from datetime import datetime, timezone
>>> moment = UtcDateTimeField().clean(datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc))
>>> moment.microsecond
678000
>>> UtcDateTimeField().db_value(moment)
'2026-01-02 03:04:05.678'
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import peewee
from cuid2 import Cuid

from close_engine.errors import InvalidValue

__all__ = [
    "LONGEST_SPAN",
    "EnumField",
    "JsonField",
    "OneToOneField",
    "TextField",
    "UtcDateTimeField",
    "clean_json",
    "clean_text",
    "clean_words",
    "create_id",
    "milliseconds",
    "storable_text",
    "stored_time",
    "why_unreadable",
]

#: The longest span of time that an argument can be: more is a mistake, and Python knows no date so early or so late.
LONGEST_SPAN = timedelta(days=36500)

_cuid = Cuid()


def create_id() -> str:
    """Make a new id with cuid2, the maintained successor of cuid(), with which Prisma makes the CRM's ids."""
    return _cuid.generate()


V = TypeVar("V")

if TYPE_CHECKING:
    FieldOf = peewee.Field
else:

    class FieldOf(peewee.Field):
        """Peewee's stubs make Field generic, Peewee itself does not: this lets `Field[type]` run."""

        def __class_getitem__(cls, item):
            return cls


class CleaningAccessor(peewee.FieldAccessor):
    """Checks and normalises a value when it is assigned."""

    def __set__(self, instance: peewee.Model, value: Any) -> None:
        if value is not None and not isinstance(value, peewee.Node):
            value = self.field.clean(value)
        super().__set__(instance, value)


class CleanField(FieldOf[V]):
    """A field whose values pass through `clean` when assigned and when used in a query."""

    accessor_class = CleaningAccessor

    def clean(self, value: Any) -> Any:
        """Return the value as it will come back from the database.

        Raises:
            InvalidValue: the column cannot store it unchanged.
        """
        raise NotImplementedError

    def adapt(self, value: Any) -> Any:
        return self.clean(value)

    def python_value(self, value: Any) -> Any:
        return value  # it was checked when it was written

    @property
    def label(self) -> str:
        model = getattr(self, "model", None)
        return f"{model.__name__}.{self.name}" if model is not None else type(self).__name__


class TextField(CleanField[V], Generic[V]):
    """Text that PostgreSQL can store: without NUL characters and without halves of surrogate pairs."""

    field_type = "TEXT"

    def clean(self, value: Any) -> str:
        return clean_text(self.label, value)


class EnumField(CleanField[V], Generic[V]):
    """Text that is one of an enum's values.

    Args:
        words: the enum class. Any other value is refused, even if it comes from the database.
    """

    field_type = "TEXT"

    def __init__(self, words: type[Enum], **options: Any) -> None:
        self.words = words
        self._stored = {word.value: word for word in words}
        super().__init__(**options)

    def clean(self, value: Any) -> Any:
        try:
            return self.words(value)
        except ValueError:
            known = ", ".join(str(word.value) for word in self.words)
            raise InvalidValue(self.label, value, f"it must be one of {known}") from None

    def db_value(self, value: Any) -> Any:
        return value if value is None else str(self.clean(value).value)

    def is_still(self, word: Enum) -> peewee.Expression:
        """Compare in a form that no index can serve: `"stage" || '' = 'BUILDING'`, for a row that its key must find.

        If the planner believes that a word is rare, it prefers the index on the word to the key. Then it reads every
        row that got the word since the last ANALYZE.
        """
        unindexed = peewee.Expression(self, peewee.OP.CONCAT, peewee.SQL("''"))
        return peewee.Expression(unindexed, peewee.OP.EQ, self.db_value(word))

    def python_value(self, value: Any) -> Any:
        return value if value is None else self._stored.get(value) or self.clean(value)


#: How long a time with milliseconds is, as text.
_LENGTH = len("2026-01-01 00:00:00.000")


class UtcDateTimeField(CleanField[V], Generic[V]):
    """A moment: timezone-aware UTC with milliseconds in Python, `timestamp(3)` of naive UTC in the database."""

    field_type = "TIMESTAMP(3)"

    def clean(self, value: Any) -> datetime:
        if not isinstance(value, datetime):
            raise InvalidValue(self.label, value, "it must be a datetime with a timezone")
        if value.utcoffset() is None:
            raise InvalidValue(
                self.label, value, "it has no timezone; write datetime.now(timezone.utc) or .replace(tzinfo=…)"
            )
        try:
            moment = milliseconds(value)
        except OverflowError:
            moment = None
        if moment is None or moment.year >= 9999:  # the guards' bound
            raise InvalidValue(self.label, value, "in UTC it is before the year 1 or not before the year 9999")
        return moment

    def db_value(self, value: Any) -> Any:
        return value if value is None else stored_time(self.clean(value))

    def python_value(self, value: Any) -> Any:
        if isinstance(value, str):
            # PostgreSQL leaves out the last zeros of a fraction, which Python 3.10 needs.
            value = datetime.fromisoformat(value.ljust(_LENGTH, "0") if value[19:20] == "." else value)
        if value is not None and value.tzinfo is None:
            value = datetime.combine(value, value.time(), timezone.utc)  # five times as fast as replace()
        if value is None:
            return None
        moment = milliseconds(value)
        if moment.year >= 9999:  # psycopg 2 makes this year of infinity
            raise InvalidValue(self.label, str(value), "it is not before the year 9999")
        return moment


class JsonField(peewee.JSONField):
    """JSON that comes back as it went in. Refuses NaN, NUL characters, keys that are not text, and other types."""

    accessor_class = CleaningAccessor

    def __init__(self, **options: Any) -> None:
        # Peewee calls `dumps` for every value that it sends, even in a comparison or in `append`.
        super().__init__(dumps=lambda value: dump_json(self.clean(value)), loads=_load_json, **options)

    def clean(self, value: Any) -> Any:
        return clean_json(f"{self.model.__name__}.{self.name}", value)


def _load_json(text: str) -> Any:
    """Read what SQLite stores. Where that is a ValueError, Peewee would return the text instead."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        raise OverflowError(str(error)) from None


class _OneOrNone(peewee.BackrefAccessor):
    """Reads the one row, and keeps what a query has loaded along: `prefetch()` assigns a list, a join a row."""

    def __get__(self, instance: peewee.Model | None, instance_type: type | None = None) -> Any:
        name = self.field.backref
        if instance is not None and name in vars(instance):
            return vars(instance)[name]
        rows = super().__get__(instance, instance_type)  # type: ignore[no-untyped-call]
        return rows if instance is None else rows.first()

    def __set__(self, instance: peewee.Model, value: Any) -> None:
        row = next(iter(value), None) if isinstance(value, list) else value
        if row is not None and not self._refers_to(row, instance):
            label = f"{type(instance).__name__}.{self.field.backref}"
            raise InvalidValue(label, value, f"it must be this row's own {self.rel_model.__name__}, or None")
        vars(instance)[self.field.backref] = row

    def __delete__(self, instance: peewee.Model) -> None:
        """Forget what a query has loaded along."""
        vars(instance).pop(self.field.backref, None)

    def _refers_to(self, row: Any, instance: peewee.Model) -> bool:
        """Whether the row is the instance's own; a query may have left out the columns that say so."""
        if not (isinstance(row, peewee.Model) and self.model in row._meta.refs.values()):
            return False
        ids = row.__data__.get(self.field.name), instance.__data__.get(self.field.rel_field.name)
        return None in ids or ids[0] == ids[1]


class OneToOneField(peewee.ForeignKeyField):
    """A unique foreign key whose back-reference is one row or None.

    It is not generic: the type of the attribute comes from Peewee's stubs for ForeignKeyField.
    """

    backref_accessor_class = _OneOrNone

    def __init__(self, model: type[peewee.Model], **options: Any) -> None:
        super().__init__(model, unique=True, **options)


def milliseconds(moment: datetime) -> datetime:
    """Convert a moment to UTC, and cut off what a `timestamp(3)` cannot hold."""
    utc = moment if moment.tzinfo is timezone.utc else moment.astimezone(timezone.utc)
    surplus = utc.microsecond % 1000
    return utc.replace(microsecond=utc.microsecond - surplus) if surplus else utc


def stored_time(moment: datetime) -> str:
    """Format a moment in UTC as both databases store it: without a timezone, with milliseconds."""
    return moment.isoformat(" ", "milliseconds")[:23]


def clean_text(label: str, value: Any) -> str:
    """Return the text if PostgreSQL can store it.

    Raises:
        InvalidValue: it is not a str, or it contains a NUL character or half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InvalidValue(label, value, "it must be text")
    if "\x00" in value:
        raise InvalidValue(label, value, "PostgreSQL cannot hold a NUL character")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidValue(label, value, "it contains half of a surrogate pair, which is not a character") from None
    return value.value if isinstance(value, Enum) else value


def storable_text(text: str) -> str:
    """Return a text of somebody else's, such as an error, without what `clean_text` refuses."""
    return text.replace("\x00", "").encode(errors="replace").decode()


def clean_words(label: str, value: Any, why: str) -> str:
    """Return a text that says something.

    Args:
        label: as for `clean_text`.
        value: the text.
        why: the sentence if it is empty.

    Raises:
        InvalidValue: it is empty, or `clean_text` refuses it.
    """
    text = clean_text(label, value)
    if not text.strip():
        raise InvalidValue(label, value, why)
    return text


#: Every reader has this many levels left on its stack: Python's reader fails somewhere above 900, SQLite's at 1000.
MOST_LEVELS = 100

#: The characters of JSON that one column takes: a reader of a list holds all of its rows at once.
MOST_JSON = 1_000_000

#: The bits of a whole number of 4000 digits: Python refuses to read more than 4300 digits.
_MOST_BITS = 13287


def clean_json(label: str, value: Any) -> Any:
    """Return a copy of the value that is made of JSON's types, with tuples as lists.

    Raises:
        InvalidValue: JSON cannot hold it: other types, NaN or infinity, keys that are not text, or a cycle. Or it is
            nested deeper than 100 levels, or longer than a million characters.
    """
    copy = _clean_json(label, value, MOST_LEVELS)
    if isinstance(copy, (str, dict, list)) and len(dump_json(copy)) > MOST_JSON:
        raise InvalidValue(label, "…", f"JSON can have at most {MOST_JSON} characters")
    return copy


def why_unreadable(document: str) -> str | None:
    """Say why not every reader can read this JSON; None if every reader can."""
    try:
        level, levels = [json.loads(document)], 0
    except RecursionError:
        level, levels = [], MOST_LEVELS + 1
    except json.JSONDecodeError:
        return "is not JSON"
    except ValueError:
        return "has a number with too many digits"
    while level and levels <= MOST_LEVELS:
        inner = [item for item in level if isinstance(item, (dict, list))]
        level = [value for item in inner for value in (item.values() if isinstance(item, dict) else item)]
        levels += bool(inner)
    return f"is nested deeper than {MOST_LEVELS} levels" if levels > MOST_LEVELS else None


def _clean_json(label: str, value: Any, levels: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return clean_text(label, value)
    if isinstance(value, int):
        if value.bit_length() > _MOST_BITS:
            raise InvalidValue(label, "…", "a number in JSON can have at most 4000 digits")
        return int(value)
    if isinstance(value, float):
        if value - value != 0:
            raise InvalidValue(label, value, "JSON has no NaN and no infinity")
        # A jsonb has no negative zero, and writes 1e16 out with all its zeros, which is read back as an int.
        return float(value) + 0.0 if abs(value) < 1e16 else int(Decimal(repr(float(value))))
    if isinstance(value, (Mapping, list, tuple)) and not levels:
        raise InvalidValue(label, "…", f"it is nested deeper than {MOST_LEVELS} levels, or contains itself")
    if isinstance(value, Mapping):
        copy = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidValue(label, key, "a key in JSON must be text")
            copy[clean_text(label, key)] = _clean_json(label, item, levels - 1)
        return copy
    if isinstance(value, (list, tuple)):
        return [_clean_json(label, item, levels - 1) for item in value]
    raise InvalidValue(label, value, f"JSON cannot hold a {type(value).__name__}")


# json.dumps() would make a new encoder on every call.
_encoder = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def dump_json(value: Any) -> str:
    """Format a clean value as both databases take it."""
    return _encoder.encode(value)
