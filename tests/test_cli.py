"""The command line as people use it: what it prints, what it changes, and how it fails."""

from __future__ import annotations

import os
import re
import resource
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import CloseEngineConversation, EntryPoint, Lead, Stage, StageChange
from close_engine.database.url import without_password
from close_engine.diagram import mermaid, svg
from close_engine.machine import TRIGGERS
from close_engine.schema import directory
from close_engine.testing import MovableClock
from tests.command_line import Result, as_user, postgres_role, process, refused, run
from tests.crm import BEFORE, query, restore
from tests.servers import execute, new_name, postgres_database

SCRIPTS = sorted(script.stem for script in directory().glob("[0-9]*.py"))

MIGRATIONS = sorted(path.stem for path in directory().glob("0*.py"))

COMMANDS: tuple[str, ...] = ("migrate", "downgrade", "status", "verify", "graph", "show", "fire", "demo")
COMMANDS += ("actions", "approve", "reject", "outbox", "sweep", "worker", "board", "list", "import-texts")


@pytest.fixture
def database(database: peewee.Database, close_engine_clock: MovableClock) -> peewee.Database:
    """The same, with its own clock: what stands still is no healthy database."""
    close_engine_clock.let_go()
    return database


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """Only these two: a database in memory ends with its process, so a command cannot open it."""
    return str(request.param)


def make_file(url: str) -> None:
    """Make sure that a SQLite database exists, without tables."""
    if url.startswith("sqlite"):
        Path(urlsplit(url).path[1:]).touch()


# -- every command, on both databases --------------------------------------------------------------------------------


def test_migrate_applies_what_is_pending_and_then_has_nothing_to_do(empty_url: str) -> None:
    first = run("migrate", "--standalone", "--database", empty_url)
    again = run("migrate", "--database", empty_url)

    assert first == Result(0, "".join(f"Applied {name}.\n" for name in MIGRATIONS), "")
    assert again == Result(0, "Nothing to do: every migration is applied, and what they made is there.\n", "")
    close_engine.connect(empty_url)
    assert close_engine.verify() == []


def test_migrating_and_back_wait_only_so_long_for_another_process(empty_url: str) -> None:
    run("migrate", "--standalone", "--database", empty_url)
    with closing(connection_that_migrates(empty_url)):
        for command in (["migrate", "--standalone"], ["downgrade"], ["migrate", "--standalone", "--sql"]):
            told = refused(*command, "--lock-timeout", "0.02", "--database", empty_url)
            assert re.match("Nothing was changed: .* 0.02 seconds", told)
            assert "--lock-timeout" in told
    assert "it must be greater than zero" in refused("downgrade", "--lock-timeout", "0", "--database", empty_url)


def connection_that_migrates(url: str) -> Any:
    """A connection that keeps everybody from migrating until it is closed."""
    if url.startswith("sqlite"):
        file = sqlite3.connect(urlsplit(url).path[1:], isolation_level=None)
        file.execute("BEGIN IMMEDIATE")
        return file
    connection = psycopg2.connect(url)
    connection.cursor().execute("SELECT pg_advisory_xact_lock(hashtext('close_engine.migrate'))")
    return connection


def test_migrate_without_a_crm_says_what_is_missing_and_names_standalone(empty_url: str) -> None:
    make_file(empty_url)

    result = run("migrate", "--database", empty_url)

    assert (result.code, result.out) == (1, "")
    assert "the CRM's leads table was not found as " in result.err
    assert "migrate --standalone" in result.err


def test_migrate_sql_prints_a_script_that_migrates_and_changes_nothing_itself(empty_url: str) -> None:
    script = run("migrate", "--standalone", "--sql", "--database", empty_url)

    assert (script.code, script.err) == (0, "")
    if empty_url.startswith("sqlite"):
        path = Path(urlsplit(empty_url).path[1:])
        assert not path.exists()
        sqlite3.connect(path).executescript(script.out)
    else:
        assert query(empty_url, "SELECT 1 FROM pg_namespace WHERE nspname = 'close_engine'") == []
        query(empty_url, script.out)
    assert run("verify", "--database", empty_url).code == 0
    assert run("migrate", "--sql", "--database", empty_url) == Result(0, "-- Nothing is pending.\n", "")


