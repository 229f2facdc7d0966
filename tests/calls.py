"""Find the functions that a statement calls without naming their schema, judging by its text."""

from __future__ import annotations

import re

#: Words before a parenthesis that are not functions.
SYNTAX = {
    *("ALL", "AND", "ANY", "ARRAY", "AS", "BEGIN", "BY", "CASE"),
    *("CAST", "CHECK", "COALESCE", "CONFLICT", "CURRENT_TIMESTAMP", "DISTINCT", "ELSE", "ELSIF"),
    *("EXISTS", "FILTER", "FROM", "GREATEST", "HAVING", "IF", "IN", "IS"),
    *("JOIN", "KEY", "LATERAL", "LEAST", "LIMIT", "LOCALTIMESTAMP", "NOT", "NULLIF", "OF"),
    *("ON", "OR", "OVER", "REPEATABLE", "RETURN", "RETURNING", "SELECT", "SET"),
    *("TABLE", "THEN", "TIMESTAMP", "UNION", "UNIQUE", "USING", "VALUES", "WHEN", "WHERE"),
    *("WITH", "VARCHAR"),
}

#: Words before a name that is not called: a table or an alias with a list of its columns.
NAMED = r"(?:AS|INTO|TABLE|TABLE IF NOT EXISTS|REFERENCES)"


def unqualified(sql: str) -> list[str]:
    """Return the names of the functions that are called without their schema."""
    sql = re.sub(r"--[^\n]*", " ", sql)
    sql = re.sub(r"\$\w*\$", " ", sql)
    sql = re.sub(r"'(?:[^']|'')*'", " 'text' ", sql)
    sql = re.sub(r'"(?:[^"]|"")*"', "quoted", sql)
    sql = re.sub(r"(CREATE (?:UNIQUE )?INDEX [^;(]*? ON )\S+", r"\1", sql, flags=re.IGNORECASE)
    sql = re.sub(rf"\b{NAMED}\s+[\w.]+\s*\(", ", (", sql, flags=re.IGNORECASE)
    called = re.findall(r"(?<![\w.])([A-Za-z_]\w*)\s*\(", sql)
    return [name for name in called if name.upper() not in SYNTAX]
