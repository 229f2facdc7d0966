"""An agency: what its owner writes, and what runs it with Twilio, Stripe and Claude.

    agency = Agency(
        persona="You are Mia of Sunny Sites. …",
        questions=[Question("business", "What does your business do?")],
        build_site=build_site,  # build_site(conversation, edits) returns the preview's URL
        amount=49900,
        currency="USD",
        product="A website",
    )

The environment names it (`CLOSE_ENGINE_AGENCY=module:agency`) and has the accounts. `close-engine serve` takes in what
leads write and pay; `close-engine worker --agency` drafts, builds and sends.

>>> Settings.read("serve", {"STRIPE_API_KEY": "sk_test_1"})
Traceback (most recent call last):
close_engine.ConfigurationError: The environment is not right:
  - CLOSE_ENGINE_PUBLIC_URL is missing: it must be where the providers reach this server, such as https://crm.example.com.
  - TWILIO_AUTH_TOKEN is missing: it must be the account's auth token.
  - STRIPE_WEBHOOK_SECRET is missing: it must be the secret of the webhook endpoint, which begins with whsec_.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from close_engine import outbox
from close_engine.conversations import CloseEngineConversation, locked
from close_engine.drafting import DRAFT, Question
from close_engine.errors import CannotBeSent, ConfigurationError, InvalidValue
from close_engine.outbox import OutboxMessage
from close_engine.stages import CLOSED_STAGES, ActionType, Event, Stage
from close_engine.subscriptions import subscribe
from close_engine.worker import FindingSender, Sender, load_module

if TYPE_CHECKING:
    import stripe

    from close_engine.integrations.stripe import StripeWebhook
    from close_engine.integrations.twilio import TwilioWebhooks, UnknownSender

__all__ = ["BUILD", "Agency", "AgencySender", "BuildSite", "Settings", "Webhooks", "load_agency"]

#: The topic of the message whose effect is a website.
BUILD = "build_site"

#: Where the status of our texts is posted to.
STATUS_PATH = "/webhooks/twilio/status"

#: Seconds until a provider must have answered. Claude has a timeout of its own, because it thinks.
TIMEOUT = 20

BuildSite = Callable[[CloseEngineConversation, "list[str]"], str]
"""A function that builds the website of a conversation and returns the URL of its preview.

It gets the conversation, whose `collected_data` has the answers, and the edits that the lead has asked for so far.
"""

Role = Literal["serve", "worker"]
"""Which process reads the settings: each needs only some of them."""


# -- the environment


class _Variable(NamedTuple):
    name: str
    pattern: str
    must_be: str
    roles: tuple[Role, ...] = ()


_BOTH: tuple[Role, ...] = ("serve", "worker")
_URL = r"https?://[^\s/?#]+(/[^\s?#]*)?"

_AGENCY = _Variable("CLOSE_ENGINE_AGENCY", r"[^\s:]+:[^\s:]+", "the name of your Agency, as module:name", _BOTH)

_VARIABLES = (
    _Variable(
        "CLOSE_ENGINE_PUBLIC_URL", _URL, "where the providers reach this server, such as https://crm.example.com", _BOTH
    ),
    _Variable(
        "TWILIO_ACCOUNT_SID", "AC[0-9a-fA-F]{32}", "the account's SID: AC and 32 hexadecimal digits", ("worker",)
    ),
    _Variable("TWILIO_AUTH_TOKEN", r"\S+", "the account's auth token", _BOTH),
    _Variable("TWILIO_FROM", r"\+[1-9]\d{6,14}", "the number that texts come from, in E.164, such as +15550100"),
    _Variable("TWILIO_MESSAGING_SERVICE_SID", "MG[0-9a-fA-F]{32}", "the service's SID: MG and 32 hexadecimal digits"),
    _Variable(
        "STRIPE_API_KEY",
        r"[sr]k_(test|live)_\S+",
        "a secret or restricted key: sk_live_… or rk_live_…, or the same with test",
        _BOTH,
    ),
    _Variable(
        "STRIPE_WEBHOOK_SECRET",
        r"whsec_\S+",
        "the secret of the webhook endpoint, which begins with whsec_",
        ("serve",),
    ),
    _Variable("ANTHROPIC_API_KEY", r"\S+", "the key of the Claude API", ("worker",)),
    _Variable("ANTHROPIC_MODEL", r"\S+", "the name of a model"),
    _Variable("TWILIO_API_BASE", _URL, "the URL of a stand-in"),
    _Variable("STRIPE_API_BASE", _URL, "the URL of a stand-in"),
    _Variable("ANTHROPIC_BASE_URL", _URL, "the URL of a gateway or a stand-in"),
)


@dataclass(frozen=True)
class Settings:
    """What the environment says of the accounts. Secrets are not in its repr.

    Attributes:
        public_url: str, where the providers reach `close-engine serve`, without a slash at the end.
        live: bool, whether Stripe's key is of live mode.
    """

    public_url: str
    live: bool
    _values: Mapping[str, str] = field(repr=False)

    @classmethod
    def read(cls, role: Role, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings of a process, and check them.

        Args:
            role: `serve` or `worker`, which need different ones.
            environment: mapping of names to values; the default is the environment of this process.

        Returns:
            the Settings.

        Raises:
            ConfigurationError: some are missing or malformed; it names all of them, and shows no value.
        """
        return cls._read(_VARIABLES, role, environment)

    @classmethod
    def _read(cls, variables: Sequence[_Variable], role: Role, environment: Mapping[str, str] | None) -> Settings:
        environment = os.environ if environment is None else environment
        values = {each.name: environment.get(each.name, "").strip() for each in variables}
        if problems := _problems(variables, role, values):
            raise ConfigurationError("The environment is not right:", problems)
        live = re.match("[sr]k_live_", values["STRIPE_API_KEY"]) is not None
        return cls(values["CLOSE_ENGINE_PUBLIC_URL"].rstrip("/"), live, values)

    def __getitem__(self, name: str) -> str:
        return self._values[name]


