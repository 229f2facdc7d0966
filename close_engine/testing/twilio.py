"""A stand-in for Twilio: the real SDK sends texts to it and lists them, and it makes the webhooks' requests.

    with TwilioStandIn() as twilio:
        sender = TwilioSender(twilio.client(), from_=twilio.number)
        Worker(sender, topics=list(ActionType)).run_until_empty()
        print(twilio.delivered_to("+15550100"))
        twilio.text_from("+15550100", "Yes!", "http://127.0.0.1:8000/webhooks/twilio/texts")

It signs its requests with the SDK's own signer.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import format_datetime
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

from twilio.request_validator import RequestValidator
from twilio.rest import Client

from close_engine.integrations.twilio import TwilioHttp
from close_engine.testing.stand_ins import Call, Reply, StandIn

__all__ = ["Answered", "SentText", "TwilioStandIn"]


class Answered(NamedTuple):
    """What a webhook answered to a request.

    Attributes:
        status: int, the HTTP status; 0 if nobody answered.
        text: str, the body, or why nobody answered.
    """

    status: int
    text: str


@dataclass
class SentText:
    """A text that the stand-in took.

    Attributes:
        sid: its MessageSid.
        to, from_, body: as they were given; `from_` is the messaging service if that was to send.
        status_callback: the URL at which to say what became of it; None if there is none.
        created_at: datetime, when it was taken.
        status: what Twilio calls its status.
        error_code: int, why it was not delivered.
    """

    sid: str
    to: str
    from_: str
    body: str
    status_callback: str | None
    created_at: datetime
    status: str = "queued"
    error_code: int | None = None


class TwilioStandIn(StandIn):
    """Answers as Twilio's Messages do, on the loopback address.

    Args:
        reports: the statuses that it says of each text by itself, such as `("sent", "delivered")`, if the text has a
            status callback.
        clock: a function that returns the time with a timezone; the default is the real one.

    Attributes:
        account_sid, auth_token: the account's.
        number: str, a number of the account's.
        texts: list of SentText, every text that it took, the oldest first.
        refused: dict of a number to the error code with which texts to it are refused: 21610 if it opted out.
        lost_answers: int, how many of the next texts are taken and answered with an error all the same.
        is_unknown: whether the account's credentials are wrong.
        reported: list of Answered, by the status callbacks to what it said by itself.
    """

    def __init__(self, *, reports: Sequence[str] = (), clock: Callable[[], datetime] | None = None) -> None:
        super().__init__()
        self.account_sid = f"AC{secrets.token_hex(16)}"
        self.auth_token = secrets.token_hex(16)
        self.number = "+15550199999"
        self.texts: list[SentText] = []
        self.refused: dict[str, int] = {}
        self.lost_answers = 0
        self.is_unknown = False
        self.reported: list[Answered] = []
        self._reports = tuple(reports)
        self._clock = clock or (lambda: datetime.now(timezone.utc))
        self._reporters: list[threading.Thread] = []

    def client(self, *, timeout: float = 10.0) -> Client:
        """Make the SDK's client of this account, which speaks to this stand-in."""
        return Client(self.account_sid, self.auth_token, http_client=TwilioHttp(base_url=self.url, timeout=timeout))

    def delivered_to(self, number: str) -> list[str]:
        """Return what was texted to a number, the oldest first, without what was not delivered."""
        failed = ("failed", "undelivered", "canceled")
        with self.lock:
            return [text.body for text in self.texts if text.to == number and text.status not in failed]

    # -- what Twilio asks

    def text_from(
        self,
        number: str,
        body: str,
        to_url: str,
        *,
        sid: str | None = None,
        media: Sequence[str] = (),
        signed_as: str | None = None,
        **more: str,
    ) -> Answered:
        """Make the request of a text that came in.

        Args:
            number: str, who sent it.
            body: str, what it says.
            to_url: str, of the webhook.
            sid: str, its MessageSid; the default is a new one. The same again is Twilio's retry.
            media: the types of what came with it, such as `image/jpeg`.
            signed_as: str, the URL that Twilio knows, if a proxy stands before the webhook.
            more: other fields of the form.

        Returns:
            Answered.
        """
        return self.post(to_url, self.inbound(number, body, sid=sid, media=media, **more), signed_as=signed_as)

    def inbound(
        self, number: str, body: str, *, sid: str | None = None, media: Sequence[str] = (), **more: str
    ) -> dict[str, str]:
        """Return the form of a text that came in, as `text_from` posts it."""
        sid = sid or f"SM{secrets.token_hex(16)}"
        form = {"MessageSid": sid, "SmsSid": sid, "AccountSid": self.account_sid, "From": number, "To": self.number}
        form |= {"Body": body, "NumMedia": str(len(media)), "NumSegments": "1", "ApiVersion": "2010-04-01"}
        for place, kind in enumerate(media):
            form[f"MediaUrl{place}"] = f"{self.url}/2010-04-01/Accounts/{self.account_sid}/Messages/{sid}/Media/{place}"
            form[f"MediaContentType{place}"] = kind
        return {**form, **more}

    def report(self, text: SentText, status: str, error_code: int | None = None) -> Answered | None:
        """Say what became of a text, at its status callback.

        Args:
            text: SentText.
            status: str, Twilio's word.
            error_code: int, why it was not delivered.

        Returns:
            Answered; None if the text has no status callback.
        """
        with self.lock:
            text.status, text.error_code = status, error_code
        if text.status_callback is None:
            return None
        form = {"MessageSid": text.sid, "MessageStatus": status, "SmsStatus": status, "AccountSid": self.account_sid}
        form |= {"To": text.to, "From": text.from_, "ApiVersion": "2010-04-01"}
        if error_code is not None:
            form["ErrorCode"] = str(error_code)
        return self.post(text.status_callback, form)

    def post(self, url: str, form: Mapping[str, str], *, signed_as: str | None = None) -> Answered:
        """Make a request that is signed as Twilio's are. What it has not got of an answer is raised."""
        signature = self.signature(signed_as or url, form)
        headers = {"X-Twilio-Signature": signature, "Content-Type": "application/x-www-form-urlencoded; charset=UTF-8"}
        request = Request(url, urlencode(form).encode(), headers, method="POST")
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=30) as answer:
                return Answered(answer.status, answer.read().decode())
        except HTTPError as error:
            with error:
                return Answered(error.code, error.read().decode())

    def signature(self, url: str, form: Mapping[str, str]) -> str:
        """Sign a request, as the SDK does."""
        return str(RequestValidator(self.auth_token).compute_signature(url, dict(form)))

    def stop(self) -> None:
        """Wait until everything was reported, and stop listening."""
        for reporter in list(self._reporters):
            reporter.join(30)
        super().stop()

    # -- what Twilio answers

    def answer(self, call: Call) -> Reply:
        """Answer the SDK."""
        login = base64.b64encode(f"{self.account_sid}:{self.auth_token}".encode()).decode()
        if self.is_unknown or call.headers.get("authorization") != f"Basic {login}":
            return _refusal(401, 20003, "Authenticate")
        found = re.fullmatch(rf"/2010-04-01/Accounts/{self.account_sid}/Messages(?:/(\w+))?\.json", call.path)
        if found is None:
            return _refusal(404, 20404, f"The requested resource {call.path} was not found")
        if call.method == "POST" and not found[1]:
            return self._create(call.form)
        return self._list(call) if not found[1] else self._fetch(found[1])

    def _create(self, form: Mapping[str, str]) -> Reply:
        to, body = form.get("To", ""), form.get("Body", "")
        sender = form.get("From") or form.get("MessagingServiceSid")
        if problem := self._problem(to, sender, body):
            return problem
        text = SentText(f"SM{secrets.token_hex(16)}", to, str(sender), body, form.get("StatusCallback"), self._clock())
        with self.lock:
            self.texts.append(text)
            is_lost, self.lost_answers = self.lost_answers > 0, max(0, self.lost_answers - 1)
        if self._reports and text.status_callback:
            reporter = threading.Thread(target=self._report_all, args=(text,), daemon=True)
            self._reporters.append(reporter)
            reporter.start()
        return _refusal(500, 20500, "Internal Server Error") if is_lost else _json(201, self._resource(text))

    def _problem(self, to: str, sender: str | None, body: str) -> Reply | None:
        if not to:
            return _refusal(400, 21604, "A 'To' phone number is required.")
        if not re.fullmatch(r"\+[1-9][0-9]{6,14}", to):
            return _refusal(400, 21211, f"Invalid 'To' Phone Number: {to}")
        if not sender:
            return _refusal(400, 21603, "A 'From' phone number is required.")
        if not body.strip():
            return _refusal(400, 21602, "Message body is required.")
        if len(body) > 1600:
            return _refusal(400, 21617, "The concatenated message body exceeds the 1600 character limit")
        if code := self.refused.get(to):
            return _refusal(429 if code == 20429 else 400, code, "Attempt to send to a number that is refused")
        return None

    def _report_all(self, text: SentText) -> None:
        for status in self._reports:
            try:
                answered = self.report(text, status)
            except OSError as error:
                answered = Answered(0, f"nobody answered: {error}")
            if answered is not None:
                with self.lock:
                    self.reported.append(answered)

    def _fetch(self, sid: str) -> Reply:
        with self.lock:
            found = [text for text in self.texts if text.sid == sid]
        return _json(200, self._resource(found[0])) if found else _refusal(404, 20404, "The text was not found")

    def _list(self, call: Call) -> Reply:
        """Return one page of the texts, the newest first."""
        query = dict(call.query)
        size, page = min(int(query.get("PageSize", 50)), 1000), int(query.get("Page", 0))
        since = query.get("DateSent>", "")[:10]
        with self.lock:
            found = [
                self._resource(text)
                for text in reversed(self.texts)
                if query.get("To", text.to) == text.to
                and query.get("From", text.from_) == text.from_
                and text.created_at.strftime("%Y-%m-%d") >= since
            ]
        has_more = len(found) > (page + 1) * size
        following = f"{call.path}?{urlencode({**query, 'Page': page + 1})}" if has_more else None
        shown = found[page * size : (page + 1) * size]
        uris = {"uri": call.path, "first_page_uri": call.path, "next_page_uri": following, "previous_page_uri": None}
        return _json(200, {"messages": shown, "page": page, "page_size": size, "start": 0, "end": len(shown), **uris})

    def _resource(self, text: SentText) -> dict[str, Any]:
        date = format_datetime(text.created_at.astimezone(timezone.utc))
        is_service = text.from_.startswith("MG")
        return {
            "sid": text.sid,
            "account_sid": self.account_sid,
            "api_version": "2010-04-01",
            "body": text.body,
            "to": text.to,
            "from": None if is_service else text.from_,
            "messaging_service_sid": text.from_ if is_service else None,
            "direction": "outbound-api",
            "status": text.status,
            "error_code": text.error_code,
            "error_message": None,
            "date_created": date,
            "date_updated": date,
            "date_sent": None if text.status in ("accepted", "queued") else date,
            "num_media": "0",
            "num_segments": "1",
            "price": None,
            "price_unit": "USD",
            "uri": f"/2010-04-01/Accounts/{self.account_sid}/Messages/{text.sid}.json",
            "subresource_uris": {},
        }


def _json(status: int, payload: Mapping[str, Any]) -> Reply:
    return Reply(status, json.dumps(payload).encode())


def _refusal(status: int, code: int, message: str) -> Reply:
    info = f"https://www.twilio.com/docs/errors/{code}"
    return _json(status, {"code": code, "message": message, "more_info": info, "status": status})
