"""What is measured from outside, every few seconds: processes, and what PostgreSQL says of its tables and sessions."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import peewee
import psutil

_TABLES = """
    SELECT relname, pg_table_size(relid), pg_indexes_size(relid), n_live_tup, n_dead_tup,
        n_tup_upd + n_tup_del, autovacuum_count
    FROM pg_stat_user_tables WHERE schemaname IN ('close_engine', 'public')
"""
# A worker that is suspended in a transaction is idle in it. The sessions of autovacuum hold nothing back.
_SESSIONS = """
    SELECT count(*),
        coalesce(max(extract(epoch FROM clock_timestamp() - state_change)) FILTER (WHERE state LIKE 'idle in%%'), 0),
        coalesce(max(age(backend_xmin)), 0)
    FROM pg_stat_activity WHERE backend_type = 'client backend' AND datname = current_database()
"""


@dataclass(frozen=True)
class TableState:
    """A table at one moment: bytes, and rows as the statistics have them; `written` are updates and deletes so far."""

    data: int
    indexes: int
    live: int
    dead: int
    written: int
    vacuums: int


@dataclass(frozen=True)
class Sample:
    """One moment of the run.

    Attributes:
        at: when, by a clock that all processes share.
        rss: bytes of memory of each process, by its name.
        cpu: seconds of processor time that the processes and PostgreSQL have used so far.
        tables: by name.
        connections: how many sessions there are.
        idle_in_transaction: for how many seconds the longest of them has done nothing in a transaction.
        xmin_age: how many transactions ago the oldest snapshot was taken.
        load: how many processes of the whole machine wanted to run, on average over the last minute.
    """

    at: float
    rss: Mapping[str, int]
    cpu: float
    tables: Mapping[str, TableState]
    connections: int
    idle_in_transaction: float
    xmin_age: int
    load: float


class Gauges:
    """Takes samples.

    Args:
        database: the one of the run.
        postmaster: the process id of PostgreSQL.
    """

    def __init__(self, database: peewee.Database, postmaster: int) -> None:
        self.database = database
        self.postmaster = psutil.Process(postmaster)
        self.samples: list[Sample] = []
        self._used: dict[tuple[int, float], float] = {}  # what each process had used when it was last seen

    def take(self, processes: Mapping[str, int]) -> None:
        """Take a sample of processes, each named, with its process id."""
        tables = {name: TableState(*state) for name, *state in self._rows(_TABLES)}
        ((connections, idle, xmin_age),) = self._rows(_SESSIONS)
        rss = {}
        for name, pid in processes.items():
            with suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                rss[name] = process.memory_info().rss
                self._note_use(process)
        for process in [self.postmaster, *self.postmaster.children()]:
            with suppress(psutil.NoSuchProcess):
                self._note_use(process)
        cpu = sum(self._used.values())
        load, *_ = psutil.getloadavg()
        self.samples.append(Sample(time.monotonic(), rss, cpu, tables, connections, float(idle), xmin_age, load))

    def _note_use(self, process: psutil.Process) -> None:
        times = process.cpu_times()
        self._used[process.pid, process.create_time()] = times.user + times.system

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        return list(self.database.execute_sql(query).fetchall())


@dataclass(frozen=True)
class Size:
    """A table in the end, beside a copy that was loaded anew: bytes of data and indexes."""

    name: str
    rows: int
    data: int
    indexes: int
    fresh_data: int
    fresh_indexes: int

    @property
    def factor(self) -> float:
        return (self.data + self.indexes) / (self.fresh_data + self.fresh_indexes)

    @property
    def waste(self) -> int:
        return self.data + self.indexes - self.fresh_data - self.fresh_indexes


def sizes(database: peewee.Database, names: list[tuple[str, str]]) -> list[Size]:
    """Load each table (schema and name) anew, and compare."""
    found = []
    database.execute_sql("CREATE SCHEMA soak_copies")
    for schema, name in names:
        table, copy = f'{schema}."{name}"', f'soak_copies."{name}"'
        database.execute_sql(f"CREATE TABLE {copy} (LIKE {table} INCLUDING ALL)")
        rows = database.execute_sql(f"INSERT INTO {copy} SELECT * FROM {table}").rowcount
        query = "SELECT pg_table_size(%s), pg_indexes_size(%s), pg_table_size(%s), pg_indexes_size(%s)"
        found.append(Size(name, rows, *database.execute_sql(query, (table, table, copy, copy)).fetchone()))
    database.execute_sql("DROP SCHEMA soak_copies CASCADE")
    return found
