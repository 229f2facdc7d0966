"""The tables and columns that Prisma declares too: conversations, pending actions, new columns of leads and clients.

If Prisma already pushed some of them, the migration checks that they match, and keeps them. It adds the rest exactly as
`prisma db push` would. If anything does not match, it adds nothing. The table `created` lists what was added, so that
downgrading drops only that. The script can safely run twice: it then adds what is missing. If the migration creates the
schema, the schema's comment says so.

The CRM's table names come from the database object (`close_engine.bind` sets them) or from the environment variables
CLOSE_ENGINE_LEADS_TABLE, CLOSE_ENGINE_USERS_TABLE and CLOSE_ENGINE_CLIENTS_TABLE.

The SQL files beside this script create the two tables. The code here reads the catalog and adds the columns.
"""

import os
import re
import sqlite3
from pathlib import Path

import peewee
from playhouse.migrations import MigrationError

REQUIRED, NULLABLE = True, False

# The comment on a schema that the migrations created.
MADE_HERE = "Made by the migrations of close_engine, and dropped with them."

# A conversation in any other stage could never leave it.
STAGES = [
    "INITIATED",
    "QUALIFYING",
    "COLLECTING_INFO",
    "BUILDING",
    "PREVIEW_SENT",
    "EDIT_LOOP",
    "PENDING_APPROVAL",
    "PAYMENT_SENT",
    "COMPLETED",
    "STALLED",
    "CLOSED_LOST",
]

# Column: (name, PostgreSQL type, required, default as PostgreSQL prints it, or None).
CONVERSATIONS = [
    ("id", "text", REQUIRED, None),
    ("lead_id", "text", REQUIRED, None),
    ("rep_id", "text", NULLABLE, None),
    ("entry_point", "text", REQUIRED, None),
    ("stage", "text", REQUIRED, "'INITIATED'::text"),
    ("autonomy_level", "text", REQUIRED, "'FULL_AUTO'::text"),
    ("questions_asked", "jsonb", NULLABLE, None),
    ("collected_data", "jsonb", NULLABLE, None),
    ("edit_rounds", "integer", REQUIRED, "0"),
    ("payment_link_url", "text", NULLABLE, None),
    ("payment_link_sent_at", "timestamp(3) without time zone", NULLABLE, None),
    ("stalled_at", "timestamp(3) without time zone", NULLABLE, None),
    ("completed_at", "timestamp(3) without time zone", NULLABLE, None),
    ("closed_lost_at", "timestamp(3) without time zone", NULLABLE, None),
    ("closed_lost_reason", "text", NULLABLE, None),
    ("created_at", "timestamp(3) without time zone", REQUIRED, "CURRENT_TIMESTAMP"),
    ("updated_at", "timestamp(3) without time zone", REQUIRED, None),
]
ACTIONS = [
    ("id", "text", REQUIRED, None),
    ("conversation_id", "text", REQUIRED, None),
    ("lead_id", "text", REQUIRED, None),
    ("type", "text", REQUIRED, None),
    ("draft_message", "text", REQUIRED, None),
    ("metadata", "jsonb", NULLABLE, None),
    ("status", "text", REQUIRED, "'PENDING'::text"),
    ("approved_by", "text", NULLABLE, None),
    ("approved_at", "timestamp(3) without time zone", NULLABLE, None),
    ("expires_at", "timestamp(3) without time zone", NULLABLE, None),
    ("created_at", "timestamp(3) without time zone", REQUIRED, "CURRENT_TIMESTAMP"),
]
TABLES = {"close_engine_conversations": CONVERSATIONS, "pending_actions": ACTIONS}

# Table: the SQL file that creates it.
FILES = {"close_engine_conversations": "0001_conversations", "pending_actions": "0001_actions"}

# Table: its indexes, as (name, column, unique).
INDEXES = {
    "close_engine_conversations": [
        ("close_engine_conversations_lead_id_key", "lead_id", True),
        ("close_engine_conversations_entry_point_idx", "entry_point", False),
        ("close_engine_conversations_stage_idx", "stage", False),
        ("close_engine_conversations_created_at_idx", "created_at", False),
    ],
    "pending_actions": [
        ("pending_actions_status_idx", "status", False),
        ("pending_actions_lead_id_idx", "lead_id", False),
        ("pending_actions_conversation_id_idx", "conversation_id", False),
    ],
}

