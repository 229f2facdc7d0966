"""How much does one small machine carry, with PostgreSQL and all that uses it on the same two cores?

Each process does the same work as fast as it can, through a connection of its own, and every commit waits for the disk.
A whole conversation is what a lead costs: it is opened, ten texts come and ten leave, in eight stage changes. The
processor time beside the rates hardly depends on what else the machine does.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

import close_engine
from bench.ground import TRIGGER, conversation_id, fill, lead_id
from bench.processes import in_processes
from bench.report import Table, microseconds, per_second
from bench.rounds import interleave, measured_itself, median
from bench.server import Server, processor_seconds
from close_engine import ActionType, CloseEngineConversation, EntryPoint
from close_engine.testing import new_lead

#: Of a whole conversation: the triggers after each of the last texts, and the texts in each direction. The first text
#: that leaves is one more stage change.
TRIGGERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("collect_info", {}),
    ("start_building", {}),
    ("send_preview", {}),
    ("request_edits", {}),
    ("send_preview", {}),
    ("send_payment_link", {"payment_link_url": "https://pay.example.com/1", "approved_by": "owner"}),
    ("complete", {}),
)
TEXTS = 10

#: Does something once, in a database with so many conversations.
Work = Callable[[int], None]


def measure(server: Server, *, quick: bool) -> Iterator[Table]:
    count, rounds = (200, 1) if quick else (100_000, 3)
    processes = (1, 2) if quick else (1, 2, 4)
    database = server.migrated("carries")
    fill(server, database, count, stages=list(TRIGGER), history=10, sent=3)
    work: dict[str, tuple[Work, int]] = {
        "stage changes": (change_a_stage, 40 if quick else 400),
        "texts received": (receive_a_text, 40 if quick else 240),
        "texts submitted, claimed and marked sent": (send_a_text, 40 if quick else 120),
        "whole conversations": (converse, 4 if quick else 12),
    }
    rows = []
    for name, (do, times) in work.items():
        rates = _rates(server.url(database), do, count, times, processes, rounds)
        client, at_server = _effort(server, database, do, count, times)
        most = 2 / (client + at_server)
        rows.append([name, *map(_rate, rates), microseconds(client), microseconds(at_server), _rate(most)])
    many = [f"{some} process{'es' * (some > 1)}" for some in processes]
    yield Table(
        "What one machine carries",
        ["", *many, "processor time, client", "server", "so two cores carry at most"],
        rows,
        f"At {count:,} conversations; synchronous_commit on, Unix socket. A whole conversation: {TEXTS} texts received "
        f"and {TEXTS} sent, {len(TRIGGERS) + 1} stage changes",
    )
    server.drop(database)


def _rates(url: str, do: Work, count: int, times: int, processes: tuple[int, ...], rounds: int) -> list[float]:
    """Return how often a second so many processes do it together."""
    contenders = {
        str(some): partial(in_processes, partial(_repeat, url, do, count, times // some), some) for some in processes
    }
    seconds = interleave(contenders, rounds=rounds, warm_up=False, timer=measured_itself)
    return [times // some * some / median(seconds[str(some)]) for some in processes]


def _repeat(url: str, do: Work, count: int, times: int) -> None:
    database = close_engine.connect(url)
    for _ in range(times):
        do(count)
    database.close()


def _effort(server: Server, database: str, do: Work, count: int, times: int) -> tuple[float, float]:
    """Return the processor time of doing it once, here and in the backend."""
    connected = close_engine.connect(server.url(database))
    do(count)  # the backend's caches are filled
    (backend,) = server.backends(database)
    here, there = time.process_time(), processor_seconds(backend)
    for _ in range(times):
        do(count)
    spent = time.process_time() - here, processor_seconds(backend) - there
    connected.close()
    return spent[0] / times, spent[1] / times


def _rate(rate: float) -> str:
    return per_second(rate) if rate >= 100 else f"{rate:.1f}/s"


def change_a_stage(count: int) -> None:
    conversation = CloseEngineConversation.get_by_id(conversation_id(random.randint(1, count)))
    _insist(conversation, lambda: conversation.fire(TRIGGER[conversation.stage.value], actor="bench"))


def _insist(conversation: CloseEngineConversation, write: Callable[[], object]) -> None:
    """Write until nobody else has changed the conversation meanwhile: the processes send each other's texts."""
    while True:
        try:
            write()
            return
        except close_engine.StageConflict:
            conversation.reload()


def receive_a_text(count: int) -> None:
    close_engine.receive(lead_id(random.randint(1, count)), f"bench:{random.random()}", "All is well. " * 6)


def send_a_text(count: int) -> None:
    conversation = CloseEngineConversation.get_by_id(conversation_id(random.randint(1, count)))
    _insist(conversation, lambda: close_engine.submit(conversation, ActionType.SEND_MESSAGE, "All is well. " * 6))
    _send_what_waits()


def _send_what_waits() -> None:
    while messages := close_engine.outbox.claim(1, timedelta(minutes=1), "bench"):
        messages[0].sent()


def converse(count: int) -> None:
    conversation = close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    for text in range(TEXTS):
        received = close_engine.receive(conversation.lead_id, f"bench:{random.random()}", "All is well. " * 6)
        conversation = received.conversation
        _insist(conversation, partial(close_engine.submit, conversation, ActionType.SEND_MESSAGE, "All is well. " * 6))
        _send_what_waits()
        if text >= TEXTS - len(TRIGGERS):
            trigger, given = TRIGGERS[text - TEXTS + len(TRIGGERS)]
            conversation.reload()
            _insist(conversation, partial(conversation.fire, trigger, actor="bench", **given))
    assert conversation.stage == "COMPLETED"
