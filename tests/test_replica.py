"""What only reads works on a hot standby: boards, metrics, the console, lists. What writes says that it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import peewee
import pytest

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    CloseEngineConversation,
    EntryPoint,
    OutboxMessage,
    PendingAction,
    board,
    find_conversations,
    open_conversation,
    receive,
    submit,
)
from close_engine.metrics import MetricsCollector
from close_engine.testing import new_lead
from close_engine.web.console import console
from tests.servers import PrivateServer
from tests.visitor import Visitor


@pytest.fixture(scope="module")
def standby() -> Iterator[str]:
    """The URL of a hot standby of a server on which a lead wrote, a text waits, and a draft waits for approval."""
    with PrivateServer("fsync = off") as primary:
        database = close_engine.connect(primary.url)
        close_engine.migrate(standalone=True)
        conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
        receive(conversation.lead_id, "SM1", "How much is it?")
        conversation.reload()
        submit(conversation, ActionType.SEND_MESSAGE, "It is $900.")
        CloseEngineConversation.update(autonomy_level="MANUAL").execute()
        conversation.reload()
        submit(conversation, ActionType.SEND_MESSAGE, "Shall we begin?")
        database.close()
        with primary.standby() as url:
            yield url


@pytest.fixture
def replica(standby: str) -> Iterator[CloseEngineConversation]:
    """The conversation, as it is read from the standby."""
    database = close_engine.connect(standby)
    assert database.execute_sql("SELECT pg_catalog.pg_is_in_recovery()").fetchone() == (True,)
    yield CloseEngineConversation.get()
    database.close()


def test_the_board_can_be_read_on_a_standby(replica: CloseEngineConversation) -> None:
    shown = board.pipeline()

    assert (shown.waiting_for_us.count, shown.outbox.pending, [line.waiting for line in shown.approvals]) == (1, 1, [1])
    assert sum(line.count for line in shown.stages) == 1
    assert board.turns() == (1, 0)
    assert board.days()[1]
    assert board.pulse()


def test_the_metrics_can_be_scraped_on_a_standby(replica: CloseEngineConversation) -> None:
    found = {sample.name: sample.value for family in MetricsCollector().collect() for sample in family.samples}

    assert found["close_engine_database_up"] == 1
    assert found["close_engine_messages"] == 1


def test_a_conversation_can_be_read_on_a_standby(replica: CloseEngineConversation) -> None:
    assert [text.body for text in replica.messages()] == ["How much is it?", "It is $900.", "Shall we begin?"]
    assert [line.waiting_for for line in find_conversations(waiting_for="human")] == [("us", "human")]
    assert replica.may("start_qualifying")
    assert close_engine.verify() == []


@pytest.mark.parametrize(
    "path", ["/", "/waiting", "/pipeline", "/conversations", "/conversations/{id}", "/outbox", "/health"]
)
def test_the_console_shows_every_page_on_a_standby(replica: CloseEngineConversation, path: str) -> None:
    visitor = Visitor(console())

    visitor.look(path.format(id=replica.id))

    assert visitor.status == 200


def test_a_click_on_a_standbys_console_changes_nothing(replica: CloseEngineConversation) -> None:
    visitor, action = Visitor(console()), PendingAction.get()
    visitor.look("/")

    visitor.send(f"/conversations/{replica.id}/step-in", verb="take over", seen=replica.stage)

    assert visitor.status == 503
    assert "read-only transaction" in visitor.text
    assert PendingAction.get_by_id(action.id).status is ActionStatus.PENDING


@pytest.mark.parametrize(
    "write",
    [
        lambda conversation: conversation.fire("start_qualifying"),
        lambda conversation: submit(conversation, ActionType.SEND_MESSAGE, "Hello!"),
        lambda conversation: receive(conversation.lead_id, "SM2", "Hello?"),
        lambda conversation: close_engine.outbox.claim(),
        lambda conversation: close_engine.sweep(),
    ],
    ids=["fire", "submit", "receive", "claim", "sweep"],
)
def test_what_writes_says_that_a_standby_can_only_be_read(
    replica: CloseEngineConversation, write: Callable[[CloseEngineConversation], object]
) -> None:
    with pytest.raises(peewee.InternalError, match=r"read-only|during recovery"):
        write(replica)

    assert OutboxMessage.select().count() == 1
    assert CloseEngineConversation.get_by_id(replica.id).stage == replica.stage
