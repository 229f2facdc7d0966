"""Binding a database: URLs as people write them, what is refused, and that no error shows a password."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import peewee
import pytest
from playhouse.pool import PooledPostgresqlDatabase, PooledSqliteDatabase

import close_engine
from close_engine import ConfigurationError, EntryPoint, Lead, Stage
from close_engine.database.binding import current, now
from close_engine.testing import bring_to
from tests.servers import execute, new_name, postgres_database
from tests.waiting import LIMIT

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("url", "name", "parameters"),
    [
        (
            "postgresql://u:pw@db.example.com:6543/crm",
            "crm",
            {"user": "u", "password": "pw", "host": "db.example.com", "port": "6543"},
        ),
        ("postgres://u@h/crm", "crm", {"user": "u", "host": "h"}),
        ("postgresql:///crm", "crm", {}),
        ("postgresql://u:p%40%3A%2F%3F%23%25%20w@h/crm", "crm", {"user": "u", "password": "p@:/?#% w", "host": "h"}),
        ("postgresql://u%40org:[p#?w@h/crm", "crm", {"user": "u@org", "password": "[p#?w", "host": "h"}),
        ("postgresql://u:007@h/my%20crm", "my crm", {"user": "u", "password": "007", "host": "h"}),
        ("postgresql://h/crm?user=u&password=007", "crm", {"user": "u", "password": "007", "host": "h"}),
        ("postgresql://%2Fvar%2Frun%2FPg:5433/crm", "crm", {"host": "/var/run/Pg", "port": "5433"}),
        ("postgresql://u@/crm?host=/var/run/Pg", "crm", {"user": "u", "host": "/var/run/Pg"}),
        ("postgresql://[::1]:5432/crm", "crm", {"host": "::1", "port": "5432"}),
        ("postgresql://h1:1,h2:2/crm", "crm", {"host": "h1,h2", "port": "1,2"}),
        (
            "postgresql://h/crm?schema=public&connection_limit=5&pool_timeout=2&pgbouncer=true&socket_timeout=3"
            "&statement_cache_size=0&sslaccept=strict&sslmode=require&connect_timeout=10&application_name=true",
            "crm",
            {"host": "h", "sslmode": "require", "connect_timeout": "10", "application_name": "true"},
        ),
        (
            "postgresql://h/crm?schema=Sales%20%22A%22",
            "crm",
            {"host": "h", "options": ' -c search_path="Sales\\ ""A"""'},
        ),
        (
            "postgresql://h/crm?schema=crm&options=-c%20statement_timeout%3D5s",
            "crm",
            {"host": "h", "options": '-c statement_timeout=5s -c search_path="crm"'},
        ),
    ],
)
def test_a_postgresql_url_is_read_as_prisma_and_libpq_read_it(url: str, name: str, parameters: dict[str, str]) -> None:
    database = close_engine.connect(url)

    assert type(database) is peewee.PostgresqlDatabase
    assert database.database == name
    assert database.connect_params == parameters
    assert database.is_closed()


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///crm.db", "crm.db"),
        ("sqlite:////var/lib/crm.db", "/var/lib/crm.db"),
        ("sqlite:///odd #1 %20 name.db", "odd #1 %20 name.db"),
        ("sqlite:///:memory:", ":memory:"),
        ("sqlite:///", ":memory:"),
    ],
)
def test_a_sqlite_url_names_a_file(url: str, file: str) -> None:
    database = close_engine.connect(url)

    assert type(database) is peewee.SqliteDatabase
    assert database.database == file


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+pool"])
def test_sqlite_waits_for_other_writers_checks_references_and_writes_ahead(scheme: str, tmp_path: Path) -> None:
    database = close_engine.connect(f"{scheme}:///{tmp_path}/crm.db")

    assert isinstance(database, peewee.SqliteDatabase)
    assert (database.pragma("busy_timeout"), database.pragma("foreign_keys")) == (60000, 1)
    assert database.pragma("journal_mode") == "wal"
    database.close()


def test_a_pooled_database_keeps_its_connections(postgres_url: str, tmp_path: Path) -> None:
    pooled = postgres_url.replace("postgresql://", "postgresql+pool://")
    for url, kind in (
        (f"{pooled}&max_connections=2&stale_timeout=300&timeout=5", PooledPostgresqlDatabase),
        (f"sqlite+pool:///{tmp_path}/crm.db?max_connections=2&stale_timeout=300&timeout=5", PooledSqliteDatabase),
    ):
        database: Any = close_engine.connect(url)
        assert isinstance(database, kind)
        assert (database._max_connections, database._stale_timeout, database._wait_timeout) == (2, 300, 5)
        close_engine.migrate(standalone=True)
        for _ in range(5):
            with database.connection_context():
                conversation = close_engine.open_conversation(Lead.create(phone="+1555"), EntryPoint.SMS_REPLY)
                bring_to(conversation, Stage.COMPLETED)
        assert len(database._connections) == 1
        assert close_engine.verify() == []
        database.close_all()


