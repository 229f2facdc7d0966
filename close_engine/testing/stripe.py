"""A stand-in for Stripe: the real SDK makes payment links with it, and it tells a webhook that they were paid.

    with StripeStandIn() as stripe:
        payments = StripePayments(stripe.client(), amount=90000, currency="USD", product="A website")
        link = payments.link(conversation)
        webhook = StripeWebhook(stripe.secret, live=False)
        stripe.pay(link, webhook)                                   # or the URL at which it is served

It signs its events with the SDK's own signer.
"""

from __future__ import annotations

import html
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import stripe

from close_engine.integrations.webhooks import WebhookResponse
from close_engine.testing.stand_ins import Call, Reply, StandIn

__all__ = ["StripeStandIn"]

#: Where events go: a URL, or what answers them in this process.
Webhook = str | Callable[[bytes, str | None], WebhookResponse]

#: What Stripe says of a payment by card, in the order in which it mostly comes.
PAID = ("payment_intent.succeeded", "checkout.session.completed")


class StripeStandIn(StandIn):
    """Answers as Stripe's API does for payment links and prices, on the loopback address.

    A link is a page, too: opening it shows a button, and pressing that pays, and tells `webhook`.

    Args:
        live: whether it is in live mode.
        webhook: where the page of a link tells that it was paid; None for nowhere.

    Attributes:
        api_key: str, the key that it takes.
        secret: str, the signing secret of its webhook endpoint.
        links: dict of the id of each payment link that it made to the link, as Stripe shows it.
        prices: dict of the id of each price to the price.
        events: list of dict, every event that it told, in order.
        answers: list of WebhookResponse, to what the pages of links told.
    """

    def __init__(self, *, live: bool = False, webhook: Webhook | None = None) -> None:
        super().__init__()
        self.live = live
        self.webhook = webhook
        self.api_key = f"sk_{'live' if live else 'test'}_{secrets.token_hex(12)}"
        self.secret = f"whsec_{secrets.token_hex(16)}"
        self.links: dict[str, dict[str, Any]] = {}
        self.prices: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.answers: list[WebhookResponse] = []
        self._answered: dict[str, tuple[dict[str, str], Reply]] = {}
        self._paid: dict[str, int] = {}
        self._payments: dict[str, dict[str, Any]] = {}

    def client(self, *, timeout: float = 10.0, max_network_retries: int = 0) -> stripe.StripeClient:
        """Make the SDK's client, which speaks to this stand-in."""
        return stripe.StripeClient(
            self.api_key,
            base_addresses={"api": self.url},
            max_network_retries=max_network_retries,
            http_client=stripe.RequestsClient(timeout=timeout),
        )

    def forget_keys(self) -> None:
        """Forget the idempotency keys, as Stripe may after 24 hours."""
        with self.lock:
            self._answered.clear()

    # -- what the SDK asks

    def answer(self, call: Call) -> Reply:
        """Answer the SDK, or whoever opens the page of a link."""
        if call.path.startswith("/pay/"):
            return self._page(call)
        if call.headers.get("authorization") != f"Bearer {self.api_key}":
            return _refusal(401, "authentication_error", "Invalid API Key provided.")
        key = call.headers.get("idempotency-key")
        with self.lock:
            if call.method != "POST" or key is None:
                return self._made_or_found(call)
            if key in self._answered:
                form, reply = self._answered[key]
                if form != call.form:
                    return _refusal(400, "idempotency_error", "This key was used with other parameters.")
                return Reply(reply.status, reply.body, {"Idempotent-Replayed": "true"})
            reply = self._made_or_found(call)
            self._answered[key] = call.form, reply
            return reply

    def _made_or_found(self, call: Call) -> Reply:
        _, _, kind, *rest = call.path.split("/")
        shelf = {"payment_links": self.links, "prices": self.prices}.get(kind)
        if shelf is None or len(rest) > 1 or call.method not in ("GET", "POST"):
            return _refusal(404, "invalid_request_error", f"Unrecognized request URL ({call.method}: {call.path}).")
        if rest:
            found = shelf.get(rest[0])
            if found is None:
                return _refusal(404, "invalid_request_error", f"No such object: {rest[0]!r}")
            return _shown(found)
        make = {"payment_links": self._new_link, "prices": self._new_price}[kind]
        return make(call.form)

    def _new_price(self, form: Mapping[str, str]) -> Reply:
        made: dict[str, Any] = {
            "id": f"price_{secrets.token_hex(8)}",
            "object": "price",
            "currency": form["currency"],
            "unit_amount": int(form["unit_amount"]),
            "livemode": self.live,
        }
        self.prices[made["id"]] = made
        return _shown(made)

    def _new_link(self, form: Mapping[str, str]) -> Reply:
        item = "line_items[0]"
        if (name := form.get(f"{item}[price]")) is not None:
            if name not in self.prices:
                return _refusal(400, "invalid_request_error", f"No such price: {name!r}")
            amount, currency = self.prices[name]["unit_amount"], self.prices[name]["currency"]
        else:
            amount, currency = int(form[f"{item}[price_data][unit_amount]"]), form[f"{item}[price_data][currency]"]
        link_id = f"plink_{secrets.token_hex(8)}"
        limit = form.get("restrictions[completed_sessions][limit]")
        self.links[link_id] = {
            "id": link_id,
            "object": "payment_link",
            "active": True,
            "amount": amount,
            "currency": currency,
            "livemode": self.live,
            "metadata": _mapping(form, "metadata"),
            "payment_intent_data": {"metadata": _mapping(form, "payment_intent_data[metadata]")},
            "restrictions": None if limit is None else {"completed_sessions": {"limit": int(limit)}},
            "url": f"{self.url}/pay/{link_id}",
        }
        return _shown(self.links[link_id])

    # -- what Stripe tells

    def pay(
        self,
        link: str,
        to: Webhook,
        *,
        amount: int | None = None,
        events: Sequence[str] = PAID,
        live: bool | None = None,
    ) -> list[WebhookResponse]:
        """Pay what a link asks for, and tell a webhook.

        Args:
            link: its URL.
            to: the URL of the webhook, or the webhook itself.
            amount: what is paid; the default is the price.
            events: which events are told, in this order; one that is named twice is told twice.
                `checkout.session.async_payment_succeeded` makes it a payment by bank: the session completes unpaid.
            live: whether they are of live mode; the default is the mode of this stand-in.

        Returns:
            what the webhook answered to each.

        Raises:
            ValueError: there is no such link, or it was paid as often as it may be.
        """
        found = self._taken(link)
        paid = found["amount"] if amount is None else amount
        intent = f"pi_{secrets.token_hex(8)}"
        self._payments[intent] = {
            "id": intent,
            "object": "payment_intent",
            "status": "succeeded",
            "amount": found["amount"],
            "amount_received": paid,
            "currency": found["currency"],
            "metadata": found["payment_intent_data"]["metadata"],
        }
        session = {
            "id": f"cs_{secrets.token_hex(8)}",
            "object": "checkout.session",
            "mode": "payment",
            "status": "complete",
            "amount_total": paid,
            "currency": found["currency"],
            "metadata": found["metadata"],
            "payment_intent": intent if paid else None,
            "payment_link": found["id"],
            "payment_status": "paid" if paid else "no_payment_required",
        }
        by_bank = "checkout.session.async_payment_succeeded" in events
        told: dict[str, Any] = {"payment_intent.succeeded": self._payments[intent]}
        unpaid = {**session, "payment_status": "unpaid"}
        told["checkout.session.completed"] = unpaid if by_bank else session
        told["checkout.session.async_payment_succeeded"] = session
        # Stripe tells an event again under the id that it had.
        made = {kind: self.event(kind, told[kind], live=live) for kind in dict.fromkeys(events)}
        return [self.tell(made[kind], to) for kind in events]

    def refund(
        self, intent: str, to: Webhook, *, amount: int | None = None, live: bool | None = None
    ) -> WebhookResponse:
        """Pay a payment back, and tell a webhook.

        Args:
            intent: the payment intent; `paid_with` names those of a link.
            to: as for `pay`.
            amount: how much of it was paid back so far; the default is all.
            live: as for `pay`.
        """
        payment = self._payments[intent]
        charge = {
            "id": f"ch_{secrets.token_hex(8)}",
            "object": "charge",
            "amount": payment["amount_received"],
            "amount_refunded": payment["amount_received"] if amount is None else amount,
            "currency": payment["currency"],
            "metadata": payment["metadata"],
            "payment_intent": intent,
        }
        return self.tell(self.event("charge.refunded", charge, live=live), to)

    def paid_with(self, link: str) -> list[str]:
        """Return the payment intents of a link, oldest first."""
        metadata = self.links[link.rpartition("/")[2]]["payment_intent_data"]["metadata"]
        return [intent for intent, payment in self._payments.items() if payment["metadata"] == metadata]

    def event(self, kind: str, found: Mapping[str, Any], *, live: bool | None = None) -> dict[str, Any]:
        """Make an event of what it is about, as Stripe does."""
        is_live = self.live if live is None else live
        return {
            "id": f"evt_{secrets.token_hex(8)}",
            "object": "event",
            "api_version": stripe.api_version,
            "created": int(time.time()),
            "livemode": is_live,
            "pending_webhooks": 1,
            "request": None,
            "type": kind,
            "data": {"object": {**found, "livemode": is_live}},
        }

    def signed(self, event: Mapping[str, Any], *, at: float | None = None) -> tuple[bytes, str]:
        """Return the body and the signature of the request that tells an event.

        Args:
            event: the event.
            at: when it is signed, in seconds since 1970; the default is now.
        """
        body = json.dumps(event, indent=2)
        stamp = int(time.time() if at is None else at)
        return body.encode(), stripe.WebhookSignature.generate_signature_header(body, self.secret, stamp)

    def tell(self, event: Mapping[str, Any], to: Webhook) -> WebhookResponse:
        """Tell a webhook of an event, and return what it answers."""
        body, signature = self.signed(event)
        with self.lock:
            self.events.append(dict(event))
        if not isinstance(to, str):
            return to(body, signature)
        headers = {"Content-Type": "application/json; charset=utf-8", "Stripe-Signature": signature}
        request = Request(to, body, headers, method="POST")
        try:
            with build_opener(ProxyHandler({})).open(request, timeout=60) as response:
                return WebhookResponse(response.status, response.read().decode())
        except HTTPError as refusal:
            with refusal:
                return WebhookResponse(refusal.code, refusal.read().decode())

    def _taken(self, link: str) -> dict[str, Any]:
        """Count that a link is paid, and return it."""
        link_id = link.rpartition("/")[2]
        with self.lock:
            found = self.links.get(link_id)
            if found is None:
                raise ValueError(f"There is no payment link {link}.")
            limit = (found["restrictions"] or {}).get("completed_sessions", {}).get("limit")
            if limit is not None and self._paid.get(link_id, 0) >= limit:
                raise ValueError(f"The payment link {link} was paid already.")
            self._paid[link_id] = self._paid.get(link_id, 0) + 1
            return found

    def _page(self, call: Call) -> Reply:
        link = f"{self.url}{call.path}"
        try:
            if call.method == "POST":
                if self.webhook is None:
                    raise ValueError("This stand-in knows no webhook: give it one.")
                self.answers += self.pay(link, self.webhook)
                return _html("Thank you, it is paid.")
            found = self.links[call.path.rpartition("/")[2]]
        except (KeyError, ValueError) as refusal:
            return _html(str(refusal), 404)
        button = '<form method="post"><button>Pay</button></form>'
        return _html(f"{found['amount']} {found['currency'].upper()}", below=button)


def _mapping(form: Mapping[str, str], name: str) -> dict[str, str]:
    """Return the values of `name[…]` in a form."""
    found = ((re.fullmatch(rf"{re.escape(name)}\[([^\]]+)\]", key), value) for key, value in form.items())
    return {match[1]: value for match, value in found if match is not None}


def _shown(found: Mapping[str, Any]) -> Reply:
    return Reply(200, json.dumps(found).encode())


def _refusal(status: int, kind: str, message: str) -> Reply:
    return Reply(status, json.dumps({"error": {"type": kind, "message": message}}).encode())


def _html(text: str, status: int = 200, below: str = "") -> Reply:
    page = f"<!doctype html><title>Pay</title><p>{html.escape(text)}</p>{below}"
    return Reply(status, page.encode(), media_type="text/html; charset=utf-8")
