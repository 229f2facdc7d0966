"""Column types: a value is checked when it is assigned, and is then what a reload would give."""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import CloseEngineConversation, EntryPoint, InvalidValue, Lead, Stage, UnreadableRow
from close_engine.approvals import PendingAction
from close_engine.database.fields import UtcDateTimeField, clean_json, create_id
from close_engine.testing import MovableClock

NAIVE = datetime(2026, 1, 2, 3, 4, 5)
MOMENT = datetime(2026, 1, 2, 3, 4, 5, 678000, tzinfo=timezone.utc)


def values(row: peewee.Model) -> dict[str, Any]:
    """Return everything that the object says about its row."""
    return {
        field.name: getattr(row, field.object_id_name if isinstance(field, peewee.ForeignKeyField) else field.name)
        for field in row._meta.sorted_fields
    }


class NoOffset(tzinfo):
    """A timezone that does not know its offset."""

    def utcoffset(self, moment: datetime | None) -> None:
        return None


class Circle(dict[str, Any]):
    """A mapping that contains itself."""

    def __init__(self) -> None:
        super().__init__(again=self)


#: Field, a value it cannot hold, and the sentence that says why.
REFUSED = [
    ("phone", "+1\x00555", "Lead.phone cannot be '+1\\x00555': PostgreSQL cannot hold a NUL character."),
    (
        "phone",
        "\ud83d",
        "Lead.phone cannot be '\\ud83d': it contains half of a surrogate pair, which is not a character.",
    ),
    ("phone", 15550100, "Lead.phone cannot be 15550100: it must be text."),
    ("phone", b"+1555", "Lead.phone cannot be b'+1555': it must be text."),
    ("id", "a\x00", "Lead.id cannot be 'a\\x00': PostgreSQL cannot hold a NUL character."),
    (
        "autonomy_level",
        "HALF_AUTO",
        "Lead.autonomy_level cannot be 'HALF_AUTO': it must be one of FULL_AUTO, SEMI_AUTO, MANUAL.",
    ),
    (
        "close_entry_point",
        5,
        "Lead.close_entry_point cannot be 5: it must be one of INSTANTLY_REPLY, SMS_REPLY, REP_CLOSE, PREVIEW_CTA.",
    ),
    (
        "qualification_data",
        {"budget": float("nan")},
        "Lead.qualification_data cannot be nan: JSON has no NaN and no infinity.",
    ),
    (
        "qualification_data",
        [float("-inf")],
        "Lead.qualification_data cannot be -inf: JSON has no NaN and no infinity.",
    ),
    (
        "qualification_data",
        {"a": ["\x00"]},
        "Lead.qualification_data cannot be '\\x00': PostgreSQL cannot hold a NUL character.",
    ),
    (
        "qualification_data",
        {"\udc00": 1},
        "Lead.qualification_data cannot be '\\udc00': it contains half of a surrogate pair, which is not a character.",
    ),
    ("qualification_data", {1: "a"}, "Lead.qualification_data cannot be 1: a key in JSON must be text."),
    ("qualification_data", {"when": {1, 2}}, "Lead.qualification_data cannot be {1, 2}: JSON cannot hold a set."),
    ("qualification_data", b"raw", "Lead.qualification_data cannot be b'raw': JSON cannot hold a bytes."),
    (
        "qualification_data",
        10**4000,
        "Lead.qualification_data cannot be '…': a number in JSON can have at most 4000 digits.",
    ),
    (
        "qualification_data",
        Circle(),
        "Lead.qualification_data cannot be '…': it is nested deeper than 100 levels, or contains itself.",
    ),
]

#: Every way in which a value can reach a query.
WAYS: dict[str, Callable[[str, Any], Any]] = {
    "constructor": lambda field, value: Lead(**{field: value}),
    "assignment": lambda field, value: setattr(Lead(), field, value),
    "create": lambda field, value: Lead.create(**{field: value}),
    "insert": lambda field, value: Lead.insert({field: value}).execute(),
    "insert-many": lambda field, value: Lead.insert_many([{field: value}]).execute(),
    "update": lambda field, value: Lead.update(**{field: value}).execute(),
    "where": lambda field, value: Lead.select().where(getattr(Lead, field) == value).execute(),
    "where-in": lambda field, value: Lead.select().where(getattr(Lead, field).in_([value])).execute(),
}