def test_status_lists_every_migration_as_pending_and_then_when_it_was_applied(empty_url: str) -> None:
    make_file(empty_url)
    before = run("status", "--database", empty_url)
    run("migrate", "--standalone", "--database", empty_url)
    after = run("status", "--database", empty_url)

    assert [line for line in before.lines if line[-1:] == ["pending"]] == [[name, "pending"] for name in MIGRATIONS]
    assert [line[0] for line in after.lines if line[:1] and line[0] in MIGRATIONS] == MIGRATIONS
    assert "pending" not in after.out
    assert "applied (local time)" in after.out


def test_status_marks_a_migration_that_this_version_does_not_know(database: Any, database_url: str) -> None:
    schema, table = close_engine.database.binding.current().dialect.own_table("migrations")
    where = f"{schema}.{table}" if schema else table
    database.execute_sql(f"INSERT INTO {where} (name, applied) VALUES ('0999_later', '2026-01-02 03:04:05')")

    assert "0999_later" in run("status", "--database", database_url).out
    assert "unknown to this version: upgrade close-engine" in run("status", "--database", database_url).out


def test_verify_prints_a_checklist_and_ends_with_0(database_url: str) -> None:
    result = run("verify", "--database", database_url)

    assert (result.code, result.err) == (0, "")
    assert {line[0] for line in result.lines} == {"ok"}
    assert ["ok", "allowed", "stage", "changes"] in result.lines


def test_verify_lists_what_is_wrong_and_ends_with_1(database: Any, database_url: str) -> None:
    dialect = close_engine.database.binding.current().dialect
    database.execute_sql(dialect.sql("DELETE FROM {transitions} WHERE source = 'INITIATED' AND dest = 'QUALIFYING'"))

    result = run("verify", "--database", database_url)

    assert (result.code, result.err) == (1, "1 problem found. The list says what to do about each.\n")
    assert "WRONG  allowed stage changes\n       - The database refuses start_qualifying from INITIATED" in result.out


def test_verify_repair_says_what_it_mended(database: Any, database_url: str) -> None:
    dialect = close_engine.database.binding.current().dialect
    table = dialect.sql("{transitions}")
    database.execute_sql(f"DELETE FROM {table} WHERE source = 'INITIATED' AND dest = 'QUALIFYING'")
    undo = "('conversation', 'undo', 'COMPLETED', 'INITIATED')"
    database.execute_sql(f'INSERT INTO {table} (machine, "trigger", source, dest) VALUES {undo}')

    result = run("verify", "--repair", "--database", database_url)

    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[:2] == [
        "mended: The database refuses start_qualifying from INITIATED to QUALIFYING, which the machine allows.",
        "mended: The database allows undo from COMPLETED to INITIATED, which the machine refuses.",
    ]
    assert {line[0] for line in result.lines[2:]} == {"ok"}


def test_verify_repair_leaves_what_somebody_must_decide(database: Any, database_url: str) -> None:
    Lead.create(id="l", phone="+1555")
    database.execute_sql("UPDATE leads SET autonomy_level = 'HALF_AUTO'")

    result = run("verify", "--repair", "--database", database_url)

    assert (result.code, result.err) == (1, "1 problem found. The list says what to do about each.\n")
    assert "mended" not in result.out
    assert "autonomy_level has the unknown value 'HALF_AUTO'" in result.out


def test_migrate_makes_again_what_is_gone_and_says_so(database: Any, database_url: str) -> None:
    database.execute_sql(close_engine.database.binding.current().dialect.sql("DROP TABLE {deadlines}"))

    result = run("migrate", "--database", database_url)

    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines() == [
        f"Applied {script} again, because something that it had made was gone." for script in SCRIPTS
    ]
    assert run("verify", "--database", database_url).code == 0


def test_migrate_sql_all_prints_every_migration(database: Any, database_url: str) -> None:
    assert run("migrate", "--sql", "--database", database_url).out == "-- Nothing is pending.\n"
    printed = run("migrate", "--sql", "--all", "--database", database_url)

    assert (printed.code, printed.err) == (0, "")
    assert printed.out.startswith("BEGIN;\n\n")
    assert printed.out.endswith("COMMIT;\n")
    assert all(f"'{script}'" in printed.out for script in SCRIPTS)
    assert refused("migrate", "--all", "--database", database_url) == ("--all says what to print, so it needs --sql.\n")


