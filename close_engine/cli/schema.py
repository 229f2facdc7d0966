"""The schema: migrate, downgrade, list the migrations, verify the database and repair it."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from close_engine import schema
from close_engine.cli.app import command, in_seconds, open_database
from close_engine.cli.terminal import cell, console, is_confirmed, table
from close_engine.errors import CloseEngineError, ConfigurationError, SchemaError
from close_engine.schema.migrations import LOCK_TIMEOUT

LockTimeout = Annotated[timedelta, in_seconds("How long to wait if another process is migrating.", 300)]


@command()
def migrate(
    context: typer.Context,
    standalone: Annotated[
        bool,
        typer.Option(
            "--standalone",
            help="First create minimal leads, users and clients tables if they are missing, for a database without a "
            "CRM.",
        ),
    ] = False,
    sql: Annotated[
        bool, typer.Option("--sql", help="Print the statements as a script to run in one go, and change nothing.")
    ] = False,
    whole: Annotated[
        bool, typer.Option("--all", help="With --sql, also print the migrations that were applied already.")
    ] = False,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
) -> None:
    """Apply the pending migrations: all of them or none. Many machines can run this at once.

    If something is gone that an applied migration had made, apply all of them again. No row is lost.
    """
    if whole and not sql:
        raise ConfigurationError("--all says what to print, so it needs --sql.")
    if sql:
        open_database(context, missing="pretend" if standalone else "refuse")
        statements = schema.migration_sql(standalone=standalone, whole=whole, lock_timeout=lock_timeout)
        print(";\n\n".join(["BEGIN", *statements, "COMMIT"]) + ";" if statements else "-- Nothing is pending.")
        return
    open_database(context, missing="make" if standalone else "refuse")
    before = {migration.name for migration in schema.status() if migration.applied_at}
    applied = schema.migrate(standalone=standalone, lock_timeout=lock_timeout)
    for name in applied:
        print(
            f"Applied {name} again, because something that it had made was gone."
            if name in before
            else f"Applied {name}."
        )
    if not applied:
        print("Nothing to do: every migration is applied, and what they made is there.")


@command()
def downgrade(
    context: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MIGRATION", help="Undo every migration back through this one. The default is only the newest."
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask, even if data would be lost.")] = False,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
) -> None:
    """Undo migrations. Asks first if data would be lost."""
    open_database(context)
    lost = {} if yes else schema.rows_at_stake(target, lock_timeout=lock_timeout)
    if lost and not is_confirmed(
        "This deletes the rows of " + ", ".join(f"{name} ({count})" for name, count in lost.items())
    ):
        raise CloseEngineError("Nothing was downgraded. To downgrade without being asked, use --yes.")
    downgraded = schema.downgrade(target, lock_timeout=lock_timeout)
    print("\n".join(cell(f"Downgraded {name}.") for name in downgraded) or "Nothing to do: no migration is applied.")


@command()
def status(context: typer.Context) -> None:
    """List the migrations, and when each one was applied."""
    open_database(context)
    listed = table("migration", "applied (local time)")
    for migration in schema.status():
        applied = f"{migration.applied_at:%Y-%m-%d %H:%M:%S}" if migration.applied_at else "pending"
        listed.add_row(
            migration.name, applied if migration.known else f"{applied}, unknown to this version: upgrade close-engine"
        )
    console().print(listed)


@command()
def verify(
    context: typer.Context,
    repair: Annotated[
        bool, typer.Option("--repair", help="First mend what can be mended without losing data, and say what it was.")
    ] = False,
    lock_timeout: LockTimeout = LOCK_TIMEOUT,
) -> None:
    """Check the whole database: exit with status 0, or list what is wrong and exit with status 1."""
    open_database(context)
    for mended in schema.repair(lock_timeout=lock_timeout) if repair else ():
        print(cell(f"mended: {mended}."))
    checks = schema.checks()
    for check in checks:
        print(cell(f"{'WRONG' if check.problems else 'ok':6} {check.subject}"))
        for problem in check.problems:
            print(cell(f"       - {problem}"))
    count = sum(len(check.problems) for check in checks)
    if count:
        raise SchemaError(f"{count} problem{'s' if count > 1 else ''} found. The list says what to do about each.")
