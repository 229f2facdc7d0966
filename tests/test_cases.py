"""Inputs that once failed, one test per case, by its number."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from celery import Celery

from close_engine import (
    ActionStatus,
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    MessageStatus,
    OutboxMessage,
    PendingAction,
    Stage,
    errors,
    submit,
)
from close_engine.testing import MovableClock
from tests.foreign import ForeignWriter
from tests.workers import LINK, claimed

ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]

EXAMPLES: list[errors.CloseEngineError] = [
    errors.CloseEngineError("Something is wrong.", 7),
    errors.ConfigurationError("No database is bound."),
    errors.SchemaError("Two problems:", ["one", "two"]),
    errors.InvalidValue("batch", 0, "it must be at least 1"),
    errors.UnknownTrigger("win", ["complete", "stall"]),
    errors.TransitionRefused("Not now.", "c1", "stall", Stage.STALLED),
    errors.TransitionNotAllowed(None, "stall", Stage.STALLED, ["resume"]),
    errors.ConditionNotMet("c1", "close_lost", Stage.BUILDING, "a reason must be given"),
    errors.StageAssignmentRefused("Fire start_building().", Stage.BUILDING),
    errors.StageConflict("c1", "save()", Stage.BUILDING, Stage.STALLED),
    errors.KeyReused("c1", "SM1", "stall", "resume"),
    errors.PartlyLoaded("c1", ["stage", "updated_at"]),
    errors.NotFound("There is no such row."),
    errors.ConversationNotFound("c1"),
    errors.LeadNotFound("lead_1"),
    errors.UserNotFound("user_1"),
    errors.ActionNotFound("a1"),
    errors.MessageNotFound(7),
    errors.LeadHasNoPhone("lead_1"),
    errors.ConversationCompleted("c1", "lead_1"),
    errors.ConversationClosed("c1", Stage.CLOSED_LOST),
    errors.ActionDecided("a1", "approve", ActionStatus.EXPIRED),
    errors.CannotBeSent("The number does not exist.", 21211),
    errors.LeaseLost(7, "worker-7", MessageStatus.SENT, None),
    errors.MessageNotDead(7, MessageStatus.PENDING),
    errors.ProviderIdTaken("SM1", 7, 3),
    errors.PaymentUnmatched("lead_1", "evt_1", "no payment link was sent to the lead"),
    errors.TransactionFailed(),
    errors.AfterCommitError([ValueError("no printer"), errors.LeadNotFound("lead_1")]),
]


class Bounced(errors.CannotBeSent):
    """A user's own error, whose arguments are not those of its base."""

    def __init__(self, number: str, *, code: int) -> None:
        self.number = number
        self.code = code
        super().__init__(f"{number} bounced")


class Unreachable(Exception):
    """An error that can be pickled, but not unpickled."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port} is down")


def ways() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Every way in which an error is copied or sent to another process."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield f"protocol {protocol}", partial(pickled, protocol=protocol)
    yield "copy", copy.copy
    yield "deepcopy", copy.deepcopy


def pickled(error: Exception, protocol: int | None = None) -> Any:
    return pickle.loads(pickle.dumps(error, protocol))


def content(value: Any) -> Any:
    """All that an error holds, in a form that can be compared."""
    if isinstance(value, list):
        return [content(item) for item in value]
    if isinstance(value, BaseException):
        return type(value), str(value), value.args, {name: content(held) for name, held in vars(value).items()}
    return value


def lose() -> None:
    raise errors.StageConflict("c1", "stall", Stage.BUILDING, Stage.COMPLETED)


def test_f7_every_error_is_among_the_examples() -> None:
    """A new error class must have an example here, or nobody knows whether it can be pickled."""
    assert {type(error) for error in EXAMPLES} == set(ERRORS)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_f7_an_error_arrives_as_it_left(error: errors.CloseEngineError) -> None:
    """Most errors could not be unpickled, and some came back with their text wrapped in their text."""
    for way, travel in ways():
        assert content(travel(error)) == content(error), way


def test_f7_an_error_crosses_a_process_pool() -> None:
    """A StageConflict in a pool's process broke the pool, for this task and for every later one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(errors.StageConflict, match="expected BUILDING and found COMPLETED") as caught:
            pool.submit(lose).result()
        assert (caught.value.operation, caught.value.found) == ("stall", Stage.COMPLETED)
        assert pool.submit(abs, -1).result() == 1


def test_f7_an_error_crosses_celerys_results() -> None:
    """Celery handed a StageConflict over as a bare CloseEngineError without attributes: no caller could catch it."""
    conflict = errors.StageConflict("c1", "stall", Stage.BUILDING, Stage.COMPLETED)
    app = Celery(backend="cache+memory://", broker="memory://", set_as_current=False)
    app.conf.update(result_serializer="pickle", accept_content=["pickle"])
    app.backend.mark_as_failure("task-1", conflict)
    with pytest.raises(errors.StageConflict) as caught:
        app.AsyncResult("task-1").get()
    assert content(caught.value) == content(conflict)


def test_f7_a_users_own_error_keeps_all_it_holds() -> None:
    """A user's subclass, with other arguments than its base and attributes set later, came back as neither."""
    error = Bounced("+15550100", code=30003)
    error.attempt = 3  # type: ignore[attr-defined]
    for way, travel in ways():
        assert content(travel(error)) == content(error), way


def test_f7_notes_arrive_with_the_error() -> None:
    """A note explains where the error came from, so it must not stay behind."""
    error = errors.LeadNotFound("lead_1")
    error.__notes__ = ["while importing row 7"]  # type: ignore[attr-defined] # as add_note() does, since Python 3.11
    for way, travel in ways():
        arrived = travel(error)
        assert (str(arrived), arrived.__notes__) == (str(error), ["while importing row 7"]), way


