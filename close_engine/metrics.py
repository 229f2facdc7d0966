"""Metrics for Prometheus: what the database says at each scrape, and what this process has counted.

    from close_engine import metrics

    with metrics.serving(9100):
        worker.run()

It needs the extra `close-engine[metrics]`. What is in the database (conversations, messages, decisions, workers) is the
same in every process: take it from one of them. What a process has counted (sends, conflicts) is its own. If the
database is away, `close_engine_database_up` is 0, what is in it is left out, and nobody else is disturbed.

>>> from prometheus_client import CollectorRegistry
>>> from close_engine import connect, migrate
>>> database = connect("sqlite:///:memory:")
>>> applied = migrate(standalone=True)
>>> registry = CollectorRegistry()
>>> collector = register(registry)
>>> registry.get_sample_value("close_engine_conversations", {"stage": "BUILDING"})
0
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import peewee
from playhouse.pool import MaxConnectionsExceeded

from close_engine import tally
from close_engine.approvals import PendingAction, pending_actions
from close_engine.board import outbox_line, stage_lines, worker_lines
from close_engine.conversations import Takeover
from close_engine.database.binding import current, moment
from close_engine.errors import CloseEngineError, ConfigurationError, first_line
from close_engine.models import StageChange
from close_engine.printable import get_logger
from close_engine.stages import PaymentIssue

try:
    from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as missing:
    raise ConfigurationError(
        "The metrics need the package prometheus_client: pip install 'close-engine[metrics]'."
    ) from missing

__all__ = ["MetricsCollector", "register", "serving"]

logger = get_logger(__name__)

#: What each metric says, and its labels.
_GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "conversations": ("Conversations, by stage.", ("stage",)),
    "median_time_in_stage_seconds": (
        "How long conversations have been in their stage: the median. Of a stage with more than a thousand, it comes "
        "from a sample.",
        ("stage",),
    ),
    "longest_time_in_stage_seconds": (
        "How long one of them has been in its stage. Of a stage with more than a thousand, it comes from a sample.",
        ("stage",),
    ),
    "conversations_waiting": (
        "Conversations that wait: for us (the lead wrote last), for the lead, for a human (a draft waits for approval, "
        "or a human has taken over). One that waits for a human also waits for us or for the lead.",
        ("whom",),
    ),
    "longest_wait_seconds": ("How long one of them has waited for us or for the lead.", ("whom",)),
    "messages": (
        "Messages in the outbox that are still to be sent (PENDING) or were given up (DEAD), by topic.",
        ("topic", "status"),
    ),
    "messages_in_flight": ("Messages that a worker holds now.", ()),
    "messages_hanging": ("Messages that have been in flight for five minutes: their sender may never return.", ()),
    "outbox_lag_seconds": ("How long the oldest message that can be sent now has been due; 0 if there is none.", ()),
    "actions": ("Pending actions, by type and stored status.", ("type", "status")),
    "payments_to_look_at": (
        "Payments that somebody should look at: surplus, partial, refunded, unmatched or test.",
        ("issue",),
    ),
    "workers": ("Workers that run, or are lost: not seen for a minute.", ("state",)),
}
_UP = ("database_up", "Whether the database could be read: 1 or 0.")
_COUNTERS: dict[str, tuple[str, tuple[str, ...], tally.Counts]] = {
    "message_reports": (
        "What became of messages that workers of this process claimed.",
        ("topic", "event"),
        tally.REPORTS,
    ),
    "conflicts": ("Writes of this process that found the conversation changed.", ("operation",), tally.CONFLICTS),
}
_HISTOGRAMS: dict[str, tuple[str, tally.Histogram]] = {
    "send_duration_seconds": (
        "How long the sender took, in this process, whether it failed or not.",
        tally.SEND_SECONDS,
    ),
    "send_attempts": ("Attempts until a message was sent, in this process.", tally.ATTEMPTS),
}

#: The values of a metric by its labels.
Values = dict[tuple[str, ...], float]


class MetricsCollector(Collector):
    """Reads the database whenever Prometheus asks, and what this process has counted."""

    def __init__(self) -> None:
        self._was_up = True

    def describe(self) -> Iterator[Metric]:
        """Name the metrics, without reading anything."""
        yield _gauge(_UP[0], _UP[1], ())
        for name, (text, labels) in _GAUGES.items():
            yield _gauge(name, text, labels)
        yield from self._counted(is_read=False)

    def collect(self) -> Iterator[Metric]:
        """Read the database, and what this process has counted. A database that is away is no error."""
        found = self._read_database()
        up = _gauge(_UP[0], _UP[1], ())
        up.add_metric((), float(found is not None))
        yield up
        for name, values in (found or {}).items():
            text, labels = _GAUGES[name]
            family = _gauge(name, text, labels)
            for kind, value in values.items():
                family.add_metric(kind, value)
            yield family
        yield from self._counted()

    def _read_database(self) -> dict[str, Values] | None:
        """Return the values of every gauge by its labels; None if the database is away, which is logged once."""
        database, opened = current().database, False
        try:
            opened = database.connect(reuse_if_open=True)
            found = _read()
        except (peewee.PeeweeException, MaxConnectionsExceeded, CloseEngineError) as error:
            if self._was_up:
                logger.warning("database not read for metrics: %s", first_line(error))
            found = None
        finally:
            # A server has a new thread for each scrape, and the next one a connection of its own.
            if opened:
                with suppress(Exception):
                    database.close()
        self._was_up = found is not None
        return found

    def _counted(self, is_read: bool = True) -> Iterator[Metric]:
        for name, (text, labels, counts) in _COUNTERS.items():
            counter = CounterMetricFamily(f"close_engine_{name}", text, labels=labels)
            for kind, count in counts.read().items() if is_read else ():
                counter.add_metric(kind, count)
            yield counter
        for name, (text, observed) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"close_engine_{name}", text, labels=("topic",))
            bounds = [*map(str, map(float, observed.bounds)), "+Inf"]
            for topic, (within, total) in observed.read().items() if is_read else ():
                histogram.add_metric((topic,), list(zip(bounds, within, strict=True)), total)
            yield histogram


def _gauge(name: str, text: str, labels: tuple[str, ...]) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"close_engine_{name}", text, labels=labels)


def register(registry: CollectorRegistry = REGISTRY) -> MetricsCollector:
    """Add the metrics of this library to a registry of Prometheus. Nothing is read before the first scrape.

    Args:
        registry: the registry; the default is that of the process.

    Returns:
        the collector, for `registry.unregister()`.

    Raises:
        ValueError: they are in this registry already.
    """
    collector = MetricsCollector()
    registry.register(collector)
    return collector


@contextmanager
def serving(port: int, host: str = "127.0.0.1", registry: CollectorRegistry = REGISTRY) -> Iterator[int]:
    """Add the metrics to a registry and serve it over HTTP, as long as the block runs.

    Args:
        port: the port; 0 for any that is free.
        host: the address; `0.0.0.0` lets other machines ask, too.
        registry: as for `register`.

    Yields:
        the port.

    Raises:
        OSError: the port is taken, or the address is not this machine's.
        ValueError: as for `register`.
    """
    server, thread = start_http_server(port, host, registry)
    try:
        collector = register(registry)
        try:
            yield server.server_port
        finally:
            registry.unregister(collector)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# -- the queries


def _read() -> dict[str, Values]:
    found: dict[str, Values] = {}
    for read in (_stages, _waiting, _messages, _actions, _payments, _workers):
        found |= read()
    return found


def _stages() -> dict[str, Values]:
    # What the board shows, at its cost: counted by an index, and a limited number of conversations looked up.
    lines, _ = stage_lines(moment())
    medians: Values = {}
    longest: Values = {}
    for line in lines:
        if line.median is not None and line.longest is not None:
            medians[(line.stage.value,)] = _seconds(line.median)
            longest[(line.stage.value,)] = _seconds(line.longest)
    return {
        "conversations": {(line.stage.value,): line.count for line in lines},
        "median_time_in_stage_seconds": medians,
        "longest_time_in_stage_seconds": longest,
    }


def _waiting() -> dict[str, Values]:
    # Reads the deadlines of all conversations that are not closed.
    builtin = current().dialect.builtin
    readable = f"NOT {current().dialect.unreadable_time('at')}"
    rows = current().execute(
        f'SELECT "trigger", {builtin}count(*), {builtin}min(at) FILTER (WHERE {readable}), {{moment}} '
        "FROM {deadlines} WHERE \"trigger\" IN ('stall', 'answer') GROUP BY \"trigger\""
    )
    waits_for, read = {"answer": "us", "stall": "lead"}, StageChange.created_at.python_value
    counts: Values = {("us",): 0, ("lead",): 0}
    longest: Values = {}
    for trigger, count, first, at in rows.fetchall():
        counts[(waits_for[trigger],)] = count
        if first is not None:
            longest[(waits_for[trigger],)] = _seconds(read(at) - read(first))
    drafts = pending_actions().select(PendingAction.conversation_id).order_by()
    both: Any = drafts | Takeover.lasting().select(Takeover.conversation_id)
    human = peewee.Select([both.alias("waiting")], [current().dialect.function("count", peewee.SQL("*"))])
    counts[("human",)] = human.bind(current().database).scalar()
    return {"conversations_waiting": counts, "longest_wait_seconds": longest}


def _messages() -> dict[str, Values]:
    # By the partial indexes of what waits and what is dead. What was sent is not read: a worker counts it.
    count = f"{current().dialect.builtin}count(*)"
    by_topic = " UNION ALL ".join(
        f"SELECT topic, '{status}', {count} FROM {{outbox}} WHERE status = '{status}' GROUP BY topic"
        for status in ("PENDING", "DEAD")
    )
    counts: Values = {(topic, status): found for topic, status, found in current().execute(by_topic).fetchall()}
    line = outbox_line()
    return {
        "messages": counts,
        "messages_in_flight": {(): line.in_flight},
        "messages_hanging": {(): line.hanging},
        "outbox_lag_seconds": {(): 0.0 if line.lag is None else _seconds(line.lag)},
    }


def _actions() -> dict[str, Values]:
    # Reads the whole table: of the CRM's indexes, none has both. There are far fewer actions than messages.
    count = f"{current().dialect.builtin}count(*)"
    rows = current().execute(f"SELECT type, status, {count} FROM pending_actions GROUP BY type, status")
    return {"actions": {(kind, status): found for kind, status, found in rows.fetchall()}}


def _payments() -> dict[str, Values]:
    # By the partial index of what nobody has resolved. A zero lets an alarm see that there was nothing before.
    count = f"{current().dialect.builtin}count(*)"
    rows = current().execute(
        f"SELECT issue, {count} FROM {{inbox}} WHERE issue IS NOT NULL AND resolved_at IS NULL GROUP BY issue"
    )
    none: Values = {(issue.value,): 0 for issue in PaymentIssue}
    return {"payments_to_look_at": none | {(issue,): found for issue, found in rows.fetchall()}}


def _workers() -> dict[str, Values]:
    lines = worker_lines()
    lost = sum(line.lost for line in lines)
    return {"workers": {("running",): len(lines) - lost, ("lost",): lost}}


def _seconds(time: timedelta) -> float:
    return max(0.0, time.total_seconds())
