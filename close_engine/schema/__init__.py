"""The schema: migrate, downgrade, list the migrations, verify the database and repair it.

>>> from close_engine import connect, migrate, schema
>>> database = connect("sqlite:///:memory:")
>>> migrate(standalone=True)[0]
'0001_conversations'
>>> schema.status()[0].name
'0001_conversations'
"""

from close_engine.schema.checks import checks, verify
from close_engine.schema.migrations import downgrade, migrate, migration_sql, repair, rows_at_stake
from close_engine.schema.problems import Check, Problem
from close_engine.schema.scripts import MigrationStatus, directory, pending, status

__all__ = [
    "Check",
    "MigrationStatus",
    "Problem",
    "checks",
    "directory",
    "downgrade",
    "migrate",
    "migration_sql",
    "pending",
    "repair",
    "rows_at_stake",
    "status",
    "verify",
]
