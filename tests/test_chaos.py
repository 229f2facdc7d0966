"""Workers are killed, suspended and poisoned, and PostgreSQL stops in mid-run: nothing is lost, out of order, or
recorded as sent twice, and nothing is delivered twice but by a sender that was suspended in the provider's call.

`make storm` runs it with 2,000 conversations, every other run with a tenth of them.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import peewee
import pytest

import close_engine
from close_engine import CloseEngineConversation, MessageStatus, OutboxMessage, Stage, StageChange
from close_engine.outbox import MAX_UNREPORTED
from tests import chaos_worker
from tests.chaos_worker import EFFECT, LEASE, Line, Record, is_poisonous
from tests.crm import query
from tests.servers import PrivateServer
from tests.waiting import LIMIT, until

WORKERS = 4
#: How far the clocks of the workers are ahead of the true time, at most, and behind.
APART = timedelta(minutes=10)
#: How long a worker is suspended: beyond its leases. What is in flight then is taken over by another one.
SUSPENDED = (LEASE * 1.25, LEASE * 2)

#: As a foreign writer opens conversations. Noted is, in order, each claim of a message, and whatever else is written to
#: one that is not pending before or afterwards.
START = (
    "INSERT INTO leads (id, phone) SELECT 'lead-' || n, '+1' FROM generate_series(1, %(conversations)s) n",
    "INSERT INTO close_engine_conversations (id, lead_id, entry_point, updated_at) "
    "SELECT 'c' || n, 'lead-' || n, 'SMS_REPLY', now() AT TIME ZONE 'UTC' FROM generate_series(1, %(conversations)s) n",
    "CREATE TABLE noted (number bigserial, message_id bigint, status text)",
    "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO noted (message_id, status) "
    "VALUES (NEW.id, CASE WHEN NEW.claims > OLD.claims THEN 'CLAIMED' ELSE NEW.status END); RETURN NULL; END $$",
    "CREATE TRIGGER noting AFTER UPDATE ON close_engine.outbox FOR EACH ROW "
    "WHEN (NEW.status <> 'PENDING' OR OLD.status <> 'PENDING' OR NEW.claims > OLD.claims) EXECUTE FUNCTION note()",
)

#: As `submit` puts the texts of a conversation into the outbox.
TEXTS = (
    "INSERT INTO close_engine.outbox (conversation_id, topic, body, trigger, created_at, available_at) "
    "SELECT 'c' || n, 'SEND_MESSAGE', 'Text ' || i, CASE i WHEN 1 THEN 'start_qualifying' END, "
    "now() AT TIME ZONE 'UTC', now() AT TIME ZONE 'UTC' "
    "FROM generate_series(%(first)s, %(last)s) n, generate_series(1, 2) i ORDER BY n, i"
)
#: How many messages wait at most: what a dead worker leaves has its turn soon.
WAITING = 100
PENDING = (
    "SELECT count(*), count(*) FILTER (WHERE unreported = 0 AND leased_by IS NULL) FROM close_engine.outbox "
    "WHERE status = 'PENDING'"
)

#: What a worker logs.
UNREACHABLE = "database unreachable"
UNLUCKY = "SELECT conversation_id, body FROM close_engine.outbox WHERE status = 'PENDING' AND unreported >= %s"
NOTED = "SELECT count(*), count(DISTINCT message_id) FROM noted WHERE status <> 'CLAIMED'"
#: The second texts that were claimed before the first one was sent or dead.
OVERTAKEN = (
    "SELECT second.id FROM close_engine.outbox first JOIN close_engine.outbox second USING (conversation_id) "
    "WHERE first.body = 'Text 1' AND second.body = 'Text 2' AND "
    "(SELECT max(number) FROM noted WHERE message_id = first.id) > "
    "(SELECT min(number) FROM noted WHERE message_id = second.id)"
)
#: Of a message that was sent, it stays written who sent it.
LEASED = "SELECT count(*) FROM close_engine.outbox WHERE leased_by IS NOT NULL AND status <> 'SENT'"


class Fleet:
    """Workers in processes of their own, forked by one that has imported what they need.

    Attributes:
        alive: all of them.
        suspended: those of them that are suspended, each with the moment at which to resume it.
        died: the process ids of those that ended by themselves.
    """

    def __init__(self, url: str, place: Path, chance: random.Random) -> None:
        self.url = url
        self.place = place
        self.chance = chance
        self.record = Record(place / "record")
        self.alive: list[BaseProcess] = []
        self.suspended: dict[BaseProcess, float] = {}
        self.died: list[int] = []
        self.struck: dict[str, int] = defaultdict(int)
        self._log_of: dict[BaseProcess, Path] = {}
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["__main__", "tests.chaos_worker"])

    def start(self) -> BaseProcess:
        number = len(self._log_of)
        # The first two are as far apart as can be.
        ahead = -APART if number == 0 else APART if number == 1 else self.chance.uniform(-1, 1) * APART
        log = self.place / f"{number}.log"
        worker = self._processes.Process(target=chaos_worker.main, args=(self.url, self.place, log, ahead))
        worker.start()
        self.alive.append(worker)
        self._log_of[worker] = log
        return worker

    def kill(self, victim: BaseProcess) -> None:
        victim.kill()
        self._forget(victim)

    def suspend(self, victim: BaseProcess, seconds: float) -> None:
        self.record.write("suspended", _pid(victim))
        _signal(victim, signal.SIGSTOP)
        self.suspended[victim] = time.monotonic() + seconds

    def resume(self, victim: BaseProcess) -> None:
        del self.suspended[victim]
        self.struck["suspended"] += 1  # only now is it certain that it had not died just before it was to be suspended
        self.record.write("resumed", _pid(victim))
        _signal(victim, signal.SIGCONT)

    def awake(self) -> list[BaseProcess]:
        return [worker for worker in self.alive if worker not in self.suspended]

    def tend(self) -> None:
        """A moment, after which those that ended are replaced, and those that slept long enough are awake."""
        wait([worker.sentinel for worker in self.alive], 0.05)
        for worker in [worker for worker in self.alive if worker.exitcode is not None]:
            assert worker.exitcode == -signal.SIGKILL, self.logs()
            self.died.append(_pid(worker))
            self._forget(worker)
            self.start()
        for worker in [worker for worker, end in self.suspended.items() if time.monotonic() >= end]:
            self.resume(worker)

    def stop(self) -> list[int | None]:
        """Ask all of them to stop, once they are up, and return their exit codes."""
        until(lambda: all(b"started" in self._log(worker) for worker in self.alive), "all of the workers are up")
        for worker in self.alive:
            worker.terminate()
        for worker in self.alive:
            worker.join(LIMIT)
        return [worker.exitcode for worker in self.alive]

    def noticed(self) -> int:
        """How often a worker noticed that the database is away."""
        return self.logs().count(UNREACHABLE)

    def logs(self) -> str:
        return "".join(log.read_text() for log in self.place.glob("*.log"))

    def _log(self, worker: BaseProcess) -> bytes:
        log = self._log_of[worker]
        return log.read_bytes() if log.exists() else b""

    def _forget(self, worker: BaseProcess) -> None:
        worker.join(LIMIT)
        assert worker.exitcode is not None, "a worker that was killed has not ended"
        self.alive.remove(worker)
        self.suspended.pop(worker, None)


def _pid(worker: BaseProcess) -> int:
    assert worker.pid is not None
    return worker.pid


def _signal(worker: BaseProcess, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(_pid(worker), number)


@dataclass
class Storm:
    """What happens to the workers and the server, and when.

    Attributes:
        server: PrivateServer.
        fleet: Fleet.
        conversations: int.
        chance: the dice: they fall the same each time; where the workers are by then never is.
    """

    server: PrivateServer
    fleet: Fleet
    conversations: int
    chance: random.Random

    def __post_init__(self) -> None:
        poisoned = self.conversations // 50
        self.poisons = 3 * poisoned
        self.submitted = 0
        #: Two texts for each, and the effect of entering QUALIFYING.
        self.messages = 3 * self.conversations - poisoned
        self.kills = self.suspensions = 5 + self.conversations // 100
        strikes = [self.kill] * self.kills + [self.suspend] * self.suspensions
        self.chance.shuffle(strikes)
        strikes.insert(len(strikes) // 3, self.crash_the_server)
        strikes.insert(2 * len(strikes) // 3, self.stop_the_server)
        # They begin when so much of all is done.
        self.strikes = list(zip(sorted(self.chance.uniform(0, 0.9) for _ in strikes), strikes, strict=True))

    def rage(self) -> None:
        """Strike until everything is sent or dead."""
        seen: object = None
        stuck_at = 0.0
        while True:
            self.fleet.tend()
            left = self.submit()
            if (now := (left, len(self.fleet.died))) != seen:
                seen, stuck_at = now, time.monotonic() + LIMIT
            assert time.monotonic() < stuck_at, f"Nothing happened for {LIMIT} seconds.\n{self.fleet.logs()}"
            # Where this process is held up for long, nothing is left by the time of a strike. It comes all the same.
            if self.strikes and (not left or self.done() >= self.strikes[0][0]):
                if self.may_strike():
                    self.strikes.pop(0)[1]()
            elif not left and not self.fleet.suspended:
                if self.fleet.struck["suspended"] == self.suspensions:
                    return
                self.suspend()  # instead of one that died of poison just before

    def submit(self) -> int:
        """Submit more texts if few are waiting, and return what was left: messages, and conversations without."""
        ((pending, waiting),) = query(self.server.url, PENDING)
        left = int(pending) + self.conversations - self.submitted
        if self.submitted < self.conversations and waiting < WAITING:
            first, self.submitted = self.submitted + 1, min(self.submitted + WAITING // 4, self.conversations)
            query(self.server.url, TEXTS, {"first": first, "last": self.submitted})
        return left

    def may_strike(self) -> bool:
        """Whether somebody is there to take over, and nothing was struck so often that it may die of the next one."""
        unlucky = query(self.server.url, UNLUCKY, (MAX_UNREPORTED - 2,))
        return len(self.fleet.suspended) < WORKERS // 2 and all(is_poisonous(*message) for message in unlucky)

    def done(self) -> float:
        """How much is done: the one half is what can be sent, the other half is that all poisons die."""
        sent = self.fleet.record.count("delivered") / (self.messages - self.poisons)
        return (sent + len(self.fleet.died) / (MAX_UNREPORTED * self.poisons)) / 2

    def kill(self) -> None:
        self.fleet.struck["killed"] += 1
        self.fleet.kill(self.chance.choice(self.fleet.awake()))
        self.fleet.start()

    def suspend(self) -> None:
        shortest, longest = SUSPENDED
        seconds = self.chance.uniform(shortest.total_seconds(), longest.total_seconds())
        self.fleet.suspend(self.chance.choice(self.fleet.awake()), seconds)

    def crash_the_server(self) -> None:
        self.fleet.struck["crashed"] += 1
        self._while_it_is_away(self.server.crash)

    def stop_the_server(self) -> None:
        self.fleet.struck["stopped"] += 1
        self._while_it_is_away(self.server.stop)

    def _while_it_is_away(self, end: Callable[[], None]) -> None:
        noticed = self.fleet.noticed()
        end()
        self.kill()
        until(lambda: self.fleet.noticed() > noticed, "a worker notices that the database is away")
        self.server.start()


@dataclass(frozen=True)
class Sleep:
    """That a worker was suspended: for how many seconds, and which line of the record says that it was resumed."""

    pid: int
    seconds: float
    end: int
    ended_at: int


def sleeps(lines: list[Line]) -> list[Sleep]:
    asleep: dict[int, int] = {}
    found = []
    for number, line in enumerate(lines):
        if line.what == "suspended":
            asleep[line.pid] = line.at
        elif line.what == "resumed":
            found.append(Sleep(line.pid, (line.at - asleep.pop(line.pid)) / 1e9, number, line.at))
    return found


def explained(lines: list[Line]) -> list[str]:
    """Say of each message that was delivered twice who was suspended, where, and beyond the lease.

    The provider's call begins when the worker has looked for the last time whether it still has the lease. What came
    before what is told by the order of the lines, and not by a clock.

    Raises:
        AssertionError: nobody was suspended there.
    """
    all_sleeps = sleeps(lines)
    of: dict[int, dict[tuple[str, int], int]] = defaultdict(dict)
    for number, line in enumerate(lines):
        assert line.what != "delivered" or ("delivered", line.claims) not in of[line.message], f"{line} again"
        if line.message:
            of[line.message][line.what, line.claims] = number

    sentences = []
    for message, number_of in of.items():
        *older, newest = sorted(claims for what, claims in number_of if what == "delivered") or [0]
        for lease in older:
            delivered = number_of["delivered", lease]
            line = lines[delivered]
            what = f"message {message} ({line.conversation}, {line.body or EFFECT}) was delivered twice"
            asked, looked = number_of.get(("asked", newest), delivered), number_of.get(("looked", lease), delivered)
            assert asked < delivered, (
                f"{what}: lease {newest} did not ask, or did not find what lease {lease} delivered"
            )
            # It did nothing while it stood still: it looked before that, and delivered afterwards.
            sleep = next((one for one in all_sleeps if one.pid == line.pid and looked < one.end < delivered), None)
            assert sleep is not None, f"{what}: lease {lease} was not suspended in the provider's call"
            assert sleep.seconds > LEASE.total_seconds(), f"{what}: lease {lease} was suspended for {sleep.seconds} s"
            where = "in" if number_of["begun", lease] < sleep.end else "on the way into"
            sentences.append(
                f"{what}: lease {lease} was suspended {where} the provider's call for {sleep.seconds:.2f} s, and "
                f"delivered {(line.at - sleep.ended_at) / 1e6:.1f} ms later; lease {newest} had asked by then"
            )
    return sentences


def prepare(url: str, conversations: int) -> None:
    for statement in START:
        query(url, statement, {"conversations": conversations})


@pytest.fixture
def fleets(tmp_path: Path) -> Iterator[Callable[[str, random.Random], Fleet]]:
    """Makes a fleet of workers, which does not outlive the test."""
    made: list[Fleet] = []

    def make(url: str, chance: random.Random) -> Fleet:
        made.append(Fleet(url, tmp_path, chance))
        return made[-1]

    yield make
    for fleet in made:
        for worker in tuple(fleet.alive):
            fleet.kill(worker)


@pytest.fixture
def own_server() -> Iterator[PrivateServer]:
    """A server of this test's own, as safe as PostgreSQL is."""
    with PrivateServer() as server:
        database = close_engine.connect(server.url)
        close_engine.migrate(standalone=True)
        close_engine.subscribe(EFFECT, stages=[Stage.QUALIFYING])
        database.close()  # it will not outlive the server's first end
        yield server
        database.close()


