"""The play: what befalls the cluster while all are at work, and whether anything was lost or doubled by it."""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.audit import NOTING, Audit, audit
from tests.cluster.bouncer import PORT, Bouncer
from tests.cluster.fleet import AT_WORK, DONE, Fleet, Member
from tests.cluster.hosts import Network
from tests.cluster.postgres import DATABASE, USER, Node, until
from tests.debian import require

__all__ = ["run"]

PACKAGES = ("iproute2", "postgresql", "pgbouncer")

CLIENTS = 8
#: Conversations of each client.
EACH = 250

_COMMAND = Path(sys.executable).parent / "close-engine"

#: What docs/operations.md tells everybody to use.
OPTIONS = (
    "target_session_attrs=read-write&connect_timeout=3&keepalives_idle=3&keepalives_interval=1&keepalives_count=3"
    "&tcp_user_timeout=5000"
)
DIRECT = f"postgresql://{USER}@db1,db2/{DATABASE}?{OPTIONS}"
POOLED = DIRECT.replace("postgresql:", "postgresql+pool:") + "&max_connections=10"
BOUNCED = f"postgresql://{USER}@app:{PORT}/{DATABASE}?pgbouncer=true"

#: Seconds within which everybody must be at work again.
PATIENCE = 60

_LEADS = f"INSERT INTO leads (id, phone) SELECT 'lead-' || n, '+1' FROM generate_series(0, {CLIENTS * EACH - 1}) n"

#: A change past the library, on a row that nobody else changes at that moment.
_STRANDED = """
    UPDATE close_engine_conversations SET stage = 'PREVIEW_SENT', updated_at = now() AT TIME ZONE 'UTC' WHERE id = (
        SELECT id FROM close_engine_conversations WHERE stage = 'EDIT_LOOP' LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED
    )
"""
_ANY = "SELECT id FROM close_engine_conversations LIMIT 1"
_PING = """
    INSERT INTO close_engine.outbox (conversation_id, topic, body, key, created_at, available_at)
    SELECT min(id), %(topic)s, %(key)s, %(key)s, close_engine.moment(), close_engine.moment()
    FROM close_engine_conversations
"""
_RUNNING = "SELECT name FROM close_engine.workers WHERE seen_at > close_engine.moment() - interval '20 s'"
_FOREIGN = "SELECT id FROM close_engine.history WHERE actor LIKE 'database:%'"


@dataclass
class Outage:
    """What something did to those at work: seconds until the first, and until the last of them was at work again."""

    what: str
    first: float
    last: float


