"""Whether the database is what this library needs."""

from __future__ import annotations


def verify() -> list[str]:
    return []
