"""Plays the leads in fast motion, tells what happens, and checks in the end that nothing was lost or doubled."""

from __future__ import annotations

import argparse
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from html import escape
from urllib.error import URLError

import close_engine
from close_engine import (
    ActionType,
    AutonomyLevel,
    CloseEngineConversation,
    InboxEntry,
    Lead,
    MessageStatus,
    OutboxMessage,
    StageChange,
    Takeover,
    pending_actions,
    submit,
)
from close_engine.database.binding import current
from close_engine.testing.stripe import PAID

from .people import Pays, Person, Says, twenty
from .servers import Place, opener, place

#: Seconds after which whatever has not happened is a problem.
LIMIT = 120

TEXTS, PAYMENTS = "/webhooks/twilio/texts", "/webhooks/stripe"

#: What the history's stage changes are told as.
TOLD = {
    "start_building": "the website is being built",
    "request_edits": "the website is being changed",
    "complete": "paid: the deal is closed",
    "close_lost": "closed as lost",
}


class Play:
    """One performance.

    Args:
        place: Place, where everything runs.
        people: list of Person.
    """

    def __init__(self, place: Place, people: list[Person]) -> None:
        self.place = place
        self.people = {person.number: person for person in people}
        self.said: Counter[str] = Counter()
        self.paid: Counter[str] = Counter()
        self.heard: Counter[str] = Counter()
        self.problems: list[str] = []
        self._chance = random.Random(1)
        self._begin = time.monotonic()
        self._todo: list[tuple[float, Person, Callable[[], None]]] = []
        self._pool = ThreadPoolExecutor(8)
        self._texts_seen = 0
        self._changes_seen = 0
        self._helped: set[str] = set()

    # -- telling

    def tell(self, who: str, what: str) -> None:
        """Print one line: when, who, what."""
        shown = " ".join(what.split())
        shown = shown if len(shown) <= 84 else f"{shown[:83]}…"
        print(f"{time.monotonic() - self._begin:6.1f}  {who:<14} {shown}", flush=True)

    # -- the leads

    def run(self) -> None:
        """Have all leads do what they do, until each has come to an end and nothing waits."""
        for number, person in enumerate(self.people.values()):
            for rank, words in enumerate(person.opening):
                self._later(0.4 * number + 0.03 * rank, person, Says(words))
        while not self._is_over():
            if time.monotonic() - self._begin > LIMIT:
                late = [person.name for person in self.people.values() if not person.is_done]
                self.problems.append(f"After {LIMIT} seconds, these have not come to an end: {', '.join(late)}.")
                break
            self._hear()
            self._watch()
            self._act()
            time.sleep(0.03)
        self._pool.shutdown()
        self._hear()
        self._watch()

    def _later(self, seconds: float, person: Person, deed: Says | Pays) -> None:
        do = self._say if isinstance(deed, Says) else self._pay
        self._todo.append((time.monotonic() + seconds, person, lambda: do(person, deed[0])))

    def _act(self) -> None:
        now = time.monotonic()
        due = [deed for deed in self._todo if deed[0] <= now]
        self._todo = [deed for deed in self._todo if deed[0] > now]
        for _, _, do in due:
            do()

    def _say(self, person: Person, words: str) -> None:
        self.tell(f"{person.name} →", words)
        self.said[person.name] += 1
        sid = f"SM{self._chance.getrandbits(128):032x}"
        # The provider tells everything twice, as providers do on a bad day.
        for _ in range(2):
            self._pool.submit(self._post, person, words, sid)

    def _post(self, person: Person, words: str, sid: str) -> None:
        answered = self.place.twilio.text_from(person.number, words, self.place.url + TEXTS, sid=sid)
        if answered.status != 200:
            self.problems.append(f"A text of {person.name} was answered with {answered.status}.")

    def _pay(self, person: Person, link: str) -> None:
        # Stripe, too, tells everything twice.
        try:
            answers = self.place.stripe.pay(link, self.place.url + PAYMENTS, events=PAID * 2)
        except ValueError:
            self.tell(f"{person.name} →", "tries to pay again: the link is good for one payment")
            return
        self.tell(f"{person.name} →", "pays 499 dollars")
        self.paid[person.name] += 1
        for answered in answers:
            if answered.status != 200:
                self.problems.append(f"A payment of {person.name} was answered with {answered.status}.")

    def _hear(self) -> None:
        """Tell what the agency wrote, and have the leads react."""
        texts = self.place.twilio.texts[self._texts_seen :]
        self._texts_seen += len(texts)
        for text in texts:
            person = self.people[text.to]
            self.heard[person.name] += 1
            self.tell(f"{person.name} ←", text.body)
            for link in re.findall(r"https?://\S+\.html", text.body):
                self._look_at(person, link)
            for rank, deed in enumerate(person.reacts(text.body)):
                self._later(0.2 + 0.4 * self._chance.random() + 0.2 * rank, person, deed)

    def _look_at(self, person: Person, link: str) -> None:
        try:
            with opener.open(link, timeout=10) as page:
                seen = page.read().decode()
        except URLError as error:
            seen = str(error)
        if escape(person.business) not in seen:
            self.problems.append(f"The preview of {person.name} does not show {person.business}: {seen[:80]}")

    # -- the agency

    def _watch(self) -> None:
        """Tell what the database says has happened, and be Dana, who takes over."""
        changes = StageChange.select().where(StageChange.id > self._changes_seen).order_by(StageChange.id)
        for change in changes:
            self._changes_seen = change.id
            if change.trigger in TOLD:
                self.tell(self._name_of(change.conversation_id), TOLD[change.trigger])
        for takeover in Takeover.lasting():
            if takeover.conversation_id not in self._helped:
                self._helped.add(takeover.conversation_id)
                name = self._name_of(takeover.conversation_id)
                self.tell(name, "handed to a human")
                conversation = CloseEngineConversation.get_by_id(takeover.conversation_id)
                words = f"Hi {name}, Dana here, of flesh and blood. When can I call you?"
                submit(conversation, ActionType.SEND_MESSAGE, words, actor=takeover.taken_by)

    def _name_of(self, conversation_id: str) -> str:
        conversation = CloseEngineConversation.get_by_id(conversation_id)
        return self.people[conversation.lead.phone].name

    def _is_over(self) -> bool:
        if self._todo or not all(person.is_done for person in self.people.values()):
            return False
        waiting = OutboxMessage.select().where(OutboxMessage.status == MessageStatus.PENDING).exists()
        return not waiting and self._texts_seen == len(self.place.twilio.texts)

    # -- what became of it

    def check(self) -> None:
        """Compare what the leads, Twilio and Stripe know with what the database says."""
        texts = InboxEntry.select().where(InboxEntry.kind == "text").count()
        payments = InboxEntry.select().where(InboxEntry.kind == "payment").count()
        topics = [str(topic) for topic in ActionType]
        sent = list(OutboxMessage.select().where((OutboxMessage.status == "SENT") & OutboxMessage.topic.in_(topics)))
        delivered = [text.sid for text in self.place.twilio.texts]
        if texts != self.said.total():
            self.problems.append(f"The leads wrote {self.said.total()} texts, and {texts} are stored.")
        if payments != self.paid.total():
            self.problems.append(f"The leads paid {self.paid.total()} times, and {payments} payments are stored.")
        if sorted(delivered) != sorted(str(message.provider_id) for message in sent):
            self.problems.append(f"Twilio took {len(delivered)} texts, and {len(sent)} are recorded as sent.")
        if dead := OutboxMessage.select().where(OutboxMessage.status == "DEAD").count():
            self.problems.append(f"{dead} messages are dead.")
        for person in self.people.values():
            found = self._conversation_of(person)
            if found is None or found.stage != person.ends:
                self.problems.append(f"{person.name} {person.about}, and ended as {found and found.stage}.")
        self.problems += [f"{problem}" for problem in close_engine.verify()]
        for name, status in self.place.statuses.items():
            self.problems += [f"close-engine {name} ended with status {status}."] * bool(status)

    def _conversation_of(self, person: Person) -> CloseEngineConversation | None:
        found = list(close_engine.conversations_of(person.number))
        return found[0] if found else None

    def report(self) -> None:
        """Print what became of each lead, and whether all is well."""
        print(f"\n{'lead':<8} {'who':<28} {'stage':<15} {'texts':>5} {'replies':>7} {'paid':>6}")
        for person in self.people.values():
            found = self._conversation_of(person)
            paid = f"${499 * self.paid[person.name]}" if self.paid[person.name] else "-"
            print(
                f"{person.name:<8} {person.about:<28} {found.stage if found else '-':<15} {self.said[person.name]:>5} "
                f"{self.heard[person.name]:>7} {paid:>6}"
            )
        print(
            f"\n{self.said.total()} texts came in, each of them twice, and {self.heard.total()} went out. "
            f"{len(self.place.claude.requests)} questions went to the model. It took "
            f"{time.monotonic() - self._begin:.0f} seconds.\n"
        )
        for problem in self.problems:
            print(f"PROBLEM: {problem}")
        if not self.problems:
            print("Nothing was lost, nothing was doubled, and verify finds nothing wrong.")


