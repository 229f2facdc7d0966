"""What the CRM calls its leads: its table's own columns, which no two CRMs name alike.

names_of([conversation.lead_id])                    # {"lead-1": "Ada Lovelace, Analytical Bakery"}

Nothing but people depends on it. The environment variable CLOSE_ENGINE_LEAD_NAME names the columns, with commas between
them. Without it, those of the table's columns are read that usually hold a name.

>>> from close_engine.database.url import connect
>>> from close_engine import migrate
>>> database = connect("sqlite:///:memory:")
>>> _ = migrate(standalone=True)
>>> columns(), names_of(["lead-1"])
(('name',), {})
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import peewee

from close_engine.database.binding import current
from close_engine.database.dialect import identifier

__all__ = ["LEAD_NAME", "columns", "leads_named", "names_of"]

#: The environment variable.
LEAD_NAME = "CLOSE_ENGINE_LEAD_NAME"

#: Columns that hold a name in the CRMs that we know, in the order in which they are shown.
_USUAL = ("name", "full_name", "first_name", "last_name", "contact_name", "business_name", "company_name", "company")

_found: WeakKeyDictionary[peewee.Database, tuple[str, tuple[str, ...]]] = WeakKeyDictionary()


def columns() -> tuple[str, ...]:
    """Return the columns of the CRM's leads that hold a name; none if the role may not look at the table."""
    binding, named = current(), os.environ.get(LEAD_NAME, "")
    if named:
        return tuple(column.strip() for column in named.split(",") if column.strip())
    table, found = _found.get(binding.database, ("", ()))
    if table != binding.tables.leads:
        try:
            described = binding.execute("SELECT * FROM {leads} LIMIT 0").description
        except peewee.ProgrammingError:
            described = ()
        there = {_plain(column[0]): str(column[0]) for column in described or ()}
        found = tuple(there[name] for name in map(_plain, _USUAL) if name in there)
        _found[binding.database] = binding.tables.leads, found
    return found


def _plain(column: str) -> str:
    """Return a column's name as `firstName` and `first_name` have in common."""
    return str(column).replace("_", "").lower()


def _text() -> str:
    """Return the SQL of a lead's name."""
    parts = [f"COALESCE(CAST(l.{_quoted(column)} AS TEXT), '')" for column in columns()]
    return " || ' ' || ".join(parts)


def _quoted(column: str) -> str:
    return current().dialect.escaped(identifier(column))


def names_of(lead_ids: Sequence[str]) -> dict[str, str]:
    """Read the names of leads, as the CRM has them.

    Args:
        lead_ids: their ids.

    Returns:
        dict of a lead's id to its name; without the leads that have none.
    """
    if not lead_ids or not columns():
        return {}
    marks = ", ".join(["%s"] * len(lead_ids))
    found = current().execute(f"SELECT l.id, {_text()} FROM {{leads}} l WHERE l.id IN ({marks})", list(lead_ids))
    return {lead_id: " ".join(name.split()) for lead_id, name in found.fetchall() if name.strip()}


def leads_named(text: str, limit: int = 200) -> list[str]:
    """Find the leads with a conversation whose name has this text in it, in capitals or not.

    Args:
        text: part of the name.
        limit: the most to find; the newest conversations first.

    Returns:
        list of str, the leads' ids.
    """
    if not columns() or not text.strip():
        return []
    lower, escaped = f"{current().dialect.builtin}lower", text.strip().lower()
    for special in "!%_":
        escaped = escaped.replace(special, f"!{special}")
    query = f"""SELECT l.id FROM {{leads}} l JOIN close_engine_conversations c ON c.lead_id = l.id
        WHERE {lower}({_text()}) LIKE %s ESCAPE '!' ORDER BY c.created_at DESC, c.id LIMIT %s"""
    return [row[0] for row in current().execute(query, (f"%{escaped}%", limit)).fetchall()]