def test_a_sender_that_is_suspended_in_the_call_beyond_its_lease_delivers_twice_and_is_recorded_once(
    postgres: peewee.Database, postgres_url: str, fleets: Callable[[str, random.Random], Fleet], tmp_path: Path
) -> None:
    prepare(postgres_url, 1)
    query(postgres_url, TEXTS, {"first": 1, "last": 1})
    query(postgres_url, "DELETE FROM close_engine.outbox WHERE body = 'Text 2'")
    fleet = fleets(postgres_url, random.Random(1))
    hold = tmp_path / "hold"
    hold.touch()

    def has_it() -> list[int]:
        return [line.claims for line in fleet.record.lines() if (line.what, line.body) == ("delivered", "Text 1")]

    sleeper = fleet.start()
    until(lambda: fleet.record.count("begun"), "the first worker is in the call")
    fleet.suspend(sleeper, SUSPENDED[0].total_seconds())
    fleet.start()
    until(lambda: has_it() == [2], "the second worker has delivered it instead")
    hold.unlink()
    while fleet.suspended:
        fleet.tend()
    until(lambda: has_it() == [2, 1], "the first worker has delivered it, too")
    assert fleet.stop() == [0, 0], fleet.logs()

    (sentence,) = explained(fleet.record.lines())
    assert sentence.startswith("message 1 (c1, Text 1) was delivered twice: lease 1 was suspended in ")
    text = OutboxMessage.get(OutboxMessage.body == "Text 1")
    assert (text.status, text.claims) == (MessageStatus.SENT, 2)
    assert query(postgres_url, "SELECT status FROM noted WHERE message_id = %s ORDER BY number", (text.id,)) == [
        ("CLAIMED",),
        ("CLAIMED",),
        ("SENT",),
    ]
    (loser,) = re.findall(r"lost worker=(\S+) ", fleet.logs())
    assert loser != text.leased_by
    with pytest.raises(AssertionError, match="lease 1 was not suspended in the provider's call"):
        explained([line for line in fleet.record.lines() if line.what not in ("suspended", "resumed")])


