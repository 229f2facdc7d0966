"""The console in a real browser: what people do with it, and what must not happen to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peewee
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Route

from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    OutboxMessage,
    PendingAction,
    Stage,
    outbox,
    receive,
    record_payment,
    submit,
)
from close_engine.testing import MovableClock
from close_engine.web.console import Account, Accounts, Role, console
from close_engine.web.console.accounts import account_line
from tests.browser import find_browser, served, what_is_missing
from tests.prose import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

ConversationIn = Callable[..., CloseEngineConversation]

PAGES = ("/", "/waiting", "/pipeline", "/conversations", "/outbox", "/health")
PHONE = {"width": 360, "height": 740}


@pytest.fixture(params=["sqlite-file"])
def kind(request: pytest.FixtureRequest) -> str:
    """A browser sees no difference between databases."""
    return str(request.param)


@pytest.fixture(scope="module")
def chromium(request: pytest.FixtureRequest) -> Iterator[Browser]:
    """The browser. Without one these tests are left out, unless the run insists (`--browser`)."""
    missing = what_is_missing()
    if missing and not request.config.getoption("--browser"):
        pytest.skip(missing)
    assert not missing, missing
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=find_browser(), args=arguments)
        yield browser
        browser.close()


class Windows:
    """Opens windows, each with cookies of its own, and notes what goes wrong in them."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.url = url
        self.wrong: list[str] = []
        self._browser = browser
        self._contexts: list[BrowserContext] = []

    def open(self, path: str = "/", **options: Any) -> Page:
        context = self._browser.new_context(base_url=self.url, locale="en-GB", **options)
        self._contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        page.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))
        page.goto(path)
        return page

    def _note(self, message: Any) -> None:
        # That a page was refused is no fault of the page.
        if message.type in ("error", "warning") and "responded with a status of 4" not in message.text:
            self.wrong.append(message.text)

    def close(self) -> None:
        for context in self._contexts:
            context.close()


@pytest.fixture
def windows(chromium: Browser, close_engine_database: peewee.Database) -> Iterator[Windows]:
    """Windows of the owner, at the machine itself."""
    with served(console()) as url:
        found = Windows(chromium, url)
        yield found
        found.close()
    assert found.wrong == []


WORDS = "correct horse battery"


@cache
def account_lines() -> list[str]:
    """A hash takes time, on purpose."""
    return [account_line("dana", Role.APPROVER, WORDS), account_line("vera", Role.VIEWER, WORDS)]


@pytest.fixture
def office(chromium: Browser, close_engine_database: peewee.Database) -> Iterator[Windows]:
    """Windows in which one signs in."""
    app = console(accounts=Accounts.of(account_lines()))
    with served(app) as url:
        found = Windows(chromium, url)
        found.app = app  # type: ignore[attr-defined]
        yield found
        found.close()
    assert found.wrong == []


def sign_in(page: Page, name: str) -> None:
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(WORDS)
    page.get_by_role("button", name="Sign in").click()
    page.get_by_text(f"{name}, ").wait_for()


@pytest.fixture
def drafts(conversation_in: ConversationIn) -> list[PendingAction]:
    """Three drafts to three leads, in the order in which they expire."""
    made = []
    for number in range(1, 4):
        conversation = conversation_in(Stage.QUALIFYING, AutonomyLevel.MANUAL, phone=f"+1212555010{number}")
        receive(conversation.lead_id, f"SM{number}", f"I am lead {number}.")
        conversation.reload()
        action = submit(
            conversation,
            ActionType.SEND_MESSAGE,
            f"Hello, lead {number}.",
            actor="claude",
            expires_after=timedelta(hours=number),
        )
        assert isinstance(action, PendingAction)
        made.append(action)
    return made


def statuses(drafts: list[PendingAction]) -> list[ActionStatus]:
    return [PendingAction.get_by_id(each.id).status for each in drafts]


PENDING, APPROVED, REJECTED, _ = ActionStatus


def sent() -> list[str | None]:
    return [message.body for message in OutboxMessage.select().order_by(OutboxMessage.id)]


