"""What does a stage change cost on SQLite, in WAL mode, with one or four processes that write?

The floor is `sqlite3` by hand with the same pragmas: one transaction with a SELECT, a guarded UPDATE and an INSERT.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import close_engine
from bench.ground import DEST, EDITS, TRIGGER, utc_now
from bench.processes import in_processes
from bench.report import Table, microseconds, per_second, times
from bench.rounds import interleave, measured_itself, median, ratio
from bench.server import Server

CONVERSATIONS = 200
FLOOR, OURS = "floor: sqlite3 by hand", "Close Engine"


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    with tempfile.TemporaryDirectory(prefix="close_engine_bench_sqlite_") as directory:
        ours_file, plain_file, ids = prepare(Path(directory))
        contenders = {FLOOR: partial(by_hand, plain_file, ids), OURS: partial(ours, ours_file, ids)}
        for processes in (1, 4):
            yield changes(contenders, processes, each=40 if quick else 500, rounds=2 if quick else 15)


def prepare(directory: Path) -> tuple[str, str, list[str]]:
    """Return a file with conversations that can be changed, a copy without triggers, and the ids."""
    ours_file, plain_file = str(directory / "ours.db"), str(directory / "plain.db")
    database = close_engine.connect(f"sqlite:///{ours_file}")
    close_engine.migrate(standalone=True)
    ids = []
    with close_engine.atomic():
        for _ in range(CONVERSATIONS):
            lead = close_engine.Lead.create(phone="+15550100")
            conversation = close_engine.open_conversation(lead, close_engine.EntryPoint.SMS_REPLY)
            for trigger in ("start_qualifying", "start_building", "send_preview"):
                conversation.fire(trigger)
            ids.append(conversation.id)
    database.execute_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    shutil.copy(ours_file, plain_file)
    with closing(sqlite3.connect(plain_file)) as connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f'DROP TRIGGER "{name}"')
        connection.commit()
    return ours_file, plain_file, ids


def changes(contenders: dict[str, Callable[[int], object]], processes: int, each: int, rounds: int) -> Table:
    seconds = interleave(
        {name: partial(in_processes, partial(work, each), processes) for name, work in contenders.items()},
        rounds=rounds,
        timer=measured_itself,
    )
    return Table(
        f"One stage change on SQLite, {processes} process{'es' * (processes > 1)}",
        ["contender", "to the floor", "median", "all together"],
        [
            [
                name,
                times(ratio(seconds[name], seconds[FLOOR])),
                microseconds(median(seconds[name]) / each),
                per_second(processes * each / median(seconds[name])),
            ]
            for name in contenders
        ],
        f"WAL, synchronous FULL; {rounds} rounds of {each} changes per process",
    )


def by_hand(file: str, ids: list[str], changes: int) -> None:
    connection = sqlite3.connect(file, isolation_level=None, timeout=60)
    connection.execute("PRAGMA foreign_keys = 1")
    for number in range(changes):
        connection.execute("BEGIN IMMEDIATE")
        row = connection.execute(
            "SELECT * FROM close_engine_conversations WHERE id = ?", (ids[number % len(ids)],)
        ).fetchone()
        identity, lead, source, version, moment = row[0], row[1], row[4], row[16], utc_now().isoformat(" ")[:23]
        updated = connection.execute(
            "UPDATE close_engine_conversations SET stage = ?, edit_rounds = edit_rounds + ?, updated_at = ? "
            "WHERE id = ? AND stage = ? AND updated_at = ?",
            (DEST[source], EDITS[source], moment, identity, source, version),
        )
        assert updated.rowcount == 1
        connection.execute(
            "INSERT INTO close_engine_history "
            "(conversation_id, lead_id, trigger, source, dest, actor, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (identity, lead, TRIGGER[source], source, DEST[source], "bench", moment),
        )
        connection.execute("COMMIT")
    connection.close()


def ours(file: str, ids: list[str], changes: int) -> None:
    """Change stages. If another process wins, load the conversation again."""
    database = close_engine.connect(f"sqlite:///{file}")
    for number in range(changes):
        while True:
            conversation = close_engine.CloseEngineConversation.get_by_id(ids[number % len(ids)])
            try:
                conversation.fire(TRIGGER[conversation.stage.value], actor="bench")
            except close_engine.StageConflict:
                continue
            break
    database.close()
