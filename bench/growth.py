"""Does the cost stay flat from 10 thousand to 10 million rows of history, and to 3 million sent messages?

The contenders are the sizes: the same operation runs on each in turn, and the result is the ratio to the smallest. What
grows is the past: conversations that are closed, what was said in them, what was decided. What waits is the same in
each, because an agency's backlog does not grow with its past: 500 conversations that go on, 400 messages to send, 100
drafts to approve. What the second table measures grows with the conversations that go on, too.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import peewee
from starlette.testclient import TestClient

import close_engine
from bench import console
from bench.ground import ID, LEAD_ID, WITHOUT_TRIGGERS, conversation_id, fill, lead_id
from bench.report import Table, milliseconds, times
from bench.rounds import Times, interleave, median, ratio
from bench.server import Server
from close_engine import numbers
from close_engine.board import pipeline, pulse
from close_engine.metrics import MetricsCollector

#: What counts as flat: the largest to the smallest.
FLAT = 1.5

#: How many conversations go on, in these stages, and how many drafts wait, at each size.
OPEN, DRAFTS = 500, 100
GOING_ON = ["QUALIFYING"] * 3 + ["COLLECTING_INFO", "BUILDING", "PREVIEW_SENT", "EDIT_LOOP", "PAYMENT_SENT"]
STAGES = GOING_ON + ["STALLED"] * 2
#: How many of them a sweep finds.
SWEPT = 50

#: Of each conversation: three texts that were sent, one of which a provider has told of, three that were received, and
#: a draft that was approved. Of each that goes on: a message that waits.
SAID = (
    f"""
    INSERT INTO close_engine.outbox (conversation_id, topic, body, payload, status, created_at, available_at, sent_at,
        submitted_by, provider_id)
    SELECT {ID}, 'SEND_MESSAGE', repeat('All is well. ', 6), '{{{{}}}}', 'SENT', at, at, at, 'writer',
        'sent:' || n || ':' || step
    FROM (SELECT n, step, date_trunc('milliseconds', localtimestamp - ({{count}} - n) * interval '2 minutes'
            - step * interval '1 hour') AS at
        FROM generate_series(1, 3) step, generate_series(1, {{count}}) n) AS numbered
    """,
    """
    INSERT INTO close_engine.deliveries (provider_id, send_key, message_id, status, at)
    SELECT provider_id, send_key, id, 'delivered', sent_at FROM close_engine.outbox WHERE provider_id LIKE '%:1'
    """,
    f"""
    INSERT INTO close_engine.inbox (kind, key, lead_id, conversation_id, body, received_at)
    SELECT 'text', n || ':' || step, {LEAD_ID}, {ID}, repeat('All is well. ', 6),
        localtimestamp - ({{count}} - n) * interval '2 minutes' - step * interval '61 minutes'
    FROM generate_series(1, 3) step, generate_series(1, {{count}}) n
    """,
    f"""
    INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata, status, approved_by,
        approved_at, created_at)
    SELECT 'd' || n, {ID}, {LEAD_ID}, 'SEND_MESSAGE', repeat('Shall we begin? ', 5), '{{{{}}}}', 'APPROVED', 'owner',
        at, at
    FROM (SELECT n, localtimestamp - ({{count}} - n) * interval '2 minutes' AS at
        FROM generate_series(1, {{count}}) n) AS numbered
    """,
    """
    INSERT INTO close_engine.outbox (conversation_id, topic, body, status, created_at, available_at)
    SELECT id, 'SEND_MESSAGE', 'Hello!', 'PENDING', at, at FROM close_engine_conversations,
        date_trunc('milliseconds', localtimestamp - interval '1 hour') at
    WHERE stage NOT IN ('COMPLETED', 'CLOSED_LOST', 'STALLED') ORDER BY id
    """,
)
PUT_BACK = """
    WITH swept AS (UPDATE close_engine_conversations SET stage = 'QUALIFYING', stalled_at = NULL
        WHERE stage = 'STALLED' AND stalled_at > localtimestamp - interval '5 minutes' RETURNING id)
    UPDATE close_engine.deadlines d SET trigger = 'stall', at = localtimestamp FROM swept
    WHERE d.trigger = 'close_lost' AND d.subject_id = swept.id
"""
MAKE_DUE = """
    WITH due AS (SELECT subject_id FROM close_engine.deadlines
        WHERE trigger = 'stall' ORDER BY md5(subject_id || %s) LIMIT %s),
    aged AS (UPDATE close_engine.history h SET created_at = h.created_at - interval '40 days' FROM due
        WHERE h.conversation_id = due.subject_id AND h.created_at > localtimestamp - interval '4 days')
    UPDATE close_engine.deadlines d SET at = localtimestamp - interval '4 days' FROM due
    WHERE d.trigger = 'stall' AND d.subject_id = due.subject_id