# (constraint, column, the CRM's table that it refers to, ON DELETE action)
FOREIGN_KEYS = [
    ("close_engine_conversations_lead_id_fkey", "lead_id", "leads", "CASCADE"),
    ("close_engine_conversations_rep_id_fkey", "rep_id", "users", "SET NULL"),
]

# The CRM's table: the columns that it gains.
ADDED = {
    "leads": [
        ("autonomy_level", "text", REQUIRED, "'FULL_AUTO'::text"),
        ("close_entry_point", "text", NULLABLE, None),
        ("qualification_data", "jsonb", NULLABLE, None),
    ],
    "clients": [("autonomy_level", "text", REQUIRED, "'FULL_AUTO'::text")],
}


def up(migrator, db):
    catalog = Postgres(db) if isinstance(db, peewee.PostgresqlDatabase) else Sqlite(db)
    names = crm_tables(db)
    problems = other_crms(catalog) + missing_crm_tables(catalog, names)
    for table in TABLES:
        if catalog.columns(table):
            problems += table_mismatches(catalog, table, names)
    if not problems and catalog.columns("close_engine_conversations"):
        problems += unknown_stages(catalog)
    for table, columns in ADDED.items():
        present = catalog.columns(names[table])
        problems += column_mismatches(names[table], [c for c in columns if c[0] in present], present, catalog)
    if problems:
        raise MigrationError(
            "the existing tables do not match what close_engine needs; fix these and migrate again:\n  - "
            + "\n  - ".join(problems)
        )

    catalog.create_schema()
    db.execute_sql(
        f"CREATE TABLE IF NOT EXISTS {catalog.created} "
        "(table_name TEXT NOT NULL, column_name TEXT NOT NULL, identity TEXT, PRIMARY KEY (table_name, column_name))"
    )
    for table, step in FILES.items():
        if not catalog.columns(table):
            run(db, step, names)
            remember(catalog, table, "")
    for table, columns in ADDED.items():
        present = catalog.columns(names[table])
        for column in columns:
            if column[0] not in present:
                catalog.execute(f"ALTER TABLE {catalog.quoted(names[table])} ADD COLUMN {catalog.definition(*column)}")
                remember(catalog, names[table], column[0])


def down(migrator, db):
    catalog = Postgres(db) if isinstance(db, peewee.PostgresqlDatabase) else Sqlite(db)
    for table, column in catalog.still_ours():
        if not column:
            catalog.execute(f"DROP TABLE IF EXISTS {catalog.quoted(table)}")
        else:
            catalog.execute(f"ALTER TABLE {catalog.quoted(table)} DROP COLUMN {quoted(column)}")
    db.execute_sql(f"DROP TABLE {catalog.created}")
    catalog.drop_schema()


def run(db, step, names):
    """Run this step's SQL file for this database, with the CRM's own table names."""
    postgres = isinstance(db, peewee.PostgresqlDatabase)
    there = {'"leads"': quoted(names["leads"]), '"users"': quoted(names["users"])}
    if postgres:
        ((schema,),) = db.execute_sql("SELECT pg_catalog.quote_ident(pg_catalog.current_schema()::text)").fetchall()
        there["public."] = f"{schema}."
    text = Path(__file__).with_name(f"{step}.{'postgresql' if postgres else 'sqlite'}.sql").read_text("utf-8")
    text = re.sub('public[.]|"leads"|"users"', lambda name: there[name[0]], text)
    if postgres:
        # The driver takes % for the start of a placeholder, and %% for a %.
        db.execute_sql(text.replace("%", "%%"))
        return
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute_sql(statement)
            statement = ""


def crm_tables(db):
    given = getattr(db, "close_engine_tables", None) or {}
    return {
        table: given.get(table) or os.environ.get(variable(table)) or table for table in ("leads", "users", "clients")
    }