def test_graph_prints_the_state_diagram_and_needs_no_database() -> None:
    assert run("graph") == Result(0, mermaid() + "\n", "")
    assert run("graph", "--svg") == Result(0, svg() + "\n", "")


def test_show_prints_the_row_and_the_timeline(conversation_in: Any, database_url: str) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.close_lost("too [dear] :moon:", actor="ana\x1b[2J", key="SM1", metadata={"price": [1, "é"]})

    result = run("show", conversation.id, "--database", database_url)

    assert (result.code, result.err) == (0, "")
    assert ["stage", "CLOSED_LOST"] in result.lines
    assert ["closed_lost_reason", "too", "[dear]", ":moon:"] in result.lines
    assert ["payment_link_url", "-"] in result.lines
    day = [f"{conversation.closed_lost_at:%Y-%m-%d}", f"{conversation.closed_lost_at:%H:%M:%S}", "UTC"]
    assert [line[3:6] for line in result.lines if line[:3] == day] == [
        ["-", "INITIATED", "open"],
        ["INITIATED", "QUALIFYING", "start_qualifying"],
        ["QUALIFYING", "CLOSED_LOST", "close_lost"],
    ]
    assert 'ana\\x1b[2J   too [dear] :moon:   SM1   {"price": [1, "é"]}' in result.out


def test_show_and_fire_take_the_id_of_the_lead_too(conversation_in: Any, database_url: str) -> None:
    conversation = conversation_in(Stage.BUILDING)

    fired = run("fire", conversation.lead_id, "stall", "--database", database_url)
    shown = run("show", conversation.lead_id, "--database", database_url)

    assert fired == Result(0, f"Conversation {conversation.id!r} went from BUILDING to STALLED.\n", "")
    assert ["id", conversation.id] in shown.lines


def test_show_of_a_deleted_conversation_prints_the_history_that_it_left(
    conversation_in: Any, database_url: str
) -> None:
    conversation = conversation_in(Stage.BUILDING)
    conversation.delete_instance()

    result = run("show", conversation.id, "--database", database_url)

    assert result.code == 0
    assert f"Conversation {conversation.id!r} was deleted; its history is kept." in result.out
    assert "start_building" in result.out


def test_opt_out_and_opt_in_take_the_lead_or_its_conversation(conversation_in: Any, database_url: str) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    lead_id, here = conversation.lead_id, ("--database", database_url)

    out = run("opt-out", conversation.id, "--source", "phone call", "--key", "k1", *here)
    shown = run("show", lead_id, *here)
    lifted = run("opt-in", lead_id, *here)
    again = run("opt-out", lead_id, "--key", "k1", *here)
    nothing = run("opt-in", conversation.id, *here)

    assert re.fullmatch(f"Lead '{lead_id}' has opted out since 20.* UTC: nothing more is sent to it.\n", out.out)
    assert ["stage", "CLOSED_LOST"] in shown.lines
    (opted_out,) = (line for line in shown.lines if line[:1] == ["opted_out"])
    assert opted_out[-2:] == ["phone", "call"]
    assert lifted == Result(0, f"Lead '{lead_id}' may be texted again.\n", "")
    assert again.out.startswith("Nothing changed: the key 'k1' was already used at 20")
    assert nothing == Result(0, "Nothing changed: there was nothing to lift.\n", "")
    assert "opted_out" not in [line[0] for line in run("show", lead_id, *here).lines if line]
    assert run("opt-out", "nobody", *here) == Result(1, "", "There is no lead 'nobody'.\n")


