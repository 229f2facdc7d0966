"""The commands for people who approve drafts, run workers and watch the pipeline."""

from __future__ import annotations

import logging
import os
import pty
import re
import signal
import subprocess
from contextlib import AbstractContextManager, closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    outbox,
    submit,
)
from tests.command_line import COMMAND, Result, as_user, background, process, refused, run
from tests.crm import query
from tests.foreign import ForeignWriter
from tests.servers import execute
from tests.test_cases_turn import refuse_in_the_crm
from tests.waiting import until

ROOT = Path(__file__).parent.parent


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """Only these two: a database in memory ends with its process, so a command cannot open it."""
    return str(request.param)


@pytest.fixture
def action(conversation_in: Any, database_url: str, monkeypatch: pytest.MonkeyPatch) -> PendingAction:
    """A payment link that waits for approval, in the database that the environment names."""
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    conversation = conversation_in(Stage.PREVIEW_SENT, AutonomyLevel.SEMI_AUTO)
    made = submit(
        conversation,
        ActionType.SEND_PAYMENT_LINK,
        "Shall we\x1b[2J?",
        metadata={"paymentUrl": "https://pay.example.com/1"},
    )
    assert isinstance(made, PendingAction)
    return made


@pytest.fixture
def messages(conversation_in: Any, database_url: str, monkeypatch: pytest.MonkeyPatch) -> list[OutboxMessage]:
    """Two messages to send, in the database that the environment names."""
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    return [outbox.enqueue(conversation_in(Stage.QUALIFYING), "SEND_MESSAGE", text) for text in ("Hello!", "Hi!")]


def stage_of(action: PendingAction) -> Stage:
    return close_engine.CloseEngineConversation.get_by_id(action.conversation_id).stage


# -- approvals -------------------------------------------------------------------------------------------------------


def test_actions_lists_what_waits_for_approval(action: PendingAction) -> None:
    result = run("actions")

    assert (result.code, result.err) == (0, "")
    (listed,) = (line for line in result.out.splitlines() if line.startswith(action.id))
    assert listed.split()[1:3] == ["SEND_PAYMENT_LINK", action.lead_id]
    assert "24.0 h" in listed
    assert "Shall we\\x1b[2J?" in listed


def test_actions_may_be_narrowed_to_a_type(action: PendingAction) -> None:
    assert action.id in run("actions", "--type", "SEND_PAYMENT_LINK").out
    assert run("actions", "--type", "SEND_MESSAGE") == Result(0, "Nothing is waiting for approval.\n", "")
    assert run("actions", "--type", "SEND_FLOWERS").code == 2


def test_an_action_that_can_be_approved_for_ever_has_no_end(action: PendingAction) -> None:
    PendingAction.update(expires_at=None).where(PendingAction.id == action.id).execute()

    assert " -            Shall we" in run("actions").out


def test_approve_puts_it_into_the_outbox_once(action: PendingAction, database: Any) -> None:
    first = run("approve", action.id, "--by", "dana", "--message", "Here it is:")
    again = run("approve", action.id, "--by", "ana")

    close_engine.bind(database)
    (message,) = OutboxMessage.select()
    assert first == Result(0, f"Action {action.id!r} is approved. It is message {message.id} in the outbox.\n", "")
    assert (
        again.out == f"Action {action.id!r} was already approved by dana. It is message {message.id} in the outbox.\n"
    )
    assert (message.body, message.approved_by) == ("Here it is:", "dana")


def test_reject_takes_the_conversation_back_once(action: PendingAction, database: Any) -> None:
    first = run("reject", action.id, "--by", "dana", "--reason", "too pushy")
    again = run("reject", action.id, "--by", "ana")

    assert first == Result(0, f"Action {action.id!r} is rejected.\n", "")
    assert again == Result(0, f"Action {action.id!r} was already rejected by dana.\n", "")
    close_engine.bind(database)
    assert stage_of(action) is Stage.PREVIEW_SENT
    assert OutboxMessage.select().count() == 0