#: What three more leads write. A human must approve each text to them.
CAUTIOUS = {
    "+15550300001": "Hi! Do you make websites?",
    "+15550300002": "How much is a website?",
    "+15550300003": "Hello, a friend told me about you.",
}


def leave_drafts(place: Place) -> str:
    """Have leads write whose texts a human must approve, and return the address at which the human does so.

    Args:
        place: Place, with a server and a worker that run.
    """
    for number, words in CAUTIOUS.items():
        Lead.create(phone=number, autonomy_level=AutonomyLevel.MANUAL)
        place.twilio.text_from(number, words, place.url + TEXTS)
    end = time.monotonic() + LIMIT
    while current().count(pending_actions().order_by()) < len(CAUTIOUS) and time.monotonic() < end:
        time.sleep(0.05)
    return f"{place.url}/console/"


def stay(place: Place) -> None:
    """Go on until somebody has looked, and ends it."""
    with suppress(KeyboardInterrupt), place.running("serve", "worker"):
        address = leave_drafts(place)
        print(f"\nNow you: drafts wait for your approval at {address} (Ctrl-C ends it all).", flush=True)
        threading.Event().wait()


def main() -> int:
    """Play, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leads", type=int, default=20, help="how many leads, from 1 to 20")
    in_a_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    parser.add_argument("--leave", action="store_true", help="end when the leads have, also in a terminal")
    given = parser.parse_args()
    leads = max(1, min(20, given.leads))
    with place() as here:
        print(
            "No account is needed: Twilio, Stripe and Claude are stand-ins on this machine. → a lead writes, ← we do.\n"
        )
        if here.command("migrate", "migrate", "--standalone").wait():
            raise SystemExit("\n".join(here.log("migrate")))
        with here.running("serve", "worker"):
            close_engine.connect(here.database)
            play = Play(here, twenty()[:leads])
            play.run()
        play.check()
        play.problems += here.complaints()
        play.report()
        if in_a_terminal and not given.leave:
            stay(here)
        current().database.close()
    return 1 if play.problems else 0


if __name__ == "__main__":
    sys.exit(main())
