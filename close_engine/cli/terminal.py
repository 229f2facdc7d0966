r"""Output that is safe in a terminal: the console, plain tables, and values formatted for people.

>>> duration(timedelta(minutes=95)), duration(timedelta(days=3)), duration(None)
('1.6 h', '3.0 days', '-')
>>> cell("who\x1b[2J?"), cell(None), cell({"n": 1})
('who\\x1b[2J?', '-', '{"n": 1}')
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from close_engine.printable import printable

__all__ = ["cell", "console", "duration", "log_to_standard_error", "table"]


def console(*, stderr: bool = False) -> Console:
    """Return a console: as wide as the terminal, or wide enough for any table if there is no terminal.

    Args:
        stderr: print to standard error instead of standard output.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, width=None if terminal else 1000, highlight=False, emoji=False, markup=False)


class _Table(Table):
    """A table in which no text can move the cursor or begin a line."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(printable(text) if isinstance(text, str) else text for text in cells), **options)


def table(*columns: str, title: str | None = None, numbers: Collection[str] = ()) -> Table:
    """Create an empty table.

    Args:
        columns: the headings.
        title: the line above the table.
        numbers: the headings of the columns to align right.
    """
    empty = _Table(
        title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False
    )
    for column in columns:
        empty.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return empty


def cell(value: Any) -> str:
    """Format a value, or a sentence, for a terminal: on one line, with what would not be seen as itself escaped."""
    if value is None:
        return "-"
    if isinstance(value, timedelta):
        return duration(value)
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S} UTC"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return printable(text)


def duration(time: timedelta | None) -> str:
    """Format a timedelta in a suitable unit, or None as a dash."""
    if time is None:
        return "-"
    seconds = time.total_seconds()
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def is_confirmed(warning: str) -> bool:
    """Ask whether to go on, on standard error. Nobody's answer is no."""
    print(f"{cell(warning)}. Continue? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = sys.stdin.readline()
    if not answer.endswith("\n"):  # end of input: nobody ended the line
        print(file=sys.stderr)
    return answer.strip().lower() in ("y", "yes")


class _OneLine(logging.Formatter):
    """Format each event as one line, even if it has a traceback."""

    converter = staticmethod(time.gmtime)

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to_standard_error() -> None:
    """Log one line for each event, unless the user's module has set up logging."""
    if logging.root.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(_OneLine("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    logging.root.addHandler(handler)
    logging.getLogger("close_engine").setLevel(logging.INFO)
