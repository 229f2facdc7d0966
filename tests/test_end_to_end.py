"""The agency as it runs: its own processes, the real SDKs, and stand-ins for the providers on the loopback address."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

import psycopg2
import pytest

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    InboxEntry,
    Lead,
    MessageStatus,
    OutboxMessage,
    pending_actions,
)
from close_engine.testing.anthropic import calls
from close_engine.testing.stand_ins import Call, Reply
from close_engine.web.console import Role
from close_engine.web.console.accounts import account_line
from examples.agency.play.__main__ import CAUTIOUS, leave_drafts
from examples.agency.play.servers import HERE, Place
from tests.command_line import as_user, postgres_role, run
from tests.crm import query
from tests.prose import PRISMA, ROOT, grants
from tests.servers import PrivateServer, execute
from tests.waiting import LIMIT, until

TEXTS, PAYMENTS = "/webhooks/twilio/texts", "/webhooks/stripe"
ADA = "+15550100000"

opener = build_opener(ProxyHandler({}))


def get(url: str) -> tuple[int, str]:
    """What a server answers."""
    try:
        with opener.open(url, timeout=LIMIT) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.fixture
def make_place(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Makes a place for an agency on a database."""
    with ExitStack() as stack:

        def make(database: str, **options: Any) -> Place:
            directory = tmp_path / "place"
            directory.mkdir()
            return Place(directory, stack, database, **options)

        yield make
        shutil.rmtree(tmp_path / "place", ignore_errors=True)


@contextmanager
def looked_into(url: str) -> Iterator[None]:
    """The models on the agency's database."""
    database = close_engine.connect(url)
    try:
        yield
    finally:
        database.close()


@pytest.fixture
def worker_url(server: str, postgres_url: str) -> Iterator[str]:
    """The database, for a role that has no more than the rights that the pages grant."""
    with postgres_role(server) as (role, password):
        rights = [*grants(PRISMA, "close_worker"), *grants(ROOT / "docs/serve.md", "close_worker")]
        execute(postgres_url, *(right.format(role=role) for right in rights))
        yield as_user(postgres_url, role, password)
        execute(postgres_url, f"DROP OWNED BY {role}")


# -- one lead ----------------------------------------------------------------------------------------------------------


def test_a_lead_is_closed_from_the_first_text_to_the_payment_over_http_only(
    make_place: Callable[..., Place], worker_url: str
) -> None:
    place = make_place(worker_url)

    def says(words: str, answer: str) -> str:
        """Text it, and return the agency's text that is the answer."""
        assert place.twilio.text_from(ADA, words, place.url + TEXTS).status == 200
        return until(
            lambda: next((text for text in place.twilio.delivered_to(ADA) if answer in text), ""),
            f"{words!r} is answered with {answer!r}",
        )

    def is_in(stage: str) -> bool:
        return f'close_engine_conversations{{stage="{stage}"}} 1.0' in get(f"{place.url}/metrics")[1].splitlines()

    def looks_at(text: str) -> str:
        """Return the page that a text links to, once the stage says that the lead has it."""
        until(lambda: is_in("PREVIEW_SENT"), "the preview is recorded as sent")
        return get(text.split()[-1])[1]

    with place.running("serve", "worker"):
        says("Hi! Do you make websites?", "name of your business")
        says("Sunrise Bakery", "Which colour")
        assert "<h1>Sunrise Bakery</h1>" in looks_at(says("orange", "Here is your website"))
        assert "Could you make it blue?" in looks_at(says("Could you make it blue?", "-1.html"))
        link = says("I love it!", "how you pay").split()[-1]
        assert {answered.status for answered in place.stripe.pay(link, place.url + PAYMENTS)} == {200}
        assert is_in("COMPLETED")

    assert place.complaints() == []
    assert place.statuses == {"serve": 0, "worker": 0}
    assert Counter(place.twilio.delivered_to(ADA)).most_common(1)[0][1] == 1


# -- many at once ------------------------------------------------------------------------------------------------------


def counting(request: dict[str, Any]) -> list[dict[str, Any]]:
    """A model that says how many texts it has seen: it never says the same to a lead twice."""
    said = re.findall(r"text (\d+) of", str(request["messages"]))
    return [calls("reply", text=f"I have seen {len(set(said))} texts, the last of them {said[-1]}.")]


