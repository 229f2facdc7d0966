"""The machine by itself: the table as data, the decision on facts, and the diagram."""

from __future__ import annotations

import gc
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from transitions import Machine

import close_engine
from close_engine import CloseEngineConversation, ConditionNotMet, Stage, TransitionNotAllowed, UnknownTrigger
from close_engine.diagram import BOX, LINE, PLACES, ROUTES, Arrow, arrows, mermaid, svg
from close_engine.machine import TRANSITIONS, TRIGGERS, Facts, _machine, decide, pairs, trigger_between
from close_engine.stages import AutonomyLevel
from tests.design import ACTIVE, GIVEN, REASON, STAGES, TABLE, TRIGGER_BETWEEN, URL, triggers_from

ARGUMENTS = {"payment_link_url": URL, "closed_lost_reason": REASON}


def test_the_table_is_the_designs() -> None:
    assert list(TRIGGERS) == [transition.trigger for transition in TRANSITIONS] == list(TABLE)
    found = {(str(source), str(dest)): trigger for trigger, source, dest in pairs()}
    assert found == TRIGGER_BETWEEN
    assert len(list(pairs())) == len(found), "two triggers lead from one stage to another"


def test_the_machine_that_runs_it_has_the_same_transitions_and_no_others() -> None:
    held = [(row.source, row.dest, trigger) for trigger in TABLE for row in _machine.get_transitions(trigger)]
    designed = [
        (source, None if trigger == "resume" else rule.dests[0], trigger)
        for trigger, rule in TABLE.items()
        for source in rule.sources
    ]
    assert sorted(held, key=str) == sorted(designed, key=str)
    assert list(_machine.events) == list(TABLE)


def test_every_trigger_has_a_meaning_and_a_method_of_its_own() -> None:
    for transition in TRANSITIONS:
        assert transition.meaning
        assert getattr(CloseEngineConversation, transition.trigger).__doc__


@pytest.mark.parametrize("stage", STAGES)
def test_every_trigger_is_decided_from_every_stage(stage: str) -> None:
    for trigger, rule in TABLE.items():
        draft = Facts(Stage(stage), payment_link_sent=True, given=ARGUMENTS)
        if stage in rule.sources:
            transition = decide(trigger, draft)
            dest = None if trigger == "resume" else rule.dests[0]
            assert (trigger, transition) == (trigger, TRIGGERS[trigger])
            assert (trigger, transition.dest) == (trigger, dest)
        else:
            with pytest.raises(TransitionNotAllowed, match=f"is {stage}, and {trigger} is not") as refused:
                decide(trigger, draft)
            assert (refused.value.stage, refused.value.trigger) == (stage, trigger)
            assert refused.value.allowed == triggers_from(stage)


@pytest.mark.parametrize(
    ("trigger", "source", "facts", "missing"),
    [
        ("send_payment_link", Stage.PREVIEW_SENT, {}, "a payment link URL must be given"),
        (
            "send_payment_link",
            Stage.EDIT_LOOP,
            {"given": {"payment_link_url": " "}},
            "a payment link URL must be given",
        ),
        ("send_payment_link", Stage.EDIT_LOOP, {"given": {"payment_link_url": 7}}, "a payment link URL must be given"),
        *(
            (
                "send_payment_link",
                Stage.PENDING_APPROVAL,
                {"given": {"payment_link_url": URL, "approved_by": nobody}, "autonomy_level": level},
                "its autonomy level requires approval first (pass approved_by)",
            )
            for level in (AutonomyLevel.SEMI_AUTO, AutonomyLevel.MANUAL)
            for nobody in (None, "", "\n")
        ),
        ("complete", Stage.PAYMENT_SENT, {}, "no payment link was sent"),
        ("complete", Stage.CLOSED_LOST, {}, "no payment link was sent"),
        ("close_lost", Stage.STALLED, {}, "a reason must be given"),
        ("close_lost", Stage.BUILDING, {"given": {"closed_lost_reason": "\t"}}, "a reason must be given"),
    ],
)
def test_a_condition_that_is_not_met_is_refused_with_what_is_missing(
    trigger: str, source: Stage, facts: dict[str, Any], missing: str
) -> None:
    draft = Facts(source, "c1", **facts)
    with pytest.raises(ConditionNotMet) as refused:
        decide(trigger, draft)
    assert str(refused.value) == f"Conversation 'c1' is {source}, and {trigger} is refused: {missing}."
    assert (refused.value.conversation_id, refused.value.trigger) == ("c1", trigger)
    assert (refused.value.stage, refused.value.condition) == (source, missing)


@pytest.mark.parametrize("level", list(AutonomyLevel))
def test_an_approved_payment_link_may_be_sent_at_any_autonomy_level(level: AutonomyLevel) -> None:
    given = {"payment_link_url": URL, "approved_by": "Ann"}
    assert decide("send_payment_link", Facts(Stage.EDIT_LOOP, None, level, given=given)).dest is Stage.PAYMENT_SENT