# -- deciding ------------------------------------------------------------------------------------------------------


def test_approve_edit_and_reject(windows: Windows, drafts: list[PendingAction]) -> None:
    page = windows.open()
    assert page.get_by_text("I am lead 1.").is_visible()
    page.get_by_role("button", name="Approve", exact=True).click()

    page.get_by_text("Approved.").wait_for()
    assert page.get_by_text("I am lead 2.").is_visible()  # the next one
    page.get_by_label("The text to send").fill("Hello, in my words.")
    page.get_by_role("button", name="Approve with my words").click()

    page.get_by_text("Approved with your words.").wait_for()
    page.get_by_label("Why not", exact=True).fill("too pushy")
    page.get_by_role("button", name="Reject", exact=True).click()

    page.get_by_text("Nothing waits for approval.").wait_for()
    assert statuses(drafts) == [APPROVED, APPROVED, REJECTED]
    assert sent() == ["Hello, lead 1.", "Hello, in my words."]


def test_several_at_once(windows: Windows, drafts: list[PendingAction]) -> None:
    page = windows.open()
    page.get_by_label("Tick draft 1").check()
    page.get_by_label("Tick draft 3").check()
    page.get_by_role("button", name="Approve them").click()

    page.get_by_text("Approved: 2.").wait_for()
    assert statuses(drafts) == [APPROVED, PENDING, APPROVED]


def test_enter_in_a_reason_rejects_and_never_approves(windows: Windows, drafts: list[PendingAction]) -> None:
    page = windows.open()
    page.get_by_label("Tick draft 2").check()
    page.get_by_label("Those that are ticked: why not").fill("no")
    page.keyboard.press("Enter")
    page.get_by_text("Rejected: 1.").wait_for()
    page.get_by_label("Why not", exact=True).fill("no")
    page.keyboard.press("Enter")
    page.get_by_text("Rejected.").wait_for()
    assert statuses(drafts) == [REJECTED, REJECTED, PENDING]


def test_two_windows_at_once(office: Windows, drafts: list[PendingAction]) -> None:
    first, second = office.open(), office.open()
    sign_in(first, "dana")
    sign_in(second, "dana")
    second.get_by_label("The text to send").fill("My words.")
    first.get_by_role("button", name="Approve", exact=True).click()
    first.get_by_text("Approved.").wait_for()

    second.get_by_role("button", name="Approve with my words").click()

    second.get_by_text("dana was first: it is approved already. Your text was not sent.").wait_for()
    assert second.get_by_label("Your text, which was not sent").input_value() == "My words."
    assert sent() == ["Hello, lead 1."]


def test_the_keyboard_alone(windows: Windows, drafts: list[PendingAction]) -> None:
    page = windows.open()

    def go(key: str, lead: int) -> None:
        page.keyboard.press(key)
        page.get_by_text(f"I am lead {lead}.").wait_for()
        page.wait_for_load_state()  # with the script, which listens for the next key

    go("j", 2)
    go("j", 3)
    go("k", 2)
    page.keyboard.press("e")
    page.keyboard.type(" jkaer")  # keys are words here
    page.keyboard.press("Escape")
    page.keyboard.press("a")
    page.get_by_text("Approved with your words.").wait_for()
    page.get_by_text("I am lead 3.").wait_for()
    page.wait_for_load_state()
    page.keyboard.press("r")
    page.keyboard.type("not now")
    page.keyboard.press("Enter")
    page.get_by_text("Rejected.").wait_for()
    assert statuses(drafts) == [PENDING, APPROVED, REJECTED]
    assert sent() == ["Hello, lead 2. jkaer"]
    page.goto("/")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the page"
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Approve":
            break
    page.keyboard.press("Enter")
    page.get_by_text("Nothing waits for approval.").wait_for()


