"""What is served over HTTP: the webhooks' requests, `/healthz` and `/metrics`, without any provider's SDK."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import anyio
import peewee
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

import close_engine
from close_engine import CloseEngineConversation, ConfigurationError, EntryPoint, InboxEntry, atomic, receive
from close_engine.database.binding import current
from close_engine.integrations.webhooks import WebhookResponse
from close_engine.testing import new_lead
from close_engine.web import app as web
from close_engine.web import create_app, routes

TEXTS, STATUS, PAYMENTS = "/webhooks/twilio/texts", "/webhooks/twilio/status", "/webhooks/stripe"


@pytest.fixture(params=["sqlite-file", "postgresql"])
def kind(request: pytest.FixtureRequest) -> str:
    """Only these two: each thread of a server would have a database in memory of its own."""
    return str(request.param)


@dataclass
class Receiver:
    """Answers the webhooks as an integration does, for one lead, and remembers what it was asked."""

    lead_id: str
    fails: Exception | None = None
    seen: list[tuple[Any, ...]] = field(default_factory=list)

    def text(self, url: str, form: Mapping[str, str], signature: str | None) -> WebhookResponse:
        self.seen.append((url, dict(form), signature))
        with atomic():
            receive(self.lead_id, form["MessageSid"], form["Body"], open=EntryPoint.SMS_REPLY)
            if self.fails is not None:
                raise self.fails
        return WebhookResponse(200, "<Response/>", "text/xml")

    def status(self, url: str, form: Mapping[str, str], signature: str | None) -> WebhookResponse:
        self.seen.append((url, dict(form), signature))
        return WebhookResponse(204)

    def payment(self, body: bytes, signature: str | None) -> WebhookResponse:
        self.seen.append((body, signature))
        return WebhookResponse(403 if signature is None else 200, "said")


@pytest.fixture
def receiver(database: peewee.Database) -> Receiver:
    return Receiver(new_lead().id)


@pytest.fixture
def client(receiver: Receiver) -> Iterator[TestClient]:
    with TestClient(create_app(texts=receiver, payments=receiver.payment)) as client:
        yield client


def form(number: int = 1, body: str = "Hi!") -> dict[str, str]:
    return {"MessageSid": f"SM{number}", "Body": body, "From": "+15550100"}


# -- webhooks ----------------------------------------------------------------------------------------------------------


def test_a_text_is_received_and_answered(client: TestClient, receiver: Receiver) -> None:
    answer = client.post(f"{TEXTS}?a=b%20c&a=d", data=form(body="Grüße & more"), headers={"X-Twilio-Signature": "s"})

    assert (answer.status_code, answer.text) == (200, "<Response/>")
    assert answer.headers["content-type"] == "text/xml; charset=utf-8"
    url, said, signature = receiver.seen[0]
    assert (url, said, signature) == (f"http://testserver{TEXTS}?a=b%20c&a=d", form(body="Grüße & more"), "s")
    assert [entry.body for entry in InboxEntry.select()] == ["Grüße & more"]


def test_a_delivery_and_a_payment_are_passed_on_as_they_came(client: TestClient, receiver: Receiver) -> None:
    assert client.post(f"{STATUS}?send_key=k", data={"MessageStatus": "sent"}).status_code == 204
    assert client.post(PAYMENTS, content=b'{ "raw":  1}', headers={"Stripe-Signature": "t=1"}).text == "said"
    assert client.post(PAYMENTS, content=b"{}").status_code == 403

    assert receiver.seen[0] == (f"http://testserver{STATUS}?send_key=k", {"MessageStatus": "sent"}, None)
    assert receiver.seen[1:] == [(b'{ "raw":  1}', "t=1"), (b"{}", None)]


def test_a_failure_keeps_nothing_and_its_words_stay_in_the_log(
    client: TestClient, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.fails = RuntimeError("the lead said: my password is Xyzzy")

    answer = client.post(TEXTS, data=form())

    assert (answer.status_code, answer.text) == (500, "This failed, and the log says why.")
    assert InboxEntry.select().count() == CloseEngineConversation.select().count() == 0
    (record,) = [record for record in caplog.records if record.name == "close_engine.web.app"]
    assert record.getMessage() == f"webhook failed path={TEXTS}"
    assert record.exc_info is not None
    receiver.fails = None
    assert client.post(TEXTS, data=form()).status_code == 200


def test_a_busy_database_is_worth_another_try(client: TestClient, receiver: Receiver) -> None:
    receiver.fails = (
        peewee.OperationalError("database is locked")
        if isinstance(current().database, peewee.SqliteDatabase)
        else peewee.InterfaceError("connection already closed")
    )

    answer = client.post(TEXTS, data=form())

    assert (answer.status_code, answer.text) == (503, "The database is away or busy: try again later.")


@pytest.mark.parametrize(
    "body",
    [b"Body=%ff%fe", b"Body=\xff", "Body=é".encode("latin-1"), b"&".join(b"a%d=1" % n for n in range(1001))],
    ids=["percent", "raw", "latin-1", "many"],
)
def test_what_is_no_form_is_refused(client: TestClient, receiver: Receiver, body: bytes) -> None:
    answer = client.post(TEXTS, content=body)

    assert (answer.status_code, answer.text) == (400, "This is not a form in UTF-8.")
    assert receiver.seen == []


@pytest.mark.parametrize("path", [TEXTS, STATUS, PAYMENTS])
def test_a_body_has_a_limit(client: TestClient, receiver: Receiver, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "MOST_BYTES", 100)

    def chunks() -> Iterator[bytes]:
        yield from [b"a=%s&" % (b"b" * 60)] * 2

    for answer in (client.post(path, content=b"x" * 101), client.post(path, content=chunks())):
        assert (answer.status_code, answer.text) == (413, "The request has more than 100 bytes.")
    assert receiver.seen == []
    assert client.post(PAYMENTS, content=b"x" * 100).status_code == 403


@pytest.mark.parametrize(("ending", "status"), [(None, 408), ({"type": "http.disconnect"}, 400)], ids=["late", "cut"])
def test_of_a_body_that_does_not_end_nothing_is_taken(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, ending: dict[str, Any] | None, status: int
) -> None:
    monkeypatch.setattr(web, "BODY_TIMEOUT", timedelta(milliseconds=50).total_seconds())
    parts, sent = [{"type": "http.request", "body": b"Body=I%27d+pay+you", "more_body": True}], []

    async def next_part() -> Any:
        if parts:
            return parts.pop()
        return ending or await anyio.sleep_forever()  # type: ignore[func-returns-value]

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": TEXTS, "query_string": b"", "headers": []}
    anyio.run(create_app(texts=receiver), scope, next_part, send)

    assert (sent[0]["status"], receiver.seen) == (status, [])


@pytest.mark.parametrize("path", [TEXTS, STATUS, PAYMENTS])
def test_only_post_is_taken(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 405


def test_what_is_not_configured_is_not_there(database: peewee.Database) -> None:
    client = TestClient(create_app(metrics=False))

    assert {client.post(path).status_code for path in (TEXTS, STATUS, PAYMENTS)} == {404}
    assert client.get("/metrics").status_code == 404
    assert client.get("/healthz").status_code == 200


def test_metrics_say_which_package_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "close_engine.metrics", raising=False)

    with pytest.raises(ConfigurationError, match="close-engine\\[metrics\\]"):
        create_app()


def open_connections() -> int:
    """How many connections to the bound database are open, as the system or the server counts them."""
    database = current().database
    if isinstance(database, peewee.SqliteDatabase):
        here = os.path.realpath(str(database.database))
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(link) == here for link in links)
    counted = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    return int(database.execute_sql(counted).fetchone()[0])


def test_no_request_leaves_a_connection_open(client: TestClient, receiver: Receiver) -> None:
    def all_kinds(number: int) -> int:
        receiver.fails = RuntimeError() if number % 3 == 0 else None
        client.post(TEXTS, data=form(number))
        client.post(PAYMENTS, content=b"{}")
        client.get("/healthz")
        client.get("/metrics")
        return open_connections()

    counted = [all_kinds(number) for number in range(10)]

    # SQLite keeps a closed file open for the next connection if another one of the process holds a lock.
    assert max(counted) <= 2


def test_a_connection_of_a_pool_is_given_back(database: peewee.Database, database_url: str) -> None:
    pooled: Any = close_engine.connect(database_url.replace("://", "+pool://", 1) + pool_of_one(database))
    try:
        receiver = Receiver(new_lead().id)
        with TestClient(create_app(texts=receiver)) as client:
            pooled.close()
            for number in range(3):
                assert client.post(TEXTS, data=form(number)).status_code == 200
                assert client.get("/healthz").status_code == 200
        assert len(pooled._in_use) == 0
    finally:
        pooled.close_all()
        close_engine.bind(database)


def pool_of_one(database: peewee.Database) -> str:
    return "" if isinstance(database, peewee.SqliteDatabase) else "&max_connections=1&timeout=5"


@pytest.mark.parametrize("make", [Starlette, FastAPI])
def test_the_routes_can_be_mounted_in_another_application(receiver: Receiver, make: Callable[..., Any]) -> None:
    app = make()
    app.router.routes.append(Mount("/crm", routes=routes(texts=receiver, metrics=False)))
    app.mount("/other", create_app(texts=receiver))
    client = TestClient(app)

    for number, prefix in enumerate(("/crm", "/other")):
        assert client.post(f"{prefix}{TEXTS}", data=form(number)).status_code == 200
        assert client.get(f"{prefix}/healthz").json() == {"status": "ok"}
    assert [seen[0] for seen in receiver.seen] == [f"http://testserver/crm{TEXTS}", f"http://testserver/other{TEXTS}"]


# -- health and metrics ------------------------------------------------------------------------------------------------


def health(status: int) -> Any:
    answer = TestClient(create_app(metrics=False)).get("/healthz")
    assert answer.status_code == status
    return answer.json()


def test_a_migrated_database_is_healthy(database: peewee.Database) -> None:
    assert health(200) == {"status": "ok"}


def test_a_database_that_is_not_migrated_is_not_healthy(empty_url: str) -> None:
    database = close_engine.connect(empty_url)
    try:
        said = health(503)
    finally:
        database.close()

    assert said["status"] == "unavailable"
    assert said["why"].startswith("the database is not migrated (0001_conversations, ")


def test_a_database_that_is_away_is_not_healthy(nobody_listens: str, database: peewee.Database) -> None:
    close_engine.connect(f"postgresql://worker:Xyzzy@{nobody_listens}/crm")
    try:
        assert health(503) == {"status": "unavailable", "why": "the database cannot be reached"}
        answer = TestClient(create_app(payments=lambda body, signature: WebhookResponse(200))).post(PAYMENTS)
        assert answer.status_code == 503
    finally:
        close_engine.bind(database)


@contextmanager
def silent_server() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        host, port = listening.getsockname()
        yield f"{host}:{port}"


def test_a_database_that_never_answers_holds_up_no_check(
    database: peewee.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "HEALTH_TIMEOUT", timedelta(milliseconds=100).total_seconds())
    with silent_server() as place:
        close_engine.connect(f"postgresql://worker:Xyzzy@{place}/crm?connect_timeout=2")
        try:
            with TestClient(create_app(metrics=False)) as client:
                for _ in range(3):
                    answer = client.get("/healthz")
                    assert (answer.status_code, answer.json()["why"]) == (503, "the database does not answer")
        finally:
            close_engine.bind(database)


def test_metrics_are_served(client: TestClient, receiver: Receiver) -> None:
    client.post(TEXTS, data=form())

    answer = client.get("/metrics")

    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'close_engine_conversations{stage="INITIATED"} 1.0' in answer.text.splitlines()
    assert "close_engine_database_up 1.0" in answer.text.splitlines()