@pytest.fixture
def statements(database: peewee.Database) -> list[str]:
    """The statements sent to the database from now on."""
    sent: list[str] = []
    database.query_hooks.append(lambda event: sent.append(event.sql) if event.exception is None else None)
    return sent


@pytest.mark.parametrize("way", WAYS)
def test_a_value_that_a_column_cannot_hold_is_refused_before_the_database_sees_it(
    statements: list[str], way: str
) -> None:
    for field, value, sentence in REFUSED:
        with pytest.raises(InvalidValue) as caught:
            WAYS[way](field, value)

        assert str(caught.value) == sentence
        assert caught.value.field == f"Lead.{field}"
        assert isinstance(caught.value, ValueError)
    assert statements == []


#: Queries with such a value somewhere in an expression.
EXPRESSIONS: list[Callable[[], peewee.Query]] = [
    lambda: Lead.select().where(Lead.phone.contains("\x00")),
    lambda: Lead.select().where(Lead.phone.startswith("\ud800")),
    lambda: Lead.select().where(Lead.qualification_data["name"] == "\x00"),
    lambda: Lead.select().where(Lead.qualification_data["name"] == float("nan")),
    lambda: Lead.update(qualification_data=Lead.qualification_data.append(["\x00"])),
    lambda: CloseEngineConversation.select().where(CloseEngineConversation.stage == "WON"),
    lambda: CloseEngineConversation.select().where(CloseEngineConversation.stage.in_(["BUILDING", "WON"])),
    lambda: CloseEngineConversation.select().where(CloseEngineConversation.lead == "\x00"),
    lambda: CloseEngineConversation.select().where(CloseEngineConversation.created_at > NAIVE),
    lambda: CloseEngineConversation.select().where(CloseEngineConversation.created_at.between(MOMENT, NAIVE)),
    lambda: CloseEngineConversation.update(stalled_at=NAIVE),
    lambda: CloseEngineConversation.insert(lead="\x00"),
]


def test_a_value_that_a_column_cannot_hold_is_refused_in_any_expression(statements: list[str]) -> None:
    for expression in EXPRESSIONS:
        with pytest.raises(InvalidValue):
            expression().execute()
    assert statements == []