"""


class Grown:
    """A database of one size, and the operations on it.

    The models must be bound before each operation, because the other sizes run in between. That is not timed.
    """

    def __init__(self, server: Server, name: str, count: int) -> None:
        self.count = count
        self.name = name
        self.random = random.Random(count)
        self.spare = map(lead_id, itertools.count(count + 1))
        self.keys = map(str, itertools.count())
        self.claimed: list[close_engine.OutboxMessage] = []
        self.of = ""
        self.database: peewee.Database = close_engine.connect(server.url(name))

    def bind(self) -> None:
        close_engine.bind(self.database)

    def choose(self) -> None:
        """Choose any conversation, of whatever age."""
        self.bind()
        self.of = conversation_id(self.random.randint(1, self.count))

    def choose_one_that_goes_on(self) -> None:
        """Choose one of the newest in which a trigger goes back and forth."""
        self.bind()
        while True:
            number = self.random.randint(max(1, self.count - OPEN + 1), self.count)
            self.of, self.lead = conversation_id(number), lead_id(number)
            conversation = close_engine.CloseEngineConversation.get_by_id(self.of)
            if conversation.may("request_edits") or conversation.may("send_preview"):
                return

    def change_stage(self) -> None:
        conversation = close_engine.CloseEngineConversation.get_by_id(self.of)
        conversation.fire("request_edits" if conversation.may("request_edits") else "send_preview")

    def claim(self) -> None:
        (message,) = close_engine.outbox.claim(1, timedelta(hours=1), "bench")
        self.claimed.append(message)

    def mark_sent(self) -> None:
        assert self.claimed.pop().sent(f"bench:{next(self.keys)}")

    def receive(self) -> None:
        assert not close_engine.receive(self.lead, f"bench:{next(self.keys)}", "All is well.").duplicate

    def read_texts(self) -> None:
        close_engine.CloseEngineConversation.get_by_id(self.of).messages()

    def submit(self) -> None:
        conversation = close_engine.CloseEngineConversation.get_by_id(self.of)
        close_engine.submit(conversation, close_engine.ActionType.SEND_MESSAGE, "Hello!")

    def open_conversation(self) -> None:
        close_engine.open_conversation(next(self.spare), close_engine.EntryPoint.SMS_REPLY)

    def record_delivery(self) -> None:
        number = int(next(self.keys)) % (2 * OPEN)
        message = f"sent:{self.count - number // 2}:{2 + number % 2}"
        assert close_engine.record_delivery("delivered", provider_id=message).message_id is not None

    def make_due(self) -> None:
        """Make conversations due, and put back those swept before."""
        self.bind()
        with self.without_triggers():
            self.database.execute_sql(PUT_BACK)
            self.database.execute_sql(MAKE_DUE, (str(self.random.random()), SWEPT))

    @contextmanager
    def without_triggers(self) -> Iterator[None]:
        with self.database.atomic():
            self.database.execute_sql("SET LOCAL session_replication_role = replica")
            yield

    def sweep(self) -> None:
        assert len(close_engine.stall_silent(timedelta(hours=72))) == SWEPT

    def sweep_in_vain(self) -> None:
        close_engine.sweep()

    def board(self) -> None:
        pipeline()

    def pulse(self) -> None:
        pulse()

    def scrape(self) -> None:
        list(MetricsCollector().collect())

    def look_for_a_stranger(self) -> None:
        assert not numbers.leads_with("+13105550100")
        assert not numbers.anybody_with("+13105550100")

    def prune(self) -> None:
        close_engine.prune(timedelta(days=36_500))


@dataclass(frozen=True)
class Operation:
    """What is done at each size, what is done before that and not timed, and how often."""

    name: str
    do: Callable[[Grown], None]
    before: Callable[[Grown], None]
    rounds: int


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    yield past(server, (1_000, 3_000) if quick else (1_000, 100_000, 1_000_000), 1 if quick else 30)
    yield present(server, (2_000, 4_000) if quick else (10_000, 100_000, 1_000_000), 1 if quick else 30)


def past(server: Server, sizes: Sequence[int], rounds: int) -> Table:
    """Measure everything while the past grows, and what goes on does not."""
    databases = {}
    for size in sizes:
        name = server.migrated(f"growth_{size}")
        spare = rounds * 5 + 5
        fill(server, name, size, stages=STAGES, history=10, spare_leads=spare, past=size - OPEN, more=SAID)
        waiting = (each.format(count=size, drafts=DRAFTS) for each in (*console.LEADS, console.WAITING))
        server.execute(WITHOUT_TRIGGERS, *waiting, "VACUUM ANALYZE", "CHECKPOINT", database=name)
        databases[f"{10 * size:,}"] = Grown(server, name, size)
    goes_on = Grown.choose_one_that_goes_on
    operations = [
        Operation("stage change", Grown.change_stage, goes_on, rounds * 10),
        Operation("open_conversation", Grown.open_conversation, Grown.bind, rounds * 5),
        Operation("claim of a message", Grown.claim, Grown.bind, rounds * 5),
        Operation("marking it sent", Grown.mark_sent, Grown.bind, rounds * 5),
        Operation("record_delivery", Grown.record_delivery, Grown.bind, rounds * 5),
        Operation("submit", Grown.submit, goes_on, rounds * 5),
        Operation("receive", Grown.receive, goes_on, rounds * 5),
        Operation("transcript of any conversation", Grown.read_texts, Grown.choose, rounds * 10),
        Operation(f"sweep that finds {SWEPT}", Grown.sweep, Grown.make_due, rounds),
        Operation("sweep that finds nothing", Grown.sweep_in_vain, Grown.bind, rounds),
        Operation("the pulse of the board", Grown.pulse, Grown.bind, rounds * 5),
    ]
    counting = [
        Operation("the board", Grown.board, Grown.bind, rounds),
        Operation("scrape of the metrics", Grown.scrape, Grown.bind, rounds),
        Operation("whose is a number that nobody has", Grown.look_for_a_stranger, Grown.bind, rounds),
        Operation("prune that finds nothing", Grown.prune, Grown.bind, min(rounds, 2)),
    ]
    with console.browser() as visitor:
        pages = [
            Operation(f"console: {page}", partial(_visit, visitor, page), Grown.choose, rounds)
            for page in console.pages("")
        ]
        rows = _rows(databases, [*operations, *pages, *counting])
    _drop(server, databases)
    return Table(
        "Cost by the rows of history",
        ["operation", *databases, "largest to smallest"],
        rows,
        "Ten rows of history, three sent and three received texts and an approved draft per conversation. At each "
        f"size, {OPEN} conversations go on, {len(GOING_ON) * OPEN // len(STAGES)} messages and {DRAFTS} drafts wait",
    )


def present(server: Server, sizes: Sequence[int], rounds: int) -> Table:
    """Measure what counts, and the sweeps, while half of the conversations go on."""
    databases = {}
    for size in sizes:
        name = server.migrated(f"growth_{size}")
        fill(server, name, size, history=2, sent=1, pending=size // 10)
        databases[f"{size:,}"] = Grown(server, name, size)
    operations = [
        Operation("claim of a message", Grown.claim, Grown.bind, rounds * 5),
        Operation("sweep that finds nothing", Grown.sweep_in_vain, Grown.bind, rounds),
        Operation("the pulse of the board", Grown.pulse, Grown.bind, rounds),
        Operation("the board", Grown.board, Grown.bind, rounds),
        Operation("scrape of the metrics", Grown.scrape, Grown.bind, rounds),
    ]
    rows = _rows(databases, operations)
    _drop(server, databases)
    return Table(
        "Cost by the number of conversations, of which half go on",
        ["operation", *databases, "largest to smallest"],
        rows,
        "One conversation in ten has a message that waits",
    )


def _visit(visitor: TestClient, page: str, grown: Grown) -> None:
    console.ask(visitor, console.pages(grown.of)[page])


def _rows(databases: dict[str, Grown], operations: Sequence[Operation]) -> list[list[str]]:
    return [_row(databases, each) for each in operations]


def _row(databases: dict[str, Grown], operation: Operation) -> list[str]:
    measured: dict[str, Times] = interleave(
        {size: partial(operation.do, grown) for size, grown in databases.items()},
        rounds=operation.rounds,
        before={size: partial(operation.before, grown) for size, grown in databases.items()},
    )
    smallest, *_, largest = databases
    grows = ratio(measured[largest], measured[smallest])
    costs = (milliseconds(median(measured[size])) for size in databases)
    return [operation.name, *costs, times(grows) + (" (grows)" if grows > FLAT else "")]


def _drop(server: Server, databases: dict[str, Grown]) -> None:
    for grown in databases.values():
        grown.database.close()
        server.drop(grown.name)
