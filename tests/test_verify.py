"""Verifying: a healthy database has no problem, and each way of breaking one is reported in a sentence of its own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    Client,
    CloseEngineConversation,
    EntryPoint,
    Lead,
    SchemaError,
    Stage,
    User,
)
from close_engine.approvals import PendingAction
from close_engine.database.binding import current
from close_engine.schema import directory, status
from close_engine.schema.checks import Check, checks, guards
from close_engine.testing import bring_to
from tests.crm import everything
from tests.servers import execute, new_name, postgres_database

STAGES = ", ".join(Stage)
LEVELS = "FULL_AUTO, SEMI_AUTO, MANUAL"
ENTRY_POINTS = "INSTANTLY_REPLY, SMS_REPLY, REP_CLOSE, PREVIEW_CTA"
PAST_THE_GUARD = "a writer bypassed the guard"
ADD = "add it, in place of any other on that column."
AGREE = "correct the rows of {transitions} to match this version's migrations."
DEFINER = "must be SECURITY DEFINER with search_path = pg_catalog, pg_temp, so that it works for every role: alter it."


def again(*migrations: str) -> str:
    rows = " and ".join(f"the row {migration}" for migration in migrations)
    return f"delete {rows} from {{migrations}} and run close-engine migrate, which recreates it."


#: Ways to break either kind of database, and the sentences that report them. Names in braces are the library's tables.
ON_BOTH = {
    "a table that Prisma sees": (
        "DROP TABLE pending_actions",
        ["The table pending_actions is missing: restore it from a backup."],
    ),
    "the conversations": (
        "DROP TABLE close_engine_conversations",
        ["The table close_engine_conversations is missing: restore it from a backup."],
    ),
    "the history": ("DROP TABLE {history}", ["The table {history} is missing: restore it from a backup."]),
    "the transition table": (
        "DROP TABLE {transitions}",
        [f"The table {{transitions}} is missing: {again('0002_history', '0005_decisions')}"],
    ),
    "since when it is silent": (
        "DROP TABLE {deadlines}",
        [f"The table {{deadlines}} is missing: {again('0002_history', '0003_guard', '0005_decisions')}"],
    ),
    "what was added": ("DROP TABLE {created}", [f"The table {{created}} is missing: {again('0001_conversations')}"]),
    "a column of a table of our own": (
        "DROP INDEX {index:deadlines_at_idx}; ALTER TABLE {deadlines} DROP at",
        [
            "The table {deadlines} should have the columns trigger, subject_id, at, found trigger, subject_id: "
            f"drop it, {again('0002_history', '0003_guard', '0005_decisions')}"
        ],
    ),
    "a table of the CRM": (
        "ALTER TABLE clients RENAME TO customers",
        ["The table clients is missing: restore it from a backup, or name it with connect(…, clients=…)."],
    ),
    "a column that the CRM had": (
        "ALTER TABLE leads DROP phone",
        ["The column leads.phone is missing, and close_engine reads it: add it to the CRM's table, as {text}."],
    ),
    "a column that leads gained": (
        "ALTER TABLE leads DROP close_entry_point",
        [
            "The column leads.close_entry_point is missing: add it "
            '(ALTER TABLE "leads" ADD COLUMN "close_entry_point" {text}).'
        ],
    ),
    "an index": (
        "DROP INDEX pending_actions_status_idx",
        ["The table pending_actions has no index on (status) named pending_actions_status_idx: create it."],
    ),
    "an index of our own": (
        "DROP INDEX {index:history_key_key}",
        ["The table {history} has no partial unique index on (conversation_id, key): create one."],
    ),
    "a stage change that is not in the table": (
        "DELETE FROM {transitions} WHERE trigger = 'reopen'",
        [f"The database refuses reopen from CLOSED_LOST to INITIATED, which the machine allows: {AGREE}"],
    ),
    "a stage change too many": (
        "INSERT INTO {transitions} VALUES ('conversation', 'reopen', 'COMPLETED', 'INITIATED')",
        [f"The database allows reopen from COMPLETED to INITIATED, which the machine refuses: {AGREE}"],
    ),
    "a stage change of another name": (
        "UPDATE {transitions} SET trigger = 'restart' WHERE trigger = 'reopen'",
        [
            f"The database refuses reopen from CLOSED_LOST to INITIATED, which the machine allows: {AGREE}",
            f"The database allows restart from CLOSED_LOST to INITIATED, which the machine refuses: {AGREE}",
        ],
    ),
    "an unknown entry point": (
        "UPDATE close_engine_conversations SET entry_point = 'FAX'",
        [
            "In 2 rows of close_engine_conversations (for example 'c1'), entry_point has the unknown value 'FAX': "
            f"change it to one of {ENTRY_POINTS}."
        ],
    ),
    "unknown words of a lead": (
        "UPDATE leads SET autonomy_level = 'HALF_AUTO', close_entry_point = 'FAX' WHERE id = 'lead_1'",
        [
            "In 1 row of leads ('lead_1'), autonomy_level has the unknown value 'HALF_AUTO': "
            f"change it to one of {LEVELS}.",
            "In 1 row of leads ('lead_1'), close_entry_point has the unknown value 'FAX': "
            f"change it to one of {ENTRY_POINTS}.",
        ],
    ),
    "an unknown word of a client": (
        "UPDATE clients SET autonomy_level = ''",
        [f"In 1 row of clients ('client_1'), autonomy_level has the unknown value '': change it to one of {LEVELS}."],
    ),
    "an unknown type of an action": (
        "UPDATE pending_actions SET type = 'SEND_FAX'",
        [
            "In 1 row of pending_actions ('a1'), type has the unknown value 'SEND_FAX': "
            "change it to one of SEND_PAYMENT_LINK, SEND_MESSAGE, SEND_PREVIEW.",
        ],
    ),
    "a conversation without history": (
        "DELETE FROM {history} WHERE conversation_id = 'c2'",
        [
            "For 1 row of close_engine_conversations ('c2' in BUILDING), {history} has no row: "
            f"{PAST_THE_GUARD}; insert a row with the trigger 'adopted' for each."
        ],
    ),
    "a history that ends elsewhere": (
        "UPDATE {history} SET dest = 'STALLED' WHERE dest = 'BUILDING'",
        [
            "In 2 rows of close_engine_conversations (for example 'c1': BUILDING instead of STALLED), the stage "
            f"differs from the newest row of {{history}}: {PAST_THE_GUARD}; insert the missing row for each."
        ],
    ),
    "a pending migration": (
        "DELETE FROM {migrations} WHERE name = '0003_guard'",
        ["The migration 0003_guard is pending: run close-engine migrate."],
    ),
    "an unknown migration": (
        "UPDATE {migrations} SET name = '0999_later' WHERE name = '0002_history'",
        [
            "The migration 0002_history is pending: run close-engine migrate.",
            "The migration 0999_later is unknown to this version: upgrade close-engine.",
        ],
    ),
    "no migration": (
        "DELETE FROM {migrations}",
        ["The database is not migrated: run close-engine migrate, or close_engine.migrate()."],
    ),
    "no log of migrations": (
        "DROP TABLE {migrations}",
        ["The database is not migrated: run close-engine migrate, or close_engine.migrate()."],
    ),
}

TABLE = "close_engine_conversations"
MOMENT = "timestamp(3) without time zone"
LEAD_KEY = f"{TABLE}_lead_id_fkey (lead_id) REFERENCES leads ON DELETE CASCADE ON UPDATE CASCADE"
REP_KEY = f"{TABLE}_rep_id_fkey (rep_id) REFERENCES users ON DELETE SET NULL ON UPDATE CASCADE"
LATE = "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"

ON_POSTGRESQL = {
    "a renamed table of the CRM": (
        'ALTER TABLE leads RENAME TO "Lead"',
        [
            "The table leads is missing: restore it from a backup, or name it with connect(…, leads=…).",
            f"The table {TABLE} needs the foreign key {LEAD_KEY}, found {LEAD_KEY.replace('leads', 'Lead')}, "
            f"{REP_KEY}: {ADD}",
        ],
    ),
    "a column": (
        f"ALTER TABLE {TABLE} DROP edit_rounds",
        [
            f"The column {TABLE}.edit_rounds is missing: add it "
            f'(ALTER TABLE "{TABLE}" ADD COLUMN "edit_rounds" integer NOT NULL DEFAULT 0).'
        ],
    ),
    "a column of the history": (
        "ALTER TABLE {history} DROP reason",
        [
            "The column {history}.reason is missing: add it "
            '(ALTER TABLE "close_engine"."history" ADD COLUMN "reason" text).'
        ],
    ),
    "a type": (
        f"ALTER TABLE {TABLE} ALTER stalled_at TYPE timestamptz",
        [f"The column {TABLE}.stalled_at has the type timestamp with time zone, expected {MOMENT}: alter it."],
    ),
    "a type of our own": (
        "ALTER TABLE {history} ALTER created_at TYPE timestamp",
        [f"The column {{history}}.created_at has the type timestamp without time zone, expected {MOMENT}: alter it."],
    ),
    "another default": (
        "ALTER TABLE clients ALTER autonomy_level SET DEFAULT 'MANUAL'",
        ["The column clients.autonomy_level has the default 'MANUAL'::text, expected 'FULL_AUTO'::text: alter it."],
    ),
    "no default": (
        f"ALTER TABLE {TABLE} ALTER stage DROP DEFAULT",
        [f"The column {TABLE}.stage has the default none, expected 'INITIATED'::text: alter it."],
    ),
    "a default too many": (
        "ALTER TABLE pending_actions ALTER metadata SET DEFAULT '{{}}'",
        ["The column pending_actions.metadata has the default '{{}}'::jsonb, expected none: alter it."],
    ),
    "a column that allows NULL": (
        f"ALTER TABLE {TABLE} ALTER updated_at DROP NOT NULL",
        [f"The column {TABLE}.updated_at should not allow NULL: found {MOMENT}, expected {MOMENT} NOT NULL; alter it."],
    ),
    "a column that refuses NULL": (
        f"ALTER TABLE {TABLE} ALTER rep_id SET NOT NULL",
        [
            f"The column {TABLE}.rep_id should allow NULL: found text NOT NULL, expected text; alter it.",
        ],
    ),
    "a column that must be given": (
        f"ALTER TABLE {TABLE} ADD brand text NOT NULL DEFAULT ''; ALTER TABLE {TABLE} ALTER brand DROP DEFAULT",
        [
            f"The column {TABLE}.brand is NOT NULL without a default, and close_engine does not know it, so no row can "
            "be inserted: make it nullable or give it a default."
        ],
    ),
    "a column that need not be given": (f"ALTER TABLE {TABLE} ADD number int GENERATED ALWAYS AS IDENTITY", []),
    "an index of another name": (
        "ALTER INDEX pending_actions_lead_id_idx RENAME TO anything",
        ["The table pending_actions has no index on (lead_id) named pending_actions_lead_id_idx: create it."],
    ),
    "an index of our own with another name": ("ALTER INDEX close_engine.history_key_key RENAME TO anything", []),
    "an index that is not unique": (
        f"DROP INDEX {TABLE}_lead_id_key; CREATE INDEX {TABLE}_lead_id_key ON {TABLE} (lead_id)",
        [
            f"The index {TABLE}_lead_id_key on {TABLE} is wrong: found index on (lead_id), expected unique index on "
            "(lead_id); drop it and create it again."
        ],
    ),
    "a primary key": (
        "ALTER TABLE pending_actions DROP CONSTRAINT pending_actions_pkey",
        ["The table pending_actions has no unique index on (id) named pending_actions_pkey: create it."],
    ),
    "a foreign key": (
        f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_rep_id_fkey",
        [f"The table {TABLE} needs the foreign key {REP_KEY}, found {LEAD_KEY}: {ADD}"],
    ),
    "every foreign key": (
        f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_rep_id_fkey, DROP CONSTRAINT {TABLE}_lead_id_fkey",
        [
            f"The table {TABLE} needs the foreign key {LEAD_KEY}, found none: {ADD}",
            f"The table {TABLE} needs the foreign key {REP_KEY}, found none: {ADD}",
        ],
    ),
    "a foreign key that keeps conversations from their lead": (
        f"ALTER TABLE {TABLE} DROP CONSTRAINT {TABLE}_lead_id_fkey, "
        f"ADD CONSTRAINT {TABLE}_lead_id_fkey FOREIGN KEY (lead_id) REFERENCES leads",
        [
            f"The table {TABLE} needs the foreign key {LEAD_KEY}, found {REP_KEY}, "
            f"{TABLE}_lead_id_fkey (lead_id) REFERENCES leads ON DELETE NO ACTION ON UPDATE NO ACTION: {ADD}"
        ],
    ),
    "a trigger": (
        f"DROP TRIGGER zz_close_engine_guard ON {TABLE}",
        [
            f"The trigger zz_close_engine_guard on {TABLE} is missing, so the table is not guarded: "
            f"{again('0003_guard')}"
        ],
    ),
    "a disabled trigger": (
        f"ALTER TABLE {TABLE} DISABLE TRIGGER aa_close_engine_opening",
        [
            f"The trigger aa_close_engine_opening on {TABLE} is disabled, so the table is not guarded: "
            f"ALTER TABLE {TABLE} ENABLE TRIGGER aa_close_engine_opening."
        ],
    ),
    "a trigger for replicas alone": (
        f"ALTER TABLE {TABLE} ENABLE REPLICA TRIGGER zz_close_engine_deletion",
        [
            f"The trigger zz_close_engine_deletion on {TABLE} is disabled, so the table is not guarded: "
            f"ALTER TABLE {TABLE} ENABLE TRIGGER zz_close_engine_deletion."
        ],
    ),
    "a trigger that always fires": (f"ALTER TABLE {TABLE} ENABLE ALWAYS TRIGGER zz_close_engine_guard", []),
    "a function with the writer's rights": (
        "ALTER FUNCTION close_engine.guard_conversation() SECURITY INVOKER",
        [f"The function of the trigger zz_close_engine_guard on {TABLE} {DEFINER}"],
    ),
    "a function with the writer's search path": (
        "ALTER FUNCTION close_engine.record_opening() RESET search_path",
        [f"The function of the trigger aa_close_engine_opening on {TABLE} {DEFINER}"],
    ),
    "a trigger of somebody else's that comes later": (
        f"{LATE}; CREATE TRIGGER zzz BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION late()",
        [
            f"The trigger zzz on {TABLE} fires after zz_close_engine_guard and can still change or drop the row: "
            f"rename it so that it sorts before (ALTER TRIGGER zzz ON {TABLE} RENAME TO …)."
        ],
    ),
    "a trigger of somebody else's that comes earlier": (
        f"{LATE}; CREATE TRIGGER early BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION late()",
        [],
    ),
    "a stage written past the guard": (
        f"SET LOCAL session_replication_role = replica; UPDATE {TABLE} SET stage = 'COMPLETED' WHERE id = 'c2'",
        [
            f"In 1 row of {TABLE} ('c2': COMPLETED instead of BUILDING), the stage differs from the newest row of "
            f"{{history}}: {PAST_THE_GUARD}; insert the missing row for each."
        ],
    ),
    "an unknown stage": (
        f"SET LOCAL session_replication_role = replica; UPDATE {TABLE} SET stage = 'WON'; "
        "UPDATE {history} SET dest = 'WON' WHERE dest = 'BUILDING'",
        [
            f"In 2 rows of {{history}} (for example 3), dest has the unknown value 'WON': "
            f"change it to one of {STAGES}.",
            f"In 2 rows of {TABLE} (for example 'c1'), stage has the unknown value 'WON': "
            f"change it to one of {STAGES}.",
        ],
    ),
    "an unknown status of an action": (
        "SET LOCAL session_replication_role = replica; UPDATE pending_actions SET status = 'LOST'",
        [
            "In 1 row of pending_actions ('a1'), status has the unknown value 'LOST': "
            "change it to one of PENDING, APPROVED, REJECTED, EXPIRED.",
        ],
    ),
    "a decision that is not in the table": (
        "DELETE FROM {transitions} WHERE trigger = 'expire'",
        [f"The database refuses expire from PENDING to EXPIRED, which the machine allows: {AGREE}"],
    ),
    "a table from which messages are sent": (
        "DROP TABLE {outbox}",
        ["The table {outbox} is missing: restore it from a backup."],
    ),
    "the trigger on the actions": (
        "DROP TRIGGER zz_close_engine_guard ON pending_actions",
        [
            "The trigger zz_close_engine_guard on pending_actions is missing, so the table is not guarded: "
            f"{again('0005_decisions')}"
        ],
    ),
    "a lead that is gone": (
        "SET LOCAL session_replication_role = replica; DELETE FROM leads WHERE id = 'lead_1'",
        [
            f"In 1 row of {TABLE} ('c1'), lead_id refers to 'lead_1', which is not in leads: "
            "delete these conversations, or restore what they refer to."
        ],
    ),
    "a rep that is gone": (
        "SET LOCAL session_replication_role = replica; DELETE FROM users",
        [
            f"In 2 rows of {TABLE} (for example 'c1'), rep_id refers to 'rep_1', which is not in users: "
            "delete these conversations, or restore what they refer to."
        ],
    ),
    "our schema": (
        "DROP SCHEMA close_engine CASCADE",
        ["The database is not migrated: run close-engine migrate, or close_engine.migrate()."],
    ),
}


def rebuilt(table: str, old: str, new: str) -> Callable[[peewee.Database], None]:
    """Recreate a table with changed SQL, because SQLite cannot alter constraints."""

    def rebuild(database: peewee.Database) -> None:
        made = database.execute_sql(
            "SELECT sql FROM sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL ORDER BY type = 'trigger', type DESC",
            (table,),
        ).fetchall()
        database.execute_sql(f"DROP TABLE {table}")
        changed = [sql.replace(old, new) for (sql,) in made]
        assert changed != [sql for (sql,) in made]
        for statement in changed:
            database.execute_sql(statement)

    return rebuild


FOREIGN_KEY = "(rep_id) REFERENCES users ON DELETE SET NULL ON UPDATE CASCADE"

ON_SQLITE: dict[str, tuple[Any, list[str]]] = {
    "the context": ("DROP TABLE {context}", [f"The table {{context}} is missing: {again('0002_history')}"]),
    "a column that allows NULL": (
        rebuilt("pending_actions", '"draft_message" TEXT NOT NULL', '"draft_message" TEXT'),
        [
            "The column pending_actions.draft_message should not allow NULL: found TEXT, "
            "expected TEXT NOT NULL; alter it."
        ],
    ),
    "a column that must be given": (
        rebuilt("pending_actions", '"metadata"', "brand TEXT NOT NULL, metadata"),
        [
            "The column pending_actions.brand is NOT NULL without a default, and close_engine does not know it, so no "
            "row can be inserted: make it nullable or give it a default."
        ],
    ),
    "an index that is not unique": (
        f"DROP INDEX {TABLE}_lead_id_key; CREATE INDEX {TABLE}_lead_id_key ON {TABLE} (lead_id)",
        [
            f"The index {TABLE}_lead_id_key on {TABLE} is wrong: found index on (lead_id), expected unique index on "
            "(lead_id); drop it and create it again."
        ],
    ),
    "a foreign key": (
        rebuilt(TABLE, "ON DELETE SET NULL", "ON DELETE CASCADE"),
        [
            f"The table {TABLE} needs the foreign key {FOREIGN_KEY}, "
            "found (rep_id) REFERENCES users ON DELETE CASCADE ON UPDATE CASCADE, "
            f"(lead_id) REFERENCES leads ON DELETE CASCADE ON UPDATE CASCADE: {ADD}"
        ],
    ),
    **{
        f"the trigger {name}": (
            f"DROP TRIGGER close_engine_{name}",
            [
                f"The trigger close_engine_{name} on {TABLE} is missing, so the table is not guarded: "
                f"{again('0003_guard')}"
            ],
        )
        for name in ("deletion", "guard_id", "guard_insert", "guard_update", "opening", "record", "version")
    },
    "a lead that is gone": (
        "PRAGMA foreign_keys = 0; DELETE FROM leads WHERE id = 'lead_1'",
        [
            f"In 1 row of {TABLE} ('c1'), lead_id refers to 'lead_1', which is not in leads: "
            "delete these conversations, or restore what they refer to."
        ],
    ),
}

POSTGRESQL = {**ON_BOTH, **ON_POSTGRESQL}
SQLITE = {**ON_BOTH, **ON_SQLITE}


def words(text: str, postgresql: bool) -> str:
    """Return the text with this database's names."""
    prefix = "close_engine." if postgresql else "close_engine_"
    text = text.replace("{text}", "text" if postgresql else "TEXT").replace("{index:", "{")
    return re.sub(r"\{(\w+)\}", rf"{prefix}\1", text).replace("{{", "{").replace("}}", "}")


