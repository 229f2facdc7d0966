"""Payments with Stripe: a payment link for each conversation, and what Stripe says when it is paid.

    client = stripe.StripeClient(key, max_network_retries=2, http_client=stripe.RequestsClient(timeout=20))
    payments = StripePayments(client, amount=90000, currency="USD", product="A website")
    submit(conversation, ActionType.SEND_PAYMENT_LINK, text, metadata={"paymentUrl": payments.link(conversation)})

    webhook = StripeWebhook(secret, live=is_live(key))
    response = webhook(request.body, request.headers.get("Stripe-Signature"))

It needs the extra `close-engine[stripe]`. docs/stripe.md is the whole page.

>>> is_live("sk_test_1"), is_live("rk_live_1")
(False, True)
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import stripe

from close_engine.approvals import PendingAction
from close_engine.conversations import CloseEngineConversation
from close_engine.database.fields import clean_words, storable_text
from close_engine.database.transaction import atomic
from close_engine.errors import ConfigurationError, ConversationNotFound, PaymentUnmatched, UnreadableRow
from close_engine.integrations.webhooks import WebhookResponse
from close_engine.outbox import OutboxMessage
from close_engine.payments import Money, clean_money, links_of, note_payment, record_payment, record_refund
from close_engine.printable import get_logger
from close_engine.stages import ActionStatus, ActionType, MessageStatus, PaymentIssue

if TYPE_CHECKING:
    from stripe.params import PaymentLinkCreateParams

__all__ = ["StripePayments", "StripeWebhook", "is_live"]

logger = get_logger(__name__)

#: What a payment is told by: the conversation, its lead, and what was to be paid.
_CONVERSATION, _LEAD = "close_engine_conversation", "close_engine_lead"
_AMOUNT, _CURRENCY = "close_engine_amount", "close_engine_currency"


def is_live(api_key: str) -> bool:
    """Return whether an API key of Stripe is one of live mode: it says so itself.

    Raises:
        ConfigurationError: it does not say.
    """
    found = re.match("[sr]k_(live|test)_", api_key)
    if found is None:
        raise ConfigurationError(
            "A secret API key of Stripe begins with sk_live_, rk_live_, sk_test_ or rk_test_: give such a key, or say "
            "yourself whether it is live."
        )
    return found[1] == "live"


class StripePayments:
    """Makes the payment link of a conversation: one for each.

    Args:
        client: stripe.StripeClient. Give it a timeout, `http_client=stripe.RequestsClient(timeout=20)`, because the
            SDK's own is 80 seconds; and `max_network_retries=2`, which also waits for a second call of the same key.
        amount: int, the price, in the smallest unit of the currency.
        currency: str, the currency's code of three letters.
        product: str, what is sold: its name, as the lead reads it, or the id of a product in Stripe (`prod_…`).
        price: str, the id of a price in Stripe (`price_…`), instead of the other three.
        live: bool, whether real money is expected: a link of the other mode is refused. None to take either.
        options: mapping of more parameters for Stripe's payment link, such as `after_completion`.

    Raises:
        ConfigurationError: neither or both were given, a price and what it is made of.
    """

    def __init__(
        self,
        client: stripe.StripeClient,
        *,
        amount: int | None = None,
        currency: str | None = None,
        product: str | None = None,
        price: str | None = None,
        live: bool | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        parts = (amount, currency, product)
        if parts.count(None) != (0 if price is None else 3):
            raise ConfigurationError(
                "StripePayments needs the amount, the currency and the product, or the id of a price instead."
            )
        self._client = client
        self._amount, self._currency, self._product, self._price = amount, currency, product, price
        self._live = live
        self._options = dict(options or {})
        self._to_pay: Money | None = None if amount is None else Money(amount, str(currency).upper())
        self._is_known = price is None

    def link(self, conversation: CloseEngineConversation) -> str:
        """Return the conversation's payment link, and make it if there is none. Call it outside a transaction.

        A link that was sent, or waits to be sent or approved, is that link: also if the conversation was closed as lost
        and opened again since, and if the price is another one by now. Otherwise it is made under a key of the
        conversation and of what is asked for, so that of two calls at once, or of a call again within 24 hours, both
        return one link.

        Returns:
            str, its URL.

        Raises:
            ConversationNotFound: it was deleted.
            ConfigurationError: the link is of the other mode than `live` says.
            stripe.StripeError: Stripe is away, or refuses; the key may be called with again.
        """
        model = CloseEngineConversation
        row = model.select(model.lead, model.payment_link_url).where(model.id == conversation.id).tuples().first()
        if row is None:
            raise ConversationNotFound(conversation.id)
        lead_id, link = row
        return link or _waiting_link(conversation.id) or self._made(conversation.id, lead_id)

    def _made(self, conversation_id: str, lead_id: str) -> str:
        metadata = {_CONVERSATION: conversation_id, _LEAD: lead_id}
        if (to_pay := self._price_to_pay()) is not None:
            metadata |= {_AMOUNT: str(to_pay.amount), _CURRENCY: to_pay.currency}
        parameters = {
            "line_items": [{**self._item(), "quantity": 1}],
            "metadata": metadata,
            "payment_intent_data": {"metadata": metadata},
            # Whoever opens it a second time reads that it is paid.
            "restrictions": {"completed_sessions": {"limit": 1}},
            **self._options,
        }
        # Stripe refuses a key that comes again with anything else: another price is another key.
        asked = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]
        made = self._client.v1.payment_links.create(
            cast("PaymentLinkCreateParams", parameters),
            {"idempotency_key": f"close-engine:{conversation_id}:{asked}"},
        )
        if self._live is not None and made.livemode is not self._live:
            modes = ("live", "test") if made.livemode else ("test", "live")
            raise ConfigurationError(f"Stripe's API key is of {modes[0]} mode, and {modes[1]} mode is expected.")
        return made.url

    def _item(self) -> dict[str, Any]:
        if self._price is not None:
            return {"price": self._price}
        product = str(self._product)
        is_id = product.startswith("prod_")
        sold: dict[str, Any] = {"product": product} if is_id else {"product_data": {"name": product}}
        return {"price_data": {"currency": str(self._currency).lower(), "unit_amount": self._amount, **sold}}

    def _price_to_pay(self) -> Money | None:
        """Return what is to be paid; None if the price leaves that open."""
        if not self._is_known:
            price = self._client.v1.prices.retrieve(str(self._price))
            if price.unit_amount is not None:
                self._to_pay = Money(price.unit_amount, price.currency.upper())
            self._is_known = True
        return self._to_pay


def _waiting_link(conversation_id: str) -> str | None:
    """Return the link that waits to be sent or approved, or may have left without a word; None if there is none."""
    leaves = (OutboxMessage.status != MessageStatus.WITHDRAWN) | (OutboxMessage.claims > 0)
    messages = links_of(conversation_id).where(leaves)
    waits = (PendingAction.conversation_id == conversation_id) & (PendingAction.type == ActionType.SEND_PAYMENT_LINK)
    waits &= PendingAction.status == ActionStatus.PENDING
    actions = PendingAction.select().readable().where(waits).order_by(PendingAction.created_at.desc())
    payloads = [*(message.payload for message in messages), *(action.metadata for action in actions)]
    urls = (payload.get("paymentUrl") for payload in payloads if isinstance(payload, dict))
    return next((url for url in urls if isinstance(url, str) and url), None)


@dataclass(frozen=True)
class _Told:
    """What an event tells of a payment."""

    key: str
    amount: int
    currency: str
    metadata: Mapping[str, Any]
    is_refund: bool = False

    def __post_init__(self) -> None:
        clean_words("key", self.key, "Stripe always gives it")
        clean_money(self.amount, self.currency)

    @property
    def price(self) -> tuple[int, str] | None:
        """What was to be paid; None if it does not say."""
        amount, currency = self.metadata.get(_AMOUNT), self.metadata.get(_CURRENCY)
        if not (isinstance(amount, str) and re.fullmatch("[0-9]{1,18}", amount)):
            return None
        is_code = isinstance(currency, str) and re.fullmatch("[A-Za-z]{3}", currency)
        return (int(amount), str(currency)) if is_code else None


class StripeWebhook:
    """Answers what Stripe's webhook sends: records what was paid and paid back, and keeps what matches nothing.

    Subscribe the endpoint to `checkout.session.completed`, `checkout.session.async_payment_succeeded`,
    `payment_intent.succeeded` and `charge.refunded`. Any other event is ignored.

    Args:
        secret: str, the endpoint's signing secret (`whsec_…`).
        live: bool, whether real money is expected. A payment of the other mode completes nothing: it is kept, as
            `test`, to be looked at.
        tolerance: int, how old a signature may be, in seconds.
        partial_completes: bool, as for `record_payment`.

    Raises:
        ConfigurationError: there is no secret, or the tolerance is not greater than zero.
    """

    def __init__(self, secret: str, *, live: bool, tolerance: int = 300, partial_completes: bool = False) -> None:
        if not secret.strip():
            raise ConfigurationError(
                "Stripe's webhook needs the signing secret of its endpoint, which begins with whsec_."
            )
        if tolerance <= 0:
            raise ConfigurationError("tolerance must be greater than 0 seconds: an old signature may be a stolen one.")
        self._secret, self._live, self._tolerance = secret, live, tolerance
        self._partial_completes = partial_completes

    def __call__(self, body: bytes, signature: str | None) -> WebhookResponse:
        """Do what an event asks for, in one transaction.

        Args:
            body: bytes, as they came: the signature is about them.
            signature: str, the header Stripe-Signature; None if there is none.

        Returns:
            WebhookResponse: 200; 400 if the request is not Stripe's, is too old or cannot be read; 500 if a row cannot
            be read, so that Stripe tries again after it is corrected.
        """
        try:
            stripe.Webhook.construct_event(body, signature, self._secret, self._tolerance)
        except stripe.SignatureVerificationError:
            return _refused("The signature is missing, wrong or too old.")
        except (ValueError, TypeError, AttributeError, RecursionError):
            return _refused("The body is not an event of Stripe.")
        event = json.loads(body)
        try:
            told = _told(event["type"], event["data"]["object"])
            is_live, name = bool(event["livemode"]), str(event["id"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return _refused("The event lacks something that every event of its type has.")
        if told is None:
            return WebhookResponse(200, "ignored")
        details = {"event": name, "type": event["type"], "livemode": is_live, **told.metadata}
        return self._handled(told, is_live, details)

    def _handled(self, told: _Told, is_live: bool, details: dict[str, Any]) -> WebhookResponse:
        lead_id, sentence = _lead_of(told.metadata)
        if is_live is not self._live:
            if told.is_refund:
                return WebhookResponse(200, "ignored")
            modes = ("live", "test") if is_live else ("test", "live")
            return _kept(
                PaymentIssue.TEST,
                told,
                lead_id,
                f"It was made in {modes[0]} mode, and {modes[1]} mode is expected.",
                details,
            )
        if told.is_refund:
            record_refund(told.key, told.amount, told.currency, lead=lead_id, metadata=details)
            logger.warning("payment %s: refunded", told.key)
            return WebhookResponse(200, "refunded")
        if lead_id is None:
            return _kept(PaymentIssue.UNMATCHED, told, lead_id, sentence, details)
        with atomic():
            try:
                payment = record_payment(
                    lead_id,
                    told.key,
                    amount=told.amount,
                    currency=told.currency,
                    price=told.price,
                    partial_completes=self._partial_completes,
                    actor="stripe",
                    metadata=details,
                )
            except PaymentUnmatched as error:
                return _kept(PaymentIssue.UNMATCHED, told, lead_id, str(error), details)
            except UnreadableRow as error:
                kept = _kept(PaymentIssue.UNMATCHED, told, lead_id, str(error), details)
                return WebhookResponse(500, kept.text)
        words = {"duplicate": payment.duplicate, "surplus": payment.surplus, "partial": payment.partial}
        said = next((word for word, is_so in words.items() if is_so), "recorded")
        needs_a_look = not payment.duplicate and (payment.surplus or payment.partial)
        logger.log(logging.WARNING if needs_a_look else logging.INFO, "payment %s: %s", told.key, said)
        return WebhookResponse(200, said)


def _kept(
    issue: PaymentIssue, told: _Told, lead_id: str | None, sentence: str, details: Mapping[str, Any]
) -> WebhookResponse:
    entry = note_payment(
        "test" if issue is PaymentIssue.TEST else "unmatched",
        told.key,
        sentence,
        lead=lead_id,
        amount=told.amount,
        currency=told.currency,
        metadata=details,
    )
    if entry.issue is not issue:  # another event has told of it already, and more
        return WebhookResponse(200, "duplicate")
    logger.warning("payment %s: %s", told.key, issue.value)
    return WebhookResponse(200, "kept")


def _refused(why: str) -> WebhookResponse:
    logger.warning("refused a request to Stripe's webhook: %s", why)
    return WebhookResponse(400, why)


def _lead_of(metadata: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the lead whose conversation a payment names; None if there is none, and a sentence that says so."""
    conversation_id, lead_id = metadata.get(_CONVERSATION), metadata.get(_LEAD)
    if not isinstance(conversation_id, str):
        return None, "It names no conversation."
    model = CloseEngineConversation
    # The conversation's own lead, which may be another one after a merge.
    found: str | None = model.select(model.lead).where(model.id == conversation_id).scalar()
    if found is None and isinstance(lead_id, str):
        found = model.select(model.lead).where(model.lead == lead_id).scalar()
    return found, "" if found else f"There is no conversation {conversation_id!r}."


def _told(kind: str, found: Mapping[str, Any]) -> _Told | None:
    """Read what an event tells of a payment; None if it tells of none.

    A payment is known by its payment intent, which every event of it names. A session that costs nothing has none, and
    is known by itself.
    """
    # Other payments of the account have metadata that somebody else wrote.
    metadata = {storable_text(name): storable_text(value) for name, value in (found.get("metadata") or {}).items()}
    if kind in ("checkout.session.completed", "checkout.session.async_payment_succeeded"):
        if found["payment_status"] == "unpaid" or found["amount_total"] is None:
            return None  # a bank takes days: another event will tell
        key = _id_of(found["payment_intent"]) or found["id"]
        return _Told(key, found["amount_total"], found["currency"], metadata)
    if kind == "payment_intent.succeeded":
        return _Told(found["id"], found["amount_received"], found["currency"], metadata)
    if kind == "charge.refunded":
        key = _id_of(found["payment_intent"]) or found["id"]
        return _Told(key, found["amount_refunded"], found["currency"], metadata, is_refund=True)
    return None


def _id_of(value: Any) -> str | None:
    """Return the id of what Stripe names by its id, or shows as a whole."""
    found: str | None = value["id"] if isinstance(value, dict) else value
    return found
