"""The guard in the database, against writers that bypass the library."""

from __future__ import annotations

import io
import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psycopg2
import pytest

import close_engine
from close_engine import CloseEngineConversation, Stage, StageChange
from close_engine.database.fields import stored_time
from close_engine.machine import pairs
from tests.design import ACTIVE, STAGES, TABLE, TRIGGER_BETWEEN
from tests.foreign import REFUSED, Change, ForeignWriter, moment
from tests.waiting import Running, until_they_wait

OLD = "2026-01-01 00:00:00.000"
BEFORE = "2025-12-24 18:00:00.000"

#: Trigger: the columns that the guard fills if a writer leaves them out, and the values.
FORGOTTEN: dict[str, dict[str, Any]] = {
    "request_edits": {"edit_rounds": 3},
    "send_payment_link": {"payment_link_sent_at": "now"},
    "complete": {"completed_at": "now"},
    "stall": {"stalled_at": "now"},
    "resume": {"stalled_at": None},
    "close_lost": {"closed_lost_at": "now"},
    "reopen": {"closed_lost_at": None, "closed_lost_reason": None},
}
STAMPED = {"COMPLETED": "completed_at", "STALLED": "stalled_at", "CLOSED_LOST": "closed_lost_at"}
STAMPED["PAYMENT_SENT"] = "payment_link_sent_at"

#: Values that earlier stages may have left in a row.
LEFT_OVER: dict[str, Any] = {
    "edit_rounds": 2,
    "closed_lost_reason": "no budget",
    **dict.fromkeys(["payment_link_sent_at", "stalled_at", "completed_at", "closed_lost_at"], BEFORE),
}


@pytest.fixture
def sqlite(tmp_path: Path, sqlite_template: Path) -> Iterator[ForeignWriter]:
    """A foreign writer on SQLite, for what only SQLite has."""
    url = f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'test.db')}"
    database = close_engine.connect(url)
    writer = ForeignWriter.beside(database, url)
    yield writer
    writer.connection.close()
    database.close()


def now() -> datetime:
    return datetime.now(timezone.utc).replace(tzinfo=None)


@contextmanager
def during() -> Iterator[list[datetime]]:
    """Note the moments before and after a block, cut to milliseconds like stored ones."""
    span = [cut(now())]
    yield span
    span.append(cut(now()))


def cut(at: datetime) -> datetime:
    return at - timedelta(microseconds=at.microsecond % 1000)


#: A version is at least this much later than the last, even if the clock is not.
TICK = timedelta(milliseconds=1)


def test_the_database_allows_what_the_machine_allows(foreign: ForeignWriter) -> None:
    rows = foreign.run(
        'SELECT "trigger", source, dest FROM close_engine.transitions WHERE machine = %s', "conversation"
    )
    assert len(rows) == len(TRIGGER_BETWEEN)
    assert set(rows) == {(trigger, *ends) for ends, trigger in TRIGGER_BETWEEN.items()}
    assert set(rows) == {(trigger, source.value, dest.value) for trigger, source, dest in pairs()}


@pytest.mark.parametrize("source", STAGES)
def test_of_all_stage_changes_by_plain_sql_exactly_the_tables_pass(source: str, foreign: ForeignWriter) -> None:
    for dest in STAGES:
        pair = f"{source} -> {dest}"
        conversation = foreign.insert(source)
        before = foreign.row(conversation)
        expected = [Change("open", None, source, foreign.actor)]
        trigger = TRIGGER_BETWEEN.get((source, dest))
        if trigger == "resume" and dest != "QUALIFYING":  # where things stand, as far as anybody knows
            trigger = None
        if trigger is None and source != dest:
            with pytest.raises(REFUSED, match="close_engine: "):
                foreign.update(conversation, stage=dest)
            assert (pair, foreign.row(conversation)) == (pair, before)
        else:
            foreign.update(conversation, stage=dest)
            assert (pair, foreign.stage(conversation)) == (pair, dest)
            assert foreign.row(conversation)["updated_at"] > before["updated_at"], pair
            if trigger is not None:
                expected.append(Change(trigger, source, dest, foreign.actor))
        assert (pair, foreign.history(conversation)) == (pair, expected)


