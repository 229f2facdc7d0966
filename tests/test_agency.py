"""The agency: its settings, what it subscribes to, and how it builds websites. The providers are in test_end_to_end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionType,
    CannotBeSent,
    CloseEngineConversation,
    ConfigurationError,
    EntryPoint,
    InvalidValue,
    MessageStatus,
    OutboxMessage,
    Stage,
    Worker,
    open_conversation,
    receive,
    submit,
)
from close_engine.agency import PACKAGES, Agency, AgencySender, Settings, load_agency, require_packages
from close_engine.drafting import DRAFT, Question
from close_engine.subscriptions import subscriptions
from close_engine.testing import MovableClock, new_lead
from tests.command_line import run
from tests.workers import messages

SECRETS = {
    "TWILIO_AUTH_TOKEN": "Xyzzy-token",
    "STRIPE_API_KEY": "sk_test_Xyzzy",
    "STRIPE_WEBHOOK_SECRET": "whsec_Xyzzy",
    "ANTHROPIC_API_KEY": "Xyzzy-key",
}
ENVIRONMENT = {
    "CLOSE_ENGINE_AGENCY": "tests.test_agency:AGENCY",
    "CLOSE_ENGINE_PUBLIC_URL": "https://crm.example.com/",
    "TWILIO_ACCOUNT_SID": f"AC{'0' * 32}",
    "TWILIO_FROM": "+15550199",
    **SECRETS,
}


def build_nothing(conversation: CloseEngineConversation, edits: list[str]) -> str:
    return "https://preview.example.com/1"


AGENCY = Agency(
    persona="You are Mia of Sunny Sites.",
    questions=[Question("business", "What does your business do?")],
    build_site=build_nothing,
    amount=49900,
    currency="USD",
    product="A website",
)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_are_read_for_a_server_and_for_a_worker() -> None:
    server, worker = Settings.read("serve", ENVIRONMENT), Settings.read("worker", ENVIRONMENT)

    assert (server.public_url, server.live) == ("https://crm.example.com", False)
    assert worker["TWILIO_FROM"] == "+15550199"
    assert Settings.read("serve", {**ENVIRONMENT, "STRIPE_API_KEY": "rk_live_1"}).live


@pytest.mark.parametrize(
    ("role", "needed"),
    [
        (
            "serve",
            [
                "CLOSE_ENGINE_AGENCY",
                "CLOSE_ENGINE_PUBLIC_URL",
                "TWILIO_AUTH_TOKEN",
                "STRIPE_API_KEY",
                "STRIPE_WEBHOOK_SECRET",
            ],
        ),
        (
            "worker",
            [
                "CLOSE_ENGINE_AGENCY",
                "CLOSE_ENGINE_PUBLIC_URL",
                "TWILIO_ACCOUNT_SID",
                "TWILIO_AUTH_TOKEN",
                "STRIPE_API_KEY",
                "ANTHROPIC_API_KEY",
                "TWILIO_FROM or TWILIO_MESSAGING_SERVICE_SID",
            ],
        ),
    ],
)
def test_one_error_names_everything_that_is_missing(role: Any, needed: list[str]) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load_agency(role, {})

    first, *lines = str(refusal.value).splitlines()
    assert first == "The environment is not right:"
    assert [line.removeprefix("  - ").partition(" is missing: ")[0] for line in lines] == needed
    assert all(line.endswith(".") for line in lines)


def test_what_is_malformed_is_named_and_not_shown() -> None:
    wrong = dict.fromkeys(ENVIRONMENT, "Xyzzy! wrong") | {
        "TWILIO_MESSAGING_SERVICE_SID": "Xyzzy",
        "STRIPE_API_BASE": "x",
    }

    with pytest.raises(ConfigurationError) as refusal:
        load_agency("worker", wrong)

    lines = str(refusal.value).splitlines()[1:]
    named = [line.split()[1] for line in lines if " is malformed: it must be " in line]
    assert sorted(named) == sorted(wrong)
    assert "Xyzzy" not in str(refusal.value)


def test_texts_come_from_a_number_or_a_service_and_not_from_both() -> None:
    both = {**ENVIRONMENT, "TWILIO_MESSAGING_SERVICE_SID": f"MG{'a' * 32}"}

    with pytest.raises(ConfigurationError, match="are both there: give one of the two"):
        Settings.read("worker", both)
    assert Settings.read("worker", {**both, "TWILIO_FROM": ""})["TWILIO_MESSAGING_SERVICE_SID"].startswith("MG")


def test_secrets_are_in_no_repr() -> None:
    settings = Settings.read("worker", ENVIRONMENT)

    assert not [value for value in SECRETS.values() if value in repr(settings) or value in str(settings)]


def test_the_agency_is_found_by_its_name() -> None:
    agency, settings = load_agency("worker", ENVIRONMENT)

    assert agency.persona == AGENCY.persona
    assert settings.public_url == "https://crm.example.com"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_such_module:AGENCY", "The module 'no_such_module' cannot be imported"),
        ("tests.test_agency:NOBODY", "and there is no such name in it: name an Agency."),
        ("tests.test_agency:ENVIRONMENT", "and that is a dict: name an Agency."),
    ],
)
def test_an_agency_that_is_not_there_is_said(name: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load_agency("serve", {**ENVIRONMENT, "CLOSE_ENGINE_AGENCY": name})

    assert sentence in str(refusal.value)


def test_every_missing_package_is_named_with_what_to_install() -> None:
    require_packages(*PACKAGES["serve"], *PACKAGES["worker"])

    with pytest.raises(ConfigurationError) as refusal:
        require_packages("no_such_one", "stripe", "nor_this_one")

    assert str(refusal.value) == (
        'An agency needs no_such_one, nor_this_one: install what is missing with pip install "close-engine[agency]".'
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"persona": " "},
        {"product": None},
        {"questions": ["What is its name?"]},
        {"questions": Question("name", "What is its name?")},
        {"amount": 0},
        {"amount": 9.99},
        {"amount": True},
        {"currency": "dollars"},
        {"currency": None},
        {"unknown": "make"},
        {"debounce": 8},
        {"build_site": None},
        {"effects": {DRAFT: print}},
        {"effects": {"tell_owner": None}},
        {"effects": {"SEND_MESSAGE": print}},
    ],
    ids=str,
)
def test_an_agency_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as refusal:
        replace(AGENCY, **wrong)

    assert refusal.value.field in wrong


# -- what follows from what --------------------------------------------------------------------------------------------


def drafts() -> list[OutboxMessage]:
    return [message for message in messages() if message.topic == DRAFT]


def test_subscribing_again_changes_nothing(database: peewee.Database) -> None:
    AGENCY.subscribe()
    first = subscriptions()
    AGENCY.subscribe()

    assert subscriptions() == first
    assert [(each.topic, each.event, each.stage) for each in first] == [
        ("build_site", "stage:entered", "BUILDING"),
        ("build_site", "stage:entered", "EDIT_LOOP"),
        (DRAFT, "action:rejected", None),
        (DRAFT, "conversation:handed_back", None),
        (DRAFT, "lead:wrote", None),
        (DRAFT, "stage:entered", "INITIATED"),
    ]
    assert {each.debounce for each in first if each.topic == DRAFT} == {timedelta(seconds=8)}


def test_a_lead_who_opens_the_conversation_by_texting_gets_one_draft(database: peewee.Database) -> None:
    AGENCY.subscribe()

    receive(new_lead(), "SM1", "Hi!", open=EntryPoint.SMS_REPLY)

    (draft,) = drafts()
    assert sorted(event["event"] for event in draft.payload["events"]) == ["lead:wrote", "stage:entered"]


def test_a_conversation_that_the_crm_opens_gets_its_first_text(database: peewee.Database) -> None:
    AGENCY.subscribe()

    open_conversation(new_lead(), EntryPoint.REP_CLOSE)

    assert [draft.payload["event"] for draft in drafts()] == ["stage:entered"]


# -- websites ----------------------------------------------------------------------------------------------------------


class Texts:
    """Sends no text, and finds what it is told to."""

    def __init__(self) -> None:
        self.sent: list[str | None] = []
        self.found: str | None = None

    def send(self, message: OutboxMessage) -> str | None:
        self.sent.append(message.body)
        return f"SM-{message.send_key}"

    def find(self, message: OutboxMessage) -> str | None:
        return self.found


class Builder:
    """Builds sites, and remembers which edits were asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, conversation: CloseEngineConversation, edits: list[str]) -> str:
        self.asked.append(edits)
        return f"https://preview.example.com/{1 + len(edits)}"


