"""What does one durable stage change cost: load by id, check, write with the guard, history row, committed?

The floor is two statements by hand, without a machine, a model or a trigger in the database. That is the minimum for
"exactly one of several racing workers wins" and "each change has its history row". It does not guard against other
writers and does not record when a lead went silent.
"""

from __future__ import annotations

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import cycle

import psycopg2
import sqlalchemy
from sqlalchemy import orm

import close_engine
from bench import peers
from bench.driver import counting_proxy, replayed
from bench.ground import DEST, EDITS, TRIGGER, conversation_id, fill, utc_now
from bench.peers import Change
from bench.report import Table, microseconds, milliseconds, times
from bench.rounds import interleave, median, percentile, ratio, timed
from bench.server import Server, processor_seconds

MOVED = """
    WITH moved AS (
        UPDATE close_engine_conversations SET stage = %s, edit_rounds = edit_rounds + %s, updated_at = %s
        WHERE id = %s AND stage = %s AND updated_at = %s RETURNING id, lead_id)
    INSERT INTO history (conversation_id, lead_id, trigger, source, dest, actor, created_at)
    SELECT id, lead_id, %s, %s, %s, %s, %s FROM moved
"""


@contextmanager
def floor(url: str) -> Iterator[Change]:
    """Use psycopg2 by hand, in autocommit: a SELECT and one statement that writes both rows."""
    connection = psycopg2.connect(url)
    connection.autocommit = True
    cursor = connection.cursor()

    def change(conversation_id: str) -> None:
        cursor.execute("SELECT * FROM close_engine_conversations WHERE id = %s", (conversation_id,))
        row = cursor.fetchone()
        source, version, moment = row[4], row[16], utc_now()
        dest = DEST[source]
        written = (dest, EDITS[source], moment, conversation_id, source, version)
        cursor.execute(MOVED, (*written, TRIGGER[source], source, dest, "bench", moment))
        assert cursor.rowcount == 1

    yield change
    connection.close()


@contextmanager
def ours(url: str) -> Iterator[Change]:
    database = close_engine.connect(url)

    def change(conversation_id: str) -> None:
        conversation = close_engine.CloseEngineConversation.get_by_id(conversation_id)
        conversation.fire(TRIGGER[conversation.stage.value], actor="bench")

    yield change
    database.close()


CONTENDERS: dict[str, Callable[[str], AbstractContextManager[Change]]] = {
    "floor: psycopg2 by hand": floor,
    "Close Engine": ours,
    "django-fsm-2": peers.django_fsm,
    "python-statemachine, SQLAlchemy": peers.python_statemachine,
    "peewee, a machine per object": peers.peewee_machine,
}
FLOOR, OURS = list(CONTENDERS)[:2]


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    count = 200 if quick else 10_000
    databases = ground(server, count)
    for tcp in (False, True):
        for commit in ("on", "off"):
            yield latency(server, databases, count, tcp, commit, rounds=2 if quick else 40, repeat=10 if quick else 50)
    yield effort(server, databases, changes=100 if quick else 4000)
    yield memory(server, databases, count=100 if quick else 2000)
    yield left_behind(server, databases, changes=1000 if quick else 100_000)
    server.drop(*databases.values())


def ground(server: Server, count: int) -> dict[str, str]:
    """Create a database for each contender, with the same tables and rows."""
    ours_database = server.migrated("stage_change_ours")
    fill(server, ours_database, count, stages=list(DEST), history=5)
    plain = server.plain(ours_database, "stage_change_plain")
    databases = {OURS: ours_database, FLOOR: plain}
    for number, name in enumerate(CONTENDERS):
        if name not in databases:
            databases[name] = server.copy(plain, f"stage_change_{number}")
            server.execute(f"ALTER DATABASE {databases[name]} SET search_path = public, close_engine")
    return databases


def operations(stack: ExitStack, urls: dict[str, str], count: int) -> dict[str, Callable[[], None]]:
    """Map each name to a function that changes the stage of the next conversation."""

    def prepare(name: str) -> Callable[[], None]:
        change, ids = stack.enter_context(CONTENDERS[name](urls[name])), cycle(ids_of(count))
        return lambda: change(next(ids))

    return {name: prepare(name) for name in urls}


def ids_of(count: int) -> list[str]:
    return [conversation_id(number) for number in range(1, count + 1)]


def latency(
    server: Server, databases: dict[str, str], count: int, tcp: bool, commit: str, rounds: int, repeat: int
) -> Table:
    server.set("synchronous_commit", commit)
    with ExitStack() as stack:
        urls = {name: server.url(database, tcp=tcp) for name, database in databases.items()}
        measured = interleave(operations(stack, urls, count), rounds=rounds, repeat=repeat)
    server.set("synchronous_commit", "on")
    return Table(
        f"One stage change, synchronous_commit {commit}, {'TCP' if tcp else 'Unix socket'}",
        ["contender", "to the floor", "median", "p50", "p99"],
        [
            [
                name,
                times(ratio(measured[name], measured[FLOOR])),
                milliseconds(median(measured[name])),
                milliseconds(percentile(measured[name], 50)),
                milliseconds(percentile(measured[name], 99)),
            ]
            for name in CONTENDERS
        ],
        f"{rounds} rounds of {repeat} changes each",
    )