def fill() -> None:
    """Create rows that have nothing wrong with them."""
    User.create(id="rep_1")
    Client.create(id="client_1")
    PendingAction.create(id="a1", conversation_id="c1", lead_id="lead_1", type="SEND_MESSAGE", draft_message="Hi")
    for number in (1, 2):
        lead = Lead.create(id=f"lead_{number}", phone="+1555")
        conversation = CloseEngineConversation.create(
            id=f"c{number}", lead=lead, rep="rep_1", entry_point=EntryPoint.SMS_REPLY
        )
        bring_to(conversation, Stage.BUILDING)


@pytest.fixture(scope="module")
def healthy_url(server: str, postgres_template: str) -> Iterator[str]:
    """The URL of a PostgreSQL database with rows. Tests roll back what they break."""
    with postgres_database(server, postgres_template) as url:
        database = close_engine.connect(url)
        fill()
        database.close()
        yield url


@pytest.mark.parametrize("what", POSTGRESQL)
def test_what_is_broken_on_postgresql_is_found(healthy_url: str, what: str) -> None:
    database = close_engine.connect(healthy_url)
    change, problems = POSTGRESQL[what]
    assert close_engine.verify() == []

    with database.atomic() as transaction:
        database.execute_sql(words(change, True))
        assert close_engine.verify() == [words(problem, True) for problem in problems]
        transaction.rollback()

    assert close_engine.verify() == []
    database.close()