def test_an_unknown_stage_can_neither_be_entered_nor_begun(foreign: ForeignWriter) -> None:
    conversation = foreign.insert("INITIATED")
    for unknown in ("DREAMING", "", "initiated", " INITIATED", None):
        with pytest.raises(REFUSED, match="close_engine: "):
            foreign.update(conversation, stage=unknown)
        with pytest.raises(REFUSED, match="close_engine: "):
            foreign.insert(unknown, "strange")
    assert foreign.stage(conversation) == "INITIATED"
    assert len(foreign.history(conversation)) == 1
    assert foreign.history("strange") == []
    assert list(foreign.silent_since()) == [conversation]


def test_postgresql_says_what_it_refuses(foreign_postgres: ForeignWriter) -> None:
    conversation = foreign_postgres.insert("COMPLETED", "c1")
    with pytest.raises(psycopg2.errors.CheckViolation) as refused:
        foreign_postgres.update(conversation, stage="QUALIFYING")
    assert refused.value.diag.message_primary == "close_engine: conversation c1 cannot go from COMPLETED to QUALIFYING"
    assert refused.value.diag.message_hint == "The allowed stage changes are in close_engine.transitions."
    with pytest.raises(psycopg2.errors.CheckViolation, match="close_engine: DREAMING is not a stage"):
        foreign_postgres.insert("DREAMING")


def dest_of(trigger: str, columns: dict[str, Any]) -> str:
    """Return where a trigger leads. Of one that was inserted as STALLED, its stamps say where things stand."""
    if trigger == "resume":
        return "PAYMENT_SENT" if "payment_link_sent_at" in columns else "QUALIFYING"
    return TABLE[trigger].dests[0]


def test_stamps_that_a_foreign_writer_forgets_are_filled(foreign: ForeignWriter) -> None:
    for trigger in FORGOTTEN:
        for source, left_over in itertools.product(TABLE[trigger].sources, ({"edit_rounds": 2}, LEFT_OVER)):
            conversation = foreign.insert(source, **left_over)
            before, dest = foreign.row(conversation), dest_of(trigger, left_over)
            with during() as span:
                foreign.update(conversation, stage=dest)
            row, changed_at = foreign.row(conversation), foreign.recorded_at(conversation)[-1]
            assert span[0] <= changed_at <= span[1]
            stamps = {name: changed_at if what == "now" else what for name, what in FORGOTTEN[trigger].items()}
            after = {"stage": dest, "updated_at": row["updated_at"]}
            assert (trigger, source, row) == (trigger, source, {**before, **after, **stamps})
            # On SQLite, each stamp is an additional write.
            latest = max(span[1], before["updated_at"] + TICK) + len(stamps) * TICK
            assert span[0] <= row["updated_at"] <= latest


def test_stamps_that_a_foreign_writer_sets_are_kept(foreign: ForeignWriter) -> None:
    given = {"edit_rounds": 7, "closed_lost_reason": "their own words", "updated_at": "2026-02-01 10:00:00.000"}
    for trigger in FORGOTTEN:
        stamps = {name: given.get(name, "2026-02-01 09:00:00.000") for name in FORGOTTEN[trigger]}
        conversation = foreign.insert(TABLE[trigger].sources[0], **LEFT_OVER)
        before, dest = foreign.row(conversation), dest_of(trigger, LEFT_OVER)
        foreign.update(conversation, stage=dest, updated_at=given["updated_at"], **stamps)
        kept = {name: moment(value) if name.endswith("_at") else value for name, value in stamps.items()}
        after = {"stage": dest, "updated_at": moment(given["updated_at"])}
        assert (trigger, foreign.row(conversation)) == (trigger, {**before, **after, **kept})