def test_fire_changes_the_stage_and_records_all_it_was_given(
    conversation_in: Any, database_url: str, database: Any
) -> None:
    conversation = conversation_in(Stage.PENDING_APPROVAL, close_engine.AutonomyLevel.MANUAL)
    link = ("--payment-link-url", "https://pay.example.com/9", "--approved-by", "ana")
    context = ("--actor", "me", "--reason", "asked for", "--key", "k1", "--metadata", '{"n": 1}')
    arguments = ("fire", conversation.id, "send_payment_link", *link, *context, "--database", database_url)

    first, again = run(*arguments), run(*arguments)

    assert first == Result(0, f"Conversation {conversation.id!r} went from PENDING_APPROVAL to PAYMENT_SENT.\n", "")
    assert again.out.startswith("Nothing changed: the key 'k1' was already used at ")
    close_engine.bind(database)
    conversation.reload()
    assert conversation.payment_link_url == "https://pay.example.com/9"
    change = conversation.history()[-1]
    assert (change.actor, change.reason, change.key) == ("me", "asked for", "k1")
    assert change.metadata == {"n": 1, "approved_by": "ana"}


def test_what_nobody_signs_is_recorded_as_the_command_lines(
    conversation_in: Any, database_url: str, database: Any
) -> None:
    conversation = conversation_in(Stage.INITIATED)
    run("fire", conversation.id, "start_qualifying", "--database", database_url)

    close_engine.bind(database)
    assert conversation.history()[-1].actor == "command line"


def test_down_takes_the_newest_back_without_asking_where_nothing_is_lost(
    conversation_in: Any, database_url: str
) -> None:
    conversation_in(Stage.BUILDING)

    assert run("downgrade", "--database", database_url) == Result(0, f"Downgraded {MIGRATIONS[-1]}.\n", "")
    assert run("migrate", "--database", database_url).code == 0


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_down_asks_before_data_would_be_lost(conversation_in: Any, database_url: str, answer: str, code: int) -> None:
    conversation_in(Stage.BUILDING)
    close_engine.database.binding.current().database.close()

    result = run("downgrade", MIGRATIONS[0], "--database", database_url, input=answer)

    assert result.code == code
    assert "close_engine_conversations (1)" in result.err
    assert "history" in result.err
    assert ("Nothing was downgraded. To downgrade without being asked, use --yes.\n" in result.err) is bool(code)
    assert len(result.out.splitlines()) == (0 if code else len(MIGRATIONS))
    close_engine.connect(database_url)
    assert [migration.applied_at is None for migration in close_engine.schema.status()] == [not code] * len(MIGRATIONS)


def test_down_asks_only_for_what_the_target_would_drop(conversation_in: Any, database_url: str) -> None:
    conversation_in(Stage.BUILDING)
    close_engine.database.binding.current().database.close()

    result = run("downgrade", "0002_history", "--database", database_url, input="n\n")

    assert "history" in result.err
    assert "close_engine_conversations" not in result.err


def test_down_with_yes_does_not_ask_and_then_has_nothing_to_do(conversation_in: Any, database_url: str) -> None:
    conversation_in(Stage.BUILDING)
    close_engine.database.binding.current().database.close()

    result = run("downgrade", MIGRATIONS[0], "--yes", "--database", database_url)

    assert result == Result(0, "".join(f"Downgraded {name}.\n" for name in reversed(MIGRATIONS)), "")
    assert run("downgrade", "--database", database_url).out == "Nothing to do: no migration is applied.\n"


# -- options ---------------------------------------------------------------------------------------------------------