def test_a_trigger_that_the_table_does_not_have_is_an_error_of_its_own() -> None:
    draft = Facts(Stage.QUALIFYING)
    for name in ("to_COMPLETED", "trigger", "", "may_stall"):  # including names that `transitions` itself would add
        with pytest.raises(UnknownTrigger) as unknown:
            decide(name, draft)
        assert (unknown.value.trigger, unknown.value.known) == (name, list(TABLE))
        assert str(unknown.value) == f"There is no trigger {name!r}; the triggers are {', '.join(TABLE)}."


def test_the_trigger_between_two_stages() -> None:
    for source in Stage:
        for dest in Stage:
            assert trigger_between(source, dest) == TRIGGER_BETWEEN.get((source.value, dest.value)), (source, dest)


def test_the_machine_is_built_once_and_never_for_a_row() -> None:
    def machines() -> int:
        # `isinstance` would ask a weak proxy for the class of what is gone.
        return sum(issubclass(type(thing), Machine) for thing in gc.get_objects())

    close_engine.connect("sqlite:///:memory:")
    before = machines()
    conversations = [CloseEngineConversation(lead="l1", entry_point="SMS_REPLY") for _ in range(100)]
    for conversation in conversations:
        assert conversation.may("start_qualifying")
        assert not conversation.may("reopen")
    assert machines() == before
    plain = {"__data__", "_dirty", "__rel__", "__reprcache__"}
    assert {name for conversation in conversations for name in vars(conversation)} <= plain


def read_off(drawn: list[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    """Return every (trigger, from, to) of these arrows. One from or to a group counts for each of its stages."""
    meant = {"ACTIVE": ACTIVE, "any active stage": ACTIVE, "WHERE_THINGS_STAND": ACTIVE, "where things stand": ACTIVE}
    assert len(set(drawn)) == len(drawn)
    return {
        (trigger, source, dest)
        for trigger, start, end in drawn
        for source in meant.get(start, [start])
        for dest in meant.get(end, [end])
    }


def test_the_diagram_shows_every_transition_and_no_other() -> None:
    diagram = mermaid()
    drawn = re.findall(r"^ *(\w+) --> (\w+): (\w+)$", diagram, re.MULTILINE)
    assert read_off([(trigger, *ends) for *ends, trigger in drawn]) == {
        (trigger, *ends) for ends, trigger in TRIGGER_BETWEEN.items()
    }
    assert diagram.splitlines()[:2] == ["stateDiagram-v2", "    [*] --> INITIATED"]
    assert diagram.splitlines()[-1] == "    COMPLETED --> [*]"


def test_the_picture_shows_every_transition_and_no_other() -> None:
    picture = ElementTree.fromstring(svg())
    names = {"": "http://www.w3.org/2000/svg"}
    groups = picture.findall("g", names)
    drawn = [(group.findtext("title", "", names), group.findtext("text", "", names)) for group in groups]
    said = picture.findtext("desc", "", names)

    expected = {(trigger, *ends) for ends, trigger in TRIGGER_BETWEEN.items()}
    for text in ("; ".join(title for title, _ in drawn) + ".", said):
        assert read_off(re.findall(r"(\w+): from ([\w ]+) to ([\w ]+?)(?:; |\.$)", text)) == expected
    assert all(title.startswith(f"{name}: ") for title, name in drawn)
    boxes = [str(text.text) for text in picture.iterfind("text", names) if text.get("class") == "name"]
    assert sorted(boxes) == sorted(Stage)


def test_every_arrow_has_one_place_in_the_picture() -> None:
    assert sorted(ROUTES) == sorted(arrows())
    ends = {(route.path, route.label) for route in ROUTES.values()}
    assert len(ends) == len(ROUTES)


@pytest.mark.parametrize("arrow", sorted(ROUTES), ids="-".join)
def test_an_arrow_of_the_picture_runs_from_the_box_it_leaves_to_the_box_it_enters(arrow: Arrow) -> None:
    steps = re.findall(r"([MHV])(\d+)(?: (\d+))?", ROUTES[arrow].path)
    at = [(int(steps[0][1]), int(steps[0][2]))]
    for way, value, _ in steps[1:]:
        at.append((int(value), at[-1][1]) if way == "H" else (at[-1][0], int(value)))

    assert touches(arrow.source, at[0])
    assert touches(arrow.dest, at[-1])


def touches(name: str, point: tuple[int, int]) -> bool:
    """Return whether a point is at the edge of a stage's box, or of the group's; a tip keeps a little away."""
    x, y = point
    if name not in Stage.__members__:
        return abs(y - 590) <= 2 and 12 <= x <= 420
    middle_x, middle_y = PLACES[Stage[name]]
    across, along = abs(x - middle_x), abs(y - middle_y)
    return across <= BOX / 2 + 2 and along <= LINE / 2 + 2 and (across >= BOX / 2 or along >= LINE / 2)


def test_the_diagram_groups_the_active_stages_and_no_other() -> None:
    group = re.search(r'state "any active stage" as ACTIVE \{\n(.*?)\n    \}', mermaid(), re.DOTALL)
    assert group is not None
    assert set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", group[1])) == {*ACTIVE, "WHERE_THINGS_STAND"}


def test_what_must_be_given_is_what_the_conditions_ask_for() -> None:
    asked = {t.trigger for t in TRANSITIONS if any(condition.is_about_arguments for condition in t.conditions)}
    assert asked == set(GIVEN)
