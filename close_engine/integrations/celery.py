"""Send and sweep with Celery, on as many machines as it runs on.

    app = Celery("agency", broker="amqp://…")
    close_engine.connect()
    tasks = add_tasks(app, send, concurrency=4)

The app gets the tasks `close_engine.deliver` and `close_engine.sweep`, both on its beat. On PostgreSQL, its workers
also deliver as soon as a message is committed, whoever wrote it: the main process of each listens.

A task carries nothing: it says when to look, and the outbox knows what to send. So one too many does no harm, and the
next beat makes up for one that is lost. Celery neither retries them nor keeps their results.

It needs the extra `close-engine[celery]`. docs/celery.md is the whole page.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

from celery import Celery, Task, bootsteps
from celery.worker import state

from close_engine import sweeps
from close_engine.database.binding import current, is_transient
from close_engine.database.notices import Listener
from close_engine.errors import ConfigurationError, InvalidValue, first_line
from close_engine.policies import DailyCap, QuietHours
from close_engine.printable import get_logger
from close_engine.worker import FindingSender, Sender, Worker

__all__ = ["Tasks", "add_tasks"]

logger = get_logger(__name__)

_DELIVER, _SWEEP = "close_engine.deliver", "close_engine.sweep"

#: Seconds after which a delivery claims no more and asks for another one: a shutdown waits for it.
_LONGEST_DELIVERY = 10.0

#: Seconds after which a task that nobody has begun is dropped: enough for clocks that differ.
_EXPIRES = 60.0

#: Seconds from one task to the next: what PostgreSQL tells meanwhile is told as one.
_BETWEEN_TASKS = 0.2

#: Seconds to wait for a database that is away, before it is tried again.
_BETWEEN_ATTEMPTS = 1.0

#: Seconds for each step with the broker, as the transports for RabbitMQ and for Redis call them.
_TIMEOUTS = dict.fromkeys(("read_timeout", "write_timeout", "socket_timeout", "socket_connect_timeout"), 5.0)


class Tasks(NamedTuple):
    """The tasks of an app.

    Attributes:
        deliver: celery.Task, sends what can be sent now, and returns how many messages it claimed.
        sweep: celery.Task, sweeps once.
    """

    deliver: Task
    sweep: Task


def add_tasks(
    app: Celery,
    send: Sender | FindingSender,
    *,
    concurrency: int = 4,
    topics: Sequence[str] | None = None,
    lease: timedelta = timedelta(minutes=1),
    deliver_every: timedelta = timedelta(seconds=10),
    sweep: Callable[[], sweeps.Swept] = sweeps.sweep,
    sweep_every: timedelta = timedelta(minutes=1),
    quiet_hours: QuietHours | None = None,
    daily_cap: DailyCap | None = None,
) -> Tasks:
    """Give a Celery app the tasks that send and sweep, and put them on its beat. Its workers listen for new messages.

    Args:
        app: celery.Celery. Its `task_routes` say which queue the tasks take.
        send: the sender, as for a `Worker`.
        concurrency: int, how many messages a task sends at once, in threads.
        topics, lease, quiet_hours, daily_cap: as for a `Worker`.
        deliver_every: timedelta, how often the beat asks for a delivery. What becomes due by time may be so late.
        sweep: the function that sweeps.
        sweep_every: timedelta, how often the beat asks for a sweep.

    Returns:
        Tasks.

    Raises:
        ConfigurationError: the sender cannot be called, or is a coroutine function; or the app has these tasks.
        InvalidValue: what a `Worker` refuses, or `deliver_every` is not greater than zero.
    """

    def worker() -> Worker:
        return Worker(
            send,
            concurrency=concurrency,
            topics=topics,
            lease=lease,
            sweep=sweep,
            sweep_every=sweep_every,
            quiet_hours=quiet_hours,
            daily_cap=daily_cap,
        )

    def deliver(task: Task) -> int:
        with _unless_the_database_is_away(task):
            return _deliver(task, worker())
        return 0

    def sweep_once(task: Task) -> None:
        with _unless_the_database_is_away(task):
            _sweep(task, worker())

    def put_on_beat(sender: Celery, **signal: Any) -> None:
        sender.add_periodic_task(deliver_every, tasks.deliver.s(), name=_DELIVER)
        sender.add_periodic_task(sweep_every, tasks.sweep.s(), name=_SWEEP)

    worker()  # refuses what is wrong
    if deliver_every <= timedelta(0):
        raise InvalidValue("deliver_every", str(deliver_every), "it must be greater than zero")
    if _Ears in app.steps["worker"]:
        raise ConfigurationError(f"The app {app.main!r} has these tasks already: call add_tasks() once.")
    # Neither does another app get them, nor does Celery put one back into its queue: that is the outbox's work.
    options = {"bind": True, "shared": False, "ignore_result": True, "acks_late": False, "expires": _EXPIRES}
    tasks = Tasks(app.task(name=_DELIVER, **options)(deliver), app.task(name=_SWEEP, **options)(sweep_once))
    app.steps["worker"].add(_Ears)
    if app.finalized:
        put_on_beat(app)
    else:  # so late that an assignment to beat_schedule does not undo it
        app.on_after_finalize.connect(put_on_beat, weak=False)
    return tasks


def _deliver(task: Task, worker: Worker) -> int:
    worker.sweep = None
    timer = threading.Timer(_LONGEST_DELIVERY, worker.stop)
    timer.daemon = True
    timer.start()
    try:
        claimed = worker.run_until_empty()
        if worker.stopping:
            _ask_for(task)
        return claimed
    finally:
        timer.cancel()
        worker.stop()  # a soft time limit ends this thread, but not the senders


def _sweep(task: Task, worker: Worker) -> None:
    with nullcontext() if _is_the_callers(task) else current().database.connection_context():
        worker.sweep_if_due()


def _is_the_callers(task: Task) -> bool:
    """Whether it runs where it was called, and not in a worker: then the connection is the caller's."""
    return bool(task.request.called_directly or task.request.is_eager)


