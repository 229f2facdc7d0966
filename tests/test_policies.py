"""Policies of the worker: when a lead may be texted and how often, by the clock where it is."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, time, timedelta, timezone, tzinfo
from itertools import count
from typing import Any
from zoneinfo import ZoneInfo

import peewee
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    CloseEngineConversation,
    ConfigurationError,
    DailyCap,
    EntryPoint,
    InvalidValue,
    LeaseLost,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    QuietHours,
    Stage,
    Worker,
    outbox,
    policies,
    submit,
)
from close_engine.policies import zone_named
from close_engine.testing import FakeSender, MovableClock, new_lead
from tests.command_line import as_user, postgres_role, run
from tests.servers import execute
from tests.test_roles import WORKER, granted
from tests.waiting import LIMIT, until
from tests.workers import messages, sql

ConversationIn = Callable[..., CloseEngineConversation]

NEW_YORK = "America/New_York"
MINUTE = timedelta(minutes=1)

#: Where clocks are set by half an hour or at midnight, or not at all, or are off by odd minutes, or skipped a day.
ZONES = [
    *(NEW_YORK, "Europe/London", "Australia/Lord_Howe", "Asia/Kolkata", "Pacific/Chatham", "America/Sao_Paulo"),
    *("Pacific/Apia", "Africa/Casablanca", "Asia/Tehran", "America/Havana", "America/St_Johns", "UTC"),
]


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=timezone.utc)  # type: ignore[misc, arg-type]


def worker_with(send: Any, **options: Any) -> Worker:
    return Worker(send, name="worker-7", concurrency=1, sweep=None, idle=timedelta(milliseconds=10), **options)


def reloaded(message: Any) -> OutboxMessage:
    found: OutboxMessage = OutboxMessage.get_by_id(message.id)
    return found


@pytest.fixture
def timezones(database: peewee.Database) -> Callable[[CloseEngineConversation, str | None], None]:
    """Give the CRM's leads a column with their timezone, and return a function that writes one."""
    sql("ALTER TABLE leads ADD COLUMN timezone text")
    place = "%s" if isinstance(database, peewee.PostgresqlDatabase) else "?"

    def write(conversation: CloseEngineConversation, name: str | None) -> None:
        sql(f"UPDATE leads SET timezone = {place} WHERE id = {place}", name, conversation.lead_id)

    return write


# -- the opening


def is_quiet(start: time, end: time, shown: time) -> bool:
    """The model: walk on from the beginning, and see whether this comes before the end."""
    begin, over, now = (moment.hour * 60 + moment.minute for moment in (start, end, shown))
    return (now - begin) % 1440 < (over - begin) % 1440