@pytest.mark.parametrize("what", SQLITE)
def test_what_is_broken_on_sqlite_is_found(what: str) -> None:
    database = close_engine.connect("sqlite:///:memory:")
    close_engine.migrate(standalone=True)
    change, problems = SQLITE[what]
    if callable(change):
        change(database)
    else:
        fill()
        assert close_engine.verify() == []
        for statement in words(change, False).split("; "):
            database.execute_sql(statement)

    assert close_engine.verify() == [words(problem, False) for problem in problems]
    database.close()


def test_everything_is_found_at_once(postgres: peewee.Database) -> None:
    fill()
    chosen = ["an index", "the transition table", "a disabled trigger", "an unknown entry point"]
    for what in chosen:
        postgres.execute_sql(words(POSTGRESQL[what][0], True))

    assert sorted(close_engine.verify()) == sorted(
        words(problem, True) for what in chosen for problem in POSTGRESQL[what][1]
    )


AGAIN = [
    what for what, (_, problems) in {**SQLITE, **POSTGRESQL}.items() if any("recreates it" in each for each in problems)
]


@pytest.mark.parametrize("what", AGAIN)
def test_what_is_said_to_be_made_again_is(postgres_url: str, what: str) -> None:
    url, broken = (postgres_url, POSTGRESQL) if what in POSTGRESQL else ("sqlite:///:memory:", SQLITE)
    database = close_engine.connect(url)
    close_engine.migrate(standalone=True)
    fill()
    for statement in words(broken[what][0], what in POSTGRESQL).split("; "):
        database.execute_sql(statement)
    (problem,) = close_engine.verify()

    if "drop it" in problem:
        database.execute_sql(words("DROP TABLE {deadlines}", what in POSTGRESQL))
    rows = re.findall(r"the row (\w+)", problem)
    for row in rows:
        database.execute_sql(words(f"DELETE FROM {{migrations}} WHERE name = '{row}'", what in POSTGRESQL))

    assert close_engine.migrate() == rows
    assert close_engine.verify() == []
    conversation = CloseEngineConversation.get_by_id("c1")
    assert conversation.send_preview().dest is Stage.PREVIEW_SENT
    database.close()