@pytest.fixture
def texts() -> Texts:
    return Texts()


@pytest.fixture
def building(conversation_in: Callable[..., CloseEngineConversation]) -> CloseEngineConversation:
    """A conversation whose website is to be built."""
    AGENCY.subscribe()
    conversation = conversation_in(Stage.BUILDING)
    for draft in drafts():
        draft.withdraw("not of interest here")
    return conversation


def work(texts: Texts, build_site: Any = build_nothing, **changes: Any) -> None:
    """Run a worker of an agency until it has nothing more to do, without drafting anything."""
    agency = replace(AGENCY, build_site=build_site, **changes)
    topics = [topic for topic in agency.topics if topic != DRAFT]
    Worker(AgencySender(agency, texts, lambda message: None), topics=topics, sweep=None).run_until_empty()


def the_build() -> OutboxMessage:
    return next(message for message in messages() if message.topic == "build_site")


def test_a_site_is_built_and_then_a_draft_asked_for(texts: Texts, building: CloseEngineConversation) -> None:
    seen: list[Any] = []

    def build(conversation: CloseEngineConversation, edits: list[str]) -> str:
        assert not close_engine.database.binding.current().database.in_transaction()
        seen.append((conversation.id, edits))
        return "https://preview.example.com/1?v=2"

    building.record(data={"business": "bakery"})
    work(texts, build)

    building.reload()
    assert seen == [(building.id, [])]
    assert building.collected_data == {
        "business": "bakery",
        "preview": {"url": "https://preview.example.com/1?v=2", "edit_round": 0},
    }
    assert the_build().status is MessageStatus.SENT
    (draft,) = [draft for draft in drafts() if draft.status is MessageStatus.PENDING]
    assert draft.key == f"preview:{the_build().send_key}"


