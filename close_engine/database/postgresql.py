"""PostgreSQL: the library's tables have a schema of their own; the context is a setting that ends with the transaction.

>>> POSTGRES.own_table("history")
('close_engine', 'history')
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import peewee

from close_engine.database.catalog import Catalog, Column, ForeignKey, Function, Index, Trigger
from close_engine.database.dialect import Dialect, Found
from close_engine.database.provenance import Provenance, Write
from close_engine.errors import GuardMissing, SchemaError, StageConflict, sqlstate

__all__ = ["POSTGRES", "Postgres", "PostgresCatalog"]

#: The same text as in the first migration, which creates the schema if it runs without this library.
_MADE_HERE = "Made by the migrations of close_engine, and dropped with them."

#: Type in DDL to type as PostgreSQL prints it, unless that is the same in lower case.
_PRINTED = {"BIGSERIAL": "bigint", "SERIAL": "integer", "TIMESTAMP(3)": "timestamp(3) without time zone"}

#: The key of the advisory lock that a migrating process holds.
_LOCK_KEY = "pg_catalog.hashtext('close_engine.migrate'::text)::bigint"

#: The SQLSTATE of a lock that was not free within lock_timeout.
_LOCK_NOT_AVAILABLE = "55P03"

#: The SQLSTATE of a statement that met what another transaction wrote, and must not see it.
_SERIALIZATION_FAILURE = "40001"

#: The most bytes of a name that PostgreSQL keeps.
_LONGEST_NAME = 63

#: The longest lock_timeout, in milliseconds.
_LONGEST_WAIT = 2**31 - 1

_ACTIONS = {"a": "NO ACTION", "c": "CASCADE", "d": "SET DEFAULT", "n": "SET NULL", "r": "RESTRICT"}


#: The roles whose rights the library's functions have, and the tables that they read and write.
_FUNCTION_OWNERS_AND_TABLES = """
    WITH owners AS (
        SELECT DISTINCT p.proowner AS id, pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(p.proowner)::text) AS name
        FROM pg_catalog.pg_proc p
        JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace AND n.nspname = 'close_engine'
        WHERE p.prosecdef
    ), tables AS (
        SELECT c.oid AS id, n.nspname = 'close_engine' AS is_ours,
            pg_catalog.quote_ident(n.nspname::text) || '.' || c.relname AS name
        FROM pg_catalog.pg_class c
        JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
        WHERE n.nspname = 'close_engine'
                AND c.relname IN ('carried', 'deadlines', 'history', 'outbox', 'subscriptions', 'transitions')
            OR n.nspname = pg_catalog.current_schema()
                AND c.relname IN ('close_engine_conversations', 'pending_actions')
    )
