"""What the documentation says about a CRM's PostgreSQL database is true.

The Prisma models match the tables, the granted rights are enough and not too many, and the queries run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import ActionStatus, ActionType, AutonomyLevel, EntryPoint, Lead, Stage, User, outbox, submit
from close_engine.testing import bring_to
from tests.crm import AFTER, BEFORE, query, restore
from tests.prose import PRISMA, ROOT, block, section
from tests.servers import execute, new_name, postgres_database

OPERATIONS = ROOT / "docs/operations.md"

TYPES = {"String": "text", "Int": "integer", "Json": "jsonb", "DateTime": "timestamp(3) without time zone"}
ACTIONS = {"Cascade": "CASCADE", "SetNull": "SET NULL"}
CRM_TABLES = {"Lead": "leads", "User": "users", "Client": "clients"}


class Field(NamedTuple):
    """A field of a Prisma model."""

    name: str
    type: str
    optional: str
    attributes: str

    @property
    def column(self) -> str:
        mapped = re.search(r'@map\("(\w+)"\)', self.attributes)
        return mapped[1] if mapped else self.name

    @property
    def definition(self) -> str:
        """Return the column as a PostgreSQL dump prints it."""
        text = f"{self.column} {TYPES[self.type]}"
        default = re.search(r'@default\((\d+|now\(\)|"\w+")\)', self.attributes)
        if default:
            text += " DEFAULT " + re.sub('"(.+)"', r"'\1'::text", default[1]).replace("now()", "CURRENT_TIMESTAMP")
        return text if self.optional else f"{text} NOT NULL"


def fields_of(model: str) -> list[Field]:
    return [Field(*found) for found in re.findall(rf"^  (\w+) +({'|'.join(TYPES)})(\??)(.*)$", model, re.MULTILINE)]


def statements_of(model: str, table: str) -> Iterator[str]:
    """Return what Prisma makes of a model, as a PostgreSQL dump prints it."""
    fields = {field.name: field for field in fields_of(model)}
    definitions = ",\n".join(f"    {field.definition}" for field in fields.values())
    yield f"CREATE TABLE public.{table} (\n{definitions}\n);"
    yield f"ALTER TABLE ONLY public.{table}\n    ADD CONSTRAINT {table}_pkey PRIMARY KEY (id);"
    indexes = [("INDEX", name, "idx") for name in re.findall(r"@@index\(\[(\w+)\]\)", model)]
    indexes += [("UNIQUE INDEX", name, "key") for name, field in fields.items() if "@unique" in field.attributes]
    for kind, name, ending in indexes:
        column = fields[name].column
        yield f"CREATE {kind} {table}_{column}_{ending} ON public.{table} USING btree ({column});"
    relations = re.findall(r"(\w+)\?? +@relation\(fields: \[(\w+)\], references: \[id\], onDelete: (\w+)\)", model)
    for target, name, action in relations:
        column = fields[name].column
        yield (
            f"ALTER TABLE ONLY public.{table}\n    ADD CONSTRAINT {table}_{column}_fkey FOREIGN KEY ({column}) "
            f"REFERENCES public.{CRM_TABLES[target]}(id) ON UPDATE CASCADE ON DELETE {ACTIONS[action]};"
        )


MODELS = dict(re.findall(r"^model (\w+) \{\n(.*?)^\}", block(PRISMA, "prisma"), re.MULTILINE | re.DOTALL))
DUMP = re.split(r"(?<=;)\n", AFTER.read_text())


@pytest.mark.parametrize(
    ("model", "table"),
    [("CloseEngineConversation", "close_engine_conversations"), ("PendingAction", "pending_actions")],
)
def test_the_models_are_the_tables_that_prisma_makes(model: str, table: str) -> None:
    assert f'@@map("{table}")' in MODELS[model]

    made = [statement for statement in DUMP if re.match(rf".* public\.{table}\b", statement.partition("\n")[0])]
    assert sorted(made) == sorted(statements_of(MODELS[model], table))


@pytest.mark.parametrize("model", CRM_TABLES)
def test_the_added_fields_are_the_columns_that_prisma_adds(model: str) -> None:
    def columns(dump: list[str]) -> list[str]:
        (made,) = (text for text in dump if text.startswith(f"CREATE TABLE public.{CRM_TABLES[model]} ("))
        return made.removesuffix("\n);").split("\n    ")[1:]

    before = [column.rstrip(",") for column in columns(re.split(r"(?<=;)\n", BEFORE.read_text()))]
    after = [column.rstrip(",") for column in columns(DUMP)]

    assert [field.definition for field in fields_of(MODELS[model])] == after[len(before) :]


def test_the_words_are_those_of_the_enums() -> None:
    rows = re.findall(r"^\| (`.+`) \| (`.+`) \|$", section(PRISMA, "The words that are allowed"), re.MULTILINE)
    shown = {field: words for fields, words in rows for field in fields.split(", ")}

    enums: dict[str, type[Enum]] = {"stage": Stage, "entryPoint": EntryPoint, "autonomyLevel": AutonomyLevel}
    expected = {f"CloseEngineConversation.{field}": enum for field, enum in enums.items()}
    expected |= {"Lead.closeEntryPoint": EntryPoint, "Lead.autonomyLevel": AutonomyLevel}
    expected |= {"Client.autonomyLevel": AutonomyLevel, "PendingAction.type": ActionType}
    expected |= {"PendingAction.status": ActionStatus}
    assert shown == {f"`{field}`": ", ".join(f"`{word.value}`" for word in enum) for field, enum in expected.items()}
    for field in expected:
        model, _, name = field.partition(".")
        assert re.search(rf"^  {name} +String\b", MODELS[model], re.MULTILINE), field


@pytest.fixture
def roles(server: str) -> Iterator[dict[str, str]]:
    """The roles on the page, each mapped to the test's own role without rights."""
    names = {role: new_name() for role in ("crm_owner", "close_worker", "crm_app")}
    for name in names.values():
        execute(server, f"CREATE ROLE {name} LOGIN PASSWORD 'secret'")
    yield names
    for name in names.values():
        execute(server, f"DROP ROLE {name}")