def variable(table):
    return f"CLOSE_ENGINE_{table.upper()}_TABLE"


def quoted(name):
    return '"' + name.replace('"', '""') + '"'


def literal(text):
    return "'" + text.replace("'", "''") + "'"


def remember(catalog, table, column):
    mark = catalog.mark
    catalog.db.execute_sql(
        f"INSERT INTO {catalog.created} (table_name, column_name, identity) "
        f"VALUES ({mark}, {mark}, {catalog.identity(table, column)}) "
        "ON CONFLICT (table_name, column_name) DO UPDATE SET identity = EXCLUDED.identity",
        (table, column),
    )


def other_crms(catalog):
    return [
        f"this database serves the CRM in the schema {schema} already, and close_engine serves one CRM per database: "
        "give this one a database of its own"
        for schema in catalog.other_schemas()
    ]


def missing_crm_tables(catalog, names):
    found = catalog.tables()
    problems = []
    for table, name in names.items():
        columns = catalog.columns(name)
        if not columns:
            problems.append(
                f"the CRM's {table} table was not found as {name!r}{catalog.place()}: "
                f"name it with connect(..., {table}=...) or the environment variable {variable(table)}"
            )
        elif "id" not in columns:
            problems.append(f"the CRM's {table} table {name!r} has no column id; expected one of type text or varchar")
        elif not catalog.is_text(columns["id"][0]):
            problems.append(
                f"column {name}.id is {columns['id'][0]}; expected text or varchar, like a String in Prisma"
            )
    if any("not found" in problem for problem in problems):
        problems.append(
            f"the tables found{catalog.place()} are: {', '.join(found) or 'none'}; if this database has no CRM, "
            "create minimal tables with close-engine migrate --standalone"
        )
    return problems


def column_mismatches(table, expected, present, catalog):
    problems = []
    for name, kind, required, default in expected:
        if name not in present:
            problems.append(
                f"column {table}.{name} is missing; expected {catalog.definition(name, kind, required, default)}"
            )
            continue
        found_kind, found_required, found_default = present[name]
        wanted = (kind, required, default) if catalog.exact else (found_kind, required, found_default)
        if (found_kind, found_required, found_default) != wanted:
            problems.append(
                f"column {table}.{name} is {described(found_kind, found_required, found_default)}; "
                f"expected {described(kind, required, default)}"
            )
    return problems


def described(kind, required, default):
    return f"{kind}{' not null' if required else ''}{f' default {default}' if default else ''}"


def table_mismatches(catalog, table, names):
    present = catalog.columns(table)
    problems = column_mismatches(table, TABLES[table], present, catalog)
    known = {column[0] for column in TABLES[table]}
    for name, (_kind, required, default) in present.items():
        if name not in known and required and default is None:
            problems.append(
                f"column {table}.{name} is not null, has no default, and close_engine does not know it; "
                "make it nullable or give it a default"
            )
    indexes = catalog.indexes(table)
    for name, column, unique in [(f"{table}_pkey", "id", True), *INDEXES[table]]:
        if indexes.get(name) != (column, unique):
            problems.append(f"{table} should have {'a unique' if unique else 'an'} index {name} on {column}")
    if table == "close_engine_conversations":
        keys = catalog.foreign_keys(table)
        for name, column, target, on_delete in FOREIGN_KEYS:
            if (name if catalog.exact else None, column, names[target], on_delete, "CASCADE") not in keys:
                problems.append(
                    f"{table} should have a foreign key {name} from {column} to {names[target]}(id) "
                    f"ON DELETE {on_delete} ON UPDATE CASCADE"
                )
    return problems


def unknown_stages(catalog):
    rows = catalog.db.execute_sql(catalog.stages)
    return [
        f"{count} row{'s' * (count > 1)} of close_engine_conversations ({'for example ' * (count > 1)}{example!r}) "
        f"with the unknown stage {stage!r}; change it to one of {', '.join(STAGES)}"
        for stage, count, example in rows.fetchall()
        if stage not in STAGES
    ]