"""


class PostgresCatalog(Catalog):
    """Reads pg_catalog, because information_schema shows a role only what the role has rights on."""

    exact = True

    def columns(self, table: str, schema: str | None = None) -> dict[str, Column]:
        rows = self.database.execute_sql(
            """
            SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull,
                coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid), nullif(a.attidentity::text, ''))
            FROM pg_catalog.pg_class c
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                AND n.nspname = coalesce(%s::name, pg_catalog.current_schema())
            JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
            WHERE c.relname = %s AND c.relkind IN ('r', 'p') ORDER BY a.attnum
            """,
            (schema, table),
        ).fetchall()
        return {name: Column(type_, required, default) for name, type_, required, default in rows}

    def indexes(self, table: str, schema: str | None = None) -> dict[str, Index]:
        rows = self.database.execute_sql(
            """
            SELECT x.relname, i.indisunique, i.indpred IS NOT NULL, ARRAY(
                SELECT coalesce(a.attname::text, 'an expression')
                FROM pg_catalog.unnest(i.indkey) WITH ORDINALITY AS k (number, place)
                LEFT JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number ORDER BY k.place
            )
            FROM pg_catalog.pg_index i
            JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
            JOIN pg_catalog.pg_class c ON c.oid = i.indrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                AND n.nspname = coalesce(%s::name, pg_catalog.current_schema())
            WHERE c.relname = %s
            """,
            (schema, table),
        ).fetchall()
        return {name: Index(tuple(columns), unique, partial) for name, unique, partial, columns in rows}

    def foreign_keys(self, table: str) -> list[ForeignKey]:
        rows = self.database.execute_sql(
            """
            SELECT k.conname, a.attname, t.relname, k.confdeltype::text, k.confupdtype::text
            FROM pg_catalog.pg_constraint k
            JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = pg_catalog.current_schema()
            JOIN pg_catalog.pg_class t ON t.oid = k.confrelid
            JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.conkey[1]
            WHERE c.relname = %s AND k.contype = 'f' ORDER BY k.conname
            """,
            (table,),
        ).fetchall()
        return [
            ForeignKey(name, column, target, _ACTIONS[on_delete], _ACTIONS[on_update])
            for name, column, target, on_delete, on_update in rows
        ]

    def triggers(self, table: str, schema: str | None = None) -> dict[str, Trigger]:
        rows = self.database.execute_sql(
            """
            SELECT t.tgname, pg_catalog.pg_get_triggerdef(t.oid), t.tgenabled IN ('O', 'A'),
                t.tgtype & 1 > 0 AND t.tgtype & 2 > 0 AND t.tgtype & (4 | 16) > 0 -- each row, before, insert or update
            FROM pg_catalog.pg_trigger t
            JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
                AND n.nspname = coalesce(%s::name, pg_catalog.current_schema())
            WHERE c.relname = %s AND NOT t.tgisinternal ORDER BY t.tgname
            """,
            (schema, table),
        ).fetchall()
        return {
            name: Trigger(self.printed_trigger(statement), enabled, rewrites)
            for name, statement, enabled, rewrites in rows
        }

    def printed_trigger(self, statement: str) -> str:
        # PostgreSQL prints the events in an order of its own, a condition with more parentheses and casts than anybody
        # writes, OLD and NEW in lower case, and IN as = ANY (ARRAY[…]).
        statement = statement.replace("CREATE OR REPLACE ", "CREATE ", 1)
        statement = re.sub(r"::\w+|[()\[\]\s]+", " ", statement)
        statement = re.sub(r"\b(OLD|NEW)[.]", lambda found: found[0].lower(), statement)
        statement = re.sub(
            r"(?<=BEFORE |.AFTER )[A-Z ]+(?= ON )",
            lambda events: " OR ".join(sorted(events[0].split(" OR "))),
            statement,
        )
        statement = re.sub(r"\s+(?=,)|(?<=\s)\s+", "", statement).strip()
        return statement.replace(" = ANY ARRAY ", " IN ")

    def schema(self) -> str:
        ((schema,),) = self._rows("SELECT pg_catalog.quote_ident(pg_catalog.current_schema()::text)")
        return str(schema)

    def guarded_schemas(self) -> list[str]:
        rows = self._rows(
            """
            SELECT DISTINCT pg_catalog.quote_ident(n.nspname::text) FROM pg_catalog.pg_trigger t
            JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
            JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace AND f.nspname = 'close_engine'
            JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid AND c.relname = 'close_engine_conversations'
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
            ORDER BY 1
            """
        )
        return [name for (name,) in rows]

    def functions(self) -> dict[str, Function]:
        rows = self._rows(
            """
            SELECT p.proname, p.prosrc,
                p.prosecdef AND 'search_path=pg_catalog, pg_temp' = ANY (p.proconfig),
                pg_catalog.pg_get_userbyid(p.proowner)::text,
                ARRAY(
                    SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC'
                        ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text) END
                    FROM pg_catalog.aclexplode(coalesce(p.proacl, pg_catalog.acldefault('f', p.proowner))) a
                    WHERE a.grantee <> p.proowner ORDER BY 1
                )
            FROM pg_catalog.pg_proc p
            JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace AND n.nspname = 'close_engine'
            ORDER BY 1
            """
        )
        return {
            name: Function(body, bool(protected), owner, tuple(executors))
            for name, body, protected, owner, executors in rows
        }

    def owners(self) -> list[tuple[str, str, str]]:
        return self._rows(
            """
            SELECT 'FUNCTION', p.oid::pg_catalog.regprocedure::text, pg_catalog.pg_get_userbyid(p.proowner)::text
            FROM pg_catalog.pg_proc p
            JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace AND n.nspname = 'close_engine'
            UNION ALL
            SELECT 'TABLE', n.nspname || '.' || c.relname, pg_catalog.pg_get_userbyid(c.relowner)::text
            FROM pg_catalog.pg_class c
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'close_engine'
            WHERE c.relkind IN ('r', 'p')
            ORDER BY 1, 2
            """
        )

    def missing_rights(self) -> list[tuple[str, str, str]]:
        return self._rows(
            f"""
            {_FUNCTION_OWNERS_AND_TABLES}
            SELECT o.name, r.name, t.name
            FROM owners o CROSS JOIN tables t
            CROSS JOIN (VALUES ('SELECT', false), ('UPDATE', false), ('INSERT', true), ('DELETE', true))
                AS r (name, is_for_ours)
            WHERE (t.is_ours OR NOT r.is_for_ours)
                AND NOT pg_catalog.has_table_privilege(o.id, t.id, r.name)
            UNION ALL
            SELECT o.name, 'USAGE', 'SCHEMA ' || pg_catalog.quote_ident(pg_catalog.current_schema()::text)
            FROM owners o WHERE NOT pg_catalog.has_schema_privilege(o.id, pg_catalog.current_schema()::text, 'USAGE')
            ORDER BY 1, 3, 2
            """
        )

    def forgers(self) -> list[tuple[str, str, str]]:
        return self._rows(
            """
            SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC'
                    ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text) END,
                a.privilege_type, 'close_engine.' || c.relname
            FROM pg_catalog.pg_class c
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'close_engine'
            CROSS JOIN pg_catalog.aclexplode(c.relacl) a
            WHERE c.relname IN ('created', 'history', 'migrations', 'sweeping', 'transitions')
                AND a.grantee <> c.relowner AND a.privilege_type IN ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
            UNION ALL
            SELECT CASE a.grantee WHEN 0 THEN 'PUBLIC'
                    ELSE pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)::text) END,
                a.privilege_type || ' (' || pg_catalog.quote_ident(t.attname::text) || ')', 'close_engine.' || c.relname
            FROM pg_catalog.pg_class c
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'close_engine'
            JOIN pg_catalog.pg_attribute t ON t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped
            CROSS JOIN pg_catalog.aclexplode(t.attacl) a
            WHERE c.relname IN ('created', 'history', 'migrations', 'sweeping', 'transitions')
                AND a.grantee <> c.relowner AND a.privilege_type IN ('INSERT', 'UPDATE')
                -- Whoever forgets a lead empties these two.
                AND NOT (c.relname = 'history' AND t.attname IN ('reason', 'metadata') AND a.privilege_type = 'UPDATE')
            ORDER BY 3, 1, 2
            """
        )

    def hidden_rows(self) -> list[tuple[str, str]]:
        return self._rows(
            f"""
            {_FUNCTION_OWNERS_AND_TABLES}
            SELECT t.name, o.name
            FROM owners o CROSS JOIN tables t
            JOIN pg_catalog.pg_class c ON c.oid = t.id AND c.relrowsecurity
            JOIN pg_catalog.pg_roles r ON r.oid = o.id AND NOT r.rolsuper AND NOT r.rolbypassrls
            WHERE (c.relforcerowsecurity OR NOT pg_catalog.pg_has_role(o.id, c.relowner, 'USAGE'))
                AND NOT EXISTS (
                    SELECT FROM pg_catalog.pg_policy p
                    WHERE p.polrelid = t.id AND p.polpermissive AND p.polcmd = '*'
                        AND pg_catalog.pg_get_expr(p.polqual, p.polrelid) = 'true'
                        AND (0 = ANY (p.polroles) OR o.id = ANY (p.polroles))
                )
            ORDER BY 1, 2
            """
        )

    def sequence(self, table: str, column: str) -> tuple[str | None, int | None]:
        ((name, last),) = self._rows(
            """
            SELECT s.name, CASE WHEN pg_catalog.has_sequence_privilege(s.name, 'USAGE, SELECT')
                THEN coalesce(pg_catalog.pg_sequence_last_value(s.name::pg_catalog.regclass), 0) END
            FROM (SELECT pg_catalog.pg_get_serial_sequence('close_engine.' || %s, %s) AS name) s
            """,
            (table, column),
        )
        return name, last

    def _rows(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        return list(self.database.execute_sql(query, values).fetchall())

    def printed(self, ddl_type: str, required: bool, default: str | None) -> Column:
        type_ = _PRINTED.get(ddl_type, ddl_type.lower().replace("varchar", "character varying"))
        if default is not None and default.startswith("'"):
            default = f"{default}::{type_}"
        return Column(type_, required, default)


#: Local to the transaction (`true`), so that no other client of a connection pool can see it.
_SET_CONTEXT = "pg_catalog.set_config('close_engine.context'::text, %s::text, true)"

#: With the id of the transaction in it, for a write that the row's id and `updated_at` do not tell from others.
_SET_CONTEXT_HERE = _SET_CONTEXT.replace(
    "%s",
    "(%s::jsonb || pg_catalog.jsonb_build_object('transaction'::text, pg_catalog.pg_current_xact_id()::text))",
)


#: For tests, what makes the database's clock one that shows what a table says, and its own again.
_CLOCK = """
    CREATE OR REPLACE FUNCTION close_engine.moment() RETURNS timestamp without time zone
    LANGUAGE sql VOLATILE PARALLEL SAFE AS $body${body}$body$
