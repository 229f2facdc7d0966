"""What an object holds of its row is changed in one place, and so is undone in one place."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "close_engine"

#: What changes what an object holds of its row, or which of that is unsaved.
CHANGES = re.compile(r"__data__(\[[^\]]+\])?(, \S+)? = |__data__\.(update|pop|setdefault|clear)|__rel__|\._dirty")

#: What loads a row, what refuses the assignment of a field, and what follows a transaction.
MAY_CHANGE = {"models.py", "columns.py", "database/transaction.py"}

FILES = {path.relative_to(PACKAGE).as_posix(): path for path in PACKAGE.rglob("*.py")}


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_other_file_changes_the_memory_of_a_row(name: str) -> None:
    assert bool(CHANGES.search(FILES[name].read_text())) is (name in MAY_CHANGE)
