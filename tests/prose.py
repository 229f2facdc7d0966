"""The pages of documentation, as tests read them: their sections and their fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PRISMA = ROOT / "docs/prisma.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    """A fenced block: its language, the number of its first line, its text."""

    language: str
    line: int
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order."""
    text = page.read_text()
    for found in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield Block(found[1], text.count("\n", 0, found.start()) + 2, found[2])


def block(page: Path, language: str, having: str = "") -> str:
    """Return the text of the only block of a page in this language that contains `having`."""
    (text,) = (block.text for block in blocks(page) if block.language == language and having in block.text)
    return text


def grants(page: Path, role: str) -> list[str]:
    """Return the grants on a page that a role is given, with `{role}` in its place."""
    sql = "".join(block.text for block in blocks(page) if block.language == "sql")
    return [
        found.replace(f"TO {role}", "TO {role}") for found in re.findall(rf"^(GRANT .* TO {role});", sql, re.MULTILINE)
    ]


def section(page: Path, heading: str) -> str:
    """Return the text under a heading of the second level; empty if there is none."""
    return "".join(
        re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    )
