"""The schema: migrate, downgrade, list the migrations, and verify the database.

>>> from close_engine import connect, migrate, schema
>>> database = connect("sqlite:///:memory:")
>>> migrate(standalone=True)[0]
'0001_conversations'
>>> schema.status()[0].name
'0001_conversations'
"""

from close_engine.schema.checks import Check, checks, verify
from close_engine.schema.migrations import (
    MigrationStatus,
    directory,
    downgrade,
    migrate,
    migration_sql,
    pending,
    rows_at_stake,
    status,
)

__all__ = [
    "Check",
    "MigrationStatus",
    "checks",
    "directory",
    "downgrade",
    "migrate",
    "migration_sql",
    "pending",
    "rows_at_stake",
    "status",
    "verify",
]
