"""What a database role might try to get past the guard, or to forge the history. Each trick is tried, on PostgreSQL.

The roles have what the documentation grants them, and more than that: they may make tables, functions and operators in
`public` and in a schema of their own, as every role may where nobody has revoked it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import psycopg2
import pytest

from close_engine.machine import pairs
from tests.command_line import as_user, postgres_role
from tests.foreign import ForeignWriter
from tests.test_roles import CRM, WORKER

TABLE = "public.close_engine_conversations"

#: A change that nobody may make: COMPLETED is final.
ILLEGAL = f"UPDATE {TABLE} SET stage = 'INITIATED' WHERE id = 'paid'"
REFUSED = "cannot go from COMPLETED to INITIATED"

#: What PostgreSQL itself says to who does not own a thing, or may not use it.
DENIED = "permission denied|must be owner|must be superuser|must be able to|no schema has been selected"


class Trick(NamedTuple):
    """Statements, each in a transaction of its own, and how the last one that fails is refused, if any is."""

    refused: str
    statements: list[str]


def trick(*statements: str, refused: str = "^$") -> Trick:
    return Trick(refused, list(statements))


def columns(stage: str) -> str:
    return f"(id, lead_id, entry_point, stage, updated_at) VALUES ('new', 'lead d', 'SMS_REPLY', '{stage}', now())"


def sweep(at: str) -> str:
    """A sweep as the library makes it, but at another time."""
    context = f"jsonb_build_object('trigger', 'stall', 'transaction', pg_current_xact_id()::text, 'at', '{at}')::text"
    return (
        f"DO $$BEGIN PERFORM set_config('close_engine.context', {context}, true); "
        "PERFORM close_engine.sweep(ARRAY['building'], 'stall'); END$$"
    )


FORGED = """INSERT INTO close_engine.history (conversation_id, lead_id, trigger, source, dest, actor, created_at)
    VALUES ('paid', 'lead a', 'reopen', 'COMPLETED', 'INITIATED', 'owner', '2020-01-01')"""
A_FUNCTION = "CREATE FUNCTION {name} RETURNS {returns} LANGUAGE {language} AS $${body}$$"

TRICKS: dict[str, Trick] = {
    # -- other ways to write a row
    "an UPDATE": trick(ILLEGAL, refused=REFUSED),
    "a prepared statement": trick(f"PREPARE p AS {ILLEGAL}", "EXECUTE p", refused=REFUSED),
    "COPY of an unknown stage": trick(
        f"COPY {TABLE} (id, lead_id, entry_point, stage, updated_at) FROM STDIN\n"
        "new\tlead d\tSMS_REPLY\tLIMBO\t2026-01-01\n",
        refused="LIMBO is not a stage",
    ),
    "COPY of a stage": trick(
        f"COPY {TABLE} (id, lead_id, entry_point, stage, updated_at) FROM STDIN\n"
        "new\tlead d\tSMS_REPLY\tPAYMENT_SENT\t2026-01-01\n"
    ),
    "MERGE": trick(
        f"MERGE INTO {TABLE} c USING (SELECT 'paid' AS id) s ON c.id = s.id "
        "WHEN MATCHED THEN UPDATE SET stage = 'INITIATED'",
        refused=REFUSED,
    ),
    "MERGE of a change that is allowed": trick(
        f"MERGE INTO {TABLE} c USING (SELECT 'building' AS id) s ON c.id = s.id "
        "WHEN MATCHED THEN UPDATE SET stage = 'STALLED'"
    ),
    "MERGE that inserts": trick(
        f"MERGE INTO {TABLE} c USING (SELECT 'new' AS id) s ON c.id = s.id WHEN NOT MATCHED THEN INSERT "
        + columns("LIMBO"),
        refused="LIMBO is not a stage",
    ),
    "ON CONFLICT": trick(
        f"INSERT INTO {TABLE} (id, lead_id, entry_point, stage, updated_at) "
        "VALUES ('paid', 'lead d', 'SMS_REPLY', 'INITIATED', now()) "
        "ON CONFLICT (id) DO UPDATE SET stage = EXCLUDED.stage",
        refused=REFUSED,
    ),
    "ON CONFLICT of the lead": trick(
        f"INSERT INTO {TABLE} (id, lead_id, entry_point, stage, updated_at) "
        "VALUES ('new', 'lead b', 'SMS_REPLY', 'STALLED', now()) "
        "ON CONFLICT (lead_id) DO UPDATE SET stage = EXCLUDED.stage"
    ),
    "deleting and inserting in one statement": trick(
        f"WITH gone AS (DELETE FROM {TABLE} WHERE id = 'stalled' RETURNING *) "
        f"INSERT INTO {TABLE} {columns('INITIATED')}",
        refused="^$|permission denied",
    ),
    "a cursor": trick(
        f"DO $$DECLARE c CURSOR FOR SELECT * FROM {TABLE} WHERE id = 'paid' FOR UPDATE; r record; "
        f"BEGIN OPEN c; FETCH c INTO r; UPDATE {TABLE} SET stage = 'INITIATED' WHERE CURRENT OF c; END$$",
        refused=REFUSED,
    ),
    "an error that is caught": trick(f"DO $$BEGIN {ILLEGAL}; EXCEPTION WHEN OTHERS THEN NULL; END$$"),
    "two steps, of which the second is caught": trick(
        f"DO $$BEGIN UPDATE {TABLE} SET stage = 'STALLED' WHERE id = 'building'; "
        f"BEGIN {ILLEGAL}; EXCEPTION WHEN OTHERS THEN NULL; END; END$$"
    ),
    "a function that changes the row while it is changed": trick(
        A_FUNCTION.format(
            name="mine.hop()",
            returns="text",
            language="plpgsql",
            body=f"BEGIN UPDATE {TABLE} SET stage = 'STALLED' WHERE id = 'building'; RETURN 'COMPLETED'; END",
        ),
        f"UPDATE {TABLE} SET stage = mine.hop() WHERE id = 'building'",
        refused="already modified by an operation triggered by the current command",
    ),
    "another id": trick(f"UPDATE {TABLE} SET id = 'other' WHERE id = 'paid'", refused="cannot change its id"),
    "deferred constraints": trick(f"BEGIN; SET CONSTRAINTS ALL DEFERRED; {ILLEGAL}; COMMIT", refused=REFUSED),
    "a view": trick(
        f"CREATE VIEW mine.seen AS SELECT * FROM {TABLE}",
        "UPDATE mine.seen SET stage = 'INITIATED' WHERE id = 'paid'",
        refused=REFUSED,
    ),
    "a view of a change that is allowed": trick(
        f"CREATE VIEW mine.seen AS SELECT * FROM {TABLE}",
        "UPDATE mine.seen SET stage = 'STALLED' WHERE id = 'building'",
    ),
    "a rule of one's own view": trick(
        f"CREATE VIEW mine.seen AS SELECT * FROM {TABLE}",
        f"CREATE RULE r AS ON DELETE TO mine.seen DO INSTEAD UPDATE {TABLE} SET stage = 'INITIATED' WHERE id = OLD.id",
        "DELETE FROM mine.seen WHERE id = 'paid'",
        refused=REFUSED,
    ),
    "a trigger of one's own view": trick(
        f"CREATE VIEW mine.seen AS SELECT * FROM {TABLE}",
        A_FUNCTION.format(
            name="mine.instead()", returns="trigger", language="plpgsql", body=f"BEGIN {ILLEGAL}; RETURN NEW; END"
        ),
        "CREATE TRIGGER t INSTEAD OF UPDATE ON mine.seen FOR EACH ROW EXECUTE FUNCTION mine.instead()",
        "UPDATE mine.seen SET stage = 'INITIATED' WHERE id = 'paid'",
        refused=REFUSED,
    ),
    # -- the table, its triggers and our functions
    "a rule": trick(f"CREATE RULE r AS ON INSERT TO {TABLE} DO INSTEAD NOTHING", refused=DENIED),
    "inheritance": trick(f"CREATE TABLE mine.child () INHERITS ({TABLE})", refused=DENIED),
    "a partition": trick(
        f"CREATE TABLE mine.parts (LIKE {TABLE}) PARTITION BY LIST (stage)",
        f"ALTER TABLE mine.parts ATTACH PARTITION {TABLE} DEFAULT",
        refused=DENIED,
    ),
    "a partition of one's own with our name": trick(
        f"CREATE TABLE mine.close_engine_conversations (LIKE {TABLE})",
        "INSERT INTO mine.close_engine_conversations " + columns("COMPLETED"),
        "SET search_path = mine, public",
        "UPDATE public.close_engine_conversations SET stage = 'INITIATED' WHERE id = 'paid'",
        refused=REFUSED,
    ),
    "DISABLE TRIGGER": trick(f"ALTER TABLE {TABLE} DISABLE TRIGGER ALL", ILLEGAL, refused=REFUSED),
    "DISABLE TRIGGER alone": trick(f"ALTER TABLE {TABLE} DISABLE TRIGGER USER", refused=DENIED),
    "ENABLE REPLICA TRIGGER": trick(
        f"ALTER TABLE {TABLE} ENABLE REPLICA TRIGGER zz_close_engine_guard", refused=DENIED
    ),
    "DROP TRIGGER": trick(f"DROP TRIGGER zz_close_engine_guard ON {TABLE}", refused=DENIED),
    "a trigger after the guard": trick(
        A_FUNCTION.format(
            name="mine.later()",
            returns="trigger",
            language="plpgsql",
            body="BEGIN NEW.stage := 'INITIATED'; RETURN NEW; END",
        ),
        f"CREATE TRIGGER zzz BEFORE UPDATE ON {TABLE} FOR EACH ROW EXECUTE FUNCTION mine.later()",
        refused=DENIED,
    ),
    "another name": trick(f"ALTER TABLE {TABLE} RENAME TO gone", refused=DENIED),
    "another schema": trick(f"ALTER TABLE {TABLE} SET SCHEMA mine", refused=DENIED),
    "another owner": trick(f"ALTER TABLE {TABLE} OWNER TO CURRENT_USER", refused=DENIED),
    "another type": trick(f"ALTER TABLE {TABLE} ALTER COLUMN stage TYPE varchar", refused=DENIED),
    "row-level security": trick(f"ALTER TABLE {TABLE} ENABLE ROW LEVEL SECURITY", refused=DENIED),
    "TRUNCATE": trick(f"TRUNCATE {TABLE}", refused=DENIED),
    "TRUNCATE of the history": trick("TRUNCATE close_engine.history", refused=DENIED),
    "another guard": trick(
        "CREATE OR REPLACE FUNCTION close_engine.guard_conversation() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RETURN NEW; END$$",
        refused=DENIED,
    ),
    "another clock": trick("ALTER FUNCTION close_engine.moment() RENAME TO gone", refused=DENIED),
    "another search_path of the guard": trick(
        "ALTER FUNCTION close_engine.guard_conversation() SET search_path = mine", refused=DENIED
    ),
    "dropping our schema": trick("DROP SCHEMA close_engine CASCADE", refused=DENIED),
    "our trigger on a table of one's own": trick(
        f"CREATE TABLE mine.forged (LIKE {TABLE})",
        "CREATE TRIGGER t AFTER INSERT ON mine.forged FOR EACH ROW EXECUTE FUNCTION close_engine.record_opening()",
        refused=DENIED,
    ),
    "our guard on a table of one's own": trick(
        f"CREATE TEMPORARY TABLE close_engine_conversations (LIKE {TABLE})",
        "CREATE TRIGGER t BEFORE INSERT OR UPDATE ON pg_temp.close_engine_conversations "
        "FOR EACH ROW EXECUTE FUNCTION close_engine.guard_conversation()",
        refused=DENIED,
    ),
    # -- our tables and functions, directly
    "a row of the history": trick(FORGED, refused=DENIED),
    "another row of the history": trick("UPDATE close_engine.history SET actor = 'nobody'", refused=DENIED),
    "no history": trick("DELETE FROM close_engine.history", refused=DENIED),
    "another transition": trick(
        "INSERT INTO close_engine.transitions VALUES ('conversation', 'hop', 'COMPLETED', 'INITIATED')",
        ILLEGAL,
        refused=REFUSED,
    ),
    "that a sweep records it": trick(
        "INSERT INTO close_engine.sweeping VALUES (pg_current_xact_id(), 'COMPLETED', 'INITIATED', now())",
        "SET close_engine.sweeping = 'on'",
        ILLEGAL,
        refused=REFUSED,
    ),
    "a sweep": trick("SELECT close_engine.sweep(ARRAY['building'], 'close_lost')", refused=f"{DENIED}|cannot sweep"),
    "a sweep to another stage": trick(
        sweep("2026-01-01").replace("stall", "reopen").replace("building", "paid"),
        refused=f"{DENIED}|cannot sweep",
    ),
    "a sweep in the far future": trick(sweep("9998-01-01"), refused=f"{DENIED}|cannot sweep"),
    "a sweep that never ends": trick(sweep("infinity"), refused=f"{DENIED}|cannot sweep"),
    "a delivery": trick("SELECT close_engine.adopt_delivery(1, 'p', 's')", refused=DENIED),
    "the numbers of the history": trick("SELECT setval('close_engine.history_id_seq', 1)", refused=DENIED),
    "no guard that was missed": trick("SELECT close_engine.recorded()", refused=f"{DENIED}|unrecognized configuration"),
    # -- settings
    "session_replication_role": trick("SET session_replication_role = replica", ILLEGAL, refused=REFUSED),
    "session_replication_role alone": trick("SET session_replication_role = replica", refused=DENIED),
    "session_replication_role of the role": trick(
        "ALTER ROLE CURRENT_USER SET session_replication_role = replica", refused=DENIED
    ),
    "session_replication_role of a function": trick(
        "CREATE FUNCTION mine.free() RETURNS void LANGUAGE sql SET session_replication_role = replica "
        f"AS $${ILLEGAL}$$",
        "SELECT mine.free()",
        refused=f"{DENIED}|does not exist",
    ),
    "settings of plpgsql": trick(
        "SET plpgsql.extra_errors = 'all'", "SET plpgsql.check_asserts = off", ILLEGAL, refused=REFUSED
    ),
    "names that mean something else": trick(
        "SET plpgsql.variable_conflict = use_variable",
        f"UPDATE {TABLE} SET stage = 'STALLED' WHERE id = 'building'",
        ILLEGAL,
        refused=REFUSED,
    ),
    "NULL that equals": trick("SET transform_null_equals = on", ILLEGAL, refused=REFUSED),
    "another role": trick("SET ROLE postgres", refused=DENIED),
    "another role of a function": trick(
        f"CREATE FUNCTION mine.free() RETURNS void LANGUAGE sql SET role = 'postgres' AS $${ILLEGAL}$$",
        "SELECT mine.free()",
        refused=f"{DENIED}|does not exist|cannot set",
    ),
    "another session": trick("SET SESSION AUTHORIZATION postgres", refused=DENIED),
    "the owner's rights": trick("GRANT postgres TO CURRENT_USER", refused=DENIED),
    "rights on our tables": trick("GRANT ALL ON close_engine.history TO CURRENT_USER", FORGED, refused=DENIED),
    "a SECURITY DEFINER function": trick(
        "CREATE FUNCTION mine.free() RETURNS void LANGUAGE sql SECURITY DEFINER AS $$" + ILLEGAL + "$$",
        "SELECT mine.free()",
        refused=REFUSED,
    ),
    # -- what stands in the way of ours
    "functions in public": trick(
        "CREATE FUNCTION public.moment() RETURNS timestamp LANGUAGE sql AS $$SELECT timestamp '2000-01-01'$$",
        "CREATE FUNCTION public.current_setting(text, boolean) RETURNS text LANGUAGE sql AS "
        '$$SELECT \'{"actor": "x"}\'::text$$',
        "CREATE FUNCTION public.to_regclass(text) RETURNS regclass LANGUAGE sql AS $$SELECT NULL::regclass$$",
        "SET search_path = public, pg_catalog",
        ILLEGAL,
        refused=REFUSED,
    ),
    "operators in public": trick(
        "CREATE FUNCTION mine.yes(text, text) RETURNS boolean LANGUAGE sql AS $$SELECT true$$",
        "CREATE OPERATOR public.= (LEFTARG = text, RIGHTARG = text, FUNCTION = mine.yes)",
        "CREATE OPERATOR public.<> (LEFTARG = text, RIGHTARG = text, FUNCTION = mine.yes)",
        "SET search_path = public, pg_catalog",
        f"UPDATE {TABLE} SET stage = 'INITIATED' WHERE id OPERATOR(pg_catalog.=) 'paid'",
        refused=REFUSED,
    ),
    "tables and types in pg_temp": trick(
        "CREATE TEMPORARY TABLE transitions (machine text, trigger text, source text, dest text, subscribed boolean)",
        "INSERT INTO transitions VALUES ('conversation', 'hop', 'COMPLETED', 'INITIATED', false)",
        "CREATE DOMAIN pg_temp.timestamp AS text",
        "SET search_path = pg_temp, pg_catalog",
        ILLEGAL,
        refused=REFUSED,
    ),
    "functions and operators in pg_temp": trick(
        "CREATE FUNCTION pg_temp.yes(text, text) RETURNS boolean LANGUAGE sql AS $$SELECT true$$",
        "CREATE OPERATOR pg_temp.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_temp.yes)",
        "CREATE FUNCTION pg_temp.set_config(text, text, boolean) RETURNS text LANGUAGE sql AS $$SELECT 'x'::text$$",
        "SET search_path = pg_temp",
        f"UPDATE {TABLE} SET stage = 'STALLED' WHERE id OPERATOR(pg_catalog.=) 'building'",
    ),
    "a cast": trick(
        "CREATE FUNCTION mine.cast(text) RETURNS name LANGUAGE sql AS $$SELECT 'owner'::name$$",
        "CREATE CAST (text AS name) WITH FUNCTION mine.cast(text) AS IMPLICIT",
        refused=DENIED,
    ),
    "a class of operators": trick(
        "CREATE OPERATOR CLASS mine.texts DEFAULT FOR TYPE text USING btree AS STORAGE text", refused=DENIED
    ),
    # -- the server
    "COPY from a program": trick(f"COPY {TABLE} FROM PROGRAM 'true'", refused=DENIED),
    "COPY from a file": trick(f"COPY {TABLE} FROM '/etc/passwd'", refused=DENIED),
    "COPY to a file": trick(f"COPY {TABLE} TO '/tmp/close_engine_forbidden'", refused=DENIED),
    "a large object of a file": trick("SELECT lo_import('/etc/passwd')", refused=DENIED),
    "a large object to a file": trick(
        "DO $$BEGIN PERFORM lo_export(lo_from_bytea(0, 'x'), '/tmp/close_engine_forbidden'); END$$", refused=DENIED
    ),
    "the catalog": trick("UPDATE pg_catalog.pg_trigger SET tgenabled = 'D'", refused=DENIED),
    "an event trigger": trick(
        A_FUNCTION.format(name="mine.ddl()", returns="event_trigger", language="plpgsql", body="BEGIN END"),
        "CREATE EVENT TRIGGER e ON ddl_command_start EXECUTE FUNCTION mine.ddl()",
        refused=DENIED,
    ),
    "a function in C": trick(
        "CREATE FUNCTION mine.system(cstring) RETURNS integer LANGUAGE c AS 'libc.so.6', 'system'", refused=DENIED
    ),
    "a subscription": trick(
        "CREATE SUBSCRIPTION s CONNECTION 'dbname=x' PUBLICATION p WITH (connect = false)", refused=DENIED
    ),
    "settings of the server": trick("ALTER SYSTEM SET session_replication_role = 'replica'", refused=DENIED),
    # -- decisions
    "an action that begins decided": trick(
        "COPY public.pending_actions (id, conversation_id, lead_id, type, draft_message, status) FROM STDIN\n"
        "new\tbuilding\tlead b\tSEND_MESSAGE\tHi\tAPPROVED\n",
        refused="cannot begin as APPROVED",
    ),
    "MERGE that approves what has expired": trick(
        "MERGE INTO public.pending_actions a USING (SELECT 'late' AS id) s ON a.id = s.id "
        "WHEN MATCHED THEN UPDATE SET status = 'APPROVED', approved_at = '2020-01-01'",
        refused="has expired",
    ),
    "ON CONFLICT that decides again": trick(
        "INSERT INTO public.pending_actions (id, conversation_id, lead_id, type, draft_message) "
        "VALUES ('rejected', 'building', 'lead b', 'SEND_MESSAGE', 'Hi') "
        "ON CONFLICT (id) DO UPDATE SET status = 'APPROVED'",
        refused="cannot go from REJECTED to APPROVED",
    ),
    "a payment link that nobody approves, through a view": trick(
        "CREATE VIEW mine.drafts AS SELECT * FROM public.pending_actions",
        "UPDATE mine.drafts SET status = 'APPROVED' WHERE id = 'link'",
        refused="somebody must approve a payment link",
    ),
    "somebody else who decided": trick("UPDATE public.pending_actions SET approved_by = 'x' WHERE id = 'rejected'"),
}


@pytest.fixture
def owner(postgres_url: str) -> Iterator[ForeignWriter]:
    """Who may read and write everything."""
    writer = ForeignWriter(psycopg2.connect(postgres_url))
    writer.connection.autocommit = True
    yield writer
    writer.connection.close()


@contextmanager
def having(owner: ForeignWriter, url: str, rights: list[str]) -> Iterator[tuple[str, ForeignWriter]]:
    """A role with these rights, and a schema of its own. It may also make leads, and things in `public`."""
    with postgres_role(url) as (role, password):
        for right in (*rights, "GRANT SELECT, INSERT ON leads TO {role}", "GRANT CREATE ON SCHEMA public TO {role}"):
            owner.run(right.format(role=role))
        owner.run(f"CREATE SCHEMA mine AUTHORIZATION {role}")
        writer = ForeignWriter(psycopg2.connect(as_user(url, role, password)))
        writer.connection.autocommit = True
        try:
            yield role, writer
        finally:
            writer.connection.close()
            owner.run(f"DROP OWNED BY {role} CASCADE")


def fill(owner: ForeignWriter) -> None:
    """Make a conversation that is paid and others that go on, and drafts."""
    owner.run("DELETE FROM leads")
    owner.run("DELETE FROM pending_actions")
    for lead, stage in (("a", "COMPLETED"), ("b", "BUILDING"), ("c", "STALLED"), ("d", None)):
        owner.run("INSERT INTO leads (id, phone) VALUES (%s, '+15550100')", f"lead {lead}")
        if stage:
            owner.insert(stage, {"COMPLETED": "paid"}.get(stage, stage.lower()), lead_id=f"lead {lead}")
    for action, type in (("late", "SEND_MESSAGE"), ("rejected", "SEND_MESSAGE"), ("link", "SEND_PAYMENT_LINK")):
        owner.run(
            "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message) "
            "VALUES (%s, 'building', 'lead b', %s, 'Hi')",
            *(action, type),
        )
    owner.run("UPDATE pending_actions SET status = 'REJECTED', approved_by = 'ann' WHERE id = 'rejected'")
    owner.run("UPDATE pending_actions SET expires_at = '2020-01-01' WHERE id = 'late'")


#: What no trick may change: the paid conversation, what was decided, what may happen, and who guards it.
KEPT = [
    f"SELECT * FROM {TABLE} WHERE id = 'paid'",
    "SELECT * FROM pending_actions ORDER BY id",
    "SELECT * FROM close_engine.transitions ORDER BY machine, trigger, source, dest",
    "SELECT * FROM close_engine.sweeping",
    "SELECT p.oid, p.prosrc, p.proconfig, p.proowner FROM pg_proc p "
    "WHERE p.pronamespace = 'close_engine'::regnamespace ORDER BY 1",
    "SELECT t.oid, t.tgrelid, t.tgenabled FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid "
    "WHERE p.pronamespace = 'close_engine'::regnamespace ORDER BY 1",
    "SELECT c.oid, c.relowner, c.relnamespace, c.relname FROM pg_class c WHERE c.relkind = 'r' "
    "AND c.relnamespace IN ('public'::regnamespace, 'close_engine'::regnamespace) ORDER BY 1",
]

HISTORY = "SELECT id, conversation_id, trigger, source, dest, actor FROM close_engine.history ORDER BY id"


def tried(writer: ForeignWriter, statements: list[str]) -> str:
    """Run the statements, however each of them ends, and return what the last refusal says."""
    refusal = ""
    for statement in statements:
        try:
            if statement.startswith("COPY") and "STDIN" in statement:
                command, _, rows = statement.partition("\n")
                with writer.connection.cursor() as cursor:
                    cursor.copy_expert(command, io.StringIO(rows))
            else:
                writer.run(statement)
        except psycopg2.Error as error:
            writer.connection.rollback()
            refusal = str(error)
    return refusal


@pytest.mark.parametrize("name", TRICKS)
def test_no_trick_gets_past_the_guard(name: str, owner: ForeignWriter, postgres_url: str) -> None:
    allowed = {(source, dest) for _, source, dest in pairs()}
    for rights in (CRM, WORKER):
        fill(owner)
        with having(owner, postgres_url, rights) as (role, writer):
            kept, before = [owner.run(query) for query in KEPT], owner.run(HISTORY)

            refusal = tried(writer, TRICKS[name].statements)

            assert re.search(TRICKS[name].refused, refusal)
            assert [owner.run(query) for query in KEPT] == kept
            after = owner.run(HISTORY)
            assert after[: len(before)] == before
            # Whatever was changed is one allowed step further, and recorded under the role's own name.
            stages: dict[str, Any] = {conversation: dest for _, conversation, _, _, dest, _ in before}
            for _, conversation, trigger, source, dest, actor in after[len(before) :]:
                assert actor == f"database:{role}"
                assert trigger == "open" or (source == stages[conversation] and (source, dest) in allowed)
                stages[conversation] = dest
            stored = dict(owner.run(f"SELECT id, stage FROM {TABLE}"))
            assert {conversation: stages[conversation] for conversation in stored} == stored
