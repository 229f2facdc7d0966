"""Migrating: fresh, over what Prisma pushed, all or nothing, many at once, and downgrading without a trace."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import (
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    InvalidValue,
    Lead,
    SchemaError,
    Stage,
    StageChange,
)
from close_engine.approvals import PendingAction
from close_engine.database.binding import current
from close_engine.schema import directory, downgrade, migration_sql, repair, rows_at_stake, status
from close_engine.testing import bring_to
from tests.crm import AFTER, everything, query, restore
from tests.servers import execute, new_name, postgres_database
from tests.waiting import LIMIT, Running, until

PACKAGE = Path(close_engine.__file__).parent
SCRIPTS = sorted(path.stem for path in directory().glob("[0-9]*.py"))

CRM = """
    CREATE TABLE users (id TEXT NOT NULL PRIMARY KEY, name TEXT);
    CREATE TABLE leads (id TEXT NOT NULL PRIMARY KEY, phone TEXT);
    CREATE TABLE clients (id TEXT NOT NULL PRIMARY KEY);
    INSERT INTO users (id) VALUES ('rep_1');
    INSERT INTO leads (id, phone) VALUES ('lead_1', '+1555'), ('lead_2', '+1556'), ('lead_3', '')
"""

LEFT_ON_SQLITE = {"sqlite_sequence"}  # SQLite's own; it cannot be dropped


@contextmanager
def bound(url: str, **names: Any) -> Iterator[peewee.Database]:
    database = close_engine.connect(url, **names)
    yield database
    database.close()


@pytest.fixture
def crm_url(empty_url: str) -> str:
    """The URL of a database that has a small CRM."""
    query(empty_url, CRM)
    return empty_url


@pytest.fixture(scope="module")
def shared_pushed_url(server: str) -> Iterator[str]:
    """The URL of a CRM's database into which Prisma pushed the library's tables; tests must not change it."""
    with postgres_database(server) as url:
        restore(url, AFTER)
        yield url


@pytest.fixture
def pushed_url(server: str, shared_pushed_url: str) -> Iterator[str]:
    """The URL of a copy of that database, which tests may change."""
    with postgres_database(server, urlsplit(shared_pushed_url).path.removeprefix("/")) as url:
        yield url


def refused(url: str, **names: str) -> SchemaError:
    """Return the error of a migration, and check that it changed nothing."""
    before = everything(url)
    with bound(url, **names), pytest.raises(SchemaError) as caught:
        close_engine.migrate()
    assert everything(url) == before
    assert str(caught.value).startswith("Nothing was changed: ")
    return caught.value


# -- what is there afterwards --------------------------------------------------------------------------------------


def test_a_database_without_a_crm_gets_one_only_when_asked(empty_url: str) -> None:
    refused(empty_url)

    with bound(empty_url) as database:
        assert close_engine.migrate(standalone=True) == SCRIPTS
        assert {"leads", "users", "clients", "close_engine_conversations", "pending_actions"} <= set(
            database.get_tables()
        )
        assert close_engine.verify() == []
        after = everything(empty_url)
        assert close_engine.migrate() == close_engine.migrate(standalone=True) == []
        assert everything(empty_url) == after
        assert [(each.name, each.known) for each in status()] == [(name, True) for name in SCRIPTS]
        assert all(each.applied_at for each in status())
        downgrade(SCRIPTS[0])
        assert set(database.get_tables()) - LEFT_ON_SQLITE == {"leads", "users", "clients"}


def test_the_crms_rows_are_as_they_were_and_the_new_columns_have_their_defaults(crm_url: str) -> None:
    with bound(crm_url):
        close_engine.migrate()

        assert query(crm_url, "SELECT id, phone FROM leads ORDER BY id") == [
            ("lead_1", "+1555"),
            ("lead_2", "+1556"),
            ("lead_3", ""),
        ]
        assert {lead.autonomy_level for lead in Lead.select()} == {AutonomyLevel.FULL_AUTO}
        assert {lead.close_entry_point for lead in Lead.select()} == {None}


def test_ids_may_be_varchar(server: str) -> None:
    with postgres_database(server) as url:
        query(url, CRM)
        query(url, "ALTER TABLE leads ALTER id TYPE varchar(30); ALTER TABLE users ALTER id TYPE varchar")
        with bound(url):
            close_engine.migrate()

            conversation = close_engine.open_conversation("lead_1", EntryPoint.SMS_REPLY, rep="rep_1")
            assert bring_to(conversation, Stage.COMPLETED).lead.id == "lead_1"
            assert close_engine.verify() == []


def test_conversations_that_exist_already_get_one_row_of_history_each(pushed_url: str) -> None:
    query(
        pushed_url,
        """
        INSERT INTO leads (id, first_name, company_name, phone, updated_at)
        SELECT 'lead_' || n, 'Ada', 'Ltd', '+1555', now() FROM generate_series(1, 11) n;
        INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, created_at, updated_at)
        SELECT 'c' || n, 'lead_' || n, 'SMS_REPLY', stage, '2026-01-01', '2026-01-02 03:04:05.678'
        FROM unnest(%s) WITH ORDINALITY AS stages (stage, n)
        """,
        ([stage.value for stage in Stage],),
    )
    rows = "SELECT * FROM close_engine_conversations ORDER BY id"
    before = query(pushed_url, rows)

    with bound(pushed_url):
        close_engine.migrate()

        assert query(pushed_url, rows) == before
        changes = list(StageChange.select())
        assert {change.trigger for change in changes} == {"adopted"}
        assert {change.source for change in changes} == {None}
        assert sorted(change.dest for change in changes) == sorted(Stage)
        unstamped = ["PAYMENT_SENT", "COMPLETED", "STALLED", "CLOSED_LOST"]
        assert [problem.split(",")[1] for problem in close_engine.verify()] == [
            f" the stage is {stage} and {column} is empty: set it"
            for stage, column in zip(
                unstamped, ["payment_link_sent_at", "completed_at", "stalled_at", "closed_lost_at"], strict=True
            )
        ]
        assert len(repair()) == 4
        assert close_engine.verify() == []
        stalled = CloseEngineConversation.get(CloseEngineConversation.stage == Stage.STALLED)
        assert stalled.resume().dest is Stage.QUALIFYING  # nobody recorded where it stalled
        assert [change.trigger for change in stalled.history()] == ["adopted", "resume"]
        downgrade(SCRIPTS[0])
    assert len(query(pushed_url, rows)) == 11


# -- what Prisma pushed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing",
    [
        "",
        "DROP TABLE pending_actions",
        "DROP TABLE close_engine_conversations",
        "ALTER TABLE leads DROP qualification_data",
        "ALTER TABLE leads DROP qualification_data, DROP close_entry_point",
        "ALTER TABLE clients DROP autonomy_level; DROP TABLE close_engine_conversations, pending_actions",
    ],
)
def test_what_prisma_pushed_is_adopted_and_stays_when_migrated_back(pushed_url: str, missing: str) -> None:
    pushed = everything(pushed_url)
    if missing:
        query(pushed_url, missing)
    before = everything(pushed_url)

    with bound(pushed_url):
        close_engine.migrate()

        assert everything(pushed_url)[0]["public"][0] == pushed[0]["public"][0]
        assert close_engine.verify() == []
        downgrade(SCRIPTS[0])
    assert everything(pushed_url) == before


STAGES = ", ".join(Stage)

#: Differences from what Prisma makes, and the sentences that report them.
MISMATCHES = [
    (
        "ALTER TABLE close_engine_conversations DROP stalled_at",
        'column close_engine_conversations.stalled_at is missing; expected "stalled_at" timestamp(3) without time zone',
    ),
    (
        "ALTER TABLE pending_actions DROP draft_message",
        'column pending_actions.draft_message is missing; expected "draft_message" text NOT NULL',
    ),
    (
        "ALTER TABLE close_engine_conversations ALTER stalled_at TYPE timestamptz",
        "column close_engine_conversations.stalled_at is timestamp with time zone; "
        "expected timestamp(3) without time zone",
    ),
    (
        "ALTER TABLE close_engine_conversations ALTER updated_at TYPE timestamp",
        "column close_engine_conversations.updated_at is timestamp without time zone not null; "
        "expected timestamp(3) without time zone not null",
    ),
    (
        "ALTER TABLE close_engine_conversations ALTER collected_data TYPE json",
        "column close_engine_conversations.collected_data is json; expected jsonb",
    ),
    (
        "CREATE TYPE \"Action\" AS ENUM ('SEND_MESSAGE'); "
        'ALTER TABLE pending_actions ALTER type TYPE "Action" USING type::"Action"',
        'column pending_actions.type is "Action" not null; expected text not null',
    ),
    (
        "ALTER TABLE leads ALTER qualification_data TYPE text",
        "column leads.qualification_data is text; expected jsonb",
    ),
    (
        "ALTER TABLE close_engine_conversations ALTER stage DROP DEFAULT",
        "column close_engine_conversations.stage is text not null; expected text not null default 'INITIATED'::text",
    ),
    (
        "ALTER TABLE clients ALTER autonomy_level SET DEFAULT 'MANUAL'",
        "column clients.autonomy_level is text not null default 'MANUAL'::text; "
        "expected text not null default 'FULL_AUTO'::text",
    ),
    (
        "ALTER TABLE close_engine_conversations ALTER updated_at SET DEFAULT now()",
        "column close_engine_conversations.updated_at is timestamp(3) without time zone not null default now(); "
        "expected timestamp(3) without time zone not null",
    ),
    (
        "ALTER TABLE close_engine_conversations ALTER rep_id SET NOT NULL",
        "column close_engine_conversations.rep_id is text not null; expected text",
    ),
    (
        "ALTER TABLE leads ALTER autonomy_level DROP NOT NULL",
        "column leads.autonomy_level is text default 'FULL_AUTO'::text; "
        "expected text not null default 'FULL_AUTO'::text",
    ),
    (
        "DROP INDEX close_engine_conversations_created_at_idx",
        "close_engine_conversations should have an index close_engine_conversations_created_at_idx on created_at",
    ),
    (
        "DROP INDEX close_engine_conversations_lead_id_key; "
        "CREATE INDEX close_engine_conversations_lead_id_key ON close_engine_conversations (lead_id)",
        "close_engine_conversations should have a unique index close_engine_conversations_lead_id_key on lead_id",
    ),
    (
        "DROP INDEX pending_actions_status_idx; "
        "CREATE INDEX pending_actions_status_idx ON pending_actions (status) WHERE status = 'PENDING'",
        "pending_actions should have an index pending_actions_status_idx on status",
    ),
    (
        "ALTER INDEX pending_actions_status_idx RENAME TO status",
        "pending_actions should have an index pending_actions_status_idx on status",
    ),
    (
        "ALTER TABLE pending_actions DROP CONSTRAINT pending_actions_pkey",
        "pending_actions should have a unique index pending_actions_pkey on id",
    ),
    (
        "ALTER TABLE close_engine_conversations DROP CONSTRAINT close_engine_conversations_rep_id_fkey",
        "close_engine_conversations should have a foreign key close_engine_conversations_rep_id_fkey "
        "from rep_id to users(id) ON DELETE SET NULL ON UPDATE CASCADE",
    ),
    (
        "ALTER TABLE close_engine_conversations DROP CONSTRAINT close_engine_conversations_lead_id_fkey, "
        "ADD CONSTRAINT close_engine_conversations_lead_id_fkey FOREIGN KEY (lead_id) REFERENCES leads(id)",
        "close_engine_conversations should have a foreign key close_engine_conversations_lead_id_fkey "
        "from lead_id to leads(id) ON DELETE CASCADE ON UPDATE CASCADE",
    ),
    (
        "ALTER TABLE close_engine_conversations ADD brand text NOT NULL",
        "column close_engine_conversations.brand is not null, has no default, and close_engine does not know it; "
        "make it nullable or give it a default",
    ),
    (
        "INSERT INTO leads (id, first_name, company_name, phone, updated_at) VALUES ('l', '', '', '', now()); "
        "INSERT INTO close_engine_conversations (id, lead_id, entry_point, stage, updated_at) "
        "VALUES ('c1', 'l', 'SMS_REPLY', 'WON', now())",
        f"1 row of close_engine_conversations ('c1') with the unknown stage 'WON'; change it to one of {STAGES}",
    ),
]


@pytest.mark.parametrize(("change", "sentence"), MISMATCHES)
def test_what_prisma_pushed_is_refused_where_it_differs_and_nothing_is_changed(
    shared_pushed_url: str, change: str, sentence: str
) -> None:
    with bound(shared_pushed_url) as database, database.atomic() as transaction:
        query(database, change)
        before = everything(database)

        with pytest.raises(SchemaError) as caught:
            close_engine.migrate()

        assert caught.value.problems == [sentence]
        assert everything(database) == before
        transaction.rollback()


def test_every_mismatch_is_told_at_once(pushed_url: str) -> None:
    changes = [MISMATCHES[number] for number in (0, 8, 15)]
    for change, _ in changes:
        query(pushed_url, change)

    error = refused(pushed_url)

    assert set(error.problems) == {sentence for _, sentence in changes}
    assert str(error).splitlines() == [
        "Nothing was changed: the existing tables do not match what close_engine needs; fix these and migrate again:",
        *(f"  - {problem}" for problem in error.problems),
    ]


def test_a_column_more_that_need_not_be_given_is_no_mismatch(pushed_url: str) -> None:
    query(
        pushed_url,
        "ALTER TABLE close_engine_conversations ADD brand text, ADD rank int NOT NULL DEFAULT 0, "
        "ADD number int GENERATED ALWAYS AS IDENTITY, ADD twice int GENERATED ALWAYS AS (edit_rounds * 2) STORED",
    )
    with bound(pushed_url):
        close_engine.migrate()
        assert close_engine.verify() == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "ALTER TABLE close_engine_conversations DROP edit_rounds",
            "column close_engine_conversations.edit_rounds is missing; "
            'expected "edit_rounds" INTEGER NOT NULL DEFAULT 0',
        ),
        (
            "ALTER TABLE close_engine_conversations ADD brand TEXT NOT NULL",
            "column close_engine_conversations.brand is not null, has no default, and close_engine does not know it; "
            "make it nullable or give it a default",
        ),
        (
            "DROP INDEX pending_actions_status_idx",
            "pending_actions should have an index pending_actions_status_idx on status",
        ),
        (
            "DROP TABLE pending_actions; "
            "CREATE TABLE pending_actions (id TEXT NOT NULL, conversation_id TEXT NOT NULL, lead_id TEXT NOT NULL, "
            "type TEXT NOT NULL, draft_message TEXT, metadata TEXT, status TEXT NOT NULL, "
            "approved_by TEXT, approved_at TEXT, expires_at TEXT, created_at TEXT NOT NULL); "
            "CREATE INDEX pending_actions_status_idx ON pending_actions (status); "
            "CREATE INDEX pending_actions_lead_id_idx ON pending_actions (lead_id); "
            "CREATE INDEX pending_actions_conversation_id_idx ON pending_actions (conversation_id)",
            "column pending_actions.draft_message is TEXT; expected text not null\n"
            "pending_actions should have a unique index pending_actions_pkey on id",
        ),
        (
            "REFERENCES",
            "close_engine_conversations should have a foreign key close_engine_conversations_rep_id_fkey "
            "from rep_id to users(id) ON DELETE SET NULL ON UPDATE CASCADE",
        ),
    ],
)
def test_on_sqlite_names_nullability_and_references_must_match(tmp_path: Path, change: str, sentence: str) -> None:
    with bound(f"sqlite:///{tmp_path}/made.db"):
        close_engine.migrate(standalone=True)
    there = f"sqlite:///{tmp_path}/pushed.db"
    made = query(
        f"sqlite:///{tmp_path}/made.db",
        "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND type <> 'trigger' AND tbl_name IN "
        "('users', 'leads', 'clients', 'pending_actions', 'close_engine_conversations') ORDER BY type DESC",
    )
    statements = [statement for (statement,) in made]
    if change == "REFERENCES":
        statements = [statement.replace("ON DELETE SET NULL", "") for statement in statements]
    else:
        statements.append(change)
    query(
        there,
        ";\n".join(["SELECT 1", *statements]).replace("ADD brand TEXT NOT NULL", "ADD brand TEXT NOT NULL DEFAULT ''"),
    )
    if "brand" in change:  # SQLite cannot add such a column, only create a table with it
        query(there, "PRAGMA writable_schema = 1; UPDATE sqlite_master SET sql = replace(sql, ' DEFAULT ''''', '')")

    assert "\n".join(refused(there).problems) == sentence


def test_on_sqlite_what_is_there_is_adopted_and_stays(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/crm.db"
    with bound(url) as database:
        close_engine.migrate(standalone=True)
        database.execute_sql("DELETE FROM close_engine_created")
        downgrade(SCRIPTS[0])
        before = everything(url)
        assert [name for kind, name, *_ in before if kind == "table"] == [
            "clients",
            "close_engine_conversations",
            "leads",
            "pending_actions",
            "users",
        ]

        assert close_engine.migrate() == SCRIPTS
        assert close_engine.verify() == []
        downgrade(SCRIPTS[0])
        assert everything(url) == before


# -- a missing CRM -------------------------------------------------------------------------------------------------


def test_missing_tables_are_told_with_what_was_found_and_how_to_name_them(empty_url: str) -> None:
    query(empty_url, 'CREATE TABLE "Lead" (id TEXT PRIMARY KEY); CREATE TABLE "User" (id TEXT PRIMARY KEY)')
    place = "" if empty_url.startswith("sqlite") else " in schema public"

    assert refused(empty_url, users="User").problems == [
        f"the CRM's leads table was not found as 'leads'{place}: name it with "
        "connect(..., leads=...) or the environment variable CLOSE_ENGINE_LEADS_TABLE",
        f"the CRM's clients table was not found as 'clients'{place}: name it with "
        "connect(..., clients=...) or the environment variable CLOSE_ENGINE_CLIENTS_TABLE",
        f"the tables found{place} are: Lead, User; if this database has no CRM, create minimal tables with "
        "close-engine migrate --standalone",
    ]
    assert "the tables found" in str(refused(empty_url, leads="lead", users="USER", clients="Client"))


def test_a_schema_that_is_not_there_is_told(server: str) -> None:
    with postgres_database(server) as url:
        query(url, CRM)

        with bound(f"{url}&schema=crm"), pytest.raises(SchemaError) as caught:
            close_engine.migrate()

        assert caught.value.problems[-1] == (
            'the tables found in schema "crm" are: none; if this database has no CRM, create minimal tables '
            "with close-engine migrate --standalone"
        )


def test_an_id_that_is_no_text_is_told(crm_url: str) -> None:
    query(
        crm_url,
        "DROP TABLE leads; CREATE TABLE leads (id INTEGER PRIMARY KEY); "
        "DROP TABLE clients; CREATE TABLE clients (x TEXT)",
    )
    integer = "INTEGER" if crm_url.startswith("sqlite") else "integer"

    assert refused(crm_url).problems == [
        f"column leads.id is {integer}; expected text or varchar, like a String in Prisma",
        "the CRM's clients table 'clients' has no column id; expected one of type text or varchar",
    ]


# -- all or nothing ------------------------------------------------------------------------------------------------

FAILING = """
def up(migrator, db):
    db.execute_sql("CREATE TABLE half_done (id TEXT)")
    db.execute_sql("SELECT nothing_such")