@dataclass
class Play:
    """The cluster, and what is done to it.

    Attributes:
        primary, standby: who is what at the moment.
    """

    network: Network
    place: Path
    primary: Node
    standby: Node
    bouncer: Bouncer
    fleet: Fleet = field(default_factory=Fleet)
    outages: list[Outage] = field(default_factory=list)
    promotions: int = 0
    crashes: int = 0
    pings: int = 0
    began: float = field(default_factory=time.monotonic)
    chance: random.Random = field(default_factory=lambda: random.Random(15))

    def say(self, sentence: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {sentence}", flush=True)

    # -- before

    def set_up(self) -> None:
        self.primary.make()
        self.standby.copy(self.primary)
        self.primary.wait_for(self.standby)
        self.bouncer.start(self.primary.name)
        app = self.network["app"]
        app.run([_COMMAND, "migrate", "--standalone", "--database", DIRECT])
        for statement in (_LEADS, *NOTING):
            self.primary.query(statement)
        self.say(f"{self.primary.name} is the primary, {self.standby.name} its synchronous standby.")
        (self.place / "clients").mkdir()
        (self.place / "workers").mkdir()
        for n in range(CLIENTS):
            url = BOUNCED if n // 2 % 2 else DIRECT
            leads = (str(n * EACH), str((n + 1) * EACH), str(CLIENTS * EACH))
            record = self.place / "clients" / f"client-{n}-1.record"
            environment = {"CLOSE_ENGINE_DATABASE": url}
            self.fleet.start(Member(f"client-{n}-1", app, environment, "tests.cluster.client", leads, DONE, record))
        for name, host, environment in (
            ("worker-0-1", "worker1", {"CLOSE_ENGINE_DATABASE": DIRECT}),
            ("worker-1-1", "worker1", {"CLOSE_ENGINE_DATABASE": POOLED}),
            ("worker-2-1", "worker2", {"CLOSE_ENGINE_DATABASE": BOUNCED}),
            ("worker-3-1", "worker2", {"CLOSE_ENGINE_DATABASE": BOUNCED, "CLOSE_ENGINE_LISTEN": DIRECT}),
        ):
            record, topic = self.place / "workers" / f"{name}.record", (_topic(name),)
            member = Member(name, self.network[host], environment, "tests.cluster.worker", topic, AT_WORK, record)
            self.fleet.start(member)
        until(lambda: self.primary.query(_ANY), "a client has opened a conversation")
        self._ping()
        self._wait_for_all()
        self.say(f"{CLIENTS} clients and 4 workers are at work: half of them through PgBouncer, half without.")

    # -- what befalls it

    def kill_the_primary(self) -> None:
        """The primary's host loses power."""
        began = time.monotonic()
        self.primary.kill()
        gone = time.monotonic()
        self.say(f"All processes of the primary, {self.primary.name}, are killed.")
        old = self._promote()
        self._measure("the primary is killed", began, gone)
        old.rewind(self.primary)
        self._is_back("rewound, it is the standby")

    def cut_the_primary(self) -> None:
        """The primary's cable is out. It goes on, and does not know."""
        began = time.monotonic()
        self.primary.host.cut()
        self.say(f"The cable of the primary, {self.primary.name}, is out; the server itself goes on.")
        gone = time.monotonic()
        self._strand()
        old = self._promote()
        self._measure("the primary's network is cut", began, gone)
        old.kill()
        old.host.heal()
        old.rewind(self.primary)
        self._is_back("killed before its cable was in again, then rewound, it is the standby")

    def switch_over(self) -> None:
        """Somebody wants the primary to be the other one, for example to install something."""
        began = time.monotonic()
        self.primary.stop()
        gone = time.monotonic()
        self.say(f"A planned switchover: {self.primary.name} is shut down.")
        self.primary, self.standby = self.standby, self.primary
        self.primary.promote()
        self.promotions += 1
        # For a moment, PgBouncer still goes to the old one, which is up and read-only.
        self.standby.follow(self.primary)
        time.sleep(2)
        self.bouncer.point_to(self.primary.name)
        self.say(f"{self.primary.name} is the primary; PgBouncer hears of it two seconds later.")
        self._measure("a planned switchover", began, gone)
        self._is_back("it is the standby")

    def crash(self) -> None:
        """The primary dies and starts again, before anybody promotes the other one."""
        began = time.monotonic()
        self.primary.kill()
        gone = time.monotonic()
        self.crashes += 1
        self.primary.start()
        self.say(
            f"All processes of the primary, {self.primary.name}, are killed; it starts again, and nobody is promoted."
        )
        self._measure("the primary crashes and starts again", began, gone)
        self.primary.wait_for(self.standby)

    def cut_the_standby(self) -> None:
        """The standby's cable is out: nobody's commit is acknowledged meanwhile."""
        began = time.monotonic()
        self.standby.host.cut()
        gone = time.monotonic()
        self.say(f"The cable of the standby, {self.standby.name}, is out for five seconds: all commits wait.")
        time.sleep(5)
        self.standby.host.heal()
        # What was under way when the cable came out may still be acknowledged.
        self._measure("the standby's network is cut for 5 s", began, gone + 4)
        self.primary.wait_for(self.standby)

    def kill_clients(self) -> None:
        victims = self.chance.sample(self.fleet.of(DONE), 2)
        for victim in victims:
            self._replace(victim)
        self.say(f"{' and '.join(victim.name for victim in victims)} are killed; others take their places.")

    def kill_a_worker(self) -> None:
        victim = self.chance.choice(self.fleet.of(AT_WORK))
        self._replace(victim)
        self.say(f"{victim.name} on {victim.host.name} is killed; another one takes its place.")

    def _replace(self, victim: Member) -> None:
        name, _, generation = victim.name.rpartition("-")
        self.fleet.replace(victim, f"{name}-{int(generation) + 1}")

    def _promote(self) -> Node:
        """Make the standby the primary, and return the old one."""
        old = self.primary
        self.primary, self.standby = self.standby, old
        self.primary.promote()
        self.bouncer.point_to(self.primary.name)
        self.promotions += 1
        self.say(f"{self.primary.name} is promoted, and PgBouncer hears of it.")
        return old

    def _strand(self) -> None:
        """On the primary that is cut off, somebody changes a stage and gives up waiting for the standby.

        It is committed there, and nowhere else: PostgreSQL warns of it, and nobody may rely on it.
        """
        with closing(self.primary.session()) as session, session.cursor() as cursor:
            change = threading.Thread(target=cursor.execute, args=(_STRANDED,))
            change.start()
            asked = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'SyncRep'"
            until(lambda: self.primary.query(asked, (session.info.backend_pid,)), "a commit waits for the standby")
            change.join()
            warning = " ".join(session.notices[-1].partition("\n")[0].split())
        self.say(f"There, somebody gives up waiting for a commit, and is told: {warning}.")

    def _is_back(self, how: str) -> None:
        self.primary.wait_for(self.standby)
        self.say(f"{self.standby.name} is back: {how}, and in sync.")

    def _measure(self, what: str, began: float, gone: float) -> None:
        """Wait until all are at work again."""
        self.fleet.watch_from(gone)
        self._ping()
        self._wait_for_all()
        times = [at - began for member in self.fleet.members for at in member.seen.values()]
        changes = [member.seen["changed"] - began for member in self.fleet.of(DONE)]
        first, last = min(changes), max(times)
        self.outages.append(Outage(what, first, last))
        self.say(f"All are at work again: the first change came {first:.1f} s later, the last of all {last:.1f} s.")

    def _ping(self) -> None:
        """Put something into the outbox for each worker that no other one may send."""
        self.pings += 1
        for member in self.fleet.of(AT_WORK):
            topic = _topic(member.name)
            self.primary.query(_PING, {"topic": topic, "key": f"{topic}-{self.pings}"})

    def _wait_for_all(self) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            self.fleet.look()
            idle = self.fleet.idle()
            if not idle:
                return
            if time.monotonic() > end:
                raise RuntimeError(f"After {PATIENCE} s these are not at work again: {', '.join(idle)}.")
            time.sleep(0.1)

    # -- all of it

    def perform(self, changes: int) -> None:
        acts = self._acts(changes)
        share = changes // (len(acts) + 1)
        for number, act in enumerate(acts, start=1):
            self._wait_for_changes(max(share * number, self.fleet.count("changed") + share // 2))
            self.kill_clients()
            act()
        self._wait_for_changes(max(changes, self.fleet.count("changed") + share // 2))

    def _acts(self, changes: int) -> list[Callable[[], None]]:
        once = [
            self.kill_the_primary,
            self.kill_a_worker,
            self.cut_the_primary,
            self.crash,
            self.cut_the_standby,
            self.switch_over,
        ]
        return once * (3 if changes >= 500_000 else 1)

    def _wait_for_changes(self, changes: int) -> None:
        said = time.monotonic()
        while self.fleet.count("changed") < changes:
            self.fleet.look()
            if time.monotonic() > said + 30:
                said = time.monotonic()
                self.say(f"{self.fleet.count('changed'):,} stage changes acknowledged.")
            time.sleep(0.1)

    # -- afterwards

    def finish(self) -> Audit:
        self.fleet.stop(DONE)
        self.say(f"The clients are stopped: {self.fleet.count('changed'):,} stage changes acknowledged.")
        waiting = "SELECT count(*) FROM close_engine.outbox WHERE status = 'PENDING'"
        until(lambda: self.primary.query(waiting) == [(0,)], "the workers have sent all that waits")
        self.fleet.look()
        workers = {member.name for member in self.fleet.of(AT_WORK)}
        until(lambda: workers <= {name for (name,) in self.primary.query(_RUNNING)}, "all workers say that they run")
        self.fleet.stop(AT_WORK)
        self.say("The workers have sent all that waited and say that they run. They are stopped.")
        found = audit(self.primary, self.place / "clients", self.place / "workers")
        found.require_none(
            self.primary.query(_FOREIGN), "changes were made where nobody may rely on them, and are there"
        )
        self._verify(found)
        return found

    def _verify(self, found: Audit) -> None:
        try:
            self.network["app"].run([_COMMAND, "verify", "--database", DIRECT], timeout=600)
        except RuntimeError as error:
            found.wrong.append(str(error))
        else:
            self.say("`close-engine verify` finds nothing.")

    def report(self, found: Audit) -> None:
        figures = {
            "promotions": self.promotions,
            "crashes without one": self.crashes,
            "clients killed": self.fleet.killed["tests.cluster.client"],
            "workers killed": self.fleet.killed["tests.cluster.worker"],
            **found.figures,
        }
        print()
        for what, figure in figures.items():
            print(f"  {figure:>12,}  {what}")
        print("\n  first change again   all at work again")
        for outage in self.outages:
            print(f"  {outage.first:>16.1f} s {outage.last:>18.1f} s   {outage.what}")


def run(changes: int) -> int:
    """Play it all, and return the exit status."""
    require(PACKAGES, "make cluster")
    _remove_leftovers()
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
    shutil.chown(place, "postgres")
    keep = True
    try:
        with Network("db1", "db2", "app", "worker1", "worker2") as network:
            primary, standby = (Node(network[name], place) for name in ("db1", "db2"))
            play = Play(network, place, primary, standby, Bouncer(network["app"], place))
            try:
                play.set_up()
                play.perform(changes)
                found = play.finish()
            except RuntimeError as error:
                found = Audit(wrong=[str(error)])
            play.report(found)
        keep = bool(found.wrong)
    except (KeyboardInterrupt, SystemExit):
        keep = False
        raise
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)
    minutes = (time.monotonic() - began) / 60
    if found.wrong:
        print(f"\nAfter {minutes:.1f} minutes, this is wrong; what all of them said is in {place} until the next run:")
        print("\n".join(f"  {sentence}" for sentence in found.wrong))
        return 1
    print(
        f"\nIn {minutes:.1f} minutes, {found.figures['stage changes acknowledged']:,} stage changes were acknowledged "
        f"over {play.promotions} promotions: 0 lost, 0 doubled, and the history replays to every stage."
    )
    return 0


def _topic(name: str) -> str:
    """The topic of a worker, and of whoever takes its place."""
    return f"ping {name.rpartition('-')[0]}"


#: Of the directory of a run; the id of its process follows.
_PREFIX = "close-engine-cluster-"


def _remove_leftovers() -> None:
    """Remove what runs have left that were killed, or went wrong."""
    for place in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if not Path("/proc", place.name.removeprefix(_PREFIX).partition("-")[0]).exists():
            shutil.rmtree(place, ignore_errors=True)
