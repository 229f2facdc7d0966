"""The vocabulary: the same words that other programs write into these columns."""

from __future__ import annotations

from enum import Enum

import pytest

from close_engine import ACTIVE_STAGES, ActionStatus, ActionType, AutonomyLevel, EntryPoint, Stage
from tests.design import ACTIVE, STAGES

WORDS = {
    Stage: STAGES,
    EntryPoint: ["INSTANTLY_REPLY", "SMS_REPLY", "REP_CLOSE", "PREVIEW_CTA"],
    AutonomyLevel: ["FULL_AUTO", "SEMI_AUTO", "MANUAL"],
    ActionType: ["SEND_PAYMENT_LINK", "SEND_MESSAGE", "SEND_PREVIEW"],
    ActionStatus: ["PENDING", "APPROVED", "REJECTED", "EXPIRED"],
}


@pytest.mark.parametrize("vocabulary", WORDS)
def test_every_word_is_what_the_crm_stores(vocabulary: type[Enum]) -> None:
    assert [word.value for word in vocabulary] == WORDS[vocabulary]
    for word in vocabulary:
        assert word == word.value == word.name == str(word) == f"{word}"
        assert {word.value: "found"}[word] == "found"


def test_the_active_stages_are_the_eight_in_which_a_lead_is_worked_on() -> None:
    assert list(ACTIVE_STAGES) == ACTIVE
    assert set(Stage) - set(ACTIVE_STAGES) == {Stage.COMPLETED, Stage.STALLED, Stage.CLOSED_LOST}
