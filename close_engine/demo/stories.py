"""The stories that the demo tells, and the state of each lead in its story.

>>> [story.meaning for story in STORIES if "expire" in story.verbs]
['nobody approves the link in time']
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from close_engine.approvals import PendingAction
from close_engine.conversations import CloseEngineConversation
from close_engine.models import Lead
from close_engine.outbox import OutboxMessage
from close_engine.stages import AutonomyLevel

__all__ = ["CAST", "HERO", "STILL_ACTIVE", "STORIES", "Role", "Story"]


@dataclass(frozen=True)
class Story:
    """The course of a conversation.

    Attributes:
        meaning: str, what happens in a few words.
        weight: how often it is told, relative to the others.
        autonomy_level: AutonomyLevel of the lead.
        verbs: tuple of str, what happens, in order; see `VERBS` in `play`.
        hours_left: the minimum and maximum number of hours between its last event and the end of the demo.
        reachable: whether the lead's number can receive texts.
    """

    meaning: str
    weight: int
    autonomy_level: AutonomyLevel
    verbs: tuple[str, ...]
    hours_left: tuple[float, float] = (1, math.inf)
    reachable: bool = True


def _story(meaning: str, weight: int, autonomy_level: AutonomyLevel, verbs: str, *how: Any) -> Story:
    return Story(meaning, weight, autonomy_level, ("open", *verbs.split()), *how)


_FULL, _SEMI, _MANUAL = AutonomyLevel
#: Hours until the end of the demo: long enough to be stalled, and long enough to be lost.
_SILENT, _SILENT_FOR_GOOD = (80, 200), (260, math.inf)
#: Too short for anything to be stalled or expired.
STILL_ACTIVE = (0.5, 20)

STORIES = (
    _story("pays at once", 20, _FULL, "hello answer build preview link pay"),
    _story("has gaps to fill", 14, _FULL, "hello answer dig answer build preview link pay"),
    _story("wants changes", 8, _FULL, "hello answer build preview change preview link pay"),
    _story(
        "wants changes twice and pays unseen", 5, _FULL, "hello answer build preview change preview change link pay"
    ),
    _story("goes silent and comes back", 8, _FULL, "hello answer dig write build preview link pay"),
    _story("writes while a reminder waits", 5, _FULL, "hello answer dig remind answer build preview link pay"),
    _story("pays while a reminder waits", 5, _FULL, "hello answer build preview link remind pay"),
    _story("pays when given up", 3, _FULL, "hello answer build preview link pay_when_lost"),
    _story("is silent for good", 8, _FULL, "hello", _SILENT_FOR_GOOD),
    _story("has no number for texts", 3, _FULL, "hello", _SILENT_FOR_GOOD, False),
    _story("says no", 6, _FULL, "hello answer build preview refuse"),
    _story("says no and comes back", 4, _FULL, "hello answer refuse return hello answer build preview link pay"),
    _story("a human approves the link", 10, _SEMI, "hello answer build preview link approve pay"),
    _story("nobody approves the link in time", 4, _SEMI, "hello answer build preview link expire link approve pay"),
    _story("pays after a silence", 5, _SEMI, "hello answer build preview link approve pay_late"),
    _story("a human sees it all", 8, _MANUAL, "hello approve answer build preview approve link approve pay"),
    _story(
        "a human corrects and says no",
        5,
        _MANUAL,
        "hello correct answer build preview reject preview approve link reject link correct pay",
    ),
    _story("is silent", 5, _MANUAL, "hello approve answer build preview approve", _SILENT),
    _story("waits for a first text", 4, _MANUAL, "hello", STILL_ACTIVE),
    _story("is asked", 4, _FULL, "hello answer", STILL_ACTIVE),
    _story("is asked more", 4, _FULL, "hello answer dig", STILL_ACTIVE),
    _story("waits for the site", 6, _FULL, "hello answer build", STILL_ACTIVE),
    _story("looks at the site", 5, _SEMI, "hello answer build preview", STILL_ACTIVE),
    _story("waits for changes", 4, _MANUAL, "hello approve answer build preview approve change", STILL_ACTIVE),
    _story("waits for a link", 5, _SEMI, "hello answer build preview link", STILL_ACTIVE),
    _story("is about to pay", 5, _FULL, "hello answer build preview link", STILL_ACTIVE),
)

#: The stories that are told even with few leads: every one, and a second lead who waits for the site.
CAST = [*STORIES, next(story for story in STORIES if story.meaning == "waits for the site")]

#: The story that is told whole: it has drafts that a human corrects, rejects and approves, a preview and a payment.
HERO = next(story for story in STORIES if story.meaning == "a human corrects and says no")


@dataclass
class Role:
    """One lead, and the state of its story.

    Attributes:
        number: int, unique per lead.
        story: Story.
        moments: list of datetime, when each verb of the story happens.
        lead: Lead, set when the conversation is opened.
        conversation: CloseEngineConversation, set when it is opened.
        drafts: number of drafts submitted.
        action: the newest PendingAction.
        sent: the newest OutboxMessage that was sent.
    """

    number: int
    story: Story
    moments: list[datetime]
    lead: Lead = field(init=False)
    conversation: CloseEngineConversation = field(init=False)
    drafts: int = 0
    action: PendingAction | None = None
    sent: OutboxMessage | None = None
