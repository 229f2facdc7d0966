"""The demonstration: complete, reproducible, and gone without a trace."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from close_engine import CloseEngineConversation, ConfigurationError, Stage, StageChange
from close_engine.demo import LEAST_LEADS, MISTAKES, Demo, Mistake, Report, temporary_database
from close_engine.errors import StageConflict
from close_engine.machine import TRIGGERS
from tests.command_line import COMMAND, as_user, postgres_role, process, run
from tests.crm import catalog, query

FEW = str(LEAST_LEADS)


@pytest.fixture(params=["sqlite-file", "postgresql"])
def beside(request: pytest.FixtureRequest, tmp_path: Path, server: str) -> Iterator[str]:
    """The URL of a database beside which to play; on PostgreSQL, of a role that nobody else uses."""
    if request.param == "sqlite-file":
        yield f"sqlite:///{tmp_path}/mine.db"
    else:
        with postgres_role(server, "CREATEDB") as (name, password):
            yield as_user(request.getfixturevalue("postgres_url"), name, password)


def play(url: str, leads: int = LEAST_LEADS, seed: int = 1) -> Report:
    """A whole performance."""
    with Demo(url, leads, seed) as demo:
        assert sum(1 for _ in demo.run()) == demo.total
        return demo.report()


def databases(url: str) -> set[str]:
    """What there is beside a database."""
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
    assert report.conversations == LEAST_LEADS
    assert {line.stage: line.now for line in report.stages} == stored
    assert {trigger: count for trigger, count in report.triggers.items() if trigger != "open"} == fired
    assert min(*stored.values(), *fired.values(), *report.refused.values(), report.repeated) > 0
    assert set(report.refused) == set(MISTAKES)
    assert [line.stage for line in report.stages if line.hours is None] == [Stage.COMPLETED]


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
    with pytest.raises(ConfigurationError, match=f"at least {LEAST_LEADS} leads"):
        Demo("sqlite:///:memory:", LEAST_LEADS - 1, 1)


def test_a_mistake_that_is_not_refused_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = Mistake("does nothing wrong", StageConflict, lambda turn: None)
    monkeypatch.setattr("close_engine.demo.MISTAKES", (harmless,))

    with temporary_database() as url:
        problems = play(url).problems

    assert set(problems) == {"It was not refused that somebody does nothing wrong."}


def test_an_error_that_is_not_the_mistakes_own_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("close_engine.demo.MISTAKES", (Mistake("fails", StageConflict, lambda turn: 1 / 0),))

    with temporary_database() as url, pytest.raises(ZeroDivisionError):
        play(url)


def test_a_history_that_does_not_lead_to_the_stored_stage_is_a_problem(beside: str) -> None:
    with temporary_database(beside) as url, Demo(url, LEAST_LEADS, 1) as demo:
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
    assert all(mistake.what in result.out for mistake in MISTAKES)
    assert result.out.startswith("\nPipeline")
    assert result.out.endswith("The history replays to every stored stage, and verify finds nothing wrong.\n")
    assert databases(beside) == there
    assert tables == (catalog(beside) if beside.startswith("postgres") else {})


def test_the_command_tells_of_what_must_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("close_engine.demo.verify", lambda: ["The moon is missing."])

    result = run("demo", "--leads", FEW)

    assert (result.code, result.err) == (1, "The demo found what must not be:\n  - The moon is missing.\n")
    assert "verify finds nothing wrong" not in result.out


def test_the_command_ignores_the_database_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", "postgresql://127.0.0.1:1/production")

    assert run("demo", "--leads", FEW).code == 0
    assert run("demo", "--leads", FEW, "--database", "sqlite:///:memory:").code == 0


def test_a_server_that_allows_no_temporary_database_is_a_sentence(postgres_url: str, server: str) -> None:
    with postgres_role(server) as (name, password):
        result = run("demo", "--database", as_user(postgres_url, name, password))

    assert (result.code, result.out) == (1, "")
    assert "permission denied to create database. Use a role with CREATEDB, or leave --database out" in result.err
    assert password not in result.err


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        (
            "postgresql://ana:s3cret@127.0.0.1:1/crm",
            "beside postgresql://ana:***@127.0.0.1:1/crm: connection to server",
        ),
        ("sqlite:////no/such/place/mine.db", "in /no/such/place: No such file or directory."),
    ],
)
def test_a_place_that_cannot_be_used_is_a_sentence(url: str, sentence: str) -> None:
    result = run("demo", "--database", url)

    assert (result.code, result.out) == (1, "")
    assert f"The demo cannot make a temporary database {sentence}" in result.err


def test_interrupted_it_leaves_nothing_behind(beside: str) -> None:
    there = databases(beside)
    playing: Any = subprocess.Popen(
        [COMMAND, "demo", "--leads", "5000", "--database", beside], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while databases(beside) == there:
        assert playing.poll() is None

    playing.send_signal(signal.SIGINT)
    out, err = playing.communicate()

    assert (playing.returncode, out, err) == (130, b"", b"")
    assert databases(beside) == there


def test_it_runs_in_a_process_of_its_own_without_animation(tmp_path: Path) -> None:
    result = process("demo", "--leads", FEW, cwd=tmp_path)

    assert (result.code, result.err) == (0, "")
    assert "\x1b" not in result.out
    assert list(tmp_path.iterdir()) == []