def _problems(variables: Sequence[_Variable], role: Role, values: Mapping[str, str]) -> list[str]:
    problems = []
    for each in variables:
        if not values[each.name] and role in each.roles:
            problems.append(f"{each.name} is missing: it must be {each.must_be}.")
        elif values[each.name] and not re.fullmatch(each.pattern, values[each.name]):
            problems.append(f"{each.name} is malformed: it must be {each.must_be}.")
    senders = [name for name in ("TWILIO_FROM", "TWILIO_MESSAGING_SERVICE_SID") if values[name]]
    if role == "worker" and len(senders) != 1:
        problems.append(
            "TWILIO_FROM and TWILIO_MESSAGING_SERVICE_SID are both there: give one of the two."
            if senders
            else "TWILIO_FROM or TWILIO_MESSAGING_SERVICE_SID is missing: say which number texts come from."
        )
    return problems


def read_environment(role: Role, environment: Mapping[str, str] | None = None) -> Settings:
    """Check what a process needs before anything is opened: its packages, and its settings with CLOSE_ENGINE_AGENCY.

    Args:
        role: `serve` or `worker`.
        environment: as for `Settings.read`.

    Returns:
        the Settings.

    Raises:
        ConfigurationError: packages or settings are missing or malformed; it names all of them.
    """
    require_packages(*PACKAGES[role])
    return Settings._read((_AGENCY, *_VARIABLES), role, environment)


def load_agency(role: Role, environment: Mapping[str, str] | None = None) -> tuple[Agency, Settings]:
    """Import the agency that CLOSE_ENGINE_AGENCY names, and read its settings. The current directory is searched too.

    Args:
        role: `serve` or `worker`.
        environment: as for `Settings.read`.

    Returns:
        the Agency and the Settings.

    Raises:
        ConfigurationError: packages or settings are missing or malformed; or the module cannot be imported, or has no
            such Agency.
    """
    settings = read_environment(role, environment)
    name = settings[_AGENCY.name]
    module, _, attribute = name.partition(":")
    found = getattr(load_module(module), attribute, None)
    if not isinstance(found, Agency):
        what = "there is no such name in it" if found is None else f"that is a {type(found).__name__}"
        raise ConfigurationError(f"CLOSE_ENGINE_AGENCY is {name!r}, and {what}: name an Agency.")
    return found, settings


#: The packages that each process needs, from the extra `agency`.
PACKAGES: Mapping[Role, Sequence[str]] = {
    "serve": (
        *("starlette", "uvicorn", "prometheus_client", "twilio", "phonenumbers", "stripe"),
        *("jinja2", "itsdangerous", "python_multipart", "argon2"),
    ),
    "worker": ("twilio", "phonenumbers", "stripe", "anthropic"),
}