def test_a_url_with_special_characters_in_user_password_and_name_connects(server: str) -> None:
    user, password, name = f"{new_name()} Odd @:/?#%' user", "p@:/?#% w'\"+&=", f"{new_name()} odd @/?#% name"
    parts = urlsplit(server)
    host = parts.query.partition("host=")[2] or f"{parts.hostname}:{parts.port}"
    quoted = [quote(user, safe=""), quote(password, safe=""), quote(host, safe=":"), quote(name, safe="")]
    login = password.replace("'", "''")
    execute(
        server,
        f"CREATE ROLE \"{user}\" LOGIN PASSWORD '{login}'",
        f'CREATE DATABASE "{name}" OWNER "{user}" TEMPLATE template0',
    )
    try:
        database = close_engine.connect("postgresql://{}:{}@{}/{}".format(*quoted))
        assert close_engine.migrate(standalone=True)
        assert database.execute_sql("SELECT current_user, current_database()").fetchone() == (user, name)
        database.close()
    finally:
        execute(server, f'DROP DATABASE "{name}" WITH (FORCE)', f'DROP ROLE "{user}"')


WRITE = "write postgresql://user:password@host/name or sqlite:///file.db."
ENCODE = "percent-encode the special characters in its user and password."
PORT = "its port is not a number; write @ and the host after the password."