def test_a_conversation_may_begin_in_any_known_stage(foreign: ForeignWriter) -> None:
    for stage in STAGES:
        begin_in(stage, foreign)


def begin_in(stage: str, foreign: ForeignWriter) -> None:
    column = STAMPED.get(stage)
    with during() as span:
        conversation = foreign.insert(stage)
    row = foreign.row(conversation)
    (opened_at,) = foreign.recorded_at(conversation)
    assert foreign.history(conversation) == [Change("open", None, stage, foreign.actor)]
    assert span[0] <= opened_at <= span[1]
    filled = {name for name in STAMPED.values() if row[name] is not None}
    assert (stage, filled) == (stage, {column} if column else set())
    assert foreign.silent_since().get(conversation) == (opened_at if stage in ACTIVE else None)
    if column:
        assert span[0] <= row[column] <= span[1]
        stamped = foreign.row(foreign.insert(stage, **{column: BEFORE}))
        assert (stamped[column], stamped["updated_at"]) == (moment(BEFORE), moment(OLD))
    assert CloseEngineConversation.get_by_id(conversation).stage == stage


def test_one_statement_moves_many_conversations_from_different_stages(foreign: ForeignWriter) -> None:
    sources = [*ACTIVE, "STALLED"]
    made = {source: foreign.insert(source) for source in sources}
    foreign.run("UPDATE close_engine_conversations SET stage = 'CLOSED_LOST', closed_lost_reason = 'the year is over'")
    for source, conversation in made.items():
        assert foreign.history(conversation)[1:] == [Change("close_lost", source, "CLOSED_LOST", foreign.actor)]
        assert foreign.row(conversation)["closed_lost_at"] is not None
    assert foreign.silent_since() == {}


def test_one_refused_row_refuses_the_whole_statement(foreign: ForeignWriter) -> None:
    made = [foreign.insert(stage) for stage in ("BUILDING", "COMPLETED", "STALLED")]
    before = [foreign.row(conversation) for conversation in made]
    with pytest.raises(REFUSED):
        foreign.run("UPDATE close_engine_conversations SET stage = 'CLOSED_LOST'")
    assert [foreign.row(conversation) for conversation in made] == before
    assert [len(foreign.history(conversation)) for conversation in made] == [1, 1, 1]


def test_one_statement_may_move_each_row_elsewhere(foreign: ForeignWriter) -> None:
    building, stalled = foreign.insert("BUILDING"), foreign.insert("STALLED")
    foreign.run(
        "UPDATE close_engine_conversations SET stage = CASE stage WHEN 'STALLED' THEN 'QUALIFYING' ELSE 'STALLED' END"
    )
    assert foreign.history(building)[1:] == [Change("stall", "BUILDING", "STALLED", foreign.actor)]
    assert foreign.history(stalled)[1:] == [Change("resume", "STALLED", "QUALIFYING", foreign.actor)]
    assert list(foreign.silent_since()) == [stalled]


def test_a_rolled_back_change_leaves_nothing(foreign: ForeignWriter) -> None:
    conversation = foreign.insert("INITIATED")
    before, silent = foreign.row(conversation), foreign.silent_since()
    foreign.run("BEGIN")
    foreign.update(conversation, stage="QUALIFYING")
    foreign.update(conversation, stage="STALLED")
    foreign.insert("BUILDING", "never")
    foreign.run("ROLLBACK")
    assert (foreign.row(conversation), foreign.silent_since()) == (before, silent)
    assert len(foreign.history(conversation)) == 1
    assert foreign.history("never") == []


