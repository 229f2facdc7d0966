"""What happens if 1 to 64 threads change stages at once, of one conversation or of different ones?

On one conversation, the threads race: one wins, the others get a conflict, reload and try again. The history must have
exactly one row for each change that a thread made.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from shutil import which

import psycopg2

import close_engine
from bench.ground import TRIGGER, conversation_id, fill
from bench.report import Table, per_second
from bench.rounds import interleave, measured_itself, median, timed
from bench.server import Server

HISTORY = "SELECT count(*) FROM close_engine.history WHERE actor = 'bench'"


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    threads = (1, 4) if quick else (1, 2, 4, 8, 16, 32, 64)
    changes, rounds = (20, 1) if quick else (512, 5)
    database = server.migrated("contention")
    fill(server, database, 100, stages=list(TRIGGER))
    ways = {
        "a connection per thread": server.url(database),
        "a pool of connections": pooled(server.url(database)),
    }
    if not which("pgbouncer"):
        yield table(server, ways, threads, changes, rounds, "PgBouncer is not installed here.")
    else:
        with pgbouncer(server, database) as url:
            ways["PgBouncer, transaction mode"] = url
            yield table(server, ways, threads, changes, rounds, "")
            yield leaks(server, url, database)
    server.drop(database)


def pooled(url: str) -> str:
    return url.replace("postgresql://", "postgresql+pool://") + "&max_connections=100&timeout=60"


def table(
    server: Server, ways: dict[str, str], threads: tuple[int, ...], changes: int, rounds: int, note: str
) -> Table:
    rows = []
    for one in (False, True):
        for way, url in ways.items():
            conflicts: dict[str, int] = {}
            seconds = interleave(
                {
                    str(count): lambda count=count, url=url, one=one, conflicts=conflicts: race(
                        server, url, count, changes, one, conflicts
                    )
                    for count in threads
                },
                rounds=rounds,
                timer=measured_itself,
            )
            made = changes * (rounds + 1)
            rows.append(
                [
                    f"{'one conversation' if one else 'different conversations'}, {way}",
                    *(
                        per_second(changes / median(seconds[str(count)]))
                        + (f" ({conflicts[str(count)] / made:.2f})" if one else "")
                        for count in threads
                    ),
                ]
            )
    return Table(
        "Stage changes a second, by the number of threads",
        ["on", *map(str, threads)],
        rows,
        f"In brackets: conflicts per change. Each change has exactly one row of history. {note}".strip(),
    )


def race(server: Server, url: str, threads: int, changes: int, one: bool, conflicts: dict[str, int]) -> float:
    """Return how many seconds the threads take for all changes together."""
    database = close_engine.connect(url)
    ready = threading.Barrier(threads + 1)
    lost = [0] * threads

    def work(number: int) -> None:
        mine = conversation_id(1 if one else number + 1)
        ready.wait()
        with database.connection_context():
            for _ in range(changes // threads):
                lost[number] += change(mine)

    before = recorded(server)
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()

    def run() -> None:
        ready.wait()
        for worker in workers:
            worker.join()

    seconds = timed(run)
    made = recorded(server) - before
    assert made == changes // threads * threads, f"{made} rows of history for {changes // threads * threads} changes"
    conflicts[str(threads)] = conflicts.get(str(threads), 0) + sum(lost)
    if hasattr(database, "close_all"):
        database.close_all()
    return seconds


def change(found: str) -> int:
    """Change a conversation's stage, and return the number of conflicts on the way."""
    for conflicts in range(10_000):
        conversation = close_engine.CloseEngineConversation.get_by_id(found)
        try:
            conversation.fire(TRIGGER[conversation.stage.value], actor="bench")
        except close_engine.StageConflict:
            continue
        return conflicts
    raise RuntimeError(f"{found} could not be changed in 10,000 attempts")


def recorded(server: Server) -> int:
    ((count,),) = server.rows(HISTORY, database="contention")
    found: int = count
    return found


@contextmanager
def pgbouncer(server: Server, database: str) -> Iterator[str]:
    """Run PgBouncer in transaction mode with four connections to the server, and yield the URL through it."""
    with tempfile.TemporaryDirectory(prefix="close_engine_bench_pgbouncer_") as directory:
        place = Path(directory)
        place.chmod(0o777)
        (place / "users").write_text('"postgres" ""\n')
        (place / "pgbouncer.ini").write_text(
            f"[databases]\n{database} = host={server.directory} port={server.port}\n"
            f"[pgbouncer]\nunix_socket_dir = {directory}\nlisten_port = 6432\nauth_type = trust\n"
            f"auth_file = {directory}/users\npool_mode = transaction\ndefault_pool_size = 4\nmax_client_conn = 200\n"
            f"logfile = {directory}/log\n"
        )
        process = subprocess.Popen(
            ["pgbouncer", "-q", str(place / "pgbouncer.ini")],
            user=server.user,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (place / ".s.PGSQL.6432").exists():
                if process.poll() is not None:
                    raise RuntimeError(f"pgbouncer ended at once: {(place / 'log').read_text()}")
            yield f"postgresql://postgres@/{database}?host={directory}&port=6432"
        finally:
            process.terminate()
            process.wait()


FOREIGN_WRITE = """
    UPDATE close_engine_conversations
    SET stage = CASE stage WHEN 'EDIT_LOOP' THEN 'PREVIEW_SENT' ELSE 'EDIT_LOOP' END WHERE id = %s
"""


def leaks(server: Server, url: str, database: str) -> Table:
    """Check that one client's context is never recorded with another client's write."""
    connected, writes, left = close_engine.connect(url), 50, 0
    for number in range(1, writes + 1):
        change(conversation_id(number))
        with closing(psycopg2.connect(url)) as stranger, stranger, stranger.cursor() as cursor:
            cursor.execute(FOREIGN_WRITE, (conversation_id(number),))
            assert cursor.rowcount == 1
            cursor.execute("SELECT current_setting('close_engine.context', true)")
            left += cursor.fetchone() not in ((None,), ("",))
    connected.close()
    foreign = "SELECT count(*) FROM close_engine.history WHERE actor = 'database:postgres'"
    ((recorded_as_such,),) = server.rows(foreign, database=database)
    return Table(
        "Through PgBouncer in transaction mode: what one client leaves behind for the next on the same connection",
        ["what", f"of {writes} writes"],
        [
            ["a context left behind", left],
            ["another writer's change recorded as the library's", writes - recorded_as_such],
        ],
    )
