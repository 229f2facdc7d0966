"""Many drafts are decided at once, each by itself: one that cannot be decided holds up no other."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import peewee
import pytest

import close_engine
from close_engine import (
    ActionType,
    CloseEngineConversation,
    Decided,
    InvalidValue,
    PendingAction,
    Stage,
    approve_all,
    pending_actions,
    reject_all,
    submit,
)
from close_engine.testing import MovableClock
from tests.command_line import run
from tests.foreign import ForeignWriter
from tests.workers import LINK, messages, sql

ConversationIn = Callable[..., CloseEngineConversation]

ON_DISK = pytest.mark.parametrize("kind", ["sqlite-file", "postgresql"], indirect=True)


def waiting(conversation: CloseEngineConversation, type: ActionType = ActionType.SEND_MESSAGE) -> PendingAction:
    links = {"paymentUrl": LINK, "previewUrl": LINK}
    action = submit(conversation, type, "Hello!", metadata=links, policy=lambda level, type: True)
    assert isinstance(action, PendingAction)
    return action


def statuses(*actions: PendingAction) -> list[str]:
    return [str(PendingAction.get_by_id(action.id).status) for action in actions]


@pytest.fixture
def drafts(conversation_in: ConversationIn, close_engine_clock: MovableClock) -> list[PendingAction]:
    """A reply and three previews, each a second younger than the one before."""
    made = []
    for type in (ActionType.SEND_MESSAGE, *[ActionType.SEND_PREVIEW] * 3):
        made.append(waiting(conversation_in(Stage.BUILDING), type))
        close_engine_clock.move(timedelta(seconds=1))
    return made


def spoil(action: PendingAction) -> None:
    """Leave an action waiting that nobody can approve."""
    action.metadata = {**action.metadata, "sendAfter": "tomorrow"}
    action.save()


def test_all_of_a_type_are_approved_and_what_fails_is_named(
    drafts: list[PendingAction], foreign: ForeignWriter
) -> None:
    reply, first, bad, last = drafts
    spoil(bad)
    decided = approve_all(by="dana", type=ActionType.SEND_PREVIEW)
    assert decided.done == [first.id, last.id]
    assert list(decided.failed) == [bad.id]
    assert "write a time like" in decided.failed[bad.id]
    assert statuses(*drafts) == ["PENDING", "APPROVED", "PENDING", "APPROVED"]
    assert [message.action_id for message in messages()] == [first.id, last.id]
    assert {PendingAction.get_by_id(action.id).approved_by for action in (first, last)} == {"dana"}

    # Again, nothing is sent twice; and rejecting asks for less.
    assert approve_all(by="ana", type=ActionType.SEND_PREVIEW).done == []
    assert reject_all(by="ana", reason="too late") == Decided([reply.id, bad.id])
    assert PendingAction.get_by_id(bad.id).metadata["rejectionReason"] == "too late"


def test_only_those_that_were_seen_are_decided(drafts: list[PendingAction], conversation_in: ConversationIn) -> None:
    seen = pending_actions()
    assert len(seen) == 4
    later = waiting(conversation_in(Stage.QUALIFYING))
    assert approve_all("dana", seen).done == [action.id for action in drafts]
    assert statuses(later) == ["PENDING"]
    # One of them was decided otherwise meanwhile.
    (message,) = pending_actions()
    message.reject("ana")
    decided = approve_all("dana", [later])
    assert (decided.done, list(decided.failed)) == ([], [later.id])
    with pytest.raises(InvalidValue, match="it must say who decides"):
        approve_all(" ", [later])


def test_a_draft_that_nobody_can_read_is_named(drafts: list[PendingAction], foreign: ForeignWriter) -> None:
    bad = drafts[1]
    if foreign.is_postgres:
        foreign.run("ALTER TABLE pending_actions DISABLE TRIGGER USER")
        foreign.run("UPDATE pending_actions SET created_at = 'infinity' WHERE id = %s", bad.id)
        foreign.run("ALTER TABLE pending_actions ENABLE TRIGGER USER")
    else:
        sql("DROP TRIGGER close_engine_action_update_readable")
        sql("UPDATE pending_actions SET created_at = 'yesterday' WHERE id = ?", bad.id)
        close_engine.migrate()
    decided = approve_all("dana")
    assert decided.done == [drafts[0].id, drafts[2].id, drafts[3].id]
    assert "cannot be read" in decided.failed[bad.id]


def test_what_the_lead_s_words_have_superseded_is_no_obstacle(drafts: list[PendingAction]) -> None:
    close_engine.receive(drafts[0].lead_id, "SM1", "Wait!")
    assert approve_all("dana").done == [action.id for action in drafts[1:]]


def test_without_the_guard_none_is_decided(drafts: list[PendingAction], foreign: ForeignWriter) -> None:
    name = "zz_close_engine_decision ON pending_actions" if foreign.is_postgres else "close_engine_action_approved"
    sql(f"DROP TRIGGER {name}")
    with pytest.raises(close_engine.GuardMissing):
        approve_all("dana")
    assert set(statuses(*drafts)) == {"PENDING"}


# -- the commands ------------------------------------------------------------------------------------------------------


@ON_DISK
def test_the_commands_ask_first_and_say_a_line_each(
    kind: str,
    database_url: str,
    database: peewee.Database,
    drafts: list[PendingAction],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    arguments = ["approve", "--all", "--type", "SEND_PREVIEW", "--by", "dana"]
    for answer in ("", "no\n"):
        asked = run(*arguments, input=answer)
        assert (asked.code, asked.out) == (1, "")
        assert "This is to approve these drafts: SEND_PREVIEW (3). Continue? [y/N]" in asked.err
        assert "Nothing was approved. To approve all without being asked, use --yes." in asked.err
    assert set(statuses(*drafts)) == {"PENDING"}

    spoil(drafts[2])
    approved = run(*arguments, input="y\n")
    assert approved.code == 1
    lines = approved.out.splitlines()
    assert lines[:2] == [f"Action {drafts[n].id!r} is approved." for n in (1, 3)]
    assert lines[2].startswith(f"Action {drafts[2].id!r} is not approved: ")
    assert approved.err.endswith("Drafts that were not approved: 1.\n")
    assert run("reject", "--all", "--by", "dana", "--reason", "old", "--yes").code == 0
    assert statuses(*drafts) == ["REJECTED", "APPROVED", "REJECTED", "APPROVED"]
    assert run("approve", "--all", "--by", "dana").out == "Nothing is waiting for approval.\n"


@ON_DISK
@pytest.mark.parametrize(
    "arguments", [[], ["a", "--all"], ["a", "--yes"], ["a", "--type", "SEND_MESSAGE"], ["--all", "--message", "x"]]
)
def test_one_is_named_or_all(
    kind: str, arguments: list[str], database_url: str, database: peewee.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOSE_ENGINE_DATABASE", database_url)
    given: list[Any] = ["approve", *arguments, "--by", "dana"]
    assert run(*given).code == 2