def test_changes_of_one_transaction_are_recorded_one_by_one(foreign: ForeignWriter) -> None:
    conversation = foreign.insert("INITIATED")
    foreign.run("BEGIN")
    foreign.update(conversation, stage="QUALIFYING")
    foreign.run("SAVEPOINT aside")
    foreign.update(conversation, stage="BUILDING")
    foreign.run("ROLLBACK TO SAVEPOINT aside")
    foreign.update(conversation, stage="STALLED")
    foreign.update(conversation, stage="QUALIFYING")
    foreign.run("COMMIT")
    ends = [(change.source, change.dest) for change in foreign.history(conversation)]
    assert ends == [
        (None, "INITIATED"),
        ("INITIATED", "QUALIFYING"),
        ("QUALIFYING", "STALLED"),
        ("STALLED", "QUALIFYING"),
    ]


UPSERT = (
    "INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, updated_at) "
    f"SELECT 'another', lead_id, entry_point, %s, '{OLD}' FROM close_engine_conversations WHERE id = %s "
    "ON CONFLICT (lead_id) DO "
)


def test_an_upsert_is_guarded_as_the_update_that_it_is(foreign: ForeignWriter) -> None:
    conversation = foreign.insert("QUALIFYING")
    foreign.run(UPSERT + "UPDATE SET stage = EXCLUDED.stage", "STALLED", conversation)
    assert foreign.history(conversation)[1:] == [Change("stall", "QUALIFYING", "STALLED", foreign.actor)]
    assert foreign.row(conversation)["stalled_at"] is not None
    before = foreign.row(conversation)
    with pytest.raises(REFUSED):
        foreign.run(UPSERT + "UPDATE SET stage = EXCLUDED.stage || ''", "PEACEFUL", conversation)
    foreign.update(conversation, stage="COMPLETED")
    with pytest.raises(REFUSED):
        foreign.run(UPSERT + "UPDATE SET stage = EXCLUDED.stage", "INITIATED", conversation)
    foreign.run(UPSERT + "NOTHING", "INITIATED", conversation)
    assert foreign.stage(conversation) == "COMPLETED"
    assert foreign.row(conversation)["stalled_at"] == before["stalled_at"]
    assert len(foreign.history(conversation)) == 3
    assert foreign.history("another") == []
    assert foreign.silent_since() == {}


def test_a_conversation_keeps_its_id(foreign: ForeignWriter) -> None:
    conversation = foreign.insert("QUALIFYING", "c1")
    with pytest.raises(REFUSED, match="cannot change its id: its history is stored under it"):
        foreign.update(conversation, id="c2")
    with pytest.raises(REFUSED, match="cannot change its id"):
        foreign.update(conversation, id="c2", stage="STALLED")
    assert foreign.stage("c1") == "QUALIFYING"


@pytest.mark.parametrize(
    "statement",
    ["DELETE FROM close_engine_conversations WHERE id = %s", "DELETE FROM leads WHERE id = (%s || '''s lead')"],
    ids=["itself", "with its lead"],
)
def test_deleting_keeps_the_history_and_forgets_the_silence(statement: str, foreign: ForeignWriter) -> None:
    foreign.run("INSERT INTO leads (id) VALUES ('c1''s lead')")
    foreign.insert("INITIATED", "c1", lead_id="c1's lead")
    kept = foreign.insert("BUILDING")
    foreign.update("c1", stage="QUALIFYING")
    past = foreign.history("c1")
    foreign.run(statement, "c1")
    assert foreign.run("SELECT 1 FROM close_engine_conversations WHERE id = 'c1'") == []
    assert foreign.history("c1") == past
    assert len(past) == 2
    assert list(foreign.silent_since()) == [kept]


def test_what_is_deleted_and_written_again_begins_again(foreign: ForeignWriter) -> None:
    foreign.insert("QUALIFYING", "c1")
    foreign.run("DELETE FROM close_engine_conversations WHERE id = 'c1'")
    foreign.insert("INITIATED", "c1")
    assert [(change.source, change.dest) for change in foreign.history("c1")] == [
        (None, "QUALIFYING"),
        (None, "INITIATED"),
    ]
    assert list(foreign.silent_since()) == ["c1"]