class Postgres:
    """Read PostgreSQL's catalog, and create things there."""

    exact = True
    mark = "%s"
    created = "close_engine.created"
    stages = (
        "SELECT stage, pg_catalog.count(*), pg_catalog.min(id) FROM close_engine_conversations "
        "GROUP BY stage ORDER BY stage"
    )

    def __init__(self, db):
        self.db = db

    def create_schema(self):
        # CREATE SCHEMA IF NOT EXISTS needs the right to create schemas even if the schema exists: look first.
        if not self.rows("SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = 'close_engine'"):
            self.db.execute_sql("CREATE SCHEMA close_engine")
            self.db.execute_sql(f"COMMENT ON SCHEMA close_engine IS '{MADE_HERE}'")

    def other_schemas(self):
        rows = self.rows(
            """
            SELECT DISTINCT n.nspname::text FROM pg_catalog.pg_trigger t
            JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
            JOIN pg_catalog.pg_namespace f ON f.oid = p.pronamespace AND f.nspname = 'close_engine'
            JOIN pg_catalog.pg_class c ON c.oid = t.tgrelid AND c.relname = 'close_engine_conversations'
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname <> pg_catalog.current_schema()
            ORDER BY 1
            """
        )
        return [schema for (schema,) in rows]

    def identity(self, table, column):
        """Return an expression for the numbers by which the database knows this list, a table and a column.

        If Prisma drops the table or the column and makes it anew, the numbers differ, and it is no longer ours. If a
        dump was restored, the number of the list differs too, and the names must do.
        """
        here = f"{literal(self.quoted(table))}::pg_catalog.regclass"
        number = f"(SELECT attnum FROM pg_catalog.pg_attribute WHERE attrelid = {here} AND attname = {literal(column)})"
        text = f"'close_engine.created'::pg_catalog.regclass::oid || '/' || {here}::oid || '/' || coalesce({number}, 0)"
        return text.replace("%", "%%")

    def still_ours(self):
        ours = []
        for table, column, identity in self.rows(
            f"SELECT table_name, column_name, identity FROM {self.created} ORDER BY 1, 2"
        ):
            if column in ("", *self.columns(table)) and self.columns(table):
                ((now,),) = self.rows(f"SELECT {self.identity(table, column)}")
                restored = identity is None or identity.split("/")[0] != now.split("/")[0]
                if restored or identity == now:
                    ours.append((table, column))
        return ours

    def drop_schema(self):
        # Keep the schema if the migration log is still in it.
        empty = """
            SELECT 1 FROM pg_catalog.pg_namespace WHERE nspname = 'close_engine'
                AND pg_catalog.obj_description(oid, 'pg_namespace'::name) = %s
                AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_class c WHERE c.relnamespace = pg_namespace.oid)
        """
        if self.rows(empty, (MADE_HERE,)):
            self.db.execute_sql("DROP SCHEMA close_engine")

    def place(self):
        ((schema,),) = self.rows(
            "SELECT coalesce(pg_catalog.current_schema()::text, pg_catalog.current_setting('search_path'::text))"
        )
        return f" in schema {schema}"

    def is_text(self, kind):
        return kind == "text" or kind.startswith("character varying")

    def rows(self, query, values=()):
        return self.db.execute_sql(query, values).fetchall()

    def execute(self, statement):
        # The driver takes % for the start of a placeholder, and %% for a %.
        self.db.execute_sql(statement.replace("%", "%%"))

    def quoted(self, table):
        ((schema,),) = self.rows("SELECT pg_catalog.quote_ident(pg_catalog.current_schema()::text)")
        return f"{schema}.{quoted(table)}"

    def tables(self):
        rows = self.rows(
            "SELECT tablename FROM pg_catalog.pg_tables WHERE schemaname = pg_catalog.current_schema() "
            "ORDER BY tablename"
        )
        return [name for (name,) in rows]

    def columns(self, table):
        rows = self.rows(
            """
            SELECT a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), a.attnotnull,
                   coalesce(pg_catalog.pg_get_expr(d.adbin, d.adrelid), nullif(a.attidentity::text, ''))
            FROM pg_catalog.pg_class c
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = pg_catalog.current_schema()
            JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
            LEFT JOIN pg_catalog.pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
            WHERE c.relname = %s AND c.relkind IN ('r', 'p') ORDER BY a.attnum
            """,
            (table,),
        )
        return {name: (kind, required, default) for name, kind, required, default in rows}

    def indexes(self, table):
        rows = self.rows(
            """
            SELECT x.relname, i.indisunique, ARRAY(
                SELECT a.attname FROM pg_catalog.unnest(i.indkey) WITH ORDINALITY AS k (number, place)
                JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.number ORDER BY k.place
            )::text[]
            FROM pg_catalog.pg_index i
            JOIN pg_catalog.pg_class x ON x.oid = i.indexrelid
            JOIN pg_catalog.pg_class c ON c.oid = i.indrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = pg_catalog.current_schema()
            WHERE c.relname = %s AND i.indpred IS NULL
            """,
            (table,),
        )
        return {name: (",".join(columns), unique) for name, unique, columns in rows}

    def foreign_keys(self, table):
        rows = self.rows(
            """
            SELECT k.conname, a.attname, t.relname, k.confdeltype::text, k.confupdtype::text
            FROM pg_catalog.pg_constraint k
            JOIN pg_catalog.pg_class c ON c.oid = k.conrelid
            JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace AND n.nspname = pg_catalog.current_schema()
            JOIN pg_catalog.pg_class t ON t.oid = k.confrelid
            JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attnum = k.conkey[1]
            WHERE c.relname = %s AND k.contype = 'f'
            """,
            (table,),
        )
        actions = {"c": "CASCADE", "n": "SET NULL", "a": "NO ACTION", "r": "RESTRICT", "d": "SET DEFAULT"}
        return [(name, column, target, actions[d], actions[u]) for name, column, target, d, u in rows]

    def definition(self, name, kind, required, default):
        parts = [quoted(name), kind]
        if required:
            parts.append("NOT NULL")
        if default is not None:
            parts.append(f"DEFAULT {default}")
        return " ".join(parts)


