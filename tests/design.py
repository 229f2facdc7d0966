"""The stages and the transition table of the design, written down a second time.

The tests compare the library and the database with it, so it must not import anything from close_engine.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ACTIVE = [
    "INITIATED",
    "QUALIFYING",
    "COLLECTING_INFO",
    "BUILDING",
    "PREVIEW_SENT",
    "EDIT_LOOP",
    "PENDING_APPROVAL",
    "PAYMENT_SENT",
]
STAGES = [*ACTIVE, "COMPLETED", "STALLED", "CLOSED_LOST"]

NOW = "the moment of the change"
PLUS_ONE = "one more"
URL = "https://pay.example.com/42"
REASON = "too expensive"


class Rule(NamedTuple):
    """One row of the table; `stamps` is column to what is written there."""

    sources: list[str]
    dests: list[str]
    stamps: dict[str, Any]


TABLE = {
    "start_qualifying": Rule(["INITIATED"], ["QUALIFYING"], {}),
    "collect_info": Rule(["QUALIFYING"], ["COLLECTING_INFO"], {}),
    "start_building": Rule(["QUALIFYING", "COLLECTING_INFO"], ["BUILDING"], {}),
    "send_preview": Rule(["BUILDING", "EDIT_LOOP"], ["PREVIEW_SENT"], {}),
    "request_edits": Rule(["PREVIEW_SENT"], ["EDIT_LOOP"], {"edit_rounds": PLUS_ONE}),
    "request_approval": Rule(["PREVIEW_SENT", "EDIT_LOOP"], ["PENDING_APPROVAL"], {}),
    "withdraw_approval": Rule(["PENDING_APPROVAL"], ["PREVIEW_SENT"], {}),
    "send_payment_link": Rule(
        ["PREVIEW_SENT", "EDIT_LOOP", "PENDING_APPROVAL"],
        ["PAYMENT_SENT"],
        {"payment_link_url": URL, "payment_link_sent_at": NOW},
    ),
    "complete": Rule([*ACTIVE, "STALLED", "CLOSED_LOST"], ["COMPLETED"], {"completed_at": NOW}),
    "stall": Rule(ACTIVE, ["STALLED"], {"stalled_at": NOW}),
    "resume": Rule(["STALLED"], ACTIVE, {"stalled_at": None}),
    "close_lost": Rule([*ACTIVE, "STALLED"], ["CLOSED_LOST"], {"closed_lost_at": NOW, "closed_lost_reason": REASON}),
    "reopen": Rule(["CLOSED_LOST"], ["INITIATED"], {"closed_lost_at": None, "closed_lost_reason": None}),
}

#: The arguments that a trigger requires.
GIVEN: dict[str, dict[str, Any]] = {"send_payment_link": {"payment_link_url": URL}, "close_lost": {"reason": REASON}}

#: (from, to): trigger.
TRIGGER_BETWEEN = {
    (source, dest): trigger for trigger, rule in TABLE.items() for source in rule.sources for dest in rule.dests
}


def triggers_from(stage: str) -> list[str]:
    return [trigger for trigger, rule in TABLE.items() if stage in rule.sources]