"""

MIGRATE = """
import sys, close_engine
close_engine.connect(sys.argv[1])
try:
    print(close_engine.migrate())
except close_engine.SchemaError as error:
    print(error)
"""


def in_an_installation(place: Path, url: str) -> str:
    """Migrate with a package laid out as pip installs it, with the migrations inside, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", MIGRATE, url],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT,
    )
    return done.stdout


@pytest.fixture
def installation(tmp_path: Path) -> Path:
    place = tmp_path / "site-packages"
    shutil.copytree(PACKAGE, place / "close_engine", ignore=shutil.ignore_patterns("__pycache__", "migrations"))
    shutil.copytree(directory(), place / "close_engine" / "migrations", ignore=shutil.ignore_patterns("__pycache__"))
    return place


def test_an_installed_package_finds_its_scripts_and_undoes_everything_when_one_fails(
    crm_url: str, installation: Path
) -> None:
    script = installation / "close_engine" / "migrations" / "0099_fails.py"
    script.write_text(FAILING)
    before = everything(crm_url)

    told = in_an_installation(installation, crm_url)

    assert told.startswith("Nothing was changed: the database refused a statement (")
    assert "nothing_such" in told
    assert everything(crm_url) == before

    script.unlink()
    assert in_an_installation(installation, crm_url) == f"{SCRIPTS}\n"

    script.write_text(FAILING)
    migrated = everything(crm_url)
    in_an_installation(installation, crm_url)
    assert everything(crm_url) == migrated


