"""The console's pages, on both databases, as somebody sees them who has no script."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import peewee
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    Lead,
    OutboxMessage,
    PendingAction,
    Stage,
    heartbeats,
    outbox,
    pause_sending,
    receive,
    record_payment,
    submit,
)
from close_engine.board import days, pulse
from close_engine.database.binding import current
from close_engine.testing import FakeSender, MovableClock
from close_engine.web.console import Account, Accounts, Role, console
from close_engine.web.console.live import Pulse, events
from tests.foreign import ForeignWriter
from tests.visitor import Visitor
from tests.waiting import LIMIT

ConversationIn = Callable[..., CloseEngineConversation]

HOUR = timedelta(hours=1)
MESSAGE, PREVIEW, LINK = ActionType.SEND_MESSAGE, ActionType.SEND_PREVIEW, ActionType.SEND_PAYMENT_LINK
MANUAL = AutonomyLevel.MANUAL


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """Each page is made in a thread of its own, so a database in memory would be another one."""
    return str(request.param)


@pytest.fixture
def owner(close_engine_database: peewee.Database) -> Visitor:
    """Somebody at the machine itself: everything is allowed."""
    return Visitor(console())


def somebody(name: str, role: Role = Role.APPROVER) -> Visitor:
    """Somebody whom another application knows."""
    return Visitor(console(authenticate=lambda request: Account(name, role)))


def drafted(conversation: CloseEngineConversation, text: str = "Shall we begin?", **given: Any) -> PendingAction:
    action = submit(conversation, given.pop("type", MESSAGE), text, actor="claude", **given)
    assert isinstance(action, PendingAction)
    return action


def fresh(action: PendingAction) -> PendingAction:
    return PendingAction.get_by_id(action.id)


# -- approvals -----------------------------------------------------------------------------------------------------


def test_what_expires_first_is_shown_first_beside_what_was_said(
    owner: Visitor, conversation_in: ConversationIn
) -> None:
    late = conversation_in(Stage.QUALIFYING, MANUAL)
    drafted(late, "This can wait.", expires_after=10 * HOUR)
    drafted(late, "This waits for ever.", expires_after=None)
    soon = conversation_in(Stage.QUALIFYING, MANUAL, phone="+12125550101")
    receive(soon.lead_id, "SM1", "How much is it?")
    soon.reload()
    drafted(soon, "It is 900.", expires_after=HOUR)

    owner.look()

    places = [owner.text.rindex(words) for words in ("It is 900.", "This can wait.", "This waits for ever.")]
    assert places == sorted(places)
    assert "How much is it? Lead" in owner.text
    assert "Send message to +12125550101" in owner.text


def test_approving_puts_it_into_the_outbox_under_the_name_of_whoever_did(conversation_in: ConversationIn) -> None:
    action = drafted(conversation_in(Stage.QUALIFYING, MANUAL), "Two lines,\r\nas they were drafted.")
    dana = somebody("dana")
    dana.look()

    # A form ends its lines so, and spaces around a text are no words.
    dana.send(f"/approvals/{action.id}", verb="approve", message="Two lines,\r\nas they were drafted.\r\n")

    message = OutboxMessage.get(OutboxMessage.action_id == action.id)
    assert (message.approved_by, message.body) == ("dana", "Two lines,\r\nas they were drafted.")
    assert "Approved." in dana.text
    assert "Nothing waits for approval." in dana.text
    assert "Approved." not in dana.look()  # it is said once


def test_what_was_changed_is_sent_as_it_was_changed(owner: Visitor, conversation_in: ConversationIn) -> None:
    action = drafted(conversation_in(Stage.QUALIFYING, MANUAL))
    owner.look()

    owner.send(f"/approvals/{action.id}", verb="approve", message="Let us begin,\r\nthen.")

    assert OutboxMessage.get(OutboxMessage.action_id == action.id).body == "Let us begin,\nthen."
    assert "Approved with your words." in owner.text


def test_an_empty_text_does_not_send_the_draft(owner: Visitor, conversation_in: ConversationIn) -> None:
    action = drafted(conversation_in(Stage.QUALIFYING, MANUAL))
    owner.look()
    owner.send(f"/approvals/{action.id}", verb="approve", message=" \n ")
    assert owner.status == 400
    assert "write one, or reject the draft" in owner.text
    assert PendingAction.get().status is ActionStatus.PENDING


def test_rejecting_needs_a_reason_and_keeps_it(owner: Visitor, conversation_in: ConversationIn) -> None:
    action = drafted(conversation_in(Stage.QUALIFYING, MANUAL))
    owner.look()

    owner.send(f"/approvals/{action.id}", verb="reject", reason=" ")
    assert (owner.status, fresh(action).status) == (400, ActionStatus.PENDING)
    assert "Say why" in owner.text

    owner.send(f"/approvals/{action.id}", verb="reject", reason="too pushy")
    assert (fresh(action).status, fresh(action).approved_by) == (ActionStatus.REJECTED, "owner")
    assert fresh(action).metadata["rejectionReason"] == "too pushy"


def test_a_preview_says_that_the_lead_has_written_since(owner: Visitor, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.BUILDING, MANUAL)
    drafted(conversation, "Here it is.", type=PREVIEW, metadata={"previewUrl": "https://preview.example.com/1"})
    assert "The lead has written since" not in owner.look()

    receive(conversation.lead_id, "SM1", "Where is it?")

    owner.look()
    assert "The lead has written since this was drafted." in owner.text
    assert 'href="https://preview.example.com/1"' in owner.page


def test_several_are_decided_at_once_and_one_that_cannot_be_holds_up_no_other(
    owner: Visitor, conversation_in: ConversationIn
) -> None:
    conversations = [conversation_in(Stage.QUALIFYING, MANUAL, phone=f"+1212555010{each}") for each in range(4)]
    first, second, third, rejected = map(drafted, conversations)
    owner.look()
    second.reject(by="dana")

    owner.send("/approvals", verb="approve", action=[first.id, second.id, third.id])

    assert [fresh(each).status for each in (first, second, third)] == ["APPROVED", "REJECTED", "APPROVED"]
    assert "Approved: 2. dana was first: it is rejected already." in owner.text

    owner.send("/approvals", verb="reject", action=[rejected.id])
    assert "Say why" in owner.text
    owner.send("/approvals", verb="reject", action=[rejected.id], reason="no")
    assert fresh(rejected).status is ActionStatus.REJECTED
    owner.send("/approvals", verb="approve")
    assert "Tick the drafts first." in owner.text


def test_what_is_said_of_many_fits_into_a_cookie(owner: Visitor, conversation_in: ConversationIn) -> None:
    names = random.Random(1)  # so that nothing makes them shorter
    actions = [drafted(conversation_in(Stage.QUALIFYING, MANUAL, phone=f"+121255501{each:02}")) for each in range(20)]
    owner.look()
    for each, action in enumerate(actions):
        action.reject(by=f"{each}" + "".join(chr(names.randrange(0x4E00, 0x9F00)) for _ in range(100)))

    owner.send("/approvals", verb="approve", action=[action.id for action in actions])

    assert owner.status == 200
    assert "was first: it is rejected already." in owner.text
    assert "And more." in owner.text


@pytest.mark.parametrize("later", ["approve", "reject"])
def test_of_two_who_decide_at_once_the_second_sees_who_was_first(later: str, conversation_in: ConversationIn) -> None:
    action = drafted(conversation_in(Stage.QUALIFYING, MANUAL))
    dana, eve = somebody("dana"), somebody("eve")
    dana.look()
    eve.look()

    dana.send(f"/approvals/{action.id}", verb="approve", message=action.draft_message)
    eve.send(f"/approvals/{action.id}", verb=later, message="My words instead", reason="no")

    assert eve.status == 409
    assert "dana was first: it is approved already." in eve.text
    assert "My words instead" in eve.page  # they are not lost
    assert OutboxMessage.get(OutboxMessage.action_id == action.id).body == "Shall we begin?"


def test_of_many_who_decide_at_the_same_moment_one_decides(conversation_in: ConversationIn) -> None:
    action = drafted(conversation_in(Stage.QUALIFYING, MANUAL))
    everybody = [somebody(name) for name in ("dana", "eve", "finn", "gus")]
    for each in everybody:
        each.look()
    all_are_here = threading.Barrier(len(everybody))

    def decide(each: Visitor, verb: str) -> None:
        all_are_here.wait(LIMIT)
        each.send(f"/approvals/{action.id}", verb=verb, message="Shall we begin?", reason="no")

    threads = [
        threading.Thread(target=decide, args=(each, verb))
        for each, verb in zip(everybody, ("approve", "reject") * 2, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)

    decided = fresh(action)
    first = f"{decided.approved_by} was first: it is {decided.status.lower()} already."
    assert sorted(each.status for each in everybody) == [200, 409, 409, 409]
    assert all(first in each.text for each in everybody if each.status == 409)
    assert OutboxMessage.select().count() == (decided.status is ActionStatus.APPROVED)


def test_what_expired_or_was_superseded_meanwhile_is_refused_with_a_sentence(
    owner: Visitor, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    action = drafted(conversation_in(Stage.QUALIFYING, MANUAL), expires_after=HOUR)
    owner.look()
    close_engine_clock.move(HOUR)

    owner.send(f"/approvals/{action.id}", verb="approve", message="Words")

    assert (owner.status, OutboxMessage.select().count()) == (409, 0)
    assert "EXPIRED" in owner.text
    owner.send("/approvals/nobody", verb="approve")
    assert owner.status == 404
    owner.look("/?action=nobody")
    assert "There is no action 'nobody'" in owner.text


# -- the board -----------------------------------------------------------------------------------------------------


def test_the_pipeline_is_drawn_with_counts_times_and_who_is_waited_for(
    owner: Visitor, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    for each in range(3):
        conversation_in(Stage.QUALIFYING, phone=f"+1212555010{each}")
    asking = conversation_in(Stage.BUILDING, phone="+12125550110")
    receive(asking.lead_id, "SM1", "And?")
    close_engine_clock.move(2 * HOUR)

    owner.look("/pipeline")

    assert "Conversations by stage: Initiated 0, Qualifying 3" in owner.page
    assert "Qualifying 3 median 2.0 h, longest 2.0 h" in owner.text
    assert "For us, because they wrote 1 For the lead 3" in owner.text
    assert f"{close_engine_clock.now:%d %b}: 4 entered Qualifying" in owner.page


def test_the_days_count_what_was_entered_on_each(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    close_engine_clock.now = close_engine_clock.now.replace(hour=12)
    conversation_in(Stage.QUALIFYING)
    close_engine_clock.move(timedelta(days=1))
    conversation_in(Stage.BUILDING)

    lines, is_whole = days(2)

    assert [line.entered for line in lines] == [
        {Stage.INITIATED: 1, Stage.QUALIFYING: 1},
        {Stage.INITIATED: 1, Stage.QUALIFYING: 1, Stage.BUILDING: 1},
    ]
    assert is_whole


def test_what_waits_for_us_is_named(
    owner: Visitor, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    owed = conversation_in(Stage.QUALIFYING, phone="+12125550101")
    receive(owed.lead_id, "SM1", "Hello?")
    paid = conversation_in(Stage.PAYMENT_SENT)
    record_payment(paid.lead_id, "pi_1", amount=90000, currency="USD")
    record_payment(paid.lead_id, "pi_2", amount=90000, currency="USD")
    asked = conversation_in(Stage.QUALIFYING, phone="+12125550103")
    asked.take_over("owner", reason="the lead asked for a human")
    outbox.enqueue(owed, "draft_reply", payload={})
    outbox.enqueue(owed, MESSAGE, "Hi")
    (draft,) = outbox.claim(worker="worker", topics=["draft_reply"])
    draft.retry("RateLimitError: slow down")
    (text,) = outbox.claim(worker="worker", topics=[MESSAGE])
    text.give_up("TwilioError: 21211")
    close_engine_clock.move(HOUR)

    owner.look("/waiting")

    assert "Replies owed 1 +12125550101 Qualifying, wrote 1.0 h ago" in owner.text
    assert "+12125550103 owner, 1.0 h ago: the lead asked for a human" in owner.text
    assert f"TwilioError 1 1.0 h ago {text.id}: TwilioError: 21211" in owner.text
    assert "Payments to look at 1 pi_2 Surplus, 900.00 USD, 1.0 h ago" in owner.text
    assert "draft_reply 1 attempt failed" in owner.text
    owner.send("/waiting/payments", payment=owner.hidden("payment"), resolution="paid back")
    assert "Noted." in owner.text
    assert "Payments to look at 0" in owner.text
    owner.send("/waiting/payments", payment="one")
    assert owner.status == 400


# -- conversations -------------------------------------------------------------------------------------------------


def test_a_conversation_is_found_by_phone_name_id_and_stage(owner: Visitor, conversation_in: ConversationIn) -> None:
    current().execute("ALTER TABLE {leads} ADD COLUMN first_name TEXT")
    current().execute('ALTER TABLE {leads} ADD COLUMN "companyName" TEXT')
    ada = conversation_in(Stage.QUALIFYING, phone="+12125550101")
    bob = conversation_in(Stage.BUILDING, phone="+12125550102")
    named = 'UPDATE {leads} SET first_name = %s, "companyName" = %s WHERE id = %s'
    current().execute(named, ("Ada", "100% Bread_", ada.lead_id))
    current().execute(named, ("Bob", "1000 Breads", bob.lead_id))

    for query, found in {
        "text=%2B1 (212) 555-0101": ["Ada"],
        "text=ada": ["Ada"],
        "text=100%25 bread_": ["Ada"],
        f"text={bob.id}": ["Bob"],
        f"text={bob.lead_id}": ["Bob"],
        "text=bread": ["Ada", "Bob"],
        "text=nobody": [],
        "text=%00": ["Ada", "Bob"],
        "stage=BUILDING": ["Bob"],
        "stage=NONSENSE": ["Ada", "Bob"],
        "waiting_for=lead": ["Ada", "Bob"],
        "waiting_for=us": [],
    }.items():
        owner.look(f"/conversations?{query}")
        assert [name for name in ("Ada", "Bob") if f">{name} " in owner.page] == found, query


def test_a_conversation_is_shown_whole(owner: Visitor, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING, AutonomyLevel.SEMI_AUTO)
    receive(conversation.lead_id, "SM1", "We bake bread.")
    conversation.reload()
    conversation.record(questions=["business"], data={"business": "a bakery", "staff": 3})
    conversation.collect_info(actor="worker-7", reason="gaps")

    owner.look(f"/conversations/{conversation.id}")

    for words in (
        "We bake bread. Lead, 0 s ago",
        "Level Semi auto",
        "Waits for us",
        "Asked business",
        "business a bakery staff 3",
        "Collecting info collect_info from Qualifying, 0 s ago, by worker-7: gaps",
    ):
        assert words in owner.text
    owner.look("/conversations/nobody")
    assert owner.status == 404


def test_somebody_takes_over_writes_and_hands_back(conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING, MANUAL)
    action = drafted(conversation)
    dana = somebody("dana")
    path = f"/conversations/{conversation.id}"
    dana.look(path)
    key = dana.hidden("key")

    for _ in range(2):  # a double click is one text
        dana.send(f"{path}/write", message="It is Dana,\r\nin person.", key=key, seen="QUALIFYING")

    (message,) = OutboxMessage.select()
    assert (message.body, message.approved_by) == ("It is Dana,\nin person.", "dana")
    assert fresh(action).status is not ActionStatus.PENDING
    assert "Your text is in the outbox." in dana.text
    assert "dana leads this conversation" in dana.text
    eve = somebody("eve")
    eve.look(path)
    eve.send(f"{path}/write", message="It is Eve.", key="another")
    assert (eve.status, OutboxMessage.select().count()) == (409, 1)
    assert "dana" in eve.text
    assert "It is Eve." in eve.page

    eve.send(f"{path}/step-in", verb="take over")
    assert (eve.status, conversation.takeover().taken_by) == (409, "dana")
    eve.send(f"{path}/step-in", verb="take over", **{"from": "them"})
    assert conversation.takeover().taken_by == "eve"

    dana.send(f"{path}/step-in", verb="hand back")
    assert conversation.takeover() is None
    dana.send(f"{path}/write", message=" ", key="empty")
    assert dana.status == 409
    assert conversation.takeover() is None  # nothing was sent, so nothing was taken over


def test_a_trigger_is_fired_with_what_it_asks_for(owner: Visitor, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.PREVIEW_SENT, AutonomyLevel.SEMI_AUTO)
    path = f"/conversations/{conversation.id}"
    owner.look(path)
    assert 'name="payment_link_url"' in owner.page
    assert "Fire complete" not in owner.page  # no link was sent
    key = owner.hidden("key")

    link = "https://pay.example.com/1"
    owner.send(f"{path}/fire", trigger="send_payment_link", payment_link_url=link, seen="PREVIEW_SENT", key=key)
    conversation.reload()
    assert (conversation.stage, conversation.payment_link_url) == (Stage.PAYMENT_SENT, link)
    assert conversation.history()[-1].actor == "owner"
    assert "It went from PREVIEW_SENT to PAYMENT_SENT." in owner.text

    owner.send(f"{path}/fire", trigger="close_lost", seen="PREVIEW_SENT", reason="x")
    assert (owner.status, "It is PAYMENT_SENT by now" in owner.text) == (409, True)
    owner.send(f"{path}/fire", trigger="close_lost", seen="PAYMENT_SENT")
    assert (owner.status, "a reason must be given" in owner.text) == (409, True)
    owner.send(f"{path}/fire", trigger="nonsense")
    assert owner.status == 409


def test_no_reply_and_opting_out_and_in(owner: Visitor, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    path = f"/conversations/{conversation.id}"
    receive(conversation.lead_id, "SM1", "Thanks!")
    owner.look(path)
    owner.send(f"{path}/step-in", verb="no reply", reason="they only said thanks")
    assert "Waits for lead" in owner.text

    owner.send(f"{path}/step-in", verb="opt out")
    assert close_engine.opted_out(conversation.lead_id)
    assert "Opted out 0 s ago, said by console: owner" in owner.text
    owner.send(f"{path}/step-in", verb="opt in")
    assert close_engine.opted_out(conversation.lead_id) is None
    owner.send(f"{path}/step-in", verb="nonsense")
    assert owner.status == 400


def test_what_is_left_of_a_deleted_conversation_is_shown(owner: Visitor, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.BUILDING)
    Lead.delete().where(Lead.id == conversation.lead_id).execute()

    owner.look(f"/conversations/{conversation.id}")

    assert "This conversation was deleted; its history is kept." in owner.text
    assert "start_building" in owner.text


# -- outbox and health ---------------------------------------------------------------------------------------------


def test_the_outbox_says_what_waits_and_why(
    owner: Visitor, conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for topic in ("due", "later", "failed", "hanging"):
        outbox.enqueue(conversation, topic, send_after=2 * HOUR if topic == "later" else None)
    (failed,) = outbox.claim(worker="worker-1", topics=["failed"])
    failed.retry("Timeout", after=2 * HOUR)
    outbox.claim(worker="worker-2", topics=["hanging"], lease=2 * HOUR)
    close_engine_clock.move(HOUR)

    owner.look("/outbox")
    for why in (
        "is due since 1.0 h ago",
        "is due in 1.0 h",
        "attempt 1 failed, again in 1.0 h: Timeout",
        "hangs at worker-2, begun 1.0 h ago",
    ):
        assert why in owner.text

    owner.send("/outbox/pause", verb="pause", reason="the provider is down")
    assert "Paused: nothing is sent since" in owner.text
    assert "is paused" in owner.text
    owner.send("/outbox/pause", verb="resume")
    assert "Sending goes on." in owner.text
    owner.send("/outbox/pause", verb="pause", reason=" ")
    assert owner.status == 409


def test_what_is_dead_is_sent_again_by_its_kind_of_error(owner: Visitor, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for number in range(3):
        outbox.enqueue(conversation, f"topic {number}")
    for message in outbox.claim(worker="worker", limit=3):
        message.give_up("Timeout: 30 s" if message.topic != "topic 2" else "")
    owner.look("/outbox")
    assert "Timeout 2 0 s ago" in owner.text

    owner.send("/outbox/requeue", error="Timeout")
    assert "Messages that will be sent again: 2." in owner.text
    owner.send("/outbox/requeue", message=str(message.id))
    assert f"Message {message.id} will be sent again." in owner.text
    owner.send("/outbox/requeue", message=str(message.id))
    assert owner.status == 409
    owner.send("/outbox/requeue")
    assert owner.status == 400


def test_health_shows_workers_migrations_and_what_verify_finds(
    owner: Visitor, close_engine_database: peewee.Database
) -> None:
    owner.look("/health")
    assert "No worker runs" in owner.text
    heartbeats.beat("worker-7", 4, None, 2, HOUR)
    current().execute("DROP INDEX close_engine_conversations_stage_idx")

    owner.look("/health")
    owner.send("/health/verify")

    assert "worker-7" in owner.text
    assert "2 of at most 4" in owner.text
    assert "close_engine_conversations_stage_idx" in owner.text
    assert "0005_decisions applied" in owner.text
    # It reads every row, so it is not done again by itself.
    assert "data-events" not in owner.page
    owner.look("/health")
    assert "close_engine_conversations_stage_idx" not in owner.page


# -- what holds for every page -------------------------------------------------------------------------------------

PAGES = ("/", "/pipeline", "/waiting", "/conversations", "/outbox", "/health")

#: No page asks the database more often, however much there is to show.
MOST_STATEMENTS = 25


def statements_of(owner: Visitor, path: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    execute_sql = type(current().database).execute_sql

    def counted(self: Any, sql: str, *arguments: Any, **options: Any) -> Any:
        made.append(sql)
        return execute_sql(self, sql, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(current().database), "execute_sql", counted)
        owner.look(path)
    assert owner.status == 200, path
    return made


def test_every_page_asks_the_database_a_bounded_number_of_times(
    owner: Visitor, conversation_in: ConversationIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(many: range) -> CloseEngineConversation:
        for each in many:
            conversation = conversation_in(Stage.QUALIFYING, MANUAL, phone=f"+1212555{each:04}")
            receive(conversation.lead_id, f"SM{each}", "Hello?")
            conversation.reload()
            drafted(conversation)
            outbox.enqueue(conversation, f"topic {each}")
        for message in outbox.claim(worker="worker", limit=len(many) // 2):
            message.give_up(f"Kind {message.id}: sentence")
        return conversation

    one = fill(range(3))
    paths = [*PAGES, f"/conversations/{one.id}", "/conversations?text=%2B12125550001"]
    owner.look("/conversations")  # which finds out how the CRM calls its leads, once
    few = {path: len(statements_of(owner, path, monkeypatch)) for path in paths}
    fill(range(100, 120))
    many = {path: len(statements_of(owner, path, monkeypatch)) for path in paths}

    assert few == many
    assert max(many.values()) <= MOST_STATEMENTS, many


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)> [red]x[/red] {{ 7*7 }} \u202eevil\u202c ' \" & \x1b[2J"


def test_hostile_text_is_only_text_in_every_field(conversation_in: ConversationIn, owner: Visitor) -> None:
    conversation = conversation_in(Stage.BUILDING, MANUAL, phone="+12125550101")
    receive(conversation.lead_id, "SM1", HOSTILE)
    conversation.reload()
    conversation.record(questions=[HOSTILE], data={HOSTILE: HOSTILE, "link": "javascript:alert(1)"})
    conversation.reload()
    drafted(conversation, HOSTILE, type=PREVIEW, metadata={"previewUrl": "javascript:alert(1)"})
    outbox.enqueue(conversation, HOSTILE)
    outbox.claim(worker=HOSTILE, topics=[HOSTILE])[0].give_up(HOSTILE)
    outbox.enqueue(conversation, HOSTILE)
    outbox.claim(worker=HOSTILE, topics=[HOSTILE])[0].retry(HOSTILE)
    pause_sending(HOSTILE, [HOSTILE], by=HOSTILE)
    owner.look()
    owner.send(f"/conversations/{conversation.id}/fire", trigger="stall", reason=HOSTILE)
    visitor = Visitor(console(authenticate=lambda request: Account(HOSTILE, Role.ADMIN), title=HOSTILE))

    paths = [*PAGES, f"/conversations/{conversation.id}", "/conversations?text=<script>alert(1)</script>"]
    for path in [*paths, "/?action=<script>alert(1)</script>"]:
        visitor.look(path)
        assert "<script>alert" not in visitor.page, path
        assert "<img src=x" not in visitor.page, path
        assert 'href="javascript:' not in visitor.page, path
        assert "{{ 7*7 }}" in visitor.page, path
        # In a form field the words are as they were, and nowhere else.
        outside = re.sub(r'value="[^"]*"|<textarea.*?</textarea>', "", visitor.page, flags=re.DOTALL)
        assert not {"\u202e", "\x1b"} & set(outside), path


def test_it_can_be_mounted_under_any_path(conversation_in: ConversationIn) -> None:
    action = drafted(conversation_in(Stage.QUALIFYING, MANUAL))
    app = Starlette(routes=[Mount("/ours/console", console())])
    visitor = Visitor(app, root="/ours/console")
    visitor.look()
    assert 'href="/ours/console/static/console.css"' in visitor.page
    assert f'action="/ours/console/approvals/{action.id}"' in visitor.page
    assert "Path=/ours/console" in visitor.headers["set-cookie"]

    visitor.send(f"/approvals/{action.id}", verb="approve", message=action.draft_message)

    assert fresh(action).status is ActionStatus.APPROVED
    visitor.look("/static/console.css")
    assert visitor.status == 200


def test_the_pulse_is_another_one_when_something_has_happened(
    conversation_in: ConversationIn, foreign: ForeignWriter, fake_sender: FakeSender
) -> None:
    conversation = conversation_in(Stage.QUALIFYING, MANUAL)
    seen = [pulse()]
    action = drafted(conversation)
    seen.append(pulse())
    action.approve(by="dana")
    seen.append(pulse())
    fake_sender.deliver()
    seen.append(pulse())
    receive(conversation.lead_id, "SM1", "Hello?")
    seen.append(pulse())
    conversation.take_over("dana")
    seen.append(pulse())
    conversation.hand_back("dana")
    seen.append(pulse())
    pause_sending("because")
    seen.append(pulse())

    assert len(set(seen)) == len(seen)
    assert pulse() == seen[-1]


def test_a_page_hears_of_what_happened_since_it_was_made(owner: Visitor, conversation_in: ConversationIn) -> None:
    async def heard(seen: str) -> list[str]:
        return [event async for event in events(Pulse(), seen, lasts=0)]

    owner.look()
    found = re.search(r'data-events="/events\?seen=([^"]+)"', owner.page)
    assert found
    assert anyio.run(heard, found[1]) == ["retry: 1000\n\n"]
    drafted(conversation_in(Stage.QUALIFYING, MANUAL))
    assert anyio.run(heard, found[1])[1:] == [f"id: {pulse()}\nevent: changed\ndata: \n\n"]


def test_a_database_that_is_not_there_is_said(owner: Visitor, close_engine_database: peewee.Database) -> None:
    current().execute("DROP TABLE pending_actions")

    owner.look()

    assert owner.status == 503
    assert "The database refused: " in owner.text
    assert "pending_actions" in owner.text
    dana = somebody("dana")
    dana.look()
    assert (dana.status, "pending_actions" in dana.text) == (503, False)
    assert Accounts.of([]).get("nobody") is None