def test_the_database_may_be_named_before_the_command_behind_it_or_in_the_environment(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", "sqlite:////no/such/place.db")
    assert run("--database", database_url, "status").code == 0
    assert run("status", f"--database={database_url}").code == 0
    assert run("--database", "sqlite:////no/such/other.db", "status", "--database", database_url).code == 0
    assert run("status").code == 1
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    assert run("status").code == 0


def test_the_default_database_is_a_file_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CLOSE_ENGINE_DATABASE", raising=False)
    monkeypatch.chdir(tmp_path)

    assert run("migrate", "--standalone").code == 0
    assert (tmp_path / "close_engine.db").exists()


def test_the_crms_tables_may_have_other_names(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"leads": "Lead", "users": "User", "clients": "Client"}
    options = [word for table, name in names.items() for word in (f"--{table}-table", name)]
    with postgres_database(server) as url:
        restore(url, BEFORE)
        execute(url, *(f'ALTER TABLE {table} RENAME TO "{name}"' for table, name in names.items()))

        without, behind = run("migrate", "--database", url), run("migrate", *options, "--database", url)
        for table, name in names.items():
            monkeypatch.setenv(f"CLOSE_ENGINE_{table.upper()}_TABLE", name)
        verified = run("verify", "--database", url)

    assert without.code == 1
    assert "--standalone" in without.err
    assert behind.code == verified.code == 0


def test_version_prints_it() -> None:
    assert run("--version") == Result(0, f"close-engine {close_engine.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str) -> None:
    help_text = run(command, "--help")

    assert help_text.code == 0
    summary = help_text.lines[3]
    assert len(summary) >= 5
    assert " ".join(summary[:4]) in " ".join(run("--help").out.split())


@pytest.mark.parametrize("arguments", [(), *((command,) for command in COMMANDS), ("outbox", "requeue")])
def test_a_flag_is_shown_without_a_value(arguments: tuple[str, ...]) -> None:
    assert "<bool>" not in run(*arguments, "--help").out


def test_the_commands_are_these() -> None:
    # The words that explain a command may begin a line, but further to the right.
    listed = [name for name in re.findall("^│ ([a-z-]+) ", run("--help").out, re.MULTILINE) if name in COMMANDS]
    assert sorted(listed) == sorted(COMMANDS)


def test_a_command_line_that_cannot_be_understood_ends_with_2() -> None:
    for arguments in (("fly",), ("show",), ("demo", "--leads", "1"), ("status", "--fast")):
        assert run(*arguments).code == 2


# -- how it fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("status",), ("verify",), ("downgrade",), ("migrate",), ("show", "c1")])
def test_a_missing_file_is_named_and_not_made(tmp_path: Path, command: Any) -> None:
    sentence = refused(*command, "--database", f"sqlite:///{tmp_path}/none.db")

    assert sentence.startswith(f"There is no database file {tmp_path}/none.db: name yours with --database")
    assert "close-engine migrate --standalone" in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sql", [(), ("--sql",)])
def test_a_missing_directory_is_named(tmp_path: Path, sql: Any) -> None:
    sentence = refused("migrate", "--standalone", *sql, "--database", f"sqlite:///{tmp_path}/no/such.db")

    assert sentence == f"There is no directory {tmp_path}/no for such.db: create it first.\n"


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "letter.db").write_text("Dear Sir or Madam, " * 100)

    sentence = refused("status", "--database", f"sqlite:///{tmp_path}/letter.db")

    assert f"The database sqlite:///{tmp_path}/letter.db cannot be opened: file is not a database." in sentence
    assert "you need write permission on the file and its directory" in sentence


def test_an_option_that_sqlite_does_not_know_is_named(sqlite_template: Path) -> None:
    assert "a SQLite URL takes no parameters; remove fast" in refused(
        "status", "--database", f"sqlite:///{sqlite_template}?fast=1"
    )


@pytest.mark.parametrize("command", [("show", "c1"), ("fire", "c1", "stall")])
def test_a_database_that_is_not_migrated_is_told_to_be(empty_url: str, command: Any) -> None:
    make_file(empty_url)

    result = run(*command, "--database", empty_url)

    assert result.code == 1
    assert result.err == (
        f"The database is not migrated ({', '.join(MIGRATIONS)} pending): run close-engine migrate.\n"
    )


def test_a_table_that_is_gone_is_a_sentence_that_names_verify(database: Any, database_url: str) -> None:
    database.execute_sql("DROP TABLE close_engine_conversations")

    sentence = refused("show", "c1", "--database", database_url)

    assert sentence.startswith("Database error: ")
    assert "close_engine_conversations" in sentence
    assert "close-engine verify" in sentence


NO_SUCH_CONVERSATION = (
    "There is no conversation 'c9': it was deleted with its lead, or never opened with open_conversation()."
)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("show", "c9"), NO_SUCH_CONVERSATION),
        (("fire", "c9", "stall"), NO_SUCH_CONVERSATION),
        (("downgrade", "0042_none"), 'Nothing was changed: "0042_none" is not an applied migration.'),
    ],
)
def test_what_is_not_there_is_named(database_url: str, arguments: Any, sentence: str) -> None:
    assert refused(*arguments, "--database", database_url) == f"{sentence}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("fly",), f"There is no trigger 'fly'; the triggers are {', '.join(TRIGGERS)}."),
        (("resume",), "is BUILDING, and resume is not allowed from there; allowed: "),
        (("close_lost",), "is BUILDING, and close_lost is refused: a reason must be given."),
        (("stall", "--metadata", "{"), "metadata cannot be '{': it must be a JSON object (Expecting"),
        (("stall", "--metadata", "[1]"), "metadata cannot be [1]: it must be a mapping"),
        (("stall", "--metadata", "[" * 100_000), "it must be a JSON object (maximum recursion depth exceeded"),
        (("stall", "--metadata", '{"a":' * 500 + "1" + "}" * 500), "it is nested deeper than 100 levels"),
        (("stall", "--approved-by", "x", "--metadata", "5"), "metadata cannot be 5: it must be a mapping"),
        (("stall", "--approved-by", "x", "--metadata", "[1]"), "metadata cannot be [1]: it must be a mapping"),
        (("stall", "--key", " "), "key cannot be ' ': an idempotency key must not be empty"),
        (("stall", "--actor", "\udcff"), "actor cannot be "),
    ],
)
def test_what_the_machine_refuses_is_a_sentence_and_changes_nothing(
    conversation_in: Any, database_url: str, database: Any, arguments: Any, sentence: str
) -> None:
    conversation = conversation_in(Stage.BUILDING)

    result = run("fire", conversation.id, *arguments, "--database", database_url)

    assert (result.code, result.out) == (1, "")
    assert sentence in result.err
    close_engine.bind(database)
    assert CloseEngineConversation.get_by_id(conversation.id) == conversation
    assert StageChange.select().count() == 3


