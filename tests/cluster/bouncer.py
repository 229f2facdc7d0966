"""PgBouncer on the application's host, in transaction mode.

PgBouncer does not know which of several servers is the primary: a list of hosts is only to spread the load over them.
So it is told. Whatever promotes a standby writes the new host into its configuration and has it reload that. Sessions
with the old host are not used again then.
"""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

from tests.cluster.hosts import Host
from tests.cluster.postgres import DATABASE, USER, until

__all__ = ["PORT", "TIMEOUTS", "Bouncer"]

PORT = 6432

_CONFIGURATION = """
[databases]
{database} = host={primary} port=5432 dbname={database}

[pgbouncer]
listen_addr = *
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {place}/users
pool_mode = transaction
default_pool_size = 20
max_client_conn = 200
log_connections = 0
log_disconnections = 0
{timeouts}
"""

#: What docs/operations.md tells everybody to set, so that PgBouncer notices a server that is silent.
TIMEOUTS = """\
server_connect_timeout = 3
server_login_retry = 1
tcp_keepidle = 3
tcp_keepintvl = 1
tcp_keepcnt = 3
tcp_user_timeout = 5000
"""


class Bouncer:
    """PgBouncer, which passes everything on to one server.

    Args:
        host: where it runs.
        place: the directory for a directory of its own.
    """

    def __init__(self, host: Host, place: Path) -> None:
        self.host = host
        self._place = place / "pgbouncer"
        self._file = self._place / "pgbouncer.ini"

    def start(self, primary: str) -> None:
        self._place.mkdir(mode=0o755)
        (self._place / "users").write_text(f'"{USER}" ""\n')
        self._write(primary)
        with (self._place / "log").open("ab") as log:
            command = ("pgbouncer", self._file)
            self._process = self.host.popen(
                command, user="postgres", stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        until(self._listens, f"PgBouncer listens; its log is in {self._place}")

    def point_to(self, primary: str) -> None:
        """Have it use another server from now on."""
        self._write(primary)
        self._process.send_signal(signal.SIGHUP)

    def _write(self, primary: str) -> None:
        values = {"primary": primary, "place": self._place, "port": PORT, "database": DATABASE, "timeouts": TIMEOUTS}
        self._file.write_text(_CONFIGURATION.format(**values))

    def _listens(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"PgBouncer ended at once: {(self._place / 'log').read_text()}")
        return f":{PORT} " in self.host.run(["ss", "-Hltn"])
