"""Words are emptied and rows stay: nothing that comes again is taken for new, and nobody is texted twice."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import peewee
import psycopg2
import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    EntryPoint,
    Forgotten,
    InboxEntry,
    InvalidValue,
    Lead,
    LeadNotFound,
    LeadNumber,
    OptOut,
    OutboxMessage,
    PendingAction,
    Pruned,
    Stage,
    StageChange,
    Takeover,
    forget,
    open_conversation,
    outbox,
    prune,
    receive,
    record_delivery,
    record_payment,
    record_sent,
    submit,
    subscribe,
    verify,
)
from close_engine.deliveries import Delivery
from close_engine.testing import FakeSender, MovableClock, new_lead
from close_engine.texts import TextEntry
from tests.command_line import refused, run
from tests.foreign import ForeignWriter
from tests.servers import execute, new_name
from tests.waiting import Running
from tests.workers import LINK, claimed, messages, sql, values

ConversationIn = Callable[..., CloseEngineConversation]

DAY = timedelta(days=1)
YEAR = 365 * DAY
DOCS = Path(__file__).parent.parent / "docs"
ON_DISK = pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)
TOLD = "I'd rather not say; call me at +1 555 0199"
#: However it is written, and long enough to be in no random id.
NUMBER = re.compile("555 ?0199")


def ask(level: AutonomyLevel, type: ActionType) -> bool:
    return True


def words() -> str:
    """All that any table of ours has, as one text."""
    tables: list[Any] = [OutboxMessage, InboxEntry, PendingAction, StageChange, CloseEngineConversation, LeadNumber]
    tables += [TextEntry, Delivery, Takeover]
    rows = [row for model in tables for row in model.select().order_by(model.id)]
    return "\n".join(str(values(row)) for row in rows) + str([lead.qualification_data for lead in Lead.select()])


@pytest.fixture
def told(database: peewee.Database, close_engine_clock: MovableClock) -> CloseEngineConversation:
    """A conversation whose words stand wherever words can stand. It ended completed."""
    close_engine_clock.rule()
    subscribe("see", events=["lead:wrote", "action:rejected"])
    lead = new_lead(phone="+15550199")
    conversation = open_conversation(lead, EntryPoint.SMS_REPLY, reason=TOLD, metadata={"said": TOLD}, key="open")
    submit(conversation, ActionType.SEND_MESSAGE, TOLD, metadata={"said": TOLD}, key="hello")
    claimed().sent("SM-out-1")
    receive(lead, "SM1", TOLD, metadata={"from": TOLD})
    conversation.reload()
    conversation.no_reply(TOLD, actor="dana")
    conversation.record(questions=["budget"], data={"said": TOLD})
    conversation.reload()
    action = submit(conversation, ActionType.SEND_MESSAGE, TOLD, policy=ask, actor="ai", key="draft")
    assert isinstance(action, PendingAction)
    action.reject("dana", TOLD)
    conversation.reload()
    waits = submit(conversation, ActionType.SEND_MESSAGE, f"{TOLD}!", policy=ask, key="second")
    assert isinstance(waits, PendingAction)
    waits.approve("dana")
    (second,) = outbox.claim(topics=["SEND_MESSAGE"])
    second.retry(TOLD, after=timedelta(0))
    (second,) = outbox.claim(topics=["SEND_MESSAGE"])
    second.sent("SM-out-2")
    record_delivery("undelivered", provider_id="SM-out-2", error=TOLD)
    record_sent(lead, "SM-phone", TOLD, author="dana", metadata={"said": TOLD})
    conversation.reload()
    outbox.enqueue(conversation, "SEND_MESSAGE", TOLD, key="withdrawn").withdraw(TOLD)
    conversation.start_building()
    conversation.take_over(by="dana", reason=TOLD)
    conversation.hand_back(by="dana")
    conversation.send_preview()
    conversation.send_payment_link(f"{LINK}?{TOLD}", approved_by="dana", metadata={"said": TOLD})
    record_payment(lead, "pi_1", amount=4900, currency="USD", metadata={"said": TOLD})
    FakeSender().deliver()
    return CloseEngineConversation.get_by_id(conversation.id)


def problems() -> list[str]:
    """What `verify` finds, besides the clock of the tests."""
    return [problem for problem in verify() if "close_engine.moment()" not in problem]


def kept() -> dict[str, Any]:
    """What must be the same afterwards: every row, with its keys, ids and times, and what is counted."""
    gone = {
        OutboxMessage: ("body", "payload", "last_error", "refusal"),
        InboxEntry: ("body", "metadata", "no_reply_reason"),
        PendingAction: ("draft_message", "metadata"),
        StageChange: ("reason", "metadata"),
        TextEntry: ("body", "metadata"),
        Delivery: ("error",),
        OptOut: (),
    }
    return {
        model.__name__: [
            {name: value for name, value in values(row).items() if name not in names}
            for row in model.select().order_by(model.id)
        ]
        for model, names in gone.items()
    }


# -- prune -------------------------------------------------------------------------------------------------------------


def test_what_is_old_is_emptied_and_its_rows_stay(
    told: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    before, history = kept(), [values(change) for change in told.history()]
    close_engine_clock.move(YEAR)
    assert prune(YEAR) == Pruned(0, 0, 0, 0, 0), "it is not older yet"
    close_engine_clock.move(DAY)
    assert prune(YEAR) == Pruned(messages=len(messages()), received=2, recorded=1, decided=2, deliveries=1)
    assert prune(YEAR) == Pruned(0, 0, 0, 0, 0)
    assert kept() == before
    assert [values(change) for change in told.history()] == history
    texts = [*OutboxMessage.select(), *InboxEntry.select()]
    assert {(row.body, getattr(row, "payload", None), getattr(row, "metadata", None)) for row in texts} == {(None,) * 3}
    assert {(action.draft_message, action.metadata) for action in PendingAction.select()} == {("", None)}
    (payment,) = InboxEntry.select().where(InboxEntry.kind == "payment")
    assert (payment.amount, payment.currency) == (4900, "USD")
    assert problems() == []


@pytest.mark.parametrize("batch", [1, 2, 3, 10_000])
def test_it_goes_on_batch_by_batch(
    batch: int, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for n in range(7):
        message = outbox.enqueue(conversation, "log", f"{n}", send_after=5 * YEAR if n == 3 else None)
        if n != 3:
            message.withdraw("no")
    close_engine_clock.move(2 * DAY)
    outbox.enqueue(conversation, "log", "young").withdraw("no")
    assert prune(DAY, batch=batch).messages == 6
    assert [message.body for message in messages()] == [None] * 3 + ["3"] + [None] * 3 + ["young"]


def test_what_waits_and_what_is_dead_is_not_pruned(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, "a", "waits", send_after=9 * YEAR)
    outbox.enqueue(conversation, "b", "dead")
    claimed().give_up("no")
    outbox.enqueue(conversation, "c", "in flight")
    claimed(lease=9 * YEAR)
    action = submit(conversation, ActionType.SEND_MESSAGE, "waits", policy=ask, expires_after=None)
    close_engine_clock.move(2 * YEAR)
    assert prune(YEAR) == Pruned(0, 0, 0, 0, 0)
    assert [message.body for message in messages()] == ["waits", "dead", "in flight"]
    assert isinstance(action, PendingAction)
    assert PendingAction.get_by_id(action.id).draft_message == "waits"


def test_what_is_repeated_after_pruning_is_not_done_again(
    told: CloseEngineConversation, close_engine_clock: MovableClock, fake_sender: FakeSender
) -> None:
    close_engine_clock.move(2 * YEAR)
    prune(YEAR)
    repeat_everything(told, fake_sender)


def repeat_everything(told: CloseEngineConversation, sender: FakeSender) -> None:
    """Do again what made a conversation: every webhook, every click, every job."""
    before = kept()
    lead = Lead.get_by_id(told.lead_id)
    for key in ("hello", "draft", "second"):
        first = submit(told, ActionType.SEND_MESSAGE, TOLD, key=key)
        assert first.id in [row["id"] for rows in (before["OutboxMessage"], before["PendingAction"]) for row in rows]
    (approved,) = PendingAction.select().where(PendingAction.status == "APPROVED")
    assert approved.approve("ana").provider_id == "SM-out-2"
    assert receive(lead, "SM1", TOLD).duplicate
    assert record_payment(lead, "pi_1").duplicate
    assert open_conversation(lead, EntryPoint.SMS_REPLY, key="open").id == told.id
    assert OutboxMessage.with_provider_id("SM-out-1") is not None
    assert not record_sent(lead, "SM-phone", TOLD)
    assert record_delivery("undelivered", provider_id="SM-out-2").error is None
    assert [text.body for text in told.messages()] == [""] * len(told.messages())
    assert told.messages().as_prompt() == []
    close_engine.sweep()
    assert sender.deliver() == 0
    assert kept() == before


def test_a_stalled_conversation_resumes_to_where_things_stand_after_pruning_and_forgetting(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    pruned, forgotten = conversation_in(Stage.EDIT_LOOP), conversation_in(Stage.EDIT_LOOP)
    for conversation in (pruned, forgotten):
        conversation.stall()
        close_engine_clock.move(timedelta(seconds=1))
        # The history knows only EDIT_LOOP: that a preview was sent since stands in the outbox alone.
        sql(
            "INSERT INTO {outbox} (conversation_id, topic, body, status, send_key, created_at, available_at, sent_at) "
            f"SELECT '{conversation.id}', 'SEND_PREVIEW', 'Here', 'SENT', '{conversation.id}', {{moment}}, {{moment}}, "
            "{moment}"
        )
    close_engine_clock.move(YEAR)
    assert prune(DAY).messages == 2
    forget(forgotten.lead_id)
    for conversation in (pruned, forgotten):
        conversation.reload()
        conversation.resume()
        assert conversation.stage is Stage.PREVIEW_SENT


def test_a_reply_is_compared_with_the_lead_s_words_after_pruning(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    receive(conversation.lead_id, "SM1", "Hi")
    conversation.reload()
    outbox.enqueue(conversation, "SEND_MESSAGE", "stale", send_after=3 * YEAR)
    close_engine_clock.move(2 * YEAR)
    prune(YEAR)
    outbox.enqueue(conversation, "SEND_MESSAGE", "fresh", send_after=YEAR)
    assert [message.after_text for message in messages()] == [InboxEntry.get().id] * 2
    receive(conversation.lead_id, "SM2", "Stop it")
    assert [str(message.status) for message in messages()] == ["WITHDRAWN", "WITHDRAWN"]


def test_a_text_that_was_not_delivered_is_sent_again_only_with_other_words(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, "SEND_MESSAGE", "Hi")
    (message,) = outbox.claim()
    message.sent("SM1")
    record_delivery("undelivered", provider_id="SM1")
    close_engine_clock.move(2 * YEAR)
    prune(YEAR)
    with pytest.raises(InvalidValue, match="the text of this message was emptied since: give another one"):
        outbox.requeue(message)
    assert outbox.requeue(message, "Hi again").body == "Hi again"


@pytest.mark.parametrize("older_than", [timedelta(0), -DAY, timedelta.max])
def test_an_age_that_makes_no_sense_is_refused(older_than: timedelta, database: peewee.Database) -> None:
    with pytest.raises(InvalidValue, match="it must be more than 0 and at most 36500 days"):
        prune(older_than)
    for batch in (0, 10_001):
        with pytest.raises(InvalidValue, match="it must be from 1 to 10000"):
            prune(DAY, batch=batch)


def test_what_somebody_holds_is_left_for_the_next_run(postgres: peewee.Database) -> None:
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    first, second = (outbox.enqueue(conversation, "log", "x") for _ in range(2))
    for message in (first, second):
        message.withdraw("no")
    sql("UPDATE {outbox} SET created_at = created_at - interval '2 days'")
    with close_engine.atomic():
        sql("SELECT id FROM {outbox} WHERE id = %s FOR UPDATE", first.id)
        assert Running(lambda: prune(DAY)).result() == Pruned(1, 0, 0, 0, 0)
    assert prune(DAY) == Pruned(1, 0, 0, 0, 0)


def test_what_a_provider_said_of_messages_of_others_is_deleted(
    told: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    record_delivery("delivered", provider_id="of another system")
    ours = {row.id for row in Delivery.select().where(Delivery.message_id.is_null(False))}
    close_engine_clock.move(YEAR)
    prune(YEAR)
    assert Delivery.select().count() == len(ours) + 1
    close_engine_clock.move(DAY)
    prune(YEAR)
    assert {row.id for row in Delivery.select()} == ours


# -- forget ------------------------------------------------------------------------------------------------------------


def test_nothing_that_was_said_is_left_and_every_row_is(
    told: CloseEngineConversation, conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    receive(other := new_lead(), "SM9", "Mine stays", open=EntryPoint.SMS_REPLY)
    fake_sender.deliver()
    before, stages = kept(), [(change.source, change.dest) for change in told.history()]
    assert TOLD in words()
    gone = forget(told.lead_id)
    assert not NUMBER.search(words())
    assert "rather" not in words()
    assert (gone.received, gone.recorded, gone.drafts, gone.withdrawn, gone.in_flight) == (2, 1, 2, [], [])
    assert kept() == before
    told.reload()
    assert [(change.source, change.dest) for change in told.history()] == stages
    assert (told.stage, told.collected_data, told.questions_asked) == (Stage.COMPLETED, None, None)
    assert told.payment_link_sent_at is not None
    assert "Mine stays" in words()
    assert Lead.get_by_id(other.id).close_conversation.history()[0].reason == "the lead wrote"

    assert forget(told.lead_id) == Forgotten(0, 0, 0, 0, 0, [], [])
    assert problems() == []
    repeat_everything(told, fake_sender)


@pytest.mark.parametrize("gone", ["lead", "conversation"])
def test_a_lead_that_is_deleted_already(gone: str, told: CloseEngineConversation, foreign: ForeignWriter) -> None:
    before = kept()
    table, row = ("leads", told.lead_id) if gone == "lead" else ("close_engine_conversations", told.id)
    foreign.run(f"DELETE FROM {table} WHERE id = %s", row)
    assert forget(told.lead_id).received == 2
    assert not NUMBER.search(words())
    assert forget(told.lead_id) == Forgotten(0, 0, 0, 0, 0, [], [])
    assert kept() == before


def test_what_waits_is_withdrawn_and_nobody_is_told_of_it(
    conversation_in: ConversationIn, fake_sender: FakeSender, close_engine_clock: MovableClock
) -> None:
    subscribe("redraft", events=["action:expired"], stages=[Stage.PREVIEW_SENT])
    conversation = conversation_in(Stage.EDIT_LOOP)
    dead = outbox.enqueue(conversation, "dies", TOLD)
    claimed().give_up("no")
    text = outbox.enqueue(conversation, "SEND_MESSAGE", TOLD, send_after=DAY)
    effect = outbox.enqueue(conversation, "build", payload={"said": TOLD})
    link = {"paymentUrl": LINK}
    action = submit(conversation, ActionType.SEND_PAYMENT_LINK, TOLD, metadata=link, policy=ask)
    assert isinstance(action, PendingAction)
    gone = forget(conversation.lead_id, by="dana")
    assert {dead.id, text.id, effect.id} <= set(gone.withdrawn)
    assert {str(message.status) for message in messages()} == {"WITHDRAWN"}
    assert {message.last_error for message in messages()} == {"the lead is forgotten"}
    assert TOLD not in words()
    action = PendingAction.get_by_id(action.id)
    assert (action.status, action.draft_message, action.metadata) == ("EXPIRED", "", None)
    conversation.reload()
    assert (conversation.stage, conversation.history()[-1].actor) == (Stage.PREVIEW_SENT, "dana")
    close_engine_clock.move(YEAR)
    assert fake_sender.deliver() == 0
    assert forget(conversation.lead_id) == Forgotten(0, 0, 0, 0, 0, [], [])


@pytest.mark.parametrize("report", ["sent", "retry", "give_up", "release", "dies"])
def test_what_is_in_flight_is_named_and_forgotten_next_time(
    report: str, conversation_in: ConversationIn, fake_sender: FakeSender, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.rule()
    conversation = conversation_in(Stage.QUALIFYING)
    outbox.enqueue(conversation, "SEND_MESSAGE", TOLD)
    held = claimed()
    assert forget(conversation.lead_id).in_flight == [held.id]
    assert OutboxMessage.get_by_id(held.id).body == TOLD
    if report == "dies":
        close_engine_clock.move(DAY)
    else:
        getattr(held, report)(*(["no"] if report in ("retry", "give_up") else []))
    gone = forget(conversation.lead_id)
    assert (gone.messages, gone.in_flight) == (1, [])
    close_engine_clock.move(YEAR)
    assert fake_sender.deliver() == 0
    assert TOLD not in words()
    assert str(OutboxMessage.get_by_id(held.id).status) == ("SENT" if report == "sent" else "WITHDRAWN")


def test_a_draft_that_is_being_written_meanwhile_is_a_conflict(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    forget(conversation.lead_id)
    with pytest.raises(close_engine.StageConflict):
        submit(conversation, ActionType.SEND_MESSAGE, TOLD)


def test_whoever_opted_out_is_left_alone_afterwards(conversation_in: ConversationIn, foreign: ForeignWriter) -> None:
    conversation = conversation_in(Stage.QUALIFYING, phone="+15550123")
    receive(conversation.lead_id, "SM1", "STOP")
    before = kept()["OptOut"]
    assert len(before) == 2
    forget(conversation.lead_id)
    assert kept()["OptOut"] == before
    with pytest.raises(close_engine.LeadOptedOut):
        close_engine.open_conversation(conversation.lead_id, EntryPoint.SMS_REPLY)
    # Also as another lead with the same number.
    again = new_lead(phone="+15550123")
    with pytest.raises(close_engine.LeadOptedOut):
        submit(open_conversation(again, EntryPoint.SMS_REPLY), ActionType.SEND_MESSAGE, "Hi")


@pytest.mark.parametrize("gone", [True, False])
def test_after_a_merge_the_conversation_is_that_of_the_lead_who_was_kept(
    gone: bool, told: CloseEngineConversation, foreign: ForeignWriter
) -> None:
    was, new = told.lead_id, new_lead().id
    foreign.run("UPDATE close_engine_conversations SET lead_id = %s WHERE id = %s", new, told.id)
    if gone:
        foreign.run("DELETE FROM leads WHERE id = %s", was)
        assert forget(new).recorded == 1
        assert "rather" not in words()
        assert not NUMBER.search(words()), "nor is the number of the lead that is gone"
        return
    forget(was)
    assert {message.body for message in messages() if message.topic == "SEND_MESSAGE"} >= {TOLD}
    assert InboxEntry.get(InboxEntry.key == "SM1").body is None
    forget(new)
    assert "rather" not in words()


def test_a_lead_without_a_conversation_and_one_that_nobody_knows(database: peewee.Database) -> None:
    lead = new_lead()
    assert forget(lead) == Forgotten(0, 0, 0, 0, 0, [], [])
    receive(lead, "SM1", TOLD)
    assert forget(lead).received == 1
    with pytest.raises(LeadNotFound):
        forget("nobody")
    with pytest.raises(InvalidValue, match="it must say who forgets the lead"):
        forget(lead, by=" ")


def test_a_row_that_nobody_can_read_is_emptied_like_the_others(
    told: CloseEngineConversation, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    if foreign.is_postgres:
        foreign.run("UPDATE close_engine.inbox SET received_at = 'infinity'")
    else:
        foreign.run("UPDATE close_engine_inbox SET received_at = 'yesterday', metadata = '{'")
    close_engine_clock.move(2 * YEAR)
    assert prune(YEAR).received == 0
    assert forget(told.lead_id).received == 2


def test_it_is_all_or_nothing(told: CloseEngineConversation) -> None:
    before = words()
    with close_engine.atomic() as transaction:
        forget(told.lead_id)
        transaction.rollback()
    assert words() == before


def test_it_locks_in_the_order_of_everybody(postgres: peewee.Database) -> None:
    """While a text comes in, which holds the conversation and passes over what others hold, neither waits for ever."""
    conversation = open_conversation(new_lead(), EntryPoint.SMS_REPLY)
    action = submit(conversation, ActionType.SEND_MESSAGE, TOLD, policy=ask)
    for n in range(10):
        races = [
            Running(lambda: forget(conversation.lead_id)),
            Running(lambda n=n: receive(conversation.lead_id, f"SM{n}", TOLD)),  # type: ignore[misc]
            Running(lambda: action.reject("dana") if isinstance(action, PendingAction) else None),
        ]
        for racer in races:
            outcome = racer.result()
            assert not isinstance(outcome, peewee.OperationalError), outcome
    forget(conversation.lead_id)
    assert TOLD not in words()


# -- the right ---------------------------------------------------------------------------------------------------------

#: What a role needs to prune and to forget, as the documentation has it.
ERASER = re.findall("GRANT .* TO close_eraser", (DOCS / "operations.md").read_text())


@pytest.mark.parametrize("kind", ["postgresql"], indirect=True)
@pytest.mark.parametrize("right", [None, *ERASER])
def test_the_right_is_a_role_s(
    kind: str, right: str | None, told: CloseEngineConversation, database: peewee.Database, server: str
) -> None:
    role = new_name()
    execute(server, f"CREATE ROLE {role}")
    try:
        for grant in ERASER:
            if grant != right:
                database.execute_sql(grant.replace("close_eraser", role))
        database.execute_sql(f"SET ROLE {role}")
        if right is None:
            assert forget(told.lead_id).received == 2
            assert prune(DAY) == Pruned(0, 0, 0, 0, 0)
        else:
            with pytest.raises(peewee.ProgrammingError, match="permission denied"):
                forget(told.lead_id)
        with pytest.raises(psycopg2.errors.InsufficientPrivilege):
            database.connection().cursor().execute("UPDATE close_engine.history SET actor = 'me'")
        database.connection().rollback()
    finally:
        database.execute_sql("RESET ROLE")
        if right is None:
            assert problems() == [], "such a role is no forger"
            database.execute_sql(f"GRANT UPDATE (actor) ON close_engine.history TO {role}")
            (forger,) = problems()
            assert f"The role {role} may UPDATE (actor) on close_engine.history" in forger
        database.execute_sql(f"DROP OWNED BY {role}")
        execute(server, f"DROP ROLE {role}")


# -- the commands ------------------------------------------------------------------------------------------------------


@ON_DISK
def test_the_commands(
    kind: str,
    database_url: str,
    told: CloseEngineConversation,
    close_engine_clock: MovableClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    assert (
        run("prune", "--older-than", "48h").out
        == "Emptied: messages 0, received 0, recorded 0, decided 0, deliveries 0.\n"
    )
    assert run("prune", "--older-than", "soon").code == 2
    assert run("prune", "--older-than", "0d").code == 1
    for answer in ("", "n\n"):
        asked = run("forget", told.lead_id, input=answer)
        assert (asked.code, asked.out) == (1, "")
        assert f"This empties for ever what lead {told.lead_id!r} and you said to each other. Continue?" in asked.err
    assert TOLD in words()
    outbox.enqueue(told, "later", "x")
    (held,) = outbox.claim(topics=["later"])
    forgotten = run("forget", told.lead_id, "--yes", "--by", "dana")
    assert forgotten.code == 1
    assert f"A worker is sending messages right now: {held.id}. Forget the lead again" in forgotten.err
    assert "received 2, recorded 1, drafts 2," in forgotten.out
    held.sent()
    assert run("forget", told.lead_id, "--yes").code == 0
    assert "'nobody'" in refused("forget", "nobody", "--yes")
