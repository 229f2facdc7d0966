"""Verify that the bound database is what this library needs. Nothing is written.

    for problem in close_engine.verify():
        print(problem)

The models and the migrations say what to expect. The database's catalog and its rows say what is there.

>>> from close_engine.database.url import connect
>>> from close_engine import migrate
>>> database = connect("sqlite:///:memory:")
>>> verify()
['The database is not migrated: run close-engine migrate, or close_engine.migrate().']
>>> _ = migrate(standalone=True)
>>> verify()
[]
"""

from __future__ import annotations

from close_engine.schema import scripts
from close_engine.schema.contents import contents
from close_engine.schema.problems import Check, Problem, current_catalog
from close_engine.schema.structure import structure

__all__ = ["checks", "lost", "other_crm", "verify"]


def verify() -> list[str]:
    """Compare the bound database with what the library needs, and say what is wrong.

    Returns:
        list of str, one sentence for each problem; empty if nothing is wrong.

    Raises:
        ConfigurationError: no database is bound.
        SchemaError: the role may not read the log of migrations.
    """
    return [str(problem) for check in checks() for problem in check.problems]


def checks() -> list[Check]:
    """Run every check of `verify`.

    Returns:
        list of Check, in order. A database without any migration, or with another CRM, gets only one.

    Raises:
        ConfigurationError, SchemaError: as for `verify`.
    """
    migrations = scripts.status()
    if not any(migration.applied_at for migration in migrations):
        problem = Problem("The database is not migrated", "run close-engine migrate, or close_engine.migrate()")
        return [Check("migrations", [problem])]
    if other := other_crm():
        return [Check("one CRM", [other])]
    pending = [migration.name for migration in migrations if migration.applied_at is None]
    unknown = [migration.name for migration in migrations if not migration.known]
    found = [Problem(f"The migration {name} is pending", "run close-engine migrate") for name in pending]
    found += [Problem(f"The migration {name} is unknown to this version", "upgrade close-engine") for name in unknown]
    made = structure()
    if unknown:
        # This version does not know what the newer migration has made of these things.
        made = [Check(check.subject, [each for each in check.problems if not each.again]) for check in made]
    return [Check("migrations", found), *made, *contents()]


def lost() -> list[Problem]:
    """Find what the log of migrations promises and the database lacks: what running the migrations again restores.

    Returns:
        list of Problem. It is empty if a newer version has migrated the database, for that version must see to it.
    """
    migrations = scripts.status()
    if not all(migration.known for migration in migrations):
        return []
    return [problem for check in structure() for problem in check.problems if problem.again]


def other_crm() -> Problem | None:
    """Find out whether the database serves a CRM in another schema: then its triggers call the one close_engine."""
    catalog = current_catalog()
    here = catalog.schema()
    for there in catalog.guarded_schemas():
        if there != here:
            return Problem(
                f"This database serves the CRM in the schema {there} already, so it cannot serve the one in {here}",
                "close_engine serves one CRM per database; give this one a database of its own",
            )
    return None