@pytest.mark.parametrize(
    ("url", "shown", "why"),
    [
        (f"mysql://u:{SECRET}@h/crm", "mysql://u:***@h/crm", WRITE),
        (f"POSTGRES://u:{SECRET}@h/crm", "POSTGRES://u:***@h/crm", WRITE),
        (f"postgresql+fast://u:{SECRET}@h/crm", "postgresql+fast://u:***@h/crm", WRITE),
        (f"u:{SECRET}@h/crm", "u:***@h/crm", WRITE),
        (f"host=h password={SECRET} dbname=crm", "host=h password=*** dbname=crm", WRITE),
        (f"host=h password='a {SECRET}' dbname=crm", "host=h password=*** dbname=crm", WRITE),
        ("postgresql://", "postgresql://", WRITE),
        ("sqlite://", "sqlite://", WRITE),
        ("crm.db", "crm.db", WRITE),
        ("sqlite://crm.db", "sqlite://crm.db", "write three slashes before a file, sqlite:///crm.db."),
        ("sqlite:///crm.db?mode=ro", "sqlite:///crm.db?mode=ro", "a SQLite URL takes no parameters; remove mode."),
        (f"postgresql://u:{SECRET}@h", "postgresql://u:***@h", "it does not name a database."),
        (f"postgresql://u:{SECRET}@h/", "postgresql://u:***@h/", "it does not name a database."),
        (
            f"postgresql://u:{SECRET}@h/crm?sslwhat=1",
            "postgresql://u:***@h/crm?sslwhat=1",
            'there is no parameter "sslwhat".',
        ),
        (
            f"postgresql://h/crm?password={SECRET}&sslpassword={SECRET}&foo=1",
            "postgresql://h/crm?password=***&sslpassword=***&foo=1",
            'there is no parameter "foo".',
        ),
        (f"postgresql://u:%zz{SECRET}@h/crm", "postgresql://u:***@h/crm", ENCODE),
        (f"postgresql://u:a@{SECRET}@h/crm", "postgresql://u:***@h/crm", ENCODE),
        (f"postgresql://u:a/{SECRET}@h/crm", "postgresql://u:***@h/crm", ENCODE),
        (f"postgresql://u:12/{SECRET}@h/crm", "postgresql://u:***@h/crm", ENCODE),
        (f"postgresql://u:{SECRET}@[::1/crm", "postgresql://u:***@[::1/crm", ENCODE),
        (f"postgresql://u:{SECRET}@h:port/crm", "postgresql://u:***@h:port/crm", PORT),
        (f"postgresql://u:{SECRET}/crm", "postgresql://u:***/crm", PORT),
        (
            f"postgresql+pool://u:{SECRET}@h/crm?max_connections=many",
            "postgresql+pool://u:***@h/crm?max_connections=many",
            "max_connections must be a number.",
        ),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_password(url: str, shown: str, why: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        close_engine.connect(url)

    assert str(caught.value) == f"The database URL {shown!r} cannot be used: {why}"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_server_that_is_not_there_or_refuses_is_told_without_the_password(server: str, nobody_listens: str) -> None:
    refusing = server.replace("postgresql://postgres:@", f"postgresql://nobody:{SECRET}@")
    for url in (f"postgresql://u:{SECRET}@{nobody_listens}/crm", refusing):
        database = close_engine.connect(url)
        with pytest.raises(peewee.OperationalError) as caught:
            database.connect()
        assert SECRET not in str(caught.value)
        assert SECRET not in repr(caught.value.__cause__)


def test_the_url_comes_from_the_environment_and_else_is_a_file_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOSE_ENGINE_DATABASE", raising=False)
    database = close_engine.connect()
    close_engine.migrate(standalone=True)
    database.close()
    assert (tmp_path / "close_engine.db").exists()

    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", "postgresql://h/from_environment")
    assert close_engine.connect().database == "from_environment"
    assert close_engine.connect("postgresql://h/given").database == "given"


TAKES = "bind() takes a Peewee database"
MAKE = "bind peewee.PostgresqlDatabase(…), or connect() to a URL."


class OldSqlite(peewee.SqliteDatabase):
    """Reports the version of an old system's SQLite."""

    server_version = (3, 34, 1)


@pytest.mark.parametrize(
    ("database", "why"),
    [
        (peewee.MySQLDatabase("crm"), "MySQLDatabase is not supported: bind a PostgreSQL or SQLite database."),
        (
            peewee.DatabaseProxy(),
            f"bind() takes a Peewee database, not a DatabaseProxy that is not initialized: {MAKE}",
        ),
        (f"postgresql://u:{SECRET}@h/crm", f"{TAKES}, not an object of the type str: {MAKE}"),
        (OldSqlite(":memory:"), "SQLite 3.34.1 is too old: 3.35 or newer is needed."),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_and_the_binding_stays(database: Any, why: str) -> None:
    bound = close_engine.connect("sqlite:///:memory:", leads="Lead")

    with pytest.raises(ConfigurationError) as caught:
        close_engine.bind(database)

    assert str(caught.value) == why
    assert current().database is bound
    assert Lead._meta.table_name == "Lead"


def test_a_database_of_the_callers_own_is_bound_as_it_is(postgres_url: str) -> None:
    own = peewee.PostgresqlDatabase(postgres_url)

    assert close_engine.bind(own) is own
    conversation = close_engine.open_conversation(Lead.create(phone="+1555"), EntryPoint.SMS_REPLY)
    assert bring_to(conversation, Stage.COMPLETED).stage is Stage.COMPLETED
    own.close()


UNBOUND = """
import close_engine
from close_engine import ConfigurationError, Lead

for use in (
    Lead.get,
    lambda: list(Lead.select()),
    lambda: Lead.select().count(),
    lambda: Lead.create(phone="+1555"),
    lambda: Lead.update(phone="+1555").execute(),
    lambda: close_engine.open_conversation("lead_1", "SMS_REPLY"),
    lambda: close_engine.atomic().__enter__(),
    close_engine.migrate,
    close_engine.schema.status,
    close_engine.schema.downgrade,
    close_engine.verify,
):
    try:
        use()
    except ConfigurationError as error:
        print(error)
"""


def test_use_before_a_database_is_bound_says_how_to_bind_one() -> None:
    done = subprocess.run([sys.executable, "-c", UNBOUND], capture_output=True, text=True, check=True, timeout=LIMIT)

    sentence = "No database is bound: call close_engine.connect(url) or close_engine.bind(database) first."
    assert done.stdout.splitlines() == [sentence] * 11


def test_a_clock_without_a_timezone_is_refused() -> None:
    close_engine.connect("sqlite:///:memory:", clock=lambda: datetime(2026, 1, 2, 3, 4, 5))

    with pytest.raises(ConfigurationError) as caught:
        now()

    assert str(caught.value) == (
        "The clock returned 2026-01-02 03:04:05, which has no timezone: "
        "bind a clock that returns datetime.now(timezone.utc)."
    )


@pytest.mark.parametrize("schema", ["crm", 'Sales "A" \\ 1'])
def test_the_crm_may_live_in_another_schema(server: str, schema: str) -> None:
    with postgres_database(server) as url:
        identifier = '"' + schema.replace('"', '""') + '"'
        execute(
            url,
            f"CREATE SCHEMA {identifier}",
            *(f"CREATE TABLE {identifier}.{table} (id varchar(30) PRIMARY KEY)" for table in ("users", "clients")),
            f"CREATE TABLE {identifier}.leads (id varchar(30) PRIMARY KEY, phone text)",
        )
        database = close_engine.connect(f"{url}&schema={quote(schema)}")

        close_engine.migrate()

        assert close_engine.verify() == []
        assert set(database.get_tables(schema)) == {
            "clients",
            "close_engine_conversations",
            "leads",
            "pending_actions",
            "users",
        }
        assert database.get_tables("public") == []
        conversation = close_engine.open_conversation(Lead.create(phone="+1555"), EntryPoint.SMS_REPLY)
        assert bring_to(conversation, Stage.COMPLETED).history()[-1].dest is Stage.COMPLETED
        close_engine.schema.downgrade("0001_conversations")
        assert set(database.get_tables(schema)) == {"clients", "leads", "users"}
        database.close()
