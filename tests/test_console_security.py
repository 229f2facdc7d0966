"""Who may use the console, and what it does with whoever may not."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import anyio
import peewee
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Match, Mount, Route
from starlette.types import Receive, Scope, Send

import close_engine
from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    ConfigurationError,
    EntryPoint,
    InvalidValue,
    PendingAction,
    Stage,
    submit,
)
from close_engine.database.binding import current
from close_engine.testing import bring_to, new_lead
from close_engine.web.console import Account, Accounts, Role, console, page, rendering
from close_engine.web.console.accounts import account_line, add_account
from close_engine.web.console.page import Ask
from close_engine.web.console.sessions import Attempts
from close_engine.web.console.signing_in import _inside
from tests.command_line import run
from tests.test_roles import WORKER, granted, role, url_as  # noqa: F401
from tests.visitor import Visitor

ConversationIn = Callable[..., CloseEngineConversation]

WORDS = "correct horse battery"
#: A hash takes time, on purpose.
LINES = {
    name: account_line(name, word, WORDS) for name, word in (("vera", "viewer"), ("dana", "approver"), ("ada", "admin"))
}


@pytest.fixture(params=["sqlite-file"])
def kind(request: pytest.FixtureRequest) -> str:
    """Nothing here depends on the database."""
    return str(request.param)


@pytest.fixture
def action(close_engine_database: peewee.Database, conversation_in: ConversationIn) -> PendingAction:
    """A draft that waits."""
    drafted = submit(conversation_in(Stage.QUALIFYING, AutonomyLevel.MANUAL), ActionType.SEND_MESSAGE, "Hello!")
    assert isinstance(drafted, PendingAction)
    return drafted


def is_pending(action: PendingAction) -> bool:
    return PendingAction.get_by_id(action.id).status is ActionStatus.PENDING


# -- without accounts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "base_url", "headers"),
    [
        ("10.0.0.7", "http://127.0.0.1:8000", {}),
        ("testclient", "http://127.0.0.1:8000", {}),
        ("127.0.0.1", "http://rebound.example.com", {}),
        ("127.0.0.1", "http://127.0.0.1.example.com:8000", {}),
        ("127.0.0.1", "http://127.0.0.1:8000", {"X-Forwarded-For": "203.0.113.9"}),
        ("127.0.0.1", "http://127.0.0.1:8000", {"Forwarded": "for=203.0.113.9"}),
        ("127.0.0.1", "http://127.0.0.1:8000", {"X-Real-IP": "203.0.113.9"}),
        ("127.0.0.1", "http://127.0.0.1:8000", {"Origin": "https://console.example.com"}),
        ("127.0.0.1", "http://127.0.0.1:8000", {"Origin": "null"}),
        ("127.0.0.1", "http://127.0.0.1:8000", {"Origin": "http://[nonsense"}),
    ],
)
def test_without_accounts_it_answers_on_the_machine_itself_only(
    address: str, base_url: str, headers: dict[str, str], action: PendingAction
) -> None:
    stranger = Visitor(console(), base_url=base_url, address=address)
    for path in ("/", "/pipeline", f"/conversations/{action.conversation_id}", "/events"):
        stranger.look(path, **headers)
        assert stranger.status in (403, 204), path
        assert "Hello!" not in stranger.page
    assert "close-engine user add" in stranger.look(**headers)


def test_what_nginx_passes_on_by_default_is_refused(action: PendingAction) -> None:
    app = console()

    async def as_nginx(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "http_version": "1.0"}, receive, send)

    assert "Hello!" not in Visitor(as_nginx).look()


@pytest.mark.parametrize("base_url", ["http://localhost:8000", "http://127.0.0.1", "http://[::1]:8000"])
def test_the_machine_itself_has_several_names(base_url: str, action: PendingAction) -> None:
    here = Visitor(console(), base_url=base_url, address="::1")
    assert "Hello!" in here.look()


# -- signing in ----------------------------------------------------------------------------------------------------


def test_whoever_is_not_signed_in_is_led_to_the_page_for_that_and_back(action: PendingAction) -> None:
    dana = Visitor(console(accounts=Accounts.of(LINES.values())))
    dana.look("/conversations?text=Ada")
    assert "Sign in" in dana.text
    assert "Hello!" not in dana.page

    dana.send("/sign-in", name="dana", password=WORDS, next=dana.hidden("next"))

    assert dana.client.cookies
    assert "dana, approver" in dana.text
    assert 'value="Ada"' in dana.page
    assert "Hello!" in dana.look()
    for _ in range(2):
        dana.send("/sign-out")
        assert "Sign in" in dana.text
        assert "Hello!" not in dana.look()


@pytest.mark.parametrize(
    "path", ["//evil.example.com", "https://evil.example.com", "/\\evil.example.com", "javascript:1"]
)
def test_signing_in_leads_nowhere_else(path: str, action: PendingAction) -> None:
    dana = Visitor(console(accounts=Accounts.of(LINES.values())))
    dana.look("/sign-in")
    answer = dana.client.post(
        "/sign-in", data={"token": dana.token, "name": "dana", "password": WORDS, "next": path}, follow_redirects=False
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


@given(path=st.text(st.sampled_from("/\\.:@#?%ab\t\n "), max_size=8) | st.text(max_size=20))
def test_wherever_signing_in_leads_is_on_this_site(path: str) -> None:
    request = Request({"type": "http", "root_path": "", "headers": [], "app": console()})
    site = request.app.state.site
    ask = Ask(request, site, None, site.sessions.begin())

    # As browsers read an address: a backslash is a slash, and tabs and new lines are nothing.
    led = re.sub("[\t\r\n]", "", _inside(ask, path)).replace("\\", "/")

    assert urlsplit(urljoin("https://console.example.com/sign-in", led)).netloc == "console.example.com"
    assert not led.startswith("//")


def test_the_cookie_is_signed_kept_from_scripts_and_of_this_site(action: PendingAction) -> None:
    app = console(accounts=Accounts.of(LINES.values()))
    dana = Visitor(app, base_url="https://console.example.com")
    dana.look("/sign-in")
    before = dana.client.cookies["close_engine_console"]
    answer = dana.client.post(
        "/sign-in", data={"token": dana.token, "name": "dana", "password": WORDS}, follow_redirects=False
    )
    cookie = answer.headers["set-cookie"]

    assert {"HttpOnly", "Secure", "SameSite=lax", "Path=/"} <= set(cookie.split("; "))
    assert WORDS not in cookie
    value = dana.client.cookies["close_engine_console"]
    assert value != before  # whoever knew the old one does not know this one
    content, dot, signature = value.rpartition(".")
    # Not its last character, of which some bits mean nothing.
    other = ("A" if signature[0] != "A" else "B") + signature[1:]
    for forged in (content + dot + other, value.split(".")[0], "", before):
        dana.client.cookies.clear()
        dana.client.cookies.set("close_engine_console", forged)
        assert "Hello!" not in dana.look()
    elsewhere = Visitor(console(accounts=Accounts.of(LINES.values())), base_url="https://console.example.com")
    elsewhere.client.cookies.set("close_engine_console", value)  # it signs with a secret of its own
    assert "Hello!" not in elsewhere.look()


def test_what_the_last_page_said_is_no_session(action: PendingAction) -> None:
    dana = Visitor(console(accounts=Accounts.of(LINES.values())))
    dana.sign_in("dana", WORDS)
    answer = dana.client.post(
        f"/approvals/{action.id}", data={"token": dana.token, "verb": "approve"}, follow_redirects=False
    )
    said = answer.cookies["close_engine_said"]
    dana.client.cookies.clear()
    dana.client.cookies.set("close_engine_console", said)
    dana.look()
    assert (dana.status, "Sign in" in dana.text) == (200, True)


def test_signing_out_ends_the_session_and_not_only_the_cookie(action: PendingAction) -> None:
    app = console(accounts=Accounts.of(LINES.values()))
    dana, eve = Visitor(app), Visitor(app)
    dana.sign_in("dana", WORDS)
    eve.client.cookies.set("close_engine_console", dana.client.cookies["close_engine_console"])
    assert "Hello!" in eve.look()
    dana.send("/sign-out")
    assert "Hello!" not in eve.look()


def test_a_secret_that_could_be_guessed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_SECRET", "changeme")
    with pytest.raises(ConfigurationError, match=r"openssl rand -hex 32") as caught:
        console()
    assert "changeme" not in str(caught.value)


def test_a_session_ends_and_what_was_written_is_not_lost(action: PendingAction) -> None:
    app = console(accounts=Accounts.of(LINES.values()), session=timedelta(hours=1))
    at = 1_000_000.0
    app.state.site.sessions.clock = lambda: at
    dana = Visitor(app)
    dana.sign_in("dana", WORDS)
    at += 3599
    assert "Hello!" in dana.look()
    at += 1

    dana.send(f"/approvals/{action.id}", verb="approve", message="These are my words.")

    assert (dana.status, is_pending(action)) == (401, True)
    assert "Your session is over" in dana.text
    assert "These are my words." in dana.page
    assert "Hello!" not in dana.look()


def test_a_session_ends_when_the_account_its_role_or_its_password_changes(
    tmp_path: Path, action: PendingAction
) -> None:
    path = tmp_path / "accounts.txt"
    path.write_text("\n".join([LINES["dana"], LINES["vera"]]))
    app = console(accounts=Accounts.in_file(path))
    dana, vera = Visitor(app), Visitor(app)
    dana.sign_in("dana", WORDS)
    vera.sign_in("vera", WORDS)
    assert "dana, approver" in dana.text

    add_account(path, "dana", Role.VIEWER, "another horse battery")

    dana.look()
    assert "Hello!" not in dana.page
    assert "Hello!" in vera.look()
    dana.sign_in("dana", "another horse battery")
    assert "dana, viewer" in dana.text
    path.write_text(LINES["dana"])
    assert "Hello!" not in vera.look()
    dana.sign_in("dana", WORDS)
    assert "Hello!" in dana.page
    path.write_text(LINES["dana"].replace(":approver:", ":admin:"))
    assert "Hello!" not in dana.look()


def test_whoever_is_not_signed_in_may_ask_in_any_way(action: PendingAction) -> None:
    stranger = Visitor(console(accounts=Accounts.of(LINES.values())))
    assert stranger.client.head("/").status_code == 200  # of the page for signing in
    for content in (b"", b"verb=approve", b"x" * 300_000, iter([b"verb=approve"])):
        answer = stranger.client.post(f"/approvals/{action.id}", content=content)
        assert (answer.status_code, "Hello!" in answer.text) == (401, False)
    assert stranger.client.get("/events").status_code == 204
    assert is_pending(action)


def test_one_signs_in_wherever_it_is_mounted(action: PendingAction) -> None:
    app = Starlette(routes=[Mount("/ours/console", console(accounts=Accounts.of(LINES.values())))])
    dana = Visitor(app, root="/ours/console")
    dana.look("/conversations")
    dana.send("/sign-in", name="dana", password=WORDS, next=dana.hidden("next"))
    assert "dana, approver" in dana.text
    assert f"/ours/console/conversations/{action.conversation_id}" in dana.page
    dana.send("/sign-out")
    assert "Hello!" not in dana.look("/")


def test_attempts_are_limited(action: PendingAction) -> None:
    app = console(accounts=Accounts.of(LINES.values()))
    at = 0.0
    app.state.site.attempts.clock = lambda: at
    dana = Visitor(app)
    for _ in range(5):
        dana.sign_in("dana", "wrong")
        assert (dana.status, "The name or the password is wrong." in dana.text) == (401, True)
    dana.sign_in("dana", WORDS)
    assert (dana.status, dana.headers["retry-after"]) == (429, "300")
    assert "try again in 5 minutes" in dana.text
    at = 300.0

    dana.sign_in("dana", WORDS)

    assert "Hello!" in dana.page


def test_attempts_are_counted_by_name_and_by_address() -> None:
    at = 0.0
    attempts = Attempts(lambda: at)
    for _ in range(5):
        assert attempts.wait("dana", "10.0.0.1") == 0
        attempts.failed("dana", "10.0.0.1")
    assert attempts.wait("dana", "10.0.0.1") == 300
    assert attempts.wait("dana", "10.0.0.2") == 0
    assert attempts.wait("vera", "10.0.0.1") == 0
    at = 299.0
    assert attempts.wait("dana", "10.0.0.1") == 1
    at = 300.0
    assert attempts.wait("dana", "10.0.0.1") == 0
    for each in range(20):
        attempts.failed(f"name {each}", "10.0.0.3")
    assert attempts.wait("dana", "10.0.0.3") > 0
    for each in range(50):
        attempts.failed("ada", f"10.1.0.{each}")
    assert attempts.wait("ada", "10.2.0.1") > 0
    for each in range(Attempts.KEPT):
        attempts.failed(f"{each}", f"{each}")
    assert len(attempts._failed) == Attempts.KEPT


# -- roles ---------------------------------------------------------------------------------------------------------


def test_a_viewer_looks_and_an_approver_decides_and_an_admin_does_all(action: PendingAction) -> None:
    conversation = f"/conversations/{action.conversation_id}"
    forms = {
        f"/approvals/{action.id}": Role.APPROVER,
        "/approvals": Role.APPROVER,
        f"{conversation}/step-in": Role.APPROVER,
        f"{conversation}/write": Role.APPROVER,
        f"{conversation}/fire": Role.ADMIN,
        "/waiting/payments": Role.APPROVER,
        "/outbox/requeue": Role.ADMIN,
        "/outbox/pause": Role.ADMIN,
        "/health/verify": Role.ADMIN,
    }
    there = [route for route in console().routes if isinstance(route, Route) and "POST" in (route.methods or ())]
    asks = [{"type": "http", "path": path, "method": "POST"} for path in forms]
    tried = [route for route in there if any(route.matches(ask)[0] is Match.FULL for ask in asks)]
    assert {route.name for route in there if route not in tried} == {"sign_in", "sign_out"}  # none is forgotten
    for mine in Role:
        app = console(authenticate=lambda request, mine=mine: Account("somebody", mine))  # type: ignore[misc]
        somebody = Visitor(app)
        for path in ("/", "/pipeline", "/waiting", "/conversations", conversation, "/outbox", "/health"):
            somebody.look(path)
            assert somebody.status == 200
            # Nobody is shown a form that they may not send.
            assert all(mine.may(needed) for form, needed in forms.items() if f'action="{form}"' in somebody.page)
        token = app.state.site.sessions.token(
            app.state.site.sessions.read(somebody.client.cookies["close_engine_console"])
        )
        for path, needed in forms.items():
            somebody.send(path, token=token, seen="NO_STAGE")
            assert (somebody.status == 403) is not mine.may(needed), (mine, path)
            assert ("takes the role" in somebody.text) is not mine.may(needed)
    assert is_pending(action)


def test_opting_in_takes_an_admin(action: PendingAction) -> None:
    dana = Visitor(console(authenticate=lambda request: Account("dana", Role.APPROVER)))
    path = f"/conversations/{action.conversation_id}"
    dana.look(path)
    dana.send(f"{path}/step-in", verb="opt out")
    dana.send(f"{path}/step-in", verb="opt in")
    assert dana.status == 403


#: What a console of viewers needs, as docs/console.md says, and instead of all of the leads' columns, a worker's.
READER = [
    "GRANT SELECT ON leads, close_engine_conversations, pending_actions TO {role}",
    "GRANT USAGE ON SCHEMA close_engine TO {role}",
    "GRANT SELECT ON ALL TABLES IN SCHEMA close_engine TO {role}",
]


@pytest.mark.parametrize("rights", [READER, WORKER], ids=["reader", "worker"])
def test_it_works_with_a_database_role_of_few_rights(rights: list[str], role: str, postgres_url: str) -> None:  # noqa: F811
    close_engine.connect(postgres_url)
    conversation = close_engine.open_conversation(new_lead(autonomy_level=AutonomyLevel.MANUAL), EntryPoint.SMS_REPLY)
    drafted = submit(bring_to(conversation, Stage.QUALIFYING), ActionType.SEND_MESSAGE, "Hello!")
    assert isinstance(drafted, PendingAction)
    current().database.close()
    granted(postgres_url, role, rights)
    close_engine.connect(url_as(postgres_url, role))
    somebody, one = Visitor(console()), f"/conversations/{conversation.id}"
    for path in ("/", "/pipeline", "/waiting", "/conversations?text=555", one, "/outbox", "/health"):
        somebody.look(path)
        assert somebody.status == 200, path
    somebody.look()
    somebody.send(f"/approvals/{drafted.id}", verb="approve", message="Hello!")
    current().database.close()

    close_engine.connect(postgres_url)
    if rights is READER:
        assert (somebody.status, "permission denied" in somebody.text) == (503, True)
        assert is_pending(drafted)
    else:
        assert "Approved." in somebody.text
        somebody.look(one)
        somebody.send(f"{one}/write", message="It is me.")
        assert "Your text is in the outbox." in somebody.text
    current().database.close()


# -- forms and headers ---------------------------------------------------------------------------------------------


def test_a_form_of_another_page_or_session_is_refused(action: PendingAction) -> None:
    app = console(accounts=Accounts.of(LINES.values()))
    dana, ada = Visitor(app), Visitor(app)
    dana.sign_in("dana", WORDS)
    ada.sign_in("ada", WORDS)
    for token in ("", "nonsense", "é", ada.token):
        dana.send(f"/approvals/{action.id}", verb="approve", message="Hello!", token=token)
        assert (dana.status, is_pending(action)) == (403, True), token
    # Nor is anybody signed in by a form of another page.
    stranger = Visitor(app)
    stranger.send("/sign-in", name="dana", password=WORDS, token="")
    assert stranger.status == 403
    answer = dana.client.get(f"/approvals/{action.id}")
    assert (answer.status_code, is_pending(action)) == (405, True)


def test_a_form_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, action: PendingAction) -> None:
    app = console()

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        await app(scope, anyio.sleep_forever, send)  # type: ignore[arg-type]

    monkeypatch.setattr(page, "FORM_TIMEOUT", 0.01)
    here = Visitor(silent)
    here.send(f"/approvals/{action.id}", verb="approve", message="Hello!")
    assert (here.status, is_pending(action)) == (408, True)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_form_of_another_site_signs_nobody_out(site: str, action: PendingAction) -> None:
    dana = Visitor(console(accounts=Accounts.of(LINES.values())))
    dana.sign_in("dana", WORDS)
    for path in ("/sign-out", "/sign-in", f"/approvals/{action.id}"):
        # A browser keeps the cookies back, but takes those of the answer.
        answer = dana.client.post(path, headers={"Sec-Fetch-Site": site, "Cookie": ""}, follow_redirects=False)
        assert (answer.status_code, answer.headers.get("set-cookie")) == (403, None), path
    assert "Hello!" in dana.look()


def test_a_form_that_is_too_long_is_refused(action: PendingAction) -> None:
    here = Visitor(console())
    here.look()
    here.send(f"/approvals/{action.id}", verb="approve", message="x" * 300_000)
    assert (here.status, is_pending(action)) == (413, True)
    answer = here.client.post(f"/approvals/{action.id}", content=iter([b"verb=approve"]))
    assert (answer.status_code, is_pending(action)) == (413, True)
    here.look()
    here.send(
        f"/approvals/{action.id}", verb="approve", message="nul \0 and \ud800".encode("utf-8", "replace").decode()
    )
    assert here.status == 200


def test_every_response_keeps_a_page_to_itself(action: PendingAction) -> None:
    here = Visitor(console())
    for path in ("/", "/sign-in", "/nothing", "/conversations/nobody", "/conversations/static/x", "/static/console.js"):
        here.look(path)
        policy = here.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert here.headers["x-content-type-options"] == "nosniff"
        assert here.headers["x-frame-options"] == "DENY"
        assert here.headers["cache-control"] == ("no-cache" if path.startswith("/static") else "no-store")
        assert " style=" not in here.page
        assert " onclick=" not in here.page


def test_no_template_lets_anything_through_unescaped() -> None:
    templates = sorted(Path(rendering.__file__).parent.glob("templates/*.html"))
    assert len(templates) > 10
    for template in templates:
        text = template.read_text()
        assert re.findall(r"\|\s*safe|autoescape|Markup|\son\w+=|\sstyle=|<script(?! src)|<style", text) == [], (
            template.name
        )
        # A value in an attribute without quotation marks would be several.
        assert re.findall(r"=\{\{", text) == [], template.name
    assert rendering.environment().autoescape is True


def test_another_application_says_who_it_is(action: PendingAction) -> None:
    async def who(request: Request) -> Account | None:
        name = request.headers.get("x-user")
        return Account(name, Role.APPROVER) if name else None

    somebody = Visitor(console(authenticate=who), base_url="https://agency.example.com", address="203.0.113.9")
    somebody.look()
    assert (somebody.status, "Hello!" in somebody.page) == (401, False)
    somebody.look(**{"X-User": "dana"})
    assert (somebody.status, "Hello!" in somebody.page) == (200, True)
    assert "Sign out" not in somebody.text
    somebody.look("/sign-in")
    assert somebody.status == 404


# -- accounts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line", ["dana", "dana:approver", "dana:owner:$argon2id$v=19$x", "dana:admin:plain words", ":admin:$argon2id$x"]
)
def test_a_line_that_is_no_account_is_refused_without_being_quoted(line: str) -> None:
    with pytest.raises(ConfigurationError, match="Line 2 of the accounts") as refusal:
        Accounts.of(["# ours", line])
    assert line not in str(refusal.value)


def test_accounts_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Accounts.of_environment() is None
    monkeypatch.setenv("CLOSE_ENGINE_ACCOUNTS", "\n".join(LINES.values()))
    accounts = Accounts.of_environment()
    assert accounts
    assert accounts["ada"].role is Role.ADMIN
    assert "argon2" not in repr(accounts["ada"])
    monkeypatch.setenv("CLOSE_ENGINE_ACCOUNTS_FILE", str(tmp_path / "accounts.txt"))
    with pytest.raises(ConfigurationError, match="close-engine user add"):
        Accounts.of_environment()


@pytest.mark.parametrize(
    ("name", "word", "password", "what"),
    [
        ("da:na", "viewer", WORDS, "name"),
        ("", "viewer", WORDS, "name"),
        (" dana", "viewer", WORDS, "name"),
        ("#dana", "viewer", WORDS, "name"),
        ("dana\n", "viewer", WORDS, "name"),
        ("dana", "owner", WORDS, "role"),
        ("dana", "viewer", "short", "password"),
    ],
)
def test_an_account_that_cannot_be_is_refused(name: str, word: str, password: str, what: str) -> None:
    with pytest.raises(InvalidValue, match=what) as refusal:
        account_line(name, word, password)
    assert password not in str(refusal.value) or what != "password"


def test_close_engine_user_add_writes_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    path = tmp_path / "accounts.txt"
    for words in (WORDS, "another horse battery"):
        ended = run("user", "add", "dana", "--role", "approver", "--file", str(path), input=f"{words}\n")
        assert (ended.code, ended.err) == (0, "")
        assert words not in ended.out
    accounts = Accounts.in_file(path)

    assert accounts.check("dana", "another horse battery") == accounts["dana"]
    assert accounts.check("dana", WORDS) is None
    assert accounts["dana"].role is Role.APPROVER
    assert path.stat().st_mode & 0o777 == 0o600
    printed = run("user", "add", "vera", "--role", "viewer", input=f"{WORDS}\n")
    assert Accounts.of([printed.out]).check("vera", WORDS) == Account(
        "vera", Role.VIEWER, printed.out.split(":")[2].strip()
    )
    refused = run("user", "add", "dana", input="short\n")
    assert (refused.code, "12" in refused.err, "short" in refused.err) == (1, True, False)