@pytest.mark.parametrize(
    "value",
    [threading.Lock(), lambda: None, (number for number in (1, 2)), {"lock": [threading.Lock()]}],
    ids=["lock", "lambda", "generator", "nested"],
)
def test_f7_a_value_that_cannot_be_pickled_arrives_as_text(value: Any) -> None:
    """The refused value may be anything; the error that refuses it must arrive all the same."""
    error = errors.InvalidValue("lease", value, "it must last for a while")
    for way, travel in ways():
        arrived = travel(error)
        assert (str(arrived), arrived.field) == (str(error), "lease"), way
        assert arrived.value is value if way == "copy" else arrived.value == repr(value), way


@pytest.mark.parametrize(
    "arguments",
    [(threading.Lock(),), ("The line is dead.", threading.Lock()), (Unreachable("sms", 443),)],
    ids=["lock", "text and lock", "error"],
)
def test_f7_cannot_be_sent_arrives_whatever_it_was_raised_with(arguments: tuple[Any, ...]) -> None:
    """A sender raises CannotBeSent with what it has, for instance the provider's error; its text must arrive."""
    error = errors.CannotBeSent(*arguments)
    for way, travel in ways():
        arrived = travel(error)
        assert (type(arrived), str(arrived)) == (errors.CannotBeSent, str(error)), way
        assert arrived.args == (arguments if way == "copy" else (str(error),)), way


def test_f7_what_failed_after_the_commit_arrives() -> None:
    """Other people's exceptions may not unpickle: such a one arrives as a RuntimeError, the others as they are."""
    kept, lost = errors.LeadNotFound("lead_1"), Unreachable("printer", 9100)
    error = errors.AfterCommitError([kept, lost])
    expected = [content(kept), content(RuntimeError("Unreachable: printer:9100 is down"))]
    for way, travel in ways():
        arrived = travel(error)
        assert str(arrived) == str(error), way
        assert content(arrived.errors) == (content([kept, lost]) if way == "copy" else expected), way


def test_f7_a_copy_holds_the_very_same_objects() -> None:
    """`copy.copy` is shallow, so that `is` still works on what the copy holds."""
    error = errors.AfterCommitError([Unreachable("printer", 9100)])
    error.__cause__ = error.errors[0]
    copied = copy.copy(error)
    assert copied is not error
    assert copied.errors is error.errors


def test_f7_an_error_that_holds_itself_arrives() -> None:
    """A user may hang anything on an error, even the error."""
    error = errors.LeadNotFound("lead_1")
    error.origin = error  # type: ignore[attr-defined]
    arrived = pickled(error)
    assert (arrived.lead_id, str(arrived)) == ("lead_1", str(error))


Factory = Callable[..., CloseEngineConversation]

# -- F9: what is given for the history ------------------------------------------------------------------------------

SENT_FROM: dict[str, tuple[Stage, dict[str, Any]]] = {
    "SEND_MESSAGE": (Stage.INITIATED, {}),
    "SEND_PREVIEW": (Stage.BUILDING, {"previewUrl": "https://preview.example.com"}),
    "SEND_PAYMENT_LINK": (Stage.PREVIEW_SENT, {"paymentUrl": LINK}),
}


@pytest.mark.parametrize("level", list(AutonomyLevel))
@pytest.mark.parametrize("type", SENT_FROM)
def test_f9_who_drafted_a_message_reaches_the_history(conversation_in: Factory, type: str, level: str) -> None:
    """`submit(actor=…)` was documented "for the history", and for most messages was stored nowhere."""
    stage, metadata = SENT_FROM[type]
    conversation = conversation_in(stage, autonomy_level=AutonomyLevel(level))
    submitted = submit(conversation, ActionType(type), "Hello!", metadata=metadata, actor="writer-3")
    if isinstance(submitted, PendingAction):
        submitted.approve(by="dana")

    message = claimed()
    assert message.submitted_by == "writer-3"
    message.sent("p1")

    sent = conversation.history()[-1]
    assert (sent.actor, sent.metadata["submitted_by"]) == (message.leased_by, "writer-3")


def test_f9_a_message_that_moves_no_stage_keeps_who_drafted_it(conversation_in: Factory) -> None:
    """A further text has no history row of its own, so the outbox itself says who drafted it."""
    conversation = conversation_in(Stage.QUALIFYING)
    submit(conversation, ActionType.SEND_MESSAGE, "And where are you?", actor="writer-3")
    claimed().sent("p1")

    assert [message.submitted_by for message in OutboxMessage.select()] == ["writer-3"]


def test_f9_an_approval_asked_for_by_the_crm_names_its_own_author(
    conversation_in: Factory, foreign: ForeignWriter, close_engine_clock: MovableClock
) -> None:
    """A foreign writer's action names its author in its metadata, as the library's own does."""
    conversation = conversation_in(Stage.QUALIFYING)
    foreign.run(
        "INSERT INTO pending_actions (id, conversation_id, lead_id, type, draft_message, metadata, status) "
        "VALUES ('a1', %s, %s, 'SEND_MESSAGE', 'Hello!', '{\"submittedBy\": \"the CRM\"}', 'PENDING')",
        conversation.id,
        conversation.lead_id,
    )
    foreign.run("UPDATE pending_actions SET status = 'APPROVED', approved_by = 'dana' WHERE id = 'a1'")
    close_engine_clock.move(timedelta(minutes=1))

    assert claimed().submitted_by == "the CRM"