def test_edits_are_passed_on_and_the_last_round_is_built(texts: Texts, building: CloseEngineConversation) -> None:
    work(texts)
    building.reload()
    building.send_preview()
    building.request_edits(reason="make it blue")
    build = Builder()
    work(texts, build)

    building.reload()
    assert build.asked == [["make it blue"]]
    assert building.collected_data["preview"] == {"url": "https://preview.example.com/2", "edit_round": 1}


def test_edits_of_before_a_conversation_was_lost_are_not_asked_for_again(
    texts: Texts, building: CloseEngineConversation
) -> None:
    for trigger in ("send_preview", "request_edits", "close_lost", "reopen", "start_qualifying", "start_building"):
        building.fire(trigger, reason="make it blue")
    build = Builder()

    work(texts, build)

    assert build.asked[-1] == []


def test_what_was_built_for_an_older_round_is_not_shown(texts: Texts, building: CloseEngineConversation) -> None:
    def build(conversation: CloseEngineConversation, edits: list[str]) -> str:
        if not edits:  # meanwhile
            building.send_preview()
            building.request_edits(reason="make it blue")
        return f"https://preview.example.com/{len(edits)}"

    work(texts, build)

    building.reload()
    assert building.collected_data["preview"] == {"url": "https://preview.example.com/1", "edit_round": 1}
    assert len([draft for draft in drafts() if draft.status is MessageStatus.PENDING]) == 1


def test_nothing_is_built_for_a_conversation_that_has_closed(texts: Texts, building: CloseEngineConversation) -> None:
    building.close_lost(reason="no interest")
    build = Builder()

    work(texts, build)

    assert (build.asked, the_build().status) == ([], MessageStatus.SENT)


