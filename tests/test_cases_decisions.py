"""Inputs that once failed, one test per case, by its number: decisions, whoever makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionDecided,
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConditionNotMet,
    InvalidValue,
    PendingAction,
    Stage,
    submit,
)
from close_engine.database.binding import current
from close_engine.database.binding import moment as database_moment
from tests.foreign import REFUSED, ForeignWriter, moment
from tests.rows import copy_of
from tests.test_cases import migrated_again, without_triggers
from tests.workers import LINK, messages, values

ConversationIn = Callable[..., CloseEngineConversation]

HOUR = timedelta(hours=1)
MINUTE = timedelta(minutes=1)

#: What an approval must say for a payment link, and is true of any other draft.
BY_DANA = {"status": "APPROVED", "approved_by": "dana"}


def utc_now() -> datetime:
    """The time as the databases store it."""
    return datetime.now(timezone.utc).replace(tzinfo=None)


def drafted(foreign: ForeignWriter, type: str = "SEND_MESSAGE", id: str = "a1", **columns: Any) -> str:
    """Insert an action as the CRM does, with a conversation of its own, and return its id."""
    columns = {
        "id": id,
        "conversation_id": foreign.insert("PREVIEW_SENT"),
        "lead_id": "l",
        "type": type,
        "draft_message": "the draft",
        "metadata": json.dumps({"paymentUrl": LINK}),
        **columns,
    }
    marks = ", ".join(["%s"] * len(columns))
    foreign.run(f"INSERT INTO pending_actions ({', '.join(columns)}) VALUES ({marks})", *columns.values())
    return id


def write(foreign: ForeignWriter, action: str, **columns: Any) -> None:
    """Update an action as the CRM does."""
    assignments = ", ".join(f"{name} = %s" for name in columns)
    foreign.run(f"UPDATE pending_actions SET {assignments} WHERE id = %s", *columns.values(), action)


def read(foreign: ForeignWriter, action: str, *columns: str) -> tuple[Any, ...]:
    """Read columns of an action, times as naive datetimes."""
    (row,) = foreign.run(f"SELECT {', '.join(columns)} FROM pending_actions WHERE id = %s", action)
    return tuple(moment(value) if name.endswith("_at") else value for name, value in zip(columns, row, strict=True))


def in_the_outbox(foreign: ForeignWriter) -> list[tuple[datetime, datetime]]:
    """Read when each message was put into the outbox, and when it may leave."""
    rows = foreign.run("SELECT created_at, available_at FROM close_engine.outbox ORDER BY id")
    return [(moment(created_at), moment(available_at)) for created_at, available_at in rows]


TYPES = [str(type) for type in ActionType]


# -- D1: the writer's clock ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("given", [-2 * HOUR, timedelta(0), 2 * HOUR])
def test_d1_an_expired_action_stays_expired_whatever_the_writer_claims(
    foreign: ForeignWriter, type: str, given: timedelta
) -> None:
    """`approved_at` two hours in the past approved what had expired an hour ago."""
    action = drafted(foreign, type, expires_at=f"{utc_now() - HOUR:%Y-%m-%d %H:%M:%S.000}")
    with pytest.raises(REFUSED, match=r"close_engine: .*has expired"):
        write(foreign, action, **BY_DANA, approved_at=f"{utc_now() + given:%Y-%m-%d %H:%M:%S.000}")
    assert read(foreign, action, "status", "approved_at") == ("PENDING", None)
    assert in_the_outbox(foreign) == []


@pytest.mark.parametrize("status", ["APPROVED", "REJECTED", "EXPIRED"])
@pytest.mark.parametrize("given", [-2 * HOUR, 2 * HOUR, timedelta(days=400)])
def test_d1_a_decision_is_made_when_the_database_says(foreign: ForeignWriter, status: str, given: timedelta) -> None:
    """`approved_at` ahead delayed the message by as much; for any decision the guard's own moment takes its place."""
    action, before = drafted(foreign), utc_now()
    write(foreign, action, status=status, approved_at=f"{before + given:%Y-%m-%d %H:%M:%S.000}")
    (decided_at,) = read(foreign, action, "approved_at")
    assert before - MINUTE < decided_at < utc_now() + MINUTE
    assert in_the_outbox(foreign) == ([(decided_at, decided_at)] if status == "APPROVED" else [])