def test_a_file_that_the_system_does_not_let_grow_is_a_sentence(tmp_path: Path) -> None:
    def no_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    result = process(
        "migrate", "--standalone", "--database", f"sqlite:///{tmp_path}/full.db", preexec_fn=no_room, cwd=tmp_path
    )

    assert (result.code, result.out) == (1, "")
    assert "Database error: disk I/O error." in result.err


def test_a_server_that_does_not_answer_is_named_without_the_password(nobody_listens: str) -> None:
    sentence = refused("status", "--database", f"postgresql://ana:s3cret@{nobody_listens}/crm")

    assert sentence.startswith(
        f"The database postgresql://ana:***@{nobody_listens}/crm cannot be opened: connection to server"
    )
    assert "Connection refused" in sentence
    assert "Check that the server is up" in sentence
    assert "s3cret" not in sentence


def test_a_password_that_a_driver_repeats_is_not_printed(nobody_listens: str) -> None:
    sentence = refused("status", "--database", f"postgresql://ana:refused@{nobody_listens}/crm")

    assert "refused" not in sentence
    assert "Connection ***" in sentence


def test_an_option_that_libpq_does_not_know_is_named() -> None:
    assert 'there is no parameter "speed"' in refused("status", "--database", "postgresql://127.0.0.1:1/x?speed=1")


def test_a_role_or_database_that_is_not_there_is_named(postgres_url: str) -> None:
    nobody, nothing = new_name(), new_name()
    stranger = refused("status", "--database", as_user(postgres_url, nobody, "s3cret"))
    assert "cannot be opened" in stranger
    assert nobody in stranger
    assert "s3cret" not in stranger
    assert f'database "{nothing}" does not exist' in refused(
        "status", "--database", postgres_url.replace(urlsplit(postgres_url).path, f"/{nothing}")
    )


def test_a_role_without_rights_is_told_so(postgres_url: str, server: str) -> None:
    with postgres_role(server) as (name, password):
        for command in (("show", "c1"), ("verify",), ("migrate",)):
            sentence = refused(*command, "--database", as_user(postgres_url, name, password))
            assert "Database error: permission denied for " in sentence
            assert "ask their owner to grant both." in sentence
            assert password not in sentence


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ana:s3/cret@127.0.0.1/crm",
        "postgresql://ana:12/s3cret@127.0.0.1/crm",
        "postgresql://ana:s3cret@127.0.0.1:port/crm",
        "postgresql://ana:s3cret@127.0.0.1/",
        "mysql://ana:s3cret@127.0.0.1/crm",
        "ana:s3cret@127.0.0.1/crm",
        "host=127.0.0.1 password=s3cret dbname=crm",
        "host=127.0.0.1 password = 's3 cret' dbname=crm",
    ],
)
def test_a_url_that_cannot_be_used_is_named_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("close_engine.database.binding._binding", None)

    sentence = refused("status", "--database", url)

    assert sentence.startswith("The database URL ")
    assert "cannot be used: " in sentence
    assert "s3" not in sentence
    assert "cret" not in sentence


