"""One behaviour suite, run on every database.

`database` is the test's own database, migrated, empty and bound to the models. A test that uses it, or anything made
from it, runs three times: on SQLite in a file, on SQLite in memory, and on PostgreSQL. `postgres` is PostgreSQL only,
`empty_url` a database without tables.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import peewee
import pytest

import close_engine
from tests.servers import postgres_database, postgres_server

if TYPE_CHECKING:
    from close_engine.testing import MovableClock

pytest_plugins = ["close_engine.testing", "tests.foreign"]

SERVER = "CLOSE_ENGINE_TEST_SERVER"

#: Apps for processes of their own, which read the environment when they are imported.
collect_ignore = ["celery_app.py", "cluster/celery_app.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("close-engine")
    group.addoption("--prisma", action="store_true", help="fail if Prisma is not here, instead of leaving it out")
    group.addoption("--browser", action="store_true", help="fail if no browser can visit, instead of leaving it out")
    group.addoption("--screenshots", action="store_true", help="keep the pictures for docs/console.md")
    group.addoption("--storm", action="store_true", help="run the chaos test with ten times as many conversations")
    group.addoption("--write-matrix", action="store_true", help="write what Prisma judged into docs/prisma.md")


def pytest_configure(config: pytest.Config) -> None:
    # A shell makes its background jobs ignore SIGINT. The processes that the tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # one server for all processes of a run
        server = postgres_server()
        os.environ[SERVER] = server.__enter__()

        def stop() -> None:
            server.__exit__(None, None, None)

        config.add_cleanup(stop)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out, and why: a line for each reason."""
    left_out = Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in left_out.items():
        terminalreporter.write_line(f"Left out {count} tests. {reason.removeprefix('Skipped: ')}")


@pytest.fixture(scope="session")
def server() -> str:
    """The URL of the PostgreSQL server's maintenance database."""
    return os.environ[SERVER]


@pytest.fixture(scope="session")
def nobody_listens() -> Iterator[str]:
    """The host and a port of this machine that refuses connections: it is taken, by somebody who does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        host, port = taken.getsockname()
        yield f"{host}:{port}"


@pytest.fixture(scope="session")
def postgres_template(server: str) -> Iterator[str]:
    """The name of a migrated PostgreSQL database to copy."""
    with postgres_database(server) as url:
        database = close_engine.connect(url)
        close_engine.migrate(standalone=True)
        database.close()
        yield urlsplit(url).path.removeprefix("/")


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("template") / "close_engine.db"
    database = close_engine.connect(f"sqlite:///{path}")
    close_engine.migrate(standalone=True)
    database.close()
    return path


@pytest.fixture(params=["sqlite-file", "sqlite-memory", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def database_url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a migrated database; one in memory is not migrated yet."""
    if kind == "sqlite-memory":
        yield "sqlite:///:memory:"
    elif kind == "sqlite-file":
        shutil.copy(request.getfixturevalue("sqlite_template"), tmp_path / "test.db")
        yield f"sqlite:///{tmp_path}/test.db"
    else:
        template = request.getfixturevalue("postgres_template")
        with postgres_database(request.getfixturevalue("server"), template) as url:
            yield url


@pytest.fixture
def database(
    database_url: str, close_engine_clock: MovableClock, request: pytest.FixtureRequest
) -> Iterator[peewee.Database]:
    """The test's own migrated database, bound to the models, with a clock that the test can move."""
    in_memory = database_url.endswith(":memory:")
    # Before the models are bound to the test's own: making the template binds them, too.
    template_path = request.getfixturevalue("sqlite_template") if in_memory else None
    database = close_engine.connect(database_url, clock=close_engine_clock)
    if template_path is not None:
        with closing(sqlite3.connect(template_path)) as template:
            template.backup(database.connection())
    close_engine_clock.rule()
    yield database
    database.close()


@pytest.fixture
def close_engine_database(database: peewee.Database) -> peewee.Database:
    """The database that the fixtures of close_engine.testing use: here, each kind in turn."""
    return database


@pytest.fixture
def postgres_url(server: str, postgres_template: str) -> Iterator[str]:
    """The URL of a migrated PostgreSQL database."""
    with postgres_database(server, postgres_template) as url:
        yield url


@pytest.fixture
def postgres(postgres_url: str) -> Iterator[peewee.Database]:
    """The test's own migrated PostgreSQL database, bound to the models, with the real clock."""
    database = close_engine.connect(postgres_url)
    yield database
    database.close()


@pytest.fixture(params=["sqlite-file", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any tables."""
    if request.param == "sqlite-file":
        yield f"sqlite:///{tmp_path}/empty.db"
    else:
        with postgres_database(request.getfixturevalue("server")) as url:
            yield url
