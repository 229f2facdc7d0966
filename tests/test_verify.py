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
from close_engine.schema import Check, Problem, checks, directory, repair, scripts, status
from close_engine.testing import MovableClock, bring_to
from tests.crm import everything
from tests.servers import execute, new_name, postgres_database

TABLE = "close_engine_conversations"
SCRIPTS = sorted(script.stem for script in directory().glob("[0-9]*.py"))
STAGES = ", ".join(Stage)
LEVELS = "FULL_AUTO, SEMI_AUTO, MANUAL"
ENTRY_POINTS = "INSTANTLY_REPLY, SMS_REPLY, REP_CLOSE, PREVIEW_CTA"
PAST_THE_GUARD = "a writer bypassed the guard; run close-engine verify --repair, which records the stage as it is."
ADD = "add it, in place of any other on that column."
FORBIDS = "run close-engine verify --repair, which forbids it."
DEFINER = (
    "is not SECURITY DEFINER with search_path = pg_catalog, pg_temp, so it does not work for every role: "
    "run close-engine migrate, which makes it again."
)


AGAIN = "run close-engine migrate, which makes it again."
REPAIR = "run close-engine verify --repair"

#: Ways to break either kind of database, and the sentences that report them. Names in braces are the library's tables.
ON_BOTH = {
    "a table that Prisma sees": (
        "DROP TABLE pending_actions",
        [f"The table pending_actions is missing: restore it from a backup, or {AGAIN[:-1]}, empty."],
    ),
    "the conversations": (
        "DROP TABLE close_engine_conversations",
        [f"The table close_engine_conversations is missing: restore it from a backup, or {AGAIN[:-1]}, empty."],
    ),
    "the history": (
        "DROP TABLE {history}",
        [f"The table {{history}} is missing: restore it from a backup, or {AGAIN[:-1]}, empty."],
    ),
    "the transition table": (
        "DROP TABLE {transitions}",
        [f"The table {{transitions}} is missing: {AGAIN}"],
    ),
    "what is due when": ("DROP TABLE {deadlines}", [f"The table {{deadlines}} is missing: {AGAIN}"]),
    "an index of the deadlines": (
        "DROP INDEX {index:deadlines_at_idx}",
        ["The table {deadlines} has no index on (trigger, at): create one."],
    ),
    "a deadline": (
        "DELETE FROM {deadlines} WHERE subject_id = 'c1'",
        [
            f"For 1 row of {TABLE} ('c1'), {{deadlines}} has no row stall or answer, so no sweep finds it: "
            "run close-engine verify --repair, which adds it."
        ],
    ),
    "the deadlines of stalled conversations and of actions": (
        f"UPDATE {TABLE} SET stage = 'STALLED'; "
        "UPDATE pending_actions SET expires_at = '2099-01-01 00:00:00.000'; DELETE FROM {deadlines}",
        [
            f"For 2 rows of {TABLE} (for example 'c1'), {{deadlines}} has no row close_lost, so no sweep finds it: "
            "run close-engine verify --repair, which adds it.",
            "For 1 row of pending_actions ('a1'), {deadlines} has no row expire, so no sweep finds it: "
            "run close-engine verify --repair, which adds it.",
        ],
    ),
    "a stamp": (
        f"UPDATE {TABLE} SET stage = 'STALLED' WHERE id = 'c1'; UPDATE {TABLE} SET stalled_at = NULL WHERE id = 'c1'",
        [
            f"In 1 row of {TABLE} ('c1'), the stage is STALLED and stalled_at is empty: "
            "set it, or run close-engine verify --repair, which takes it from the history.",
        ],
    ),
    "the stamps of all who paid": (
        f"UPDATE {TABLE} SET stage = 'COMPLETED'; UPDATE {TABLE} SET completed_at = NULL",
        [
            f"In 2 rows of {TABLE} (for example 'c1'), the stage is COMPLETED and completed_at is empty: "
            "set it, or run close-engine verify --repair, which takes it from the history.",
        ],
    ),
    "what was added": ("DROP TABLE {created}", [f"The table {{created}} is missing: {AGAIN}"]),
    "a column of a table of our own": (
        "DROP INDEX {index:deadlines_at_idx}; ALTER TABLE {deadlines} DROP at",
        [
            "The table {deadlines} should have the columns trigger, subject_id, at, found trigger, subject_id: "
            f"drop it, and {AGAIN}"
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
        ["The column leads.close_entry_point is missing: run close-engine migrate, which adds it."],
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
        [f"The database refuses reopen from CLOSED_LOST to INITIATED, which the machine allows: {AGAIN}"],
    ),
    "a stage change too many": (
        "INSERT INTO {transitions} (machine, trigger, source, dest) "
        "VALUES ('conversation', 'reopen', 'COMPLETED', 'INITIATED')",
        [f"The database allows reopen from COMPLETED to INITIATED, which the machine refuses: {FORBIDS}"],
    ),
    "a stage change of another name": (
        "UPDATE {transitions} SET trigger = 'restart' WHERE trigger = 'reopen'",
        [
            f"The database refuses reopen from CLOSED_LOST to INITIATED, which the machine allows: {AGAIN}",
            f"The database allows restart from CLOSED_LOST to INITIATED, which the machine refuses: {FORBIDS}",
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
    "a conversation without history": (
        "DELETE FROM {history} WHERE conversation_id = 'c2'",
        [f"For 1 row of close_engine_conversations ('c2' in BUILDING), {{history}} has no row: {PAST_THE_GUARD}"],
    ),
    "a history that ends elsewhere": (
        "UPDATE {history} SET dest = 'STALLED' WHERE dest = 'BUILDING'",
        [
            "In 2 rows of close_engine_conversations (for example 'c1': BUILDING instead of STALLED), the stage "
            f"differs from the newest row of {{history}}: {PAST_THE_GUARD}"
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

MOMENT = "timestamp(3) without time zone"
LEAD_KEY = f"{TABLE}_lead_id_fkey (lead_id) REFERENCES leads ON DELETE CASCADE ON UPDATE CASCADE"
REP_KEY = f"{TABLE}_rep_id_fkey (rep_id) REFERENCES users ON DELETE SET NULL ON UPDATE CASCADE"
LATE = "CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"

ON_POSTGRESQL = {
    "another body of a function": (
        "CREATE OR REPLACE FUNCTION close_engine.guard_conversation() RETURNS trigger LANGUAGE plpgsql "
        "SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN NEW; END'",
        [f"The function close_engine.guard_conversation() is not the one that this version makes: {AGAIN}"],
    ),
    "a function": (
        "DROP FUNCTION close_engine.guard_action() CASCADE",
        [
            f"The trigger zz_close_engine_guard on pending_actions is missing, so the table is not guarded: {AGAIN}",
            f"The function close_engine.guard_action() is missing: {AGAIN}",
        ],
    ),
    "another table of triggers": (
        f"CREATE OR REPLACE TRIGGER zz_close_engine_guard BEFORE INSERT ON {TABLE} "
        "FOR EACH ROW EXECUTE FUNCTION close_engine.guard_conversation()",
        [f"The trigger zz_close_engine_guard on {TABLE} is not the one that this version makes: {AGAIN}"],
    ),
    "another function of a trigger": (
        f"{LATE}; CREATE OR REPLACE TRIGGER aa_close_engine_opening AFTER INSERT ON {TABLE} "
        "FOR EACH ROW EXECUTE FUNCTION late()",
        [f"The trigger aa_close_engine_opening on {TABLE} is not the one that this version makes: {AGAIN}"],
    ),
    "another condition of a trigger": (
        f"CREATE OR REPLACE TRIGGER aa_close_engine_opening AFTER INSERT ON {TABLE} "
        "FOR EACH ROW WHEN (NEW.stage <> 'STALLED') EXECUTE FUNCTION close_engine.record_opening()",
        [f"The trigger aa_close_engine_opening on {TABLE} is not the one that this version makes: {AGAIN}"],
    ),
    "functions that everybody may execute": (
        "GRANT EXECUTE ON FUNCTION close_engine.guard_conversation(), close_engine.follow_decision() TO PUBLIC",
        [
            f"Everybody may execute close_engine.{name}(), which only triggers need: "
            "run close-engine migrate, which makes it again and revokes that."
            for name in ("guard_conversation", "follow_decision")
        ],
    ),
    "a function that a role may execute": (
        "GRANT EXECUTE ON FUNCTION close_engine.guard_action() TO pg_monitor",
        [
            "The role pg_monitor may execute close_engine.guard_action(), which only triggers need: "
            "REVOKE EXECUTE ON FUNCTION close_engine.guard_action() FROM pg_monitor."
        ],
    ),
    "who may write the history": (
        "GRANT INSERT ON close_engine.history TO PUBLIC; GRANT DELETE ON close_engine.transitions TO pg_monitor",
        [
            "Everybody may INSERT on close_engine.history, which only the library's triggers and migrations write: "
            "REVOKE INSERT ON close_engine.history FROM PUBLIC.",
            "The role pg_monitor may DELETE on close_engine.transitions, which only the library's triggers and "
            "migrations write: REVOKE DELETE ON close_engine.transitions FROM pg_monitor.",
        ],
    ),
    "the owner of a function": (
        "ALTER FUNCTION close_engine.moment() OWNER TO pg_monitor; "
        "ALTER FUNCTION close_engine.refuse_table(oid, text) OWNER TO pg_monitor",
        [
            f"The function close_engine.{function} belongs to pg_monitor, and close_engine.history to postgres: "
            f'give them one owner (ALTER FUNCTION close_engine.{function} OWNER TO "postgres"), or '
            "run close-engine verify --repair as a superuser."
            for function in ("moment()", "refuse_table(oid,text)")
        ],
    ),
    "a sequence that is behind": (
        "ALTER SEQUENCE close_engine.history_id_seq RESTART",
        [
            "The sequence close_engine.history_id_seq is at 0, and close_engine.history has the id 6, so the next row "
            "cannot be inserted: run close-engine verify --repair, which sets it."
        ],
    ),
    "a sequence that was never used": (
        "INSERT INTO close_engine.inbox (id, kind, key, lead_id, received_at) VALUES (7, 'text', 'SM1', 'l', now())",
        [
            "The sequence close_engine.inbox_id_seq is at 0, and close_engine.inbox has the id 7, so the next row "
            "cannot be inserted: run close-engine verify --repair, which sets it."
        ],
    ),
    "no sequence": (
        "ALTER TABLE close_engine.outbox ALTER id DROP IDENTITY",
        [
            "The column close_engine.outbox.id has no sequence: add one "
            '(ALTER TABLE "close_engine"."outbox" ALTER "id" ADD GENERATED BY DEFAULT AS IDENTITY).'
        ],
    ),
    "a partial index where Prisma sees it": (
        "CREATE INDEX close_engine_pending ON pending_actions (expires_at) WHERE status = 'PENDING'",
        [
            "The index close_engine_pending on pending_actions is partial, and some versions of Prisma drop it: "
            "drop it; close_engine needs none there."
        ],
    ),
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
            f"The table {TABLE} needs the foreign key {LEAD_KEY}, found "
            f"{TABLE}_lead_id_fkey (lead_id) REFERENCES leads ON DELETE NO ACTION ON UPDATE NO ACTION, {REP_KEY}: {ADD}"
        ],
    ),
    "a trigger": (
        f"DROP TRIGGER zz_close_engine_guard ON {TABLE}",
        [f"The trigger zz_close_engine_guard on {TABLE} is missing, so the table is not guarded: {AGAIN}"],
    ),
    "a disabled trigger": (
        f"ALTER TABLE {TABLE} DISABLE TRIGGER aa_close_engine_opening",
        [
            f"The trigger aa_close_engine_opening on {TABLE} is disabled, so the table is not guarded: "
            "run close-engine migrate, which enables it."
        ],
    ),
    "a trigger for replicas alone": (
        f"ALTER TABLE {TABLE} ENABLE REPLICA TRIGGER zz_close_engine_deletion",
        [
            f"The trigger zz_close_engine_deletion on {TABLE} is disabled, so the table is not guarded: "
            "run close-engine migrate, which enables it."
        ],
    ),
    "a trigger that always fires": (f"ALTER TABLE {TABLE} ENABLE ALWAYS TRIGGER zz_close_engine_guard", []),
    "a function with the writer's rights": (
        "ALTER FUNCTION close_engine.guard_conversation() SECURITY INVOKER",
        [f"The function close_engine.guard_conversation() {DEFINER}"],
    ),
    "a function with the writer's search path": (
        "ALTER FUNCTION close_engine.record_opening() RESET search_path",
        [f"The function close_engine.record_opening() {DEFINER}"],
    ),
    "a trigger of somebody else's that comes later": (
        f"{LATE}; CREATE TRIGGER zzz BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION late()",
        [
            f"The trigger zzz on {TABLE} fires after zz_close_engine_guard, so it can still change or drop the row, "
            "and store a stage that no guard has seen: "
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
            f"{{history}}: {PAST_THE_GUARD}",
            f"In 1 row of {TABLE} ('c2'), the stage is COMPLETED and completed_at is empty: "
            "set it, or run close-engine verify --repair, which takes it from the history.",
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
    "an unknown entry point": (
        "SET LOCAL session_replication_role = replica; UPDATE close_engine_conversations SET entry_point = 'FAX'",
        [
            "In 2 rows of close_engine_conversations (for example 'c1'), entry_point has the unknown value 'FAX': "
            f"change it to one of {ENTRY_POINTS}."
        ],
    ),
    "an unknown type of an action": (
        "SET LOCAL session_replication_role = replica; UPDATE pending_actions SET type = 'SEND_FAX'",
        [
            "In 1 row of pending_actions ('a1'), type has the unknown value 'SEND_FAX': "
            "change it to one of SEND_PAYMENT_LINK, SEND_MESSAGE, SEND_PREVIEW.",
        ],
    ),
    "an unknown status of an action": (
        "SET LOCAL session_replication_role = replica; UPDATE pending_actions SET status = 'LOST'",
        [
            "In 1 row of pending_actions ('a1'), status has the unknown value 'LOST': change it to PENDING.",
        ],
    ),
    "a decision that is not in the table": (
        "DELETE FROM {transitions} WHERE trigger = 'expire'",
        [f"The database refuses expire from PENDING to EXPIRED, which the machine allows: {AGAIN}"],
    ),
    "a table from which messages are sent": (
        "DROP TABLE {outbox}",
        [f"The table {{outbox}} is missing: restore it from a backup, or {AGAIN[:-1]}, empty."],
    ),
    "the trigger on the actions": (
        "DROP TRIGGER zz_close_engine_guard ON pending_actions",
        [f"The trigger zz_close_engine_guard on pending_actions is missing, so the table is not guarded: {AGAIN}"],
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


@pytest.fixture
def database(database: peewee.Database, close_engine_clock: MovableClock) -> peewee.Database:
    """The same, with its own clock: what stands still is no healthy database."""
    close_engine_clock.let_go()
    return database


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
    "the context": ("DROP TABLE {context}", [f"The table {{context}} is missing: {AGAIN}"]),
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
            [f"The trigger close_engine_{name} on {TABLE} is missing, so the table is not guarded: {AGAIN}"],
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


MENDED = [
    (what, kind, by)
    for kind, broken in (("postgresql", POSTGRESQL), ("sqlite", SQLITE))
    for what, (_, problems) in broken.items()
    for by, remedies in (("migrate", ["close-engine migrate, which"]), ("repair", ["migrate, which", "--repair"]))
    if problems and all(any(each in problem for each in remedies) for problem in problems)
    if not any("drop it, and" in problem for problem in problems)
]


@pytest.mark.parametrize(("what", "kind", "by"), MENDED, ids=["-".join(each) for each in MENDED])
def test_what_is_said_to_be_mended_is(healthy_url: str, what: str, kind: str, by: str) -> None:
    is_postgresql = kind == "postgresql"
    change, problems = (POSTGRESQL if is_postgresql else SQLITE)[what]
    database = close_engine.connect(healthy_url if is_postgresql else "sqlite:///:memory:")
    if not is_postgresql:
        close_engine.migrate(standalone=True)
        fill()
    with close_engine.atomic() as transaction:
        for statement in [words(change, True)] if is_postgresql else words(change, False).split("; "):
            database.execute_sql(statement)
        if is_postgresql:
            database.execute_sql("SET LOCAL session_replication_role = origin")  # some changes bypass the triggers
        found = close_engine.verify()
        assert found == [words(problem, is_postgresql) for problem in problems]

        if by == "migrate":
            assert close_engine.migrate() == SCRIPTS
        else:
            mended = repair()
            assert [problem for what in mended for problem in found if problem.startswith(what)] == found
            assert repair() == []

        assert close_engine.verify() == []
        assert close_engine.migrate() == []
        conversation = close_engine.open_conversation(Lead.create(phone="+1557"), EntryPoint.SMS_REPLY)
        assert bring_to(conversation, Stage.COMPLETED).stage is Stage.COMPLETED
        transaction.rollback()
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
        f"triggers on {TABLE}",
        "allowed stage changes",
        "back-references",
        "history",
        f"values in {TABLE}",
        "values in leads",
    } <= set(subjects)


def test_every_trigger_and_function_that_the_migrations_make_is_looked_for(database: peewee.Database) -> None:
    catalog = current().dialect.catalog(database)
    ours = ("outbox", "history", "subscriptions", "events", "bursts", "takeovers", "pauses", "deliveries")
    places = (None, TABLE), (None, "pending_actions"), *map(current().dialect.own_table, ours)
    there = {(table, name) for schema, table in places for name in catalog.triggers(table, schema)}

    assert {(trigger.table, trigger.name) for trigger in scripts.triggers()} == there
    assert {function.name for function in scripts.functions()} == set(catalog.functions())
    assert len(there) > 7
    if isinstance(database, peewee.PostgresqlDatabase):
        assert len(catalog.functions()) > 6


def test_a_database_without_anything_has_one_problem_and_stays_empty(empty_url: str) -> None:
    before = everything(empty_url)
    database = close_engine.connect(empty_url)

    problem = Problem("The database is not migrated", "run close-engine migrate, or close_engine.migrate()")
    assert checks() == [Check("migrations", [problem])]
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
        assert close_engine.verify() == [
            f"This role may not read the sequence close_engine.{table}_id_seq, so it is not checked: "
            f"have its owner GRANT SELECT ON SEQUENCE close_engine.{table}_id_seq."
            for table in ("history", "deliveries", "optouts", "pauses", "takeovers", "outbox", "inbox", "texts")
        ]
        execute(postgres_url, f"GRANT SELECT ON ALL SEQUENCES IN SCHEMA close_engine TO {reader}")
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