@pytest.mark.parametrize(
    "shown",
    [
        "sqlite:////var/lib/close_engine.db",
        "sqlite:///close_engine.db",
        "postgresql://ana@db:5432/crm?sslmode=require",
        "postgresql:///crm?host=/run/postgresql",
    ],
)
def test_a_url_without_a_password_is_shown_as_it_is(shown: str) -> None:
    assert without_password(shown) == shown


# -- pipes, terminals and signals ------------------------------------------------------------------------------------


def test_a_table_in_a_pipe_is_plain_text_as_wide_as_it_needs_to_be(conversation_in: Any, database_url: str) -> None:
    reason = "the lead " + "really " * 20 + "means it"
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.close_lost(reason)

    result = process("show", conversation.id, "--database", database_url)

    assert f"close_lost         -       {reason}   -" in result.out
    assert "\x1b" not in result.out


def test_an_output_that_knows_no_such_characters_gets_others(conversation_in: Any, database_url: str) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    conversation.close_lost("zu teuer für ihn ☹")

    result = process(
        "show", conversation.id, "--database", database_url, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )

    assert result.code == 0
    assert "zu teuer f?r ihn ?" in result.out


def test_a_terminal_that_wants_no_colour_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")

    assert "\x1b[3" not in run("--help").out


@pytest.mark.parametrize("command", [("graph",), ("verify",), ("status",)])
def test_a_reader_who_has_seen_enough_is_no_error(database_url: str, command: Any) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = process("--database", database_url, *command, stdout=writer)
    os.close(writer)

    assert result == Result(1, None, "")  # type: ignore[arg-type]


def test_an_output_that_is_full_is_a_sentence() -> None:
    with open("/dev/full", "w") as full:
        result = process("graph", stdout=full)

    assert (result.code, result.err) == (1, "System error: [Errno 28] No space left on device.\n")


@pytest.mark.parametrize("table", ["leads", "users", "clients"])
def test_g8_a_table_name_that_is_not_utf_8_is_a_sentence(
    sqlite_template: Path, monkeypatch: pytest.MonkeyPatch, table: str
) -> None:
    """G8: a name that is not UTF-8, as an option and as Python takes it from the environment."""
    sentence = f"The name of the CRM's {table} table cannot be 'a\\udcff': it contains half of a surrogate pair"
    database = ("--database", f"sqlite:///{sqlite_template}")
    assert refused("status", *database, f"--{table}-table", "a\udcff").startswith(sentence)
    monkeypatch.setenv(f"CLOSE_ENGINE_{table.upper()}_TABLE", "a\udcff")
    assert refused("status", *database).startswith(sentence)


def test_g8_a_full_disk_is_named(sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: SQLite has ended the transaction itself by then, and the rollback that fails must not hide why."""
    file = tmp_path / "full.db"
    file.write_bytes(sqlite_template.read_bytes())
    database = close_engine.connect(f"sqlite:///{file}")
    conversation = close_engine.open_conversation(Lead.create(phone="+15550100"), EntryPoint.SMS_REPLY)
    pages = database.pragma("page_count")  # type: ignore[attr-defined]
    database.close()
    opened = close_engine.database.url._sqlite_options

    def full(*arguments: Any) -> dict[str, Any]:
        options = opened(*arguments)
        return {**options, "pragmas": [*options["pragmas"], ("max_page_count", pages)]}

    monkeypatch.setattr("close_engine.database.url._sqlite_options", full)
    metadata = '{"note": "' + "x" * 60_000 + '"}'

    sentence = refused("fire", conversation.id, "stall", "--metadata", metadata, "--database", f"sqlite:///{file}")

    assert sentence.startswith("Database error: database or disk is full.")