@pytest.mark.parametrize(("kind", "leads", "each"), [("sqlite", 5, 4), ("postgresql", 20, 10)])
def test_many_texts_each_twice_against_two_servers_and_two_workers(
    make_place: Callable[..., Place], request: pytest.FixtureRequest, tmp_path: Path, kind: str, leads: int, each: int
) -> None:
    if kind == "postgresql":
        url = str(request.getfixturevalue("postgres_url"))
    else:
        url = f"sqlite:///{shutil.copy(request.getfixturevalue('sqlite_template'), tmp_path / 'agency.db')}"
    place = make_place(url, think=counting)
    numbers = [f"+155501000{number:02}" for number in range(leads)]
    texts = [
        (number, f"text {rank} of {number}", f"SM{rank:03}{number[1:]}") for number in numbers for rank in range(each)
    ]

    with place.running("serve", "serve-2", "worker", "worker-2"), ThreadPoolExecutor(8) as pool:
        second = next(line.split()[-1] for line in place.log("serve-2") if " INFO serving at " in line)

        def post(server: str, number: str, body: str, sid: str) -> int:
            return place.twilio.text_from(number, body, server + TEXTS, sid=sid, signed_as=place.url + TEXTS).status

        posts = [pool.submit(post, server, *text) for text in texts for server in (place.url, second)]
        statuses = {answer.result(LIMIT) for answer in posts}
        with looked_into(url):
            waiting = OutboxMessage.select().where(OutboxMessage.status == MessageStatus.PENDING)
            until(lambda: not waiting.exists(), "everything is answered")

    assert statuses == {200}
    assert place.complaints() == []
    assert set(place.statuses.values()) == {0}
    with looked_into(url):
        assert sorted(entry.key for entry in InboxEntry.select()) == sorted(sid for _, _, sid in texts)
        assert sorted(str(lead.phone) for lead in Lead.select()) == numbers
        assert CloseEngineConversation.select().count() == leads
        topics = [str(type) for type in ActionType]
        sent = OutboxMessage.select().where((OutboxMessage.status == "SENT") & OutboxMessage.topic.in_(topics))
        assert sorted(str(message.provider_id) for message in sent) == sorted(text.sid for text in place.twilio.texts)
        assert OutboxMessage.select().where(OutboxMessage.status == MessageStatus.DEAD).count() == 0
    for number in numbers:
        heard = place.twilio.delivered_to(number)
        assert len(heard) == len(set(heard))
        assert heard[-1].startswith(f"I have seen {each} texts")


# -- a worker that is killed -------------------------------------------------------------------------------------------


def test_a_worker_killed_between_twilios_answer_and_the_record_has_sent_one_text(
    make_place: Callable[..., Place], postgres_url: str
) -> None:
    place = make_place(postgres_url, reports=())  # nobody but Twilio's list says that it left
    with closing(psycopg2.connect(postgres_url)) as holder, looked_into(postgres_url):
        conversation = close_engine.open_conversation(Lead.create(phone=ADA), close_engine.EntryPoint.REP_CLOSE)
        message = close_engine.submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
        answer = place.twilio.answer

        def answer_and_hold_the_record_up(call: Call) -> Reply:
            if call.method == "POST":
                holder.cursor().execute("SELECT 1 FROM close_engine.outbox WHERE id = %s FOR UPDATE", (message.id,))
            return answer(call)

        place.twilio.answer = answer_and_hold_the_record_up  # type: ignore[method-assign]
        killed = place.start("worker", "--lease", "1", "--no-sweep", "--topic", "SEND_MESSAGE")
        waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
        pid = holder.info.backend_pid
        until(lambda: query(postgres_url, waits, (pid,)) == [(True,)], "the worker waits to record what it has sent")
        killed.send_signal(signal.SIGKILL)
        assert killed.wait(LIMIT) == -signal.SIGKILL
        # Its statement goes on waiting in the server, whose client is gone.
        ends = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
        query(postgres_url, ends, (pid,))
        holder.rollback()
        assert OutboxMessage.get_by_id(message.id).status is MessageStatus.PENDING

        place.twilio.answer = answer  # type: ignore[method-assign]
        with place.running("worker-2"):
            until(lambda: OutboxMessage.get_by_id(message.id).status is MessageStatus.SENT, "the message is recorded")
        (text,) = place.twilio.texts
        recorded = OutboxMessage.get_by_id(message.id)
        assert (recorded.provider_id, recorded.claims) == (text.sid, 2)
        assert place.twilio.delivered_to(ADA) == ["Hello!"]


# -- the server --------------------------------------------------------------------------------------------------------


def test_a_server_that_is_told_to_stop_answers_what_has_begun(
    make_place: Callable[..., Place], postgres_url: str
) -> None:
    place = make_place(postgres_url)
    with looked_into(postgres_url):
        lead = Lead.create(phone=ADA)
        close_engine.open_conversation(lead, close_engine.EntryPoint.SMS_REPLY)
    waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE %s = ANY (pg_blocking_pids(pid))"
    with (
        place.running("serve") as processes,
        ThreadPoolExecutor() as pool,
        closing(psycopg2.connect(postgres_url)) as it,
    ):
        it.cursor().execute("SELECT 1 FROM close_engine_conversations FOR UPDATE")
        answer = pool.submit(place.twilio.text_from, ADA, "Hi!", place.url + TEXTS)
        until(lambda: query(postgres_url, waits, (it.info.backend_pid,)) == [(True,)], "the request waits")

        processes["serve"].send_signal(signal.SIGTERM)
        until(lambda: is_refused(place.url), "the server takes no more requests")
        it.rollback()

        assert answer.result(LIMIT).status == 200
        assert processes["serve"].wait(LIMIT) == 0
    assert place.log("serve")[-1].endswith(" INFO stopped")


