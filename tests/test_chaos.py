"""Workers are killed and PostgreSQL crashes in mid-run: nothing is lost, out of order, or recorded as sent twice."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import pytest

import close_engine
from close_engine import CloseEngineConversation, MessageStatus, OutboxMessage, Stage, StageChange
from tests.crm import query
from tests.servers import PrivateServer
from tests.waiting import LIMIT, until

CONVERSATIONS = 2000
#: The two texts that are there at the start, and the effect of entering QUALIFYING.
MESSAGES = 3 * CONVERSATIONS
WORKERS = 4

#: As a foreign writer opens conversations; the texts as `submit` puts them into the outbox. Every change of a
#: message's status is noted.
START = (
    "INSERT INTO leads (id, phone) SELECT 'lead-' || n, '+1' FROM generate_series(1, %(conversations)s) n",
    "INSERT INTO close_engine_conversations (id, lead_id, entry_point, updated_at) "
    "SELECT 'c' || n, 'lead-' || n, 'SMS_REPLY', now() AT TIME ZONE 'UTC' FROM generate_series(1, %(conversations)s) n",
    "INSERT INTO close_engine.outbox (conversation_id, topic, body, trigger, created_at, available_at) "
    "SELECT 'c' || n, 'SEND_MESSAGE', 'Text ' || i, CASE i WHEN 1 THEN 'start_qualifying' END, "
    "now() AT TIME ZONE 'UTC', now() AT TIME ZONE 'UTC' "
    "FROM generate_series(1, 2) i, generate_series(1, %(conversations)s) n",
    "CREATE TABLE noted (message_id bigint, status text)",
    "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN INSERT INTO noted VALUES (NEW.id, NEW.status); RETURN NULL; END $$",
    "CREATE TRIGGER noting AFTER UPDATE ON close_engine.outbox FOR EACH ROW WHEN (NEW.status <> OLD.status) "
    "EXECUTE FUNCTION note()",
)

#: What a worker logs.
UNREACHABLE = "database unreachable"
LEASED = "SELECT count(*) FROM close_engine.outbox WHERE status = 'PENDING' AND leased_by IS NOT NULL"


class Fleet:
    """Workers in processes of their own, each with a file that it sends to."""

    def __init__(self, url: str, place: Path) -> None:
        self.url = url
        self.place = place
        self.alive: list[subprocess.Popen[bytes]] = []
        self.log_of: dict[int, Path] = {}
        self.started = 0

    def start(self) -> None:
        self.started += 1
        log, file = self.place / f"{self.started}.log", self.place / f"{self.started}.sent"
        command = [sys.executable, "-m", "tests.chaos_worker", self.url, str(file)]
        with log.open("wb") as stderr:
            worker = subprocess.Popen(command, stderr=stderr)
        self.alive.append(worker)
        self.log_of[worker.pid] = log

    def kill(self, victim: subprocess.Popen[bytes]) -> None:
        victim.kill()
        victim.wait(LIMIT)
        self.alive.remove(victim)

    def stop(self) -> list[int]:
        """Ask all of them to stop, once they are up, and return their exit codes."""
        until(self.are_up, "all of the workers are up")
        for worker in self.alive:
            worker.terminate()
        return [worker.wait(LIMIT) for worker in self.alive]

    def are_up(self) -> bool:
        self.wait()
        return all(b"started" in self.log_of[worker.pid].read_bytes() for worker in self.alive)

    def wait(self) -> None:
        """A moment, in which no worker must end by itself."""
        with suppress(subprocess.TimeoutExpired):
            self.alive[-1].wait(0.05)
        assert all(worker.poll() is None for worker in self.alive), self.logs()

    def noticed(self) -> int:
        """How often a worker noticed that the database is away."""
        return self.logs().count(UNREACHABLE)

    def until_one_notices(self, before: int) -> None:
        until(lambda: self.noticed() > before, "a worker notices that the database is away")

    def sent(self) -> int:
        """How many sends there were."""
        return sum(file.read_bytes().count(b"\n") for file in self.place.glob("*.sent"))

    def sends(self) -> list[tuple[int, str, int]]:
        """When, of which conversation, which message: in the order of time."""
        lines = [line.split() for file in self.place.glob("*.sent") for line in file.read_text().splitlines()]
        return sorted((int(moment), conversation, int(message)) for moment, conversation, message in lines)

    def logs(self) -> str:
        return "".join(log.read_text() for log in self.place.glob("*.log"))


@pytest.fixture
def server() -> Iterator[PrivateServer]:
    """A server of this test's own, as safe as PostgreSQL is, with everything to be sent in it."""
    with PrivateServer() as server:
        database = close_engine.connect(server.url)
        close_engine.migrate(standalone=True)
        for statement in START:
            query(server.url, statement, {"conversations": CONVERSATIONS})
        database.close()  # it will not outlive the server's first crash
        yield server
        database.close()


