"""The schema: migrate, downgrade, list the migrations, verify."""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Annotated

import typer

from close_engine import schema
from close_engine.cli.app import command, in_seconds, open_database
from close_engine.cli.terminal import console, table
from close_engine.errors import CloseEngineError, SchemaError
from close_engine.schema.migrations import LOCK_TIMEOUT

LockTimeout = Annotated[timedelta, in_seconds("How long to wait for another process that migrates.", 300)]


@command()
def migrate(
    context: typer.Context,
    standalone: Annotated[
        bool,
        typer.Option("--standalone", help="First make minimal leads, users and clients tables, where there is no CRM."),
    ] = False,
    sql: Annotated[bool, typer.Option("--sql", help="Only print the statements, as a script; change nothing.")] = False,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
) -> None:
    """Apply the pending migrations, all of them or none. Many machines may do so at once."""
    if sql:
        open_database(context, missing="pretend" if standalone else "refuse")
        statements = schema.migration_sql(standalone=standalone, lock_timeout=lock_timeout)
        print(";\n\n".join(["BEGIN", *statements, "COMMIT"]) + ";" if statements else "-- Nothing is pending.")
        return
    open_database(context, missing="make" if standalone else "refuse")
    applied = schema.migrate(standalone=standalone, lock_timeout=lock_timeout)
    print("\n".join(f"Applied {name}." for name in applied) or "Nothing to do: every migration is applied.")


@command()
def downgrade(
    context: typer.Context,
    target: Annotated[
        str | None, typer.Argument(help="Go back through this migration; without it, take back the newest alone.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, even where data would be lost.")] = False,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
) -> None:
    """Take migrations back. Asks first where that drops data."""
    open_database(context)
    lost = {} if yes else schema.rows_at_stake(target, lock_timeout=lock_timeout)
    if lost and not _confirmed(
        "This drops the rows of " + ", ".join(f"{name} ({count})" for name, count in lost.items())
    ):
        raise CloseEngineError("Nothing was taken back; with --yes it is, without asking.")
    reverted = schema.downgrade(target, lock_timeout=lock_timeout)
    print("\n".join(f"Took back {name}." for name in reverted) or "Nothing to do: no migration is applied.")


def _confirmed(what: str) -> bool:
    print(f"{what}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # nobody is there to answer, or to end the line
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")


@command()
def status(context: typer.Context) -> None:
    """List the migrations: when each was applied, or that it is pending."""
    open_database(context)
    listed = table("migration", "applied")
    for migration in schema.status():
        applied = f"{migration.applied_at:%Y-%m-%d %H:%M:%S}" if migration.applied_at else "pending"
        listed.add_row(
            migration.name, applied if migration.known else f"{applied}, not known here: upgrade close-engine"
        )
    console().print(listed)


@command()
def verify(context: typer.Context) -> None:
    """Check everything that the database must be: exit status 0, or a list of what is wrong and 1."""
    open_database(context)
    made = schema.checks()
    for check in made:
        print(f"{'WRONG' if check.problems else 'ok':5}  {check.subject}")
        for problem in check.problems:
            print(f"       - {problem}")
    count = sum(len(check.problems) for check in made)
    if count:
        raise SchemaError(f"{count} problem{'s' if count > 1 else ''} found; what to do about each is listed.")