def test_d1_a_rejection_that_names_no_moment_gets_none(foreign: ForeignWriter) -> None:
    """`approved_at` says when an action was approved."""
    action = drafted(foreign)
    write(foreign, action, status="REJECTED", approved_by="dana")
    assert read(foreign, action, "approved_by", "approved_at") == ("dana", None)


@pytest.mark.parametrize("zone", ["America/New_York", "Asia/Tokyo"])
@pytest.mark.parametrize("given", ["now()", "now() - interval '2 hours'", "clock_timestamp()"])
def test_d1_now_in_another_timezone_is_no_way_around_it(foreign_postgres: ForeignWriter, zone: str, given: str) -> None:
    """Plain `now()` in a New York session is hours before it in UTC."""
    late = drafted(foreign_postgres, id="late", expires_at=f"{utc_now() - HOUR:%Y-%m-%d %H:%M:%S.000}")
    early = drafted(foreign_postgres, id="early", expires_at=f"{utc_now() + HOUR:%Y-%m-%d %H:%M:%S.000}")
    foreign_postgres.run(f"SET timezone = '{zone}'")
    approve = f"UPDATE pending_actions SET status = 'APPROVED', approved_at = {given} WHERE id = %s"
    with pytest.raises(REFUSED, match="has expired"):
        foreign_postgres.run(approve, late)
    foreign_postgres.run(approve, early)
    (approved_at,) = read(foreign_postgres, early, "approved_at")
    assert abs(approved_at - utc_now()) < MINUTE
    assert in_the_outbox(foreign_postgres) == [(approved_at, approved_at)]


def test_d1_an_expiry_with_an_offset_is_that_moment(foreign: ForeignWriter) -> None:
    """SQLite keeps a time as the text that a writer gives: compared as text, it would be over on another day."""
    abroad = timezone(timedelta(hours=-11))
    past, future = ((datetime.now(abroad) + by).isoformat(timespec="milliseconds") for by in (-HOUR, HOUR))
    if foreign.is_postgres:  # its column has no timezone
        past, future = (str(datetime.fromisoformat(at).astimezone(timezone.utc))[:23] for at in (past, future))
    late, early = drafted(foreign, id="late", expires_at=past), drafted(foreign, id="early", expires_at=future)
    with pytest.raises(REFUSED, match="has expired"):
        write(foreign, late, **BY_DANA)
    write(foreign, early, **BY_DANA)
    assert len(in_the_outbox(foreign)) == 1


@pytest.mark.parametrize("worker_is", [-2 * HOUR, 2 * HOUR])
@pytest.mark.parametrize("decide", ["approve", "reject"])
def test_d1_approve_and_reject_agree_with_the_guard(
    conversation_in: ConversationIn, foreign: ForeignWriter, worker_is: timedelta, decide: str
) -> None:
    """A worker whose clock is hours off decides by the database's as well, and its object equals the row."""
    close_engine.bind(current().database, clock=lambda: datetime.now(timezone.utc) + worker_is)
    conversation = conversation_in(Stage.PREVIEW_SENT, autonomy_level=AutonomyLevel.SEMI_AUTO)
    actions = [
        submit(conversation, ActionType.SEND_PAYMENT_LINK, "pay", metadata={"paymentUrl": LINK}, expires_after=after)
        for after in (HOUR, -HOUR)
    ]
    good, late = [action for action in actions if isinstance(action, PendingAction)]
    with pytest.raises(ActionDecided) as decided:
        getattr(late, decide)(by="dana")
    assert decided.value.status is ActionStatus.EXPIRED
    getattr(good, decide)(by="dana")
    assert values(good) == values(copy_of(good))
    if decide == "approve":
        (message,) = messages()
        assert good.approved_at is not None
        assert message.created_at == message.available_at == good.approved_at
        assert abs(good.approved_at - database_moment()) < MINUTE