@pytest.fixture
def url(server: str, roles: dict[str, str]) -> Iterator[str]:
    """The CRM's database, which belongs to crm_owner."""
    with postgres_database(server) as url:
        restore(url, BEFORE)
        tables = query(
            url, "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
        )
        execute(url, *(f'ALTER TABLE "{table}" OWNER TO {roles["crm_owner"]}' for (table,) in tables))
        execute(url, f"ALTER SCHEMA public OWNER TO {roles['crm_owner']}")
        yield url


def as_role(url: str, role: str) -> str:
    """Return the same URL for another role."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{role}:secret@{parts.netloc.rpartition('@')[2]}"))


def run_block(url: str, having: str, roles: dict[str, str]) -> None:
    """Run the block of SQL on the page that contains this text, for the test's roles."""
    text = block(PRISMA, "sql", having)
    for role, name in roles.items():
        text = text.replace(role, name)
    execute(url, text)


def test_the_rights_that_the_page_grants_are_enough_and_no_more(url: str, roles: dict[str, str]) -> None:
    run_block(url, "CREATE SCHEMA", roles)
    owner = as_role(url, roles["crm_owner"])
    database = close_engine.connect(owner)
    close_engine.migrate()
    assert close_engine.verify() == []
    database.close()
    run_block(owner, "close_worker", roles)

    database = close_engine.connect(as_role(url, roles["close_worker"]))
    assert close_engine.migrate() == []
    assert close_engine.verify() == []
    rep, lead = User.select().first(), Lead.select().where(Lead.phone != "").first()
    conversation = close_engine.open_conversation(lead, EntryPoint.REP_CLOSE, rep=rep, key="SM1")
    bring_to(conversation, Stage.STALLED).resume(actor="worker-7")
    with close_engine.locked(conversation.id) as held:
        held.close_lost("no answer")
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY)
    bring_to(conversation, Stage.PREVIEW_SENT).record(questions=["budget"], data={"budget": 900})
    conversation.reload()
    link = {"paymentUrl": "https://pay.example.com/1"}
    action = submit(conversation, ActionType.SEND_PAYMENT_LINK, "Here it is.", metadata=link, policy=lambda *_: True)
    action.approve(by="dana")
    outbox.claim(10)[0].sent("SM2")
    assert close_engine.receive(lead, key="SM3", text="Thank you!").answer
    assert close_engine.record_payment(lead, key="evt_1").completed.dest is Stage.COMPLETED
    close_engine.sweep()
    assert rep.close_engine_conversations.count() == 1
    for forbidden in (
        "UPDATE close_engine.history SET actor = 'nobody'",
        "DELETE FROM close_engine.history",
        "INSERT INTO close_engine.transitions VALUES ('conversation', 'undo', 'COMPLETED', 'INITIATED')",
        "DELETE FROM close_engine.outbox",
        "DELETE FROM close_engine_conversations",
        "UPDATE leads SET phone = ''",
    ):
        with pytest.raises(peewee.ProgrammingError, match="permission denied"):
            database.execute_sql(forbidden)
    database.close()


def test_the_queries_of_what_to_watch_run(postgres_url: str, postgres: peewee.Database) -> None:
    bring_to(close_engine.open_conversation(Lead.create(phone="+15550100"), EntryPoint.SMS_REPLY), Stage.BUILDING)
    query(postgres_url, "UPDATE close_engine_conversations SET stage = 'STALLED'")
    conversation = Lead.get().close_conversation
    assert conversation is not None
    outbox.enqueue(conversation, "SEND_MESSAGE", "Are you still there?")

    by_others, waiting = (query(postgres_url, sql) for sql in block(OPERATIONS, "sql", "count(*)").split(";\n\n"))

    assert [(actor.partition(":")[0], trigger, count) for actor, trigger, count in by_others] == [
        ("database", "stall", 1)
    ]
    assert [(status, leased, count) for status, leased, count, *_ in waiting] == [("PENDING", False, 1)]


def test_the_applications_role_needs_no_right_on_our_schema(url: str, roles: dict[str, str]) -> None:
    database = close_engine.connect(url)
    close_engine.migrate()
    lead = Lead.select().where(Lead.phone != "").first()
    conversation = close_engine.open_conversation(lead, EntryPoint.SMS_REPLY)
    database.close()
    app = roles["crm_app"]
    run_block(url, "crm_app", roles)
    write = "UPDATE close_engine_conversations SET stage = %s RETURNING stalled_at IS NOT NULL"

    with pytest.raises(psycopg2.errors.CheckViolation, match=r"close_engine: .* cannot go from INITIATED to BUILDING"):
        query(as_role(url, app), write, ["BUILDING"])
    assert query(as_role(url, app), write, ["STALLED"]) == [(True,)]

    assert [(change.trigger, change.actor) for change in conversation.history()] == [
        ("open", None),
        ("stall", f"database:{app}"),
    ]
    database.close()
