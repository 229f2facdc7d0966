"""What stands in for Claude: a few rules that read what the drafter shows a model, and call its tools."""

from __future__ import annotations

import json
import re
from typing import Any

from close_engine.testing.anthropic import calls

PRICE = "A website is 499 dollars, once. You see it before you pay."
QUESTIONS = {
    "business": "What is the name of your business, and what does it do?",
    "colour": "Which colour should your website have?",
}


def brain(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Answer a request to the Messages API with tool calls."""
    texts = [_text(message["content"]) for message in request["messages"] if message["role"] == "user"]
    shown = next(text for text in reversed(texts) if "<situation>" in text)
    if any(block["type"] == "tool_result" for block in _blocks(request["messages"][-1]["content"])):
        return [calls("hand_to_human", reason="the rules did not know how to go on")]
    # A text of ours that crossed them may stand behind the lead's words.
    words = re.findall(r"<lead>\n(.*?)\n</lead>", "\n".join(texts), re.DOTALL)
    return _answer(_Situation(shown, words[-1] if words else ""))


class _Situation:
    """What the drafter says of the conversation."""

    def __init__(self, shown: str, words: str) -> None:
        self.stage = _line("Stage: (.*)[.]", shown)
        self.answers = json.loads(_line("Answers, as the lead gave them: (.*)", shown))
        self.asked = _line("Asked so far: (.*)[.]", shown)
        self.has_preview = "Preview: ready" in shown
        self.words = words if "waits for an answer" in shown else ""

    def says(self, pattern: str) -> bool:
        return re.search(pattern, self.words, re.IGNORECASE) is not None


def _answer(seen: _Situation) -> list[dict[str, Any]]:
    """Return the tool calls."""
    if seen.has_preview and not seen.words:
        return [calls("send_preview", text="Here is your website. How do you like it?")]
    if not seen.words and seen.stage != "INITIATED":
        return [calls("no_reply_needed", reason="the lead waits for nothing")]
    if not seen.words:
        return [calls("reply", text=f"Hi, this is Mia of Sunny Sites! {QUESTIONS['business']}", asks=["business"])]
    if seen.says("no more texts|leave me alone|lass.* in ruhe"):
        return [calls("opted_out", words=seen.words)]
    if seen.says("a human|real person|lawyer"):
        return [calls("hand_to_human", reason=f"the lead wrote: {seen.words}")]
    if seen.says("not interested|no, thanks"):
        return [calls("give_up", reason="the lead is not interested")]
    if seen.says("ignore your|mark me as paid|for free"):
        return [calls("reply", text=f"I am afraid that I cannot do that. {PRICE}{_next(seen)}")]
    if seen.stage in ("PREVIEW_SENT", "PAYMENT_SENT"):
        return _about_the_preview(seen)
    if seen.stage in ("BUILDING", "EDIT_LOOP"):
        return [calls("reply", text="I am on it. You get a link as soon as it is ready.")]
    if seen.says("how much|expensive|price"):
        return [calls("reply", text=f"{PRICE}{_next(seen)}", **_asks(seen))]
    return _about_the_questions(seen)


def _about_the_questions(seen: _Situation) -> list[dict[str, Any]]:
    """Take the lead's words as the answer to what was asked last, and ask what is missing, or start to build."""
    made: list[dict[str, Any]] = []
    asked = [name for name in QUESTIONS if name in seen.asked and name not in seen.answers]
    if asked:
        seen.answers[asked[0]] = seen.words
        made.append(calls("record_answers", answers={asked[0]: seen.words}))
    if _missing(seen):
        hello = "Thanks!" if seen.answers else "Hi, this is Mia of Sunny Sites!"
        return [*made, calls("reply", text=f"{hello}{_next(seen)}", **_asks(seen))]
    thanks = "Wonderful, I have all that I need. I am building your website now."
    return [*made, calls("start_building"), calls("reply", text=thanks)]


def _about_the_preview(seen: _Situation) -> list[dict[str, Any]]:
    if seen.stage == "PREVIEW_SENT" and seen.says("could you|please|bitte"):
        return [calls("request_edits", what=seen.words), calls("reply", text="Sure, I am changing that.")]
    if seen.says("thank"):
        return [calls("no_reply_needed", reason="the lead only said thanks")]
    if seen.stage == "PREVIEW_SENT":
        return [calls("offer_payment", text="I am glad! This is how you pay:")]
    return [calls("reply", text="The link above is where you pay. Write me if it does not work.")]


def _missing(seen: _Situation) -> list[str]:
    return [name for name in QUESTIONS if name not in seen.answers]


def _next(seen: _Situation) -> str:
    return "".join(f" {QUESTIONS[name]}" for name in _missing(seen)[:1])


def _asks(seen: _Situation) -> dict[str, Any]:
    return {"asks": asked} if (asked := _missing(seen)[:1]) else {}


def _blocks(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _text(content: Any) -> str:
    return "\n".join(block.get("text", "") for block in _blocks(content))


def _line(pattern: str, text: str) -> str:
    found = re.search(f"^{pattern}$", text, re.MULTILINE)
    return found[1] if found else "{}"
