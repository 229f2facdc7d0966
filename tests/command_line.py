"""Runs the command line, in this process or in its own, and makes the roles that it connects as."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from close_engine.cli import main
from tests.servers import execute, new_name
from tests.waiting import LIMIT

COMMAND = str(Path(sys.executable).with_name("close-engine"))


@dataclass(frozen=True)
class Result:
    """The output and the exit code of a run."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[list[str]]:
        """The printed lines, each split into words."""
        return [line.split() for line in self.out.splitlines()]


def run(*arguments: str, input: str = "") -> Result:
    """Run the command line in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with pytest.MonkeyPatch.context() as patched:
        for name, stream in {"stdin": io.StringIO(input), "stdout": out, "stderr": err}.items():
            patched.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
    for stream in (out, err):
        stream.seek(0)
    return Result(int(ended.value.code or 0), out.read(), err.read())


def process(*arguments: str, stdout: Any = subprocess.PIPE, **options: Any) -> Result:
    """Run the installed command in its own process, where nobody answers its questions."""
    done = subprocess.run(
        [COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=LIMIT,
        **options,
    )
    return Result(done.returncode, done.stdout, done.stderr)


@contextmanager
def background(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process that runs beside the block and ends with it.

    One that lives for too long is killed: whoever reads what it prints, or waits for its end, waits no longer.
    """
    process: subprocess.Popen[Any]
    with subprocess.Popen(command, **options) as process:
        overdue = threading.Timer(LIMIT, process.kill)
        overdue.daemon = True
        overdue.start()
        try:
            yield process
        finally:
            overdue.cancel()
            process.kill()


def refused(*arguments: str) -> str:
    """Run a command that must fail with one line on standard error, and return that line."""
    result = run(*arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.endswith(".\n")
    assert result.err.count("\n") == 1
    return result.err


@contextmanager
def postgres_role(server: str, rights: str = "") -> Iterator[tuple[str, str]]:
    """The name and the password of a PostgreSQL role that owns nothing."""
    name, password = f"{new_name()}_role", "Xyzzy-is-the-password"
    execute(server, f"CREATE ROLE {name} LOGIN {rights} PASSWORD '{password}'")
    try:
        yield name, password
    finally:
        execute(server, f"DROP ROLE {name}")


def as_user(url: str, user: str, password: str) -> str:
    """The URL of the same database, for another user."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{user}:{password}@{host}{parts.path}?{parts.query}"