def test_without_script(windows: Windows, drafts: list[PendingAction]) -> None:
    page = windows.open(java_script_enabled=False)
    page.get_by_label("The text to send").fill("Hello,\nwithout script.")
    page.get_by_role("button", name="Approve", exact=True).click()
    page.get_by_text("Approved with your words.").wait_for()
    page.get_by_label("Why not", exact=True).fill("no")
    page.get_by_role("button", name="Reject", exact=True).click()
    page.get_by_text("Rejected.").wait_for()
    page.get_by_role("link", name="Send message to").or_(
        page.get_by_role("link", name="+12125550103").first
    ).first.click()
    page.get_by_role("button", name="Take over", exact=True).click()
    page.get_by_label("Your text").fill("It is me.")
    page.get_by_role("button", name="Send", exact=True).click()
    page.get_by_text("Your text is in the outbox.").wait_for()
    assert sent() == ["Hello,\nwithout script.", "It is me."]


def test_pages_are_live_and_take_nothing_from_under_somebodys_hands(
    windows: Windows, drafts: list[PendingAction], conversation_in: ConversationIn
) -> None:
    writing, looking = windows.open(), windows.open()
    writing.get_by_label("The text to send").fill("I am writing")

    conversation = conversation_in(Stage.QUALIFYING, AutonomyLevel.MANUAL, phone="+12125550109")
    submit(conversation, ActionType.SEND_MESSAGE, "I expire first.", expires_after=timedelta(minutes=1))

    looking.get_by_text("I expire first.").wait_for()
    writing.get_by_text("Something has changed.").wait_for()
    # What somebody looks at, and is about to decide on, stays.
    assert looking.get_by_label("The text to send").input_value() == "Hello, lead 1."
    assert writing.get_by_label("The text to send").input_value() == "I am writing"
    looking.keyboard.press("a")
    looking.get_by_text("Approved.").wait_for()
    assert sent() == ["Hello, lead 1."]


