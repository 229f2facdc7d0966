"""Metrics for Prometheus: real scrapes over HTTP, read by Prometheus' own parser."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import peewee
import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CannotBeSent,
    CloseEngineConversation,
    EntryPoint,
    MessageStatus,
    OutboxMessage,
    Snooze,
    Stage,
    StageConflict,
    Worker,
    heartbeats,
    metrics,
    outbox,
    receive,
    submit,
)
from close_engine.database.binding import current
from close_engine.testing import MovableClock
from tests.command_line import COMMAND, background, refused
from tests.foreign import ForeignWriter
from tests.prose import section
from tests.test_plans import calm, explained  # noqa: F401
from tests.test_worker import Door
from tests.waiting import LIMIT, Running, until
from tests.workers import LINK, sql

ConversationIn = Callable[..., CloseEngineConversation]

ROOT = Path(__file__).parent.parent
MINUTE = timedelta(minutes=1)

in_other_threads = pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])


def families(text: str) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text) if "close_engine" in family.name}


class Page:
    """The values of a page: `page("messages", topic="build_site", status="PENDING")`."""

    def __init__(self, text: str) -> None:
        self.values = {
            (sample.name.removeprefix("close_engine_"), frozenset(sample.labels.items())): sample.value
            for family in families(text).values()
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.values[name, frozenset(labels.items())]

    def get(self, name: str, **labels: str) -> float:
        """The value, or 0 if it is not there."""
        return self.values.get((name, frozenset(labels.items())), 0)

    def of(self, name: str) -> list[tuple[dict[str, str], float]]:
        """The labels and the values of one name."""
        return [(dict(labels), value) for (found, labels), value in self.values.items() if found == name]


@pytest.fixture
def scrape(database: peewee.Database) -> Callable[[], Page]:
    """Read the metrics in this thread, which is the only one that sees a database in memory."""
    registry = CollectorRegistry()
    metrics.register(registry)
    return lambda: Page(generate_latest(registry).decode())


def page_of(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=LIMIT) as response:
        assert response.status == 200
        text: str = response.read().decode()
    return text


@pytest.fixture
def served() -> Iterator[Callable[[], str]]:
    """Serve the metrics over HTTP, and return a function that asks for them."""
    with metrics.serving(0, registry=CollectorRegistry()) as port:
        yield lambda: page_of(port)


def worker_with(send: Any, **options: Any) -> Worker:
    return Worker(send, **{"name": "worker-7", "concurrency": 1, "sweep": None, **options})


# -- what is in the database


@in_other_threads
def test_prometheus_reads_over_http_what_is_in_the_database(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, served: Callable[[], str]
) -> None:
    for _ in range(3):
        conversation_in(Stage.BUILDING)
        close_engine_clock.move(MINUTE)
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "build_site")

    first = Page(served())
    assert first("database_up") == 1
    assert first("conversations", stage="BUILDING") == 3
    assert first("conversations", stage="STALLED") == 0
    assert round(first("median_time_in_stage_seconds", stage="BUILDING")) == 120
    assert round(first("longest_time_in_stage_seconds", stage="BUILDING")) == 180
    assert first("messages", topic="build_site", status="PENDING") == 1

    conversation_in(Stage.BUILDING)
    assert Page(served())("conversations", stage="BUILDING") == 4, "each scrape reads the database"


@in_other_threads
def test_the_names_are_as_prometheus_wants_them(conversation_in: ConversationIn, served: Callable[[], str]) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "build_site")
    worker_with(lambda message: None).run_until_empty()

    found = families(served())

    assert {f"close_engine_{name}" for name in (*metrics._GAUGES, *metrics._COUNTERS, *metrics._HISTOGRAMS)} < set(
        found
    )
    for name, family in found.items():
        assert re.fullmatch("close_engine_[a-z_]+", name)
        assert family.documentation.endswith(".")
        assert family.type in ("gauge", "counter", "histogram")
        labels = {label for sample in family.samples for label in sample.labels}
        assert "quantile" not in labels, "it is a summary's"
        assert ("le" in labels) is (family.type == "histogram")
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{name}_total"}
    buckets = [
        one for one in found["close_engine_send_duration_seconds"].samples if one.labels.get("topic") == "build_site"
    ]
    within = [one.value for one in buckets if one.name.endswith("_bucket")]
    (count,) = (one.value for one in buckets if one.name.endswith("_count"))
    assert within == sorted(within)
    assert within[-1] == count > 0


def test_it_is_known_for_whom_conversations_wait(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, scrape: Callable[[], Page]
) -> None:
    def waiting(whom: str) -> float:
        return scrape()("conversations_waiting", whom=whom)

    assert [waiting("us"), waiting("lead"), waiting("human")] == [0, 0, 0]

    ours, theirs, asked, taken, expired = (conversation_in(Stage.PREVIEW_SENT) for _ in range(5))
    close_engine_clock.move(5 * MINUTE)
    receive(ours.lead_id, "SM1", "Hello?")
    for conversation, expiry in ((asked, 60 * MINUTE), (asked, 60 * MINUTE), (expired, MINUTE)):
        conversation.reload()
        submit(
            conversation,
            ActionType.SEND_MESSAGE,
            "Hello!",
            policy=lambda level, type: True,
            expires_after=expiry,
        )
    taken.take_over(by="dana")
    asked.reload()
    asked.take_over(by="dana")
    close_engine_clock.move(2 * MINUTE)

    assert [waiting("us"), waiting("lead"), waiting("human")] == [1, 4, 2]
    assert round(scrape()("longest_wait_seconds", whom="us")) == 120
    assert round(scrape()("longest_wait_seconds", whom="lead")) == 420
    assert theirs.stage is Stage.PREVIEW_SENT


def test_messages_are_counted_by_topic_and_status_with_the_lag(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, scrape: Callable[[], Page]
) -> None:
    assert scrape()("outbox_lag_seconds") == 0

    first, second = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    for topic in ("SEND_MESSAGE", "SEND_MESSAGE", "build_site"):
        outbox.enqueue(first, topic, "Hello!")
    outbox.enqueue(second, "SEND_MESSAGE", "dead")
    next(one for one in outbox.claim(9) if one.body == "dead").give_up("no such number")
    close_engine_clock.move(7 * MINUTE)

    found = scrape()
    assert found("messages", topic="SEND_MESSAGE", status="PENDING") == 2
    assert found("messages", topic="build_site", status="PENDING") == 1
    assert found("messages", topic="SEND_MESSAGE", status="DEAD") == 1
    assert found("outbox_lag_seconds") == 360, "since the leases are over"

    outbox.claim(9, lease=timedelta(hours=1))
    close_engine_clock.move(6 * MINUTE)
    found = scrape()
    assert (found("messages_in_flight"), found("messages_hanging")) == (1, 1), "a suspect is claimed alone"


def test_decisions_are_counted_by_type_and_status(conversation_in: ConversationIn, scrape: Callable[[], Page]) -> None:
    for decide in ("approve", "reject", None, None):
        conversation = conversation_in(Stage.PREVIEW_SENT, AutonomyLevel.SEMI_AUTO)
        action: Any = submit(conversation, ActionType.SEND_PAYMENT_LINK, "Pay", metadata={"paymentUrl": LINK})
        if decide is not None:
            getattr(action, decide)(by="dana")

    found = {(labels["type"], labels["status"]): value for labels, value in scrape().of("actions")}

    assert found == {
        ("SEND_PAYMENT_LINK", "APPROVED"): 1,
        ("SEND_PAYMENT_LINK", "PENDING"): 2,
        ("SEND_PAYMENT_LINK", "REJECTED"): 1,
    }


def test_workers_that_run_are_told_from_those_that_are_lost(
    database: peewee.Database, close_engine_clock: MovableClock, scrape: Callable[[], Page]
) -> None:
    heartbeats.beat("w1", 1, None, 0, timedelta(0))
    close_engine_clock.move(MINUTE)
    for name in ("w2", "w3"):
        heartbeats.beat(name, 1, None, 0, timedelta(0))

    found = scrape()
    assert (found("workers", state="running"), found("workers", state="lost")) == (2, 1)


def test_what_cannot_be_read_hides_nothing_else(
    conversation_in: ConversationIn, foreign: ForeignWriter, scrape: Callable[[], Page]
) -> None:
    good, bad = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    outbox.enqueue(good, 'odd "topic"\\\n', "Hello!")
    strange = "'-infinity'" if foreign.is_postgres else "'long ago'"
    sql(f"UPDATE {{deadlines}} SET at = {strange} WHERE subject_id = '{bad.id}'")

    found = scrape()

    assert found("database_up") == 1
    assert found("conversations_waiting", whom="lead") == 2
    assert found("longest_wait_seconds", whom="lead") < 60
    assert found("messages", topic='odd "topic"\\\n', status="PENDING") == 1


def test_the_outbox_and_the_deadlines_are_read_by_index(
    calm: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with explained(monkeypatch, "EXPLAIN") as plans:
        metrics._messages()
        metrics._workers()

    assert plans
    assert [statement for statement, plan in plans.items() if "Seq Scan on outbox" in plan] == []


# -- what this process has counted


def test_a_worker_counts_what_became_of_its_messages(
    conversation_in: ConversationIn, close_engine_clock: MovableClock, scrape: Callable[[], Page]
) -> None:
    errors: dict[str, list[Exception]] = {
        "refused": [CannotBeSent("no such number")],
        "later": [Snooze(MINUTE)],
        "twice": [ConnectionError("503")],
    }

    def send(message: OutboxMessage) -> None:
        if waiting := errors.get(str(message.body)):
            raise waiting.pop()

    for body in ("fine", *errors):
        outbox.enqueue(conversation_in(Stage.QUALIFYING), "counted", body)
    before = scrape()
    worker_with(send).run_until_empty()
    close_engine_clock.move(10 * MINUTE)
    worker_with(send).run_until_empty()

    def more(name: str, **labels: str) -> float:
        return scrape()(name, topic="counted", **labels) - before.get(name, topic="counted", **labels)

    events = {event: more("message_reports_total", event=event) for event in ("sent", "dead", "snoozed", "failed")}
    assert events == {"sent": 3, "dead": 1, "snoozed": 1, "failed": 1}
    assert more("send_duration_seconds_count") == 6
    assert more("send_attempts_count") == 3
    assert more("send_attempts_sum") == 4, "a snooze is no attempt"
    assert more("send_attempts_bucket", le="1.0") == 2


def test_conflicts_are_counted_by_what_was_refused(conversation_in: ConversationIn, scrape: Callable[[], Page]) -> None:
    def conflicts(operation: str) -> float:
        return scrape().get("conflicts_total", operation=operation)

    before = conflicts("start_building"), conflicts("save()")
    conversation = conversation_in(Stage.QUALIFYING)
    stale: Any = CloseEngineConversation.get_by_id(conversation.id)
    conversation.record(questions=["budget"])

    with pytest.raises(StageConflict):
        stale.start_building()
    stale.edit_rounds = 3
    with pytest.raises(StageConflict):
        stale.save()

    assert (conflicts("start_building"), conflicts("save()")) == (before[0] + 1, before[1] + 1)


def test_every_metric_is_documented() -> None:
    page = section(ROOT / "docs/operations.md", "Metrics")
    counters = {f"{name}_total": labels for name, (_, labels, _) in metrics._COUNTERS.items()}
    gauges = {name: labels for name, (_, labels) in metrics._GAUGES.items()}
    histograms = dict.fromkeys(metrics._HISTOGRAMS, ("topic",))

    for name, labels in {**counters, **gauges, **histograms, "database_up": ()}.items():
        (row,) = (line for line in page.splitlines() if line.startswith("|") and f"`close_engine_{name}`" in line)
        assert re.findall(r"`(\w+)`", row.split("|")[2]) == list(labels), name


# -- the database is away


def test_a_scrape_while_the_database_is_away_says_so_and_the_worker_goes_on(
    postgres: peewee.Database, server: str, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    door, registry = Door(server, postgres_url), CollectorRegistry()
    conversation = close_engine.open_conversation(close_engine.testing.new_lead(), EntryPoint.SMS_REPLY)
    worker = worker_with(lambda message: None, idle=timedelta(milliseconds=10))
    with metrics.serving(0, registry=registry) as port:
        at_work = Running(worker.run)
        assert Page(page_of(port))("database_up") == 1

        postgres.close()
        door.shut()
        for _ in range(2):
            found = Page(page_of(port))
            assert found("database_up") == 0
            assert [name for name, _ in found.values if name in metrics._GAUGES] == []
        door.open()

        found = Page(page_of(port))
        assert (found("database_up"), found("conversations", stage="INITIATED")) == (1, 1)
        message = outbox.enqueue(conversation, "build_site")
        until(lambda: OutboxMessage.get_by_id(message.id).status is MessageStatus.SENT, "the message is sent")
        worker.stop()
        assert at_work.result() is None
    warned = [one for one in caplog.records if one.name == "close_engine.metrics"]
    assert [one.levelno for one in warned] == [logging.WARNING], "once, not at each scrape"


def test_a_scrape_leaves_no_connection_behind(postgres: peewee.Database, postgres_url: str) -> None:
    with metrics.serving(0, registry=CollectorRegistry()) as port:
        for _ in range(3):
            page_of(port)
        there = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        until(lambda: postgres.execute_sql(there).fetchone() == (0,), "no other connection is open")


def test_a_scrape_keeps_the_callers_connection_and_transaction(
    conversation_in: ConversationIn, scrape: Callable[[], Page]
) -> None:
    with close_engine.atomic() as transaction:
        conversation_in(Stage.BUILDING)
        assert scrape()("conversations", stage="BUILDING") == 1
        transaction.rollback()

    assert scrape()("conversations", stage="BUILDING") == 0


def test_registering_reads_nothing_and_twice_is_an_error(nobody_listens: str) -> None:
    close_engine.connect(f"postgresql://postgres@{nobody_listens}/nowhere")
    registry = CollectorRegistry()

    collector = metrics.register(registry)

    with pytest.raises(ValueError, match="Duplicated timeseries"):
        metrics.register(registry)
    registry.unregister(collector)
    metrics.register(registry)
    current().database.close()


def test_without_the_package_the_error_says_what_to_install() -> None:
    script = """if True:
        import sys
        sys.modules["prometheus_client"] = None
        import close_engine
        try:
            import close_engine.metrics
        except close_engine.ConfigurationError as error:
            print(error)
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT)

    assert ended.stdout == ("The metrics need the package prometheus_client: pip install 'close-engine[metrics]'.\n"), (
        ended.stderr
    )