def test_a_migration_that_a_newer_version_applied_is_known_by_its_name(crm_url: str) -> None:
    with bound(crm_url) as database:
        close_engine.migrate()
        schema = "close_engine_" if crm_url.startswith("sqlite") else "close_engine."
        query(crm_url, f"INSERT INTO {schema}migrations (name, applied) VALUES ('0999_later', '2026-01-01 00:00:00')")

        assert close_engine.migrate() == []
        assert (status()[-1].name, status()[-1].known) == ("0999_later", False)
        before = everything(crm_url)
        with pytest.raises(SchemaError) as caught:
            downgrade()
        assert str(caught.value) == ('Nothing was changed: cannot revert "0999_later": migration file is missing.')
        with pytest.raises(SchemaError, match='"0000_never" is not an applied migration'):
            downgrade("0000_never")
        assert everything(crm_url) == before
        assert not database.in_transaction()


ROLE = new_name()


@pytest.fixture
def role(server: str) -> Iterator[str]:
    """A role that may only connect."""
    execute(server, f"CREATE ROLE {ROLE} LOGIN")
    yield ROLE
    execute(server, f"DROP ROLE {ROLE}")


@pytest.fixture
def role_url(role: str, server: str) -> Iterator[tuple[str, str]]:
    """The URL of a CRM's database, for its owner and for the role."""
    with postgres_database(server) as url:
        query(url, CRM)
        yield url, url.replace("//postgres:@", f"//{role}:@")


