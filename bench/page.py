"""Quote bench/results.json in docs/performance.md: rewrite the tables between the page's marks.

A quote begins with the mark `<!-- bench: NAME -->` and ends at the next `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.report import RESULTS

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
QUOTE = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def quote() -> None:
    """Write the results into the page. A question without results is shown as not measured yet."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    PAGE.write_text(QUOTE.sub(lambda mark: f"{mark[1]}\n{_quoted(results.get(mark[2]))}\n{mark[3]}", PAGE.read_text()))


def _quoted(run: dict[str, Any] | None) -> str:
    if run is None:
        return "Not measured yet.\n"
    machine = run["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in run["versions"].items())
    settings = ", ".join(f"{name} = {value}" for name, value in run["settings"].items())
    ran = (
        f"`{run['command']}`, {run['date'][:10]}, {run['seconds']} seconds, on {machine['cores']} cores of "
        f"{machine['cpu']}, {machine['memory_mb']:,} MB, load {machine['load']} at the end, {machine['system']}. "
        f"PostgreSQL settings: {settings}. {versions}.\n"
    )
    return "\n".join([*(_markdown(table) for table in run["tables"]), ran])


def _markdown(table: dict[str, Any]) -> str:
    lines = [
        f"**{table['title']}**",
        "",
        _row(table["columns"]),
        _row(["---", *["---:"] * (len(table["columns"]) - 1)]),
        *map(_row, table["rows"]),
        "",
    ]
    return "\n".join([*lines, f"{table['note'].rstrip('.')}.\n"] if table["note"] else lines)


def _row(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
