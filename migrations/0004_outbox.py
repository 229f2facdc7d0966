"""The outbox, which holds the messages to send, the inbox, which records what was received, and who opted out.

The SQL is in the files beside this script.
"""

import os
import re
import sqlite3
from pathlib import Path

import peewee


def run(db, step):
    """Run this step's SQL file for this database, with the CRM's own name of its table of leads."""
    postgres = isinstance(db, peewee.PostgresqlDatabase)
    named = getattr(db, "close_engine_tables", None) or {}
    leads = named.get("leads") or os.environ.get("CLOSE_ENGINE_LEADS_TABLE") or "leads"
    there = {'"leads"': '"' + leads.replace('"', '""') + '"'}
    if postgres:
        ((schema,),) = db.execute_sql("SELECT pg_catalog.quote_ident(pg_catalog.current_schema()::text)").fetchall()
        there["public."] = f"{schema}."
        # A tag that is longer than any name: if the table's name holds the usual one, it would end a function's text.
        there["$body$"] = f"${'body' * 16}$" if "$body$" in leads else "$body$"
    text = Path(__file__).with_name(f"{step}.{'postgresql' if postgres else 'sqlite'}.sql").read_text("utf-8")
    text = re.sub('public[.]|"leads"|[$]body[$]', lambda name: there[name[0]], text)
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


def up(migrator, db):
    run(db, "0004_outbox")


def down(migrator, db):
    run(db, "0004_outbox.down")