def test_a_role_without_the_rights_changes_nothing(role_url: tuple[str, str]) -> None:
    url, as_role = role_url
    before = everything(url)

    with bound(as_role), pytest.raises(SchemaError) as caught:
        close_engine.migrate()
    assert str(caught.value).startswith(
        "Nothing was changed: the database refused a statement (permission denied for database "
    )

    # It gets further with every right. (Before PostgreSQL 15, everybody could create tables in public.)
    execute(url, f"CREATE SCHEMA close_engine AUTHORIZATION {ROLE}", "REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    before = everything(url)
    for denied, grant in (
        ("schema public", "GRANT ALL ON SCHEMA public TO"),
        ("table leads", "GRANT ALL ON users, leads, clients TO"),
    ):
        with bound(as_role), pytest.raises(SchemaError, match=f"permission denied for {denied}|must be owner"):
            close_engine.migrate()
        assert everything(url) == before
        execute(url, f"{grant} {ROLE}")


def test_a_schema_that_was_made_beforehand_needs_no_right_to_make_one_and_stays(role_url: tuple[str, str]) -> None:
    url, as_role = role_url
    execute(
        url,
        f"CREATE SCHEMA close_engine AUTHORIZATION {ROLE}",
        f"GRANT ALL ON SCHEMA public TO {ROLE}",
        *(f"ALTER TABLE {table} OWNER TO {ROLE}" for table in ("leads", "users", "clients")),
    )
    before = everything(url)

    with bound(as_role):
        assert close_engine.migrate() == SCRIPTS
        assert close_engine.verify() == []
        bring_to(close_engine.open_conversation("lead_1", EntryPoint.SMS_REPLY), Stage.COMPLETED)
        assert downgrade(SCRIPTS[0]) == SCRIPTS[::-1]
        assert everything(url) == before
        assert close_engine.migrate() == SCRIPTS


# -- many at once --------------------------------------------------------------------------------------------------


def migrate_at_once(url: str, barrier: Any, results: Any) -> None:
    """Migrate in one of the processes, and report what was applied, or the error."""
    database = close_engine.connect(url)
    barrier.wait(LIMIT)
    try:
        results.put(close_engine.migrate(standalone=True))
    except Exception as error:
        results.put(repr(error))
    database.close()


def test_of_eight_processes_at_once_one_migrates_and_all_succeed(empty_url: str) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(8), context.Queue()
    processes = [context.Process(target=migrate_at_once, args=(empty_url, barrier, results)) for _ in range(8)]
    for process in processes:
        process.start()
    told = [results.get(timeout=LIMIT) for _ in processes]
    for process in processes:
        process.join(LIMIT)
    assert [process.exitcode for process in processes] == [0] * 8

    assert sorted(told, key=len) == [[]] * 7 + [SCRIPTS]
    with bound(empty_url):
        assert close_engine.verify() == []


# -- as a script ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("standalone", [False, True])
def test_the_printed_script_does_what_migrating_does_and_printing_it_leaves_no_trace(
    empty_url: str, server: str, tmp_path: Path, standalone: bool
) -> None:
    if not standalone:
        query(empty_url, CRM)
    before = everything(empty_url)
    with bound(empty_url):
        script = ";\n".join(migration_sql(standalone=standalone))
    assert everything(empty_url) == before

    @contextmanager
    def another() -> Iterator[str]:
        if empty_url.startswith("sqlite"):
            yield f"sqlite:///{tmp_path}/another.db"
        else:
            with postgres_database(server) as url:
                yield url

    with another() as url:
        if not standalone:
            query(url, CRM)
        query(url, script)
        with bound(empty_url):
            close_engine.migrate(standalone=standalone)
        assert everything(url) == everything(empty_url)
        with bound(url):
            assert close_engine.verify() == []
            assert close_engine.migrate() == migration_sql() == []
            lead = Lead.create(phone="+1557")
            bring_to(close_engine.open_conversation(lead, EntryPoint.SMS_REPLY), Stage.COMPLETED)
            downgrade(SCRIPTS[0])
        with bound(empty_url):
            downgrade(SCRIPTS[0])
        assert everything(url) == everything(empty_url)


def test_the_printed_script_quotes_names_and_values(server: str) -> None:
    names = {"leads": 'it\'s "leads"', "users": "?", "clients": "a;b"}
    with postgres_database(server) as url, postgres_database(server) as other:
        with bound(url, **names):
            script = ";\n".join(migration_sql(standalone=True))
        query(other, script)
        with bound(other, **names):
            assert close_engine.migrate() == []
            assert close_engine.verify() == []


def test_the_printed_script_has_no_statements_of_other_threads(postgres_url: str) -> None:
    with bound(postgres_url) as database:
        downgrade(SCRIPTS[0])
        stop = threading.Event()
        written: list[int] = []

        def write() -> None:
            while not stop.is_set():
                database.execute_sql("CREATE TEMPORARY TABLE IF NOT EXISTS another_threads (id int)")
                written.append(1)

        def script_while_another_writes() -> str | None:
            before = len(written)
            script = "".join(migration_sql())
            return script if len(written) > before else None

        other = Running(write)
        try:
            script = until(script_while_another_writes, "another thread writes while the script is made")
        finally:
            stop.set()
        assert other.result() is None
        assert script is not None

    assert "close_engine_conversations" in script
    assert "another_threads" not in script


def test_a_script_that_cannot_be_run_is_refused_with_the_same_sentence(empty_url: str) -> None:
    with bound(empty_url) as database:
        with pytest.raises(SchemaError, match="not found as 'leads'"):
            migration_sql()
        assert database.query_hooks == []
        assert not database.in_transaction()


# -- downgrading ---------------------------------------------------------------------------------------------------


def test_every_step_back_can_be_taken_alone_and_again(crm_url: str) -> None:
    before = everything(crm_url)
    with bound(crm_url):
        close_engine.migrate()
        migrated = everything(crm_url)
        for steps in range(1, len(SCRIPTS) + 1):
            assert [downgrade() for _ in range(steps)] == [[name] for name in SCRIPTS[: -steps - 1 : -1]]
            pending = [each.name for each in status() if each.applied_at is None]
            assert pending == SCRIPTS[-steps:]
            if steps == len(SCRIPTS):
                assert everything(crm_url) == before
            assert close_engine.migrate() == SCRIPTS[-steps:]
            assert everything(crm_url) == migrated
        assert downgrade(SCRIPTS[1]) == SCRIPTS[:0:-1]
        assert downgrade() == SCRIPTS[:1]
        assert downgrade() == []
    assert everything(crm_url) == before


def test_migrating_back_and_again_adopts_the_conversations_that_prisma_keeps(pushed_url: str) -> None:
    query(
        pushed_url,
        "INSERT INTO leads (id, first_name, company_name, phone, updated_at) VALUES ('lead_1', '', '', '+1', now())",
    )
    with bound(pushed_url):
        close_engine.migrate()
        conversation = bring_to(close_engine.open_conversation("lead_1", EntryPoint.SMS_REPLY), Stage.BUILDING)
        downgrade(SCRIPTS[0])
        close_engine.migrate()

        assert [(change.trigger, change.dest) for change in conversation.history()] == [("adopted", Stage.BUILDING)]
        assert close_engine.verify() == []


def test_what_depends_on_ours_is_not_dropped(server: str) -> None:
    with postgres_database(server) as url:
        query(url, CRM)
        with bound(url):
            close_engine.migrate()
            query(url, "CREATE VIEW pipeline AS SELECT stage, count(*) FROM close_engine_conversations GROUP BY stage")
            before = everything(url)

            with pytest.raises(SchemaError, match="cannot drop table close_engine_conversations because other objects"):
                downgrade(SCRIPTS[0])

            assert everything(url) == before
            assert close_engine.verify() == []


def test_what_a_rollback_would_lose_is_counted(crm_url: str) -> None:
    with bound(crm_url):
        assert rows_at_stake() == {}
        close_engine.migrate()
        assert rows_at_stake(SCRIPTS[0]) == {}

        Lead.update(autonomy_level=AutonomyLevel.MANUAL).where(Lead.id != "lead_3").execute()
        bring_to(close_engine.open_conversation("lead_1", EntryPoint.SMS_REPLY), Stage.QUALIFYING)
        PendingAction.create(conversation_id="c", lead_id="l", type="SEND_MESSAGE", draft_message="Hi")

        history, numbers = (
            f"close_engine_{name}" if crm_url.startswith("sqlite") else f"close_engine.{name}"
            for name in ("history", "numbers")
        )
        assert rows_at_stake(SCRIPTS[-1]) == rows_at_stake() == {}
        assert rows_at_stake(SCRIPTS[0]) == {
            "close_engine_conversations": 1,
            history: 2,
            numbers: 1,
            "leads.autonomy_level": 2,
            "leads.close_entry_point": 1,
            "pending_actions": 1,
        }
        downgrade(SCRIPTS[0])
        assert rows_at_stake() == {}


def test_what_prisma_made_is_not_at_stake(pushed_url: str) -> None:
    query(
        pushed_url,
        "INSERT INTO leads (id, first_name, company_name, phone, updated_at) VALUES ('lead_1', '', '', '+1', now())",
    )
    with bound(pushed_url):
        close_engine.migrate()
        close_engine.open_conversation("lead_1", EntryPoint.SMS_REPLY)

        assert rows_at_stake(SCRIPTS[0]) == {"close_engine.history": 1, "close_engine.numbers": 1}


# -- the SQL files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(directory().glob("*.sql")), ids=lambda file: file.name)
def test_a_file_is_whole_and_its_comments_hold_nothing_that_is_replaced(file: Path) -> None:
    """A name with a newline in it, put into a comment, would end the comment."""
    text = file.read_text()
    assert sqlite3.complete_statement(text)
    comments = "".join(re.findall(r"--.*", text))
    assert [name for name in ("public.", '"leads"', '"users"', "%") if name in comments] == []


# Names that would break a statement if they were put into it as they are, or before what else is replaced.
ODD_NAMES = [
    "Lead",
    'Lead"s',
    "100% {leads}",
    "%s",
    "public.leads",
    "a;\nb",
    '"leads"',
    "select",
    "leads--",
    "$body$",
    "l'",
]


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_script_takes_the_crms_name_of_its_table_of_leads(
    empty_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str
) -> None:
    """Of the environment, too, where nothing but Peewee's own runner is at work."""
    copied = shutil.copy(directory() / f"{script}.py", tmp_path)
    probe = "CREATE TABLE found AS SELECT phone, '%' AS percent FROM \"leads\" WHERE id = 'lead_2';\n"
    (tmp_path / "probe.sqlite.sql").write_text(probe)
    (tmp_path / "probe.postgresql.sql").write_text(
        "CREATE FUNCTION probe() RETURNS TABLE (phone text, percent text) LANGUAGE sql AS $body$\n"
        "SELECT phone, '%' FROM public.\"leads\" WHERE id = 'lead_2'\n$body$;\n"
        "CREATE TABLE found AS SELECT * FROM public.probe(); DROP FUNCTION probe();"
    )
    run = runpy.run_path(str(copied))["run"]
    quoted = '"' + name.replace('"', '""') + '"'
    query(empty_url, f"{CRM}; ALTER TABLE leads RENAME TO {quoted}")
    with bound(empty_url, leads=name) as database:
        run(database, "probe")
        assert database.execute_sql("SELECT * FROM found").fetchall() == [("+1556", "%")]
        database.execute_sql("DROP TABLE found")

        del database.close_engine_tables  # type: ignore[attr-defined]
        monkeypatch.setenv("CLOSE_ENGINE_LEADS_TABLE", name)
        run(database, "probe")
        assert database.execute_sql("SELECT * FROM found").fetchall() == [("+1556", "%")]


def test_the_scripts_run_their_files_in_the_same_way() -> None:
    runs = {
        re.findall(r"^def run.*?^def up", (directory() / f"{script}.py").read_text(), re.M | re.S)[0]
        for script in SCRIPTS[1:]
    }
    assert len(runs) == 1


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_statement_of_the_library_takes_that_name_too(crm_url: str, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    query(crm_url, f"ALTER TABLE leads RENAME TO {quoted}")
    with bound(crm_url, leads=name):
        close_engine.migrate()
        assert close_engine.verify() == []
        found = (
            current().execute("SELECT l.id, {moment} IS NULL FROM {leads} l WHERE l.phone = %s", ["+1556"]).fetchall()
        )
        assert [row[0] for row in found] == ["lead_2"]


# -- the lock ------------------------------------------------------------------------------------------------------

SOON = timedelta(milliseconds=20)


@pytest.fixture
def held(empty_url: str) -> Iterator[Any]:
    """Another connection, which holds the migration lock."""
    if empty_url.startswith("sqlite"):
        holder = sqlite3.connect(empty_url.removeprefix("sqlite:///"), isolation_level=None)
        holder.execute("PRAGMA journal_mode = wal")
        holder.execute("BEGIN IMMEDIATE")
    else:
        holder = psycopg2.connect(empty_url)
        holder.cursor().execute("SELECT pg_advisory_xact_lock(hashtext('close_engine.migrate'))")
    yield holder
    holder.close()


WAITING: dict[str, Callable[[timedelta], object]] = {
    "migrate": lambda timeout: close_engine.migrate(standalone=True, lock_timeout=timeout),
    "migration_sql": lambda timeout: migration_sql(standalone=True, lock_timeout=timeout),
    "downgrade": lambda timeout: downgrade(lock_timeout=timeout),
    "rows_at_stake": lambda timeout: rows_at_stake(lock_timeout=timeout),
}


@pytest.mark.parametrize("what", WAITING)
def test_whoever_waits_too_long_for_the_lock_is_told_who_holds_it(empty_url: str, held: Any, what: str) -> None:
    with bound(empty_url) as database:
        with pytest.raises(SchemaError) as caught:
            WAITING[what](SOON)

        told = str(caught.value)
        if empty_url.startswith("sqlite"):
            held.rollback()
            assert told == (
                "Nothing was changed: another process has been writing to this SQLite file for 0.02 seconds. "
                "End it, or wait longer with lock_timeout (--lock-timeout)."
            )
            assert database.execute_sql("PRAGMA busy_timeout").fetchone() == (60000,)
        else:
            pid = held.info.backend_pid
            assert told.startswith(
                "Nothing was changed: the migration lock was not free for 0.02 seconds. It is held by process "
                f"{pid} of the role postgres, since 20"
            )
            assert told.endswith(f"If not, end it: SELECT pg_catalog.pg_terminate_backend({pid}).")
            database.execute_sql(re.findall(r"SELECT pg_catalog.*\)", told)[0])
        assert not database.in_transaction()
        WAITING[what](timedelta(minutes=1))


def test_the_sessions_own_lock_timeout_is_kept(postgres: peewee.Database, postgres_url: str) -> None:
    shown = "SHOW lock_timeout"
    postgres.execute_sql("SET lock_timeout = '7s'")
    with close_engine.atomic():
        rows_at_stake()
        assert postgres.execute_sql(shown).fetchone() == ("7s",)
        holder = psycopg2.connect(postgres_url)
        holder.cursor().execute("SELECT pg_advisory_xact_lock(hashtext('close_engine.migrate'))")
        with pytest.raises(SchemaError, match="migration lock"):
            rows_at_stake(lock_timeout=SOON)
        holder.close()
        assert postgres.execute_sql(shown).fetchone() == ("7s",)
    assert postgres.execute_sql(shown).fetchone() == ("7s",)


def test_a_holder_of_another_role_is_named_as_far_as_it_can_be_seen(server: str, role: str) -> None:
    with postgres_database(server) as url:
        execute(url, CRM, f"GRANT CREATE ON SCHEMA public TO {role}")
        holder = psycopg2.connect(url)
        holder.cursor().execute("SELECT pg_advisory_xact_lock(hashtext('close_engine.migrate'))")
        with bound(url.replace("//postgres:@", f"//{role}:@")), pytest.raises(SchemaError) as caught:
            close_engine.migrate(lock_timeout=SOON)
        holder.close()
        assert re.search(r"held by process \d+ of the role postgres\. If that is a migration, wait", str(caught.value))
        execute(url, f"DROP OWNED BY {role}")


def test_all_who_share_the_lock_are_named(postgres_url: str) -> None:
    holders = [psycopg2.connect(postgres_url) for _ in range(2)]
    for holder in holders:
        holder.cursor().execute("SELECT pg_advisory_xact_lock_shared(hashtext('close_engine.migrate'))")
    with bound(postgres_url), pytest.raises(SchemaError) as caught:
        downgrade(lock_timeout=SOON)
    for holder in holders:
        assert f"pg_terminate_backend({holder.info.backend_pid})" in str(caught.value)
        holder.close()


@pytest.mark.parametrize("what", WAITING)
def test_a_lock_timeout_is_longer_than_nothing(empty_url: str, what: str) -> None:
    with bound(empty_url):
        for timeout in (timedelta(0), timedelta(seconds=-1)):
            with pytest.raises(InvalidValue, match="it must be greater than zero"):
                WAITING[what](timeout)


def test_a_very_long_lock_timeout_is_taken(empty_url: str) -> None:
    with bound(empty_url):
        assert close_engine.migrate(standalone=True, lock_timeout=timedelta.max) == SCRIPTS


# -- in the caller's transaction -----------------------------------------------------------------------------------


def test_downgrade_is_refused_where_a_transaction_is_open(crm_url: str) -> None:
    with bound(crm_url) as database:
        close_engine.migrate()
        before = everything(crm_url)
        for transaction in (close_engine.atomic, database.atomic):
            with transaction():
                with pytest.raises(SchemaError, match=r"Nothing was changed: .* End the transaction first\."):
                    downgrade(SCRIPTS[0])
                assert rows_at_stake(SCRIPTS[0]) == {}
        assert everything(crm_url) == before
        assert downgrade(SCRIPTS[0]) == SCRIPTS[::-1]