def require_packages(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        ConfigurationError: some are not; it names all of them.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ConfigurationError(
            f'An agency needs {", ".join(missing)}: install what is missing with pip install "close-engine[agency]".'
        )


# -- what the owner writes


@dataclass(frozen=True)
class Agency:
    """What the owner of an agency writes.

    Args:
        persona: str, who the AI is and what it may promise: the prompt's own part.
        questions: sequence of Question, what must be known before a website is built.
        build_site: function of a conversation and the list of edits asked for; it returns the preview's URL. It may
            take long: no transaction is open meanwhile. It runs again if it fails, or if its worker dies.
        amount: int, the price in the smallest unit of the currency.
        currency: str, its code of three letters.
        product: str, what is paid for, as the payment page shows it.
        hand_to: str, who takes a conversation over that the AI cannot go on with.
        unknown: what becomes of a text from a number that no lead has: `"create"` makes a lead, `"ignore"` logs it. If
            your CRM's leads need more than a number: a function that gets it, in E.164, and returns the new lead.
        debounce: timedelta, how long a lead must be silent before a reply is drafted: people send three texts in a row.
        effects: mapping of your own topics to functions of an OutboxMessage, which the agency's workers call.

    Raises:
        InvalidValue: an argument makes no sense.
    """

    persona: str
    questions: Sequence[Question]
    build_site: BuildSite
    amount: int
    currency: str
    product: str
    hand_to: str = "owner"
    unknown: UnknownSender | Literal["create"] = "create"
    debounce: timedelta = timedelta(seconds=8)
    effects: Mapping[str, Sender] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("persona", "product", "hand_to"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise InvalidValue(name, value, "it must say something")
        if not isinstance(self.questions, Sequence) or not all(isinstance(each, Question) for each in self.questions):
            raise InvalidValue("questions", self.questions, "it must be a list of Question")
        if not callable(self.build_site):
            raise InvalidValue("build_site", self.build_site, "it must be a function of a conversation and a list")
        if isinstance(self.amount, bool) or not isinstance(self.amount, int) or self.amount <= 0:
            raise InvalidValue("amount", self.amount, "it must be a whole number of the currency's smallest unit")
        if not isinstance(self.currency, str) or not re.fullmatch("[A-Za-z]{3}", self.currency):
            raise InvalidValue("currency", self.currency, "it must be a code of three letters, such as USD")
        if self.unknown not in ("create", "ignore") and not callable(self.unknown):
            raise InvalidValue("unknown", self.unknown, 'it must be "create", "ignore" or a function that makes a lead')
        if not isinstance(self.debounce, timedelta):
            raise InvalidValue("debounce", self.debounce, "it must be a timedelta, such as timedelta(seconds=8)")
        if wrong := [topic for topic, effect in self.effects.items() if not callable(effect)]:
            raise InvalidValue("effects", wrong[0], "its effect must be a function of a message")
        if taken := sorted({*_TEXTS, DRAFT, BUILD}.intersection(self.effects)):
            raise InvalidValue("effects", taken[0], "the agency does that itself; name your own effect")

    @property
    def topics(self) -> list[str]:
        """The topics that its workers send."""
        return [*_TEXTS, DRAFT, BUILD, *self.effects]

    def subscribe(self) -> None:
        """Say in the database what follows from which event. Doing it again changes nothing."""
        # Of one topic and one length, so that all that happens at once makes one draft.
        events = [Event.LEAD_WROTE, Event.ACTION_REJECTED, Event.CONVERSATION_HANDED_BACK]
        subscribe(DRAFT, stages=[Stage.INITIATED], events=events, debounce=self.debounce)
        subscribe(BUILD, stages=[Stage.BUILDING, Stage.EDIT_LOOP])

    def sender(self, settings: Settings) -> AgencySender:
        """Make what sends the agency's messages: texts by Twilio, drafts by Claude, websites by `build_site`.

        Args:
            settings: Settings, as read for a worker.

        Raises:
            ConfigurationError: packages are missing; it names them.
        """
        require_packages(*PACKAGES["worker"])
        import anthropic

        from close_engine.integrations.anthropic import MODEL, ClaudeDrafter
        from close_engine.integrations.stripe import StripePayments
        from close_engine.integrations.twilio import TwilioSender

        client = anthropic.Anthropic(
            api_key=settings["ANTHROPIC_API_KEY"],
            base_url=settings["ANTHROPIC_BASE_URL"] or "https://api.anthropic.com",
        )
        payments = StripePayments(
            _stripe(settings), amount=self.amount, currency=self.currency, product=self.product, live=settings.live
        )
        drafter = ClaudeDrafter(
            client,
            persona=self.persona,
            questions=self.questions,
            payment_link=payments.link,
            hand_to=self.hand_to,
            model=settings["ANTHROPIC_MODEL"] or MODEL,
        )
        texts = TwilioSender(
            _twilio(settings),
            from_=settings["TWILIO_FROM"] or None,
            messaging_service_sid=settings["TWILIO_MESSAGING_SERVICE_SID"] or None,
            status_callback=settings.public_url + STATUS_PATH,
        )
        return AgencySender(self, texts, drafter)

    def webhooks(self, settings: Settings) -> Webhooks:
        """Make what answers Twilio's and Stripe's requests.

        Args:
            settings: Settings, as read for a server.

        Raises:
            ConfigurationError: packages are missing; it names them.
        """
        require_packages("twilio", "phonenumbers", "stripe")
        from close_engine.integrations.stripe import StripeWebhook
        from close_engine.integrations.twilio import TwilioWebhooks, create_lead

        unknown = create_lead if self.unknown == "create" else self.unknown
        texts = TwilioWebhooks(settings["TWILIO_AUTH_TOKEN"], public_url=settings.public_url, unknown=unknown)
        return Webhooks(texts, StripeWebhook(settings["STRIPE_WEBHOOK_SECRET"], live=settings.live))


_TEXTS = tuple(str(type) for type in ActionType)


@dataclass(frozen=True)
class Webhooks:
    """What answers the providers' requests: give both to `close_engine.web.create_app`."""

    texts: TwilioWebhooks
    payments: StripeWebhook


def _twilio(settings: Settings) -> Any:
    from twilio.rest import Client

    from close_engine.integrations.twilio import TwilioHttp

    http = TwilioHttp(base_url=settings["TWILIO_API_BASE"] or None, timeout=TIMEOUT)
    return Client(settings["TWILIO_ACCOUNT_SID"], settings["TWILIO_AUTH_TOKEN"], http_client=http)


def _stripe(settings: Settings) -> stripe.StripeClient:
    import stripe

    base = settings["STRIPE_API_BASE"]
    return stripe.StripeClient(
        settings["STRIPE_API_KEY"],
        base_addresses={"api": base} if base else {},
        http_client=stripe.RequestsClient(timeout=TIMEOUT),
        max_network_retries=2,
    )


# -- what runs it


class AgencySender:
    """Sends the messages of an agency. Give it to a `Worker`, with `topics=agency.topics`.

    Args:
        agency: Agency.
        texts: what sends texts, with the methods `send` and `find`.
        draft: what drafts: a function of one OutboxMessage.
    """

    def __init__(self, agency: Agency, texts: FindingSender, draft: Sender) -> None:
        self._texts = texts
        self._effects: dict[str, Sender] = {**agency.effects, DRAFT: draft, BUILD: partial(_build, agency.build_site)}

    def send(self, message: OutboxMessage) -> str | None:
        """Send a text, draft a reply, build a website, or do what the agency's own effect does."""
        if message.topic in _TEXTS:
            return self._texts.send(message)
        effect = self._effects.get(message.topic)
        if effect is None:
            raise CannotBeSent(f"the agency has no effect {message.topic!r}")
        return effect(message)

    def find(self, message: OutboxMessage) -> str | None:
        """Return the provider's id of a text that left in an earlier attempt. What is no text can be done again."""
        return self._texts.find(message) if message.topic in _TEXTS else None


def _build(build_site: BuildSite, message: OutboxMessage) -> None:
    """Build the website, then say in one transaction that it is there and what follows."""
    conversation = CloseEngineConversation.get_by_id(message.conversation_id)
    if conversation.stage in CLOSED_STAGES:
        return
    url = build_site(conversation, _edits(conversation))
    if not isinstance(url, str) or not re.fullmatch(_URL + r"(\?[^\s#]*)?(#\S*)?", url):
        raise InvalidValue("build_site()", url, "it must return the URL of the preview, such as https://…")
    with locked(conversation.id) as now:
        # If the lead has asked for more meanwhile, another message builds that.
        if now.edit_rounds == conversation.edit_rounds:
            now.record(data={"preview": {"url": url, "edit_round": now.edit_rounds}})
            outbox.enqueue(now, DRAFT, key=f"preview:{message.send_key}")
        message.sent()


def _edits(conversation: CloseEngineConversation) -> list[str]:
    """Return what the lead asked to change since the conversation was opened or reopened, oldest first."""
    edits: list[str] = []
    for change in conversation.history():
        if change.dest is Stage.INITIATED:
            edits = []
        elif change.trigger == "request_edits" and change.reason:
            edits.append(change.reason)
    return edits
