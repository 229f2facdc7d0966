"""The history of stage changes, the table of allowed changes, and when each conversation may have gone silent.

The SQL is in the files beside this script.
"""

import sqlite3
from pathlib import Path

import peewee


def run(db, step):
    """Run this step's SQL file for this database."""
    if isinstance(db, peewee.PostgresqlDatabase):
        text = Path(__file__).with_name(f"{step}.postgresql.sql").read_text("utf-8")
        ((schema,),) = db.execute_sql("SELECT pg_catalog.quote_ident(pg_catalog.current_schema()::text)").fetchall()
        # The driver takes % for the start of a placeholder, and %% for a %.
        db.execute_sql(text.replace("public.", f"{schema}.").replace("%", "%%"))
        return
    statement = ""
    for line in Path(__file__).with_name(f"{step}.sqlite.sql").read_text("utf-8").splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute_sql(statement)
            statement = ""


def up(migrator, db):
    run(db, "0002_history")


def down(migrator, db):
    run(db, "0002_history.down")