def test_in_a_storm_nothing_is_lost_recorded_twice_or_delivered_twice_without_a_reason(
    own_server: PrivateServer,
    fleets: Callable[[str, random.Random], Fleet],
    request: pytest.FixtureRequest,
) -> None:
    conversations = 2000 if request.config.getoption("--storm") else 200
    prepare(own_server.url, conversations)
    fleet = fleets(own_server.url, random.Random(1))
    storm = Storm(own_server, fleet, conversations, fleet.chance)
    for _ in range(WORKERS):
        fleet.start()
    storm.rage()
    codes = fleet.stop()

    logs, lines = fleet.logs(), fleet.record.lines()
    twice = explained(lines)
    # pytest shows it on failure, and `make storm` in any case.
    print(f"{storm.messages} messages, {storm.poisons} poisonous, {fleet.record.count('delivered')} deliveries")
    print(f"{dict(fleet.struck)}, {len(fleet.died)} workers died of poison, {logs.count('lost worker')} leases lost")
    print(*twice, sep="\n")

    assert codes == [0] * WORKERS, logs
    assert "Traceback" not in logs
    assert fleet.struck == {"killed": storm.kills + 2, "suspended": storm.suspensions, "crashed": 1, "stopped": 1}
    assert fleet.noticed() >= 2, "each time that the server was away was noticed"
    assert set(fleet.died) <= {line.pid for line in lines if line.what == "begun" and _is_poison(line)}

    messages = list(OutboxMessage.select().order_by(OutboxMessage.id))
    assert len(messages) == storm.messages
    poisons = [message for message in messages if is_poisonous(message.conversation_id, message.body)]
    assert len(poisons) == storm.poisons
    assert {message.id: message.status for message in messages} == {
        message.id: MessageStatus.DEAD if message in poisons else MessageStatus.SENT for message in messages
    }
    assert {message.unreported for message in poisons} == {MAX_UNREPORTED}
    assert [
        message for message in poisons if not re.fullmatch(r"the lease of \S+ ran out", message.last_error or "")
    ] == []
    assert query(own_server.url, LEASED) == [(0,)]
    assert query(own_server.url, NOTED) == [(len(messages), len(messages))]
    deliveries: dict[int, set[str]] = defaultdict(set)
    for line in lines:
        if line.what == "delivered":
            deliveries[line.message].add(line.provider_id)
    sent = [message for message in messages if message not in poisons]
    assert deliveries.keys() == {message.id for message in sent}
    assert [message for message in sent if message.provider_id not in deliveries[message.id]] == []
    assert [message.refusal for message in messages if message.refusal] == []

    assert_in_order(lines)
    assert query(own_server.url, OVERTAKEN) == []
    assert_history(poisons)
    assert close_engine.verify() == []