@pytest.mark.parametrize("url", [None, "", "preview", "ftp://example.com", b"https://example.com", "https://a b"])
def test_what_is_no_url_is_no_preview(texts: Texts, building: CloseEngineConversation, url: Any) -> None:
    work(texts, lambda conversation, edits: url)

    message = the_build()
    assert (message.status, message.attempts) == (MessageStatus.PENDING, 1)
    assert "it must return the URL of the preview" in str(message.last_error)
    building.reload()
    assert "preview" not in (building.collected_data or {})


def test_a_builder_whose_lease_is_over_writes_nothing(
    texts: Texts, building: CloseEngineConversation, close_engine_clock: MovableClock
) -> None:
    def build(conversation: CloseEngineConversation, edits: list[str]) -> str:
        if not taken:
            close_engine_clock.move(timedelta(hours=1))
            taken.extend(close_engine.outbox.claim(worker="another", topics=["build_site"]))
        return "https://preview.example.com/late"

    taken: list[OutboxMessage] = []
    (mine,) = close_engine.outbox.claim(worker="mine", topics=["build_site"])
    sender = AgencySender(replace(AGENCY, build_site=build), texts, lambda message: None)

    with pytest.raises(close_engine.LeaseLost):
        sender.send(mine)

    building.reload()
    assert "preview" not in (building.collected_data or {})
    sender.send(taken[0])
    building.reload()
    assert building.collected_data["preview"]["url"] == "https://preview.example.com/late"


# -- other topics ------------------------------------------------------------------------------------------------------


def test_texts_own_effects_and_nothing_else_are_sent(
    texts: Texts, conversation_in: Callable[..., CloseEngineConversation]
) -> None:
    conversation, told = conversation_in(Stage.QUALIFYING), list[str]()
    submit(conversation, ActionType.SEND_MESSAGE, "Hello!")
    mine = close_engine.outbox.enqueue(conversation, "tell_owner", payload={"about": "this"})
    others = close_engine.outbox.enqueue(conversation, "of_somebody_else")

    def tell(message: OutboxMessage) -> None:
        told.append(message.payload["about"])

    work(texts, effects={"tell_owner": tell})

    assert (texts.sent, told) == (["Hello!"], ["this"])
    stored = {message.id: message.status for message in messages()}
    assert (stored[mine.id], stored[others.id]) == (MessageStatus.SENT, MessageStatus.PENDING)
    with pytest.raises(CannotBeSent):
        AgencySender(AGENCY, texts, lambda message: None).send(others)


def test_only_a_text_is_looked_for(texts: Texts, conversation_in: Callable[..., CloseEngineConversation]) -> None:
    sender, conversation = AgencySender(AGENCY, texts, lambda message: None), conversation_in(Stage.QUALIFYING)
    texts.found = "SM-found"

    assert sender.find(close_engine.outbox.enqueue(conversation, "SEND_MESSAGE", "Hello!")) == "SM-found"
    assert sender.find(close_engine.outbox.enqueue(conversation, "build_site")) is None


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, sqlite_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a migrated database, without any settings."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", f"sqlite:///{tmp_path}/close_engine.db")
    (tmp_path / "close_engine.db").write_bytes(sqlite_template.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return tmp_path


@pytest.mark.parametrize("command", [["serve"], ["worker", "--agency"]], ids=" ".join)
def test_a_command_names_what_is_missing_in_the_environment(place: Path, command: list[str]) -> None:
    (place / "close_engine.db").unlink()  # what is wrong with the database is not what one hears first
    result = run(*command)

    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("The environment is not right:\n  - CLOSE_ENGINE_AGENCY is missing: ")


def test_a_topic_that_the_agency_has_not_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)

    result = run("worker", "--agency", "--topic", "build_sites")

    assert result.code == 2
    assert "The agency has no topic 'build_sites'" in result.err


@pytest.mark.parametrize("options", [[], ["--agency", "--print"], ["--agency", "--sender", "tests.senders:send"]])
def test_a_worker_has_one_sender(place: Path, options: list[str]) -> None:
    result = run("worker", *options)

    assert result.code == 2
    assert "--agency" in result.err