def test_what_is_decided_otherwise_is_refused_with_a_sentence(action: PendingAction) -> None:
    run("reject", action.id, "--by", "dana")

    assert "REJECTED" in refused("approve", action.id, "--by", "dana")


@pytest.mark.parametrize("command", ["approve", "reject"])
def test_a_decision_needs_an_action_and_somebody_who_takes_it(action: PendingAction, command: str) -> None:
    assert refused(command, "a9", "--by", "dana") == "There is no action 'a9'.\n"
    assert "by cannot be ' ': it must say who decides" in run(command, action.id, "--by", " ").err
    assert run(command, action.id).code == 2


# -- the outbox ------------------------------------------------------------------------------------------------------


def test_outbox_shows_counts_the_lag_and_what_is_dead(messages: list[OutboxMessage]) -> None:
    assert "Dead" not in run("outbox").out
    outbox.claim(limit=1)[0].give_up("no such\x1b[2J number")

    result = run("outbox")

    assert (result.code, result.err) == (0, "")
    assert ["pending", "1"] in result.lines
    assert ["of", "which", "in", "flight", "0"] in result.lines
    assert ["dead", "1"] in result.lines
    assert any(line[:4] == ["next", "one", "waiting", "for"] and line[5] == "s" for line in result.lines)
    (dead,) = (line for line in result.out.splitlines() if "no such" in line)
    assert f" {messages[0].id}: no such" in dead
    assert "\x1b" not in dead


def test_dead_messages_are_shown_by_kind_and_put_back_by_kind(
    messages: list[OutboxMessage], database: Any, close_engine_clock: Any
) -> None:
    for number, kind in enumerate(("HTTPError", "HTTPError", "CannotBeSent")):
        message = outbox.enqueue(messages[0].conversation_id, f"effect {number}")
        outbox.claim(topics=[message.topic])[0].give_up(f"{kind}: {number}")
    close_engine_clock.let_go()

    lines = [line for line in run("outbox").lines if line and line[0] in ("HTTPError", "CannotBeSent")]
    assert [line[:2] for line in lines] == [["HTTPError", "2"], ["CannotBeSent", "1"]]

    assert run("outbox", "requeue", "--error", "HTTPError").out == "Messages that will be sent again: 2.\n"
    assert run("outbox", "requeue", "--since", "2099-01-01T00:00Z").out == "Messages that will be sent again: 0.\n"
    assert run("outbox", "requeue", "--all").out == "Messages that will be sent again: 1.\n"
    for wrong in ((), ("7", "--all"), ("--all", "--body", "Hello"), ("--since", "2099-01-01")):
        assert run("outbox", "requeue", *wrong).code == 2


def test_a_dead_text_can_be_put_back_with_other_words(messages: list[OutboxMessage], database: Any) -> None:
    dead = outbox.claim()[0].give_up("misspelt")

    assert run("outbox", "requeue", str(dead.id), "--body", "Hello!").code == 0

    close_engine.bind(database)
    assert OutboxMessage.get_by_id(dead.id).body == "Hello!"


def test_requeue_puts_a_dead_message_back(messages: list[OutboxMessage], database: Any) -> None:
    dead = outbox.claim(limit=1)[0].give_up("no such number")

    result = run("outbox", "requeue", str(dead.id))

    assert result == Result(0, f"Message {dead.id} will be sent again.\n", "")
    close_engine.bind(database)
    assert OutboxMessage.get_by_id(dead.id).status is MessageStatus.PENDING
    assert "only a DEAD one, or one that was not delivered, can be put back" in refused(
        "outbox", "requeue", str(dead.id)
    )
    assert run("outbox", "requeue", str(2**63)).code == 2
    assert refused("outbox", "requeue", "99") == "There is no message 99 in the outbox.\n"