def test_truncating_keeps_the_history_and_forgets_the_silence(foreign_postgres: ForeignWriter) -> None:
    foreign_postgres.insert("QUALIFYING", "c1")
    foreign_postgres.run("TRUNCATE leads CASCADE")
    assert len(foreign_postgres.history("c1")) == 1
    assert foreign_postgres.silent_since() == {}


def test_copied_rows_are_guarded_stamped_and_recorded(foreign_postgres: ForeignWriter) -> None:
    leads = [foreign_postgres.lead() for _ in range(3)]

    def copy(*stages: str) -> None:
        lines = [f"{stage}\t{lead}\tSMS_REPLY\t{stage}\t{OLD}\n" for stage, lead in zip(stages, leads, strict=False)]
        columns = ("id", "lead_id", "entry_point", "stage", "updated_at")
        with foreign_postgres.connection.cursor() as cursor:
            cursor.copy_from(io.StringIO("".join(lines)), "close_engine_conversations", columns=columns)

    with pytest.raises(REFUSED, match="LIMBO is not a stage"):
        copy("BUILDING", "LIMBO")
    assert foreign_postgres.history("BUILDING") == []
    copy("BUILDING", "STALLED", "COMPLETED")
    for stage in ("BUILDING", "STALLED", "COMPLETED"):
        assert foreign_postgres.history(stage) == [Change("open", None, stage, foreign_postgres.actor)]
    assert foreign_postgres.row("STALLED")["stalled_at"] is not None
    assert list(foreign_postgres.silent_since()) == ["BUILDING"]


#: Later than now, and not so late that the guard refuses it.
FUTURE = stored_time(datetime.now(timezone.utc) + timedelta(hours=12))


@pytest.mark.parametrize("change", [{"stage": "STALLED"}, {"stage": "QUALIFYING"}, {"edit_rounds": 1}], ids=str)
def test_updated_at_moves_on_at_every_write(change: dict[str, Any], foreign: ForeignWriter) -> None:
    for before in (OLD, FUTURE):
        for given in (None, BEFORE, OLD, FUTURE):
            conversation = foreign.insert("QUALIFYING", updated_at=before)
            assert foreign.row(conversation)["updated_at"] == moment(before)
            foreign.update(conversation, **change, **({"updated_at": given} if given else {}))
            after = foreign.row(conversation)["updated_at"]
            assert (before, given, after > moment(before)) == (before, given, True)
            if given and given > before:
                assert after >= moment(given)
            elif before == OLD:
                assert abs(after - now()) < timedelta(minutes=1)
            loaded = CloseEngineConversation.get_by_id(conversation)
            assert loaded.updated_at.replace(tzinfo=None) == after
            loaded.close_lost("found by its updated_at")


def test_writes_of_the_same_millisecond_are_told_apart(foreign: ForeignWriter) -> None:
    conversation = foreign.insert("QUALIFYING")
    seen = set()
    for number in range(50):
        foreign.update(conversation, stage="STALLED" if number % 2 == 0 else "QUALIFYING")
        seen.add(foreign.row(conversation)["updated_at"])
    assert len(seen) == 50
    assert len(foreign.history(conversation)) == 51


ODD_IDS = [
    "it's",
    '"quoted"',
    "'; DROP TABLE leads; --",
    "%s {history} ?",
    '{"id": null}',
    "ключ 🔑",
    "\\n\\",
    " ",
    "1e3",
]


def test_odd_ids_are_ids(foreign: ForeignWriter) -> None:
    for odd in ODD_IDS:
        live_with(odd, foreign)
    assert foreign.silent_since() == {}