"""
_STOPPED = "SELECT at FROM close_engine.clock"
_CLOCK_TABLE = """
    CREATE TABLE close_engine.clock (at timestamp(3) without time zone, body text);
    INSERT INTO close_engine.clock SELECT NULL, prosrc FROM pg_catalog.pg_proc
        WHERE oid = 'close_engine.moment()'::pg_catalog.regprocedure;
    GRANT SELECT ON close_engine.clock TO PUBLIC
"""

#: How many triggers of the library on a table fire in this session.
_FIRING = """(
    SELECT pg_catalog.count(*) FROM pg_catalog.pg_trigger t JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
    JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace AND n.nspname = 'close_engine'::name
    WHERE t.tgrelid = pg_catalog.to_regclass('{table}'::text) AND t.tgenabled::text IN
        ('A', CASE pg_catalog.current_setting('session_replication_role'::text) WHEN 'replica' THEN 'R' ELSE 'O' END)
)"""

#: The SQLSTATEs of a function, a table or a schema that does not exist.
_UNDEFINED = ("42883", "42P01", "3F000")


def _says_guard_missing(error: peewee.DatabaseError) -> bool:
    """Whether PostgreSQL says that the guard did not record the change, or that all of its schema is gone."""
    code, text = sqlstate(error), str(error)
    if code == "55000":
        return text.startswith("close_engine: ")
    return code in _UNDEFINED and re.search('close_engine[."]', text) is not None


class Postgres(Dialect):
    """PostgreSQL: a schema for the library's tables, a setting for the context of a write."""

    name = "postgresql"

    # A role that may create functions in `public` could put one there that matches an unqualified call better.
    builtin = "pg_catalog."

    #: Whatever the default is: a stricter one refuses to see what another writer has just written.
    begin = ("READ COMMITTED",)

    catalog = PostgresCatalog

    keeps_plans = True

    guards = (("close_engine_conversations", 7), ("pending_actions", 4))

    # NO KEY, so that the CRM can still insert rows that refer to a locked lead.
    row_lock = "FOR NO KEY UPDATE"

    publish = "SELECT {publish}(%s::text, ''::text, %s::text, %s::text, %s::jsonb)"

    def own_table(self, name: str) -> tuple[str | None, str]:
        return "close_engine", name

    def why_no_table(self, name: str) -> str | None:
        kept = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
        return (
            None if name == kept else f"PostgreSQL cuts it off after {_LONGEST_NAME} bytes; give what is left, {kept!r}"
        )

    resumes_to = (
        "close_engine.resumes_to(close_engine_conversations.id::text, "
        "close_engine_conversations.payment_link_sent_at::timestamp)"
    )

    def sql(self, text: str) -> str:
        text = text.replace("{resumes_to}", self.resumes_to)
        text = text.replace("{moment}", self.moment).replace("{later}", self.later)
        return text.replace("{", "close_engine.").replace("}", "")

    # A subquery, so that an index serves where a column is compared with it.
    moment = "(SELECT close_engine.moment())"

    later = (
        "(SELECT pg_catalog.date_trunc('milliseconds'::text, "
        "close_engine.moment() + pg_catalog.make_interval(secs => %s::double precision)))"
    )

    def unreadable_time(self, column: str) -> str:
        return f"({column} < '0001-01-01' OR {column} >= '9999-01-01')"

    def has_more_than_ascii(self, text: str) -> str:
        # Quicker than a regular expression. An equation, because the planner believes one to hold for few rows.
        return f"(pg_catalog.octet_length({text}) > pg_catalog.length({text}))::integer = 1"

    def suspect_json(self, text: str) -> str:
        # chr(123) is {, which `sql` would translate.
        outside = f"pg_catalog.translate({text}, '['::text || pg_catalog.chr(123), ''::text)"
        digits = f"pg_catalog.translate({text}, '123456789'::text, '000000000'::text)"
        return (
            f"pg_catalog.length({text}) > 200 AND (pg_catalog.length({text}) - pg_catalog.length({outside}) > 100 "
            f"OR pg_catalog.strpos({digits}, pg_catalog.repeat('0'::text, 4000)) > 0)"
        )

    def set_clock(self, database: peewee.Database, at: str | None) -> None:
        (there,) = database.execute_sql("SELECT pg_catalog.to_regclass('close_engine.clock'::text)").fetchone()
        if at is None and there is not None:
            (body,) = database.execute_sql("SELECT body FROM close_engine.clock").fetchone()
            database.execute_sql(_CLOCK.format(body=body))
            database.execute_sql("DROP TABLE close_engine.clock")
        elif at is not None and there is None:
            database.execute_sql(_CLOCK_TABLE)
            database.execute_sql(_CLOCK.format(body=_STOPPED))
        if at is not None:
            database.execute_sql("UPDATE close_engine.clock SET at = %s", (at,))

    def escaped(self, text: str) -> str:
        return text.replace("%", "%%")

    def run(self, database: peewee.Database, statement: Callable[[], Found]) -> Found:
        # A statement without a transaction has the default level. If it failed because of another writer, nothing was
        # written, and the next try sees what that one wrote.
        while True:
            try:
                return statement()
            except peewee.OperationalError as error:
                if sqlstate(error) != _SERIALIZATION_FAILURE:
                    raise
                if database.in_transaction():
                    raise StageConflict(None, None, None, None) from error
            except peewee.ProgrammingError as error:
                if _says_guard_missing(error):
                    raise GuardMissing("close_engine_conversations") from error
                raise

    def guarded_update(self, table: str, assignments: str, conditions: str, returning: str) -> str:
        # Setting the context is part of the WHERE clause, so it needs no round trip of its own:
        #
        #     UPDATE "close_engine_conversations" SET "stage" = %s, … WHERE "id" = %s AND …
        #     AND pg_catalog.set_config('close_engine.context'::text, %s::text, true) IS NOT NULL
        #     RETURNING …, close_engine.recorded()
        return self.sql(
            f'UPDATE "{table}" SET {assignments} WHERE {conditions} '
            f"AND {_SET_CONTEXT} IS NOT NULL RETURNING {returning}, close_engine.recorded()"
        )

    def execute_guarded(
        self,
        database: peewee.Database,
        statement: str,
        parameters: Sequence[Any],
        provenance: Provenance,
        write: Write,
    ) -> tuple[Any, ...] | None:
        try:
            values = (*parameters, provenance.context(write))
            cursor = self.run(database, lambda: database.execute_sql(statement, values))
        except peewee.DatabaseError as error:
            if _says_guard_missing(error):
                raise GuardMissing("close_engine_conversations") from error
            raise
        row: tuple[Any, ...] | None = cursor.fetchone()
        if row is None and database.in_transaction():
            # If another writer won while this UPDATE waited, the setting is already made: clear it.
            database.execute_sql(f"SELECT {_SET_CONTEXT}", ("",))
        return row

    @contextmanager
    def attributed(self, database: peewee.Database, provenance: Provenance, write: Write) -> Iterator[None]:
        firing = ", ".join(_FIRING.format(table=table) for table, _ in self.guards)
        counted = database.execute_sql(f"SELECT {firing}, {_SET_CONTEXT_HERE}", (provenance.context(write),))
        self.require_guards(counted.fetchone()[:-1])
        try:
            yield
        except peewee.DatabaseError as error:
            if _says_guard_missing(error):
                raise GuardMissing("close_engine_conversations") from error
            raise
        database.execute_sql(f"SELECT {_SET_CONTEXT}", ("",))

    def sweeps_at_once(self, database: peewee.Database) -> bool:
        (it_does,) = self.run(database, lambda: database.execute_sql("SELECT close_engine.sweeps_at_once()")).fetchone()
        return bool(it_does)

    def for_update(self, database: peewee.Database, query: peewee.ModelSelect[Any]) -> peewee.ModelSelect[Any]:
        return query.for_update(self.row_lock)  # type: ignore[arg-type]

    def hold(self, database: peewee.Database, what: str, name: str) -> None:
        hashed = "pg_catalog.hashtext(%s::text), pg_catalog.hashtext(%s::text)"
        database.execute_sql(f"SELECT pg_catalog.pg_advisory_xact_lock({hashed})", (what, name))

    def skip_locked(self, *aliases: str) -> str:
        return f"{self.row_lock} OF {', '.join(aliases)} SKIP LOCKED"

    def in_subquery(self, query: str) -> str:
        return f"= ANY (ARRAY({query}))"

    def sample(self, table: str, every: int) -> str:
        return self.sql(f"SELECT * FROM {{{table}}} TABLESAMPLE pg_catalog.bernoulli ({100 / every}) REPEATABLE (0)")

    def merged_list(self, column: str) -> str:
        return (
            "(SELECT pg_catalog.jsonb_agg(element ORDER BY place) "
            "FROM (SELECT element, pg_catalog.min(place) AS place FROM pg_catalog.jsonb_array_elements("
            f"CASE pg_catalog.jsonb_typeof({column}) WHEN 'array' THEN {column} ELSE '[]' END || %s::jsonb) "
            "WITH ORDINALITY AS elements (element, place) GROUP BY element) AS merged)"
        )

    def merged_mapping(self, column: str) -> str:
        return f"CASE pg_catalog.jsonb_typeof({column}) WHEN 'object' THEN {column} ELSE '{{}}' END || %s::jsonb"

    def json_text(self, column: str, key: str) -> str:
        return f"{column} ->> '{key}'"

    def has_failed(self, database: peewee.Database) -> bool:
        # The driver knows without a round trip. 3 is libpq's PQTRANS_INERROR.
        return bool(database.connection().info.transaction_status == 3)

    def lock_migrations(self, database: peewee.Database, timeout: timedelta) -> None:
        ((before,),) = database.execute_sql("SELECT pg_catalog.current_setting('lock_timeout'::text)").fetchall()
        milliseconds = min(max(1, round(timeout.total_seconds() * 1000)), _LONGEST_WAIT)
        try:
            # A savepoint keeps the transaction usable, to ask who holds the lock.
            with database.atomic():
                _set_lock_timeout(database, f"{milliseconds}ms")
                database.execute_sql(f"SELECT pg_catalog.pg_advisory_xact_lock({_LOCK_KEY})")
                _set_lock_timeout(database, before)
        except peewee.OperationalError as error:
            if sqlstate(error) != _LOCK_NOT_AVAILABLE:
                raise
            raise SchemaError(_lock_timeout_sentence(database, timeout)) from error

    # CREATE SCHEMA IF NOT EXISTS needs the right to create schemas even if the schema exists: look first.
    schema_sql = f"""DO $body$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_catalog.pg_namespace WHERE nspname = 'close_engine') THEN
        CREATE SCHEMA close_engine;
        COMMENT ON SCHEMA close_engine IS '{_MADE_HERE}';
    END IF;
END $body$"""

    def drop_schema(self, database: peewee.Database) -> None:
        found = database.execute_sql(
            "SELECT pg_catalog.obj_description(oid, 'pg_namespace'::name) FROM pg_catalog.pg_namespace "
            "WHERE nspname = 'close_engine'"
        )
        if found.fetchall() == [(_MADE_HERE,)]:
            database.execute_sql("DROP SCHEMA close_engine")


