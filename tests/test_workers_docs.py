"""The ways to run workers in docs/workers.md, each run as in production: by its own workers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import close_engine
from close_engine import ActionType, EntryPoint, MessageStatus, OutboxMessage, Stage, open_conversation, submit
from close_engine.database.binding import current
from close_engine.testing import new_lead
from close_engine.worker import load_sender
from tests.prose import ROOT, block, blocks
from tests.waiting import LIMIT

PAGE = ROOT / "docs/workers.md"

RunPage = Callable[[str], dict[str, Any]]


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run_page(database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunPage]:
    """Run the page's Python in an empty directory, up to the block that contains this line, and return its names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)

    def run(last: str) -> dict[str, Any]:
        names: dict[str, Any] = {"__name__": "workers"}
        for example in blocks(PAGE):
            if example.language == "python":
                exec(compile("\n" * (example.line - 1) + example.text, str(PAGE), "exec"), names)
                if last in example.text:
                    return names
        raise AssertionError(f"{last} is in no example")

    yield run
    current().database.close()


def submitted(count: int) -> None:
    """Submit a first text for each of this many leads."""
    for _ in range(count):
        submit(open_conversation(new_lead(), EntryPoint.SMS_REPLY), ActionType.SEND_MESSAGE, "Hello!")


def assert_everything_is_sent_once(names: dict[str, Any]) -> None:
    texts = list(OutboxMessage.select().where(OutboxMessage.topic == "SEND_MESSAGE"))
    assert {message.status for message in OutboxMessage.select()} == {MessageStatus.SENT}
    assert [message.attempts for message in texts] == [1] * len(texts)
    assert sorted(names["provider"].ids) == sorted(message.send_key for message in texts)


def test_huey_delivers_with_several_workers(run_page: RunPage) -> None:
    names = run_page("Which colours do you like?")
    submitted(20)
    consumer = names["huey"].create_consumer(workers=2, initial_delay=0.01, max_delay=0.05)

    consumer.start()
    try:
        names["every_minute"].call_local()
        results = [names["deliver"]() for _ in range(3)]
        assert all(isinstance(result.get(blocking=True, timeout=LIMIT), int) for result in results)
    finally:
        consumer.stop(graceful=True)

    assert_everything_is_sent_once(names)


def test_cron_runs_a_script(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "agency.py").write_text(block(PAGE, "python", "# agency.py"))
    script = "from agency import send\nfrom close_engine import Worker\n" + block(PAGE, "python", "# tick.py")
    (tmp_path / "tick.py").write_text(script)
    close_engine.connect(database_url)
    submitted(3)
    environment = {**os.environ, "CLOSE_ENGINE_DATABASE": database_url}

    for printed in ("3\n", "0\n"):
        done = subprocess.run(
            [sys.executable, "tick.py"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=LIMIT,
        )
        assert (done.stdout, done.returncode) == (printed, 0), done.stderr

    assert {message.status for message in OutboxMessage.select()} == {MessageStatus.SENT}
    assert {row.stage for row in close_engine.CloseEngineConversation.select()} == {Stage.QUALIFYING}
    current().database.close()


def test_the_sender_is_found_as_the_systemd_unit_names_it(
    run_page: RunPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "agency.py").write_text(block(PAGE, "python", "# agency.py"))
    monkeypatch.delitem(sys.modules, "agency", raising=False)
    name = block(PAGE, "ini", "ExecStart").partition("--sender ")[2].split()[0]

    sender = load_sender(name)

    assert callable(sender)
    assert sender.__module__ == "agency"
    del sys.modules["agency"]