@pytest.mark.parametrize(
    ("moment", "why"),
    [
        (NAIVE, "it has no timezone; write datetime.now(timezone.utc) or .replace(tzinfo=…)"),
        (
            NAIVE.replace(tzinfo=NoOffset()),  # type: ignore[abstract]
            "it has no timezone; write datetime.now(timezone.utc) or .replace(tzinfo=…)",
        ),
        ("2026-01-02T03:04:05Z", "it must be a datetime with a timezone"),
        (MOMENT.date(), "it must be a datetime with a timezone"),
        (MOMENT.timestamp(), "it must be a datetime with a timezone"),
        (
            datetime.min.replace(tzinfo=timezone(timedelta(hours=1))),
            "in UTC it is before the year 1 or not before the year 9999",
        ),
        (
            datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))),
            "in UTC it is before the year 1 or not before the year 9999",
        ),
    ],
)
def test_a_moment_is_a_datetime_with_a_timezone(moment: Any, why: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        PendingAction.expires_at.clean(moment)

    assert str(caught.value).startswith("PendingAction.expires_at cannot be ")
    assert str(caught.value).endswith(f": {why}.")


@pytest.fixture(params=["UTC", "America/New_York", "Asia/Kolkata", "Pacific/Kiritimati"])
def local_timezone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The process, and the sessions of PostgreSQL, in another timezone."""
    monkeypatch.setenv("TZ", request.param)
    time.tzset()
    yield request.param
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_a_moment_in_memory_is_what_a_reload_gives_wherever_one_is(
    local_timezone: str, database_url: str, kind: str, close_engine_clock: MovableClock
) -> None:
    session = f"&options=-c%20TimeZone%3D{local_timezone}" if kind == "postgresql" else ""
    database = close_engine.connect(database_url + session, clock=close_engine_clock)
    close_engine_clock.now = datetime.fromtimestamp(1767323045.678999).astimezone()
    moments = [
        datetime(2026, 3, 29, 2, 30, 0, 999999, tzinfo=timezone(timedelta(hours=-5))),
        datetime(1901, 1, 1, 0, 0, 0, 1, tzinfo=timezone.utc),
        datetime(2026, 7, 1, 12, tzinfo=timezone(timedelta(hours=5, minutes=45))),
        datetime(9998, 12, 31, 23, 59, 59, 999999, tzinfo=timezone.utc),
        datetime(1, 1, 1, tzinfo=timezone.utc),
    ]

    for moment in moments:
        action = PendingAction.create(
            conversation_id="c", lead_id="l", type="SEND_MESSAGE", draft_message="Hi", expires_at=moment
        )
        reloaded = PendingAction.get(PendingAction.expires_at == moment, PendingAction.id == action.id)

        assert values(action) == values(reloaded)
        assert reloaded.expires_at is not None
        assert reloaded.expires_at.tzinfo is timezone.utc
        assert timedelta(0) <= moment - reloaded.expires_at < timedelta(milliseconds=1)
        assert reloaded.created_at.isoformat() == "2026-01-02T03:04:05.678000+00:00"
        assert database.execute_sql("SELECT CAST(created_at AS text) FROM pending_actions").fetchone() == (
            "2026-01-02 03:04:05.678",
        )
    conversation = close_engine.open_conversation(Lead.create(phone="+1555"), EntryPoint.SMS_REPLY)
    conversation.start_qualifying()
    conversation.stall()
    assert values(CloseEngineConversation.get_by_id(conversation.id)) == values(conversation)
    assert conversation.stalled_at == conversation.history()[-1].created_at <= conversation.updated_at
    database.close()


def test_a_moment_that_another_writer_stored_with_its_offset_is_that_moment() -> None:
    field = UtcDateTimeField[datetime]()

    assert field.python_value("2026-01-02T05:04:05.678900+02:00") == MOMENT
    assert field.python_value("2026-01-02 03:04:05.678") == MOMENT
    assert field.python_value(MOMENT.astimezone(timezone(timedelta(hours=9)))) == MOMENT
    assert field.python_value(None) is None


def test_words_are_enum_members_in_memory_and_when_loaded(database: peewee.Database) -> None:
    class Theirs(str, enum.Enum):
        REPLY = "SMS_REPLY"

    lead = Lead.create(autonomy_level="SEMI_AUTO", close_entry_point=Theirs.REPLY)
    reloaded = Lead.get(Lead.close_entry_point == "SMS_REPLY", Lead.autonomy_level.in_(["SEMI_AUTO"]))

    assert values(lead) == values(reloaded)
    assert reloaded.close_entry_point is lead.close_entry_point is EntryPoint.SMS_REPLY
    assert Lead.create().close_entry_point is None


def test_an_unknown_word_in_the_database_is_refused_when_it_is_loaded(database: peewee.Database) -> None:
    Lead.create(id="lead_1")
    database.execute_sql("UPDATE leads SET autonomy_level = 'HALF_AUTO'")

    with pytest.raises(UnreadableRow, match=r"Lead\.autonomy_level cannot be 'HALF_AUTO': it must be one of FULL_AUTO"):
        Lead.get_by_id("lead_1")


class Count(int):
    """A number of another class."""


#: A JSON value, and what the database keeps of it.
JSON = [
    ({}, {}),
    ([], []),
    ("", ""),
    (0, 0),
    (False, False),
    ({"": None}, {"": None}),
    ({"a": [None, True, {"b": []}], "c": {"d": {}}}, {"a": [None, True, {"b": []}], "c": {"d": {}}}),
    ({"É": "Zoë 🚀 \u2028 \\ \" '"}, {"É": "Zoë 🚀 \u2028 \\ \" '"}),
    (("budget", (1, 2)), ["budget", [1, 2]]),
    ({Stage.BUILDING: Stage.STALLED}, {"BUILDING": "STALLED"}),
    (Count(3), 3),
    (10**30, 10**30),
    (10**60, 10**60),
    (9007199254740993, 9007199254740993),
    (0.1, 0.1),
    (1.0, 1.0),
    (-0.0, 0.0),
    (5e-324, 5e-324),
    (1e15, 1e15),
    # A jsonb has no exponents: these come back from it as whole numbers.
    (1e16, 10**16),
    (1e23, 10**23),
    (-1.5e300, -15 * 10**299),
    ("%s {history} ? :name", "%s {history} ? :name"),
]


def test_json_in_memory_is_what_a_reload_gives_on_every_database(database: peewee.Database) -> None:
    for value, kept in JSON:
        lead = Lead.create(qualification_data=value)
        reloaded = Lead.get_by_id(lead.id).qualification_data

        for found in (lead.qualification_data, reloaded, clean_json("it", kept)):
            assert repr(found) == repr(kept)
        assert lead in Lead.select().where(Lead.qualification_data == value)


def test_a_value_is_copied_as_it_is_assigned() -> None:
    answers = {"asked": ["budget"]}
    lead = Lead(qualification_data=answers)
    answers["asked"].append("deadline")

    assert lead.qualification_data == {"asked": ["budget"]}


def test_sql_null_and_json_null_are_both_none_and_only_sql_null_is_written(database: peewee.Database) -> None:
    Lead.create(id="lead_1", qualification_data=None)
    Lead.create(id="lead_2", qualification_data={"budget": None})
    Lead.create(id="lead_3", qualification_data={})
    database.execute_sql("UPDATE leads SET qualification_data = 'null' WHERE id = 'lead_3'")

    assert [lead.qualification_data for lead in Lead.select().order_by(Lead.id)] == [None, {"budget": None}, None]
    assert [lead.id for lead in Lead.select().where(Lead.qualification_data.is_null())] == ["lead_1"]
    Lead.update(qualification_data=None).where(Lead.id == "lead_3").execute()
    assert Lead.select().where(Lead.qualification_data.is_null()).count() == 2


def test_json_can_be_asked_by_path_and_written_in_bulk(database: peewee.Database) -> None:
    leads = [Lead.create(qualification_data={"name": f"Zoë {number}", "n": number}) for number in range(3)]

    assert Lead.get(Lead.qualification_data["name"] == "Zoë 1") == leads[1]
    for lead in leads:
        lead.qualification_data = {"n": lead.qualification_data["n"] + 1}
    Lead.bulk_update(leads, [Lead.qualification_data])

    assert [lead.qualification_data for lead in Lead.select().order_by(Lead.qualification_data)] == [
        {"n": 1},
        {"n": 2},
        {"n": 3},
    ]


def nested(levels: int) -> Any:
    """Make lists and objects in turn, this many levels deep."""
    value: Any = "the innermost"
    for level in range(levels):
        value = {"in": value} if level % 2 else [value]
    return value


def test_json_is_kept_down_to_a_hundred_levels_and_up_to_a_million_characters(database: peewee.Database) -> None:
    for value in (nested(100), "é" * 999_998, ["x"] * 240_000):
        assert Lead.get_by_id(Lead.create(qualification_data=value).id).qualification_data == value


def test_deeper_or_larger_json_is_refused_by_a_sentence() -> None:
    with pytest.raises(InvalidValue, match="it is nested deeper than 100 levels, or contains itself"):
        Lead(qualification_data=nested(101))
    with pytest.raises(InvalidValue, match="JSON can have at most 1000000 characters"):
        Lead(qualification_data=["x" * 999_999])


def test_an_error_shows_no_more_of_a_long_value_than_its_beginning() -> None:
    with pytest.raises(InvalidValue) as caught:
        Lead(phone="5" * 10_000 + "\x00")

    assert len(str(caught.value)) < 200


def test_a_field_of_no_model_names_its_class() -> None:
    with pytest.raises(InvalidValue, match="UtcDateTimeField cannot be 1: it must be a datetime with a timezone"):
        UtcDateTimeField[datetime]().clean(1)


def test_ids_are_text_that_never_repeats() -> None:
    ids = {create_id() for _ in range(1000)}

    assert len(ids) == 1000
    assert all(len(each) >= 24 and each.isalnum() and each[0].isalpha() for each in ids)