def live_with(odd: str, foreign: ForeignWriter) -> None:
    foreign.run("INSERT INTO leads (id, phone) VALUES (%s, %s)", odd, "+1")
    foreign.insert("INITIATED", odd, lead_id=odd)
    foreign.update(odd, stage="QUALIFYING")
    conversation = CloseEngineConversation.get_by_id(odd)
    change = conversation.collect_info(actor=odd, reason=odd, metadata={odd: odd}, key=f"key {odd}")
    assert foreign.history(odd)[-1] == Change(
        "collect_info", "QUALIFYING", "COLLECTING_INFO", odd, odd, {odd: odd}, f"key {odd}"
    )
    assert conversation.collect_info(key=f"key {odd}").id == change.id
    assert [change.lead_id for change in conversation.history()] == [odd] * 3
    with pytest.raises(REFUSED):
        foreign.update(odd, stage="INITIATED")
    foreign.run("DELETE FROM close_engine_conversations WHERE id = %s", odd)


DATESTYLES = [
    "SET datestyle = 'SQL, DMY'",
    "SET datestyle = 'German'",
]  # psycopg2 does not allow these in a worker's session
SETTINGS = [
    "SET timezone = 'Pacific/Kiritimati'",
    "SET timezone = 'America/Los_Angeles'",
    "SET intervalstyle = 'sql_standard'",
    "SET standard_conforming_strings = off; SET escape_string_warning = off",
    "SET search_path = pg_catalog, public",
    "SET default_transaction_isolation = 'serializable'",
    "SET transform_null_equals = on",
    "SET close_engine.context = ''",
    """SET close_engine.context = '{"actor": "somebody else", "reason": "forged"}'""",
]


def test_the_settings_of_a_session_change_nothing(postgres: Any, foreign_postgres: ForeignWriter) -> None:
    for setting in DATESTYLES + SETTINGS:
        conversation = foreign_postgres.insert("QUALIFYING")
        foreign_postgres.run(setting)
        with during() as span:
            foreign_postgres.update(conversation, stage="STALLED")
        foreign_postgres.run("RESET ALL")
        change = Change("stall", "QUALIFYING", "STALLED", foreign_postgres.actor)
        assert (setting, foreign_postgres.history(conversation)[-1]) == (setting, change)
        row, changed_at = foreign_postgres.row(conversation), foreign_postgres.recorded_at(conversation)[-1]
        assert span[0] <= row["stalled_at"] == changed_at <= row["updated_at"] <= span[1], setting

        if setting in SETTINGS:
            postgres.execute_sql(setting)  # in a worker's session too
        with during() as span:
            resumed = CloseEngineConversation.get_by_id(conversation).resume(actor="worker-7")
        assert StageChange.get_by_id(resumed.id).__data__ == resumed.__data__, setting
        postgres.execute_sql("RESET ALL")
        change = Change("resume", "STALLED", "QUALIFYING", "worker-7")
        assert (setting, foreign_postgres.history(conversation)[-1]) == (setting, change)
        assert span[0] <= resumed.created_at.replace(tzinfo=None) <= span[1], setting


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/Los_Angeles"])
def test_now_in_a_session_elsewhere_than_in_utc_means_now(zone: str, foreign_postgres: ForeignWriter) -> None:
    conversation, lead = foreign_postgres.insert("BUILDING"), foreign_postgres.lead()
    foreign_postgres.run(f"SET timezone = '{zone}'")
    with during() as span:
        foreign_postgres.run(
            "INSERT INTO close_engine_conversations (id, lead_id, entry_point, updated_at) "
            "VALUES ('c1', %s, 'SMS_REPLY', now())",
            lead,
        )
        foreign_postgres.run(
            "UPDATE close_engine_conversations SET stage = 'STALLED', updated_at = CURRENT_TIMESTAMP WHERE id = %s",
            conversation,
        )
    opened, moved = foreign_postgres.row("c1"), foreign_postgres.row(conversation)
    for stored in (opened["created_at"], opened["updated_at"], moved["updated_at"]):
        assert span[0] <= stored <= span[1]


