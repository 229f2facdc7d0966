"""What a webhook answers, whatever web framework calls it."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["WebhookResponse"]


@dataclass(frozen=True)
class WebhookResponse:
    """The response to a provider's request.

    Attributes:
        status: int, the HTTP status. From 500 on, the provider tries again.
        text: str, the body.
        media_type: str, the type of the body.
    """

    status: int
    text: str = ""
    media_type: str = "text/plain"