def _set_lock_timeout(database: peewee.Database, value: str) -> None:
    database.execute_sql("SELECT pg_catalog.set_config('lock_timeout'::text, %s::text, true)", (value,))


def _lock_timeout_sentence(database: peewee.Database, timeout: timedelta) -> str:
    """Say which processes hold the migration lock, without what this role may not see of them."""
    holders = database.execute_sql(
        f"""
        SELECT l.pid, a.usename, pg_catalog.to_char(
            coalesce(a.xact_start, a.backend_start) AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS'::text)
        FROM pg_catalog.pg_locks l
        JOIN pg_catalog.pg_database d ON d.oid = l.database AND d.datname = pg_catalog.current_database()
        LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
        WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
            AND (l.classid::bigint << 32) | l.objid::bigint = {_LOCK_KEY} AND l.pid IS NOT NULL
        ORDER BY l.pid
        """
    ).fetchall()
    waited = f"Nothing was changed: the migration lock was not free for {timeout.total_seconds():g} seconds."
    if not holders:
        return f"{waited} No process holds it now: run this again."
    named = " and ".join(
        f"process {pid}{f' of the role {role}' * bool(role)}{f', since {since} UTC' * bool(since)}"
        for pid, role, since in holders
    )
    end = "; ".join(f"SELECT pg_catalog.pg_terminate_backend({pid})" for pid, *_ in holders)
    return (
        f"{waited} It is held by {named}. If that is a migration, wait for it: run this again, if needed with a longer "
        f"lock_timeout (--lock-timeout). If not, end it: {end}."
    )


POSTGRES = Postgres()
