"""Rows that Python cannot read, from before the guards: each is named, and holds up nobody but itself."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple

import peewee
import pytest
from playhouse.postgres_ext import Psycopg3Database
from rich.console import Console

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    InboxEntry,
    Lead,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    UnreadableRow,
    outbox,
    pending_actions,
    receive,
    record_payment,
    submit,
)
from close_engine.board import pipeline
from close_engine.cli.board import render
from close_engine.database.binding import current
from close_engine.testing import MovableClock, new_lead
from tests.command_line import refused, run
from tests.foreign import REFUSED, ForeignWriter, spoil

ConversationIn = Callable[..., CloseEngineConversation]

# Python 3.13 reads up to 10,000 levels, and PostgreSQL takes a little more.
DEEP = "[" * 11000 + "]" * 11000
LONG = '{"n": 1' + "0" * 5000 + "}"

CONVERSATIONS, ACTIONS, OUTBOX = "close_engine_conversations", "pending_actions", "close_engine.outbox"

#: What stands in a column: where, what, and what an UPDATE puts there instead.
BAD = [
    (CONVERSATIONS, "collected_data", DEEP, "{}"),
    (CONVERSATIONS, "questions_asked", LONG, None),
    (CONVERSATIONS, "entry_point", "WEB_FORM", "SMS_REPLY"),
    (CONVERSATIONS, "autonomy_level", "HALF_AUTO", "MANUAL"),
    (CONVERSATIONS, "stage", "WON", "QUALIFYING"),
    (CONVERSATIONS, "created_at", "infinity", "2026-01-01 00:00:00.000"),
    (CONVERSATIONS, "updated_at", "infinity", "2026-01-01 00:00:00.000"),
    (CONVERSATIONS, "updated_at", "10000-01-01 00:00:00", "2026-01-01 00:00:00.000"),
    (CONVERSATIONS, "updated_at", "9999-12-31 00:00:00.000", "2026-01-01 00:00:00.000"),
    (CONVERSATIONS, "stalled_at", "10000-01-01 00:00:00", "2026-01-01 00:00:00.000"),
    (CONVERSATIONS, "completed_at", "0001-01-01 00:00:00 BC", None),
    (ACTIONS, "metadata", DEEP, "{}"),
    (ACTIONS, "metadata", LONG, None),
    (ACTIONS, "type", "SEND_SMS", "SEND_MESSAGE"),
    (ACTIONS, "status", "WAITING", "PENDING"),
    (ACTIONS, "expires_at", "infinity", None),
    (ACTIONS, "expires_at", "9999-12-31 00:00:00.000", "2027-01-01 00:00:00.000"),
    (ACTIONS, "created_at", "0001-01-01 00:00:00 BC", "2026-01-01 00:00:00.000"),
    (ACTIONS, "approved_at", "infinity", None),
]


DIGITS = '["' + "1" * 5000 + '"]'

PSYCOPG_3 = "postgresql with psycopg 3"


@pytest.fixture(params=["sqlite-file", "sqlite-memory", "postgresql", PSYCOPG_3])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database(kind: str, database_url: str, close_engine_clock: MovableClock) -> Iterator[peewee.Database]:
    """As everywhere else, and with the other driver as well: it fails at another moment."""
    if kind == PSYCOPG_3:
        database = close_engine.bind(Psycopg3Database(database_url), clock=close_engine_clock)
    else:
        database = close_engine.connect(database_url, clock=close_engine_clock)
    if kind == "sqlite-memory":
        close_engine.migrate(standalone=True)
    close_engine_clock.rule()
    yield database
    database.close()


@pytest.fixture
def clock(foreign: ForeignWriter, close_engine_clock: MovableClock) -> MovableClock:
    """The clock, which rules again: a foreign writer gave the database its own back."""
    close_engine_clock.rule()
    return close_engine_clock


@pytest.fixture
def statements(case: Case, database: peewee.Database) -> list[str]:
    """The statements sent to the database from now on."""
    sent: list[str] = []
    database.query_hooks.append(lambda event: sent.append(event.sql))
    return sent


class Case(NamedTuple):
    """Two conversations, each with an action that waits; the bad one's is the older."""

    good: CloseEngineConversation
    bad: CloseEngineConversation
    good_action: PendingAction
    bad_action: PendingAction

    def row(self, table: str) -> str:
        """The id of the bad row in a table."""
        return str((self.bad if table == CONVERSATIONS else self.bad_action).id)