def is_refused(url: str) -> bool:
    try:
        get(url)
    except OSError:
        return True
    return False


def test_a_database_that_goes_away_is_waited_for(make_place: Callable[..., Place]) -> None:
    with PrivateServer() as server:
        with looked_into(server.url):
            close_engine.migrate(standalone=True)
        place = make_place(server.url)
        server.stop()
        process = place.start("serve")
        until(lambda: "database unreachable" in "\n".join(place.log("serve")), "the server waits for its database")
        server.start()
        place.wait_for("serve", process)
        try:
            assert get(f"{place.url}/healthz") == (200, '{"status":"ok"}')
            server.stop()
            assert get(f"{place.url}/healthz")[0] == 503
            assert place.twilio.text_from(ADA, "Hi!", place.url + TEXTS, sid="SM1").status == 503
            server.start()
            assert place.twilio.text_from(ADA, "Hi!", place.url + TEXTS, sid="SM1").status == 200
            assert get(f"{place.url}/healthz")[0] == 200
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT) == 0


def served(place: Place, *options: str, **environment: str) -> tuple[int, str]:
    """The exit status and the error of a server that cannot start."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in {**place.environment, "CLOSE_ENGINE_AGENCY": "tests.test_agency:AGENCY"}.items():
            patched.setenv(name, environment.get(name, value))
        result = run("serve", "--port", "0", *options)
    return result.code, result.err


def test_a_server_that_cannot_start_says_why(make_place: Callable[..., Place], empty_url: str, tmp_path: Path) -> None:
    place = make_place(empty_url)
    if empty_url.startswith("sqlite"):
        (tmp_path / "empty.db").touch()
    malformed = "postgresql://worker:Xyzzy@db:port/crm"

    code, error = served(place)
    assert (code, error.startswith("The database is not migrated (0001_conversations, ")) == (1, True)
    code, error = served(place, CLOSE_ENGINE_DATABASE=malformed)
    assert (code, "cannot be used" in error, "Xyzzy" in error) == (1, True, False)


def test_a_port_that_is_taken_is_said(make_place: Callable[..., Place], postgres_url: str) -> None:
    place = make_place(postgres_url)
    port = place.twilio.url.rpartition(":")[2]

    code, error = served(place, "--port", port)

    assert (code, error) == (1, f"Port {port} of '127.0.0.1' cannot be served: Address already in use.\n")


def test_the_console_is_served_to_this_machine_or_to_whoever_has_an_account(
    make_place: Callable[..., Place], postgres_url: str
) -> None:
    place = make_place(postgres_url)
    with looked_into(postgres_url), place.running("serve", "worker"):
        address = leave_drafts(place)
        first = next(iter(CAUTIOUS))
        (action,) = pending_actions(close_engine.conversations_of(first)[0])
        browser = build_opener(ProxyHandler({}), HTTPCookieProcessor())
        with browser.open(address, timeout=LIMIT) as answer:
            page = answer.read().decode()
        assert all(number in page for number in CAUTIOUS)
        token = re.findall('name="token" value="(.*?)"', page)[0]
        form = urlencode({"token": token, "verb": "approve", "message": action.draft_message}).encode()
        with browser.open(f"{address}approvals/{action.id}", form, timeout=LIMIT) as answer:
            assert "Approved." in answer.read().decode()
        until(lambda: place.twilio.delivered_to(first), "what was approved is sent")
    assert (place.complaints(), place.statuses) == ([], {"serve": 0, "worker": 0})

    # A provider reaches it, so others do.
    place.environment["CLOSE_ENGINE_PUBLIC_URL"] = "https://crm.example.com"
    with place.running("serve"):
        assert get(address)[0] == 404
        assert any("the console is not served, because it has no accounts" in line for line in place.log("serve"))
    place.environment["CLOSE_ENGINE_ACCOUNTS"] = account_line("dana", Role.APPROVER, "correct horse battery")
    with place.running("serve"):
        assert "Sign in" in get(address)[1]


# -- the play ----------------------------------------------------------------------------------------------------------


def test_the_play_is_told_and_finds_nothing_wrong() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "play", "--leads", "4"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
    )

    assert (done.stderr, done.returncode) == ("", 0), done.stdout
    assert "Ada            paid: the deal is closed" in done.stdout
    assert done.stdout.splitlines()[-1] == "Nothing was lost, nothing was doubled, and verify finds nothing wrong."


def test_what_one_writes_oneself_is_short() -> None:
    written = [path for path in HERE.iterdir() if path.suffix in (".py", ".md", ".env")]

    assert sum(len(path.read_text().splitlines()) for path in written) < 150