def test_a_page_that_nobody_sees_holds_no_connection(
    windows: Windows, drafts: list[PendingAction], conversation_in: ConversationIn
) -> None:
    page = windows.open()
    turn = """(hidden) => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    with page.expect_event("requestfailed", lambda request: "/events" in request.url):
        page.evaluate(turn, True)
    conversation = conversation_in(Stage.QUALIFYING, AutonomyLevel.MANUAL, phone="+12125550109")
    submit(conversation, ActionType.SEND_MESSAGE, "I expire first.", expires_after=timedelta(minutes=1))
    page.evaluate(turn, False)
    page.get_by_text("I expire first.").wait_for()


# -- those who may not ---------------------------------------------------------------------------------------------


def test_a_session_that_is_over(office: Windows, drafts: list[PendingAction]) -> None:
    page = office.open()
    sign_in(page, "dana")
    page.get_by_label("The text to send").fill("These are my words.")
    sessions = office.app.state.site.sessions  # type: ignore[attr-defined]
    at = sessions.clock()
    sessions.clock = lambda: at + 13 * 3600

    page.get_by_role("button", name="Approve with my words").click()

    page.get_by_role("heading", name="Your session is over").wait_for()
    assert page.get_by_label("What you wrote").input_value() == "These are my words."
    page.get_by_role("link", name="Sign in").click()
    sign_in(page, "dana")
    assert statuses(drafts) == [PENDING] * 3


def test_a_viewer_who_tries_to_approve(office: Windows, drafts: list[PendingAction]) -> None:
    page = office.open()
    sign_in(page, "vera")
    page.keyboard.press("a")
    assert page.get_by_role("button", name="Approve").count() == 0
    status = page.evaluate(
        """async (path) => {
            const token = document.querySelector("[name=token]").value;
            return (await fetch(path, {method: "POST", body: new URLSearchParams({token, verb: "approve"})})).status;
        }""",
        f"/approvals/{drafts[0].id}",
    )
    assert (status, statuses(drafts)) == (403, [PENDING] * 3)


def test_a_form_of_another_site_decides_nothing(office: Windows, drafts: list[PendingAction]) -> None:
    async def evil(request: Request) -> HTMLResponse:
        target = f"{office.url}/approvals/{drafts[0].id}"
        form = f"<form method=post action={target}><input name=verb value=approve><button>Win a prize</button></form>"
        return HTMLResponse(
            f"<!doctype html><title>Prizes</title><body>{form}<iframe src={office.url}/></iframe></body>"
        )

    page = office.open()
    sign_in(page, "dana")
    with served(Starlette(routes=[Route("/", evil)])) as url:
        page.goto(url.replace("127.0.0.1", "localhost"))
        page.get_by_role("button", name="Win a prize").click()
        page.wait_for_url("**/approvals/**")
    assert statuses(drafts) == [PENDING] * 3
    page.goto(office.url)
    page.get_by_text("dana, approver").wait_for()  # still
    # The frame was refused, and the browser says so.
    assert all("frame" in sentence.lower() for sentence in office.wrong)
    office.wrong.clear()


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>[red]x[/red]</b> \u202egnp.exe\u202c \u0007"


def test_hostile_text_in_every_field(windows: Windows, conversation_in: ConversationIn) -> None:
    conversation = conversation_in(Stage.BUILDING, AutonomyLevel.MANUAL)
    receive(conversation.lead_id, "SM1", HOSTILE)
    conversation.reload()
    conversation.record(questions=[HOSTILE], data={HOSTILE: HOSTILE, "link": "javascript:alert(3)"})
    conversation.reload()
    links = {"previewUrl": "javascript:alert(4)", "ifLeadWrites": "send"}
    submit(conversation, ActionType.SEND_PREVIEW, HOSTILE, metadata=links, actor=HOSTILE)
    outbox.enqueue(conversation, HOSTILE)
    outbox.claim(worker=HOSTILE, topics=[HOSTILE])[0].give_up(HOSTILE)
    conversation.stall(actor=HOSTILE, reason=HOSTILE, metadata={HOSTILE: HOSTILE})
    page = windows.open()
    for path in (*PAGES, f"/conversations/{conversation.id}", f"/conversations?text={HOSTILE}"):
        page.goto(path)
        assert page.locator("main script, main img, main b, a[href^=javascript]").count() == 0, path
        text = page.locator("main").inner_text()
        assert "\u202e" not in text, path
    page.goto(f"/conversations/{conversation.id}")
    assert "<script>alert(1)</script>" in page.locator("main").inner_text()


# -- who sees it how -----------------------------------------------------------------------------------------------


@pytest.fixture
def agency(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> CloseEngineConversation:
    """An agency on an ordinary day: something on every page."""
    close_engine_clock.now = datetime(2026, 3, 2, 9, tzinfo=timezone.utc)
    stages = [
        *[Stage.QUALIFYING] * 3,
        Stage.BUILDING,
        Stage.EDIT_LOOP,
        Stage.COMPLETED,
        Stage.STALLED,
        Stage.CLOSED_LOST,
    ]
    for day in range(5):
        for number, stage in enumerate(stages[: 4 + day]):
            conversation_in(stage, phone=f"+1212555{day}{number:03}")
        close_engine_clock.move(timedelta(days=1, hours=1))
    paid = conversation_in(Stage.PAYMENT_SENT, phone="+12125559001")
    record_payment(paid.lead_id, "pi_1", amount=90000, currency="USD")
    record_payment(paid.lead_id, "pi_2", amount=90000, currency="USD")
    for number, words in enumerate(("How much is it?", "Can it have a shop?")):
        owed = conversation_in(Stage.QUALIFYING, phone=f"+1212555910{number}")
        receive(owed.lead_id, f"SM{number}", words)
        outbox.enqueue(owed, "build_site")
    outbox.claim(worker="worker-1")[0].give_up("HTTPError: 502 Bad Gateway")
    outbox.claim(worker="worker-1")[0].retry("RateLimitError: slow down")
    owed.take_over("dana", reason="the lead asked for a human")
    shown = conversation_in(Stage.BUILDING, AutonomyLevel.MANUAL, phone="+12125559200")
    texts = ("Hi, I saw your ad. We are a bakery in Leeds.", "Mostly bread and cakes, three of us.", "Great, show me!")
    for number, words in enumerate(texts):
        receive(shown.lead_id, f"SM1{number}", words)
        close_engine_clock.move(timedelta(minutes=7))
    shown.reload()
    shown.record(questions=["business", "staff"], data={"business": "a bakery in Leeds", "staff": 3})
    shown.reload()
    link = {"previewUrl": "https://preview.example.com/leeds-bakery"}
    submit(shown, ActionType.SEND_PREVIEW, "Here is your new site! What do you think?", metadata=link, actor="claude")
    receive(shown.lead_id, "SM20", "Is it ready?")
    for number in range(3):
        each = conversation_in(Stage.QUALIFYING, AutonomyLevel.MANUAL, phone=f"+1212555930{number}")
        wait = timedelta(hours=30 + number)
        submit(each, ActionType.SEND_MESSAGE, "Hello! What does your business do?", actor="claude", expires_after=wait)
    close_engine_clock.move(timedelta(minutes=20))
    return shown


@pytest.mark.parametrize(("scheme", "size"), [("light", {"width": 1280, "height": 900}), ("dark", PHONE)])
def test_axe_finds_no_serious_fault_on_a_desk_or_on_a_phone(
    scheme: str, size: Any, windows: Windows, agency: CloseEngineConversation
) -> None:
    page = windows.open(color_scheme=scheme, viewport=size)
    for path in (*PAGES, f"/conversations/{agency.id}", "/conversations/nobody"):
        page.goto(path)
        assert serious_faults(page) == [], path
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], path


def serious_faults(page: Page) -> list[tuple[str, str]]:
    """Return what axe finds on a page: the rule, and the first element that breaks it."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, options={"resultTypes": ["violations"]}).response
    assert len(found["passes"]) > 10  # it has really looked
    worst = [each for each in found["violations"] if each["impact"] in ("serious", "critical")]
    return [(each["id"], each["nodes"][0]["html"][:200]) for each in worst]


