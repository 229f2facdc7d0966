"""What is served over HTTP: an ASGI application to serve, or routes to mount in your own. It needs the extra `web`.

    app = create_app(texts=TwilioWebhooks(auth_token), payments=StripeWebhook(secret, live=True))

`close-engine serve` serves it.
"""

from close_engine.errors import ConfigurationError

try:
    import starlette  # noqa: F401
except ImportError as missing:
    raise ConfigurationError(
        "Serving over HTTP needs the package starlette: pip install 'close-engine[web]'."
    ) from missing

from close_engine.web.app import create_app, routes

__all__ = ["create_app", "routes"]