# -- the command


@in_other_threads
def test_a_worker_of_the_command_line_serves_them(conversation_in: ConversationIn, database_url: str) -> None:
    outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    command = [COMMAND, "worker", "--database", database_url, "--idle", "0.05", "--sender", "tests.senders:send"]
    with background(
        [*command, "--metrics-port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as working:
        assert working.stderr is not None
        lines = [working.stderr.readline() for _ in range(3)]
        (port,) = re.findall(r"INFO metrics at http://127\.0\.0\.1:(\d+)/metrics$", lines[0].strip())
        assert " sent worker=" in lines[2]

        text = page_of(int(port))
        found = Page(text)
        working.send_signal(signal.SIGTERM)
        _, rest = working.communicate()

    assert found("message_reports_total", topic="SEND_MESSAGE", event="sent") == 1
    assert found("send_duration_seconds_count", topic="SEND_MESSAGE") == 1
    assert "process_cpu_seconds_total" in text, "with what the process says of itself"
    assert working.returncode == 0, rest


@in_other_threads
def test_a_port_that_is_taken_is_refused(
    database: peewee.Database, database_url: str, nobody_listens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    port = nobody_listens.rpartition(":")[2]

    sentence = refused("worker", "--until-empty", "--sender", "tests.senders:send", "--metrics-port", port)

    assert "in use" in sentence