# -- D3: an action begins PENDING ------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("status", ["APPROVED", "REJECTED", "EXPIRED"])
def test_d3_an_action_begins_pending(foreign: ForeignWriter, status: str, type: str) -> None:
    """One that was inserted as APPROVED was never sent, and nothing said so."""
    with pytest.raises(REFUSED, match=r"close_engine: .* cannot begin .*: insert it as PENDING, then decide it"):
        drafted(foreign, type, status=status, approved_by="dana", approved_at="2026-01-01 00:00:00.000")
    assert foreign.run("SELECT id FROM pending_actions") == []
    drafted(foreign, type, status="PENDING")
    write(foreign, "a1", status=status, approved_by="dana")
    assert len(in_the_outbox(foreign)) == (status == "APPROVED")


def test_d3_nor_does_one_that_a_model_inserts_begin_otherwise(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """A writer that uses our models, past submit()."""
    conversation = conversation_in(Stage.QUALIFYING)
    draft = {"lead_id": "l", "type": ActionType.SEND_MESSAGE, "draft_message": "Hi"}
    with pytest.raises(peewee.IntegrityError, match="insert it as PENDING"):
        PendingAction.create(conversation_id=conversation.id, status=ActionStatus.APPROVED, **draft)
    assert list(PendingAction.select()) == []


def test_d3_what_stood_there_before_hinders_nobody(foreign: ForeignWriter) -> None:
    """A row that was APPROVED when the guard came is adopted as it is: it can be changed, and no other one cares."""
    old = drafted(foreign, id="old")
    without_triggers(foreign, "UPDATE pending_actions SET status = 'APPROVED'")
    migrated_again(foreign)
    assert in_the_outbox(foreign) == []
    write(foreign, old, draft_message="redacted", metadata="{}")
    new = drafted(foreign, id="new")
    write(foreign, new, **BY_DANA)
    assert read(foreign, old, "status", "draft_message") == ("APPROVED", "redacted")
    assert len(in_the_outbox(foreign)) == 1
    with pytest.raises(REFUSED):
        write(foreign, old, status="REJECTED")


# -- D4: who decided stays -------------------------------------------------------------------------------------------

#: What the CRM may write with the second click.
CLICKS: dict[str, dict[str, Any]] = {
    "somebody else": {"approved_by": "eve"},
    "somebody else, later": {"approved_by": "eve", "approved_at": "2099-01-01 00:00:00.000"},
    "nobody": {"approved_by": None, "approved_at": None},
    "the same, later": {"approved_by": "dana", "approved_at": "2099-01-01 00:00:00.000"},
}


@pytest.mark.parametrize("click", CLICKS)
@pytest.mark.parametrize("status", ["APPROVED", "REJECTED", "EXPIRED"])
def test_d4_a_second_click_changes_nothing(foreign: ForeignWriter, status: str, click: str) -> None:
    """It is no error, as a screen sends it easily, but it rewrote who had approved."""
    action = drafted(foreign, "SEND_PAYMENT_LINK")
    write(foreign, action, status=status, approved_by="dana")
    decided = read(foreign, action, "status", "approved_by", "approved_at")
    sent = in_the_outbox(foreign)
    for again in ({"status": status}, {}):
        write(foreign, action, **again, **CLICKS[click])
        assert read(foreign, action, "status", "approved_by", "approved_at") == decided
    assert decided[:2] == (status, "dana")
    assert in_the_outbox(foreign) == sent


@pytest.mark.parametrize("other", ["APPROVED", "REJECTED", "EXPIRED", "PENDING"])
def test_d4_another_decision_is_refused(foreign: ForeignWriter, other: str) -> None:
    """It would change more than who decided, so it is an error, whoever writes it."""
    for status in ("APPROVED", "REJECTED", "EXPIRED"):
        action = drafted(foreign, id=status)
        write(foreign, action, status=status, approved_by="dana")
        if status != other:
            with pytest.raises(REFUSED, match="close_engine: "):
                write(foreign, action, status=other, approved_by="eve")
        assert read(foreign, action, "status", "approved_by") == (status, "dana")


def test_d4_a_statement_of_many_rows_decides_only_those_that_wait(foreign: ForeignWriter) -> None:
    """ "Approve all" names those that are decided already as well; and an approval without a name keeps none."""
    first, second, third = (drafted(foreign, id=id) for id in ("a1", "a2", "a3"))
    write(foreign, first, **BY_DANA)
    write(foreign, second, status="APPROVED")
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'eve', draft_message = 'edited'")
    assert [read(foreign, action, "approved_by") for action in (first, second, third)] == [("dana",), (None,), ("eve",)]
    assert len(in_the_outbox(foreign)) == 3


def test_d4_the_object_of_a_second_click_equals_the_row(conversation_in: ConversationIn) -> None:
    """Two people click on stale copies, and one saves its copy besides."""
    conversation = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    action = submit(conversation, ActionType.SEND_MESSAGE, "Hi")
    assert isinstance(action, PendingAction)
    stale = copy_of(action)
    sent = action.approve(by="dana")
    stale.approved_by = "eve"
    stale.save(only=[PendingAction.approved_by])
    assert stale.approve(by="eve") == sent
    assert values(stale) == values(copy_of(action)) == values(action)
    assert stale.approved_by == "dana"


# -- D5: what an approval needs --------------------------------------------------------------------------------------

NOT_SOMEBODY = [None, "", "  ", "\n\t"]
NOT_A_LINK: list[Any] = [
    None,
    {},
    {"paymentUrl": None},
    {"paymentUrl": " "},
    {"paymentUrl": 7},
    {"paymentUrl": ["x"]},
    [],
]


@pytest.mark.parametrize("approved_by", NOT_SOMEBODY)
def test_d5_a_payment_link_is_approved_by_somebody(foreign: ForeignWriter, approved_by: str | None) -> None:
    """It was sent, and the stage stayed PENDING_APPROVAL with nothing waiting."""
    action = drafted(foreign, "SEND_PAYMENT_LINK")
    with pytest.raises(
        REFUSED, match=r"close_engine: .*somebody must approve a payment link; write who in approved_by"
    ):
        write(foreign, action, status="APPROVED", approved_by=approved_by)
    assert read(foreign, action, "status") == ("PENDING",)
    write(foreign, action, **BY_DANA)
    assert len(in_the_outbox(foreign)) == 1


@pytest.mark.parametrize("metadata", NOT_A_LINK)
def test_d5_a_payment_link_has_its_url(foreign: ForeignWriter, metadata: Any) -> None:
    """For every writer: the CRM gets a sentence, and approve() an error of ours."""
    action = drafted(foreign, "SEND_PAYMENT_LINK", metadata=None if metadata is None else json.dumps(metadata))
    with pytest.raises(
        REFUSED, match=r"close_engine: .*a payment link needs its URL; write it in metadata[.]paymentUrl"
    ):
        write(foreign, action, **BY_DANA)
    with pytest.raises(ConditionNotMet, match="a payment link URL must be given"):
        PendingAction.get_by_id(action).approve(by="dana")
    assert read(foreign, action, "status") == ("PENDING",)
    assert in_the_outbox(foreign) == []
    write(foreign, action, **BY_DANA, metadata=json.dumps({"paymentUrl": LINK}))
    assert len(in_the_outbox(foreign)) == 1


@pytest.mark.parametrize("type", ["SEND_MESSAGE", "SEND_PREVIEW"])
def test_d5_other_drafts_need_neither(foreign: ForeignWriter, type: str) -> None:
    """A text is a text without anything else."""
    write(foreign, drafted(foreign, type, metadata=None), status="APPROVED")
    assert len(in_the_outbox(foreign)) == 1


def test_d5_a_link_that_lacks_something_can_be_rejected(foreign: ForeignWriter) -> None:
    """Only an approval sends it."""
    action = drafted(foreign, "SEND_PAYMENT_LINK", metadata='{"sendAfter": "tomorrow"}')
    write(foreign, action, status="REJECTED")
    assert read(foreign, action, "status") == ("REJECTED",)


SEND_AFTER = {
    "2999-01-31T08:00:00.000Z": "2999-01-31 08:00:00.000",  # as toISOString() writes it
    "2999-01-31T08:00:00Z": "2999-01-31 08:00:00.000",
    "2999-01-31T08:00:00.999999Z": "2999-01-31 08:00:00.999",
    "2999-01-31T23:59:59.9999999+05:30": "2999-01-31 18:29:59.999",
    "2999-01-31T20:00:00.5-08:00": "2999-02-01 04:00:00.500",
    "2999-01-31 08:00:00+14:00": "2999-01-30 18:00:00.000",
    "2999-01-31 08:00:00.123": "2999-01-31 08:00:00.123",  # as this library writes it
}


@pytest.mark.parametrize("given", SEND_AFTER)
@pytest.mark.parametrize("type", TYPES)
def test_d5_send_after_is_understood_as_other_languages_write_it(foreign: ForeignWriter, given: str, type: str) -> None:
    """What JavaScript wrote was ignored, and the text sent at once."""
    action = drafted(foreign, type, metadata=json.dumps({"paymentUrl": LINK, "sendAfter": given}))
    if foreign.is_postgres:
        foreign.run("SET timezone = 'America/New_York'; SET datestyle = 'SQL, DMY'")
    write(foreign, action, **BY_DANA)
    if foreign.is_postgres:
        foreign.run("RESET ALL")
    ((_, available_at),) = in_the_outbox(foreign)
    assert available_at == moment(SEND_AFTER[given])


def test_d5_a_moment_that_is_over_delays_nothing(foreign: ForeignWriter) -> None:
    """With its offset it is an hour ago, although its hour and minute are yet to come."""
    given = (datetime.now(timezone(timedelta(hours=12))) - HOUR).isoformat(timespec="milliseconds")
    write(foreign, drafted(foreign, metadata=json.dumps({"sendAfter": given})), **BY_DANA)
    ((created_at, available_at),) = in_the_outbox(foreign)
    assert available_at == created_at


@pytest.mark.parametrize(
    "given",
    [
        *("tomorrow", "", 7, 1767225600000, ["a"], {}, True, "now", "2460000.5", "2999-01-31", "2999-02-30T08:00:00Z"),
        *("2999-13-01T00:00:00Z", "2999-01-31T08:00Z", "2999-01-31T08:00:00+2", "+012999-01-31T08:00:00.000Z"),
        *("9999-01-31T08:00:00Z", "0000-01-31T08:00:00Z", "2999-01-31T08:00:00.Z", "2999-01-31T30:00:00Z", "infinity"),
    ],
)
def test_d5_a_send_after_that_nobody_understands_is_refused(foreign: ForeignWriter, given: Any) -> None:
    """It was ignored, and the text sent at once. The draft waits until it is mended."""
    action = drafted(foreign, metadata=json.dumps({"sendAfter": given}))
    with pytest.raises(REFUSED, match=r"close_engine: .*metadata.sendAfter.* a time like 2026-01-31T08:00:00.000Z"):
        write(foreign, action, **BY_DANA)
    with pytest.raises(InvalidValue, match=r"sendAfter cannot be .*write a time like 2026-01-31T08:00:00.000Z"):
        PendingAction.get_by_id(action).approve(by="dana")
    assert read(foreign, action, "status") == ("PENDING",)
    assert in_the_outbox(foreign) == []
    write(foreign, action, **BY_DANA, metadata=json.dumps({"sendAfter": None}))
    assert len(in_the_outbox(foreign)) == 1
