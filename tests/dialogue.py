"""Plays the dialogues of tests/dialogues: with a stand-in for the model, or with Claude in `make dialogues`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import anthropic

import close_engine
from close_engine import (
    AutonomyLevel,
    CloseEngineConversation,
    CloseEngineError,
    Direction,
    EntryPoint,
    Lead,
    OutboxMessage,
    Stage,
    Worker,
    import_texts,
    open_conversation,
    opted_out,
    outbox,
    pending_actions,
    receive,
    record_payment,
    subscribe,
)
from close_engine.drafting import DRAFT, ModelReply, Tool, Turn
from close_engine.integrations.anthropic import MODEL, ClaudeDrafter
from close_engine.testing import MovableClock, bring_to
from close_engine.testing.anthropic import calls
from tests.models import PAY, PERSONA, QUESTIONS, Everything

FILES = sorted((Path(__file__).parent / "dialogues").glob("*.txt"))

#: What each tool's words are called.
ARGUMENT = {
    "reply": "text",
    "send_preview": "text",
    "offer_payment": "text",
    "no_reply_needed": "reason",
    "give_up": "reason",
    "hand_to_human": "reason",
    "opted_out": "words",
    "request_edits": "what",
}

SETTINGS = ("Level", "Stage", "Known", "Earlier lead", "Earlier we")
EVENTS = ("Lead", "We write first", "Preview", "Silence", "Human approves", "Human rejects", "Human hands back", "Paid")
CHECKS = ("Sent", "Nothing sent", "Waits")
OTHERS = ("Dialogue", "Meanwhile lead", "Model", "Refused", "In the end")
ENDS = (
    "stage",
    "answers",
    "no answer",
    "opted out",
    "led by",
    "edit rounds",
    "payment link sent",
    "our turn",
    "never said",
)


@dataclass
class Line:
    """A line of a dialogue, with the indented ones below it."""

    number: int
    word: str
    rest: str
    below: list[str] = field(default_factory=list)


def read(path: Path) -> list[Line]:
    """Read a dialogue. A line that nobody understands is an error that names it."""
    lines: list[Line] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip() or text.startswith("#"):
            continue
        if text[0].isspace():
            assert lines, f"{path.name}, line {number}: it is indented, and there is nothing above it"
            lines[-1].below.append(text.strip())
            continue
        word, _, rest = text.partition(":")
        known = (*SETTINGS, *EVENTS, *CHECKS, *OTHERS)
        assert word in known, f"{path.name}, line {number}: {word!r} is none of {', '.join(known)}"
        lines.append(Line(number, word, rest.strip()))
    assert [line.word for line in lines][:1] == ["Dialogue"], f"{path.name}: begin with Dialogue:"
    assert lines[-1].word == "In the end", f"{path.name}: end with In the end:"
    return lines


def pairs(text: str) -> dict[str, str]:
    """`a = 1; b = 2` as a dict."""
    return {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in text.split(";"))}


def tool_call(text: str) -> dict[str, Any]:
    """A line below `Model:` as the block that a model answers."""
    name, _, words = text.partition(":")
    words = words.strip()
    if name == "record_answers":
        return calls(name, answers=pairs(words))
    if name not in ARGUMENT:
        return calls(name, **({"text": words} if words else {}))
    asks = re.search(r"\(asks ([\w, ]+)\)$", words)
    if asks and name == "reply":
        ids = [each.strip() for each in asks[1].split(",")]
        return calls(name, text=words[: asks.start()].strip(), asks=ids)
    return calls(name, **{ARGUMENT[name]: words})


class Script:
    """The brain of the stand-in: it answers what the dialogue says, and notes what is not as it says."""

    def __init__(self, lines: Sequence[Line]) -> None:
        self.left: list[tuple[Line, str]] = []
        for line, after in zip(lines, [*lines[1:], lines[-1]], strict=True):
            if line.word == "Model":
                self.left.append((line, after.rest if after.word == "Refused" else ""))
        self.problems: list[str] = []
        self._refused = ""

    def __call__(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        content = request["messages"][-1]["content"]
        told = [block["content"] for block in content if block["type"] == "tool_result" and block["is_error"]]
        if self._refused and not any(self._refused in text for text in told):
            self.problems.append(f"{self._refused!r} is not in what the model was told: {told}")
        if told and not self._refused:
            self.problems.append(f"this was refused: {told}")
        if not self.left:
            self.problems.append(f"the model was asked once more: {content[-1]}")
            return [calls("no_reply_needed", reason="the dialogue is over")]
        line, self._refused = self.left.pop(0)
        return [tool_call(text) for text in line.below]


class Player:
    """Plays one dialogue on the database that is bound.

    Args:
        path: Path of the file.
        client: anthropic.Anthropic, of the stand-in or the real one.
        clock: MovableClock that rules the database.
        script: Script of the stand-in; None with the real model, whose words are its own.
        model: str, the model's name.
    """

    def __init__(
        self,
        path: Path,
        client: anthropic.Anthropic,
        clock: MovableClock,
        script: Script | None = None,
        model: str = MODEL,
    ) -> None:
        self.lines = read(path)
        self.clock, self.script = clock, script
        self.meanwhile: list[str] = []
        self.problems: list[str] = []
        self.texts = 0
        self.checked = 0
        self._is_due = False
        self.lead: Lead | None = None
        player = self

        class Interrupted(ClaudeDrafter):
            """The lead may write while it thinks."""

            def ask(self, system: str, turns: Sequence[Turn], tools: Sequence[Tool]) -> ModelReply:
                reply = super().ask(system, turns, tools)
                while player.meanwhile:
                    player.receive(player.meanwhile.pop(0))
                return reply

        drafter = Interrupted(
            client, persona=PERSONA, questions=QUESTIONS, payment_link=lambda conversation: PAY, model=model
        )
        self.sender = Everything(drafter)

    @property
    def conversation(self) -> CloseEngineConversation:
        found = CloseEngineConversation.get(CloseEngineConversation.lead == self._lead())
        assert isinstance(found, CloseEngineConversation)
        return found

    def play(self) -> list[str]:
        """Play it, and return what is not as it must be: a sentence each."""
        subscribe(DRAFT, events=["lead:wrote"], debounce=timedelta(seconds=8))
        subscribe(DRAFT, events=["action:rejected", "conversation:handed_back"], debounce=timedelta(seconds=8))
        subscribe(DRAFT, stages=[Stage.INITIATED], debounce=timedelta(seconds=8))
        self._set_up({line.word: line.rest for line in self.lines if line.word in SETTINGS})
        before = ""
        for line in self.lines:
            if line.word == "Lead" and before != "Lead":
                self._work()
            if line.word in (*EVENTS[1:], *CHECKS, "In the end"):
                self._work()
            if line.word == "Meanwhile lead":
                self.meanwhile.append(line.rest)
            if line.word in EVENTS:
                self._happens(line)
                self._is_due = True
            if line.word in CHECKS and self.script is not None:
                self._check(line)
            if line.word == "In the end":
                self.problems += [problem for end in line.below if (problem := self._ended(end))]
            before = line.word
        asked = OutboxMessage.select().where(OutboxMessage.topic == DRAFT, OutboxMessage.last_error.is_null(False))
        self.problems += [f"the drafter failed: {message.last_error}" for message in asked]
        if self.script is not None:
            self.problems += self.script.problems
            self.problems += [f"line {line.number}: the model was never asked" for line, _ in self.script.left]
            if unchecked := self.sender.texts[self.checked :]:
                self.problems.append(f"these were sent, and the dialogue does not say so: {unchecked}")
        return self.problems

    def receive(self, words: str) -> None:
        """The lead writes."""
        self.texts += 1
        receive(self._lead(), f"SM{self.texts}", words, open=EntryPoint.SMS_REPLY)

    def _lead(self) -> Lead:
        assert self.lead is not None
        return self.lead

    def _set_up(self, given: dict[str, str]) -> None:
        level = AutonomyLevel(given.get("Level", "FULL_AUTO"))
        self.lead = Lead.create(phone="+15550100", autonomy_level=level)
        if "Stage" in given:
            conversation = bring_to(open_conversation(self.lead, EntryPoint.SMS_REPLY), Stage(given["Stage"]))
            conversation.record(data=pairs(given["Known"]) if "Known" in given else None)
        earlier = [line for line in self.lines if line.word.startswith("Earlier")]
        began = self.clock.now - timedelta(hours=1)
        import_texts(
            {
                "lead": self.lead,
                "direction": Direction.INBOUND if line.word == "Earlier lead" else Direction.OUTBOUND,
                "text": line.rest,
                "key": f"earlier-{number}",
                "at": began + timedelta(minutes=number),
            }
            for number, line in enumerate(earlier)
        )
        self.clock.move(timedelta(minutes=1))
        for message in outbox.claim(limit=9, topics=[DRAFT]):  # of its opening, which is past
            message.sent()

    def _work(self) -> None:
        """Draft and send what is due, if something happened."""
        if self._is_due:
            self._is_due = False
            self.clock.move(timedelta(seconds=9))  # nothing more comes in
            worker = Worker(self.sender, concurrency=1, sweep=None)
            while worker.run_until_empty():
                self.clock.move(timedelta(seconds=9))

    def _happens(self, line: Line) -> None:
        acts: dict[str, Callable[[], object]] = {
            "Lead": lambda: self.receive(line.rest),
            "We write first": lambda: open_conversation(self._lead(), EntryPoint.REP_CLOSE),
            "Preview": lambda: self._preview(line.rest),
            "Silence": lambda: self._silence(int(line.rest.split()[0])),
            "Human approves": lambda: close_engine.approve_all("dana"),
            "Human rejects": lambda: close_engine.reject_all("dana", reason=line.rest),
            "Human hands back": lambda: self.conversation.hand_back(by="dana"),
            "Paid": lambda: record_payment(self._lead(), "pi_1", amount=90000, currency="USD"),
        }
        try:
            acts[line.word]()
        except CloseEngineError as error:
            self.problems.append(f"line {line.number}: {error}")

    def _preview(self, url: str) -> None:
        conversation = self.conversation
        conversation.record(data={"preview": {"url": url, "edit_round": conversation.edit_rounds}})
        outbox.enqueue(conversation, DRAFT)

    def _silence(self, days: int) -> None:
        for _ in range(days):
            self.clock.move(timedelta(days=1))
            close_engine.sweep()

    def _check(self, line: Line) -> None:
        sent = self.sender.texts
        if line.word == "Waits":
            found: list[str | None] = [action.draft_message for action in pending_actions()]
            expected: list[str | None] = [line.rest.replace(" // ", "\n")]
        elif line.word == "Sent":
            found, expected = sent[self.checked : self.checked + 1], [line.rest.replace(" // ", "\n")]
            self.checked += 1
        else:
            found, expected = sent[self.checked :], []
            self.checked = len(sent)
        if found != expected:
            self.problems.append(f"line {line.number}: {expected} was expected, and there is {found}")

    def _ended(self, text: str) -> str:
        """Return what is not as a line at the end says; empty if it is."""
        word, _, expected = text.partition(":")
        expected = expected.strip()
        conversation = self.conversation
        collected = conversation.collected_data if isinstance(conversation.collected_data, dict) else {}
        takeover = conversation.takeover()
        said = "\n".join(each.body for each in conversation.messages() if each.direction is Direction.OUTBOUND)
        is_ours = close_engine.waiting_for_us().where(CloseEngineConversation.id == conversation.id).exists()
        if word == "stage":
            is_so, found = str(conversation.stage) in expected.split(" or "), str(conversation.stage)
        elif word == "answers":
            wanted, found = pairs(expected), str(collected)
            is_so = all(part.lower() in str(collected.get(name)).lower() for name, part in wanted.items())
        elif word == "no answer":
            is_so, found = expected not in collected, str(collected)
        elif word == "never said":
            is_so, found = expected.lower() not in said.lower(), said
        else:
            found = {
                "opted out": _yes(opted_out(self._lead()) is not None),
                "led by": "nobody" if takeover is None else takeover.taken_by,
                "edit rounds": str(conversation.edit_rounds),
                "payment link sent": _yes(conversation.payment_link_sent_at is not None),
                "our turn": _yes(is_ours),
            }[word]
            is_so = found == expected
        return "" if is_so else f"in the end, {word} must be {expected!r}, and it is {found!r}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def main(names: Sequence[str]) -> int:
    """Play those whose names have one of these parts, or all of them, with Claude; say what came of each."""
    if not os.environ.get("ANTHROPIC_API_KEY"):
        print("Set ANTHROPIC_API_KEY to play the dialogues with Claude; `make test` plays them with a stand-in.")
        return 1
    model = os.environ.get("ANTHROPIC_MODEL") or MODEL
    wanted = [path for path in FILES if not names or any(part in path.name for part in names)]
    failed = 0
    for path in wanted:
        clock = MovableClock()
        database = close_engine.connect("sqlite:///:memory:", clock=clock)
        close_engine.migrate(standalone=True)
        clock.rule()
        with anthropic.Anthropic() as client:
            problems = Player(path, client, clock, model=model).play()
        failed += bool(problems)
        print("FAILED" if problems else "ok    ", path.stem, *problems, sep="\n    " if problems else " ", flush=True)
        database.close()
    print(f"{len(wanted) - failed} of {len(wanted)} dialogues ended as they must.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
