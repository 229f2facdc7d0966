"""A PostgreSQL server on a host of its own: primary, or standby of another one.

It has PostgreSQL's safe defaults, also `fsync`. Whoever manages the servers reaches them by their Unix sockets, as
somebody on the host itself would, whether or not its cable is in.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg2

from tests.cluster.hosts import Host
from tests.debian import postgresql

__all__ = ["DATABASE", "USER", "Node", "until"]

DATABASE, USER = "crm", "crm"

#: The owner of the server's files and its processes, and the superuser.
_SUPERUSER = "postgres"

#: Seconds until a server has done what it is told.
_LIMIT = 120

_CONFIGURATION = """
data_directory = '{data}'
hba_file = '{place}/pg_hba.conf'
ident_file = '{place}/pg_ident.conf'
unix_socket_directories = '{place}'
listen_addresses = '*'
max_connections = 100
shared_buffers = 256MB
max_wal_size = 4GB
wal_keep_size = 2GB
wal_log_hints = on
wal_sender_timeout = 10s
wal_receiver_timeout = 10s
wal_receiver_status_interval = 1s
wal_retrieve_retry_interval = 500ms
tcp_keepalives_idle = 3
tcp_keepalives_interval = 1
tcp_keepalives_count = 3
synchronous_commit = on
synchronous_standby_names = '{synchronous}'
"""

#: Nobody else is on this network, and nobody else can read the directory of the socket.
_ADMISSION = "local all all trust\nhost all all 10.77.0.0/24 trust\nhost replication all 10.77.0.0/24 trust\n"


class Node:
    """One server. Its files outlast its processes.

    Attributes:
        host: where it runs.
        url: of its database, by its socket, as the superuser.
    """

    def __init__(self, host: Host, place: Path) -> None:
        self.host = host
        self._place = place / host.name
        self._data = self._place / "data"
        self._log = self._place / "log"
        self._configuration = self._place / "postgresql.conf"
        self._primary: Node | None = None
        self._synchronous = ""
        self.url = f"postgresql://{_SUPERUSER}@/{DATABASE}?host={self._place}"

    @property
    def name(self) -> str:
        return self.host.name

    def make(self) -> None:
        """Make it from nothing, as a primary with an empty database, and start it."""
        self._make_place()
        self._program("initdb", "--pgdata", self._data, "--username", _SUPERUSER, "--encoding", "UTF8", "--no-locale")
        self.start()
        self._program("createuser", "--host", self._place, USER)
        self._program("createdb", "--host", self._place, "--owner", USER, DATABASE)

    def copy(self, primary: Node) -> None:
        """Make it as the standby of a primary that runs, and start it."""
        self._make_place()
        source = ("--host", primary.name, "--username", _SUPERUSER)
        self._program(
            "pg_basebackup", "--pgdata", self._data, *source, "--checkpoint", "fast", "--wal-method", "stream"
        )
        self.follow(primary)

    def follow(self, primary: Node) -> None:
        """Start it as the standby of a primary whose history begins with its own."""
        self._primary, self._synchronous = primary, ""
        (self._data / "standby.signal").touch()
        self.start()

    def rewind(self, primary: Node) -> None:
        """After it was a primary and crashed: take back what it committed and the new primary does not know."""
        primary.query("CHECKPOINT")  # only then does the new primary's control file name its new timeline
        self._program(
            *("pg_rewind", "--target-pgdata", self._data, "--config-file", self._configuration),
            *("--source-server", f"host={primary.name} user={_SUPERUSER} dbname={DATABASE}"),
        )
        self.follow(primary)

    def start(self) -> None:
        """Start it; after a crash, it recovers from its log."""
        self._configure()
        with self._log.open("ab") as log:
            command = (postgresql() / "postgres", "-c", f"config_file={self._configuration}")
            process = self.host.popen(command, user=_SUPERUSER, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until(lambda: self._answers(process), f"{self.name} answers; its log is {self._log}")

    def kill(self) -> None:
        """Kill all its processes with SIGKILL."""
        self.host.kill()

    def stop(self) -> None:
        """Shut it down in good order: its sessions are ended, and its standby gets all that it has written."""
        self._program("pg_ctl", "--pgdata", self._data, "stop", "--mode", "fast", "--wait")

    def promote(self) -> None:
        """Make a standby the primary. It waits for no standby of its own yet, because it has none."""
        assert self.query("SELECT pg_promote(true, %s)", (_LIMIT,)) == [(True,)]
        self._primary = None

    def wait_for(self, standby: Node) -> None:
        """From now on, acknowledge no commit before that standby has it; return once it has all that came before.

        From then on, nothing that was ever acknowledged is on this server alone.
        """
        self._synchronous = standby.name
        self._configure()
        self.query("SELECT pg_reload_conf()")
        asked = "SELECT current_setting('synchronous_standby_names')"
        until(lambda: self.query(asked) == [(standby.name,)], f"{self.name} has read its configuration")
        self.query("CHECKPOINT")  # by then, the process has read it that makes all others wait
        ((position,),) = self.query("SELECT pg_current_wal_insert_lsn()")
        in_sync = "SELECT 1 FROM pg_stat_replication WHERE sync_state = 'sync' AND flush_lsn >= %s"
        self.query("SELECT pg_switch_wal()")  # a position in the middle of a page is never reported as flushed
        until(lambda: self.query(in_sync, (position,)), f"{standby.name} is in sync with {self.name}")

    def query(self, statement: str, values: Sequence[Any] | Mapping[str, Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement in a session of its own, and return its rows."""
        with closing(self.session()) as session, session.cursor() as cursor:
            cursor.execute(statement, values or None)
            return list(cursor.fetchall()) if cursor.description else []

    def session(self) -> Any:
        """Open a session that commits each statement by itself."""
        session = psycopg2.connect(self.url)
        session.autocommit = True
        return session

    def _answers(self, process: subprocess.Popen[Any]) -> bool:
        if process.poll() is not None:
            said = "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
            raise RuntimeError(f"PostgreSQL on {self.name} ended at once:\n{said}")
        try:
            psycopg2.connect(self.url.replace(f"/{DATABASE}?", "/postgres?")).close()
        except psycopg2.OperationalError:
            return False
        return True

    def _make_place(self) -> None:
        self.host.run(["mkdir", self._place], user=_SUPERUSER)
        (self._place / "pg_hba.conf").write_text(_ADMISSION)
        (self._place / "pg_ident.conf").touch()

    def _configure(self) -> None:
        values = {"data": self._data, "place": self._place, "synchronous": self._synchronous}
        lines = _CONFIGURATION.format(**values)
        if self._primary is not None:
            upstream = f"host={self._primary.name} user={_SUPERUSER} application_name={self.name} connect_timeout=3"
            lines += f"primary_conninfo = '{upstream} keepalives_idle=3 keepalives_interval=1 keepalives_count=3'\n"
        self._configuration.write_text(lines)

    def _program(self, name: str, *arguments: str | Path) -> None:
        self.host.run([postgresql() / name, *arguments], user=_SUPERUSER, timeout=_LIMIT, cwd="/")


def until(condition: Any, what: str, limit: float = _LIMIT) -> Any:
    """Return what the condition gives, as soon as that is true.

    Raises:
        RuntimeError: it is not true in time.
    """
    end = time.monotonic() + limit
    while not (found := condition()):
        if time.monotonic() > end:
            raise RuntimeError(f"After {limit:g} seconds it is still not true that {what}.")
        time.sleep(0.05)
    return found