@pytest.fixture
def case(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> Case:
    bad = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    bad_action = submit(bad, ActionType.SEND_MESSAGE, "of the bad one", expires_after=timedelta(days=300))
    close_engine_clock.move(timedelta(seconds=1))
    good = conversation_in(Stage.QUALIFYING, autonomy_level=AutonomyLevel.MANUAL)
    good_action = submit(good, ActionType.SEND_MESSAGE, "of the good one", expires_after=timedelta(days=300))
    assert isinstance(bad_action, PendingAction)
    assert isinstance(good_action, PendingAction)
    return Case(good, bad, good_action, bad_action)


@contextmanager
def spoiled(writer: ForeignWriter, table: str, column: str, value: str, row_id: Any) -> Iterator[None]:
    """Let a bad value stand in a row for the length of the block."""
    as_text = "::text" * writer.is_postgres
    ((before,),) = writer.run(f"SELECT {column}{as_text} FROM {table} WHERE id = %s", row_id)
    spoil(writer, table, column, value, row_id)
    yield
    spoil(writer, table, column, before, row_id)


def test_a_row_that_cannot_be_read_is_passed_over_in_lists_and_named(case: Case, foreign: ForeignWriter) -> None:
    for table, column, value, _ in BAD:
        with spoiled(foreign, table, column, value, case.row(table)):
            listed: Any = CloseEngineConversation.in_stages(*Stage) if table == CONVERSATIONS else pending_actions()
            assert [row.id for row in listed] == [case.good.id if table == CONVERSATIONS else case.good_action.id]

            named = [(row.table, row.row_id, row.column) for row in listed.passed_over]
            # What is in no stage, and what is not PENDING, was not asked for.
            assert named == ([] if column in ("stage", "status") else [(table, case.row(table), column)])


def test_with_a_limit_others_take_its_place(case: Case, foreign: ForeignWriter) -> None:
    """Otherwise, whoever asks for the next action would be told that there is none."""
    for table, column, value, _ in BAD:
        with spoiled(foreign, table, column, value, case.row(table)):
            if table == ACTIONS:
                assert pending_actions().first() == case.good_action
                assert pending_actions().get() == case.good_action
                assert pending_actions()[0] == case.good_action
                assert list(pending_actions().limit(1)) == [case.good_action]
                continue
            model = CloseEngineConversation
            for order in (model.lead, model.lead.desc()):
                assert model.in_stages(*Stage).order_by(order).first() == case.good
                assert list(model.in_stages(*Stage).order_by(order).limit(1)) == [case.good]


#: How somebody may read a row of a model.
READERS: list[Callable[[Any, str], object]] = [
    lambda model, row_id: model.get_by_id(row_id),
    lambda model, row_id: model.get(model.id == row_id),
    lambda model, row_id: list(model.select()),
    lambda model, row_id: list(model.select().iterator()),
    lambda model, row_id: list(model.select().readable().iterator()),
    lambda model, row_id: model.select().where(model.id == row_id).dicts().get(),
]


def test_whoever_asks_for_that_row_is_told_which_column_it_is(case: Case, foreign: ForeignWriter) -> None:
    for table, column, value, _ in BAD:
        model: Any = CloseEngineConversation if table == CONVERSATIONS else PendingAction
        with spoiled(foreign, table, column, value, case.row(table)):
            for read in READERS:
                with pytest.raises(UnreadableRow, match=f"^Row '{case.row(table)}' of {table} cannot be read") as told:
                    read(model, case.row(table))
                assert (told.value.table, told.value.row_id, told.value.column) == (table, case.row(table), column)
                assert told.value.why
            assert model.get_by_id(case.good.id if table == CONVERSATIONS else case.good_action.id)


def test_verify_names_it_and_an_update_mends_it(case: Case, foreign: ForeignWriter) -> None:
    for table, column, value, mended in BAD:
        spoil(foreign, table, column, value, case.row(table))

        # A stage that nobody recorded is wrong as well.
        found = [each for each in close_engine.verify() if f"{column} " in each and "newest row" not in each]
        assert [each.replace("public.", "").partition(f"), {column} ")[0] for each in found] == [
            f"In 1 row of {table} ('{case.row(table)}'"
        ]

        foreign.run(f"UPDATE {table} SET {column} = %s WHERE id = %s", mended, case.row(table))

        assert close_engine.verify() == []
        assert CloseEngineConversation.get_by_id(case.bad.id).stage is Stage.QUALIFYING
        assert {action.id for action in pending_actions()} == {case.good_action.id, case.bad_action.id}


@pytest.mark.parametrize(
    "stage", [Stage.BUILDING, Stage.PAYMENT_SENT, Stage.COMPLETED, Stage.STALLED, Stage.CLOSED_LOST]
)
def test_what_is_no_stage_can_become_any_stage(stage: Stage, case: Case, foreign: ForeignWriter) -> None:
    """The guard knows no change that leads away from it, and would keep it for ever."""
    spoil(foreign, CONVERSATIONS, "stage", "WON", case.bad.id)
    with pytest.raises(REFUSED, match="close_engine: "):
        foreign.update(case.bad.id, stage="LOST")

    foreign.update(case.bad.id, stage=stage.value)

    assert close_engine.verify() == []
    mended = CloseEngineConversation.get_by_id(case.bad.id)
    newest = mended.history()[-1]
    assert (mended.stage, newest.trigger, newest.source, newest.dest) == (stage, "adopted", None, stage)
    assert newest.actor == foreign.actor
    with pytest.raises(REFUSED, match="close_engine: "):
        foreign.update(case.bad.id, stage="WON")


@pytest.mark.parametrize("status", ["APPROVED", "REJECTED", "EXPIRED"])
def test_what_is_no_status_can_only_become_pending(status: str, case: Case, foreign: ForeignWriter) -> None:
    """A decision has consequences, and those follow from what waited."""
    spoil(foreign, ACTIONS, "status", "WAITING", case.bad_action.id)
    with pytest.raises(REFUSED, match="close_engine: "):
        foreign.run("UPDATE pending_actions SET status = %s WHERE id = %s", status, case.bad_action.id)

    foreign.run("UPDATE pending_actions SET status = 'PENDING' WHERE id = %s", case.bad_action.id)

    assert PendingAction.get_by_id(case.bad_action.id).approve(by="dana").body == "of the bad one"


def test_verify_names_json_and_times_in_every_table(case: Case, foreign: ForeignWriter) -> None:
    """Also in those that only this library writes, and in the CRM's own."""
    message = outbox.enqueue(case.bad, "build_site", payload={"a": 1})
    entry = case.bad.history()[0]
    case.bad.record(data={"size": 3})
    receive(case.bad.lead_id, key="SM1", text="hi")
    places: list[tuple[str, str, str, Any]] = [
        ("leads", "qualification_data", DEEP, case.bad.lead_id),
        ("leads", "autonomy_level", "HALF_AUTO", case.bad.lead_id),
        ("leads", "close_entry_point", "WEB_FORM", case.bad.lead_id),
        (OUTBOX, "payload", LONG, message.id),
        (OUTBOX, "created_at", "infinity", message.id),
        (OUTBOX, "status", "LOST", message.id),
        ("close_engine.history", "metadata", "[" * 101 + "]" * 101, entry.id),
        ("close_engine.history", "created_at", "infinity", entry.id),
        ("close_engine.history", "dest", "WON", entry.id),
        ("close_engine.inbox", "received_at", "infinity", InboxEntry.get().id),
    ]
    for table, column, value, row_id in places:
        spoil(foreign, table, column, value, row_id)

    sentences = [sentence.replace("close_engine_", "close_engine.") for sentence in close_engine.verify()]
    for table, column, _, row_id in places:
        assert any(f"{table} ({row_id!r}), {column} " in sentence for sentence in sentences), (table, column)


def test_verify_finds_nothing_wrong_with_what_the_guards_let_in(case: Case, foreign: ForeignWriter) -> None:
    for document in ("[" * 100 + "1" + "]" * 100, '{"n": 1' + "0" * 3999 + "}", '["' + "[" * 500 + '"]', DIGITS):
        foreign.update(case.good.id, collected_data=document)
        assert close_engine.verify() == []


@pytest.mark.parametrize("batch", [1, 1000])
@pytest.mark.parametrize("hooked", [True, False], ids=["with a hook", "without"])
def test_the_others_are_swept(
    hooked: bool, batch: int, case: Case, conversation_in: ConversationIn, foreign: ForeignWriter, clock: MovableClock
) -> None:
    """One unknown stage failed the whole batch. With a hook, the sweep reads each row."""
    for table, column, value, _ in BAD:
        if table == CONVERSATIONS:
            spoil(foreign, table, column, value, conversation_in(Stage.QUALIFYING).id)
        else:
            action = submit(case.good, ActionType.SEND_MESSAGE, "another", expires_after=timedelta(days=300))
            spoil(foreign, table, column, value, action.id)
    clock.move(timedelta(days=301))
    hook = close_engine.on_enter(Stage.STALLED)(lambda conversation, change: None) if hooked else None
    try:
        stalled = close_engine.stall_silent(batch=batch)
        expired = close_engine.expire_actions(batch=batch)
        swept = close_engine.sweep()
        assert swept == close_engine.Swept(failed=swept.failed)
        assert all("cannot be read" in sentence for sentence in swept.failed.values())
        assert bool(swept.failed) is hooked
    finally:
        if hook is not None:
            hook.remove()

    assert {case.good.id, case.bad.id} <= set(stalled)
    assert {case.good_action.id, case.bad_action.id} <= set(expired)
    assert CloseEngineConversation.get_by_id(case.good.id).stage is Stage.STALLED


def test_the_board_counts_what_it_leaves_out(case: Case, foreign: ForeignWriter) -> None:
    for table, column, value, _ in BAD:
        with spoiled(foreign, table, column, value, case.row(table)):
            board = pipeline()

        left_out = column in ("stage", "type") or (table == ACTIONS and column.endswith("_at"))
        assert board.unreadable == left_out
        assert sum(line.count for line in board.stages) == 2 - (column == "stage")
        waiting = 2 - (left_out and table == ACTIONS) - (column == "status")
        assert [(line.type, line.waiting) for line in board.approvals] == [(ActionType.SEND_MESSAGE, waiting)]
        shown = io.StringIO()
        Console(file=shown, width=120).print(render(board))
        sentence = "Left out, because they cannot be read: 1. close-engine verify lists them."
        assert (sentence in shown.getvalue()) == left_out


def test_the_board_passes_over_times_in_our_own_tables(case: Case, foreign: ForeignWriter, clock: MovableClock) -> None:
    message = outbox.enqueue(case.bad, "build_site")
    outbox.enqueue(case.good, "build_site")
    case.bad.stall()
    spoil(foreign, OUTBOX, "available_at", "0001-01-01 00:00:00 BC", message.id)
    foreign.run("UPDATE close_engine.history SET created_at = 'infinity' WHERE conversation_id = %s", case.good.id)
    foreign.run("UPDATE close_engine.deadlines SET at = 'infinity' WHERE subject_id = %s", case.bad.id)
    clock.move(timedelta(minutes=1))

    board = pipeline()

    assert board.outbox.lag == timedelta(minutes=1)
    assert {line.stage: line.longest for line in board.stages if line.count} == {
        Stage.QUALIFYING: None,
        Stage.STALLED: None,
    }


def test_a_text_for_a_conversation_that_cannot_be_read_is_not_lost(case: Case, foreign: ForeignWriter) -> None:
    bad = [row for row in BAD if row[0] == CONVERSATIONS]
    for number, (table, column, value, _) in enumerate(bad):
        with spoiled(foreign, table, column, value, case.bad.id):
            for _ in range(2):
                with pytest.raises(UnreadableRow, match=case.bad.id):
                    receive(case.bad.lead_id, key=f"bad {number:02}", text="Yes!")
            with pytest.raises(UnreadableRow, match=case.bad.id):
                record_payment(case.bad.lead_id, key="evt_1")
            assert receive(case.good.lead_id, key=f"good {number}", text="No.").answer
        assert receive(case.bad.lead_id, key=f"bad {number:02}", text="Yes!").duplicate

    entries = InboxEntry.select().where(InboxEntry.conversation_id == case.bad.id).order_by(InboxEntry.key)
    assert [(entry.kind, entry.key, entry.body) for entry in entries] == [
        ("text", f"bad {number:02}", "Yes!") for number in range(len(bad))
    ]


def test_a_lead_who_wrote_is_not_silent_even_if_the_conversation_cannot_be_read(
    case: Case, foreign: ForeignWriter, clock: MovableClock
) -> None:
    spoil(foreign, CONVERSATIONS, "collected_data", LONG, case.bad.id)
    clock.move(timedelta(hours=71))
    with pytest.raises(UnreadableRow):
        receive(case.bad.lead_id, key="SM1", text="Yes!")
    clock.move(timedelta(hours=2))
    assert close_engine.stall_silent() == [case.good.id]


def test_an_action_that_cannot_be_read_is_nothing_to_its_conversation(case: Case, foreign: ForeignWriter) -> None:
    for table, column, value, _ in BAD:
        if table == ACTIONS:
            action = submit(CloseEngineConversation.get_by_id(case.bad.id), ActionType.SEND_MESSAGE, "one of many")
            spoil(foreign, table, column, value, action.id)

    assert receive(case.bad.lead_id, key="SM1", text="Yes!").answer
    case.bad.reload()
    submit(case.bad, ActionType.SEND_MESSAGE, "another")
    case.good_action.approve(by="dana")
    case.bad.close_lost(reason="too dear")

    assert list(pending_actions()) == []


def test_a_lead_that_cannot_be_read_is_nothing_to_its_conversation(case: Case, foreign: ForeignWriter) -> None:
    for column, value in (("qualification_data", LONG), ("autonomy_level", "HALF_AUTO")):
        spoil(foreign, "leads", column, value, case.bad.lead_id)
    stranger = new_lead()
    spoil(foreign, "leads", "qualification_data", LONG, stranger.id)

    assert receive(case.bad.lead_id, key="SM1", text="Yes!").answer
    assert receive(stranger.id, key="SM2", text="Hello").conversation is None
    with pytest.raises(UnreadableRow, match=f"Row '{case.bad.lead_id}' of leads cannot be read, because of its"):
        print(CloseEngineConversation.get_by_id(case.bad.id).lead.phone)


@pytest.mark.parametrize(("column", "value"), [("payload", DEEP), ("payload", LONG), ("created_at", "infinity")])
def test_a_message_that_cannot_be_read_is_passed_over_in_lists(
    column: str, value: str, case: Case, foreign: ForeignWriter
) -> None:
    bad, good = (outbox.enqueue(each, "build_site", payload={}) for each in (case.bad, case.good))
    spoil(foreign, OUTBOX, column, value, bad.id)
    assert outbox.claimable() == [good]

    with pytest.raises(UnreadableRow, match=rf"^Row {bad.id} of .*outbox cannot be read, because of its {column}"):
        OutboxMessage.get_by_id(bad.id)

    foreign.run("UPDATE close_engine.outbox SET status = 'DEAD', last_error = 'it broke'")
    assert [(line.error, line.count) for line in outbox.dead_lines()] == [("it broke", 2)]
    assert outbox.requeue_all() == [good.id]


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
def test_the_command_line_passes_over_it_and_says_so(
    case: Case, foreign: ForeignWriter, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    spoil(foreign, ACTIONS, "type", "SEND_SMS", case.bad_action.id)
    spoil(foreign, CONVERSATIONS, "collected_data", LONG, case.bad.id)

    listed = run("actions").out
    assert "of the good one" in listed
    assert "of the bad one" not in listed
    assert f"Row {case.bad_action.id!r} of pending_actions cannot be read, because of its type" in " ".join(
        listed.split()
    )
    assert "cannot be read, because of its collected_data" in refused("show", case.bad.id)
    assert "cannot be read, because of its collected_data" in refused("fire", case.bad.id, "stall")
    assert "cannot be read, because of its type" in refused("reject", case.bad_action.id, "--by", "dana")


def test_where_all_can_be_read_nothing_is_asked_twice(case: Case, statements: list[str]) -> None:
    assert len(list(pending_actions())) == len(list(CloseEngineConversation.in_stages(*Stage))) == 2
    assert pending_actions().first() == case.bad_action
    assert len(statements) == 3


def test_a_bad_row_is_found_among_many(case: Case, conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    """However many rows there are: with some statements, not with one for each row."""
    for number in range(1200):
        foreign.insert("QUALIFYING", f"conversation {number:04}")
    bad = ["conversation 0007", "conversation 0600", "conversation 1199"]
    for conversation_id in bad:
        spoil(foreign, CONVERSATIONS, "entry_point", "WEB_FORM", conversation_id)

    listed = CloseEngineConversation.in_stages(Stage.QUALIFYING)
    assert len(list(listed)) == 1199
    assert sorted(row.row_id for row in listed.passed_over) == bad
    joined = listed.select(CloseEngineConversation.id, Lead).join(Lead).order_by(CloseEngineConversation.id).limit(3)
    assert len(list(joined)) == 3


def test_a_text_that_left_is_recorded_even_if_its_conversation_cannot_be_read(
    conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """Otherwise, it would be sent again and again."""
    conversation = conversation_in(Stage.BUILDING)
    message = submit(conversation, ActionType.SEND_PREVIEW, "Look!", metadata={"previewUrl": "https://example.com"})
    (claimed,) = outbox.claim()
    spoil(foreign, CONVERSATIONS, "collected_data", LONG, conversation.id)

    with pytest.raises(UnreadableRow):
        claimed.sent("SM1")

    sent = OutboxMessage.get_by_id(message.id)
    assert (sent.status, sent.provider_id) == (MessageStatus.SENT, "SM1")
    assert f"Row {conversation.id!r} of close_engine_conversations cannot be read" in str(sent.refusal)


@pytest.mark.parametrize("column", ["created_at", "sent_at"])
@pytest.mark.parametrize("value", ["infinity", "-infinity", "9999-12-31 00:00:00.000"])
def test_a_time_in_the_outbox_that_cannot_be_read_keeps_no_message(
    value: str, column: str, case: Case, foreign: ForeignWriter
) -> None:
    """A claim reads all of its messages at once, when it has already leased them."""
    bad, good = (outbox.enqueue(each, "build_site") for each in (case.bad, case.good))
    spoil(foreign, OUTBOX, column, value, bad.id)

    claimed = sorted(outbox.claim(limit=10), key=lambda message: int(message.id))

    assert claimed == [bad, good]
    assert getattr(claimed[0], column) is None
    for message in claimed:
        message.sent()


def test_migrating_adopts_rows_that_cannot_be_read(
    case: Case, conversation_in: ConversationIn, foreign: ForeignWriter
) -> None:
    """They stand in the tables that Prisma made, before there is any guard. Only a stage must be one."""
    mends = []
    for table, column, value, mended in BAD:
        row_id = case.bad_action.id if table == ACTIONS else conversation_in(Stage.QUALIFYING).id
        if table == ACTIONS:
            action = submit(CloseEngineConversation.get_by_id(case.bad.id), ActionType.SEND_MESSAGE, "one of many")
            row_id = action.id
        spoil(foreign, table, column, value, row_id)
        mends.append((f"UPDATE {table} SET {column} = %s WHERE id = %s", mended, row_id))
    on = f" ON {CONVERSATIONS}" * foreign.is_postgres
    foreign.run(f"DROP TRIGGER {'zz_close_engine_guard' if foreign.is_postgres else 'close_engine_guard_id'}{on}")

    with pytest.raises(close_engine.SchemaError, match="with the unknown stage 'WON'"):
        close_engine.migrate()
    foreign.run("UPDATE close_engine_conversations SET stage = 'QUALIFYING' WHERE stage = 'WON'")
    assert close_engine.migrate()

    assert {case.good_action, case.bad_action} <= set(pending_actions())
    assert {case.good, case.bad} <= set(CloseEngineConversation.in_stages(*Stage))
    assert pipeline().unreadable > 0
    for statement, mended, row_id in mends:
        foreign.run(statement, mended, row_id)
    assert close_engine.verify() == []
    assert len(list(CloseEngineConversation.select())) == 2 + len([row for row in BAD if row[0] == CONVERSATIONS])


def test_queries_of_other_shapes_name_it_too(case: Case, foreign: ForeignWriter) -> None:
    model, action = CloseEngineConversation, PendingAction
    spoil(foreign, ACTIONS, "type", "SEND_SMS", case.bad_action.id)
    spoil(foreign, "leads", "qualification_data", LONG, case.bad.lead_id)
    count = current().dialect.function("count", action.id)
    shapes: list[tuple[Any, tuple[str, str, str]]] = [
        (model.select(model, Lead).join(Lead), ("leads", case.bad.lead_id, "qualification_data")),
        (action.select(action.type, count).group_by(action.type), (ACTIONS, case.bad_action.id, "type")),
        (action.select(action.type).distinct(), (ACTIONS, case.bad_action.id, "type")),
        (action.select().namedtuples(), (ACTIONS, case.bad_action.id, "type")),
        (action.select().limit(1).offset(0), (ACTIONS, case.bad_action.id, "type")),
    ]
    for query, named in shapes:
        ordered = query if query.model is model else query.order_by(action.type.desc())
        with pytest.raises(UnreadableRow) as told:
            list(ordered)
        assert (told.value.table, told.value.row_id, told.value.column) == named
        assert len(list(ordered.readable())) == 1
    # Where no row has a key, what the driver or the field says must do.
    with close_engine.atomic(), pytest.raises(ValueError, match=r"PendingAction\.type cannot be 'SEND_SMS'"):
        list(action.select(action.type.alias("word")).order_by(peewee.SQL("word")).limit(5))


def test_documents_that_only_an_object_cannot_hold_are_named_too(case: Case, foreign: ForeignWriter) -> None:
    """Python can read 500 levels, and an object of a joined query refuses them as it would refuse an assignment."""
    spoil(foreign, CONVERSATIONS, "collected_data", "[" * 500 + "]" * 500, case.bad.id)
    query = CloseEngineConversation.select(CloseEngineConversation, Lead).join(Lead)
    with pytest.raises(UnreadableRow, match=f"'{case.bad.id}'.*collected_data cannot be '…': it is nested deeper"):
        list(query)
    assert list(query.readable()) == [case.good]


def test_an_error_that_is_about_no_row_is_left_alone(case: Case, statements: list[str]) -> None:
    def broken(**row: Any) -> None:
        raise ZeroDivisionError(row["id"])

    for query in (PendingAction.select(), pending_actions()):
        with pytest.raises(ZeroDivisionError):
            list(query.objects(broken))
        with pytest.raises(ZeroDivisionError):
            list(query.objects(broken).iterator())
    del statements[:]
    with pytest.raises(peewee.DatabaseError, match="nothing_like_it"):
        list(PendingAction.select().where(peewee.SQL("nothing_like_it = 1")))
    assert len(statements) == 1
    with pytest.raises(ValueError, match="incompatible with iterator"):
        CloseEngineConversation.select().with_related(CloseEngineConversation.lead).iterator()