@contextmanager
def _unless_the_database_is_away(task: Task) -> Iterator[None]:
    """Log one line, as a worker of the library's own does. The next task tries again."""
    try:
        yield
    except Exception as error:
        if _is_the_callers(task) or not is_transient(error):
            raise
        logger.warning("database unreachable task=%s: %s", task.name, first_line(error))


def _ask_for(task: Task) -> None:
    """Put a task into the queue. A broker that is away is not waited for: the next beat makes up for it."""
    timeouts = {**_TIMEOUTS, **task.app.conf.broker_transport_options}
    try:
        with task.app.connection_for_write(transport_options=timeouts) as connection:
            connection.ensure_connection(max_retries=1, interval_start=0)
            task.apply_async(connection=connection, retry=False)
    except Exception as error:
        logger.warning("unasked task=%s: the next beat asks for it: %s", task.name, first_line(error))


class _Ears(bootsteps.StartStopStep):  # type: ignore[misc]
    """Listens in a worker's main process, after that has forked its pool, and asks for deliveries."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._task = parent.app.tasks[_DELIVER]
        self._over = threading.Event()
        self._listener: Listener | None = None
        self._wakes: str | None = None

    def include_if(self, parent: Any) -> bool:
        """Only a worker that takes the task from its queue asks for it."""
        amqp, default = parent.app.amqp, parent.app.conf.task_default_queue
        route = amqp.router.lookup_route(_DELIVER, (), {}, {}) or {}
        queue = getattr(self._task, "queue", None) or route.get("queue", default)
        return getattr(queue, "name", queue) in amqp.queues.consume_from

    def start(self, parent: Any) -> None:
        try:
            self._listener = Listener(self._ask, self._note, _BETWEEN_ATTEMPTS)
        except ConfigurationError as error:
            self._note(str(error))
        else:
            # A daemon: it may be held up by a network that was cut, and then nobody waits for it.
            threading.Thread(target=self._listener.run, name="close_engine listener", daemon=True).start()

    def stop(self, parent: Any) -> None:
        self._over.set()
        if self._listener is not None:
            self._listener.stop()

    terminate = stop

    def _ask(self) -> None:
        """Ask for a delivery, unless one waits here. After that one has begun, another may still be needed."""
        end = time.monotonic() + _EXPIRES
        while _one_waits() and time.monotonic() < end and not self._over.is_set():
            self._over.wait(_BETWEEN_TASKS)
        if not self._over.is_set():
            _ask_for(self._task)
            self._over.wait(_BETWEEN_TASKS)

    def _note(self, why_not: str | None) -> None:
        """Log what wakes the deliveries, if that is news."""
        before, self._wakes = self._wakes, "notices" if why_not is None else "beat"
        if self._wakes != before and why_not is None:
            logger.info("listening task=%s wakes=notices", _DELIVER)
        elif self._wakes != before:
            logger.warning("listening task=%s wakes=beat why=%r", _DELIVER, why_not)


def _one_waits() -> bool:
    """Whether this worker has got a delivery from the broker, and has not begun it."""
    # Another thread changes it, so all are taken at one go. Celery leaves those in it that went with a connection.
    known = list(state.requests.values())
    waiting = (one for one in known if one in state.reserved_requests and one not in state.active_requests)
    return any(one.name == _DELIVER for one in waiting)
