"""The command `close-engine`: one function per command, one file per group of commands. Nothing else imports it."""

# Importing a file registers its commands. The help lists them in this order.
from close_engine.cli import schema, conversations, approvals, messages, serve, payments  # noqa: F401, I001
from close_engine.cli import texts, subscriptions, retention, board, users, demo  # noqa: F401
from close_engine.cli.app import main

__all__ = ["main"]
