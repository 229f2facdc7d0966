"""A real CRM database that Prisma made and filled: migrated, worked on, and migrated back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import close_engine
from close_engine import CloseEngineConversation, EntryPoint, Lead, LeadHasNoPhone, Stage, StageChange, User
from close_engine.schema import directory
from close_engine.testing import bring_to
from tests.crm import AFTER, BEFORE, UNSEEN, Catalog, catalog, columns_of, query, restore, rows
from tests.servers import postgres_database
from tests.waiting import LIMIT


@pytest.fixture
def crm_url(server: str) -> Iterator[str]:
    """The CRM's database."""
    with postgres_database(server) as url:
        restore(url, BEFORE)
        yield url


@pytest.fixture(scope="module")
def after(server: str) -> Iterator[Catalog]:
    """What Prisma itself makes of the CRM's schema with the library's tables in it."""
    with postgres_database(server) as url:
        restore(url, AFTER)
        yield catalog(url)


def pwmigrate(url: str, *arguments: str) -> str:
    """Run Peewee's own migration command, without this library."""
    command = [str(Path(sys.executable).with_name("pwmigrate")), url, *arguments, "-d", str(directory())]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def without(described: Catalog, table: str) -> Catalog:
    """Return a catalog without one table and everything that belongs to it."""
    return {
        kind: {name: rest for name, rest in things.items() if not name.startswith(table)}
        for kind, things in described.items()
    }


def test_migrated_to_what_prisma_makes_walked_and_migrated_back(crm_url: str, after: Catalog) -> None:
    before, unseen = catalog(crm_url), catalog(crm_url, UNSEEN)
    old_columns = columns_of(before)
    old_rows = rows(crm_url, old_columns)
    assert [len(old_rows[table]) for table in ("leads", "users", "clients")] == [240, 4, 30]
    database = close_engine.connect(crm_url)

    applied = close_engine.migrate()

    assert applied[0] == "0001_conversations"
    assert catalog(crm_url) == after
    assert rows(crm_url, old_columns) == old_rows
    added = catalog(crm_url, UNSEEN)
    assert set(added["schemas"]) - set(unseen["schemas"]) == {"close_engine"}
    assert added["functions"] == unseen["functions"]
    assert all("close_engine" in name for name in added["triggers"])
    assert close_engine.verify() == []
    assert close_engine.migrate() == []

    walk_all_leads(crm_url)

    assert rows(crm_url, old_columns) == old_rows
    assert catalog(crm_url) == after
    assert close_engine.verify() == []

    assert close_engine.schema.downgrade("0001_conversations") == applied[::-1]
    database.close()

    assert catalog(crm_url) == before
    assert catalog(crm_url, UNSEEN) == unseen
    assert rows(crm_url, old_columns) == old_rows


def walk_all_leads(url: str) -> None:
    """Open a conversation for every lead and bring each to a different stage."""
    reps = list(User.select().order_by(User.id))
    unreachable, expected = [], {}
    for number, lead in enumerate(Lead.select().order_by(Lead.id)):
        stage, rep = list(Stage)[number % len(Stage)], reps[number % len(reps)]
        try:
            conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY, rep=rep, key=f"SM{number}")
        except LeadHasNoPhone as refusal:
            unreachable.append(refusal.lead_id)
        else:
            expected[lead.id] = bring_to(conversation, stage).stage
    assert sorted(unreachable) == [
        lead_id for (lead_id,) in query(url, "SELECT id FROM leads WHERE phone = '' ORDER BY id")
    ]
    assert len(unreachable) == 7
    assert set(expected.values()) == set(Stage)
    stored = query(url, "SELECT lead_id, stage FROM close_engine_conversations")
    assert dict(stored) == expected
    assert len(stored) == 233
    assert {lead.close_conversation.stage for lead in Lead.select() if lead.close_conversation} == set(Stage)
    assert sum(rep.close_engine_conversations.count() for rep in reps) == 233
    newest = {change.lead_id: change.dest for change in StageChange.select().order_by(StageChange.id)}
    assert newest == expected
    assert {lead.close_entry_point for lead in Lead.select() if lead.id in expected} == {EntryPoint.SMS_REPLY}
    assert CloseEngineConversation.select().where(CloseEngineConversation.rep.is_null()).count() == 0


@pytest.mark.parametrize("options", [(), ("-s", "close_engine", "-t", "migrations")], ids=["default", "as-the-library"])
def test_plain_pwmigrate_gives_the_same_tables(crm_url: str, after: Catalog, options: tuple[str, ...]) -> None:
    before, unseen = catalog(crm_url), catalog(crm_url, UNSEEN)
    old_columns = columns_of(before)
    old_rows = rows(crm_url, old_columns)
    if options:  # Peewee writes its log before the first migration can make the schema
        query(crm_url, "CREATE SCHEMA close_engine")

    assert "applied: 0001_conversations" in pwmigrate(crm_url, "up", *options)

    assert without(catalog(crm_url), "schema_migration") == after
    assert rows(crm_url, old_columns) == old_rows
    made_by_pwmigrate = everything_of_ours(crm_url)

    database = close_engine.connect(crm_url)
    assert bool(close_engine.migrate()) is not bool(options)  # it reads the second log as its own
    assert close_engine.verify() == []
    assert everything_of_ours(crm_url) == made_by_pwmigrate
    lead = Lead.select().where(Lead.phone != "").order_by(Lead.id).first()
    bring_to(close_engine.open_conversation(lead, EntryPoint.REP_CLOSE), Stage.COMPLETED)
    database.close()

    if not options:
        query(crm_url, "DROP TABLE close_engine.migrations")  # the library's log, which pwmigrate knows nothing of
    pwmigrate(crm_url, "down", "0001_conversations", *options)

    assert without(catalog(crm_url), "schema_migration") == before
    assert rows(crm_url, old_columns) == old_rows
    left = catalog(crm_url, UNSEEN)
    if options:  # Peewee's log is in it
        assert [name for name, _ in query(crm_url, LISTED)] == ["migrations"]
        query(crm_url, "DROP SCHEMA close_engine CASCADE")
        left = catalog(crm_url, UNSEEN)
    assert left == unseen


LISTED = """
    SELECT relname, relkind::text FROM pg_class
    WHERE relnamespace = 'close_engine'::regnamespace AND relkind IN ('r', 'v', 'p') ORDER BY 1
"""


def everything_of_ours(url: str) -> tuple[Catalog, Catalog, list[tuple[str, ...]]]:
    """Return the library's schema without the log, its triggers in the CRM's, and its functions with their text."""
    functions = (
        "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'close_engine'::regnamespace ORDER BY 1"
    )
    return without(catalog(url, schema="close_engine"), "migrations"), catalog(url, UNSEEN), query(url, functions)
