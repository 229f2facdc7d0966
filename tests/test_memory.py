"""One place changes what an object holds of its row, so that one place can undo it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "close_engine"

#: Matches code that changes an object's values, or which of them are unsaved.
CHANGES = re.compile(r"__data__(\[[^\]]+\])?(, \S+)? = |__data__\.(update|pop|setdefault|clear)|__rel__|\._dirty")

#: The files that load a row, refuse an assignment, and follow a transaction.
MAY_CHANGE = {"models.py", "columns.py", "database/transaction.py"}

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_other_file_changes_the_memory_of_a_row(name: str) -> None:
    assert bool(CHANGES.search(FILES[name].read_text())) is (name in MAY_CHANGE)
