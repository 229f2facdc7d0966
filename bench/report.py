"""Print tables, and store them in bench/results.json with the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sqlite3
import sys
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from bench.server import SETTINGS, Server

RESULTS = Path(__file__).parent / "results.json"

PACKAGES = (
    "close-engine",
    "peewee",
    "psycopg2-binary",
    "transitions",
    "django",
    "django-fsm-2",
    "python-statemachine",
    "SQLAlchemy",
    "procrastinate",
    "psycopg",
)


@dataclass
class Table:
    """The result of one measurement.

    Attributes:
        title: str, what was measured.
        columns: list of str, the headings; the first is the contender's.
        rows: list of list, one for each contender.
        note: str, what readers need to know.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.3f} ms" if seconds < 0.1 else f"{seconds * 1000:,.0f} ms"


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} µs"


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def per_second(operations: float) -> str:
    return f"{operations:,.0f}/s"


def show(table: Table) -> None:
    """Print a table."""
    grid = Grid(title=table.title, caption=table.note or None, title_justify="left", caption_justify="left")
    for number, column in enumerate(table.columns):
        grid.add_column(column, justify="right" if number else "left")
    for row in table.rows:
        grid.add_row(*map(str, row))
    Console(width=None if sys.stdout.isatty() else 140).print(grid, "")


class Results:
    """The file of results, with one entry for each question."""

    def __init__(self, server: Server) -> None:
        ((version,),) = server.rows("SHOW server_version")
        self.versions = {
            "Python": platform.python_version(),
            "PostgreSQL": version,
            "SQLite": sqlite3.sqlite_version,
            **{package: importlib.metadata.version(package) for package in PACKAGES},
        }

    def keep(self, name: str, tables: list[Table], seconds: float) -> None:
        """Replace a question's entry in the file."""
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept[name] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
            "seconds": round(seconds),
            "machine": machine(),
            "versions": self.versions,
            "settings": SETTINGS,
            "tables": [asdict(table) for table in tables],
        }
        RESULTS.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


def machine() -> dict[str, Any]:
    """Describe this machine."""
    cpu = memory = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
        memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "system": platform.platform(),
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "memory_mb": int(memory) // 1024 if memory else None,
        "load": round(os.getloadavg()[0], 2),
    }