TIMES = st.integers(0, 1439).map(lambda minutes: time(minutes // 60, minutes % 60))
MOMENTS = st.integers(0, 20 * 366 * 1440).map(lambda minutes: utc(2010, 1, 1) + minutes * MINUTE)


@st.composite
def near_a_change(draw: st.DrawFn) -> tuple[str, datetime]:
    """A zone, and a moment less than a day before one of its clocks is set, if one ever is."""
    name, at = draw(st.sampled_from(ZONES)), draw(MOMENTS)
    zone = ZoneInfo(name)
    for day in range(366):
        if (at + timedelta(days=day)).astimezone(zone).utcoffset() != at.astimezone(zone).utcoffset():
            return name, at + timedelta(days=day) - draw(st.integers(0, 1440)) * MINUTE
    return name, at


@settings(deadline=None, max_examples=150)
@given(place=st.one_of(near_a_change(), st.tuples(st.sampled_from(ZONES), MOMENTS)), start=TIMES, end=TIMES)
@example(place=(NEW_YORK, utc(2026, 3, 8, 6)), start=time(1), end=time(2, 30))  # 02:30 does not exist that day
@example(place=(NEW_YORK, utc(2026, 11, 1, 5)), start=time(0, 30), end=time(1, 30))  # 01:30 comes twice
@example(place=("Australia/Lord_Howe", utc(2026, 4, 4, 14)), start=time(1), end=time(1, 45))  # set back half an hour
@example(place=("Pacific/Apia", utc(2011, 12, 30, 9)), start=time(22), end=time(6))  # there was no 30 December
@example(place=("America/Sao_Paulo", utc(2018, 11, 3, 20)), start=time(20), end=time(0))  # midnight does not exist
def test_the_opening_is_the_earliest_minute_that_is_not_quiet(place: Any, start: time, end: time) -> None:
    assume(start != end)
    name, at = place
    zone = ZoneInfo(name)

    opening = QuietHours(start, end, default="UTC").opening(at, zone)

    minutes = (at + minute * MINUTE for minute in count())
    expected = next(one for one in minutes if not is_quiet(start, end, one.astimezone(zone).time()))
    assert opening == expected
    assert opening.tzinfo is timezone.utc


def test_what_is_not_quiet_opens_at_that_very_moment() -> None:
    quiet = QuietHours(time(20), time(8), default=NEW_YORK)
    last = utc(2027, 1, 15, 0, 59).replace(second=59, microsecond=999000)

    assert quiet.opening(last) == last
    assert quiet.opening(last + timedelta(milliseconds=1)) == utc(2027, 1, 15, 13)
    assert quiet.opening(utc(2027, 1, 15, 13)) == utc(2027, 1, 15, 13)
    assert quiet.opening(utc(2027, 1, 15, 12, 59).replace(second=59, microsecond=1)) == utc(2027, 1, 15, 13)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"start": "8 pm"}, "start cannot be '8 pm': it must be a time such as 20:00, without a timezone."),
        ({"end": time(8, tzinfo=timezone.utc)}, "end cannot be '08:00:00+00:00': it must be a time such as 20:00, "),
        ({"end": 8}, "end cannot be '8': it must be a time"),
        ({"end": "20:00"}, "end cannot be '20:00': the quiet hours must end at another time than they begin."),
        ({"default": "America/New_Yrok"}, "default cannot be 'America/New_Yrok': there is no such timezone; names are"),
        ({"default": "America"}, "default cannot be 'America': there is no such timezone"),
        ({"default": "../../etc/passwd"}, "default cannot be '../../etc/passwd': there is no such timezone"),
        ({"default": None}, "default cannot be None: it must be a name such as America/New_York, or a tzinfo."),
        ({"timezone": 5}, "timezone cannot be 5: it must be a column of the leads, or a function of a lead's id."),
        ({"timezone": ""}, "timezone cannot be '': it must be a column."),
        ({"timezone": "a{b}"}, "timezone cannot be 'a{b}': a column with {, } or % in its name cannot be used: give"),
    ],
)
def test_hours_that_make_no_sense_are_refused(options: Any, sentence: str) -> None:
    arguments = {"start": "20:00", "end": "08:00", "default": NEW_YORK, **options}

    with pytest.raises(InvalidValue) as caught:
        QuietHours(arguments.pop("start"), arguments.pop("end"), **arguments)

    assert str(caught.value).startswith(sentence)


def test_a_coroutine_function_knows_no_timezone() -> None:
    async def zone(lead_id: str) -> str:
        return NEW_YORK

    with pytest.raises(InvalidValue, match="it must be a plain function: a worker awaits nothing"):
        QuietHours("20:00", "08:00", timezone=zone, default=NEW_YORK)  # type: ignore[arg-type]