class Sqlite:
    """Read SQLite's catalog, and create things there, with the same names and nullability as on PostgreSQL."""

    exact = False
    mark = "?"
    created = "close_engine_created"
    stages = "SELECT stage, count(*), min(id) FROM close_engine_conversations GROUP BY stage ORDER BY stage"

    def __init__(self, db):
        self.db = db

    def create_schema(self):
        """Do nothing: SQLite has no schemas."""

    def drop_schema(self):
        """Do nothing: SQLite has no schemas."""

    def other_schemas(self):
        return []

    def identity(self, table, column):
        return "NULL"  # Prisma does not manage this database

    def still_ours(self):
        rows = self.db.execute_sql(f"SELECT table_name, column_name FROM {self.created} ORDER BY 1, 2").fetchall()
        return [(table, column) for table, column in rows if column in ("", *self.columns(table))]

    def place(self):
        return ""

    def is_text(self, kind):
        return not kind.upper().startswith("INT")

    def execute(self, statement):
        self.db.execute_sql(statement)

    def quoted(self, table):
        return quoted(table)

    def tables(self):
        return [name for name in self.db.get_tables() if not name.startswith(("sqlite_", "close_engine_"))]

    def columns(self, table):
        return {
            column.name: (column.data_type, not column.null or column.primary_key, column.default)
            for column in self.db.get_columns(table)
        }

    def indexes(self, table):
        primary_key = {f"{table}_pkey": (",".join(self.db.get_primary_keys(table)), True)}
        return primary_key | {
            index.name: (",".join(index.columns), index.unique)
            for index in self.db.get_indexes(table)
            if " WHERE " not in (index.sql or "")
        }

    def foreign_keys(self, table):
        keys = self.db.get_foreign_keys(table)
        return [(None, key.column, key.dest_table, key.on_delete, key.on_update) for key in keys]

    def definition(self, name, kind, required, default):
        parts = [quoted(name), "INTEGER" if kind == "integer" else "TEXT"]
        if required:
            parts.append("NOT NULL")
        if default is not None:
            parts.append(f"DEFAULT {default.removesuffix('::text')}")
        return " ".join(parts)
