"""A CRM database that Prisma made and filled: restores it, and reads its catalog."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import peewee
import psycopg2

DATA = Path(__file__).parent / "data"
BEFORE = DATA / "prisma_crm.sql"
AFTER = DATA / "prisma_crm_after.schema.sql"

#: What Prisma sees in a schema, as queries: the name of each object, and everything about it.
SEEN_BY_PRISMA = {
    "relations": """
        SELECT c.relname, c.relkind::text FROM pg_class c
        WHERE c.relnamespace = %(schema)s::regnamespace AND c.relkind NOT IN ('i', 'I')
    """,
    "columns": """
        SELECT c.relname || '.' || a.attname,
            row_number() OVER (PARTITION BY c.oid ORDER BY a.attnum), format_type(a.atttypid, a.atttypmod),
            a.attnotnull, pg_get_expr(d.adbin, d.adrelid), a.attidentity::text, a.attgenerated::text,
            a.attcollation::regcollation::text
        FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
        WHERE c.relnamespace = %(schema)s::regnamespace AND c.relkind IN ('r', 'p', 'v')
    """,
    "indexes": """
        SELECT c.relname, pg_get_indexdef(i.indexrelid), i.indisvalid
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE c.relnamespace = %(schema)s::regnamespace AND i.indpred IS NULL
    """,
    "constraints": """
        SELECT c.relname || ': ' || k.conname, k.contype::text, pg_get_constraintdef(k.oid)
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
        WHERE k.connamespace = %(schema)s::regnamespace AND k.contype <> 'c'
    """,
    "enums": """
        SELECT t.typname, array_agg(e.enumlabel ORDER BY e.enumsortorder)::text
        FROM pg_type t JOIN pg_enum e ON e.enumtypid = t.oid
        WHERE t.typnamespace = %(schema)s::regnamespace GROUP BY t.typname
    """,
}

#: The objects that Prisma does not see.
UNSEEN = {
    "triggers": """
        SELECT c.relname || ': ' || t.tgname, pg_get_triggerdef(t.oid) FROM pg_trigger t
        JOIN pg_class c ON c.oid = t.tgrelid WHERE c.relnamespace = %(schema)s::regnamespace AND NOT t.tgisinternal
    """,
    "checks": """
        SELECT c.relname || ': ' || k.conname, pg_get_constraintdef(k.oid)
        FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
        WHERE k.connamespace = %(schema)s::regnamespace AND k.contype = 'c'
    """,
    "partial indexes": """
        SELECT c.relname, pg_get_indexdef(i.indexrelid)
        FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
        WHERE c.relnamespace = %(schema)s::regnamespace AND i.indpred IS NOT NULL
    """,
    "functions": "SELECT proname FROM pg_proc WHERE pronamespace = %(schema)s::regnamespace",
    "schemas": "SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_'",
}

Catalog = dict[str, dict[str, tuple[Any, ...]]]


def query(url: str | peewee.Database, sql: str, values: Any = None) -> list[tuple[Any, ...]]:
    """Run SQL without the library, in its own transaction or in that of a connection, and return the rows."""
    if not isinstance(url, str):
        cursor = url.execute_sql(sql, values)
        return cursor.fetchall() if cursor.description else []
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            if ";" in sql:
                connection.executescript(f"BEGIN; {sql}; COMMIT")
                return []
            with connection:
                return connection.execute(sql, values or ()).fetchall()
    with closing(psycopg2.connect(url)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(sql, values)
        return cursor.fetchall() if cursor.description else []


def restore(url: str, *files: Path) -> None:
    """Run files of plain SQL."""
    for file in files:
        query(url, file.read_text())


def catalog(url: str | peewee.Database, described: dict[str, str] = SEEN_BY_PRISMA, schema: str = "public") -> Catalog:
    """Everything in a schema, by kind and name."""
    return {
        kind: {name: tuple(rest) for name, *rest in query(url, sql, {"schema": schema})}
        for kind, sql in described.items()
    }


def rows(url: str, columns: dict[str, list[str]]) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the tables, as PostgreSQL prints the columns."""
    return {
        table: query(url, f'SELECT {", ".join(f"{name}::text" for name in names)} FROM "{table}" ORDER BY id')
        for table, names in columns.items()
    }


def columns_of(described: Catalog) -> dict[str, list[str]]:
    """Table to the names of its columns."""
    columns: dict[str, list[str]] = {}
    for name in described["columns"]:
        table, _, column = name.partition(".")
        columns.setdefault(table, []).append(column)
    return columns


def everything(url: str | peewee.Database) -> Any:
    """Everything in a database of either kind except its rows."""
    if isinstance(url, str) and url.startswith("sqlite"):
        return query(
            url, "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%' ORDER BY 1, 2"
        )
    (there,) = query(url, "SELECT count(*) FROM pg_namespace WHERE nspname = 'close_engine'")
    schemas = ["public", "close_engine"] if there == (1,) else ["public"]
    functions = (
        "SELECT pg_get_functiondef(p.oid) FROM pg_proc p WHERE p.pronamespace = 'close_engine'::regnamespace ORDER BY 1"
    )
    return (
        {schema: (catalog(url, schema=schema), catalog(url, UNSEEN, schema)) for schema in schemas},
        query(url, functions) if len(schemas) == 2 else [],
    )
