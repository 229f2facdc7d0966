"""Texts through Twilio: a sender for the worker, and the webhooks for what leads write and for what became of texts.

    client = Client(account_sid, auth_token, http_client=TwilioHttp())
    sender = TwilioSender(client, from_="+15550199", status_callback="https://crm.example.com/webhooks/twilio/status")
    Worker(sender, topics=list(ActionType)).run()

    webhooks = TwilioWebhooks(auth_token, public_url="https://crm.example.com")
    response = webhooks.text(request.url, request.form, request.headers.get("X-Twilio-Signature"))

Twilio has no idempotency keys. So the sender has `find`, which the worker asks before it sends a message again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Literal
from urllib.parse import parse_qs, urlencode, urlsplit, urlunsplit

from twilio.http.http_client import TwilioHttpClient
from twilio.http.response import Response
from twilio.request_validator import RequestValidator
from twilio.rest import Client

from close_engine import numbers, optouts
from close_engine.carriers import Keyword
from close_engine.conversations import CloseEngineConversation
from close_engine.database.binding import current
from close_engine.database.fields import clean_words, storable_text
from close_engine.database.transaction import atomic
from close_engine.deliveries import DELIVERY_WORDS, Delivery, of_sending, record_delivery
from close_engine.errors import (
    AfterCommitError,
    CannotBeSent,
    ConfigurationError,
    ConversationCompleted,
    InvalidValue,
    LeadHasNoPhone,
    LeadNotFound,
    LeadOptedOut,
    RecipientOptedOut,
    Snooze,
    TextOfAnotherLead,
    UnreadableRow,
)
from close_engine.inbox import Received, receive
from close_engine.integrations.retry_after import retry_after
from close_engine.integrations.webhooks import WebhookResponse
from close_engine.models import Lead
from close_engine.outbox import TEXTS, OutboxMessage
from close_engine.printable import get_logger
from close_engine.stages import ACTIVE_STAGES, DeliveryStatus, EntryPoint, Stage
from close_engine.texts import TextEntry

__all__ = ["TwilioHttp", "TwilioSender", "TwilioWebhooks", "UnknownSender", "create_lead", "words"]

logger = get_logger(__name__)

_API = "https://api.twilio.com"

#: A number that can be called from anywhere: a plus sign, the country's code, and 15 digits at most.
_E164 = re.compile(r"\+[1-9][0-9]{6,14}")

#: The lead opted out, at Twilio or at the carrier.
_OPTED_OUT = 21610

#: What no further attempt can mend: something about this text, or about this lead's number.
_PERMANENT = {21211, 21214, 21217, 21265, 21266, 21408, 21602, 21604, 21605, 21608, 21612, 21614, 21617, 21619}

#: What is wrong with the account, the sender's number or its settings, or passes by itself. It would be wrong of every
#: text, so no text dies of it.
_PASSING = {20003, 20005, 20404, 20429, 21212, 21603, 21606, 21609, 21611, 21659, 21660, 21701, 21703, 21730}
_PASSING_STATUSES = {401, 403, 404, 408, 429}

#: The longest that Retry-After is believed.
_LONGEST_WAIT = timedelta(hours=1)

#: How far the clocks of Twilio and of the database may be apart.
_CLOCKS = timedelta(minutes=5)

#: The most texts that `find` reads, and how many at once.
_MOST_LISTED, _PAGE = 1000, 200

#: Twilio's ids have 34 characters, our send keys 36.
_LONGEST_ID = 200

#: What Twilio's own opt-out says of a text.
_OPT_OUT_TYPES = {"STOP": Keyword.OPT_OUT, "START": Keyword.OPT_IN}

#: What a trial account puts in front of every text.
_TRIAL = "Sent from your Twilio trial account - "


class TwilioHttp(TwilioHttpClient):  # type: ignore[misc]
    """An HTTP client for Twilio's SDK, with a timeout, and for a server other than Twilio's if you like.

    Args:
        base_url: str, a server to speak to instead of Twilio's, such as a stand-in.
        timeout: float, the most seconds to wait for an answer.
        options: what else Twilio's own `TwilioHttpClient` takes.
    """

    def __init__(self, *, base_url: str | None = None, timeout: float = 10.0, **options: Any) -> None:
        super().__init__(timeout=timeout, **options)
        self._base = None if base_url is None else urlsplit(base_url)

    def request(self, method: str, url: str, *args: Any, **options: Any) -> Response:
        """Make a request, as `TwilioHttpClient` does."""
        if self._base is not None:
            path = self._base.path.rstrip("/") + urlsplit(url).path
            url = urlunsplit(urlsplit(url)._replace(scheme=self._base.scheme, netloc=self._base.netloc, path=path))
        return super().request(method, url, *args, **options)


def words(message: OutboxMessage) -> str:
    """Return what a message says as a text: its body, and its links in lines of their own if the body lacks them."""
    body = (message.body or "").strip()
    payload = message.payload if isinstance(message.payload, dict) else {}
    links = [str(payload.get(name) or "").strip() for name in ("previewUrl", "paymentUrl")]
    return "\n".join(filter(None, [body, *(link for link in links if not _has_link(body, link))]))


def _has_link(body: str, link: str) -> bool:
    """Return whether the body has this very link, and not only a longer one that begins like it."""
    return re.search(rf"{re.escape(link)}(?![\w/?#=&%-]|\.\w)", body) is not None


class TwilioSender:
    """Sends texts through Twilio. Give it to a worker that sends only texts: `topics=list(ActionType)`.

    The lead's number is looked up when the text is sent. A status callback gets the message's `send_key` in its query.

    Args:
        client: twilio.rest.Client, with a timeout: `Client(…, http_client=TwilioHttp())`.
        from_: str, the number that sends.
        messaging_service_sid: str, the messaging service that sends, instead of a number.
        status_callback: str, the URL at which Twilio says what became of a text: `TwilioWebhooks.status`.

    Raises:
        ConfigurationError: not exactly one of `from_` and `messaging_service_sid` is given, the URL is none, or the
            client would wait for ever.
    """

    def __init__(
        self,
        client: Client,
        *,
        from_: str | None = None,
        messaging_service_sid: str | None = None,
        status_callback: str | None = None,
    ) -> None:
        if bool(from_) == bool(messaging_service_sid):
            raise ConfigurationError("Give TwilioSender either from_, a number, or messaging_service_sid.")
        if not getattr(client.http_client, "timeout", None):
            raise ConfigurationError(
                "The Twilio client would wait for ever for an answer: give it a timeout, as in "
                "Client(account_sid, auth_token, http_client=TwilioHttp(timeout=10))."
            )
        if status_callback is not None:
            _require_url("status_callback", status_callback)
        self._client = client
        self._from = {"From": from_} if from_ else {"MessagingServiceSid": messaging_service_sid or ""}
        self._status_callback = status_callback
        self._messages = f"{_API}/2010-04-01/Accounts/{client.account_sid}/Messages.json"

    def send(self, message: OutboxMessage) -> str:
        """Send a text.

        Args:
            message: OutboxMessage, of a topic that is a text.

        Returns:
            str, Twilio's MessageSid.

        Raises:
            CannotBeSent: the lead has no number that can be texted, or Twilio refused the text for good.
            RecipientOptedOut: Twilio says that the recipient opted out.
            Snooze: Twilio asked to be left alone for some time.
            ConfigurationError: the message is no text.
            RuntimeError: Twilio failed, or did not know the sender: try again.
        """
        if message.topic not in TEXTS:
            raise ConfigurationError(
                f"Message {message.id} has the topic {message.topic!r}, which is no text to a lead: give TwilioSender "
                "to a worker with topics=list(ActionType)."
            )
        said = words(message)
        if not said:
            raise CannotBeSent(f"Message {message.id} has no words.")
        to = _dialable(message.lead_id)
        data = {"To": to, **self._from, "Body": said}
        if self._status_callback is not None:
            data["StatusCallback"] = _with_send_key(self._status_callback, message.send_key)
        sid = self._call("POST", self._messages, data=data).get("sid")
        if not isinstance(sid, str) or not sid:
            raise RuntimeError("Twilio took the text and did not say under which MessageSid.")
        return sid

    def find(self, message: OutboxMessage) -> str | None:
        """Return the MessageSid of a message that left in an earlier attempt; None if it did not.

        A status callback may have told. If not, Twilio is asked for the texts to the lead's number since the message
        was put in. The newest with the same words is the message, unless it is recorded as something else. What Twilio
        failed to deliver did not leave: it reached nobody, so sending it again doubles nothing.

        Args:
            message: OutboxMessage, which may have been sent before.

        Raises:
            Snooze: Twilio asked to be left alone for some time.
            RuntimeError: Twilio failed, or did not know the account.
        """
        told = of_sending(message.send_key, None)
        if told is not None and told.provider_id is not None and told.status is not DeliveryStatus.UNDELIVERED:
            return told.provider_id
        if message.lead_id is None:
            return None
        try:
            # Also the number that the lead had, if the CRM has another one since.
            known = numbers.texted(message.lead_id)
        except LeadNotFound:
            return None
        if not (said := _spelling(words(message))):
            return None
        for to in filter(_E164.fullmatch, known):
            alike: list[str] = [
                each["sid"] for each in self._listed(to, message.created_at) if _spelling(each["body"]) == said
            ]
            recorded = _recorded(alike, message)
            if left := next((sid for sid in alike if sid not in recorded), None):
                return left
        return None

    def _listed(self, to: str, since: datetime) -> Iterator[dict[str, Any]]:
        """Yield Twilio's texts to a number that left or may leave, the newest first."""
        # Not by DateSent: a text that waits in Twilio's queue has none yet.
        params = {"To": to, "PageSize": _PAGE, "From": self._from.get("From")}
        page = self._call("GET", self._messages, params=params)
        for left in reversed(range(_MOST_LISTED // _PAGE)):
            recent = [each for each in page.get("messages", []) if _created(each) >= since - _CLOCKS]
            for each in recent:
                if DELIVERY_WORDS.get(str(each.get("status"))) is not DeliveryStatus.UNDELIVERED:
                    yield each
            following = page.get("next_page_uri")
            if not (left and following and recent):
                return
            page = self._call("GET", _API + following)

    def _call(self, method: str, uri: str, **options: Any) -> dict[str, Any]:
        """Ask Twilio, and return what it answers. Raises what `send` raises."""
        # Not client.messages.create(): its errors come without the headers, and so without Retry-After.
        response = self._client.request(method, uri, **options)
        try:
            answer = json.loads(response.text)
        except ValueError:
            answer = None
        answer = answer if isinstance(answer, dict) else {}
        if 200 <= response.status_code < 300:
            return answer
        raise _refused(response, answer) if method == "POST" else _failed(response, answer)


def _refused(response: Response, answer: Mapping[str, Any]) -> Exception:
    """Return what to raise because Twilio did not take a text."""
    status, code = response.status_code, answer.get("code")
    if code == _OPTED_OUT:
        return RecipientOptedOut(_sentence("Twilio says so", response, answer))
    is_passing = code in _PASSING or status in _PASSING_STATUSES or not 400 <= status < 500
    if code in _PERMANENT or not is_passing:
        return CannotBeSent(_sentence("Twilio refused the text", response, answer))
    return _failed(response, answer)


def _failed(response: Response, answer: Mapping[str, Any]) -> Exception:
    """Return what to raise because Twilio is to be asked again, when it says so or else later."""
    wait = None
    if response.status_code == 429 or response.status_code >= 500:
        headers = {str(name).lower(): str(value) for name, value in (response.headers or {}).items()}
        wait = retry_after(headers.get("retry-after"), most=_LONGEST_WAIT)
    return RuntimeError(_sentence("Twilio failed", response, answer)) if wait is None else Snooze(wait)


def _sentence(what: str, response: Response, answer: Mapping[str, Any]) -> str:
    """Say what happened, and what Twilio says of it."""
    code = f"error {answer['code']}, " if answer.get("code") else ""
    return f"{what} ({code}HTTP {response.status_code}): {answer.get('message') or 'it did not say why'}"


def _utc(date: datetime) -> datetime:
    return date if date.tzinfo is not None else date.replace(tzinfo=timezone.utc)


def _created(listed: Mapping[str, Any]) -> datetime:
    """Return when Twilio got a text; if it does not say, it may have been just now."""
    try:
        return _utc(parsedate_to_datetime(str(listed.get("date_created"))))
    except (ValueError, TypeError):
        return datetime.max.replace(tzinfo=timezone.utc)


def _spelling(text: Any) -> str:
    """Return what counts of a text's words: Twilio may have changed its spaces, and a trial account its beginning."""
    return " ".join(str(text or "").removeprefix(_TRIAL).split())


def _recorded(sids: list[str], message: OutboxMessage) -> set[str]:
    """Return which of Twilio's texts are recorded as undelivered, or as something else than this message is now."""
    others = OutboxMessage.provider_id.in_(sids) & (OutboxMessage.id != message.id)
    is_another = (Delivery.send_key != message.send_key) | (Delivery.status == DeliveryStatus.UNDELIVERED)
    queries: list[Any] = [
        OutboxMessage.select(OutboxMessage.provider_id).where(others).tuples(),
        Delivery.select(Delivery.provider_id).where(Delivery.provider_id.in_(sids) & is_another).tuples(),
        TextEntry.select(TextEntry.key).where(TextEntry.key.in_(sids)).tuples(),
    ]
    return {sid for query in queries for (sid,) in query} if sids else set()


def _dialable(lead_id: str | None) -> str:
    """Return a lead's number in E.164.

    Raises:
        CannotBeSent: there is none.
    """
    if lead_id is None:
        raise CannotBeSent("The lead was deleted.")
    try:
        number = numbers.number_of(numbers.phone_of(lead_id))
    except LeadNotFound as error:
        raise CannotBeSent(str(error)) from error
    if number is None:
        raise CannotBeSent(f"Lead {lead_id!r} has no phone number that can be read: correct it, and requeue this.")
    if not _E164.fullmatch(number):
        raise CannotBeSent(
            f"The phone number of lead {lead_id!r} cannot be dialled: write it with its country code, such as "
            "+15550100, or say which region numbers are from (CLOSE_ENGINE_REGION), and requeue this."
        )
    return number


def _with_send_key(url: str, send_key: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(query="&".join(filter(None, [parts.query, urlencode({"send_key": send_key})]))))


def _require_url(label: str, url: str) -> None:
    try:
        parts = urlsplit(url)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigurationError(f"{label} must be a URL such as https://crm.example.com, not {url!r}.")


def create_lead(number: str) -> Lead:
    """Make a lead of a number that texted first: `TwilioWebhooks(…, unknown=create_lead)`.

    If the CRM's leads need more columns, write a function of your own.

    Args:
        number: str, in E.164.

    Returns:
        the Lead.
    """
    return Lead.create(phone=number)


UnknownSender = Literal["ignore"] | Callable[[str], "Lead | str | None"]
"""What becomes of a text from a number that no lead has: `"ignore"`, or a function of the number in E.164 that makes a
lead and returns it or its id, or None to ignore the text. It runs in the transaction of the text."""


class TwilioWebhooks:
    """Answers Twilio's requests: what leads write, and what became of texts.

    Each request is one transaction. What is answered with 200 is committed, and what fails has changed nothing.

    Args:
        auth_token: str, the account's token, with which Twilio signs its requests.
        public_url: str, how Twilio reaches this server, if a proxy stands before it: scheme, host, and the prefix that
            the proxy removes.
        entry_point: EntryPoint of the conversation that a text opens or reopens.
        unknown: what becomes of a text from a number that no lead has: `"ignore"`, or a function such as `create_lead`.

    Raises:
        ConfigurationError: the token is empty, the URL is none, or `unknown` cannot be called.
    """

    def __init__(
        self,
        auth_token: str,
        *,
        public_url: str | None = None,
        entry_point: EntryPoint = EntryPoint.SMS_REPLY,
        unknown: UnknownSender = "ignore",
    ) -> None:
        if not auth_token:
            raise ConfigurationError("TwilioWebhooks needs the account's auth token: without it, anybody could write.")
        if public_url is not None:
            _require_url("public_url", public_url)
        if unknown != "ignore" and not callable(unknown):
            raise ConfigurationError('unknown must be "ignore" or a function that makes a lead, such as create_lead.')
        self._validator = RequestValidator(auth_token)
        self._public_url = public_url
        self._entry_point = EntryPoint(entry_point)
        self._unknown = unknown

    def text(self, url: str, form: Mapping[str, str], signature: str | None) -> WebhookResponse:
        """Process a text of a lead: the request that Twilio makes when "a message comes in".

        Args:
            url: str, of the request, with its query.
            form: mapping, the form in its body, or a framework's own object for it.
            signature: str, its header `X-Twilio-Signature`; None if it has none.

        Returns:
            WebhookResponse: 200 with an empty TwiML if the text is processed or was before, or is to be ignored; 403 if
            the signature is not Twilio's, 400 if this is no text.
        """
        if refusal := self._refusal(url, form, signature):
            return refusal
        try:
            text = _Inbound.of(form)
        except InvalidValue as error:
            return _malformed(error)
        return _committed(lambda: self._receive(text), f"text {text.sid}")

    def status(self, url: str, form: Mapping[str, str], signature: str | None) -> WebhookResponse:
        """Record what became of a text: the request that Twilio makes to the status callback.

        If the status is a word that nobody knows, it is logged, and that is all: another attempt would not change it.

        Args:
            url: str, of the request, with its query.
            form: mapping, as for `text`.
            signature: str, as for `text`.

        Returns:
            WebhookResponse, as for `text`.
        """
        if refusal := self._refusal(url, form, signature):
            return refusal
        try:
            sid = _id("MessageSid", form.get("MessageSid"))
            word = _id("MessageStatus", form.get("MessageStatus"))
            send_key = next(iter(parse_qs(urlsplit(url).query).get("send_key", [])), None)
            send_key = send_key and _id("send_key", send_key)
        except InvalidValue as error:
            return _malformed(error)
        if word.strip().lower() not in DELIVERY_WORDS:
            logger.warning("passed over status text=%s: nobody knows the word %r", sid, word[:40])
            return _DONE
        code = form.get("ErrorCode") or None
        why = ": ".join(filter(None, [code, form.get("ErrorMessage")])) or None
        return _committed(lambda: _record(sid, word, send_key, code, why), f"status of text {sid}")

    def _refusal(self, url: str, form: Mapping[str, str], signature: str | None) -> WebhookResponse | None:
        """Return the response to a request that is not Twilio's; None if it is."""
        try:
            is_twilios = bool(signature) and self._validator.validate(self._seen_by_twilio(url), form, signature)
        except (ValueError, TypeError, AttributeError) as error:  # no URL, or values that are no text
            return _malformed(error)
        if is_twilios:
            return None
        logger.warning("refused path=%s: the signature is not Twilio's", urlsplit(url).path)
        return WebhookResponse(403, "The signature is not Twilio's.")

    def _seen_by_twilio(self, url: str) -> str:
        """Return the URL that Twilio requested and signed."""
        if self._public_url is None:
            return url
        public, parts = urlsplit(self._public_url), urlsplit(url)
        prefix = public.path.rstrip("/")
        path = parts.path if prefix and parts.path.startswith(f"{prefix}/") else prefix + parts.path
        return urlunsplit(parts._replace(scheme=public.scheme, netloc=public.netloc, path=path))

    def _receive(self, text: _Inbound) -> None:
        leads = self._leads(text)
        if not leads:
            logger.warning("ignored text=%s from=%s: %s", text.sid, text.sender, text.why_ignored)
            _heed(text)
            return
        lead_id, *others = leads
        details = text.details
        if others:
            logger.warning("shared number text=%s: it is lead %s's, not of %s", text.sid, lead_id, ", ".join(others))
            details["sharedWith"] = others
        if text.opt_out_type == "STOP":
            optouts.hold(lead_id)  # before the conversation is locked by itself: another order could deadlock
        try:
            received = self._kept(lead_id, text, details)
        except UnreadableRow as error:  # the text is in the inbox
            logger.error("received text=%s lead=%s, and it must be answered by hand: %s", text.sid, lead_id, error)
        except TextOfAnotherLead as error:  # the number was another lead's when the text came first
            logger.warning("received before text=%s: %s", text.sid, error)
        else:
            if not received.duplicate and received.keyword is None:
                _follow(text, lead_id)

    def _kept(self, lead_id: str, text: _Inbound, details: dict[str, Any]) -> Received:
        """Receive a text, if need be without a conversation. Raises what no attempt to open one explains."""
        try:
            return receive(lead_id, text.sid, text.words, open=self._entry_point, metadata=details)
        except (ConversationCompleted, LeadHasNoPhone, LeadOptedOut) as error:
            logger.warning("not opened text=%s lead=%s: %s", text.sid, lead_id, error)
            return receive(lead_id, text.sid, text.words, metadata=details)

    def _leads(self, text: _Inbound) -> list[str]:
        """Return the ids of the leads with the sender's number, the one whose text it is first. Make one if need be."""
        if text.number is None:
            return []
        if not callable(self._unknown):
            return _leads_with(text.number)
        if not numbers.leads_with(text.number):
            # Six first texts at once make one lead: whoever comes second finds it.
            current().dialect.hold(current().database, "close_engine.twilio", text.number)
        if found := _leads_with(text.number):
            return found
        made = self._unknown(text.number)
        return [] if made is None else [made.id if isinstance(made, Lead) else made]


_DONE = WebhookResponse(200, '<?xml version="1.0" encoding="UTF-8"?><Response/>', "text/xml")


def _id(label: str, value: Any) -> str:
    """Return an id, or another short word. No index can hold one of any length.

    Raises:
        InvalidValue: it is none.
    """
    found = clean_words(label, value, "Twilio always gives it")
    if len(found) > _LONGEST_ID:
        raise InvalidValue(label, found, f"it has more than {_LONGEST_ID} characters")
    return found


def _malformed(error: Exception) -> WebhookResponse:
    """Answer a request that no other attempt would mend."""
    logger.warning("malformed request: %s", type(error).__name__ if not isinstance(error, InvalidValue) else error)
    return WebhookResponse(400, "This is no request of Twilio's.")


def _committed(act: Callable[[], object], what: str) -> WebhookResponse:
    """Do it in one transaction, and answer. If it fails, nothing is kept, and the error is raised."""
    try:
        with atomic():
            act()
    except AfterCommitError as error:  # it IS committed
        logger.error("recorded %s: %s", what, error)
    return _DONE


def _heed(text: _Inbound) -> None:
    """Opt a number out or in that no lead has: the CRM may make its lead in a minute."""
    said = optouts.word(text.words)
    keyword = said or _OPT_OUT_TYPES.get(text.opt_out_type or "")
    if text.number is not None and keyword is not None:
        optouts.heard_from(text.number, keyword, source="text" if said else "provider", key=f"twilio:{text.sid}")


def _follow(text: _Inbound, lead_id: str) -> None:
    """Opt the lead out or in if Twilio has, because of a word that only Twilio was told of."""
    if text.opt_out_type == "STOP":
        optouts.opt_out(lead_id, source="provider", key=f"twilio:{text.sid}")
    elif text.opt_out_type == "START":
        optouts.opt_in(lead_id, source="provider", key=f"twilio:{text.sid}")


def _record(sid: str, word: str, send_key: str | None, code: str | None, why: str | None) -> None:
    # A messaging service finds out about an opt-out only after it has taken the text. The opt-out comes first, because
    # all code locks the conversation before its messages.
    if code == str(_OPTED_OUT):
        about = OutboxMessage.provider_id == sid
        about |= OutboxMessage.send_key == send_key
        message = OutboxMessage.select(OutboxMessage.id, OutboxMessage.conversation_id).where(about).first()
        if message is not None and message.lead_id is not None:
            optouts.opt_out(message.lead_id, source="provider", key=f"twilio:{sid}")
    record_delivery(word, provider_id=sid, send_key=send_key, error=why)


@dataclass(frozen=True)
class _Inbound:
    """A text as Twilio tells of it.

    Attributes:
        sid: its MessageSid.
        sender: who sent it, as Twilio writes it.
        words: what it says; of one without words, what came with it.
        details: what else is to be kept.
        opt_out_type: what Twilio's own opt-out has done because of it: STOP, START, HELP; None if nothing.
    """

    sid: str
    sender: str
    words: str
    details: dict[str, Any]
    opt_out_type: str | None

    @classmethod
    def of(cls, form: Mapping[str, str]) -> _Inbound:
        """Read a form.

        Raises:
            InvalidValue: it is not that of a text.
        """
        sid = _id("MessageSid", form.get("MessageSid"))
        sender = _id("From", form.get("From")).strip()
        media: list[dict[str, str]] = []
        while (url := form.get(f"MediaUrl{len(media)}")) is not None:
            kind = form.get(f"MediaContentType{len(media)}") or "application/octet-stream"
            media.append({"url": storable_text(url), "type": storable_text(kind)})
        details: dict[str, Any] = {"provider": "twilio", "from": sender}
        if form.get("To"):
            details["to"] = storable_text(form["To"])
        if media:
            details["media"] = media
        said = storable_text(form.get("Body") or "")
        return cls(sid, sender, said if said.strip() else _shown(media), details, form.get("OptOutType"))

    @property
    def number(self) -> str | None:
        """The sender's number in E.164; None of one who cannot be texted back: a short code, or another channel."""
        number = numbers.number_of(self.sender)
        return number if _E164.fullmatch(self.sender) and number and _E164.fullmatch(number) else None

    @property
    def why_ignored(self) -> str:
        return "no lead has this number" if self.number else "nobody can be texted there"


#: What a text without words brought, as the transcript shows it.
_MEDIA = {"image": "a picture", "video": "a video", "audio": "a recording"}


def _shown(media: list[dict[str, str]]) -> str:
    """Return the words for a text without any: otherwise nobody would see it, and no model would know of it."""
    kinds = [_MEDIA.get(each["type"].partition("/")[0], "a file") for each in media]
    counts = {kind: kinds.count(kind) for kind in kinds}
    shown = [kind if count == 1 else f"{count} {kind.partition(' ')[2]}s" for kind, count in counts.items()]
    return f"({', '.join(shown) or 'an empty text'})"


def _leads_with(number: str) -> list[str]:
    """Return the ids of the leads with a number: first the one whose open conversation it is, or else the newest."""
    found, ranks = numbers.leads_with(number), dict[str, tuple[int, datetime]]()
    model = CloseEngineConversation
    for conversation in model.select().readable().where(model.lead.in_(found)) if found else ():
        openness = 2 if conversation.stage in ACTIVE_STAGES else int(conversation.stage is Stage.STALLED)
        ranks[conversation.lead_id] = (openness, conversation.created_at)
    if not any(openness for openness, _ in ranks.values()):
        found = sorted({*found, *numbers.anybody_with(number)})
    # One without a conversation came after those whose conversation has ended.
    newest = (0, datetime.max.replace(tzinfo=timezone.utc))
    return sorted(found, key=lambda lead_id: (ranks.get(lead_id, newest), lead_id), reverse=True)