def test_a_phone(windows: Windows, drafts: list[PendingAction]) -> None:
    page = windows.open(viewport=PHONE, has_touch=True)
    page.get_by_role("button", name="Approve", exact=True).tap()
    page.get_by_text("Approved.").wait_for()
    page.get_by_role("link", name="Message to +12125550103").tap()
    page.get_by_text("I am lead 3.").wait_for()
    page.get_by_label("Why not", exact=True).fill("no")
    page.get_by_role("button", name="Reject", exact=True).tap()
    page.get_by_text("Rejected.").wait_for()
    assert statuses(drafts) == [APPROVED, PENDING, REJECTED]


def test_signing_in_can_be_used_by_everybody(office: Windows) -> None:
    assert serious_faults(office.open(viewport=PHONE)) == []


def test_screenshots_for_the_docs(
    windows: Windows, agency: CloseEngineConversation, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The pictures in docs/console.md. `make screenshots` keeps them."""
    place = ROOT / "docs/images" if request.config.getoption("--screenshots") else tmp_path
    page = windows.open(viewport={"width": 1200, "height": 860})
    page.screenshot(path=place / "console-approvals.png")
    page.goto("/pipeline")
    page.screenshot(path=place / "console-pipeline.png")
    page.goto(f"/conversations/{agency.id}")
    page.screenshot(path=place / "console-conversation.png")
    phone = windows.open(viewport=PHONE, color_scheme="dark")
    phone.screenshot(path=place / "console-phone.png")

    shown = set(re.findall(r"images/(console-\w+\.png)", (ROOT / "docs/console.md").read_text()))
    assert shown == {each.name for each in place.glob("console-*.png")}
    assert all(each.stat().st_size > 10_000 for each in place.glob("console-*.png"))


def test_another_application_says_who_it_is(windows: Windows, drafts: list[PendingAction]) -> None:
    app = console(authenticate=lambda request: Account("dana", Role.APPROVER))
    with served(app) as url:
        page = windows.open(url)
        page.get_by_role("button", name="Approve", exact=True).click()
        page.get_by_text("Approved.").wait_for()
        page.close()
    assert OutboxMessage.get().approved_by == "dana"
