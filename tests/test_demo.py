"""The demonstration: it is complete and reproducible, and leaves no trace."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import peewee
import psycopg2
import pytest

from close_engine import (
    ActionStatus,
    ActionType,
    CloseEngineConversation,
    CloseEngineError,
    ConfigurationError,
    Direction,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    StageChange,
)
from close_engine.database.binding import now
from close_engine.database.fields import create_id
from close_engine.demo.mistakes import MISTAKES, Mistake
from close_engine.demo.place import temporary_database
from close_engine.demo.play import MIN_LEADS, Demo
from close_engine.demo.report import Report
from close_engine.demo.stories import STORIES
from close_engine.demo.story import tell
from close_engine.errors import StageConflict
from close_engine.inbox import receive
from close_engine.machine import TRIGGERS
from tests.command_line import COMMAND, as_user, background, postgres_role, process, run
from tests.crm import catalog, query
from tests.waiting import until

FEW = str(MIN_LEADS)


@pytest.fixture(params=["sqlite-file", "postgresql"])
def beside(request: pytest.FixtureRequest, tmp_path: Path, server: str) -> Iterator[str]:
    """The URL of the database next to which the demonstration makes its own; on PostgreSQL, with its own role."""
    if request.param == "sqlite-file":
        yield f"sqlite:///{tmp_path}/mine.db"
    else:
        with postgres_role(server, "CREATEDB") as (name, password):
            yield as_user(request.getfixturevalue("postgres_url"), name, password)


def play(url: str, leads: int = MIN_LEADS, seed: int = 1) -> Report:
    """Run a whole demonstration."""
    with Demo(url, leads, seed) as demo:
        assert sum(1 for _ in demo.run()) == demo.total
        return demo.report()


def databases(url: str) -> set[str]:
    """List what exists next to a database."""
    if url.startswith("sqlite"):
        return {path.name for path in Path(urlsplit(url).path[1:]).parent.rglob("*.db")}
    owned = "SELECT datname FROM pg_database WHERE datdba = current_user::regrole AND datname LIKE 'close_engine_demo%'"
    return {name for (name,) in query(url, owned)}


def test_even_few_leads_show_every_stage_trigger_and_mistake(beside: str) -> None:
    with temporary_database(beside) as url:
        report = play(url)
        stored = {stage: CloseEngineConversation.in_stages(stage).count() for stage in Stage}
        fired = {trigger: StageChange.select().where(StageChange.trigger == trigger).count() for trigger in TRIGGERS}

    assert report.problems == []
    assert report.conversations == MIN_LEADS
    assert {line.stage: line.now for line in report.stages} == stored
    assert {trigger: count for trigger, count in report.triggers.items() if trigger != "open"} == fired
    assert min(*stored.values(), *fired.values(), *report.refused.values(), *report.repeated.values()) > 0
    assert set(report.refused) == set(MISTAKES)
    assert [line.stage for line in report.stages if line.stay is None] == [Stage.COMPLETED]


def test_even_few_leads_show_every_way_of_a_draft_and_of_a_message_at_every_level(beside: str) -> None:
    with temporary_database(beside) as url:
        report = play(url)
        actions = {(one.type, one.status) for one in PendingAction.select()}
        messages = list(OutboxMessage.select())

    assert set(report.approvals) == actions
    assert {status for _, status in actions} == set(ActionStatus)
    assert {type for type, _ in actions} == set(ActionType)
    assert {status for _, status in report.outbox} >= {MessageStatus.SENT, MessageStatus.DEAD, MessageStatus.WITHDRAWN}
    assert sum(report.outbox.values()) == len(messages)
    assert set(report.repeated) == {"opening", "draft", "approval", "inbound text", "payment"}
    assert min(report.corrected, report.unanswered) > 0
    full, semi, manual = report.levels
    assert min(full.paid, semi.paid, manual.paid, full.unapproved, semi.unapproved, semi.approved, manual.approved) > 0
    assert (full.approved, manual.unapproved) == (0, 0)
    assert sum(line.unapproved + line.approved for line in report.levels) == sum(
        one.sent_at is not None for one in messages
    )


def test_a_worker_that_is_killed_in_mid_send_loses_nothing_and_nothing_is_recorded_twice(beside: str) -> None:
    with temporary_database(beside) as url:
        report = play(url)
        by_them = list(OutboxMessage.select().where(OutboxMessage.leased_by.in_(["worker-5", "worker-6"])))

    end = report.handover
    assert {end.killed, end.survivor} == {"worker-5", "worker-6"}
    assert (end.topic, end.attempts, end.asked, end.texts, end.exit_code) == ("SEND_PREVIEW", 2, 1, 1, 0)
    assert end.messages == len(by_them) > 2
    assert {one.status for one in by_them} == {MessageStatus.SENT}
    assert [(one.leased_by, one.topic) for one in by_them if one.attempts > 1] == [(end.survivor, "SEND_PREVIEW")]
    assert report.problems == []


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_whatever_the_seed_everything_occurs(seed: int) -> None:
    with temporary_database() as url:
        report = play(url, seed=seed)

    assert report.problems == []
    assert min(*report.refused.values(), *report.triggers.values(), *(line.now for line in report.stages)) > 0


def test_the_same_seed_tells_the_same_story_on_every_database(beside: str) -> None:
    with temporary_database() as url:
        reference = play(url, 30, seed=7)
    with temporary_database(beside) as url:
        again = play(url, 30, seed=7)
    with temporary_database() as url:
        other = play(url, 30, seed=8)

    assert again == reference
    assert other != reference


def test_it_needs_enough_leads() -> None:
    with pytest.raises(ConfigurationError, match=f"at least {MIN_LEADS} leads"):
        Demo("sqlite:///:memory:", MIN_LEADS - 1, 1)


def test_a_mistake_that_is_not_refused_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Mistake("doing nothing wrong", StageConflict, lambda turn: None)
    monkeypatch.setattr("close_engine.demo.play.MISTAKES", (harmless,))

    with temporary_database() as url:
        problems = play(url).problems

    assert set(problems) == {"This mistake was not refused: doing nothing wrong."}


def test_messages_that_are_not_what_the_provider_knows_are_problems(beside: str) -> None:
    with temporary_database(beside) as url, Demo(url, MIN_LEADS, 1) as demo:
        for _ in demo.run():
            pass
        sent = OutboxMessage.select().where(OutboxMessage.sent_at.is_null(False))
        with_two = sent.group_by(OutboxMessage.conversation_id).having(peewee.fn.COUNT(OutboxMessage.id) > 1)
        talkative = with_two.select(OutboxMessage.conversation_id)
        late = sent.where(OutboxMessage.conversation_id.in_(talkative)).order_by(OutboxMessage.id).first()
        last = sent.where(OutboxMessage.conversation_id != late.conversation_id).first()
        OutboxMessage.update(sent_at=now()).where(OutboxMessage.id == late.id).execute()
        forgotten = {"status": MessageStatus.PENDING, "sent_at": None}
        OutboxMessage.update(forgotten).where(OutboxMessage.id == last.id).execute()
        problems = demo.report().problems

    assert f"{last.send_key} was delivered 1 times, but recorded 0 times." in problems
    assert any(f"{last.id}" in problem and "is still leased by" in problem for problem in problems)
    assert any("was sent before an older message of its conversation" in problem for problem in problems)


def test_what_is_done_twice_where_it_is_reported_twice_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("close_engine.demo.play.receive", lambda lead, key, text: receive(lead, create_id(), text))

    with temporary_database() as url:
        problems = play(url).problems

    assert problems
    assert all(problem.startswith("The same inbound text was processed twice: Received(") for problem in problems)


def test_what_should_have_expired_and_has_not_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("close_engine.demo.play.sweep", lambda: None)

    with temporary_database() as url:
        problems = play(url).problems

    assert any("still waits for it" in problem for problem in problems)


def test_a_worker_process_that_dies_by_itself_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with temporary_database() as url, Demo(url, MIN_LEADS, 1) as demo:
        steps = demo.run()
        for _ in range(demo.total - 1):
            next(steps)
        demo._url = "nowhere"
        with pytest.raises(CloseEngineError, match=r"The process worker-\d died unexpectedly\."):
            next(steps)

    assert "The database URL 'nowhere' cannot be used" in capfd.readouterr().err


def test_an_error_that_is_not_the_mistakes_own_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("close_engine.demo.play.MISTAKES", (Mistake("fails", StageConflict, lambda turn: 1 / 0),))

    with temporary_database() as url, pytest.raises(ZeroDivisionError):
        play(url)


def test_a_history_that_does_not_lead_to_the_stored_stage_is_a_problem(beside: str) -> None:
    with temporary_database(beside) as url, Demo(url, MIN_LEADS, 1) as demo:
        for _ in demo.run():
            pass
        first = StageChange.select().where(StageChange.trigger == "start_qualifying").first()
        StageChange.delete().where(StageChange.id == first.id).execute()
        last = StageChange.select().where(StageChange.trigger == "complete").first()
        StageChange.delete().where(StageChange.id == last.id).execute()
        problems = demo.report().problems

    assert f"The history of {last.conversation_id} does not lead to COMPLETED." in problems
    assert sum(f"The history of {first.conversation_id} has a gap before" in problem for problem in problems) == 1


def test_the_command_shows_the_pipeline_and_leaves_nothing_behind(beside: str) -> None:
    there, tables = databases(beside), catalog(beside) if beside.startswith("postgres") else {}

    result = run("demo", "--leads", FEW, "--database", beside)

    assert (result.code, result.err) == (0, "")
    listed = {line[0] for line in result.lines if line}
    assert {stage.value for stage in Stage} <= listed
    assert all(mistake.description in result.out for mistake in MISTAKES)
    assert result.out.startswith("\nPipeline")
    assert "was killed (SIGKILL) in the middle of sending a SEND_PREVIEW" in " ".join(result.out.split())
    _, _, story = result.out.partition("was sent exactly as often as recorded, and verify finds nothing wrong.\n\n")
    assert story.startswith("One conversation told whole: ")
    assert databases(beside) == there
    assert tables == (catalog(beside) if beside.startswith("postgres") else {})


@pytest.fixture(scope="module")
def all_told() -> dict[str, list[str]]:
    """What is told of every story."""
    with temporary_database() as url, Demo(url, MIN_LEADS, 1) as demo:
        for _ in demo.run():
            pass
        return {role.story.meaning: [line.what for line in tell(role.conversation)] for role in demo._roles}


def test_one_conversation_is_told_whole(beside: str) -> None:
    with temporary_database(beside) as url, Demo(url, MIN_LEADS, 1) as demo:
        for _ in demo.run():
            pass
        conversation = demo.hero.conversation
        told = tell(conversation)
        texts, changes = conversation.messages(), conversation.history()
        actions = list(PendingAction.select().where(PendingAction.conversation_id == conversation.id))

    def said(beginning: str) -> int:
        return sum(line.what.startswith(beginning) for line in told)

    assert [line.at for line in told] == sorted(line.at for line in told)
    assert said("texts: ") == sum(text.is_said and text.direction is Direction.OUTBOUND for text in texts) > 1
    assert said("writes: ") == sum(text.direction is Direction.INBOUND for text in texts) > 0
    assert [line.what.partition(" (")[0] for line in told if "→" in line.what] == [
        f"{change.source} → {change.dest}" for change in changes[1:]
    ]
    assert said("drafts ") == len(actions)
    assert said("approves it") == sum(action.status is ActionStatus.APPROVED for action in actions) > 1
    assert said("rejects it") == sum(action.status is ActionStatus.REJECTED for action in actions) > 1
    assert said("pays 900.00 USD") == 1
    assert told[-1].what == "PAYMENT_SENT → COMPLETED"


def test_whatever_the_story_it_can_be_told(all_told: dict[str, list[str]]) -> None:
    assert all_told.keys() == {story.meaning for story in STORIES}
    assert all(told[0] == "opens the conversation as INITIATED" for told in all_told.values())


def test_what_never_left_and_what_nobody_decided_is_told_too(all_told: dict[str, list[str]]) -> None:
    never = "would have texted: “Hi! What do you do?” (dead, because CannotBeSent: this number cannot receive texts)"
    assert never in all_told["has no number for texts"]
    assert "nobody has decided in time: the draft expires" in all_told["nobody approves the link in time"]


def test_the_command_tells_only_the_story_if_asked() -> None:
    result = run("demo", "--story")

    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("One conversation told whole: a human corrects and says no")
    assert "Pipeline" not in result.out


def test_the_command_tells_of_what_must_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("close_engine.demo.audit.verify", lambda: ["The moon is missing."])

    result = run("demo", "--leads", FEW)

    assert (result.code, result.err) == (1, "The demo found problems:\n  - The moon is missing.\n")
    assert "verify finds nothing wrong" not in result.out


def test_the_command_ignores_the_database_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    nobody_listens: str,
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", f"postgresql://{nobody_listens}/production")

    assert run("demo", "--leads", FEW).code == 0
    assert run("demo", "--leads", FEW, "--database", "sqlite:///:memory:").code == 0


def test_a_server_that_allows_no_temporary_database_is_a_sentence(postgres_url: str, server: str) -> None:
    with postgres_role(server) as (name, password):
        result = run("demo", "--database", as_user(postgres_url, name, password))

    assert (result.code, result.out) == (1, "")
    assert "permission denied to create database. Use a role with CREATEDB, or omit --database" in result.err
    assert password not in result.err


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (
            "postgresql://ana:s3cret@{nobody_listens}/crm",
            "next to postgresql://ana:***@{nobody_listens}/crm: connection to server",
        ),
        ("sqlite:////no/such/place/mine.db", "in /no/such/place: No such file or directory."),
    ],
)
def test_a_place_that_cannot_be_used_is_a_sentence(url: str, sentence: str, nobody_listens: str) -> None:
    result = run("demo", "--database", url.format(nobody_listens=nobody_listens))

    assert (result.code, result.out) == (1, "")
    why = sentence.format(nobody_listens=nobody_listens)
    assert f"The demo cannot create a temporary database {why}" in result.err


def plays(beside: str, there: set[str]) -> bool:
    """Whether there are conversations in the temporary database."""
    for name in databases(beside) - there:
        parts = urlsplit(beside)
        if beside.startswith("sqlite"):
            (path,) = Path(parts.path[1:]).parent.rglob(name)
            url = f"sqlite:///{path}"
        else:
            url = urlunsplit(parts._replace(path=f"/{name}"))
        # It may not be migrated yet, or not be open to others.
        with suppress(sqlite3.OperationalError, psycopg2.Error):
            return query(url, "SELECT count(*) > 10 FROM close_engine_conversations")[0][0] in (1, True)
    return False


def test_interrupted_it_leaves_nothing_behind(beside: str) -> None:
    there = databases(beside)
    command = [COMMAND, "demo", "--leads", "5000", "--database", beside]
    with background(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as playing:

        def it_plays() -> bool:
            assert playing.poll() is None, playing.communicate()
            return plays(beside, there)

        until(it_plays, "the demo plays")
        playing.send_signal(signal.SIGINT)
        out, err = playing.communicate()

    assert (playing.returncode, out, err) == (130, b"", b"")
    assert databases(beside) == there


def test_it_runs_in_a_process_of_its_own_without_animation(tmp_path: Path) -> None:
    result = process("demo", "--leads", FEW, cwd=tmp_path)

    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    assert list(tmp_path.iterdir()) == []