def test_the_shared_options_may_stand_anywhere_around_a_command_below_another(
    messages: list[OutboxMessage], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = outbox.claim(limit=1)[0].give_up("no such number")
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", "sqlite:////no/such/place.db")
    given = ("--database", database_url)

    assert run("outbox", *given).code == 0
    assert run("outbox", *given, "requeue", str(dead.id)).code == 0
    assert "only a DEAD one" in refused("outbox", "requeue", str(dead.id), *given)
    assert "only a DEAD one" in refused(*given, "outbox", "requeue", str(dead.id))


# -- sweep and worker ------------------------------------------------------------------------------------------------


def test_sweep_says_what_it_moved(action: PendingAction, conversation_in: Any, close_engine_clock: Any) -> None:
    close_engine_clock.move(-timedelta(days=4))
    conversation_in(Stage.BUILDING)
    close_engine_clock.move(timedelta(days=4))
    PendingAction.update(expires_at=close_engine_clock()).where(PendingAction.id == action.id).execute()

    swept, again = run("sweep"), run("sweep")

    assert swept.out == (
        "Conversations stalled: 1, lost: 0. Actions expired: 1. Approvals withdrawn: 0. "
        "Messages released from dead workers: 0.\n"
    )
    assert "stalled: 0, lost: 0. Actions expired: 0." in again.out


def test_the_limits_of_the_sweeps_can_be_given(
    messages: list[OutboxMessage], conversation_in: Any, close_engine_clock: Any
) -> None:
    conversation_in(Stage.BUILDING)
    close_engine_clock.move(timedelta(hours=5))

    assert "stalled: 0, lost: 0" in run("sweep").out
    assert "stalled: 3, lost: 0" in run("sweep", "--stall-after", "4", "--lose-after", "2").out
    close_engine_clock.let_go()
    assert "stalled: 0, lost: 0" in run("sweep", "--stall-after", "4").out
    wrong = run("sweep", "--lose-after", "soon")
    assert (wrong.code, wrong.out) == (2, "")
    assert "'soon' is not a number of days." in wrong.err


def test_what_the_sweep_passes_over_is_listed_and_its_exit_status_tells(
    conversation_in: Any, database_url: str, close_engine_clock: Any, foreign: ForeignWriter
) -> None:
    """B5: a trigger of the CRM's refuses one of them."""
    close_engine_clock.rule()
    conversations = [conversation_in(Stage.BUILDING) for _ in range(2)]
    refuse_in_the_crm(foreign, "close_engine_conversations", conversations[0].id)
    close_engine_clock.move(timedelta(days=4))

    swept = run("sweep", "--database", database_url)

    first, second = swept.out.splitlines()
    assert (swept.code, swept.err) == (1, "")
    assert first.startswith("Conversations stalled: 1, lost: 0.")
    assert second.startswith(f"Passed over {conversations[0].id}: ")
    assert "not this one" in second


def test_what_waits_for_us_is_closed_if_that_is_asked_for(
    conversation_in: Any, database_url: str, close_engine_clock: Any
) -> None:
    conversation = conversation_in(Stage.BUILDING)
    close_engine.receive(conversation.lead_id, "SM1", "Hello?")
    close_engine_clock.move(timedelta(days=31))

    place = "--database", database_url
    assert "stalled: 0, lost: 0" in run("sweep", *place).out
    assert "stalled: 0, lost: 1" in run("sweep", *place, "--lose-unanswered-after", "30").out


def test_a_worker_sends_until_nothing_is_left(messages: list[OutboxMessage], database: Any) -> None:
    result = run("worker", "--until-empty", "--name", "w1", "--sender", "tests.senders:send")

    assert result == Result(0, "", "")
    close_engine.bind(database)
    sent = OutboxMessage.select().order_by(OutboxMessage.id)
    assert [(one.status, one.provider_id, one.leased_by) for one in sent] == [
        (MessageStatus.SENT, f"SM-{one.id}", "w1") for one in messages
    ]


def test_a_worker_prints_what_it_would_send_and_marks_nothing(messages: list[OutboxMessage], database: Any) -> None:
    result = run("worker", "--print")

    assert result.out == "".join(f"SEND_MESSAGE to lead {one.lead_id}: {one.body}\n" for one in messages)
    close_engine.bind(database)
    assert {(one.status, one.claims) for one in OutboxMessage.select()} == {(MessageStatus.PENDING, 0)}
    assert run("worker", "--print", "--topic", "nothing").out == ""
    assert run("worker", "--print", "--topic", "SEND_MESSAGE").out == result.out


def test_a_worker_imports_what_registers_hooks(
    messages: list[OutboxMessage], kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "hooks_on_" + kind.replace("-", "_")
    (tmp_path / f"{module}.py").write_text("print('registered')")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = ("--until-empty", "--topic", "nothing", "--sender", "tests.senders:send")

    assert run("worker", "--import", module, *options).out == "registered\n"
    missing = run("worker", "--import", "no_such_module", *options)
    assert (missing.code, missing.err) == (
        1,
        "The module 'no_such_module' cannot be imported: No module named 'no_such_module'.\n",
    )


@pytest.mark.parametrize(("option", "stage"), [((), Stage.STALLED), (("--no-sweep",), Stage.BUILDING)])
def test_a_worker_sweeps_unless_it_is_told_not_to(
    option: Any,
    stage: Stage,
    messages: list[OutboxMessage],
    conversation_in: Any,
    close_engine_clock: Any,
    database: Any,
) -> None:
    close_engine_clock.move(-timedelta(days=4))
    silent = conversation_in(Stage.BUILDING)
    close_engine_clock.move(timedelta(days=4))

    assert run("worker", "--until-empty", "--sender", "tests.senders:send", *option).code == 0

    close_engine.bind(database)
    silent.reload()
    assert silent.stage is stage


def test_a_worker_that_is_told_to_stop_ends_what_it_sends_and_gives_the_rest_back(
    messages: list[OutboxMessage], database: Any
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    result = run("worker", "--sender", "tests.senders:stop_the_worker", "--concurrency", "1")

    assert result == Result(0, "", "")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    close_engine.bind(database)
    first, second = OutboxMessage.select().order_by(OutboxMessage.id)
    assert (first.status, second.status) == (MessageStatus.SENT, MessageStatus.PENDING)
    assert (second.leased_by, second.attempts) == (None, 0)


SENDER = ("--sender", "tests.senders:send")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--sender", "send"), "The sender 'send' must have the form module:name."),
        (("--sender", "no_such_module:send"), "The module 'no_such_module' cannot be imported"),
        (("--sender", ".:x"), "The module '.' cannot be imported"),
        ((*SENDER, "--concurrency", "0"), "concurrency cannot be 0: it must be at least 1"),
        ((*SENDER, "--lease", "0"), "lease cannot be '0:00:00': it must be greater than zero"),
        ((*SENDER, "--lease", "1e12"), "lease cannot be '11574074 days, 1:46:40': it can be at most 30 days"),
        ((*SENDER, "--idle", "1e10"), "idle cannot be '115740 days, 17:46:40': it can be at most 30 days"),
        ((*SENDER, "--sweep-every", "1e12"), "sweep_every cannot be"),
    ],
)
def test_a_worker_that_could_not_work_is_refused(messages: list[OutboxMessage], arguments: Any, sentence: str) -> None:
    result = run("worker", "--until-empty", *arguments)

    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(sentence)


@pytest.mark.parametrize("seconds", ["soon", "nan", "1e300"])
def test_what_is_no_number_of_seconds_cannot_be_understood(seconds: str) -> None:
    result = run("worker", "--lease", seconds)

    assert (result.code, result.out) == (2, "")
    assert "is not a number of seconds." in result.err


def test_a_worker_waits_for_the_database_to_start_with(postgres_url: str) -> None:
    """G8: it is away when the command starts."""
    name = urlsplit(postgres_url).path.removeprefix("/")
    server = postgres_url.replace(f"/{name}", "/postgres", 1)
    execute(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    with worker(postgres_url, "--sender", "tests.senders:send") as working:
        assert working.stderr is not None
        assert "started" in working.stderr.readline()
        assert "database unreachable" in working.stderr.readline()
        execute(server, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        working.terminate()
        working.communicate()

    assert working.returncode == 0


def worker(database_url: str, *arguments: str) -> AbstractContextManager[subprocess.Popen[str]]:
    return background(
        [COMMAND, "worker", "--database", database_url, "--idle", "0.05", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_process_logs_one_line_for_each_event_and_stops_when_told_to(
    messages: list[OutboxMessage], database_url: str, number: int
) -> None:
    with worker(database_url, "--name", "w1", "--sender", "tests.senders:send") as working:
        assert working.stderr is not None
        lines = [working.stderr.readline() for _ in range(3)]

        working.send_signal(number)
        out, err = working.communicate()

    assert (working.returncode, out) == (0, "")
    lines += err.splitlines(keepends=True)
    assert [re.sub(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", "", line).split()[:3] for line in lines] == [
        ["INFO", "started", "worker=w1"],
        ["INFO", "sent", "worker=w1"],
        ["INFO", "sent", "worker=w1"],
        ["INFO", "stopped", "worker=w1"],
    ]


def test_a_second_signal_does_not_wait(messages: list[OutboxMessage], database_url: str) -> None:
    with worker(database_url, "--sender", "tests.senders:never_end", "--concurrency", "1") as working:
        assert working.stdout is not None
        assert working.stdout.readline() == "sending\n"
        working.send_signal(signal.SIGTERM)
        assert working.stdout.readline() == "told to stop\n"

        working.send_signal(signal.SIGTERM)
        working.communicate()

    assert working.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("sender", "events"),
    [
        ("refuse", ["ERROR dead", "ERROR dead"]),
        ("return_a_wrong_id", ["INFO sent", "ERROR recording failed", "ERROR dead"]),
        ("log_something", ["INFO sent", "INFO sent"]),
    ],
)
def test_an_event_is_one_line_whatever_is_in_it(sender: str, events: list[str], messages: list[OutboxMessage]) -> None:
    result = process("worker", "--until-empty", "--sender", f"tests.senders:{sender}", cwd=ROOT)

    assert result.code == 0
    lines = [line.partition(" ")[2] for line in result.err.splitlines()]
    assert len(lines) == len(events)
    assert all(line.startswith(event) for line, event in zip(lines, events, strict=True))


def test_logging_that_the_sender_has_set_up_is_left_alone(messages: list[OutboxMessage], tmp_path: Path) -> None:
    (tmp_path / "agency.py").write_text(
        "import logging\n"
        "logging.basicConfig(format='mine: %(message)s', level=logging.INFO)\n"
        "logging.getLogger('transitions').setLevel(logging.WARNING)\n"
        "def send(message): return None\n"
    )

    result = process("worker", "--until-empty", "--sender", "agency:send", cwd=tmp_path)

    assert result.code == 0
    assert [line.split()[:2] for line in result.err.splitlines()] == [["mine:", "sent"]] * 2


def test_where_nobody_has_set_up_logging_it_goes_to_standard_error(
    messages: list[OutboxMessage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.getLogger("close_engine"), "level", logging.NOTSET)
    logging.getLogger("close_engine.worker").manager._clear_cache()  # type: ignore[attr-defined]

    result = run("worker", "--until-empty", "--sender", "tests.senders:refuse")

    assert [line[1:3] for line in result.lines] == []
    assert result.err.count("\n") == 2
    assert r"no such\nnumber" in result.err


# -- the board -------------------------------------------------------------------------------------------------------


def test_the_board_is_printed_once_where_there_is_no_terminal(action: PendingAction) -> None:
    result = run("board")

    assert (result.code, result.err) == (0, "")
    assert any(line[:2] == ["PENDING_APPROVAL", "1"] for line in result.lines)
    assert "SEND_PAYMENT_LINK" in result.out
    assert "Outbox" in result.out
    assert run("board", "--once").code == 0


def test_after_how_long_a_message_hangs_can_be_set(messages: list[OutboxMessage], database: Any) -> None:
    outbox.claim()
    for command in (("board", "--once"), ("outbox",)):
        for seconds, hanging in (("0", "1"), ("300", "0")):
            result = run(*command, "--hanging-after", seconds)
            assert re.search(rf"of which hanging +{hanging}\b", result.out), result


def test_on_a_terminal_the_board_is_live_until_it_is_interrupted(
    messages: list[OutboxMessage], conversation_in: Any, database_url: str
) -> None:
    ours, theirs = pty.openpty()
    seen = b""

    def read_until(wanted: str) -> None:
        nonlocal seen
        while not re.search(wanted.encode(), seen):
            seen += os.read(ours, 10_000)  # which fails once the process has ended

    with background(
        [COMMAND, "board", "--every", "0.1", "--database", database_url],
        stdout=theirs,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "COLUMNS": "150", "TERM": "xterm"},
    ) as watching:
        os.close(theirs)
        read_until(r"BUILDING +0 ")
        conversation_in(Stage.BUILDING)
        read_until(r"BUILDING +1 ")
        watching.send_signal(signal.SIGINT)
        with suppress(OSError):  # which ends the reading, for the terminal is gone with the process
            while os.read(ours, 10_000):
                pass
        _, err = watching.communicate()
    os.close(ours)

    assert (watching.returncode, err) == (0, b"")


def test_the_board_of_a_terminal_ends_with_ctrl_c(action: PendingAction, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(console: Any, every: timedelta, hanging_after: timedelta) -> None:
        assert (every, hanging_after) == (timedelta(seconds=2), timedelta(minutes=5))
        raise KeyboardInterrupt

    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    monkeypatch.setattr("close_engine.cli.board.watch", interrupted)

    assert run("board").code == 0


@pytest.mark.parametrize(
    "command",
    [("actions",), ("approve", "a1", "--by", "ana"), ("outbox",), ("sweep",), ("worker", *SENDER), ("board",)],
)
def test_a_database_that_is_not_migrated_is_told_to_be(empty_url: str, command: Any) -> None:
    if empty_url.startswith("sqlite"):
        Path(empty_url.removeprefix("sqlite:///")).touch()

    assert "run close-engine migrate" in refused(*command, "--database", empty_url)


# -- G8: what once ended in a traceback ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines."),
        ("raise SystemExit(3)", "SystemExit: 3."),
        ("raise GeneratorExit", "GeneratorExit."),
        ("class Odd(BaseException): pass\nraise Odd('x')", "Odd: x."),
        ("x = (", "SyntaxError: '(' was never closed"),
        ("def deeper(): deeper()\ndeeper()", "RecursionError: maximum recursion depth exceeded."),
    ],
)
@pytest.mark.parametrize("option", ["--sender", "--import"])
def test_g8_a_module_that_cannot_be_imported_is_a_sentence(
    messages: list[OutboxMessage],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    sentence: str,
    option: str,
) -> None:
    """G8: whatever it raises, a sender's module or one that registers hooks."""
    name = f"g8_{abs(hash((code, option)))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    named = (option, f"{name}:send") if option == "--sender" else (*SENDER, option, name)

    assert refused("worker", "--until-empty", *named).startswith(f"The module {name!r} cannot be imported: {sentence}")


def test_g8_a_module_that_is_interrupted_ends_the_command(
    messages: list[OutboxMessage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: Ctrl-C while it is imported is no error of the module's."""
    (tmp_path / "g8_interrupted.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run("worker", "--until-empty", "--sender", "g8_interrupted:send")
    assert (result.code, result.out, result.err) == (130, "", "")


@pytest.mark.parametrize("option", ["--lease", "--idle", "--sweep-every", "--stall-after", "--lose-after"])
@pytest.mark.parametrize("number", ["nan", "inf", "-inf", "1e300", "-1e300", "-1", "soon"])
def test_g8_what_is_no_length_of_time_cannot_be_understood(option: str, number: str) -> None:
    """G8: with a negative number, a sweep would stall or lose every conversation there is."""
    result = run("worker", *SENDER, option, number)
    assert (result.code, result.out) == (2, "")
    assert "is not a number of" in result.err or "is less than zero" in result.err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ((*SENDER, "--concurrency", "99999999999"), 2, "Input should be less than or equal to 1000"),
        ((*SENDER, "--topic", "\udcff"), 1, "topic cannot be '\\udcff': it contains half of a surrogate pair"),
        ((*SENDER, "--name", "\udcff"), 1, "worker cannot be '\\udcff': it contains half of a surrogate pair"),
        (("--print", "--import", "tests.senders"), 2, "With --print, nothing is imported: leave out --import."),
    ],
)
def test_g8_an_option_of_the_worker_that_cannot_be_used_is_a_sentence(
    messages: list[OutboxMessage], arguments: Any, code: int, sentence: str
) -> None:
    """G8: as many threads as no machine has, and names that no database can hold."""
    result = run("worker", "--until-empty", *arguments)
    assert (result.code, result.out) == (code, "")
    assert sentence in " ".join(result.err.replace("│", " ").split())


@pytest.mark.parametrize("number", [2**63, 2**64, -1, 0])
def test_g8_a_message_whose_number_no_database_holds(messages: list[OutboxMessage], number: int) -> None:
    """G8: SQLite's driver raises an OverflowError for 2^63."""
    result = run("outbox", "requeue", "--", str(number))
    assert (result.code, result.out) == (2, "")
    assert refused("outbox", "requeue", str(2**63 - 1)).startswith("There is no message 9223372036854775807")


@pytest.mark.parametrize(("since", "count"), [("1h", 0), ("90m", 1), ("2h", 1), ("1d", 1)])
def test_since_takes_a_length_of_time(
    messages: list[OutboxMessage], close_engine_clock: Any, since: str, count: int
) -> None:
    outbox.claim()[0].give_up("no such number")
    close_engine_clock.move(timedelta(minutes=90))
    result = run("outbox", "requeue", "--since", since)
    assert result == Result(0, f"Messages that will be sent again: {count}.\n", "")


@pytest.mark.parametrize("since", ["h", "1.5h", "-1h", "1w", "100000d", "2026-01-31T08:00", ""])
def test_since_takes_nothing_else(messages: list[OutboxMessage], since: str) -> None:
    assert run("outbox", "requeue", "--since", since).code == 2


@pytest.mark.parametrize("trouble", ["nobody listens", "unknown role"])
def test_g8_a_worker_that_is_not_let_in_at_the_start_waits(
    postgres_url: str, nobody_listens: str, trouble: str
) -> None:
    """G8: a server that is not up yet, or that does not know this user yet; drivers tell no code for either."""
    url = as_user(postgres_url, "nobody_of_that_name", "wrong")
    if trouble == "nobody listens":
        url = f"postgresql://ana:s3cret@{nobody_listens}/crm"
    with worker(url, "--sender", "tests.senders:send") as working:
        assert working.stderr is not None
        assert "started" in working.stderr.readline()
        line = working.stderr.readline()
        assert "database unreachable" in line
        working.terminate()
        _, err = working.communicate()

    assert working.returncode == 0
    assert "Traceback" not in err
    assert "s3cret" not in line + err


def test_g8_two_signals_end_a_worker_that_hangs_in_the_database(postgres_url: str) -> None:
    """G8: it waits for a lock that nobody gives up; the first signal lets it finish, which it never does."""
    with closing(psycopg2.connect(postgres_url)) as holder:
        holder.cursor().execute("LOCK TABLE close_engine.outbox")
        with worker(postgres_url, "--sender", "tests.senders:send", "--no-sweep") as working:
            waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
            until(lambda: query(postgres_url, waits, (holder.info.backend_pid,)) == [(True,)], "the worker waits")

            def ended() -> bool:
                working.send_signal(signal.SIGTERM)
                return working.poll() is not None

            until(ended, "the worker is ended")

    assert working.returncode == -signal.SIGTERM