def test_a_machine_without_timezones_is_told_how_to_get_them() -> None:
    """In a process of its own, because this one has read its timezones."""
    script = """if True:
        import sys, zoneinfo
        sys.modules["tzdata"] = None
        zoneinfo.reset_tzpath(to=())
        import close_engine
        try:
            close_engine.QuietHours("20:00", "08:00", default="America/New_York")
        except close_engine.ConfigurationError as error:
            print(error)
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=LIMIT)

    assert ended.stdout == "This machine knows no timezones: install its package tzdata, or pip install tzdata.\n"


# -- the worker asks


#: A night in New York and a day in Tokyo: 22:00 and 12:00.
NIGHT = utc(2027, 1, 15, 3)
MORNING = utc(2027, 1, 15, 13)


@pytest.fixture
def night(close_engine_clock: MovableClock) -> None:
    close_engine_clock.now = NIGHT


@pytest.mark.parametrize("by", ["column", "function", "default"])
def test_a_text_in_quiet_hours_waits_for_the_next_opening_and_no_attempt_counts(
    by: str,
    night: None,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    fake_sender: FakeSender,
    timezones: Any,
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    message = submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
    timezones(conversation, NEW_YORK)
    ways: dict[str, dict[str, Any]] = {
        "column": {"timezone": "timezone", "default": "Asia/Tokyo"},
        "function": {"timezone": {conversation.lead_id: NEW_YORK}.get, "default": "Asia/Tokyo"},
        "default": {"default": NEW_YORK},
    }
    worker = worker_with(fake_sender, quiet_hours=QuietHours("20:00", "08:00", **ways[by]))

    assert worker.run_until_empty() == 1

    message = reloaded(message)
    assert (message.status, message.available_at, message.attempts) == (MessageStatus.PENDING, MORNING, 0)
    close_engine_clock.now = MORNING - timedelta(milliseconds=1)
    assert worker.run_until_empty() == 0
    close_engine_clock.now = MORNING
    assert worker.run_until_empty() == 1
    assert (reloaded(message).status, reloaded(message).attempts) == (MessageStatus.SENT, 1)
    assert len(fake_sender.sent) == 1


def test_it_keeps_its_place_and_other_leads_texts_and_other_effects_go_on(
    night: None,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    fake_sender: FakeSender,
    timezones: Any,
) -> None:
    asleep, awake = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    timezones(asleep, NEW_YORK)
    timezones(awake, "Asia/Tokyo")
    for body in ("first", "second"):
        for conversation in (asleep, awake):
            outbox.enqueue(conversation, "SEND_MESSAGE", body)
    outbox.enqueue(asleep, "build_site")
    quiet = QuietHours("20:00", "08:00", timezone="timezone", default=NEW_YORK)

    worker_with(fake_sender, quiet_hours=quiet).run_until_empty()

    assert [(one.lead_id, one.body) for one in fake_sender.sent if one.body] == [
        (awake.lead_id, "first"),
        (awake.lead_id, "second"),
    ]
    assert [one.topic for one in fake_sender.sent if not one.body] == ["build_site"]
    close_engine_clock.now = MORNING
    worker_with(fake_sender, quiet_hours=quiet).run_until_empty()
    assert [one.body for one in fake_sender.sent][-2:] == ["first", "second"]


@pytest.mark.parametrize("stored", [None, "Mars/Olympus", "", "America", "a\\b"])
def test_a_lead_whose_timezone_nobody_knows_is_where_the_default_is(
    stored: str | None,
    night: None,
    conversation_in: ConversationIn,
    fake_sender: FakeSender,
    timezones: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    zone_named.cache_clear()
    conversations = [conversation_in(Stage.QUALIFYING) for _ in range(2)]
    for conversation in conversations:
        timezones(conversation, stored)
        outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")

    for zone, sent in ((NEW_YORK, 0), ("Asia/Tokyo", 2)):
        quiet = QuietHours("20:00", "08:00", timezone="timezone", default=zone)
        OutboxMessage.update(available_at=NIGHT).execute()
        worker_with(fake_sender, quiet_hours=quiet).run_until_empty()
        assert len(fake_sender.sent) == sent

    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ([] if stored is None else [f"there is no timezone {stored!r}: the default is taken"])


@pytest.mark.parametrize("found", [ZoneInfo(NEW_YORK), timezone(timedelta(hours=-5)), f" {NEW_YORK} "])
def test_a_function_may_return_a_timezone_itself(
    found: str | tzinfo, night: None, conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    quiet = QuietHours("20:00", "08:00", timezone=lambda lead_id: found, default="Asia/Tokyo")

    worker_with(fake_sender, quiet_hours=quiet).run_until_empty()

    assert reloaded(message).available_at == MORNING


def test_an_error_of_the_function_is_that_messages_own_trouble(
    night: None, conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    failing, wrong, other = (conversation_in(Stage.QUALIFYING) for _ in range(3))
    texts = [outbox.enqueue(one, "SEND_MESSAGE", "Hello!") for one in (failing, wrong, other)]

    def zone(lead_id: str) -> Any:
        if lead_id == failing.lead_id:
            raise KeyError("no such city")
        return 5 if lead_id == wrong.lead_id else "Asia/Tokyo"

    quiet = QuietHours("20:00", "08:00", timezone=zone, default=NEW_YORK)
    worker_with(fake_sender, quiet_hours=quiet).run_until_empty()

    first, second, third = map(reloaded, texts)
    assert (first.status, first.attempts, first.last_error) == (MessageStatus.PENDING, 1, "KeyError: 'no such city'")
    assert second.last_error == (
        "InvalidValue: timezone cannot be 5: it must be a name such as America/New_York, a tzinfo, or None."
    )
    assert third.status is MessageStatus.SENT


def test_a_connection_that_breaks_before_the_policy_is_asked_costs_no_attempt(
    postgres: peewee.Database, postgres_url: str
) -> None:
    message = outbox.enqueue(close_engine.open_conversation(new_lead(), EntryPoint.SMS_REPLY), "SEND_MESSAGE", "Hello!")
    outbox.claim()[0].release()
    sent: list[Any] = []

    class Finding:
        def find(self, message: OutboxMessage) -> None:
            (pid,) = postgres.execute_sql("SELECT pg_backend_pid()").fetchone()
            if not sent:
                execute(postgres_url, f"SELECT pg_terminate_backend({pid}, 60000)")
            sent.append(None)

        def send(self, message: OutboxMessage) -> None:
            sent.append(message.attempts)

    worker = worker_with(Finding(), daily_cap=DailyCap(5, default="UTC"))
    until(lambda: worker.run_until_empty() and reloaded(message).sent_at, "the text was sent")
    assert sent == [None, None, 1]
    assert reloaded(message).last_error is None


def test_what_took_so_long_to_find_out_that_the_lease_is_over_is_not_sent(
    conversation_in: ConversationIn, fake_sender: FakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")

    def zone(lead_id: str) -> str:
        monkeypatch.setattr(OutboxMessage, "is_leased", False)
        return "UTC"

    worker_with(fake_sender, quiet_hours=QuietHours("00:00", "00:01", timezone=zone, default="UTC")).run_once()

    assert fake_sender.sent == []
    assert (reloaded(message).status, reloaded(message).attempts) == (MessageStatus.PENDING, 0)


def test_with_a_policy_a_text_needs_one_statement_more_and_anything_else_none(
    conversation_in: ConversationIn, timezones: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements: list[str] = []
    execute_sql = peewee.Database.execute_sql

    def counted(database: peewee.Database, statement: str, *arguments: Any, **options: Any) -> Any:
        statements.append(statement)
        return execute_sql(database, statement, *arguments, **options)

    def needed(topic: str, policy: QuietHours | None, count: int) -> int:
        for _ in range(count):
            outbox.enqueue(conversation_in(Stage.QUALIFYING), topic, "Hello!")
        statements.clear()
        with monkeypatch.context() as patched:
            patched.setattr(peewee.Database, "execute_sql", counted)
            assert worker_with(lambda message: None, quiet_hours=policy).run_until_empty() == count
        return len(statements)

    def for_each(topic: str, policy: QuietHours | None) -> int:
        return needed(topic, policy, 3) - needed(topic, policy, 2)

    quiet = QuietHours("00:00", "00:01", timezone="timezone", default="UTC")

    assert for_each("SEND_MESSAGE", quiet) - for_each("SEND_MESSAGE", None) == 1
    assert for_each("build_site", quiet) - for_each("build_site", None) == 0


@pytest.mark.parametrize("way", ["run", "run_until_empty"])
def test_a_column_that_is_not_there_is_refused_at_the_start(way: str, conversation_in: ConversationIn) -> None:
    message = outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", "Hello!")
    quiet = QuietHours("20:00", "08:00", timezone=NEW_YORK, default=NEW_YORK)

    with pytest.raises(ConfigurationError) as caught:
        getattr(worker_with(FakeSender(), quiet_hours=quiet), way)()

    assert str(caught.value).startswith(
        "The table leads has no column 'America/New_York' with the timezone of a lead; it has id, phone, "
    )
    assert "default= (--timezone) alone." in str(caught.value)
    assert reloaded(message).attempts == 0


def test_a_column_that_may_not_be_read_is_refused_at_the_start(postgres_url: str, server: str) -> None:
    execute(postgres_url, "ALTER TABLE leads ADD COLUMN timezone text")
    quiet = QuietHours("20:00", "08:00", timezone="timezone", default=NEW_YORK)
    with postgres_role(server) as (role, password):
        some = ["REVOKE SELECT ON leads FROM {role}", "GRANT SELECT (id, phone, autonomy_level) ON leads TO {role}"]
        granted(postgres_url, role, [*WORKER, *some])
        database = close_engine.connect(as_user(postgres_url, role, password))
        try:
            with pytest.raises(peewee.ProgrammingError, match="permission denied for table leads"):
                worker_with(FakeSender(), quiet_hours=quiet).run_until_empty()
            granted(postgres_url, role, ["GRANT SELECT (timezone) ON leads TO {role}"])
            assert worker_with(FakeSender(), quiet_hours=quiet).run_until_empty() == 0
        finally:
            database.close()
            execute(postgres_url, f"DROP OWNED BY {role}")


def test_what_is_no_policy_is_refused(database: peewee.Database) -> None:
    with pytest.raises(InvalidValue, match=r"quiet_hours cannot be .*: it must be a QuietHours\."):
        Worker(FakeSender(), quiet_hours=("20:00", "08:00"))  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match=r"daily_cap cannot be 20: it must be a DailyCap\."):
        Worker(FakeSender(), daily_cap=20)  # type: ignore[arg-type]


# -- the cap


@pytest.fixture
def noon(close_engine_clock: MovableClock) -> None:
    """Noon in New York, and already the next day in Tokyo: 01:00 or 02:00."""
    close_engine_clock.now = utc(2027, 1, 15, 17)


def sent_today(conversation: CloseEngineConversation, count: int, **options: Any) -> None:
    """Send some texts, without a policy."""
    for _ in range(count):
        outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!", **options)
        FakeSender().deliver()


def test_what_the_ai_would_send_beyond_the_cap_a_human_decides(
    noon: None, conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    close_engine.subscribe("tell", events=["cap:reached"], payload={"whom": "dana"})
    looping, other = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    texts = [outbox.enqueue(looping, "SEND_MESSAGE", str(number), submitted_by="ai") for number in range(4)]
    outbox.enqueue(other, "SEND_MESSAGE", "other")
    worker = worker_with(fake_sender, daily_cap=DailyCap(2, default=NEW_YORK), topics=list(ActionType))

    worker.run_until_empty()

    assert [one.body for one in fake_sender.sent] == ["0", "1", "other"]
    for message in map(reloaded, texts[2:]):
        assert (message.status, message.attempts) == (MessageStatus.WITHDRAWN, 0)
        assert message.last_error == "the lead has had 2 texts of the AI today"
        action = PendingAction.get_by_id(message.action_id)
        assert (action.status, action.draft_message) == (ActionStatus.PENDING, message.body)
        assert action.metadata == {"submittedBy": "ai", "ifLeadWrites": "withdraw"}
        assert action.expires_at == action.created_at + timedelta(days=1)
        assert abs(action.created_at - utc(2027, 1, 15, 17)) < MINUTE
    effects = [message for message in messages(looping) if message.topic == "tell"]
    assert [message.payload for message in effects] == [
        {
            "whom": "dana",
            "event": "cap:reached",
            "message_id": one.id,
            "action_id": reloaded(one).action_id,
            "type": "SEND_MESSAGE",
            "cap": 2,
        }
        for one in texts[2:]
    ]


def test_what_a_human_approved_leaves_and_does_not_count(
    noon: None, conversation_in: ConversationIn, fake_sender: FakeSender
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    worker = worker_with(fake_sender, daily_cap=DailyCap(2, default=NEW_YORK))
    for number in range(3):
        outbox.enqueue(conversation, "SEND_MESSAGE", str(number))
    worker.run_until_empty()
    (waiting,) = close_engine.pending_actions()

    waiting.approve(by="dana")
    worker.run_until_empty()
    conversation.reload()
    conversation.take_over(by="dana")
    for _ in range(3):
        submit(conversation, ActionType.SEND_MESSAGE, "dana's", actor="dana")
    worker.run_until_empty()

    assert [one.body for one in fake_sender.sent] == ["0", "1", "2", "dana's", "dana's", "dana's"]
    conversation.hand_back(by="dana")
    outbox.enqueue(conversation, "SEND_MESSAGE", "again")
    worker.run_until_empty()
    assert close_engine.pending_actions().count() == 1

    OutboxMessage.update(sent_at=utc(2027, 1, 14)).where(OutboxMessage.body == "0").execute()
    outbox.enqueue(conversation, "SEND_MESSAGE", "and again")
    worker.run_until_empty()
    assert fake_sender.sent[-1].body == "and again"


@pytest.mark.parametrize("stored", [NEW_YORK, "Asia/Tokyo", None])
def test_the_day_begins_at_midnight_where_the_lead_is(
    stored: str | None,
    conversation_in: ConversationIn,
    close_engine_clock: MovableClock,
    fake_sender: FakeSender,
    timezones: Any,
) -> None:
    midnight = utc(2027, 1, 15, 15) if stored == "Asia/Tokyo" else utc(2027, 1, 16, 5)
    close_engine_clock.now = midnight - timedelta(minutes=2)
    conversation = conversation_in(Stage.QUALIFYING)
    timezones(conversation, stored)
    worker = worker_with(fake_sender, daily_cap=DailyCap(1, timezone="timezone", default=NEW_YORK))

    def texts_that_left() -> int:
        outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")
        worker.run_until_empty()
        return len(fake_sender.sent)

    assert [texts_that_left(), texts_that_left()] == [1, 1]
    close_engine_clock.now = midnight - timedelta(milliseconds=1)
    assert texts_that_left() == 1
    close_engine_clock.now = midnight
    assert [texts_that_left(), texts_that_left()] == [2, 2]


def test_what_cannot_be_read_and_what_is_to_come_count_nothing(
    noon: None, conversation_in: ConversationIn, fake_sender: FakeSender, database: peewee.Database
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    sent_today(conversation, 2)
    strange = "infinity" if isinstance(database, peewee.PostgresqlDatabase) else "some day"
    sql(f"UPDATE {{outbox}} SET sent_at = '{strange}'")
    sent_today(conversation, 1)
    outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")

    worker_with(fake_sender, daily_cap=DailyCap(2, default=NEW_YORK)).run_until_empty()

    assert len(fake_sender.sent) == 1


def test_quiet_hours_come_first(
    night: None, conversation_in: ConversationIn, close_engine_clock: MovableClock, fake_sender: FakeSender
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    sent_today(conversation, 1)
    message = outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")
    both = {
        "quiet_hours": QuietHours("20:00", "08:00", default=NEW_YORK),
        "daily_cap": DailyCap(1, default=NEW_YORK),
    }

    worker_with(fake_sender, **both).run_until_empty()
    assert reloaded(message).available_at == MORNING
    close_engine_clock.now = MORNING
    worker_with(fake_sender, **both).run_until_empty()

    assert reloaded(message).status is MessageStatus.SENT, "it is another day"


def test_only_a_text_that_no_human_has_seen_becomes_an_action_and_only_for_who_holds_it(
    conversation_in: ConversationIn, close_engine_clock: MovableClock
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    for topic in ("SEND_MESSAGE", "build_site"):
        outbox.enqueue(conversation, topic, "Hello!")
    text, effect = sorted(outbox.claim(2, worker="w1"), key=lambda message: message.topic)
    with pytest.raises(InvalidValue, match="topic cannot be 'build_site': only texts to the lead are approved"):
        effect.ask("why not")
    with pytest.raises(InvalidValue, match="a reason must be given"):
        text.ask(" ")

    close_engine_clock.move(timedelta(hours=1))
    (late,) = outbox.claim(worker="w2", topics=["SEND_MESSAGE"])
    with pytest.raises(LeaseLost):
        text.ask("too late")
    assert late.ask("ask dana").status is MessageStatus.WITHDRAWN

    (waiting,) = close_engine.pending_actions()
    waiting.approve(by="dana")
    (seen,) = outbox.claim(worker="w2", topics=["SEND_MESSAGE"])
    with pytest.raises(InvalidValue, match="a human has seen this text already"):
        seen.ask("again")


def test_the_action_and_the_event_commit_together_or_not_at_all(
    noon: None, conversation_in: ConversationIn, fake_sender: FakeSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    sent_today(conversation, 1)
    message = outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")

    def fail(*arguments: Any) -> None:
        raise peewee.ProgrammingError("not this one")

    monkeypatch.setattr(policies, "publish", fail)
    worker_with(fake_sender, daily_cap=DailyCap(1, default=NEW_YORK)).run_until_empty()

    message = reloaded(message)
    assert (message.status, message.action_id) == (MessageStatus.PENDING, None)
    assert (message.attempts, message.last_error) == (1, "ProgrammingError: not this one")
    assert close_engine.pending_actions().count() == 0


def test_with_both_policies_a_text_needs_one_statement_and_finds_what_was_sent_by_index(
    noon: None, conversation_in: ConversationIn, database: peewee.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = conversation_in(Stage.QUALIFYING)
    message = outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")
    statements: list[tuple[str, Any]] = []
    execute_sql = peewee.Database.execute_sql

    def noted(database: peewee.Database, statement: str, parameters: Any = None) -> Any:
        statements.append((statement, parameters))
        return execute_sql(database, statement, parameters)

    with monkeypatch.context() as patched:
        patched.setattr(peewee.Database, "execute_sql", noted)
        held = policies.held_back(
            message, [QuietHours("20:00", "08:00", default=NEW_YORK), DailyCap(3, default=NEW_YORK)]
        )

    ((statement, parameters),) = statements
    assert held is None
    if isinstance(database, peewee.PostgresqlDatabase):
        database.execute_sql("SET enable_seqscan = off")
        explain = "EXPLAIN"
    else:
        explain = "EXPLAIN QUERY PLAN"
    plan = " ".join(str(row) for row in database.execute_sql(f"{explain} {statement}", parameters).fetchall())
    assert "outbox_settled_idx" in plan


@pytest.mark.parametrize("most", [0, -1, 1001, 2.5, "20", None, True])
def test_a_cap_that_makes_no_sense_is_refused(most: Any) -> None:
    with pytest.raises(InvalidValue, match="it must be a whole number from 1 to 1000"):
        DailyCap(most, default=NEW_YORK)


# -- the command


@pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"])
def test_the_command_has_the_policies(
    night: None,
    conversation_in: ConversationIn,
    timezones: Any,
    database: peewee.Database,
    database_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    asleep, awake = conversation_in(Stage.QUALIFYING), conversation_in(Stage.QUALIFYING)
    timezones(awake, "Asia/Tokyo")
    for conversation in (asleep, awake):
        outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")
    outbox.enqueue(awake, "SEND_MESSAGE", "Hello!")
    zones = ("--timezone-column", "timezone", "--timezone", NEW_YORK)
    options = ("--quiet-from", "20:00", "--quiet-until", "08:00", "--daily-cap", "1", *zones)

    assert run("worker", "--until-empty", "--sender", "tests.senders:send", *options).code == 0

    close_engine.bind(database)
    assert [one.status for one in messages()] == [MessageStatus.PENDING, MessageStatus.SENT, MessageStatus.WITHDRAWN]


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--quiet-from", "20:00"), 2, "Give both --quiet-from and --quiet-until, or neither."),
        (
            ("--timezone", NEW_YORK),
            2,
            "--quiet-from and --daily-cap need --timezone, and --timezone needs one of them.",
        ),
        (("--quiet-from", "20:00", "--quiet-until", "08:00"), 2, "--quiet-from and --daily-cap need --timezone"),
        (("--daily-cap", "3"), 2, "--quiet-from and --daily-cap need --timezone, and --timezone needs one of them."),
        (("--daily-cap", "3", "--timezone-column", "tz"), 2, "Say with --timezone where leads are whose timezone"),
        (
            ("--daily-cap", "0", "--timezone", NEW_YORK),
            1,
            "most cannot be 0: it must be a whole number from 1 to 1000.",
        ),
        (("--quiet-from", "8pm", "--quiet-until", "8am", "--timezone", NEW_YORK), 1, "start cannot be '8pm': "),
        (("--quiet-from", "20:00", "--quiet-until", "08:00", "--timezone", "EST6"), 1, "default cannot be 'EST6': "),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: tuple[str, ...], code: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    result = run("worker", "--sender", "tests.senders:send", *options)

    assert result.code == code
    assert sentence in result.err