def effort(server: Server, databases: dict[str, str], changes: int) -> Table:
    """Measure what depends little on the machine's load: statements, round trips and CPU time."""
    processor = processor_times(server, databases, changes)
    return Table(
        "What one stage change takes",
        ["contender", "SQL statements", "round trips", "Python alone", "client's processor", "server's processor"],
        [
            [
                name,
                *counted_on_the_wire(server, name, databases[name]),
                microseconds(python_alone(server, name, databases[name], changes)),
                *map(microseconds, processor[name]),
            ]
            for name in CONTENDERS
        ],
        "BEGIN and COMMIT count as statements. Python alone: the driver's cursor replays the server's answers; the "
        "fastest tenth, because other processes only add to it. Client and server: synchronous_commit off, Unix socket",
    )


def counted_on_the_wire(server: Server, name: str, database: str, changes: int = 10) -> list[str]:
    with counting_proxy(server) as proxy, CONTENDERS[name](proxy.url(database)) as change:
        change(conversation_id(1))
        before = proxy.counts()
        for _ in range(changes):
            change(conversation_id(1))
        return [f"{(after - first) / changes:g}" for after, first in zip(proxy.counts(), before, strict=True)]


def python_alone(server: Server, name: str, database: str, changes: int) -> float:
    """Return the CPU time in seconds."""
    with replayed() as tape, CONTENDERS[name](server.url(database)) as change:
        change(conversation_id(1))
        with tape.recording():  # there and back again
            change(conversation_id(2))
            change(conversation_id(2))
        with tape.playing():
            seconds = [timed(lambda: change(conversation_id(2)), time.thread_time) for _ in range(changes)]
    return percentile([seconds], 10)


def processor_times(
    server: Server, databases: dict[str, str], changes: int, rounds: int = 10
) -> dict[str, tuple[float, float]]:
    """Return the CPU time per change in seconds, of the client and of the server: the medians of the rounds."""
    server.set("synchronous_commit", "off")
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    with ExitStack() as stack:
        urls = {name: server.url(database) for name, database in databases.items()}
        change = operations(stack, urls, count=200)
        for name in CONTENDERS:
            change[name]()
        backends = {name: server.backends(databases[name])[0] for name in CONTENDERS}
        for _ in range(rounds):
            for name in CONTENDERS:
                client, backend = time.process_time(), processor_seconds(backends[name])
                for _ in range(changes // rounds):
                    change[name]()
                spent[name].append((time.process_time() - client, processor_seconds(backends[name]) - backend))
    server.set("synchronous_commit", "on")
    each = changes // rounds
    return {
        name: (statistics.median(c / each for c, _ in turns), statistics.median(s / each for _, s in turns))
        for name, turns in spent.items()
    }


def memory(server: Server, databases: dict[str, str], count: int) -> Table:
    """Measure the memory of a conversation that is loaded and kept."""
    loaders: dict[str, Callable[[str], object]] = {
        OURS: close_engine.CloseEngineConversation.get_by_id,
        "django-fsm-2": lambda found: peers.django_models().Conversation.objects.get(pk=found),
        "peewee, a machine per object": peers.load_with_machine,
    }
    sizes = {}
    for name in CONTENDERS:
        with CONTENDERS[name](server.url(databases[name])) as change, ExitStack() as stack:
            load = loaders.get(name)
            if name == FLOOR:
                connection = psycopg2.connect(server.url(databases[name]))
                stack.callback(connection.close)
                load = row_loader(connection.cursor())
            elif load is None:
                engine = sqlalchemy.create_engine("postgresql+psycopg2://", creator=connector(server, databases[name]))
                session = stack.enter_context(orm.Session(engine))
                load = machine_loader(session)
            change(conversation_id(1))
            load(conversation_id(1))
            gc.collect()
            tracemalloc.start()
            kept = [load(found) for found in ids_of(count)]
            gc.collect()
            sizes[name] = tracemalloc.get_traced_memory()[0] / len(kept)
            tracemalloc.stop()
    return Table(
        "Memory of a conversation that is loaded and kept",
        ["contender", "bytes"],
        [[name, f"{sizes[name]:,.0f}"] for name in CONTENDERS],
        "Includes its machine if it has one of its own; the floor keeps the row as a tuple",
    )


def row_loader(cursor: psycopg2.extensions.cursor) -> Callable[[str], object]:
    def load(found: str) -> object:
        cursor.execute("SELECT * FROM close_engine_conversations WHERE id = %s", (found,))
        return cursor.fetchone()

    return load


def machine_loader(session: orm.Session) -> Callable[[str], object]:
    def load(found: str) -> object:
        conversation = session.get_one(peers.SqlAlchemyConversation, found)
        return peers.ConversationMachine(conversation, state_field="stage")

    return load


def connector(server: Server, database: str) -> Callable[[], psycopg2.extensions.connection]:
    return lambda: psycopg2.connect(server.url(database))


def left_behind(server: Server, databases: dict[str, str], changes: int) -> Table:
    """Count the objects left after many changes, and compare the last thousand changes with the first."""
    server.set("synchronous_commit", "off")
    with ours(server.url(databases[OURS])) as change:
        ids = cycle(ids_of(200))
        warm = [timed(lambda: change(next(ids))) for _ in range(1000)]
        gc.collect()
        objects = len(gc.get_objects())
        for _ in range(changes):
            change(next(ids))
        gc.collect()
        more = len(gc.get_objects()) - objects
        last = [timed(lambda: change(next(ids))) for _ in range(1000)]
    server.set("synchronous_commit", "on")
    return Table(
        f"Left behind after {changes:,} stage changes",
        ["contender", "objects", "last 1000 to first 1000"],
        [[OURS, more, times(statistics.median(last) / statistics.median(warm))]],
        "Objects that the garbage collector tracks after a collection",
    )