def other_trigger(writer: ForeignWriter, name: str, event: str, body: str) -> None:
    """Create somebody else's trigger on the conversations."""
    writer.run(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} RETURN NEW; END$$")
    writer.run(f"CREATE TRIGGER {name} {event} ON close_engine_conversations FOR EACH ROW EXECUTE FUNCTION {name}()")


def test_the_guard_sees_a_row_as_triggers_of_others_leave_it(foreign_postgres: ForeignWriter) -> None:
    conversation = foreign_postgres.insert("QUALIFYING")
    body = "IF NEW.edit_rounds = 9 THEN NEW.stage := NEW.closed_lost_reason; END IF;"
    other_trigger(foreign_postgres, "overrule", "BEFORE UPDATE", body)
    with pytest.raises(REFUSED, match="from QUALIFYING to PAYMENT_SENT"):
        foreign_postgres.update(conversation, stage="STALLED", edit_rounds=9, closed_lost_reason="PAYMENT_SENT")
    foreign_postgres.update(conversation, stage="STALLED", edit_rounds=9, closed_lost_reason="BUILDING")
    assert foreign_postgres.stage(conversation) == "BUILDING"
    assert foreign_postgres.history(conversation)[1:] == [
        Change("start_building", "QUALIFYING", "BUILDING", foreign_postgres.actor)
    ]


def test_the_opening_is_recorded_before_what_triggers_of_others_make_of_it(foreign_postgres: ForeignWriter) -> None:
    body = "UPDATE close_engine_conversations SET stage = 'QUALIFYING' WHERE id = NEW.id;"
    other_trigger(foreign_postgres, "begin_at_once", "AFTER INSERT", body)
    conversation = foreign_postgres.insert("INITIATED")
    assert [change.trigger for change in foreign_postgres.history(conversation)] == ["open", "start_qualifying"]
    assert foreign_postgres.stage(conversation) == "QUALIFYING"


def test_of_two_foreign_writers_the_later_is_guarded_by_what_the_earlier_wrote(
    foreign_postgres: ForeignWriter, postgres_url: str
) -> None:
    conversation = foreign_postgres.insert("PAYMENT_SENT")
    other = ForeignWriter(psycopg2.connect(postgres_url))
    other.connection.autocommit = True

    def stall() -> None:
        other.update(conversation, stage="STALLED")

    foreign_postgres.run("BEGIN")
    foreign_postgres.update(conversation, stage="COMPLETED")
    later = Running(stall)
    until_they_wait([later], foreign_postgres.connection.info.backend_pid)
    foreign_postgres.run("COMMIT")
    refused = later.result()
    other.connection.close()
    assert isinstance(refused, REFUSED)
    assert "cannot go from COMPLETED to STALLED" in str(refused)
    assert [change.dest for change in foreign_postgres.history(conversation)] == ["PAYMENT_SENT", "COMPLETED"]


@pytest.mark.parametrize("stage", [b"COMPLETED", 1, 1.5], ids=repr)
def test_what_is_no_text_is_no_stage(stage: Any, foreign: ForeignWriter) -> None:
    conversation = foreign.insert("PAYMENT_SENT")
    with pytest.raises((*REFUSED, psycopg2.ProgrammingError)):
        foreign.update(
            conversation, stage=psycopg2.Binary(stage) if foreign.is_postgres and isinstance(stage, bytes) else stage
        )
    assert foreign.stage(conversation) == "PAYMENT_SENT"


