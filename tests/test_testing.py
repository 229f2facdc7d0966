"""The fixtures for users' tests, as a user's own suite uses them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    MessageStatus,
    OutboxMessage,
    Stage,
    open_conversation,
    outbox,
    submit,
)
from close_engine.testing import FakeSender, MovableClock, bring_to, new_lead

pytest_plugins = ["pytester"]

ConversationIn = Callable[..., CloseEngineConversation]

THEIR_TESTS = """
    from datetime import timedelta

    import pytest

    from close_engine import ActionType, AutonomyLevel, MessageStatus, Stage, pending_actions, stall_silent, submit
    from close_engine.testing import new_lead


    @pytest.mark.parametrize("stage", Stage)
    def test_a_conversation_is_in_the_stage_that_was_asked_for(conversation_in, stage):
        conversation = conversation_in(stage)
        assert conversation.stage is stage
        assert conversation.history()[-1].dest is stage


    def test_there_may_be_many_and_leads_as_one_wants_them(conversation_in):
        manual = conversation_in(Stage.BUILDING, AutonomyLevel.MANUAL, phone="+4930123")
        assert conversation_in(Stage.BUILDING).lead_id != manual.lead_id
        assert (manual.autonomy_level, manual.lead.phone) == (AutonomyLevel.MANUAL, "+4930123")


    def test_the_first_text_is_sent(conversation_in, fake_sender):
        conversation = conversation_in(Stage.INITIATED)
        submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
        assert fake_sender.deliver() == 1
        assert [message.body for message in fake_sender.sent] == ["Hello!"]
        conversation.reload()
        assert conversation.stage is Stage.QUALIFYING


    def test_silence_is_a_matter_of_a_line(conversation_in, close_engine_clock):
        conversation = conversation_in(Stage.QUALIFYING)
        close_engine_clock.move(timedelta(days=4))
        assert stall_silent() == [conversation.id]


    def test_every_test_has_a_database_of_its_own(conversation_in, close_engine_database):
        assert close_engine_database.execute_sql("SELECT count(*) FROM leads").fetchone() == (0,)
        assert type(close_engine_database).__name__ == "{database}"
"""


@pytest.fixture
def their_suite(pytester: pytest.Pytester) -> Callable[[str, str], None]:
    """Run the tests above with this conftest.py on this kind of database, in an empty directory."""

    def run(conftest: str, database: str) -> None:
        pytester.makeconftest(conftest)
        pytester.makepyfile(THEIR_TESTS.replace("{database}", database))
        done = pytester.runpytest_inprocess("-q", "-p", "no:cacheprovider", "-W", "error")
        done.assert_outcomes(passed=len(Stage) + 4)

    return run


def test_a_suite_needs_one_line(their_suite: Callable[[str, str], None]) -> None:
    their_suite('pytest_plugins = ["close_engine.testing"]', "SqliteDatabase")


def test_a_suite_may_bring_another_database(their_suite: Callable[[str, str], None], postgres_url: str) -> None:
    conftest = f"""
        import pytest

        import close_engine

        pytest_plugins = ["close_engine.testing"]


        @pytest.fixture
        def close_engine_database(close_engine_clock):
            database = close_engine.connect({postgres_url!r}, clock=close_engine_clock)
            with database.atomic() as transaction:
                yield database
                transaction.rollback()
            database.close()
    """
    their_suite(conftest, "PostgresqlDatabase")


def test_the_clock_stands_still_until_it_is_moved(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    before = close_engine_clock.now

    assert close_engine_clock.move(timedelta(days=2)) == before + timedelta(days=2)

    conversation = conversation_in(Stage.INITIATED)
    assert conversation.created_at - before < timedelta(days=2)
    assert conversation.created_at - before > timedelta(days=2) - timedelta(milliseconds=1)


def test_a_clock_may_begin_at_any_moment() -> None:
    moment = datetime(2026, 1, 2, tzinfo=timezone.utc)

    assert MovableClock(moment)() == moment


def test_the_fake_sender_fails_as_it_is_told(
    conversation_in: ConversationIn, fake_sender: FakeSender, close_engine_clock: MovableClock
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    fake_sender.failures.append(ConnectionError("503"))

    assert fake_sender.deliver() == 1
    assert fake_sender.sent == []
    assert OutboxMessage.get_by_id(message.id).last_error == "ConnectionError: 503"

    close_engine_clock.move(timedelta(minutes=1))
    assert fake_sender.deliver() == 1
    (sent,) = fake_sender.sent
    assert (sent.status, sent.provider_id) == (MessageStatus.SENT, f"fake:{message.send_key}")


def test_the_fake_sender_delivers_in_order_whatever_there_is(
    conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    conversation = conversation_in(Stage.INITIATED)
    for number in range(12):
        conversation.reload()
        submit(conversation, ActionType.SEND_MESSAGE, str(number))

    assert fake_sender.deliver() == 12
    assert [message.body for message in fake_sender.sent] == [str(number) for number in range(12)]


@pytest.mark.parametrize("level", AutonomyLevel)
def test_any_level_can_be_brought_to_any_stage(level: AutonomyLevel, conversation_in: ConversationIn) -> None:
    assert [conversation_in(stage, level).stage for stage in Stage] == list(Stage)


def test_a_conversation_of_ones_own_can_be_brought_there_too(conversation_in: ConversationIn) -> None:
    conversation = open_conversation(new_lead("+4930123"), EntryPoint.REP_CLOSE)

    assert bring_to(conversation, Stage.EDIT_LOOP) is conversation
    assert close_engine.CloseEngineConversation.get_by_id(conversation.id).stage is Stage.EDIT_LOOP