def test_a_healthy_database_passes_every_check(database: peewee.Database) -> None:
    fill()

    made = checks()

    assert [check for check in made if check.problems] == []
    subjects = [check.subject for check in made]
    schema, history = close_engine.StageChange._meta.schema, close_engine.StageChange._meta.table_name
    assert len(subjects) == len(set(subjects))
    assert {
        "migrations",
        "table leads",
        "table users",
        "table clients",
        f"table {TABLE}",
        "table pending_actions",
        f"table {f'{schema}.' if schema else ''}{history}",
        "helper tables",
        f"triggers on {TABLE} by 0003_guard",
        "allowed stage changes",
        "back-references",
        "history",
        f"enum values in {TABLE}",
        "enum values in leads",
    } <= set(subjects)


def test_every_trigger_that_the_migrations_make_is_looked_for(database: peewee.Database) -> None:
    tables = [TABLE, "pending_actions"]
    there = {(table, name) for table in tables for name in current().dialect.catalog(database).triggers(table)}

    assert {(guard.table, name) for guard in guards() for name in guard.triggers} == there
    assert [(guard.table, guard.migration) for guard in guards()] == [
        (TABLE, "0003_guard"),
        ("pending_actions", "0005_decisions"),
        (TABLE, "0005_decisions"),
    ]
    assert len(there) == (10 if isinstance(database, peewee.PostgresqlDatabase) else 20)