def test_sqlites_conflict_policies_do_not_get_past_the_guard(sqlite: ForeignWriter) -> None:
    completed = sqlite.insert("COMPLETED")
    for policy in ("OR IGNORE", "OR REPLACE", "OR FAIL", "OR ABORT", "OR ROLLBACK"):
        with pytest.raises(REFUSED):
            sqlite.run(f"UPDATE {policy} close_engine_conversations SET stage = 'INITIATED' WHERE id = %s", completed)
        assert (policy, sqlite.stage(completed)) == (policy, "COMPLETED")
        stalled = sqlite.insert("STALLED")
        sqlite.run(f"UPDATE {policy} close_engine_conversations SET stage = 'QUALIFYING' WHERE id = %s", stalled)
        assert sqlite.history(stalled)[1:] == [Change("resume", "STALLED", "QUALIFYING", sqlite.actor)]
        assert sqlite.row(stalled)["stalled_at"] is None


def test_sqlites_replace_is_recorded_as_the_deletion_and_new_beginning_that_it_is(sqlite: ForeignWriter) -> None:
    sqlite.insert("COMPLETED", "c1")
    values = sqlite.row("c1") | {"stage": "BUILDING", "created_at": OLD, "updated_at": OLD, "completed_at": None}
    marks = ", ".join(["%s"] * len(values))
    sqlite.run(f"REPLACE INTO close_engine_conversations ({', '.join(values)}) VALUES ({marks})", *values.values())
    assert [(change.trigger, change.dest) for change in sqlite.history("c1")] == [
        ("open", "COMPLETED"),
        ("open", "BUILDING"),
    ]
    assert list(sqlite.silent_since()) == ["c1"]


@pytest.mark.parametrize("later", ["close_engine_record", "close_engine_version"])
def test_sqlites_triggers_work_in_whatever_order_they_fire(later: str, sqlite: ForeignWriter) -> None:
    ((sql,),) = sqlite.run("SELECT sql FROM sqlite_master WHERE name = %s", later)
    sqlite.run(f"DROP TRIGGER {later}")
    sqlite.run(sql.replace("_engine.", "_engine_"))  # the newest trigger fires first
    conversation = sqlite.insert("QUALIFYING", updated_at=FUTURE)
    sqlite.update(conversation, stage="STALLED", updated_at=OLD)
    assert sqlite.row(conversation)["updated_at"] > moment(FUTURE)


def test_sqlite_gives_every_updated_at_the_form_by_which_a_row_is_found(sqlite: ForeignWriter) -> None:
    written = {
        "2026-02-01T10:00:00.123Z": "2026-02-01 10:00:00.123",
        "2026-02-01 10:00:00": "2026-02-01 10:00:00.000",
        "2026-02-01 10:00:00.123456": "2026-02-01 10:00:00.123",
        "2026-02-01 10:00:00.123999": "2026-02-01 10:00:00.123",
        "2026-02-01T10:00:00.9999Z": "2026-02-01 10:00:00.999",
        "2026-02-01 10:00:00.123999+02:00": "2026-02-01 08:00:00.123",
        "2026-02-01 10:00:00+02:00": "2026-02-01 08:00:00.000",
        "1769940000000": None,
        "garbage": None,
    }
    for given, stored in written.items():
        inserted, updated = sqlite.insert("BUILDING", updated_at=given), sqlite.insert("BUILDING")
        sqlite.update(updated, edit_rounds=2, updated_at=given)
        for conversation in (inserted, updated):
            found = sqlite.run("SELECT updated_at FROM close_engine_conversations WHERE id = %s", conversation)[0][0]
            assert (given, found) == (given, stored or found)
            assert stored or abs(moment(found) - now()) < timedelta(minutes=1)
            CloseEngineConversation.get_by_id(conversation).stall()


def test_stages_are_enums_again_when_the_library_reads_them(foreign: ForeignWriter) -> None:
    conversation = foreign.insert("EDIT_LOOP")
    foreign.update(conversation, stage="PREVIEW_SENT")
    changes = CloseEngineConversation.get_by_id(conversation).history()
    assert [(change.source, change.dest) for change in changes] == [
        (None, Stage.EDIT_LOOP),
        (Stage.EDIT_LOOP, Stage.PREVIEW_SENT),
    ]
