"""What a language model may do in a conversation: tools, each with its JSON schema, its own check and a library call.

There is no tool to complete a conversation, to give a discount or to text anybody else. What a tool asks for is decided
by the machine, the approvals and the tool's own check, and a refusal is a sentence that goes back to the model.

>>> checked({"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}, {})
'text is missing'
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from close_engine import optouts
from close_engine.approvals import submit
from close_engine.conversations import CloseEngineConversation
from close_engine.errors import (
    ConversationClosed,
    ConversationTakenOver,
    InvalidValue,
    KeyReused,
    LeadOptedOut,
    TransitionRefused,
)
from close_engine.stages import ActionType, Stage
from close_engine.transcript import TextKind

__all__ = ["ACTOR", "Question", "Refusal", "Tool", "ToolCall", "toolbox"]

#: Who does it, in the history and in the outbox.
ACTOR = "ai"

#: The longest text that Twilio takes.
LONGEST_TEXT = 1600

#: What `opt_out()` is told: the words themselves stand in the transcript, and can be forgotten there.
OPTED_OUT_IN_WORDS = "the lead's own words, as the AI understood them"


#: What a phone makes a link of, unless it is a mere name such as bakery.com, which may be the lead's own.
_LINK = re.compile(
    r"[a-z][\w+.-]*://\S*|\bwww\.\S*|\b[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}(?::\d+)?(?:/|[?#](?=\S))\S*", re.IGNORECASE
)

#: What ends a sentence, and not the link before it.
_AFTER_A_LINK = ".,;:!?)]}>*\"'”’»…"


class Refusal(Exception):
    """A tool call that cannot be carried out. Its sentence goes back to the model."""


#: What goes back to the model besides: the library's own refusals of what was asked for.
REFUSALS = (
    Refusal,
    TransitionRefused,
    InvalidValue,
    ConversationClosed,
    ConversationTakenOver,
    LeadOptedOut,
    KeyReused,
)


@dataclass(frozen=True)
class Question:
    """Something to find out from the lead.

    Attributes:
        id: str, its name in `questions_asked` and `collected_data`: up to 64 letters of A-Z, digits, `_`, `.` and `-`.
        text: str, what is to be found out, for the model to ask in its own words.
        required: bool, whether nothing is built before it is answered.
    """

    id: str
    text: str
    required: bool = True


@dataclass(frozen=True)
class ToolCall:
    """A tool that a model calls.

    Attributes:
        id: str, the model's id of the call.
        name: str, the tool's name; a model may invent one.
        arguments: whatever the model gives; it is checked against the tool's schema.
    """

    id: str
    name: str
    arguments: Any


@dataclass
class Desk:
    """Where tool calls are carried out, inside a transaction that holds the conversation.

    Attributes:
        conversation: CloseEngineConversation, held.
        questions: sequence of Question.
        hand_to: str, who takes over.
        known_links: str, whatever text has the links that may stand in a text to the lead.
        payment_link: str, the payment link, if one was asked for; else None.
        waiting: collection of TextKind, what waits already, in the outbox or for approval.
        key: str, idempotency key of the present call.
    """

    conversation: CloseEngineConversation
    questions: Sequence[Question]
    hand_to: str
    known_links: str
    payment_link: str | None = None
    waiting: Collection[TextKind] = ()
    key: str = ""

    def submit(self, type: ActionType, text: str, metadata: Mapping[str, Any], link: str | None = None) -> None:
        """Submit a text, with its link on a line of its own if the words lack it."""
        text = text.strip()
        if link is not None and link not in text:
            text = f"{text}\n{link}"
        if len(text) > LONGEST_TEXT:
            raise Refusal(
                f"The text has {len(text)} characters{' with its link' if link else ''}, and {LONGEST_TEXT} is the "
                "most that a text message can have: make it shorter."
            )
        known = links_in(f"{self.known_links}\n{link or ''}")
        for comparable, found in links_in(text).items():
            if comparable not in known:
                raise Refusal(
                    f"The link {found[:100]!r} is none of the agency's: leave it out. send_preview and offer_payment "
                    "add theirs by themselves."
                )
        submit(self.conversation, type, text, metadata=metadata, key=self.key, actor=ACTOR)


@dataclass(frozen=True)
class Tool:
    """Something that a model may do.

    Attributes:
        name: str.
        description: str, for the model.
        schema: dict, the JSON schema of its arguments.
        run: a function of the desk and the arguments.
        closes: bool, whether it ends the model's turn.
    """

    name: str
    description: str
    schema: dict[str, Any]
    run: Callable[[Desk, dict[str, Any]], None] = field(repr=False)
    closes: bool = True

    def carry_out(self, desk: Desk, arguments: Any) -> None:
        """Check the arguments, and do it.

        Raises:
            Refusal: the arguments are wrong, or the tool's own check refuses; one of REFUSALS: the library does.
        """
        if problem := checked(self.schema, arguments):
            raise Refusal(f"The arguments of {self.name} are wrong: {problem}.")
        self.run(desk, arguments)


def links_in(text: str) -> dict[str, str]:
    """Find the links in a text: each as it is compared with others, and as it is written.

    >>> links_in("See https://Bright.example.com/ and (www.example.org/a?b=1).")
    {'bright.example.com': 'https://Bright.example.com/', 'www.example.org/a?b=1': 'www.example.org/a?b=1'}
    """
    found = {}
    for match in _LINK.findall(text):
        link = match.rstrip(_AFTER_A_LINK)
        bare = re.sub("^https?://", "", link, flags=re.IGNORECASE)
        host = re.split("[/?#]", bare, maxsplit=1)[0]
        found[f"{host.lower()}{bare[len(host) :]}".rstrip("/")] = link
    return found


def checked(schema: Mapping[str, Any], value: Any, name: str = "the input") -> str:
    """Compare a value with a JSON schema, as far as the schemas of the tools go: objects are closed, a pattern is \\S.

    The tests compare it with `jsonschema`.

    Args:
        schema: dict.
        value: what a model gave.
        name: how to call the value.

    Returns:
        str, what is wrong; empty if nothing is.
    """
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    if not any(isinstance(value, _TYPES[kind]) and isinstance(value, bool) <= (kind == "boolean") for kind in kinds):
        return f"{name} must be of type {' or '.join(kinds)}"
    if isinstance(value, str):
        if not re.search(schema.get("pattern", ""), value):
            return f"{name} must not be empty"
        if len(value) > schema.get("maxLength", len(value)):
            return f"{name} can have at most {schema['maxLength']} characters"
        if value not in schema.get("enum", [value]):
            return f"{name} must be one of {', '.join(schema['enum'])}"
    if isinstance(value, list):
        return next(filter(None, (checked(schema["items"], item, f"each of {name}") for item in value)), "")
    if isinstance(value, dict):
        return _checked_properties(schema, value, name)
    return ""


def _checked_properties(schema: Mapping[str, Any], value: dict[Any, Any], name: str) -> str:
    known: Mapping[str, Any] = schema["properties"]
    for missing in schema.get("required", ()):
        if missing not in value:
            return f"{missing} is missing"
    for key, item in value.items():
        if key not in known:
            return f"{str(key)[:40]!r} is unknown; known are {', '.join(known)}"
        if problem := checked(known[key], item, key):
            return problem
    return f"{name} must not be empty" if len(value) < schema.get("minProperties", 0) else ""


_TYPES: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "boolean": bool,
}


def answers_of(conversation: CloseEngineConversation, questions: Sequence[Question]) -> dict[str, Any]:
    """Return the answers that are there, by the id of their question."""
    collected = conversation.collected_data
    data = collected if isinstance(collected, dict) else {}
    return {question.id: data[question.id] for question in questions if data.get(question.id) not in (None, "")}


def missing(conversation: CloseEngineConversation, questions: Sequence[Question]) -> list[str]:
    """Return the ids of the required questions that have no answer."""
    answers = answers_of(conversation, questions)
    return [question.id for question in questions if question.required and question.id not in answers]


def preview_url(conversation: CloseEngineConversation) -> str | None:
    """Return the link of the preview of the present round of changes; None if there is none."""
    collected = conversation.collected_data
    preview = collected.get("preview") if isinstance(collected, dict) else None
    if not isinstance(preview, dict) or preview.get("edit_round") != conversation.edit_rounds:
        return None
    url = preview.get("url")
    return url if isinstance(url, str) and url.strip() else None


def may_offer_payment(conversation: CloseEngineConversation) -> str:
    """Return why no payment link can be sent from this stage; empty if one can, or can be sent again."""
    if conversation.stage is Stage.PAYMENT_SENT:
        return ""
    given = {"payment_link_url": "to be made", "approved_by": "to be decided"}
    return conversation.may("send_payment_link", **given).reason


# -- the tools ---------------------------------------------------------------------------------------------------------


def _record_answers(desk: Desk, given: dict[str, Any]) -> None:
    desk.conversation.record(data=given["answers"])


def _reply(desk: Desk, given: dict[str, Any]) -> None:
    conversation = desk.conversation
    if given.get("asks"):
        conversation.record(questions=given["asks"])
    has_gaps = answers_of(conversation, desk.questions) and missing(conversation, desk.questions)
    if has_gaps and conversation.may("collect_info"):
        conversation.collect_info(actor=ACTOR, reason="some answers are missing", key=f"{desk.key}:collect_info")
    desk.submit(ActionType.SEND_MESSAGE, given["text"], {})


def _no_reply_needed(desk: Desk, given: dict[str, Any]) -> None:
    desk.conversation.no_reply(given["reason"], actor=ACTOR)


def _start_building(desk: Desk, given: dict[str, Any]) -> None:
    if ids := missing(desk.conversation, desk.questions):
        raise Refusal(
            f"Nothing is built before every required question is answered; missing: {', '.join(ids)}. Ask for them, "
            "or record the answers first."
        )
    desk.conversation.start_building(actor=ACTOR, reason="all questions are answered", key=desk.key)


def _send_preview(desk: Desk, given: dict[str, Any]) -> None:
    url = preview_url(desk.conversation)
    if url is None:
        raise Refusal("There is no preview of the present round yet: it comes by itself. Do not promise a time.")
    if TextKind.PREVIEW in desk.waiting:
        raise Refusal("The preview is on its way already, or waits for approval: send it only once.")
    if desk.conversation.stage is Stage.STALLED:
        desk.conversation.resume(actor=ACTOR, reason="the preview is ready", key=f"{desk.key}:resume")
    desk.submit(ActionType.SEND_PREVIEW, given["text"], {"previewUrl": url}, url)


def _request_edits(desk: Desk, given: dict[str, Any]) -> None:
    if desk.conversation.stage is Stage.EDIT_LOOP:
        raise Refusal(
            "Changes are being made already. Say so, and ask for these with request_edits once the lead has seen the "
            "next preview."
        )
    desk.conversation.request_edits(actor=ACTOR, reason=given["what"], key=desk.key)


def _offer_payment(desk: Desk, given: dict[str, Any]) -> None:
    if why := may_offer_payment(desk.conversation):
        raise Refusal(why)
    if TextKind.LINK in desk.waiting:
        raise Refusal("A payment link is on its way already, or waits for approval: offer no second one.")
    if desk.payment_link is None:
        raise Refusal("There was no payment link when this was tried: call it again.")
    desk.submit(ActionType.SEND_PAYMENT_LINK, given["text"], {"paymentUrl": desk.payment_link}, desk.payment_link)


def _give_up(desk: Desk, given: dict[str, Any]) -> None:
    desk.conversation.close_lost(given["reason"], actor=ACTOR, key=desk.key)


def _opted_out(desk: Desk, given: dict[str, Any]) -> None:
    optouts.opt_out(desk.conversation.lead_id, source=OPTED_OUT_IN_WORDS, key=desk.key)


def _hand_to_human(desk: Desk, given: dict[str, Any]) -> None:
    desk.conversation.take_over(by=desk.hand_to, reason=given["reason"])


#: The name of the tool that needs a link from outside, and of the one that locks more than its own conversation.
OFFER_PAYMENT, OPTED_OUT = "offer_payment", "opted_out"


def _object(**properties: Any) -> dict[str, Any]:
    optional = ("asks",)
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


#: Not empty, and not only spaces.
_SAYS_SOMETHING = r"\S"


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description, "pattern": _SAYS_SOMETHING, "maxLength": LONGEST_TEXT}


def toolbox(questions: Sequence[Question], offers_payment: bool) -> list[Tool]:
    """Make the tools for these questions.

    Args:
        questions: sequence of Question; without any, there is nothing to record.
        offers_payment: bool, whether there is a payment link to offer.

    Returns:
        list of Tool.
    """
    ids = [question.id for question in questions]
    answer = {"type": ["string", "number", "boolean"], "pattern": _SAYS_SOMETHING, "maxLength": 2000}
    answers = {question.id: {**answer, "description": question.text} for question in questions}
    properties: dict[str, Any] = {"type": "object", "properties": answers, "additionalProperties": False}
    asks = {"type": "array", "items": {"type": "string", "enum": ids}, "description": "Ids of the questions it asks."}
    words = _text("The whole text, in the lead's language and without placeholders.")
    tools = [
        Tool(
            "record_answers",
            "Record what the lead said in answer to the questions, in the lead's own terms. Record only what the lead "
            "really said. A new answer replaces the old one.",
            _object(answers={**properties, "minProperties": 1}),
            _record_answers,
            closes=False,
        ),
        Tool("reply", "Send this text to the lead.", _object(text=words, **({"asks": asks} if ids else {})), _reply),
        Tool(
            "no_reply_needed",
            "Say nothing, because the lead expects nothing: for example, they only said thanks.",
            _object(reason=_text("Why nothing needs to be said.")),
            _no_reply_needed,
        ),
        Tool(
            "start_building",
            "Have the website built. Every required question must be answered. Then tell the lead with reply.",
            _object(),
            _start_building,
            closes=False,
        ),
        Tool(
            "send_preview",
            "Send the lead the finished preview. Its link is added by itself.",
            _object(text=words),
            _send_preview,
        ),
        Tool(
            "request_edits",
            "Have the preview changed as the lead wishes. Then tell the lead with reply.",
            _object(what=_text("What to change, complete and without anything that the lead did not ask for.")),
            _request_edits,
            closes=False,
        ),
        Tool(
            OFFER_PAYMENT,
            "Send the lead the payment link, once they have said that they want the website. The link is added by "
            "itself. Whether somebody has paid is for the payment provider to say, not for the lead.",
            _object(text=words),
            _offer_payment,
        ),
        Tool(
            "give_up",
            "Close the conversation as lost: the lead has clearly declined. Nothing more is sent.",
            _object(reason=_text("Why, in one sentence.")),
            _give_up,
        ),
        Tool(
            OPTED_OUT,
            "The lead wants no more texts, in whatever words and however politely. Nothing more is sent, ever.",
            _object(words=_text("The lead's words, as they stand.")),
            _opted_out,
        ),
        Tool(
            "hand_to_human",
            "Have a human go on: the lead asks for one, is angry or unwell, or asks for what you cannot decide.",
            _object(reason=_text("What the human must know, in one sentence.")),
            _hand_to_human,
        ),
    ]
    left_out = {"record_answers": not ids, OFFER_PAYMENT: not offers_payment}
    return [tool for tool in tools if not left_out.get(tool.name)]