@pytest.fixture
def fleet(server: PrivateServer, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(server.url, tmp_path)
    try:
        for _ in range(WORKERS):
            fleet.start()
        yield fleet
    finally:
        for worker in tuple(fleet.alive):
            fleet.kill(worker)


def wreak_havoc(server: PrivateServer, fleet: Fleet, chance: random.Random) -> int:
    """Kill one worker after the other, and crash the server twice, until everything is sent; how many were killed."""
    # By numbers of sends, so that it happens while much is left. Where this process is held up for long, less is left
    # by then, or nothing: that cannot be made certain, and it happens all the same.
    crashes = [MESSAGES // 3, 2 * MESSAGES // 3]
    next_kill = chance.randrange(50, 450)
    left, stuck_at = MESSAGES, time.monotonic() + LIMIT
    while left or crashes:
        fleet.wait()
        if (now_left := unsent(server)) < left:
            left, stuck_at = now_left, time.monotonic() + LIMIT
        assert time.monotonic() < stuck_at or not left, f"Nothing was sent for {LIMIT} seconds.\n{fleet.logs()}"
        if left and fleet.sent() < next_kill:
            continue
        next_kill = fleet.sent() + chance.randrange(50, 450)
        victim = chance.choice(fleet.alive)
        if crashes and fleet.sent() >= crashes[0]:
            noticed = fleet.noticed()
            server.crash()
            fleet.kill(victim)
            fleet.start()
            fleet.until_one_notices(noticed)
            server.start()
            del crashes[0]
        else:
            fleet.kill(victim)
            fleet.start()
    return fleet.started - WORKERS


def unsent(server: PrivateServer) -> int:
    """How many messages are not recorded as sent."""
    return int(query(server.url, "SELECT count(*) FROM close_engine.outbox WHERE status <> 'SENT'")[0][0])


def test_workers_are_killed_and_the_server_crashes_and_nothing_is_lost_or_recorded_twice(
    server: PrivateServer, fleet: Fleet
) -> None:
    # The dice fall the same each time; where the workers are by then never is.
    killed = wreak_havoc(server, fleet, random.Random(1))
    codes = fleet.stop()
    sends, logs = fleet.sends(), fleet.logs()
    print(f"killed={killed} sends={len(sends)} messages={MESSAGES}")  # pytest shows it on failure

    assert codes == [0] * WORKERS, logs
    assert "Traceback" not in logs
    assert fleet.noticed() >= 2, "each crash was noticed"

    messages = list(OutboxMessage.select().order_by(OutboxMessage.id))
    assert {message.status for message in messages} == {MessageStatus.SENT}
    assert len(messages) == MESSAGES
    assert {message.id for message in messages} == {message_id for _, _, message_id in sends}
    assert query(server.url, "SELECT count(*), count(DISTINCT message_id), min(status), max(status) FROM noted") == [
        (MESSAGES, MESSAGES, "SENT", "SENT")
    ]
    assert [message.refusal for message in messages if message.refusal] == []

    sent_first: dict[str, dict[int, None]] = defaultdict(dict)
    for _, conversation_id, message_id in sends:
        sent_first[conversation_id].setdefault(message_id)
    # The texts of a conversation are one lane, the effect is another.
    texts = {message.id for message in messages if message.topic == "SEND_MESSAGE"}
    orders = [[message for message in order if message in texts] for order in sent_first.values()]
    assert [order for order in orders if order != sorted(order) or len(order) != 2] == []
    recorded: dict[str, list[datetime]] = defaultdict(list)
    for message in messages:
        assert message.sent_at is not None
        if message.id in texts:
            recorded[message.conversation_id].append(message.sent_at)
    assert [times for times in recorded.values() if times != sorted(times)] == []

    history: dict[str, list[StageChange]] = defaultdict(list)
    for change in StageChange.select().order_by(StageChange.id):
        history[change.conversation_id].append(change)
    for conversation in CloseEngineConversation.select():
        assert [(change.source, change.dest) for change in history[conversation.id]] == [
            (None, Stage.INITIATED),
            (Stage.INITIATED, conversation.stage),
        ]
        assert conversation.stage is Stage.QUALIFYING
    assert len(history) == CONVERSATIONS

    close_engine.release_leases()
    assert query(server.url, LEASED) == [(0,)]
    assert close_engine.verify() == []
