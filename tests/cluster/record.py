"""What a process notes, in a file of its own: a line stays when its process is killed, but for one that was cut short.

Each line is a word, what it is about, and when it was, by the clock that all hosts of one machine share.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Line", "Reader", "Record"]


class Line(NamedTuple):
    """A line.

    Attributes:
        word: what happened. A client *tries* a thing with a token; then it is *done*, or a stage is *changed*, or it is
            *refused* because somebody else was quicker. A worker *swept*; its provider *delivered* a text, by its key;
            and it was *pinged* by what no other worker may send.
        about: the token or the key; empty if there is none.
        at: when, in seconds of `time.monotonic()`.
    """

    word: str
    about: str
    at: float


class Record:
    """The file of one process."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)

    def note(self, word: str, about: str = "") -> None:
        os.write(self._file, f"{word}\t{about}\t{time.monotonic()}\n".encode())


class Reader:
    """Reads what has come into a file since it was last read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0

    def news(self) -> Iterator[Line]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        for line in whole.decode().splitlines():
            word, about, at = line.split("\t")
            yield Line(word, about, float(at))