def test_a_database_without_anything_has_one_problem_and_stays_empty(empty_url: str) -> None:
    before = everything(empty_url)
    database = close_engine.connect(empty_url)

    sentence = "The database is not migrated: run close-engine migrate, or close_engine.migrate()."
    assert checks() == [Check("migrations", [sentence])]
    assert everything(empty_url) == before
    database.close()


def test_a_role_that_may_only_read_can_verify(postgres_url: str, server: str) -> None:
    database = close_engine.connect(postgres_url)
    fill()
    database.close()
    reader = new_name()
    as_reader = postgres_url.replace("//postgres:@", f"//{reader}:@")
    execute(server, f"CREATE ROLE {reader} LOGIN")
    try:
        database = close_engine.connect(as_reader)
        with pytest.raises(SchemaError) as caught:
            close_engine.verify()
        assert str(caught.value) == (
            "Database error: permission denied for schema close_engine. To read which migrations were applied, "
            "this role needs USAGE on the schema close_engine and SELECT on its tables: ask their owner to grant both."
        )

        execute(
            postgres_url,
            f"GRANT USAGE ON SCHEMA close_engine TO {reader}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA close_engine, public TO {reader}",
        )
        assert close_engine.verify() == []
        assert close_engine.migrate() == []
        assert [each.known for each in status()] == [True] * len(list(directory().glob("[0-9]*.py")))
        database.close()
    finally:
        execute(postgres_url, f"DROP OWNED BY {reader}")
        execute(server, f"DROP ROLE {reader}")


def test_a_sqlite_file_that_may_only_be_read_can_be_verified(sqlite_template: Any) -> None:
    database = close_engine.bind(peewee.SqliteDatabase(f"file:{sqlite_template}?mode=ro&immutable=1", uri=True))

    assert close_engine.verify() == []
    database.close()
