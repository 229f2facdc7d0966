"""Lines that several processes write into one file. Each is one write, so it stays even if its process is killed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Notes:
    """A file of lines, each of words that are separated by tabs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        self._read = 0

    def write(self, *words: object) -> None:
        os.write(self._file, ("\t".join(map(str, words)) + "\n").encode())

    def news(self) -> list[list[str]]:
        """The lines that this object has not returned yet."""
        with open(self.path, "rb") as file:
            file.seek(self._read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(newline)
        return [line.split("\t") for line in whole.decode().split("\n")] if newline else []

    def lines(self) -> list[list[str]]:
        return [line.split("\t") for line in self.path.read_text().splitlines()]


class Log:
    """What the processes of a run note.

    Attributes:
        delivered: what the provider was given: send key, message, lead, topic, process.
        done: what a caller was told is done, and must be found in the end: what, and its id.
        timed: what took how long: what, when it began by a clock that all processes share, seconds.
        refused: what the library rightly refused, by the name of its error.
    """

    def __init__(self, place: Path) -> None:
        self.delivered = Notes(place / "delivered")
        self.done = Notes(place / "done")
        self.timed = Notes(place / "timed")
        self.refused = Notes(place / "refused")

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Note how long the body took, if it ended well."""
        began = time.monotonic()
        yield
        self.timed.write(what, began, time.monotonic() - began)