def _is_poison(line: Line) -> bool:
    return is_poisonous(line.conversation, line.body or None)


def assert_in_order(lines: list[Line]) -> None:
    """The texts of a conversation are a lane: the second one is begun after the first one."""
    begun: dict[str, list[str]] = defaultdict(list)
    for line in lines:
        if line.what == "begun" and line.body and line.body not in begun[line.conversation]:
            begun[line.conversation].append(line.body)
    assert [order for order in begun.values() if order != ["Text 1", "Text 2"]] == []


def assert_history(poisons: list[OutboxMessage]) -> None:
    """A conversation qualifies, once, unless the text that does it was poisonous."""
    unsent = {message.conversation_id for message in poisons if message.trigger}
    history: dict[str, list[tuple[Stage | None, Stage]]] = defaultdict(list)
    for change in StageChange.select().order_by(StageChange.id):
        history[change.conversation_id].append((change.source, change.dest))
    effects = [message.conversation_id for message in OutboxMessage.select().where(OutboxMessage.topic == EFFECT)]
    opened, qualified = (None, Stage.INITIATED), (Stage.INITIATED, Stage.QUALIFYING)
    for conversation in CloseEngineConversation.select():
        qualifies = conversation.id not in unsent
        assert conversation.stage is (Stage.QUALIFYING if qualifies else Stage.INITIATED)
        assert history.pop(conversation.id) == ([opened, qualified] if qualifies else [opened])
        assert effects.count(conversation.id) == qualifies
    assert history == {}
